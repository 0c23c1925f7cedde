"""Writes the dispatch table of what this machine timed, loads it, and asserts that ``auto`` is not
eager by it: ``python benchmarks/device/dispatch.py --rows FOLDER``.

First use times two blocks, as in a user's first steps. Then ``table.py --dispatch`` makes a table
of them and of all rows of the folder, and another process, which may time nothing, follows it.
Without a GPU, where nothing is timed, the table is only written and loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
import table  # noqa: E402

import fused_res  # noqa: E402
from device.runner import keep_timings  # noqa: E402
from fused_res.dispatch import shipped_timings, user_timings  # noqa: E402

WARM_UP = 3  # first use times what it sees for the second time


def train_blocks() -> fused_res.RunReport:
    """A few steps of two blocks of ResNet-50, and what ran them."""
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    blocks = [fused_res.reference.ResBlock(c, 256, kind="bottleneck") for c in (64, 256)]
    dtype, size = (torch.bfloat16, (64, 64, 56, 56)) if gpu else (torch.float32, (2, 64, 4, 4))
    place = {"device": "cuda" if gpu else "cpu", "dtype": dtype}
    net = nn.Sequential(*blocks).to(**place, memory_format=torch.channels_last)
    fused_res.fuse_(net)
    x = torch.randn(size, **place).contiguous(memory_format=torch.channels_last)
    for _ in range(WARM_UP):
        net(x).float().square().mean().backward()
    return fused_res.report(net)


def load(path: Path) -> tuple[shipped_timings.Row, ...]:
    rows = json.loads(path.read_text())
    return tuple(shipped_timings.Row(**{**row, "shape": tuple(row["shape"])}) for row in rows)


def follow(path: Path) -> None:
    """Trains by the table alone; raises AssertionError where PyTorch's ops run every block."""
    rows = load(path)
    shipped_timings.rows = lambda: rows
    found = train_blocks()
    print(found)
    if torch.cuda.is_available():
        assert rows, "no timing was written"
        assert any("res_block on" in block.ran for block in found.blocks), str(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder of a run's rows")
    parser.add_argument("--follow", type=Path, metavar="TABLE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.follow:
        follow(args.follow)
        return 0
    print(train_blocks())
    if user_timings.settings.cache:
        keep_timings("dispatch", Path(user_timings.settings.cache), args.rows)
    path = args.rows / "shipped_timings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.dispatch(args.rows))
    print(f"{len(load(path))} timings in {path.name}")
    with tempfile.TemporaryDirectory() as empty:
        environ = {**os.environ, "FUSED_RES_CACHE": empty, "FUSED_RES_AUTOTUNE": "0"}
        command = [sys.executable, __file__, "--rows", str(args.rows), "--follow", str(path)]
        return subprocess.run(command, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
