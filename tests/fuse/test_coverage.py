"""benchmarks/coverage_table.py: what it says of a model, and what it said of all of them."""

import re
from pathlib import Path

import coverage_table
import pytest
from blocks import Configurable, OwnBatchNorm
from model_libraries import timm
from torch import nn

from fused_res.nn.blocks import FusedForward

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = Path(__file__).parents[2] / "benchmarks/coverage.md"


class Net(nn.Sequential):
    def __init__(self, *blocks):
        super().__init__(
            nn.Conv2d(3, 6, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        )


class Confused(Net):
    """Computes something else once it is fused."""

    def forward(self, x):
        return super().forward(x) * (1 + any(isinstance(m, FusedForward) for m in self))


def test_a_model():
    extra = timm.layers.SEModule(6, rd_channels=2)
    row = coverage_table.cover(lambda size: Net(Configurable(), Configurable(extra=extra)))
    assert (row["blocks"], row["whole"], row["partly"], row["skipped"]) == (2, 1, 1, 0)
    assert (row["norms"], row["fused_norms"], row["adds_left"]) == (4, 4, 0)
    assert coverage_table.matches(row) and coverage_table.covered(row)
    for wrong in ({"differs": True}, {"ratio": 1.6}, {"same_state": False}):
        assert not coverage_table.matches(row | wrong)
    rows = [{"library": "timm", "model": "mine", **row}]
    text = coverage_table.table(rows)
    assert (
        "| timm | 1 | 1 (100.0%) | 0 |" in text and "| timm mine | 2 | 1 | 1 | 0 | 4 of 4 |" in text
    )


def test_what_is_left_and_what_is_wrong():
    row = coverage_table.cover(lambda size: Net(Configurable(norm=OwnBatchNorm)))
    assert row["skipped"] == 1 and coverage_table.matches(row)
    row = coverage_table.cover(lambda size: Confused(Configurable()))
    assert row["difference"] > 0.01 and row["ratio"] > 100 and not coverage_table.matches(row)


def test_the_committed_table():
    text = TABLE.read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \(([\d.]+)%\) \| (\d+) \|$", text, flags=re.M)
    assert {row[0] for row in rows} == {"torchvision", "timm", "transformers"}
    for _, count, full, percent, wrong in rows:
        assert int(wrong) == 0 and float(percent) >= 95 and 100 * int(full) / int(count) >= 95
    assert len(re.findall(r"^\| timm \w", text, flags=re.M)) > 300
