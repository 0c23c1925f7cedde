"""The README's table of whole networks on a CPU, in inference, with the default allocator."""

from __future__ import annotations

from harness.suite import CL
from report.tables import Line, Lookup, figure, over, to_markdown, unique

# suite -> what its networks run as, the candidate whose weights are as fixed as the rivals'
CANDIDATES = {"inference": "fused_res-optimized", "chains": "fused_res-frozen"}
COLUMNS = (
    figure("PyTorch, ms", "median_ms", ".2f", of="eager"),
    figure("fused_res, ms", "median_ms", ".2f"),
    over("speed-up over PyTorch", f"eager {CL}"),
    over("over torch.compile", "compile-freezing"),
    over("over ONNX Runtime", "onnxruntime"),
    over("over OpenVINO", "openvino"),
)


def markdown(devices: dict[str, dict[str, list[dict]]]) -> str:
    """A table for each CPU, under it where and when it was measured."""
    sections = []
    for device, suites in devices.items():
        if device.startswith("cpu-"):
            sections += report(suites)
    return "\n\n".join(sections) if sections else "No results yet."


def report(suites: dict[str, list[dict]]) -> list[str]:
    body, shown = [], []
    for suite, candidate in CANDIDATES.items():
        rows = [row for row in suites.get(suite, []) if "ResNet" in row["workload"]]
        found = Lookup(rows)
        for workload in found.workloads:
            line = Line(found, workload, candidate, "eval", found.allocators[0])
            body.append(
                [workload.removeprefix("torchvision "), *(column.cell(line) for column in COLUMNS)]
            )
        shown += rows
    if not body:
        return []
    header = ["inference, float32", *(column.heading for column in COLUMNS)]
    return ["\n".join(to_markdown(header, body)), where(shown)]


def where(rows: list[dict]) -> str:
    """Device, versions, commits and dates of the rows."""
    device, versions = rows[0]["device"], rows[0]["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino")]
    runs = " and ".join(unique(f"commit {row['commit']}, {row['date'][:10]}" for row in rows))
    isa = f"{device['isa']}, {device['cores']} cores, {device['threads']} threads"
    return f"*{device['name']} ({isa}), {', '.join(named)}, {runs}.*"
