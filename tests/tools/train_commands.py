"""``fused-res train`` as a test calls it, and what a run leaves."""

import json

import torch

from fused_res import cli
from fused_res.train import checkpoint


def train(out, *argv, code=0):
    assert cli.main(["train", *argv, "--out", str(out)]) == code
    return out


def failed(capsys, *argv, code=1):
    """What a command that fails says."""
    capsys.readouterr()
    try:
        found = cli.main([str(arg) for arg in argv])
    except SystemExit as leaving:  # argparse's
        found = leaving.code
    text = capsys.readouterr().err
    assert found == code, text
    assert "Traceback" not in text
    return text


def contents(folder):
    """All that must not depend on kills: the checkpoints and the log, but for times."""
    states = {}
    for name in ("last.pt", "best.pt"):
        states[name] = checkpoint.load(folder / name)
        del states[name]["log"]
        for rank in states[name]["ranks"]:
            del rank["seconds"]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    for record in records:
        for key in ("time", "seconds", "images_per_second"):
            record.pop(key, None)
    return states, [record for record in records if record["event"] != "resume"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
