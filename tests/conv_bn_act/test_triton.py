"""The Triton kernels of conv_bn_act, run by Triton's interpreter: the rule, every kernel and
configuration, tiles of several images, rounds, bounds; and that these checks catch planted
faults."""

import importlib.util
import sys
from pathlib import Path

import conv_bn_act_cases as cases
import pytest
import torch
from conv_bn_act_cases import to

from fused_res import reference
from fused_res.reference import ACTS, ConvNorm, Norm

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on a GPU here: make gpu", allow_module_level=True)

from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_traffic import Traffic

from fused_res.kernels import conv_bn_act as kernels
from fused_res.kernels import conv_tiles, launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN until it is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(float("nan")))


def stage(c, k, size, stride=1, padding=None, dilation=1, groups=1, bias=False, norm=True):
    """A convolution in float32, and a BatchNorm as training leaves it."""
    filters = torch.randn(k, c // groups, size, size) * (groups / (c * size**2)) ** 0.5
    padding = dilation * (size // 2) if padding is None else padding
    channels = Norm(torch.randn(k), torch.rand(k) + 0.2, torch.randn(k), torch.randn(k))
    return ConvNorm(
        filters.contiguous(memory_format=torch.channels_last),
        torch.randn(k) if bias else None,
        (stride, stride),
        (padding, padding),
        (dilation, dilation),
        groups,
        channels if norm else None,
    )


def image(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def assert_rule(calls, dtype, config=None):
    """Of one call, or of all that several make."""

    def run(**call):
        y = kernels.forward(**call, config=config)
        assert y.is_contiguous(memory_format=torch.channels_last)
        return y

    calls = calls if isinstance(calls, list) else [calls]
    cases.assert_rule(calls, dtype, run, config)


def launches(monkeypatch):
    """Records (kernel's name, grid, arguments by name) of what is launched."""
    found, run = [], launch.run

    def record(kernel, grid, *given, **arguments):
        found.append((kernel.fn.__name__, grid[0], arguments))
        return run(kernel, grid, *given, **arguments)

    monkeypatch.setattr(launch, "run", record)
    return found


DESCRIPTOR, POINTER = "_conv_bn_act_fwd_descriptor_kernel", "_conv_bn_act_fwd_pointer_kernel"
# Calls of either.
DESCRIBED = {
    "3x3": lambda: dict(x=image(2, 48, 9, 7), conv=stage(48, 24, 3, bias=True)),
    "residual": lambda: dict(
        x=image(3, 32, 7, 7), conv=stage(32, 40, 3), residual=image(3, 40, 7, 7)),
    "relu_before_add": lambda: dict(
        x=image(2, 32, 5, 9), conv=stage(32, 40, 3, padding=2, dilation=2),
        residual=image(2, 40, 5, 9), act="relu_before_add"),
    "stride 2": lambda: dict(
        x=image(3, 32, 10, 12), conv=stage(32, 24, 3, 2), residual=image(3, 24, 5, 6), act="none"),
    "5x5, stride 2": lambda: dict(x=image(1, 16, 8, 14), conv=stage(16, 8, 5, 2, norm=False)),
    "1x1": lambda: dict(x=image(5, 80, 3, 5), conv=stage(80, 72, 1), residual=image(5, 72, 3, 5)),
    "1x1, stride 2": lambda: dict(x=image(2, 48, 9, 7), conv=stage(48, 24, 1, 2)),
    "1x1 of a column": lambda: dict(x=image(1, 48, 1, 37), conv=stage(48, 24, 1, 2)),
    "projection": lambda: dict(
        x=image(2, 32, 4, 5), conv=stage(32, 72, 3), residual=image(2, 48, 7, 10),
        shortcut=stage(48, 72, 1, 2, bias=True)),
    "1x1 and projection": lambda: dict(
        x=image(2, 16, 4, 5), conv=stage(16, 72, 1), residual=image(2, 32, 4, 5),
        shortcut=stage(32, 72, 1), act="relu_before_add"),
    "stride 2 and projection": lambda: dict(
        x=image(2, 32, 8, 6), conv=stage(32, 16, 3, 2), residual=image(2, 64, 4, 3),
        shortcut=stage(64, 16, 1, norm=False), act="none"),
    "concat": lambda: dict(
        x=image(2, 16, 6, 5), conv=stage(16, 24, 3), residual=image(2, 8, 6, 5), concat=True),
    "rounds": lambda: dict(x=image(13, 16, 8, 8), conv=stage(16, 136, 1)),
}  # fmt: skip
GATHERED = {
    "odd channels": lambda: dict(
        x=image(3, 13, 9, 7), conv=stage(13, 11, 3, bias=True), residual=image(3, 11, 9, 7)),
    "7x7 of an image": lambda: dict(x=image(2, 3, 15, 18), conv=stage(3, 24, 7, 2)),
    "stride 2 of an odd map": lambda: dict(
        x=image(2, 32, 9, 8), conv=stage(32, 24, 3, 2), residual=image(2, 24, 5, 4), act="none"),
    "stride 3": lambda: dict(x=image(2, 16, 11, 12), conv=stage(16, 24, 3, 3, padding=0)),
    "groups": lambda: dict(
        x=image(2, 24, 5, 6), conv=stage(24, 60, 3, groups=3), residual=image(2, 60, 5, 6),
        act="relu_before_add"),
    "depthwise": lambda: dict(x=image(2, 5, 8, 9), conv=stage(5, 5, 5, 2, groups=5)),
    "projection": lambda: dict(
        x=image(3, 13, 4, 5), conv=stage(13, 11, 3), residual=image(3, 37, 7, 9),
        shortcut=stage(37, 11, 1, 2)),
    "concat": lambda: dict(
        x=image(2, 16, 6, 5), conv=stage(16, 24, 3), residual=image(2, 5, 6, 5), concat=True,
        act="none"),
}  # fmt: skip
CALLS = [(name, make, DESCRIPTOR) for name, make in DESCRIBED.items()]
CALLS += [(name, make, POINTER) for name, make in GATHERED.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "kernel"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_error_is_within_the_rule(monkeypatch, make, kernel, dtype):
    draws = 4 if dtype == torch.float32 else 1
    found = launches(monkeypatch)
    assert_rule([make() for _ in range(draws)], dtype)
    assert [name for name, *_ in found] == [kernel] * draws


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("concat", [False, True])
def test_every_act_with_and_without_concat(act, concat):
    for c in (16, 13):
        call = dict(x=image(2, c, 5, 6), conv=stage(c, c, 3), residual=image(2, c, 5, 6))
        assert_rule(call | dict(act=act, concat=concat), torch.bfloat16)


def test_every_candidate_is_right():
    """Of calls that any configuration can be for."""
    tried = set()
    for make in (DESCRIBED["residual"], DESCRIBED["projection"], GATHERED["odd channels"]):
        call = to(make(), torch.bfloat16, torch.float32)
        for config in kernels.candidates(**call):
            assert_rule(call, torch.bfloat16, config)
            tried.add((config.kind, config.M, config.BN, config.stages))
    described = [c for c in conv_tiles.CONFIGS if c.kind == "descriptor"]
    assert {(c.kind, c.M, c.BN, c.stages) for c in described} <= tried


def test_float32_that_is_not_to_be_rounded(monkeypatch):
    calls = [DESCRIBED["projection"]() for _ in range(4)]
    found = launches(monkeypatch)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_rule(calls, torch.float32)
        half = to(calls[0], torch.bfloat16, torch.float32)
        assert kernels.candidates(**half)[0].kind == "descriptor"
    assert kernels.candidates(**calls[0])[0].kind == "descriptor"
    assert {(name, named["PRECISION"]) for name, _, named in found} == {(POINTER, "ieee")}


def test_tf32_is_rounded_where_it_is_loaded_and_not_where_it_is_stored(monkeypatch):
    """As GPUs are told to, because their tensor cores would cut it off. Triton 3.6 has no such
    descriptors: see ``test_float32_in_descriptors``."""
    if "round_f32_to_tf32" not in TensorDescriptor.__dataclass_fields__:
        pytest.skip("Triton before 3.7 rounds nothing where it is loaded")
    monkeypatch.setattr(conv_tiles, "ROUND", {"round_f32_to_tf32": True})
    for name in ("projection", "stride 2 and projection"):
        call = DESCRIBED[name]()
        y = kernels.forward(**call)
        for t in (call["x"], call["residual"], call["conv"].weight, call["shortcut"].weight):
            bits = t.permute(0, 2, 3, 1).view(torch.int32)
            bits.add_(0xFFF + (bits >> 13 & 1)).bitwise_and_(
                ~0x1FFF
            )  # to the nearest, ties to even
        torch.testing.assert_close(y, reference.conv_bn_act(**call), rtol=1e-5, atol=1e-5)
        assert (y.permute(0, 2, 3, 1).view(torch.int32) & 0x1FFF).any()


def test_a_shortcut_that_is_not_pixelwise_is_a_launch_of_its_own(monkeypatch):
    call = dict(
        x=image(2, 16, 4, 5), conv=stage(16, 24, 3), residual=image(2, 16, 8, 10),
        shortcut=stage(16, 24, 3, 2))  # fmt: skip
    found = launches(monkeypatch)
    assert_rule(call, torch.bfloat16)
    assert len(found) == 2


@pytest.mark.parametrize(("n", "size"), [(9, 7), (17, 4), (8, 12)])
def test_small_maps_share_a_tile(monkeypatch, n, size):
    """So that no tile is more empty than it must be: of 12x12 pixels and of 4x4 none is."""
    found = launches(monkeypatch)
    call = dict(x=image(n, 16, size, size), conv=stage(16, 16, 3))
    call = to(call | dict(residual=call["x"]), torch.bfloat16, torch.float32)
    config = next(c for c in kernels.candidates(**call) if c.M == 128)
    assert_rule(call, torch.bfloat16, config)
    images, rows, columns = (found[0][2][name] for name in ("IMAGES", "TH", "TW"))
    assert images > 1
    if size % 4 == 0:
        assert size % rows == 0 and size % columns == 0


def test_programs_take_several_tiles(monkeypatch):
    found = launches(monkeypatch)
    assert_rule(DESCRIBED["rounds"](), torch.bfloat16)
    ((_, grid, named),) = found
    assert 2 * grid < named["tiles"]


def test_of_any_layout():
    call = DESCRIBED["residual"]()
    x, residual = call["x"], call["residual"]
    wide = torch.cat((residual, residual), 1)
    unaligned = torch.empty(x.numel() + 1)[1:].view(3, 7, 7, 32).permute(0, 3, 1, 2).copy_(x)
    strided = call["conv"]._replace(weight=call["conv"].weight.transpose(2, 3).contiguous())
    for changed in (
        dict(x=x.contiguous(), residual=wide[:, :40]),
        dict(x=x[:, :, ::2, 1:5], residual=residual[:1, :, :4, 3:].expand(3, 40, 4, 4)),
        dict(x=unaligned),
        dict(conv=strided._replace(weight=strided.weight.transpose(2, 3))),
    ):
        assert_rule(call | changed, torch.float32)


def test_empty_batches():
    for make in (DESCRIBED["residual"], GATHERED["groups"]):
        call = make()
        call |= {name: t[:0] for name, t in call.items() if isinstance(t, torch.Tensor)}
        assert kernels.forward(**call).shape == reference.conv_bn_act(**call).shape


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of infinity times 0
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_travel_as_in_pytorch(value):
    for make in (DESCRIBED["concat"], DESCRIBED["stride 2"], GATHERED["odd channels"]):
        call = make()
        call["x"][1, 2, 3, 4] = value
        ours, theirs = kernels.forward(**call), reference.conv_bn_act(**call)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


def test_nothing_derived_outlives_a_call():
    call = DESCRIBED["projection"]()
    kernels.forward(**call)
    for conv in (call["conv"], call["shortcut"]):
        for t in (conv.weight, *conv.norm[:4]):
            t.mul_(1.5)
    torch.testing.assert_close(kernels.forward(**call), reference.conv_bn_act(**call))


def test_what_cannot_be_taken_is_said():
    call = DESCRIBED["projection"]()
    assert kernels.why_not(**call) is None
    assert "float64" in kernels.why_not(**to(call, torch.float64, torch.float64))
    shortcut = call["shortcut"]._replace(norm=Norm(training=True))
    assert "training" in kernels.why_not(**call | dict(shortcut=shortcut))


@pytest.mark.parametrize(("c", "size"), [(16, 1), (16, 3), (1, 3)])
def test_grids_and_coordinates_are_within_their_limits(monkeypatch, c, size):
    """3 * 2**32 pixels."""
    found = []
    monkeypatch.setattr(launch, "run", lambda _, grid, **given: found.append((grid, given)))
    x = torch.empty(3, c, 2**15, 2**17, device="meta")
    x = x.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    filters = torch.empty(c, c, size, size, device="meta", dtype=torch.bfloat16)
    conv = ConvNorm(filters, None, (1, 1), (size // 2,) * 2, (1, 1), 1, None)
    kernels.forward(x, conv)
    ((grid, args),) = found
    assert grid[0] < 2**31
    if c == 16:
        integers = [a for a in args.values() if isinstance(a, int)]
        assert max(args["x"].shape[:-1]) < 2**31 and max(integers) < 2**31


def test_each_element_is_written_once_and_nothing_else_is_touched():
    for make in (GATHERED["odd channels"], GATHERED["groups"], GATHERED["projection"]):
        with Traffic() as traffic:
            y = kernels.forward(**make())
        assert traffic.written["_conv_bn_act_fwd_pointer_kernel"] == y.nbytes


# --- the checks can fail


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(old, new): from here on the kernels have one line changed."""

    def load(path, source):
        source = source.replace("from . ", "from fused_res.kernels ")
        path.write_text(source.replace("from .", "from fused_res.kernels."))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, planted)
        spec.loader.exec_module(planted)
        return planted

    def change(old, new):
        sources = {m: Path(m.__file__).read_text() for m in (conv_tiles, kernels)}
        assert sum(s.count(old) for s in sources.values()) == 1, f"{old!r} is in the kernels once"
        of_tiles, of_op = (source.replace(old, new) for source in sources.values())
        tiles = load(tmp_path / "planted_tiles.py", of_tiles)
        monkeypatch.setitem(sys.modules, conv_tiles.__name__, tiles)
        monkeypatch.setattr(conv_tiles.__name__, tiles)
        planted = load(tmp_path / "planted.py", of_op)
        monkeypatch.setitem(globals(), "kernels", planted)

    return change


FAULTS = {
    "a tap too far": ("3x3", "h = r * DIL_H - PAD_H", "h = r * DIL_H - PAD_H + 1"),
    "the other phase": ("stride 2", "(v & 1) * channels", "(1 - (v & 1)) * channels"),
    "no second loop": ("projection", "other = (z * scale2 + offset2).to(y.dtype)", "other = None"),
    "relu before": ("1x1 and projection", "if ACT == 2:", "if ACT == 3:"),
    "mean with the wrong sign": ("3x3", "0.0) - center * scale)", "0.0) + center * scale)"),
    "tiles left out": ("rounds", "tl.num_programs(0)):", "tl.num_programs(0) + 1):"),
    "half of the input": ("1x1", "R * S * (channels // BK)", "R * S * (channels // BK // 2 + 1)"),
    "the wrong rows": ("1x1, stride 2", "stride[0] * w * channels", "w * channels"),
    "taps mixed up": ("odd channels", "r = tap // S * DIL_H", "r = tap % S * DIL_H"),
    "the first group": ("groups", "k += group * K", "k += 0"),
}


@pytest.mark.parametrize(("name", "old", "new"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(plant, name, old, new):
    plant(old, new)
    make = DESCRIBED.get(name) or GATHERED[name]
    with pytest.raises(AssertionError):
        assert_rule(make(), torch.bfloat16)


def test_an_out_of_bounds_write_is_caught(plant):
    plant("inside = m < pixels", "inside = m <= pixels")
    call = GATHERED["odd channels"]()
    with pytest.raises(InterpreterError, match="OutOfBounds.*_fwd_pointer"), Traffic():
        kernels.forward(**call)
