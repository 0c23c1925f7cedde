"""The report of a training: one HTML page, made from the log, that needs no other file."""

from __future__ import annotations

import html
import io
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..cli import CommandError
from ..page import COLORS, change, document, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"plain": "PyTorch", "fused": "fused_res"}
CELLS = 20  # with more classes a table is not readable, so a picture is drawn
PAIRS = 10

_STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1rem; }
figure, figure h3 { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 40rem; }
.facts th, .facts td, .pairs :nth-child(2) { text-align: left; }
.facts td:first-child { white-space: nowrap; } .facts td:last-child { overflow-wrap: anywhere; }
.confusion th { font-weight: 400; } .confusion th, .confusion td { font-size: .75rem; }
.confusion th:not(:first-child) { text-align: center; border: 0; }
.confusion .long th { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; padding: .2rem .1rem; }
.confusion td { min-width: 1.5rem; padding: .2rem .1rem; text-align: center;
  border: 1px solid white; }
.confusion th:first-child { padding-right: .4rem; border: 0; }
"""


class Net(NamedTuple):
    """The records of one net: its part of the start, its epochs in order, its end."""

    label: str
    about: dict
    epochs: list[dict]
    end: dict | None

    def last(self, key: str) -> float | None:
        found = [record[key] for record in (*self.epochs, self.end or {}) if key in record]
        return found[-1] if found else None


def read_log(path: str | Path) -> list[dict]:
    """The records of a log, JSON lines.

    An incomplete last line is left out: the process was killed while it wrote.

    Raises:
        CommandError: a line is not a record; names the file and the line.
    """
    records = []
    *lines, rest = Path(path).read_bytes().split(b"\n")
    for i, line in enumerate((*lines, rest), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "event" not in record:
                raise ValueError('not an object with "event"')
            records.append(record)
        except ValueError as error:
            if i <= len(lines):
                raise CommandError(f"{path}: line {i}: {error}") from error
    return records


def page(records: list[dict]) -> str:
    """The HTML text of a training that has ended or is still running.

    Args:
        records: all records of the log. If an epoch was run again, its last record counts.

    Raises:
        CommandError: there is no record of the start.
    """
    starts = [record for record in records if record["event"] == "start"]
    if not starts:
        raise CommandError('no "start" among the records: not the log of a training')
    start = starts[-1]
    nets = [_net(name, start["nets"][name], records) for name in LABELS if name in start["nets"]]
    data = start["data"]
    title = f"{start['model']} on {data['name']}"
    facts = [
        f"{data['train']:,} images of {data['size']}x{data['size']} to train on and "
        f"{data['val']:,} to validate, {len(data['classes'])} classes.",
        f"Started {start['time']} on {start['device']}.",
        *(f"Resumed {r['time']} after epoch {r['epoch']}." for r in _of("resume", records)),
    ]
    sections = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(' '.join(facts))}</p>"]
    if not all(net.end for net in nets):
        sections.append("<p><strong>Not finished: still running, or stopped.</strong></p>")
    header = ["", *(net.label for net in nets), "fused_res is"]
    sections += ["<h2>Result</h2>", table(header[: 2 * len(nets)], _result_rows(nets))]
    if any(net.epochs for net in nets):
        sections += ["<h2>Curves</h2>", '<div class="figures">', *_curves(nets), "</div>"]
    ended = [net for net in nets if net.end]
    if ended:
        sections.append("<h2>Confusion</h2>")
        sections.append('<p class="note">Rows: the true class; columns: the predicted one.</p>')
        sections.append('<div class="figures">')
        sections += [_confusion(net, data["classes"]) for net in ended]
        sections.append("</div>")
    if "fused" in start["nets"]:
        sections += ["<h2>Blocks</h2>", _blocks(start["nets"]["fused"])]
    for name in ("arguments", "settings", "versions"):
        if start[name]:
            sections += [f"<h2>{name.capitalize()}</h2>", table((), start[name].items(), "facts")]
    return document(title, sections, _STYLE)


def _of(event: str, records: list[dict]) -> list[dict]:
    return [record for record in records if record["event"] == event]


def _net(name: str, about: dict, records: list[dict]) -> Net:
    epochs = {r["epoch"]: r for r in _of("epoch", records) if r["net"] == name}
    last = [r for r in _of("end", records) if r["net"] == name]
    return Net(LABELS[name], about, [epochs[k] for k in sorted(epochs)], last[-1] if last else None)


def _result_rows(nets: Sequence[Net]) -> list[list[str]]:
    """(quantity, value of each net, difference between the second and the first)."""
    trained = [net for net in nets if net.epochs]
    planned = f", of {trained[0].epochs[-1]['of']}" if trained else ""
    speeds = [[record["images_per_second"] for record in net.epochs] for net in nets]

    def last(key: str) -> list[float | None]:
        return [net.last(key) for net in nets]

    def points(a: float, b: float) -> str:
        return f"{100 * (b - a):+.2f} points"

    quantities: list[tuple[str, list, Callable, Callable]] = [
        (f"epochs{planned}", [len(net.epochs) for net in nets], str, lambda a, b: ""),
        ("accuracy, validation", last("val_accuracy"), "{:.2%}".format, points),
        ("accuracy, validation, averaged", last("val_accuracy_ema"), "{:.2%}".format, points),
        ("accuracy, training", last("train_accuracy"), "{:.2%}".format, points),
        ("loss, validation", last("val_loss"), "{:.4f}".format, lambda a, b: f"{b - a:+.4f}"),
        (
            "images/s, median",
            [statistics.median(speed) if speed else None for speed in speeds],
            "{:,.0f}".format,
            lambda a, b: change(b, a, "faster", "slower"),
        ),
        (
            "peak memory",
            last("peak_memory"),
            lambda value: f"{value / 2**20:,.0f} MiB",
            lambda a, b: change(a, b, "less", "more"),
        ),
        (
            "parameters",
            [net.about["parameters"] for net in nets],
            "{:,}".format,
            lambda a, b: "the same" if a == b else f"{b - a:+,}",
        ),
    ]
    rows = []
    for name, values, show, compare in quantities:
        if any(value is not None for value in values):
            rows.append([name, *("-" if value is None else show(value) for value in values)])
            if len(values) == 2:
                rows[-1].append("" if None in values else compare(*values))
    return rows


def _figure(name: str, caption: str, draw: Callable[[Axes], None], size: tuple = (4.4, 3)) -> str:
    """An SVG with ids that start with ``name``, so that a page can have several. The same data
    gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fused_res",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", out.getvalue())
    label = f'<svg role="img" aria-label="{caption}"'
    svg = svg[svg.index("<svg") :].replace("<svg", label, 1)
    return f"<figure><h3>{caption}</h3>{svg}</figure>"


def _curves(nets: Sequence[Net]) -> list[str]:
    """Validation solid, training dashed, averaged weights dotted; the nets by colour."""
    from matplotlib.ticker import MaxNLocator

    def lines(keys: dict[str, tuple[str, str]], from_zero: bool = True) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for net in nets:
                for key, (what, line) in keys.items():
                    points = [(r["epoch"], r[key]) for r in net.epochs if key in r]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True),
                            line,
                            label=f"{net.label}{what}",
                            color=COLORS[net.label],
                            marker="." if len(points) == 1 else None,
                            # a wide line behind a narrow one: equal curves both stay visible
                            linewidth=3 if net.label == "PyTorch" else 1.5,
                        )
            axes.set_xlabel("epoch")
            axes.set_xlim(0, 1.02 * max(net.epochs[-1]["of"] for net in nets if net.epochs))
            if from_zero:
                axes.update_datalim([(0, 0)])
                axes.autoscale_view(scalex=False)
                axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.25)
            axes.figure.legend(loc="outside lower center", ncols=len(nets), frameon=False)

        return draw

    val, train, averaged = (", validation", "-"), (", training", "--"), (", averaged", ":")
    accuracies = {"val_accuracy": val, "train_accuracy": train, "val_accuracy_ema": averaged}
    return [
        _figure("loss", "Loss, cross entropy", lines({"val_loss": val, "loss": train})),
        _figure("accuracy", "Accuracy", lines(accuracies, from_zero=False)),
        _figure("speed", "Images/s in training", lines({"images_per_second": ("", "-")})),
    ]


def _confusion(net: Net, classes: Sequence[str]) -> str:
    counts = net.end["confusion"]
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    caption = f"{net.label}: {net.last('val_accuracy'):.2%} right"
    few = len(classes) <= CELLS
    if few:
        matrix = f"<h3>{caption}</h3>{_cells(counts, shares, classes)}"
    else:

        def draw(axes: Axes) -> None:
            from matplotlib.colors import PowerNorm

            norm = PowerNorm(0.5, 0, 1)  # shows shares of a few percent too
            picture = axes.imshow(shares, cmap="BuGn", norm=norm, interpolation="none")
            axes.set(xlabel="predicted class", ylabel="true class")
            axes.figure.colorbar(picture, label="share of the true class", shrink=0.8)

        matrix = _figure(f"confusion-{net.label}", caption, draw, (5, 4))
    wrong = sorted(
        (-n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j
    )
    pairs = [(classes[i], classes[j], -n, f"{shares[i][j]:.0%}") for n, i, j in wrong[:PAIRS]]
    sections = [matrix]
    if pairs:
        sections.append(table(("true", "predicted", "images", "of the class"), pairs, "pairs"))
    if not few:
        each = [(i, name, f"{shares[i][i]:.0%}") for i, name in enumerate(classes)]
        found = table(("", "class", "right"), each)
        sections.append(f"<details><summary>All {len(classes)} classes</summary>{found}</details>")
    return f"<div>{''.join(sections)}</div>"


def _cells(counts: list[list[int]], shares: list[list[float]], classes: Sequence[str]) -> str:
    """Green on the diagonal, red beside it, by the share of the true class."""
    names = [html.escape(name) for name in classes]
    kind = ' class="long"' if max(map(len, classes)) > 3 else ""
    lines = [f"<tr{kind}><th></th>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    for i, (row, of_row) in enumerate(zip(counts, shares, strict=True)):
        line = f"<tr><th>{names[i]}</th>"
        for j, (n, share) in enumerate(zip(row, of_row, strict=True)):
            color, alpha = "15 118 110" if i == j else "185 28 28", share**0.5
            text = "#fff" if alpha > 0.6 else "inherit"
            line += f'<td style="background:rgb({color}/{alpha:.2f});color:{text}">{n}</td>'
        lines.append(f"{line}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table class="confusion">\n{body}\n</table></div>'


def _blocks(about: dict) -> str:
    fused, skipped = about["fused"], about["skipped"]
    names = ", ".join(f"<code>{html.escape(name)}</code>" for name in fused)
    count = f"{len(fused)} fused, {len(skipped)} skipped"
    found = f"<details><summary>{count}</summary><p>{names}</p></details>" if fused else count
    return found + (table(("skipped", "reason"), skipped, "facts") if skipped else "")
