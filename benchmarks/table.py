"""The README's benchmark tables, from committed rows: ``python benchmarks/table.py --help``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import curve_tables
import gpu_tables
from sheets import CL, OURS, STEP, Suite, caption, load, to_markdown, unique

from fused_res.env import BACKENDS

RESULTS = Path(__file__).resolve().parent / "results"
FROZEN = "compile-freezing"
PYTORCH = ("eager", "compile", FROZEN)
CHAINED = "fused_res-frozen"
RUNTIMES = ["onnxruntime", "openvino"]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


# --- the figures the project is held to on a CPU, 2 threads, float32


def targets(suites: dict[str, list[dict]]) -> list[tuple[bool, str]]:
    """(met, what) of every figure, for each allocator and each of our backends."""
    out: list[tuple[bool, str]] = []

    def claim(what: str, found: list[float | None], least: float, enough: int, total: int) -> None:
        met = sum(x is not None and x >= least for x in found)
        shown = " ".join("-" if x is None else f"{x:.2f}" for x in found)
        count = f"{enough} of {total}"
        out.append(
            (met >= enough and len(found) >= total, f"{what}, >= {least:.2f} on {count}: {shown}")
        )

    if "ops" in suites:
        ops = Suite(suites["ops"])
        for rival in ops.ours:
            for allocator in ops.allocators:
                for layout, least in ("NCHW", 2.0), (CL, 1.6):
                    names = [w for w in ops.workloads if w.endswith(f" {layout}")]
                    eager, compiled = (
                        [ops.speedup(w, rival, STEP, allocator, [base]) for w in names]
                        for base in ("eager", "compile")
                    )
                    what = f"{rival}, allocator {allocator}: bn_act {layout} forward+backward over"
                    claim(f"{what} eager", eager, least, 5, 6)
                    claim(f"{what} eager", eager, 1.25, 6, 6)
                    claim(f"{what} torch.compile", compiled, 1.3, 6, 6)
    if "blocks" in suites:
        blocks = Suite(suites["blocks"])
        deep = [w for w in blocks.workloads if w.startswith("bottleneck")]
        kinds = [
            ("32 channels", [w for w in blocks.workloads if " 32ch " in w], 1.6),
            ("basic, 64 channels", [w for w in blocks.workloads if " 64ch " in w], 1.1),
            ("bottleneck", deep, 1.3),
        ]
        best = [f"eager {CL}", "compile", "compile-max-autotune"]
        for rival in blocks.ours:
            for allocator in blocks.allocators:
                what = f"{rival}, allocator {allocator}: block step over the best of PyTorch"

                def over(names: list[str], rival=rival, allocator=allocator) -> list[float | None]:
                    return [blocks.speedup(w, rival, STEP, allocator, best) for w in names]

                claim(what, over(blocks.workloads), 1.0, 6, 6)
                for kind, names, least in kinds:
                    claim(f"{what}, {kind}", over(names), least, len(names), len(names))
            saved = [
                blocks.speedup(w, rival, "saved", blocks.allocators[0], ["eager"]) for w in deep
            ]
            saved = [None if x is None else 1 - 1 / x for x in saved]
            claim(f"{rival}: share of saved bytes spared, bottleneck", saved, 0.15, 1, 1)
    if "parts" in suites:
        parts = Suite(suites["parts"])
        for rival in parts.ours:
            for allocator in parts.allocators:
                for direction, what in (STEP, "step"), ("eval", "inference"):
                    over = [
                        parts.speedup(w, rival, direction, allocator, [f"eager {CL}"])
                        for w in parts.workloads
                    ]
                    what = f"{rival}, allocator {allocator}: {what} of blocks in parts over eager"
                    claim(f"{what} {CL}", over, 1.0, 6, 6)
    if "inference" in suites:
        found = Suite(suites["inference"])
        single, many = (
            [w for w in found.workloads if re.search(rf"ResNet-\d+ batch {n}$", w)] for n in (1, 16)
        )
        blocks = [w for w in found.workloads if "ResNet" not in w]
        for rival in found.ours:
            for allocator in found.allocators:
                what = f"{rival}, allocator {allocator}: inference of"

                def over(names: list[str], *bases: str, rival=rival, allocator=allocator):
                    return [found.speedup(w, rival, "eval", allocator, list(bases)) for w in names]

                for names, batch, eager, frozen in (single, 1, 1.35, 1.10), (many, 16, 1.3, 1.05):
                    nets = f"{what} ResNet-18, ResNet-50, batch {batch}, over"
                    claim(f"{nets} eager {CL}", over(names, f"eager {CL}"), eager, 2, 2)
                    claim(f"{nets} torch.compile, frozen", over(names, FROZEN), frozen, 2, 2)
                claim(f"{what} blocks over the best of PyTorch", over(blocks, *PYTORCH), 1.0, 6, 6)
    if "chains" in suites:
        chains = Suite(suites["chains"])
        least = {"16x16 batch 1": (6.0, 1), "8x8 batch 1": (10.0, 1), "batch 64": (2.5, 2),
                 "CIFAR": (3.0, 1)}  # fmt: skip
        for allocator in chains.allocators:
            what = f"{CHAINED}, allocator {allocator}: chain of 100 blocks"
            for part, (enough, count) in least.items():
                names = [w for w in chains.workloads if part in w]
                over = [
                    chains.speedup(w, CHAINED, "eval", allocator, [f"eager {CL}"]) for w in names
                ]
                claim(f"{what}, {part}, over eager {CL}", over, enough, count, count)
            names = [w for w in chains.workloads if "chain" in w]
            rest = []
            for w in names:
                each = [
                    chains.speedup(w, CHAINED, "eval", allocator, [base])
                    for base in (FROZEN, *RUNTIMES)
                ]
                rest.append(None if None in each else min(each))
            claim(f"{what}, over the best of other runtimes and torch.compile", rest, 1.5, 4, 4)
    return out + curve_tables.targets(suites.get("curves", []))


def goals(suites: dict[str, list[dict]]) -> list[tuple[bool, str]]:
    """(met, what) of what is aimed at and not demanded: to be the fastest runtime there is."""
    if "inference" not in suites:
        return []
    found, out = Suite(suites["inference"]), []
    for rival in found.ours:
        for allocator in found.allocators:
            for workload in found.workloads:
                over = found.speedup(workload, rival, "eval", allocator, RUNTIMES)
                shown = "-" if over is None else f"{over:.2f}"
                what = f"{rival}, allocator {allocator}: {workload} over the faster of"
                met = over is not None and over >= 1
                out.append((met, f"{what} {' and '.join(RUNTIMES)}, >= 1.00: {shown}"))
    return out


# --- markdown


def _cells(values: list[float | None]) -> str:
    """One number for each allocator."""
    return " / ".join("-" if x is None else f"{x:.2f}" for x in values)


def _milliseconds(values: list[float | None], digits: str = ".3g") -> str:
    return " / ".join("-" if x is None else format(x, digits) for x in values)


def _ops(suite: Suite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:

        def over(direction: str, base: str, workload=workload) -> str:
            return _cells(
                [suite.speedup(workload, rival, direction, a, [base]) for a in suite.allocators]
            )

        step = [suite.row(workload, rival, STEP, a) or {} for a in suite.allocators]
        body.append(
            [
                workload.removeprefix("bn_act "),
                over("forward", "eager"),
                over(STEP, "eager"),
                over(STEP, "compile"),
                _milliseconds([row.get("median_ms") for row in step]),
                _milliseconds([row.get("percent_of_copy") for row in step]),
            ]
        )
    header = ["tensor", "forward", STEP, f"{STEP}, over torch.compile", f"{STEP}, ms", "% of copy"]
    return to_markdown(header, body)


def _blocks(suite: Suite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:

        def over(direction: str, *bases: str, workload=workload) -> str:
            return _cells(
                [
                    suite.speedup(workload, rival, direction, a, list(bases))
                    for a in suite.allocators
                ]
            )

        step = [suite.row(workload, rival, STEP, a) or {} for a in suite.allocators]
        body.append(
            [
                workload,
                over(STEP, "eager NCHW"),
                over(STEP, f"eager {CL}"),
                over(STEP, "compile"),
                over("forward", f"eager {CL}"),
                _milliseconds([row.get("median_ms") for row in step]),
                _saved(suite, workload, rival),
            ]
        )
    header = [
        "block",
        "step over eager NCHW",
        f"over eager {CL}",
        "over torch.compile",
        f"forward over eager {CL}",
        "step, ms",
        "saved for backward, MiB",
    ]
    return to_markdown(header, body)


def _saved(suite: Suite, workload: str, rival: str) -> str:
    """MiB kept for backward, PyTorch's and ours."""
    ours, theirs = (
        suite.row(workload, name, "saved", suite.allocators[0]) for name in (rival, "eager")
    )
    if not (ours and theirs):
        return "-"
    return f"{theirs['bytes'] / 2**20:.3g} → {ours['bytes'] / 2**20:.3g}"


def _parts(suite: Suite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:
        cells = []
        for direction in STEP, "eval":
            cells += [
                _cells(
                    [suite.speedup(workload, rival, direction, a, [base]) for a in suite.allocators]
                )
                for base in (f"eager {CL}", "compile")
            ]
            rows = [suite.row(workload, rival, direction, a) or {} for a in suite.allocators]
            cells.append(_milliseconds([row.get("median_ms") for row in rows]))
        body.append([workload, *cells, _saved(suite, workload, rival)])
    over = f"over eager {CL}", "over torch.compile", "ms"
    header = ["block", *(f"{what} {cell}" for what in ("step", "inference") for cell in over)]
    return to_markdown([*header, "saved for backward, MiB"], body)


def _inference(suite: Suite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:
        rows = [suite.row(workload, rival, "eval", a) or {} for a in suite.allocators]

        def over(*bases: str, workload=workload) -> str:
            return _cells(
                [suite.speedup(workload, rival, "eval", a, list(bases)) for a in suite.allocators]
            )

        def figures(field: str, digits: str = ".3g", rows=rows) -> str:
            return _milliseconds([row.get(field) for row in rows], digits)

        body.append(
            [
                workload,
                over("eager NCHW"),
                over(f"eager {CL}"),
                over("compile"),
                over(FROZEN),
                over("onnxruntime"),
                over("openvino"),
                figures("median_ms"),
                figures("images_per_s", ".0f"),
                figures("percent_of_roofline"),
            ]
        )
    header = ["net or block", "over eager NCHW", f"over eager {CL}", "over torch.compile",
              "over torch.compile, frozen", "over ONNX Runtime", "over OpenVINO", "ms", "images/s",
              "% of roofline"]  # fmt: skip
    return to_markdown(header, body)


def _chains(suite: Suite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:
        rows = [suite.row(workload, rival, "eval", a) or {} for a in suite.allocators]

        def over(*bases: str, workload=workload, of=rival) -> str:
            return _cells(
                [suite.speedup(workload, of, "eval", a, list(bases)) for a in suite.allocators]
            )

        ms, share = (
            _milliseconds([row.get(name) for row in rows])
            for name in ("median_ms", "percent_of_roofline")
        )
        bases = ("eager NCHW", f"eager {CL}", FROZEN, "onnxruntime", "openvino")
        by_fuse = over(f"eager {CL}", of="fused_res-cpu")
        body.append([workload, *map(over, bases), ms, share, by_fuse])
    header = ["net", "over eager NCHW", f"over eager {CL}", "over torch.compile, frozen",
              "over ONNX Runtime", "over OpenVINO", "ms", "% of roofline",
              f"`fuse_` alone, over eager {CL}"]  # fmt: skip
    return to_markdown(header, body)


INTRO = {
    "ops": "BatchNorm + residual add + ReLU in training ({rival}): speed-up over eager PyTorch in "
    "the same layout and over torch.compile, and the share of the measured copy bandwidth reached.",
    "blocks": "A whole block in training, forward and backward ({rival}, channels_last): speed-up "
    "over PyTorch, and what is saved for backward, PyTorch's → ours.",
    "parts": "Blocks that `fuse_` runs in parts, as it leaves them ({rival}, channels_last): a "
    "training step and, in eval mode without gradients, inference; and what is saved for backward, "
    "PyTorch's → ours.",
    "inference": "Inference, `optimize_for_inference` ({rival}, channels_last): speed-up over "
    "PyTorch and over other runtimes, and the share reached of what the measured peak rate and "
    "copy bandwidth allow a kernel for each convolution (over 100 %: Winograd multiplies less).",
    "chains": "Chains of residual blocks in one call, `optimize_for_inference(freeze=True)` "
    "({rival}, channels_last), as the runtimes beside it are frozen; last, after `fuse_` alone, "
    "which looks at every parameter in every call. The roofline is that of a direct convolution.",
}


TABLES = {"ops": _ops, "blocks": _blocks, "parts": _parts, "inference": _inference,
          "chains": _chains}  # fmt: skip


def markdown(results: Path) -> str:
    """Every committed suite as a table under a line that says where and when it was measured."""
    parts = []
    for device, suites in load(results).items():
        if not device.startswith("cpu-"):
            parts += gpu_tables.parts(suites) + curve_tables.parts(suites)
            continue
        for name, make in TABLES.items():
            rows = suites.get(name)
            if not rows:
                continue
            suite = Suite(rows)
            for rival in [CHAINED] if name == "chains" else suite.ours:
                text = INTRO[name].format(rival=rival) + " Under 1 is slower."
                if len(suite.allocators) > 1:
                    text += f" Allocator: {' / '.join(suite.allocators)} (see `benchmarks/`)."
                parts += [text, "\n".join(make(suite, rival)), caption(rows)]
        parts += curve_tables.parts(suites)
    return "\n\n".join(parts) if parts else "No results yet."


def _where(row: dict) -> dict:
    device = {"device": row["device"]["name"], "isa": row["device"]["isa"]}
    return {**device, "dtype": row["dtype"], "layout": row["layout"]}


def _calls(rows: list[dict]) -> list[dict]:
    """What was measured of each call: an implementation's fastest, and Triton's configuration."""
    out = []
    for workload in unique(row["workload"] for row in rows):
        found = gpu_tables.best([row for row in rows if row["workload"] == workload])
        if found:
            row = next(iter(found.values()))
            ms = {name: row["median_ms"] for name, row in found.items()}
            config = found.get("triton", {}).get("config")
            call = {"op": "conv_bn_act", **row["call"], "ms": ms, "config": config}
            out.append({**_where(row), **call})
    return out


def dispatch(results: Path) -> str:
    """JSON of what ``fused_res/dispatch/shipped_timings.py`` reads, of GPUs.

    Steps of bn_act, by backend; calls of conv_bn_act and convolutions of blocks in training, by
    implementation.
    """
    found: dict[tuple, dict] = {}
    calls: list[dict] = []
    for device, suites in load(results).items():
        if device.startswith("cpu-"):
            continue
        calls += _calls([*suites.get("convs", []), *suites.get("training-convs", [])])
        for row in suites.get("ops", []):
            backend = row["rival"].removeprefix(OURS)
            if row["direction"] != STEP or row["refused"] or backend not in BACKENDS:
                continue
            key = device, row["workload"]
            measured = found.setdefault(
                key, {**_where(row), "op": "bn_act", "shape": row["shape"], "ms": {}}
            )
            measured["ms"][backend] = row["median_ms"]
    rows = [json.dumps(row) for row in [*found.values(), *calls] if "eager" in row["ms"]]
    return "[\n" + ",\n".join(rows) + "\n]\n" if rows else "[]\n"


def replaced(text: str, table: str) -> str:
    """``text`` with ``table`` between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{BEGIN} and {END} must each be there once, in this order")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", type=Path, metavar="FILE", help="replace the table in FILE")
    mode.add_argument("--check", type=Path, metavar="FILE", help="exit 1 where FILE's is another")
    mode.add_argument(
        "--dispatch",
        type=Path,
        metavar="FILE",
        help="write what `auto` follows, shipped_timings.json",
    )
    mode.add_argument(
        "--targets",
        action="store_true",
        help="hold CPU results against the targets, and show how far the goals are",
    )
    args = parser.parse_args(argv)
    if args.targets:
        cpus = [
            suites for device, suites in load(args.results).items() if device.startswith("cpu-")
        ]
        lines, aims = ([line for suites in cpus for line in f(suites)] for f in (targets, goals))
        for met, what in lines:
            print(f"{'pass' if met else 'FAIL'}  {what}")
        for met, what in aims:
            print(f"{'met ' if met else 'not '}  goal: {what}")
        return 0 if lines and all(met for met, _ in lines) else 1
    if args.dispatch:
        args.dispatch.write_text(dispatch(args.results))
        return 0
    table = markdown(args.results)
    path = args.write or args.check
    if path is None:
        print(table)
        return 0
    text = path.read_text()
    try:
        new = replaced(text, table)
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if new != text:
            print(f"{path} is out of date: python benchmarks/table.py --write {path}")
        return int(new != text)
    if new != text:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
