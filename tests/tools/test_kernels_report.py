"""benchmarks/kernels.md is what benchmarks/kernels_report.py writes, and misses no kernel. Its
figures are not compared: they are the compilers' of the day."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import kernels_report as report
    from report import bound, cuda_resources, memory_requests, predicted, rates

    from fused_res.kernels import bn_act

RESOURCES = cuda_resources.Resources(72, 512, *[0] * 16)
SECTIONS = pytest.mark.parametrize("section", report.SECTIONS, ids=lambda section: section.name)


# Those whose code an NVIDIA GPU of the predictions runs, and that has elements.
PREDICTED = [
    section
    for section in report.SECTIONS
    if not section.targets[0].startswith("gfx") and section.source != "res_block"
]


def written(section: str) -> str:
    begin, end = report.markers(section)
    text = (ROOT / "benchmarks/kernels.md").read_text()
    assert text.count(begin) == text.count(end) == 1
    return text.split(begin)[1].split(end)[0]


@SECTIONS
def test_tables_have_the_writers_format(section):
    targets = re.escape(" / ".join(section.targets))
    figure = rf"\d+|\d+(/\d+){{{len(section.targets) - 1}}}"
    caption, *parts = written(section.name).strip().split("\n\n")
    assert re.fullmatch(rf"\w+ [\d.]+, {targets}: \d+ compilations, .*", caption)
    for title, table in zip(parts[::2], parts[1::2], strict=True):
        assert re.fullmatch(r"#### \w+", title)
        head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        assert head == section.header()
        for row in rows:
            assert len(row) == len(head), row
            figures = row[-len(section.columns) :]
            assert all(re.fullmatch(figure, cell) for cell in figures), row


@SECTIONS
def test_no_kernel_is_missing(section):
    if section.source:
        sources = list((ROOT / "csrc/cuda").glob("*.cu*"))
        declared = cuda_resources.declared()
        assert len(declared) == sum(path.read_text().count("__global__") for path in sources)
        shown = [
            name for s in report.SECTIONS if s.source for name in cuda_resources.declared(s.source)
        ]
        assert sorted(shown) == sorted(declared)
        wanted = set(map(cuda_resources.short, cuda_resources.declared(section.source)))
    else:
        wanted = set(section.kernels)
        shown = {name for other in report.SECTIONS for name in other.kernels}
        assert (
            shown == set(report.KERNELS)
            and {f"_bn_act_{name}_kernel" for name in bn_act.CONFIGS} < shown
        )
    assert set(re.findall("^#### (.*)$", written(section.name), re.M)) == wanted


def test_what_is_asked_of_memory_is_told_of_every_cuda_kernel_that_moves_tensors():
    head, _, *rows = [
        line.strip("| ").split(" | ") for line in written("requests").strip().splitlines()
    ]
    assert head == ["kernel", "of", *memory_requests.COLUMNS.values()]
    assert all(re.fullmatch(r"-|\d+\.\d\d", cell) for row in rows for cell in row[2:])
    launched = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cuh"))
    names = set(re.findall(r'launch\w*\(\s*"(\w+)"', launched))
    # launched for SyncBatchNorm, or for what a backward pass computes again
    seldom = {"bn_act_statistics", "bn_act_statistics_merge", "bn_act_fwd_reapply"}
    assert {row[0] for row in rows} == names - seldom


def predictions(section) -> str:
    return predicted.table(predicted.read()[section.name], section.labels)


@pytest.mark.parametrize("section", PREDICTED, ids=lambda section: section.name)
def test_predictions_are_of_the_counts_and_the_rates(section):
    rows = predicted.read()[section.name]
    assert written(f"{section.name}-predicted").strip() == predictions(section)
    wanted = set(re.findall("^#### (.*)$", written(section.name), re.M))
    launched = {name for name in wanted if re.search("merge|moments|pack", name)}
    assert {row.kernel for row in rows} == wanted - launched
    tables = sum(line.startswith("| ") for line in written(section.name).splitlines())
    assert 0 < len(predictions(section).splitlines()) - 2 <= tables * 2


@pytest.mark.parametrize("name, field", [("H100", "bandwidth"), ("RTX 4090", "clock")])
def test_a_wrong_rate_is_caught(monkeypatch, name, field):
    gpus = tuple(
        gpu._replace(**{field: getattr(gpu, field) * 1.2}) if gpu.name == name else gpu
        for gpu in rates.GPUS
    )
    monkeypatch.setattr(predicted, "GPUS", gpus)
    with pytest.raises(AssertionError):
        for section in PREDICTED:
            test_predictions_are_of_the_counts_and_the_rates(section)


def test_a_wrong_count_is_caught(monkeypatch):
    sections = predicted.read()
    first, *others = sections["triton-nvidia"]
    counts = {name: c._replace(bytes=c.bytes * 1.2) for name, c in first.counts.items()}
    sections["triton-nvidia"] = [first._replace(counts=counts), *others]
    monkeypatch.setattr(predicted, "read", lambda: sections)
    (section,) = (s for s in PREDICTED if s.name == "triton-nvidia")
    with pytest.raises(AssertionError):
        test_predictions_are_of_the_counts_and_the_rates(section)


def test_predictions_are_written_with_the_tables(monkeypatch, tmp_path):
    """A section's, and what other sections have stays."""
    loop = bound.Loop(1, bound.Counts(bytes=64, fp32=256, issue=512))
    resources = RESOURCES._replace(loops=(bound.Loop(0, loop.counts), loop))
    row = report.Row("_bn_act_fwd_statistics_kernel", ("16x64 x4", "4", "NCHW", "any"), "bf16",
                     (resources,) * 3)  # fmt: skip
    path = tmp_path / "loops.json"
    read, write = predicted.read, predicted.write
    monkeypatch.setattr(predicted, "read", lambda: read(path))
    monkeypatch.setattr(predicted, "write", lambda sections: write(sections, path))
    (section,) = (s for s in PREDICTED if s.name == "triton-nvidia")
    predicted.write({"conv-tma": []})
    page = "\n".join(report.markers("triton-nvidia-predicted"))
    text = report.predict(page, section, [row])
    assert "| _bn_act_fwd_statistics | 16x64 x4 | 4 | NCHW | any | bf16 | 0.6 ps memory |" in text
    assert read(path)["conv-tma"] == []
    (kept,) = read(path)["triton-nvidia"]
    assert kept.counts["sm_80"] == bound.Counts(bytes=2, fp32=8, issue=16)


def test_dtypes_and_architectures_that_agree_are_merged():
    rows = [
        report.Row("stats", ("NCHW",), dtype, (RESOURCES, RESOURCES._replace(registers=registers)))
        for dtype, registers in (("bf16", 80), ("fp16", 80), ("fp32", 72))
    ]
    lines = report.tables(rows, report.Section("stats", ("layout",), [])).splitlines()
    assert lines[0] == "#### stats" and len(lines) == 6
    assert lines[4].startswith("| NCHW | bf16, fp16 | 72/80 | 512 | 0 |")
    assert lines[5].startswith("| NCHW | fp32 | 72 | 512 | 0 |")


@pytest.mark.parametrize("spilled", ["spills", "stack", None])
def test_spills_are_written_and_told(spilled, monkeypatch, tmp_path, capsys):
    resources = RESOURCES._replace(**{spilled: 8}) if spilled else RESOURCES
    monkeypatch.setattr(cuda_resources, "missing", lambda targets: "no nvcc")
    monkeypatch.setattr(
        report,
        "triton_rows",
        lambda section: [
            report.Row(
                "stats", ("16x64", "4", "NCHW", "any"), "bf16", (resources,) * len(section.targets)
            )
        ],
    )
    monkeypatch.setattr(memory_requests, "table", lambda: "| kernel |")
    path = tmp_path / "kernels.md"
    names = [*(section.name for section in report.SECTIONS), "requests"]
    sections = ["\n".join(report.markers(name)) for name in names]
    path.write_text("before\n" + "\n".join(sections) + "\nafter\n")
    assert report.main(["--write", str(path)]) == int(spilled is not None)
    text, told = path.read_text(), capsys.readouterr()
    assert text.startswith(f"before\n{sections[0]}\n") and text.endswith("\nafter\n")
    assert text.count("#### stats") == sum(not section.source for section in report.SECTIONS)
    assert "no nvcc" in told.err
    assert (
        "spills: stats, tile 16x64, warps 4, layout NCHW, residual any, bf16 on sm_90" in told.out
    ) == (spilled is not None)
