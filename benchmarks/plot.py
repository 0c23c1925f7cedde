"""A plot of one device's rows: ``python benchmarks/plot.py RESULTS_DIR`` writes speed.png there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TIMED = {"ops": ("forward+backward",), "blocks": ("forward+backward", "eval"),
         "nets": ("train", "eval"), "inference": ("eval",), "inference-all": ("eval",)}  # fmt: skip
MARKERS = "osD^v<>PX*hp"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 15, 20)


def load(folder: Path) -> dict[str, list[dict]]:
    """The rows that have a time in a direction that is shown, by suite."""
    out = {}
    for suite, directions in TIMED.items():
        path = folder / f"{suite}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        rows = [r for r in rows if r["direction"] in directions and r["median_ms"] is not None]
        if rows:
            out[suite] = rows
    return out


def label(row: dict) -> str:
    """Of a line of a panel: the workload, and what of it was timed where that differs."""
    name = row["workload"].removeprefix("bn_act ")
    name = {"eval": f"{name}, eval", "train": f"{name}, train"}.get(row["direction"], name)
    if row["suite"] == "inference":
        name = row["workload"]
    return name if row["allocator"] in ("cuda", "default") else f"{name}, {row['allocator']}"


def over_eager(rows: list[dict]) -> list[tuple[str, str, float]]:
    """(rival, line, speed-up) over eager PyTorch in channels_last, or in the workload's layout."""
    out = []
    for row in rows:
        base = "eager channels_last"
        if row["suite"] == "ops":
            base = f"eager {row['layout']}"
        ratio = row["speedup_over"].get(base)
        if ratio is not None:
            name = row["rival"] if row["rival"] != "eager" else f"eager {row['layout']}"
            out.append((name, label(row), ratio))
    return out


def percent(rows: list[dict]) -> list[tuple[str, str, float]]:
    return [(r["rival"], label(r), r["percent_of_copy"]) for r in rows if r["percent_of_copy"]]


def draw(folder: Path) -> Path | None:
    """Writes speed.png; None where there is nothing to draw.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suites = load(folder)
    panels = []
    titles = {"ops": "bn_act, forward + backward", "blocks": "blocks, bf16", "nets": "nets, bf16",
              "inference": "inference", "inference-all": "inference"}  # fmt: skip
    for suite, rows in suites.items():
        panels.append((f"{titles[suite]}: speed-up over eager", over_eager(rows), True))
        if suite == "ops":
            panels.append((f"{titles[suite]}: % of copy bandwidth", percent(rows), False))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    lines = [list(dict.fromkeys(line for _, line, _ in points)) for _, points, _ in panels]
    rivals = sorted({rival for _, points, _ in panels for rival, _, _ in points})
    colours = plt.get_cmap("tab20").colors
    heights = [len(found) + 3 for found in lines]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 0.28 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for (title, points, ratio), names, ax in zip(panels, lines, axes[:, 0], strict=True):
        for i, rival in enumerate(rivals):
            found = [(x, names.index(line)) for name, line, x in points if name == rival]
            if found:
                marker = MARKERS[i % len(MARKERS)]
                ax.scatter(*zip(*found, strict=True), s=28, marker=marker, label=rival,
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
    row = next(iter(suites.values()))[0]
    head = f"{row['device']['name']}, torch {row['versions']['torch']}, commit {row['commit']}, "
    figure.suptitle(head + row["date"][:10], fontsize=9)
    figure.tight_layout()
    path = folder / "speed.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RESULTS_DIR", help="has ops.json, ...")
    folder = parser.parse_args(argv).folder
    try:
        path = draw(folder)
    except ImportError as error:
        print(f"no plot: {error}")
        return 0
    print(f"wrote {path}" if path else f"no plot: no rows in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
