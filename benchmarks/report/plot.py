"""Plots of one device's rows: speed.png of many suites, and the pictures that suites have alone."""

from __future__ import annotations

import json
from pathlib import Path

from harness.suite import CL, Suite

from .tables import heading, made, unique

MARKERS = "osD^v<>PX*hp"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20)


def timed(rows: list[dict], suite: Suite) -> list[dict]:
    """The rows that have a time in a direction that is shown."""
    shown = suite.plot.directions
    return [row for row in rows if row["direction"] in shown and row["median_ms"] is not None]


def label(row: dict, plain: bool) -> str:
    """Of a line of a panel: the workload, and what of it was timed where that differs."""
    name = row["workload"].removeprefix("bn_act ")
    if row["direction"] in ("eval", "train") and not plain:
        name += f", {row['direction']}"
    return name if row["allocator"] in ("cuda", "default") else f"{name}, {row['allocator']}"


Points = list[tuple[str, str, float]]  # candidate, line, figure


def over_eager(rows: list[dict], plain: bool) -> Points:
    """Speed-up over eager PyTorch in channels_last, or in the workload's layout."""
    out = []
    for row in rows:
        ratios = row["speedup_over"]
        ratio = ratios.get(f"eager {CL}", ratios.get(f"eager {row['layout']}"))
        if ratio is not None:
            name = heading(row["rival"], "") + f", {row['layout']}" * (row["rival"] == "eager")
            out.append((name, label(row, plain), ratio))
    return out


def panels_of(suite: Suite, rows: list[dict]) -> list[tuple[str, Points, bool]]:
    """(title, points, whether they are ratios)"""
    plot, plain = suite.plot, len(suite.plot.directions) == 1
    out = [(f"{plot.title}: speed-up over eager", over_eager(rows, plain), True)]
    if plot.bandwidth:
        share = [(heading(r["rival"], ""), label(r, plain), r["percent_of_copy"]) for r in rows]
        share = [point for point in share if point[2]]
        out.append((f"{plot.title}: % of copy bandwidth", share, False))
    return [panel for panel in out if panel[1]]


def draw(rows: dict[str, list[dict]], suites: list[Suite], path: Path) -> Path | None:
    """Writes speed.png; None where there is nothing to draw. rows: by suite."""
    from matplotlib import pyplot as plt

    found = {suite.name: timed(rows.get(suite.name, []), suite) for suite in suites}
    panels = [p for suite in suites for p in panels_of(suite, found[suite.name])]
    if not panels:
        return None
    lines = [unique(line for _, line, _ in points) for _, points, _ in panels]
    candidates = sorted({name for _, points, _ in panels for name, _, _ in points})
    colours = plt.get_cmap("tab20").colors
    heights = [len(found) + 3 for found in lines]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 0.28 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for (title, points, ratio), names, ax in zip(panels, lines, axes[:, 0], strict=True):
        for i, candidate in enumerate(candidates):
            at = [(x, names.index(line)) for name, line, x in points if name == candidate]
            if at:
                marker = MARKERS[i % len(MARKERS)]
                ax.scatter(*zip(*at, strict=True), s=28, marker=marker, label=candidate,
                           color=colours[i % len(colours)])  # fmt: skip
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
        ax.axvline(1 if ratio else 100, color="grey", linewidth=0.8)
        if ratio:
            low, high = ax.get_xlim()
            ax.set_xscale("log")
            ax.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
            ax.set_xticks([], minor=True)
            ax.xaxis.set_major_formatter("{x:g}")
        else:
            ax.set_xlim(left=0)
        ax.grid(axis="y", linewidth=0.3)
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, next(filter(None, found.values()))[:1], path)


def save(figure, rows: list[dict], path: Path) -> Path:
    """Writes the figure under a line that says where and when the rows were made."""
    from matplotlib import pyplot as plt

    head = f"{rows[0]['device']['name']}, torch {rows[0]['versions']['torch']}, "
    figure.suptitle(head + made(rows), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_roofline(rows: list[dict], path: Path) -> Path | None:
    """How often each candidate runs while eager PyTorch runs once, and where eager and the fastest
    fused candidate are under the roofline."""
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["median_ms"] is not None and r["allocator"] != "raised"]
    found = over_eager(rows, plain=True)
    if not found:
        return None
    figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=(3, 2))
    _draw_bars(bars, found)
    _draw_points(roof, [r for r in rows if "chain" in r["workload"] and r["layout"] == CL])
    for ax in bars, roof:
        ax.tick_params(which="both", labelsize=7)
        ax.grid(linewidth=0.3)
        ax.set_axisbelow(True)
    return save(figure, rows, path)


def _draw_bars(bars, found: Points) -> None:
    lines, names = unique(line for _, line, _ in found), unique(name for name, _, _ in found)
    for rank, name in enumerate(names):
        speeds = {line: speed for one, line, speed in found if one == name}
        at = [i + (rank - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(lines))]
        shown = [speeds.get(line, 0) for line in lines]
        drawn = bars.barh(at, shown, 0.75 / len(names), color=f"C{rank}", label=name)
        bars.bar_label(drawn, [f"{speed:.1f}" for speed in shown], fontsize=5.5, padding=1)
    bars.axvline(1, color="grey", linewidth=0.8)
    bars.set_yticks(range(len(lines)), lines, fontsize=7)
    bars.invert_yaxis()
    bars.set_title("speed-up over eager PyTorch, channels_last", fontsize=9, loc="left")
    bars.legend(fontsize=6, loc="lower right")


def _draw_points(roof, rows: list[dict]) -> None:
    """rows: of chains, in channels_last."""
    peak = max(r["peak_tflops"] for r in rows) * 1e3
    slope = max(r["copy_gbps"] for r in rows)
    reach = [10.0, 2000.0]  # FLOP/byte
    roof.plot(reach, [min(peak, slope * x) for x in reach], color="grey", linewidth=1, zorder=0)
    roof.plot([peak / slope] * 2, [10, peak], color="grey", linewidth=0.5, linestyle=":")
    for rank, name in enumerate(("eager", "fused_res-frozen")):
        of = [r for r in rows if r["rival"] == name]
        x = [r["tflops"] * r["median_ms"] * 1e9 / r["bytes"] for r in of]
        y = [r["tflops"] * 1e3 for r in of]
        roof.scatter(x, y, color=f"C{rank}", label=heading(name, ""), s=18)
        for r, *point in zip(of, x, y, strict=True):
            words = r["workload"].split(", ")[-1]
            roof.annotate(words, point, fontsize=6, textcoords="offset points", xytext=(4, -7))
    roof.set_xscale("log")
    roof.set_yscale("log")
    roof.set_xlabel(
        "FLOP / byte: direct convolutions; weights and x read, y written once", fontsize=7
    )
    roof.set_ylabel("GFLOP/s", fontsize=7)
    title = f"roofline: {peak:.0f} GFLOP/s, copy {slope:.0f} GB/s (Winograd multiplies less)"
    roof.set_title(title, fontsize=9, loc="left")
    roof.legend(fontsize=7, loc="lower right")


def write(folder: Path, suites: dict[str, Suite]) -> int:
    """Writes every picture that there are rows for, and says which."""
    try:
        import matplotlib
    except ImportError as error:
        print(f"no plot: {error}")
        return 0
    matplotlib.use("Agg")
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    plotted = [suite for suite in suites.values() if suite.plot]
    paths = [draw(found, plotted, folder / "speed.png")]
    for name, suite in suites.items():
        if found.get(name) and suite.picture:
            paths.append(suite.picture(found[name], folder / f"{name}.png"))
    print("\n".join(f"wrote {p}" for p in paths if p) or f"no plot: no rows in {folder}")
    return 0
