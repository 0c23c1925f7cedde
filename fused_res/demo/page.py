"""The demo's report: tables on the terminal, a PNG and one HTML file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..page import COLORS, change, document, table
from .compare import Agreement
from .train import Curve


class Report(NamedTuple):
    """The results of one net and its twin, the plain net first. ``saved``: bytes at ``batch``."""

    name: str
    what: str
    fused: list[str]
    skipped: list[tuple[str, str]]
    agreement: list[Agreement]
    curves: tuple[Curve, Curve]
    saved: tuple[int, int]
    batch: int


def result_rows(report: Report) -> list[list[str]]:
    """(quantity, PyTorch, fused_res, difference) of the trained pair."""
    plain, fused = report.curves
    memory, fused_memory = report.saved

    def percent(name: str, a: float, b: float) -> list[str]:
        return [name, f"{a:.1%}", f"{b:.1%}", f"{100 * (b - a):+.1f} points"]

    done = str(len(plain.losses))
    cut = "" if len(plain.losses) == plain.planned else f"of {plain.planned} planned: time was up"
    return [
        ["steps", done, done, cut],
        percent("accuracy, validation", plain.val_accuracy, fused.val_accuracy),
        percent("accuracy, training", plain.train_accuracy, fused.train_accuracy),
        ["last loss", f"{plain.losses[-1]:.4f}", f"{fused.losses[-1]:.4f}", ""],
        [
            "step, median",
            f"{1e3 * plain.step_seconds:.0f} ms",
            f"{1e3 * fused.step_seconds:.0f} ms",
            change(plain.step_seconds, fused.step_seconds, "faster", "slower"),
        ],
        [
            f"saved activations, batch {report.batch}",
            f"{memory / 2**20:.1f} MiB",
            f"{fused_memory / 2**20:.1f} MiB",
            change(memory, fused_memory, "less", "more"),
        ],
    ]


def agreement_rows(report: Report) -> list[list[str]]:
    """(quantity, PyTorch's error, fused_res's error, their ratio)."""
    return [
        [a.kind, f"{a.plain:.1e}", f"{a.fused:.1e}", f"{a.fused / a.plain:.2f}" if a.plain else "-"]
        for a in report.agreement
    ]


def plot(reports: Sequence[Report]) -> bytes:
    """A PNG: for each net its losses, step times and saved activations."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure((12, 3.6 * len(reports)), layout="constrained")
        axes = figure.subplots(len(reports), 3, squeeze=False, width_ratios=(2, 1, 1))
        for report, (losses, times, memory) in zip(reports, axes, strict=True):
            # dashed on top of solid: equal curves both stay visible
            for (label, color), curve, line in zip(
                COLORS.items(),
                report.curves,
                ({"linewidth": 4, "alpha": 0.6}, {"linewidth": 1.5}),
                strict=True,
            ):
                steps = range(1, len(curve.losses) + 1)
                losses.plot(steps, curve.losses, label=label, color=color, **line)
            losses.set(title=f"{report.name}: loss", xlabel="step", ylabel="cross entropy")
            losses.set_ylim(bottom=0)
            losses.grid(alpha=0.25)
            losses.legend(frameon=False)
            names, colors = list(COLORS), list(COLORS.values())
            middle = [1e3 * curve.step_seconds for curve in report.curves]
            low, high = ([1e3 * _quantile(c.seconds, q) for c in report.curves] for q in (0.2, 0.8))
            spread = [
                [max(m - a, 0) for m, a in zip(middle, low, strict=True)],
                [max(b - m, 0) for m, b in zip(middle, high, strict=True)],
            ]
            bars = times.bar(names, middle, color=colors, width=0.6)
            times.errorbar(names, middle, yerr=spread, fmt="none", ecolor="#333", capsize=4)
            times.bar_label(bars, fmt="%.0f", label_type="center", color="white")
            times.set(title="step, ms (median, p20 to p80)")
            sizes = [size / 2**20 for size in report.saved]
            bars = memory.bar(names, sizes, color=colors, width=0.6)
            memory.bar_label(bars, fmt="%.1f", label_type="center", color="white")
            memory.set(title=f"saved activations, MiB (batch {report.batch})")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


def strip(pictures: Tensor) -> bytes:
    """Pictures (N, 3, H, W), uint8, side by side as a PNG."""
    import matplotlib.image

    out = io.BytesIO()
    row = pictures.permute(2, 0, 3, 1).flatten(1, 2)
    matplotlib.image.imsave(out, row.contiguous().numpy(), format="png")
    return out.getvalue()


def _image(png: bytes, alt: str, kind: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


AGREEMENT_NOTE = (
    "Error of a training step against the same step in float64: norm of the difference over norm, "
    "over all tensors of a kind; the median of three images, those whose ReLUs stay furthest from "
    "0. (Within rounding of 0 float32 may flip a ReLU, in PyTorch's ops as in the fused ones.)"
)
RESULT_NOTE = (
    "Same initial weights, same batches in the same order, the two nets taking turns at every "
    "step. Rounding differs, and training magnifies it: the losses drift apart, as PyTorch's own "
    "do between NCHW and channels_last."
)
RESULT_HEADER = ("", "PyTorch", "fused_res", "fused_res is")
AGREEMENT_HEADER = ("", "PyTorch's error", "fused_res's error", "ratio")


def page(reports: Sequence[Report], figure: bytes, pictures: Tensor, facts: Sequence) -> str:
    """The HTML text; it needs no other file.

    Args:
        figure: ``plot``'s PNG.
        pictures: (N, 3, H, W) to show.
        facts: (name, value) of the versions and settings.
    """
    sections = [
        "<h1>fused_res beside plain PyTorch</h1>",
        "<p>Two nets in plain PyTorch, their residual blocks swapped by <code>fuse_</code>, "
        "trained on handwritten digits (32x32 colour) beside the originals.</p>",
        _image(strip(pictures), "some of the validation images", "strip"),
        _image(figure, "losses, step times and saved activations of every net"),
    ]
    for report in reports:
        sections += [
            f"<h2>{html.escape(report.name)}</h2>",
            f"<p>{html.escape(report.what)} {fused_line(report)}</p>",
            "<h3>Trained side by side</h3>",
            table(RESULT_HEADER, result_rows(report)),
            "<h3>Agreement</h3>",
            table(AGREEMENT_HEADER, agreement_rows(report)),
        ]
        if report.skipped:
            sections.append(table(("skipped", "reason"), report.skipped))
    sections += [
        f'<p class="note">{RESULT_NOTE}</p><p class="note">Agreement. {AGREEMENT_NOTE}</p>',
        "<h2>Versions and settings</h2>",
        table((), facts),
    ]
    return document("fused_res demo", sections)


def fused_line(report: Report) -> str:
    return f"fuse_ swapped {len(report.fused)} blocks and skipped {len(report.skipped)}."
