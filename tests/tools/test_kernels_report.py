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
    from fused_res.kernels import bn_act
    from report import cuda_resources, memory_requests

RESOURCES = cuda_resources.Resources(72, 512, *[0] * 16)
SECTIONS = pytest.mark.parametrize("section", report.SECTIONS, ids=lambda section: section.name)


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
