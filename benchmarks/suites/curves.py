"""What is asked of loss curves, and the table of them; ``curves.py`` trains."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from harness.suite import CL, FUSED, Suite
from report.plot import save
from report.tables import caption, heading, to_markdown, unique

SEEDS = range(3)
LAST = 20  # steps whose mean is the training loss in the end
FIRST = 10  # steps in which rounding has hardly grown
# what is compared, and its digits
FINAL = {"train_loss": ("training loss", ".4f"), "val_loss": ("validation loss", ".4f"),
         "val_accuracy": ("validation accuracy", ".1%")}  # fmt: skip


class Curves:
    """The rows of one net in one dtype: PyTorch's in both layouts, and those with fused blocks by
    candidate."""

    def __init__(self, rows: list[dict]) -> None:
        self.name = f"{rows[0]['workload']}, {rows[0]['dtype']}"
        self.eager = [row for row in rows if row["rival"] == "eager"]
        names = unique(row["rival"] for row in rows if row["rival"].startswith(FUSED))
        self.fused = {name: [row for row in rows if row["rival"] == name] for name in names}

    def why_not(self, candidate: str) -> str | None:
        """Why there is nothing to compare: a net that was not trained, from one of the seeds."""
        of_layouts = [
            [row for row in self.eager if (row["layout"] == CL) == fast] for fast in (True, False)
        ]
        for rows in *of_layouts, self.fused[candidate]:
            refused = [row["refused"] for row in rows if row["refused"]]
            if refused:
                return f"{rows[0]['rival']}: {refused[0]}"
            if [row["seed"] for row in rows] != list(SEEDS):
                return f"not all are trained from {len(SEEDS)} seeds"
        return None

    def spread(self, name: str) -> tuple[float, float]:
        """PyTorch's smallest and largest."""
        found = [row[name] for row in self.eager]
        return min(found), max(found)

    def within(self, candidate: str, name: str) -> bool:
        """Whether the mean is no further from PyTorch's than PyTorch's nets are apart."""
        low, high = self.spread(name)
        fused, eager = (
            mean(row[name] for row in rows) for rows in (self.fused[candidate], self.eager)
        )
        return abs(fused - eager) <= high - low

    def apart(self, rows: list[dict]) -> float:
        """Largest relative difference of the first losses to PyTorch's of the same seed."""
        same = {row["seed"]: row["losses"] for row in self.eager if row["layout"] == CL}
        return max(
            abs(a - b) / b
            for row in rows
            for a, b in zip(row["losses"][:FIRST], same[row["seed"]], strict=False)
        )


def by_net(rows: list[dict]) -> list[Curves]:
    keys = unique((row["workload"], row["dtype"]) for row in rows)
    return [Curves([r for r in rows if (r["workload"], r["dtype"]) == key]) for key in keys]


def line(row: dict) -> str:
    """A row as it is printed."""
    head = f"{row['workload']}, {row['dtype']}: {row['rival']} {row['layout']}, seed {row['seed']}"
    if row["refused"]:
        return f"{head:66} not trained: {row['refused']}"
    values = (f"{what} {row[name]:{digits}}" for name, (what, digits) in FINAL.items())
    return f"{head:66} {', '.join(values)}"


def targets(rows: list[dict]) -> list[tuple[bool, str]]:
    """(met, what) of every net, dtype and fused backend: all of ``FINAL`` within the spread."""
    out = []
    for net in by_net(rows):
        for candidate, fused in net.fused.items():
            what = f"{candidate}: {net.name}"
            why = net.why_not(candidate)
            if why:
                out.append((False, f"{what}: {why}"))
                continue
            for name, (label, digits) in FINAL.items():
                found = " ".join(format(row[name], digits) for row in fused)
                low, high = (format(x, digits) for x in net.spread(name))
                claim = f"{what}, {label} within PyTorch's spread, {low} to {high}: {found}"
                out.append((net.within(candidate, name), claim))
    return out


def report(rows: list[dict]) -> list[str]:
    """Paragraph and table of one device."""
    nets = by_net(rows)
    body = []
    for net in nets:
        for candidate, fused in net.fused.items():
            cells = [net.name]
            why = net.why_not(candidate)
            if why:
                body.append([*cells, why, *["-"] * (2 * len(FINAL) + 1)])
                continue
            for name, (_, digits) in FINAL.items():
                found = ", ".join(format(row[name], digits) for row in fused)
                outside = "" if net.within(candidate, name) else " (outside)"
                cells += [found + outside, " to ".join(format(x, digits) for x in net.spread(name))]
            nchw = [row for row in net.eager if row["layout"] != CL]
            cells += [f"{net.apart(of):.1e}" for of in (fused, nchw)]
            body.append(cells)
    header = ["net"]
    for label, _ in FINAL.values():
        header += [f"{label}, each seed", "PyTorch's range"]
    header += [f"first {FIRST} losses, fused", f"first {FIRST} losses, PyTorch NCHW"]
    steps = max(len(row["losses"]) for row in rows)
    names = ", ".join(map(heading, unique(name for net in nets for name in net.fused)))
    intro = (
        f"Trained for {steps} steps on scikit-learn's digits ({names}): training loss (mean of "
        f"the last {LAST} steps), validation loss and accuracy from {len(SEEDS)} seeds, beside the "
        "spread of PyTorch's from the same seeds in NCHW and channels_last; and how far the first "
        "losses are from PyTorch's in channels_last, relatively. "
        f"[Curves](../benchmarks/results/{rows[0]['device']['slug']}/curves.png)."
    )
    return ["### Loss curves", intro, to_markdown(header, body), caption(rows)]


def draw(rows: list[dict], path: Path) -> Path:
    """The losses of all seeds, and the first of seed 0, a row for each net."""
    from matplotlib import pyplot as plt

    nets = by_net(rows)
    figure, axes = plt.subplots(len(nets), 2, figsize=(11, 2.6 * len(nets) + 0.5), squeeze=False,
                                width_ratios=(2, 1))  # fmt: skip
    for net, (whole, start) in zip(nets, axes, strict=True):
        names = []
        for row in (*net.eager, *(row for of in net.fused.values() for row in of)):
            name = f"{heading(row['rival'], '')}, {row['layout']}"
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
    return save(figure, rows, path)


SUITES = (Suite("curves", 100, report=report, gpu_report=report, targets=targets, picture=draw),)
