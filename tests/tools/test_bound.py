"""The model that predicts what bounds a kernel (benchmarks/report): the loops it finds in machine
code, and its times, by hand-computed examples; and that the loops of bn_act add no float64."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    from report import bound, predicted
    from report.bound import Counts
    from report.rates import GPUS, RATES, Gpu, Rates

# As cuobjdump prints it: a loop in a loop, and the endless one that ends every function.
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
                                                                /* 0x000e220000000800 */
        /*0010*/                   MOV R2, 0x40 ;
        /*0020*/                   IADD3 R4, R2, 0x10, RZ ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R4.64] ;
        /*0040*/                   LDG.E.U8 R12, desc[UR4][R6.64+0x40] ;
        /*0050*/                   FADD R9, R9, R8 ;
        /*0060*/                   FFMA R9, R9, R8, R3 ;
        /*0070*/                   F2F.F64.F32 R14, R9 ;
        /*0080*/                   DADD R16, R16, R14 ;
        /*0090*/                   LDS.64 R20, [R3] ;
        /*00a0*/               @P0 BRA 0x30 ;
        /*00b0*/              @!P1 BRA P2, 0x20 ;
        /*00c0*/                   MUFU.RCP R3, R3 ;
        /*00d0*/                   STG.E.64 desc[UR4][R2.64], R16 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""
INNER = Counts(
    bytes=17, fp32=2, fp64=1, convert64=1, integer=0, shared=8, issue=8
)  # by hand: 0x30 to 0xa0


def test_loops_are_found():
    whole, inner = bound.loops(SASS)
    assert whole.depth == 0 and whole.counts.issue == 17
    assert whole.counts.bytes == 25 and whole.counts.special == 1 and whole.counts.integer == 1
    assert inner.depth == 2 and inner.counts == INNER
    assert not inner.stores and not inner.doubles


@pytest.mark.parametrize(
    "name, field, amount",
    [
        ("HMMA.16816.F32.BF16", "tensor", 64),  # 16 x 8 x 16 multiply-adds of 32 threads
        ("HMMA.1688.F32.TF32", "tf32", 32),
        ("HGMMA.64x128x16.F32.BF16", "tensor", 1024),  # of 128 threads
        ("LDSM.16.M88.4", "shared", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128", "bytes", 16),
        ("LDG.E.U16.CONSTANT", "bytes", 2),
        ("FADD2", "fp32", 1),
        ("IMAD.U32", "fp32", 1),
        ("F2F.F32.F64", "convert64", 1),
        ("F2F.BF16.F32", "convert", 1),
        ("F2FP.BF16.F32.PACK_AB", "integer", 1),
        ("FSEL", "integer", 1),
        ("SHFL.BFLY", "shuffle", 1),
    ],
)
def test_instructions_are_of_their_kind(name, field, amount):
    found = {k: v for k, v in bound.counts([name, name])._asdict().items() if v}
    assert found == {field: 2 * amount, "issue": 2}


def test_times_are_the_slowest_units(monkeypatch):
    monkeypatch.setitem(RATES, "1.0", Rates(64, 2, 4, 64, 16, 16, 32))
    gpu = Gpu("small", "1.0", 10, 2.0, 500, 1024)  # 20 multiprocessor clocks a nanosecond
    cases = {
        "memory": (Counts(bytes=4, fp32=8, issue=16), 8),
        "FP64": (Counts(bytes=4, fp64=1, convert64=1), 37.5),  # 1/2 and 1/4 of a clock
        "FP32": (Counts(bytes=2, fp32=128), 100),
        "integer": (Counts(integer=32), 25),
        "conversions": (Counts(convert=8, special=4), 37.5),
        "shared memory": (Counts(bytes=4, shared=256, shuffle=32), 150),
        "tensor cores": (Counts(tensor=1024, tf32=512, issue=64), 100),
        "issue slots": (Counts(fp32=10, issue=64), 25),
    }
    for by, (counts, picoseconds) in cases.items():
        found = bound.bound(counts, gpu)
        assert found.by == by and found.picoseconds == pytest.approx(picoseconds), by
    assert str(bound.Bound(0.00212, "x")) == "2.1 fs x"
    assert str(bound.Bound(1.949, "x")) == "1.9 ps x"
    assert str(bound.Bound(110.0, "x")) == "110 ps x"


def test_the_cost_of_float64_in_a_loop():
    """One addition and one conversion an element of 2 bytes, by hand: on an H100, 2 / 3350 GB/s is
    more; on an RTX 4090, (1/2 + 1/2) clock of 128 multiprocessors at 2.52 GHz is more than
    2 / 1008 GB/s, on an L4, of 58 at 2.04 GHz, more than 2 / 300 GB/s."""
    float64 = Counts(bytes=2, fp32=4, fp64=1, convert64=1, issue=9)
    found = {gpu.name: str(bound.bound(float64, gpu)) for gpu in GPUS}
    assert found == {
        "H100": "0.6 ps memory", "A100": "0.98 ps memory", "L4": "8.5 ps FP64",
        "RTX 4090": "3.1 ps FP64",
    }  # fmt: skip
    without = float64._replace(fp32=8, fp64=0, convert64=0)
    assert all(bound.bound(without, gpu).by == "memory" for gpu in GPUS)


def test_elements_of_a_trip():
    """What a loop moves is what its elements are worth: x in bf16; or dy, x and a bit of mask."""
    last, nchw = "channels_last, vector, one norm", "NCHW, vector, two norms"
    for kernel, variant, dtype, stores, moved, each in (
        ("bn_act_fwd_statistics", last, "bf16", False, 64, 2),
        ("bn_act_fwd_statistics", nchw, "fp32", False, 64, 4),
        ("bn_act_bwd_sums", last, "bf16", False, 66, 4.125),
        ("bn_act_bwd_sums", nchw, "fp32", False, 97, 12.125),
    ):
        assert predicted._cuda_elements(kernel, variant, dtype, stores) == moved / each
    assert predicted._triton_elements("16x64 x4", "4", whole=True) == 32
    assert predicted._triton_elements("16x64 x4", "4", whole=False) == 8


@pytest.mark.parametrize("kernel", ["statistics", "sums", "cooperative", "whole", "small"])
def test_no_float64_bounds_bn_act(kernel):
    rows = [
        row
        for section in ("cuda", "triton-nvidia")
        for row in predicted.read()[section]
        if kernel in row.kernel
    ]
    assert rows
    for row in rows:
        assert all(counts.fp64 == counts.convert64 == 0 for counts in row.counts.values()), row
        assert all("FP64" not in cell for cell in predicted._cells(row.counts)), row
