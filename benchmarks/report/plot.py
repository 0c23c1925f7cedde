"""Plots of one device's rows: ``python benchmarks/plot.py RESULTS_DIR`` writes speed.png and
curves.png there."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

from curve_tables import SEEDS, by_net
from sheets import CL, made, unique

TIMED = {"ops": ("forward+backward",), "blocks": ("forward+backward", "eval"),
         "nets": ("train", "eval"), "inference": ("eval",), "chains": ("eval",),
         "inference-all": ("eval",)}  # fmt: skip
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
    if row["suite"] in ("inference", "chains"):
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
              "inference": "inference", "chains": "chains of blocks, inference",
              "inference-all": "inference"}  # fmt: skip
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
    return _save(figure, next(iter(suites.values()))[:1], folder / "speed.png")


def _save(figure, rows: list[dict], path: Path) -> Path:
    """Writes the figure under a line that says where and when the rows were made."""
    from matplotlib import pyplot as plt

    head = f"{rows[0]['device']['name']}, torch {rows[0]['versions']['torch']}, "
    figure.suptitle(head + made(rows), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_curves(folder: Path) -> Path | None:
    """Writes curves.png: the losses of all seeds, and the first of seed 0, a row for each net.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path = folder / "curves.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    if not rows:
        return None
    nets = by_net(rows)
    figure, axes = plt.subplots(len(nets), 2, figsize=(11, 2.6 * len(nets) + 0.5), squeeze=False,
                                width_ratios=(2, 1))  # fmt: skip
    for net, (whole, start) in zip(nets, axes, strict=True):
        names = []
        for row in (*net.eager, *(row for of in net.ours.values() for row in of)):
            name = f"{row['rival']} {row['layout']}"
            names += [name] if name not in names else []
            rank, losses = names.index(name), row["losses"]
            smooth = [mean(losses[max(i - 9, 0) : i + 1]) for i in range(len(losses))]
            style = {"color": f"C{rank}", "linestyle": ("-", ":", "--", "-.")[rank % 4]}
            whole.plot(smooth, **style, linewidth=1, label=None if row["seed"] else name)
            if row["seed"] == 0:
                start.plot(losses[:20], **style, linewidth=1.5)
        whole.set_yscale("log")
        title = f"{net.name}: training loss, mean of 10 steps, {len(SEEDS)} seeds"
        whole.set_title(title, fontsize=9, loc="left")
        start.set_title("the first 20 steps, seed 0", fontsize=9, loc="left")
        whole.legend(fontsize=7)
        for ax in whole, start:
            ax.tick_params(which="both", labelsize=7)
            ax.grid(linewidth=0.3)
    return _save(figure, rows, folder / "curves.png")


def draw_chains(folder: Path) -> Path | None:
    """Writes chains.png: how often each rival runs while eager PyTorch runs once, and where eager
    and our fastest are under the roofline.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path = folder / "chains.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    timed = [r for r in rows if r["median_ms"] is not None and r["allocator"] != "raised"]
    found = over_eager(timed)
    if not found:
        return None
    figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=(3, 2))
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
    chains = [r for r in timed if "chain" in r["workload"] and r["layout"] == CL]
    peak = max(r["peak_tflops"] for r in chains) * 1e3
    slope = max(r["copy_gbps"] for r in chains)
    reach = [10.0, 2000.0]  # FLOP/byte
    roof.plot(reach, [min(peak, slope * x) for x in reach], color="grey", linewidth=1, zorder=0)
    roof.plot([peak / slope] * 2, [10, peak], color="grey", linewidth=0.5, linestyle=":")
    for rank, name in enumerate(("eager", "fused_res-frozen")):
        of = [r for r in chains if r["rival"] == name]
        x = [r["tflops"] * r["median_ms"] * 1e9 / r["bytes"] for r in of]
        y = [r["tflops"] * 1e3 for r in of]
        roof.scatter(x, y, color=f"C{rank}", label=name, s=18)
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
    for ax in bars, roof:
        ax.tick_params(which="both", labelsize=7)
        ax.grid(linewidth=0.3)
        ax.set_axisbelow(True)
    return _save(figure, timed, folder / "chains.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RESULTS_DIR", help="has ops.json, ...")
    folder = parser.parse_args(argv).folder
    try:
        found = [path for path in (draw(folder), draw_curves(folder), draw_chains(folder)) if path]
    except ImportError as error:
        print(f"no plot: {error}")
        return 0
    print("\n".join(f"wrote {path}" for path in found) or f"no plot: no rows in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
