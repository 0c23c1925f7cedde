"""The README's tables of a GPU's rows."""

from __future__ import annotations

import re

from sheets import CL, OURS, STEP, Suite, caption, to_markdown, unique

GRAPHED = "-graphed"
COMPILED = "compile"
CUDNN = "cudnn-fused"
OPTIMIZED = "fused_res-optimized"


class GpuSuite(Suite):
    """``backends``: our rivals that run as they are, without graphs and torch.compile."""

    def __init__(self, rows: list[dict]) -> None:
        super().__init__(rows)
        self.allocator = self.allocators[0]
        self.backends = [name for name in self.ours if re.fullmatch(r"fused_res-[a-z0-9]+", name)]
        timed = (row for row in rows if row["direction"] != "saved")
        self.lines = unique((row["workload"], row["direction"]) for row in timed)

    def found(self, line: tuple[str, str], rival: str) -> dict:
        return self.row(line[0], rival, line[1], self.allocator) or {}

    def over(self, line: tuple[str, str], rival: str, *baselines: str) -> str:
        """Speed-up over the fastest of the baselines: a label, or the start of a rival's name."""
        ratios = [
            ratio
            for label, ratio in self.found(line, rival).get("speedup_over", {}).items()
            if label in baselines or any(_is(label.split()[0], base) for base in baselines)
        ]
        return _number(min(ratios, default=None))

    def fastest(self, line: tuple[str, str], ours: bool) -> dict | None:
        rows = [
            row
            for row in self.rows
            if (row["workload"], row["direction"]) == line
            and row["median_ms"] is not None
            and row["rival"].startswith("fused_res") == ours
        ]
        return min(rows, key=lambda row: row["median_ms"], default=None)


def _is(rival: str, baseline: str) -> bool:
    """``compile`` stands for every mode of torch.compile."""
    return rival == baseline or (baseline == COMPILED and rival.startswith(f"{COMPILED}-"))


def _number(x: float | None, digits: str = ".2f") -> str:
    return "-" if x is None else format(x, digits)


def _line(workload: str, direction: str) -> list[str]:
    short = {STEP: "training", "train": "training", "eval": "eval"}
    return [workload, short.get(direction, direction)]


def _ops(suite: GpuSuite, rival: str) -> list[str]:
    body = []
    for workload in suite.workloads:
        step = workload, STEP
        row = suite.found(step, rival)
        body.append(
            [
                workload.removeprefix("bn_act "),
                suite.over((workload, "forward"), rival, "eager"),
                suite.over(step, rival, "eager"),
                suite.over(step, rival, COMPILED),
                suite.over(step, rival + GRAPHED, "eager" + GRAPHED),
                _number(row.get("median_ms"), ".3g"),
                _number(row.get("percent_of_copy"), ".3g"),
            ]
        )
    header = ["tensor", "forward", STEP, "over torch.compile", "both in CUDA graphs", "ms",
              "% of copy"]  # fmt: skip
    return to_markdown(header, body)


def _against(suite: GpuSuite, line: tuple[str, str], rival: str) -> list[str]:
    """The cells that blocks and nets share."""
    graphs = "eager" + GRAPHED, CUDNN + GRAPHED, "compile-reduce-overhead"
    return [
        suite.over(line, rival, "eager NCHW"),
        suite.over(line, rival, f"eager {CL}"),
        suite.over(line, rival, COMPILED),
        suite.over(line, rival, CUDNN),
        suite.over(line, rival + GRAPHED, *graphs),
    ]


AGAINST = ["over eager NCHW", f"over eager {CL}", "over torch.compile", "over cuDNN's fused calls",
           "in CUDA graphs, over the fastest of theirs"]  # fmt: skip


def _blocks(suite: GpuSuite, rival: str) -> list[str]:
    body = []
    for line in suite.lines:
        saved = "-"
        ours, theirs = (
            suite.row(line[0], name, "saved", suite.allocator) for name in (rival, "eager")
        )
        if ours and theirs and line[1] != "eval":
            saved = f"{theirs['bytes'] / 2**20:.3g} → {ours['bytes'] / 2**20:.3g}"
        ms = _number(suite.found(line, rival).get("median_ms"), ".3g")
        body.append([*_line(*line), *_against(suite, line, rival), ms, saved])
    header = ["block", "mode", *AGAINST, "ms", "saved for backward, MiB"]
    return to_markdown(header, body)


def _nets(suite: GpuSuite, rival: str) -> list[str]:
    body = []
    for line in suite.lines:
        pair = suite.found(line, "eager"), suite.found(line, rival)
        speed, memory = (
            " → ".join(_number(row.get(field), ".0f") for row in pair)
            for field in ("images_per_s", "peak_mib")
        )
        body.append([*_line(*line), speed, *_against(suite, line, rival), memory])
    header = ["net", "mode", "images/s", *AGAINST, "peak memory, MiB"]
    return to_markdown(header, body)


def _inference(suite: GpuSuite, rival: str) -> list[str]:
    body = []
    graphs = "eager" + GRAPHED, CUDNN + GRAPHED, "compile-max-autotune-freezing"
    for line in suite.lines:
        ours = suite.found(line, rival), suite.found(line, rival + GRAPHED)
        body.append(
            [
                line[0],
                suite.over(line, rival, "eager"),
                suite.over(line, rival, COMPILED),
                suite.over(line, rival, CUDNN),
                suite.over(line, rival + GRAPHED, *graphs),
                *(
                    " / ".join(_number(row.get(field), digits) for row in ours)
                    for field, digits in (
                        ("median_ms", ".3g"),
                        ("images_per_s", ".0f"),
                        ("percent_of_roofline", ".3g"),
                    )
                ),
            ]
        )
    header = ["net or block", f"over eager {CL}", *AGAINST[2:], "ms", "images/s", "% of roofline"]
    return to_markdown(header, body)


def implementation(row: dict) -> str:
    """Of a row of ``convs`` or ``training-convs``: ``eager``, ``cudnn``, ``triton``."""
    return row["rival"].removeprefix(OURS).split("-")[0]


def best(rows: list[dict]) -> dict[str, dict]:
    """The fastest row of each implementation that was timed."""
    timed = sorted((r for r in rows if r["median_ms"] is not None), key=lambda r: -r["median_ms"])
    return {implementation(row): row for row in timed}


def _convs(suite: GpuSuite) -> list[str]:
    names = unique(implementation(row) for row in suite.rows)
    body = []
    for workload in suite.workloads:
        found = best([row for row in suite.rows if row["workload"] == workload])
        ours = [row for name, row in found.items() if name != "eager"]
        least = min(ours, key=lambda row: row["median_ms"], default={})
        over = least.get("speedup_over", {}).get(f"eager {CL}")
        ms = [_number(found.get(name, {}).get("median_ms"), ".3g") for name in names]
        share = _number(least.get("percent_of_roofline"), ".3g")
        config = found.get("triton", {}).get("config") or {"": "-"}
        config = " ".join(map(str, config.values()))
        body.append(
            [workload.removeprefix("conv "), *ms, _number(over), share, " ".join(map(str, config))]
        )
    header = ["convolution", *(f"{name}, ms" for name in names), "fastest over eager",
              "% of roofline", "Triton's configuration"]  # fmt: skip
    return to_markdown(header, body)


def _autotune(suite: GpuSuite, rival: str) -> list[str]:
    tuned = "compile-max-autotune"
    body = [
        [*_line(*line), suite.over(line, rival, tuned), suite.over(line, rival + GRAPHED, tuned)]
        for line in suite.lines
    ]
    return to_markdown(["what", "mode", "speed-up", "ours in a CUDA graph"], body)


def behind(suite: GpuSuite) -> str:
    """Where the fastest of all rivals is not ours, and by how much."""
    lines = [(line, suite.fastest(line, True), suite.fastest(line, False)) for line in suite.lines]
    pairs = [(line, ours, theirs) for line, ours, theirs in lines if ours and theirs]
    lost = [
        f"{workload}, {direction}: {theirs['median_ms'] / ours['median_ms']:.2f} "
        f"({theirs['rival']} {theirs['layout']})"
        for (workload, direction), ours, theirs in pairs
        if theirs["median_ms"] < ours["median_ms"]
    ]
    head = f"The fastest form of ours loses to the fastest rival in {len(lost)} of {len(pairs)}"
    return f"{head}: {'; '.join(lost)}." if lost else f"{head}."


INTRO = {
    "ops": "BatchNorm + residual add + ReLU in training ({rival}): speed-up over eager PyTorch in "
    "the same layout and over torch.compile (the faster of its modes), and the share of the "
    "measured copy bandwidth reached.",
    "blocks": "A whole block ({rival}, channels_last): speed-up over PyTorch, and what is saved "
    "for backward, PyTorch's → ours.",
    "parts": "A block that `fuse_` runs in parts ({rival}, channels_last): speed-up over PyTorch, "
    "and what is saved for backward, PyTorch's → ours.",
    "nets": "Whole nets under bfloat16 autocast ({rival}, channels_last), training with the "
    "optimizer's step: images a second and peak memory above the parameters, eager "
    "channels_last → ours, and the speed-up.",
    "inference": "Inference ({rival}, channels_last): speed-up; then ours as it is / in a CUDA "
    "graph, and its share of what the measured peaks allow a kernel for each convolution.",
    "chains": "Chains of residual blocks in one call, inference ({rival}, channels_last): "
    "speed-up; then ours as it is / in a CUDA graph, and its share of what the measured peaks "
    "allow a kernel that reads the weights and x once.",
    "autotune": "Against torch.compile's max-autotune ({rival}): speed-up.",
}
CONVS = {
    "convs": "The convolutions of ResNet-18 and ResNet-50, each with BatchNorm, residual and ReLU, "
    "called from Python: each implementation, Triton's in its fastest configuration.",
    "training-convs": "The convolutions of blocks in training, one way, with what comes with them: "
    "PyTorch's and passes over memory of Triton's, and Triton's own in its fastest configuration.",
}
INTRO["inference-all"] = INTRO["inference"]
TABLES = {"ops": _ops, "blocks": _blocks, "parts": _blocks, "nets": _nets, "inference": _inference,
          "chains": _inference, "inference-all": _inference, "autotune": _autotune}  # fmt: skip


def peaks(rows: list[dict]) -> str:
    shown = [
        f"{row['workload']} {row['gbps']:.0f} GB/s"
        if row["gbps"] is not None
        else f"{row['workload']} {row['tflops']:.0f} TFLOP/s"
        for row in rows
    ]
    return f"Measured peaks: {'; '.join(shown)}."


def parts(suites: dict[str, list[dict]]) -> list[str]:
    """Paragraphs and tables of one GPU."""
    out = []
    if suites.get("peaks"):
        out += [peaks(suites["peaks"]), caption(suites["peaks"])]
    for name, make in TABLES.items():
        if not suites.get(name):
            continue
        suite = GpuSuite(suites[name])
        # what is tuned takes the best of our backends, of which chains are run by one
        optimized = [r for r in suite.backends if r == OPTIMIZED and name != "chains"]
        for rival in optimized or suite.backends:
            out.append(INTRO[name].format(rival=rival) + " Under 1 is slower.")
            out.append("\n".join(make(suite, rival)))
        out += [behind(suite), caption(suites[name])]
    for name, intro in CONVS.items():
        if suites.get(name):
            suite = GpuSuite(suites[name])
            out += [intro, "\n".join(_convs(suite)), caption(suite.rows)]
    return out
