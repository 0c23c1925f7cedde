"""Loss curves and what is said of them, of tiny nets that take two steps."""

import importlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_res.demo.data import load
from fused_res.demo.train import batches

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMON = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def curves():
    return importlib.import_module("curves")


@pytest.fixture(scope="module")
def curve_tables():
    return importlib.import_module("suites.curves")


def read(folder):
    (path,) = folder.glob("*/curves.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def results(curves, tmp_path_factory):
    out = tmp_path_factory.mktemp("curves")
    assert curves.main(["--quick", *COMMON, "--out", str(out)]) == 0
    return out


@pytest.fixture
def real(curves, monkeypatch):
    """``curves.main`` of one tiny net in float32 as if it were the net in question."""
    monkeypatch.setattr(curves, "TRAININGS", curves.QUICK)
    return lambda *more: curves.main(
        [*COMMON, "--net", "3 blocks", "--dtype", "fp32", "--steps", "2", *more]
    )


def test_rows(results, curves):
    rows = importlib.import_module("harness.rows")
    found = read(results)
    ours = [f"fused_res-{name}" for name in curves.fused_backends("cpu")]
    kinds = [("eager", "channels_last"), ("eager", "NCHW"), *((r, "channels_last") for r in ours)]
    expected = [(*kind, seed) for kind in kinds for seed in range(3)]
    for name in curves.QUICK:
        for dtype in "float32", "bfloat16":
            of = [row for row in found if (row["workload"], row["dtype"]) == (name, dtype)]
            assert [(row["rival"], row["layout"], row["seed"]) for row in of] == expected
    for row in found:
        rows.validate(row)
        assert row["refused"] is None
        assert len(row["losses"]) == 2
        assert row["train_loss"] == pytest.approx(sum(row["losses"]) / 2, abs=1e-5)
        assert row["val_loss"] > 0 and 0 <= row["val_accuracy"] <= 1
    if importlib.util.find_spec("matplotlib"):
        (plot,) = results.glob("*/curves.png")
        assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("seed", range(3))
def test_curves_start_where_their_seed_says(results, curves, seed):
    """Weights and images; ours and PyTorch's alike."""
    for name, training in curves.QUICK.items():
        images, labels = next(iter(batches(load(training.images), training.batch, 1, 1, seed)))
        torch.manual_seed(seed)
        loss = F.cross_entropy(training.make()(images), labels).item()
        found = [r for r in read(results) if r["workload"] == name and r["seed"] == seed]
        assert len(found) == 2 * (2 + len(curves.fused_backends("cpu")))
        for row in found:
            within = 1e-5 if row["dtype"] == "float32" else 3e-2
            assert row["losses"][0] == pytest.approx(loss, rel=within)


def test_bfloat16_is_bfloat16(results):
    found = {}
    for r in read(results):
        key = r["workload"], r["rival"], r["layout"], r["seed"]
        found.setdefault(key, []).append(r["losses"])
    for full, half in found.values():
        assert full != half


def test_a_fused_net_that_is_right_passes(real, capsys):
    assert real() == 0
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and shown.count("pass") % 3 == 0 and "pass" in shown


def test_a_fused_net_that_diverges_is_called_out(real, curves, monkeypatch, capsys):
    fused = curves.fused

    def wrong(net, backend):
        fused(net, backend)
        with torch.no_grad():
            net.fc2.weight.mul_(20)

    monkeypatch.setattr(curves, "fused", wrong)
    assert real() == 1
    shown = capsys.readouterr().out
    assert "FAIL  fused_res-cpu: 3 blocks, float32, training loss" in shown


def test_a_fused_net_that_breaks_is_called_out(real, curves, monkeypatch, capsys, tmp_path):
    def broken(net, backend):
        raise RuntimeError("planted")

    monkeypatch.setattr(curves, "fused", broken)
    assert real("--out", str(tmp_path)) == 1
    shown = capsys.readouterr().out
    assert "FAIL  fused_res-cpu: 3 blocks, float32: fused_res-cpu: RuntimeError" in shown
    refused = {row["rival"]: row["refused"] for row in read(tmp_path)}
    assert refused["eager"] is None and refused["fused_res-cpu"] == "RuntimeError: planted"
    assert curves.main(["--quick", *COMMON, "--net", "3 blocks", "--dtype", "fp32"]) == 1


def test_a_loss_that_is_not_finite(curves):
    training = replace(curves.QUICK["3 blocks"], options={"lr": float("inf")})
    with pytest.raises(FloatingPointError, match="after 1 steps is nan"):
        curves.train(training, load(training.images), 2, 0, torch.float32)


def row(rival, seed, layout, values, **more):
    loss, accuracy = values
    final = {"train_loss": loss, "val_loss": loss, "val_accuracy": accuracy}
    who = {"workload": "net", "dtype": "float32", "rival": rival, "layout": layout, "seed": seed}
    return {**who, "losses": [loss] * 30, "refused": None, **final, **more}


def synthetic(loss=1.1, accuracy=0.85):
    """PyTorch's losses are 1.0 to 1.2 and 1.1 in the mean, accuracies 0.80 to 0.90 and 0.85; ours
    are those in the mean."""
    rows = []
    for layout, sign in ("channels_last", 1), ("NCHW", -1):
        for seed, by in enumerate((-1, 0, 1)):
            values = 1.1 + 0.1 * sign * by, 0.85 + 0.05 * by
            rows.append(row("eager", seed, layout, values))
    for seed, by in enumerate((-0.5, 0, 0.5)):
        rows.append(row("fused_res-cpu", seed, "channels_last", (loss + by, accuracy + by)))
    return rows


@pytest.mark.parametrize(
    ("loss", "accuracy", "expected"),
    [
        (1.15, 0.82, (True, True)),
        (1.29, 0.76, (True, True)),  # further off than PyTorch's nets, less than they are apart
        (1.31, 0.89, (False, True)),
        (0.89, 0.96, (False, False)),  # suspiciously good
        (1.1, 0.74, (True, False)),
    ],
)
def test_verdict(curve_tables, loss, accuracy, expected):
    good, right = expected
    found = [met for met, _ in curve_tables.targets(synthetic(loss, accuracy))]
    assert found == [good, good, right]


def test_verdict_needs_every_seed(curve_tables):
    rows = synthetic()
    for i, missing in enumerate(rows):
        few = [r for r in rows if r is not missing]
        ((met, what),) = curve_tables.targets(few)
        assert not met and "not all are trained from 3 seeds" in what
        refused = [{**r, "refused": "planted"} if r is missing else r for r in rows]
        ((met, what),) = curve_tables.targets(refused)
        assert not met and what.endswith(f"{missing['rival']}: planted"), i
    others = [{**r, "dtype": "bfloat16"} for r in rows]
    assert [met for met, _ in curve_tables.targets([*others, *rows[1:]])] == [True] * 3 + [False]


def test_each_backend_is_judged(curve_tables):
    rows = synthetic()
    worse = [
        {**r, "rival": "fused_res-other", "train_loss": 2.0} for r in rows if r["rival"] != "eager"
    ]
    assert [met for met, _ in curve_tables.targets(rows + worse)] == [True] * 3 + [False] + [
        True
    ] * 2


def test_table(results, curves, curve_tables, tmp_path):
    table = importlib.import_module("table")
    page = tmp_path / "README.md"
    page.write_text(f"{table.BEGIN}\n{table.END}")
    common = ["--results", str(results)]
    assert table.main([*common, "--write", str(page)]) == 0
    assert table.main([*common, "--check", str(page)]) == 0
    text = page.read_text()
    found = read(results)
    for r in found:
        assert f"| {r['workload']}, {r['dtype']} |" in text
        if r["rival"] != "eager":
            assert f"{r['val_loss']:.4f}" in text
    assert found[0]["commit"] in text and "float32, bfloat16" in text and "(outside)" not in text
    for r in found:
        if r["rival"] != "eager":
            r["val_loss"] += 10
    assert "\n".join(curve_tables.report(found)).count("(outside)") == 4
    last = found[-1]
    last["refused"] = "planted"
    shown = "\n".join(curve_tables.report(found))
    assert f"| {last['workload']}, {last['dtype']} | {last['rival']}: planted |" in shown


def test_difference_of_the_first_losses(curve_tables):
    """To PyTorch's of the same seed, in channels_last; later ones do not count."""
    rows = [r for r in synthetic() if r["rival"] == "eager"]
    ours = [{**r, "rival": "fused_res-cpu"} for r in rows if r["layout"] == "channels_last"]
    ours[2]["losses"] = [1.2] * 9 + [1.21] + [5.0] * 20
    (net,) = curve_tables.by_net([*rows, *ours])
    assert net.apart(ours) == pytest.approx(0.01 / 1.2)


def test_committed_curves(curves, curve_tables):
    """They are of today's nets, and none is outside."""
    rows = importlib.import_module("harness.rows")
    paths = list((BENCHMARKS / "results").glob("*/curves.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        known = {(name, d) for name in curves.TRAININGS for d in ("float32", "bfloat16")}
        assert {(r["workload"], r["dtype"]) for r in found} == known
        for r in found:
            rows.validate(r)
            training = curves.TRAININGS[r["workload"]]
            assert r["config"] == {"optimizer": training.optimizer.__name__, **training.options}
            assert r["shape"][0] == training.batch and len(r["losses"]) == curves.STEPS
        verdicts = curve_tables.targets(found)
        assert len(verdicts) >= 3 * len({(r["workload"], r["dtype"]) for r in found}) and all(
            met for met, _ in verdicts
        )


@pytest.mark.parametrize("options", [["--steps", "0"], ["--threads", "0"], ["--dtype", "int8"]])
def test_refused_options(curves, options, capsys):
    with pytest.raises(SystemExit):
        curves.main(options)
    assert options[0] in capsys.readouterr().err


def test_no_net_of_that_name(curves, capsys):
    assert curves.main(["--net", "no such net"]) == 2
    assert "no such net" in capsys.readouterr().err
