"""The command line: what it prints, writes and exits with."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fused_res import __version__, cli, reference
from fused_res.cli import check, doctor
from fused_res.dispatch import backends
from fused_res.reference import Norm


def run(*argv, **environment):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fused_res", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


pytestmark = pytest.mark.usefixtures("one_thread")


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"fused_res {__version__}\n"
    for argv in ([], ["nonesuch"], ["doctor", "--nonesuch"], ["demo", "--epochs", "0"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(argv)
        assert leaving.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_doctor_text(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert re.search(r"^bn_act +cpu +eager +yes", text, re.MULTILINE)
    for name, reason in backends.STATUS.items():
        assert re.search(rf"^{name} +{'no' if reason else 'yes'}", text, re.MULTILINE)
        assert (reason or "") in text
    assert re.search(r"^FUSED_RES_BACKEND +\w+ +(default|set)$", text, re.MULTILINE)


def test_doctor_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["fused_res"] == __version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert {name: entry["reason"] for name, entry in facts["backends"].items()} == backends.STATUS
    for entry in facts["ops"]:
        assert entry["available"] == (entry["reason"] is None)
    on_cpu = [entry for entry in facts["ops"] if entry["device"] == "cpu"]
    for op, dtype in {(entry["op"], entry["dtype"]) for entry in on_cpu}:
        entries = [e for e in on_cpu if (e["op"], e["dtype"]) == (op, dtype)]
        probe = torch.empty(0, dtype=getattr(torch, dtype))
        chosen = [e["backend"] for e in entries if e["auto"]]
        assert chosen == [backends.choose(op, "auto", probe)]


def test_doctor_without_the_cpu_library(monkeypatch):
    monkeypatch.setitem(backends.STATUS, "cpu", "_C.abi3.so was not built")
    facts = doctor.report()
    assert facts["machine"]["instruction_set"] is None
    text = doctor.render(facts)
    assert re.search(r"^cpu +no +_C.abi3.so was not built$", text, re.MULTILINE)
    assert re.search(
        r"^bn_act +cpu +cpu +no +no +no +no +_C.abi3.so was not built$", text, re.MULTILINE
    )
    assert re.search(r"^bn_act +cpu +eager +auto +auto +auto +auto$", text, re.MULTILINE)


def test_bad_environment_variable():
    found = run("doctor", FUSED_RES_BACKEND="fast")
    assert found.returncode != 0
    last = found.stderr.strip().splitlines()[-1]
    assert "FUSED_RES_BACKEND='fast' must be one of: auto, cpu, cuda, triton, eager" in last


def test_check_passes():
    found = run("check")
    assert found.returncode == 0, found.stdout + found.stderr
    for name, reason in backends.STATUS.items():
        if reason:
            assert f"not checked: {name}: {reason}" in found.stdout
        else:
            assert re.search(rf"^bn_act +{name} +float32 .* ok ", found.stdout, re.MULTILINE)
    assert "FAIL" not in found.stdout


def test_check_fails_with_a_wrong_kernel(monkeypatch, capsys):
    wrong = check.Result("bn_act", "cpu", torch.float32, 72, 1.6, "y in train")
    monkeypatch.setattr(check, "check_all", lambda: [wrong])
    assert cli.main(["check"]) == 1
    assert re.search(r"1\.60 +FAIL +y in train", capsys.readouterr().out)


def forgets_the_residual(x, norm, residual, residual_norm, act):
    return reference.bn_act(x, norm, None, None, act)


def treats_channels_last_as_nchw(x, norm, residual, residual_norm, act):
    y = reference.bn_act(x, norm, residual, residual_norm, act)
    if x.is_contiguous(memory_format=torch.channels_last) and residual is None:
        y = y + 1e-2 * y.flip(3)
    return y


def biased_running_variance(x, norm, residual, residual_norm, act):
    y = reference.bn_act(x, norm, residual, residual_norm, act)
    if norm.training:
        norm.running_var.data.mul_(1 - 1e-3)
    return y


def cancelling_variance(x, norm, residual, residual_norm, act):
    if not norm.training:
        return reference.bn_act(x, norm, residual, residual_norm, act)
    reference.bn_act(x.detach(), norm, None, None, "none")  # the running statistics
    mean, square = x.mean((0, 2, 3), True), x.square().mean((0, 2, 3), True)
    xhat = (x - mean) * (square - mean.square() + norm.eps).rsqrt()
    weight, bias = (t.view(1, -1, 1, 1) for t in (norm.weight, norm.bias))
    normalised = Norm(torch.zeros_like(norm.weight), torch.ones_like(norm.weight), eps=0.0)
    return reference.bn_act(xhat * weight + bias, normalised, residual, residual_norm, act)


def returns_nan(x, norm, residual, residual_norm, act):
    return reference.bn_act(x, norm, residual, residual_norm, act) * float("nan")


def raises(*args):
    raise RuntimeError("no such kernel")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * (1 + 1e-4)


def wrong_gradient(*args):
    return WrongGradient.apply(reference.bn_act(*args))


@pytest.mark.parametrize(
    "wrong",
    [
        forgets_the_residual,
        treats_channels_last_as_nchw,
        biased_running_variance,
        cancelling_variance,
        returns_nan,
        raises,
        wrong_gradient,
    ],
)
def test_check_catches(wrong):
    result = check.check_bn_act(wrong, torch.float32)
    assert not result.passed
    assert result.failure == ("RuntimeError: no such kernel" if wrong is raises else None)


def test_check_catches_a_wrong_block():
    class Wrong(reference.ResBlock):
        def __init__(self, *args, backend=None, **kwargs):
            super().__init__(*args, **kwargs)

        def forward(self, x):
            return super().forward(x) * (1 + 1e-5)

    assert not check.check_block(Wrong, "eager").passed


def test_errors_are_at_least_rounding():
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    rounded, other = exact.float(), exact.float() * (1 + 2**-23)
    for ours, theirs, passes in [
        (rounded, rounded, True),
        (other, rounded, False),
        (other, other, True),
        (rounded.half(), rounded, False),
        (rounded[:-1], rounded, False),
        (None, rounded, False),
    ]:
        errors = check.Errors()
        errors.add("y", "here", ours, theirs, exact)
        assert (errors.worst()[0] <= check.LIMIT) == passes


TINY = ["--epochs", "1", "--deep-steps", "2", "--images", "40", "--batch", "8", "--width", "4"]


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), *TINY, "--blocks", "3", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "fuse_ swapped 8 blocks and skipped 0." in text
    assert "fuse_ swapped 3 blocks and skipped 0." in text
    for path in (out / "demo.png", out / "demo.html"):
        assert f"wrote {path}" in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "demo.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", page)
    for line in ("running statistics", "gradients", "saved activations", "step, median"):
        assert line in text and line in page


def test_demo_says_when_time_was_up():
    pytest.importorskip("tqdm")
    from fused_res.demo import data, page, train

    pictures = torch.rand(8, 3, 4, 4)
    digits = data.Data(pictures, torch.arange(8), pictures, torch.arange(8), pictures)
    models = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8)) for _ in range(2)]

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    for budget, steps, said in [(0, "1", "of 4 planned: time was up"), (1e9, "4", "")]:
        curves = train.train("net", tuple(models), sgd, digits, 2, 1, None, 0, budget)
        report = page.Report("net", "", [], [], [], curves, (1, 1), 2)
        assert page.result_rows(report)[0] == ["steps", steps, steps, said]


def test_demo_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "fused-res demo: error: the demo needs scikit-learn, matplotlib, tqdm: "
        'pip install "fused_res[demo]"\n'
    )


def test_demo_refuses_too_few_images(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path), "--images", "10"]) == 1
    assert "--images 10 must be at least 3 times --batch, 32" in capsys.readouterr().err


@pytest.mark.skipif(backends.STATUS["cuda"] is None, reason="backend 'cuda' runs here")
def test_a_named_backend_that_cannot_run_is_one_line(tmp_path):
    found = run("demo", "--out", str(tmp_path), *TINY, FUSED_RES_BACKEND="cuda")
    assert found.returncode == 1
    lines = found.stderr.strip().splitlines()
    assert lines == [
        f"fused-res demo: error: backend 'cuda' cannot run bn_act: {backends.STATUS['cuda']}"
    ]
