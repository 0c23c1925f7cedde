"""The page of a training: what it says, that it stands alone, and what it escapes."""

import copy
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from fused_res.cli import CommandError
from fused_res.train.report import page, read_log

CLASSES = ["ant", "bee", "cat"]


def confusion(classes, right, wrong):
    """``right`` of each class are; of class 0 ``wrong`` are taken for class 1."""
    rows = [[right * (i == j) for j in range(classes)] for i in range(classes)]
    rows[0][1] = wrong
    return rows


def records(classes=CLASSES, epochs=4, of=4, nets=("fused", "plain"), ended=True, **more):
    about = {"parameters": 12345, "fused": ["layer1.0"], "skipped": [["stem", "no addition"]]}
    out = [
        {
            "event": "start",
            "time": "2026-01-02T03:04:05+00:00",
            "model": "resnet20",
            "arguments": {"width": 8},
            "data": {"name": "digits", "classes": classes, "train": 1437, "val": 360, "size": 32},
            "settings": {"epochs": of, "lr": 0.1},
            "versions": {"torch": "2.13.0"},
            "device": "cpu",
            "nets": dict.fromkeys(nets, about),
        }
    ]
    for epoch in range(1, epochs + 1):
        out += [
            {
                "event": "epoch",
                "net": net,
                "epoch": epoch,
                "of": of,
                "loss": 1 / epoch,
                "train_accuracy": 0.5,
                "val_loss": 2 / epoch,
                "val_accuracy": 0.25,
                "learning_rate": 0.1,
                "seconds": 1.0,
                "images_per_second": (300.0 if net == "fused" else 200.0) - (epoch == 1) * 150,
                **more,
            }
            for net in nets
        ]
    for net, accuracy in (("fused", 0.8125), ("plain", 0.8)) if ended else ():
        if net in nets:
            end = {"event": "end", "net": net, "val_accuracy": accuracy, "train_accuracy": 0.9}
            counts = confusion(len(classes), 90, 7)
            out.append({**end, "confusion": counts, "peak_memory": None})
    return out


def rows(text):
    """The cells of every row of every table."""
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    ]


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    """Well-formed, no other file is wanted, and every id is there once."""
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    assert not re.search(r"\b(?:src|href)=[\"'](?!#|data:)|@import|url\((?!#)|<script", text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', text)) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_both_nets():
    text = page(records())
    check(text)
    assert "resnet20 on digits" in text and "1,437 images of 32x32" in text
    for row in (
        ["", "PyTorch", "fused_res", "fused_res is"],
        ["epochs, of 4", "4", "4", ""],
        ["accuracy, validation", "80.00%", "81.25%", "+1.25 points"],
        ["accuracy, training", "90.00%", "90.00%", "+0.00 points"],
        ["loss, validation", "0.5000", "0.5000", "+0.0000"],
        ["images/s, median", "200", "300", "1.50x faster"],
        ["parameters", "12,345", "12,345", "the same"],
        ["bee", "0", "90", "0"],
        ["ant", "bee", "7", "7%"],
        ["stem", "no addition"],
        ["lr", "0.1"],
        ["torch", "2.13.0"],
        ["width", "8"],
    ):
        assert row in rows(text), row
    assert "1 fused, 1 skipped" in text and "<code>layer1.0</code>" in text
    assert text.count("<svg") == 3 and text.count('class="confusion"') == 2
    assert "Not finished" not in text and "peak memory" not in text and "averaged" not in text


def test_a_page_is_always_the_same():
    assert page(records()) == page(records())


def test_what_only_some_logs_have():
    log = records(val_accuracy_ema=0.5)
    for record in log[-2:]:
        record["peak_memory"] = 2**30 if record["net"] == "plain" else 2**29
    text = page(log)
    check(text)
    assert ["accuracy, validation, averaged", "50.00%", "50.00%", "+0.00 points"] in rows(text)
    assert ["peak memory", "1,024 MiB", "512 MiB", "2.00x less"] in rows(text)
    assert "fused_res, averaged" in text


@pytest.mark.parametrize("net", ["fused", "plain"])
def test_one_net(net):
    text = page(records(nets=[net]))
    check(text)
    label = {"fused": "fused_res", "plain": "PyTorch"}[net]
    assert ["", label] in rows(text) and ["parameters", "12,345"] in rows(text)
    assert text.count('class="confusion"') == 1
    assert ("<h2>Blocks</h2>" in text) == (net == "fused")


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_still_running(epochs):
    text = page(records(epochs=epochs, ended=False))
    check(text)
    assert "Not finished" in text and "Confusion" not in text
    assert text.count("<svg") == (3 if epochs else 0)
    if epochs:
        assert ["epochs, of 4", str(epochs), str(epochs), ""] in rows(text)
        assert ["accuracy, validation", "25.00%", "25.00%", "+0.00 points"] in rows(text)


def test_one_net_has_ended():
    text = page(records()[:-1])
    check(text)
    assert "Not finished" in text and text.count('class="confusion"') == 1


def test_resumed():
    """What was run again counts once, as it was the last time."""
    log = records(epochs=4, ended=False, val_loss=9.0)
    again = [r for r in records(epochs=4, ended=True) if r.get("epoch", 3) >= 3][1:]
    text = page([*log, {"event": "resume", "time": "2026-02-03", "epoch": 2}, *again])
    check(text)
    assert "Resumed 2026-02-03 after epoch 2." in text
    assert ["epochs, of 4", "4", "4", ""] in rows(text)
    assert ["loss, validation", "0.5000", "0.5000", "+0.0000"] in rows(text)


def test_losses_that_are_not_finite():
    text = page(records(loss=float("nan"), val_loss=float("inf")))
    check(text)
    assert ["loss, validation", "inf", "inf", "+nan"] in rows(text)


def test_many_classes():
    classes = [f"class{i}" for i in range(100)]
    log = records(classes, nets=["fused"])
    counts = log[-1]["confusion"]
    for i in range(12):
        counts[50 + i][3] = 10 + i
    text = page(log)
    check(text)
    assert text.count("<svg") == 4 and 'class="confusion"' not in text
    found = rows(text)
    first = found.index(["true", "predicted", "images", "of the class"]) + 1
    expected = [[f"class{50 + i}", "class3", str(10 + i)] for i in reversed(range(2, 12))]
    assert [row[:3] for row in found[first : first + 10]] == expected
    assert found[first][3] == f"{21 / 111:.0%}"
    assert ["61", "class61", f"{90 / 111:.0%}"] in found
    assert found[first + 10] == ["", "class", "right"]


def test_a_class_without_images():
    log = records(nets=["fused"])
    log[-1]["confusion"] = [[5, 0, 0], [0, 0, 0], [0, 0, 5]]
    text = page(log)
    check(text)
    assert ["bee", "0", "0", "0"] in rows(text) and "of the class" not in text


@pytest.mark.parametrize("classes", [3, 30])
def test_everything_is_escaped(classes):
    bad = "<script>\"'&</table>"

    def spoil(value):
        if isinstance(value, dict):
            return {
                k if k in ("fused", "plain") else spoil(k) if at_leaf(value) else k: spoil(v)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return value + bad if isinstance(value, str) else value

    def at_leaf(value):
        return set(value) <= {"width", "lr", "epochs", "torch"}

    log = records([f"class{i}" for i in range(classes)])
    log[0] = {"event": "start"} | {k: spoil(v) for k, v in log[0].items() if k != "event"}
    log.append({"event": "resume", "time": bad, "epoch": 1})
    text = page(log)
    check(text)
    escaped = "&lt;script&gt;&quot;&#x27;&amp;&lt;/table&gt;"
    for name in ("resnet20", "digits", "class0", "layer1.0", "stem", "no addition", "lr", "2.13.0"):
        assert name + escaped in text
    assert bad not in text


def test_without_a_start():
    with pytest.raises(CommandError, match='no "start"'):
        page(records()[1:])


def test_the_log_is_read_back(tmp_path):
    path = tmp_path / "log.jsonl"
    log = records()
    whole = "".join(json.dumps(record) + "\n" for record in log)
    for ending in ("", '{"event": "epo', '{"event": "end"', "12", '"\udcff'):
        path.write_bytes((whole + ending).encode(errors="surrogateescape"))
        assert read_log(path) == log, ending
    path.write_text(whole.rstrip("\n"))
    assert read_log(path) == log
    path.write_text("")
    assert read_log(path) == []


@pytest.mark.parametrize("line", [b"{", b"", b"12", b'{"loss": 1}', b'"\xff"'])
def test_a_line_that_is_no_record(tmp_path, line):
    path = tmp_path / "log.jsonl"
    first, *rest = (json.dumps(record).encode() for record in records())
    for after in (rest, []):
        path.write_bytes(b"\n".join([first, line, *after, b""]))
        with pytest.raises(CommandError, match=f"^{re.escape(str(path))}: line 2: "):
            read_log(path)


def test_records_are_left_alone():
    log = records()
    before = copy.deepcopy(log)
    page(log)
    assert log == before
