"""What is asked of loss curves, and the README's table of them."""

from __future__ import annotations

from statistics import mean

from sheets import CL, OURS, caption, to_markdown, unique

SEEDS = range(3)
LAST = 20  # steps whose mean is the training loss in the end
FIRST = 10  # steps in which rounding has hardly grown
# what is compared, and its digits
FINAL = {"train_loss": ("training loss", ".4f"), "val_loss": ("validation loss", ".4f"),
         "val_accuracy": ("validation accuracy", ".1%")}  # fmt: skip


class Curves:
    """The rows of one net in one dtype: PyTorch's in both layouts, and ours by rival."""

    def __init__(self, rows: list[dict]) -> None:
        self.name = f"{rows[0]['workload']}, {rows[0]['dtype']}"
        self.eager = [row for row in rows if row["rival"] == "eager"]
        rivals = unique(row["rival"] for row in rows if row["rival"].startswith(OURS))
        self.ours = {name: [row for row in rows if row["rival"] == name] for name in rivals}

    def why_not(self, rival: str) -> str | None:
        """Why there is nothing to compare: a net that was not trained, from one of the seeds."""
        of_layouts = [
            [row for row in self.eager if (row["layout"] == CL) == fast] for fast in (True, False)
        ]
        for rows in *of_layouts, self.ours[rival]:
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

    def within(self, rival: str, name: str) -> bool:
        """Whether the mean of ours is no further from PyTorch's than PyTorch's nets are apart."""
        low, high = self.spread(name)
        ours, theirs = (mean(row[name] for row in rows) for rows in (self.ours[rival], self.eager))
        return abs(ours - theirs) <= high - low

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
    """(met, what) of every net, dtype and backend of ours: all of ``FINAL`` within the spread."""
    out = []
    for net in by_net(rows):
        for rival, ours in net.ours.items():
            what = f"{rival}: {net.name}"
            why = net.why_not(rival)
            if why:
                out.append((False, f"{what}: {why}"))
                continue
            for name, (label, digits) in FINAL.items():
                found = " ".join(format(row[name], digits) for row in ours)
                low, high = (format(x, digits) for x in net.spread(name))
                claim = f"{what}, {label} within PyTorch's spread, {low} to {high}: {found}"
                out.append((net.within(rival, name), claim))
    return out


def parts(suites: dict[str, list[dict]]) -> list[str]:
    """Paragraph and table of one device."""
    rows = suites.get("curves")
    if not rows:
        return []
    nets = by_net(rows)
    body = []
    for net in nets:
        for rival, ours in net.ours.items():
            cells = [net.name]
            why = net.why_not(rival)
            if why:
                body.append([*cells, why, *["-"] * (2 * len(FINAL))])
                continue
            for name, (_, digits) in FINAL.items():
                found = " / ".join(format(row[name], digits) for row in ours)
                outside = "" if net.within(rival, name) else " (outside)"
                cells += [found + outside, " to ".join(format(x, digits) for x in net.spread(name))]
            nchw = [row for row in net.eager if row["layout"] != CL]
            cells.append(" / ".join(f"{net.apart(of):.1e}" for of in (ours, nchw)))
            body.append(cells)
    header = ["net"]
    for label, _ in FINAL.values():
        header += [label, "PyTorch's"]
    header.append(f"first {FIRST} losses, ours / NCHW")
    steps = max(len(row["losses"]) for row in rows)
    rivals = ", ".join(unique(rival for net in nets for rival in net.ours))
    intro = (
        f"Trained for {steps} steps on scikit-learn's digits ({rivals}): training loss (mean of "
        f"the last {LAST} steps), validation loss and accuracy from {len(SEEDS)} seeds, beside the "
        "spread of PyTorch's from the same seeds in NCHW and channels_last; and how far the first "
        "losses are from PyTorch's in channels_last, relatively. "
        f"[Curves](benchmarks/results/{rows[0]['device']['slug']}/curves.png)."
    )
    return [intro, "\n".join(to_markdown(header, body)), caption(rows)]
