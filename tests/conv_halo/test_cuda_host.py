"""The host code of conv_halo's CUDA kernel, run on the CPU by tests/cuda_emulation/host.py:
forward, statistics and gradient by the 1.5 x rule on devices of all sizes; its checks and its
launches. And faults planted, which must be caught."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conv_bn_act_cases import to
from cuda_emulation import at_offset, to_tf32
from cuda_emulation.host import HostError
from errors import rule
from res_chain_cases import image, stage
from sweeps import sweep

from fused_res import reference
from fused_res.reference import ACTS

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# input, channels out, kernel size: tiles of several images, more tiles than blocks, odd channels
SHAPES = [((3, 64, 14, 14), 64, 3), ((2, 64, 13, 11), 32, 1), ((20, 40, 7, 7), 24, 3),
          ((3, 8, 1, 1), 8, 3), ((2, 16, 41, 57), 16, 3), ((3, 13, 9, 5), 7, 3)]  # fmt: skip
DEVICES = [(1, 48), (20, 99), (132, 163), (132, 227)]  # multiprocessors, KB of a block


@pytest.fixture(autouse=True)
def few_multiprocessors(host):
    """On which blocks take several tiles."""
    host.use(host.device(8, 227))


def draw(dtype, shape, k, size=3, residual=True, act="relu", **of_stage):
    n, c, h, w = shape
    call = dict(x=image(*shape), conv=stage(c, k, size, **of_stage), act=act)
    if residual:
        call["residual"] = image(n, k, h, w)
    return to(call, dtype, torch.float32)


def arguments(x, conv, residual=None, act="relu", tf32=False):
    norm = conv.norm or (None,) * 4
    eps = conv.norm.eps if conv.norm else 0.0
    return [x, conv.weight, conv.bias, *norm[:4], eps, residual, ACTS.index(act), tf32]


def theirs(call, tf32=False):
    """PyTorch's result and the exact one."""
    given = call
    if tf32:
        conv = call["conv"]._replace(weight=to_tf32(call["conv"].weight))
        given = call | dict(x=to_tf32(call["x"]), conv=conv)
    return reference.conv_bn_act(**given), reference.conv_bn_act(
        **to(call, torch.float64, torch.float64)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k,size", SHAPES, ids=str)
def test_error_is_within_the_rule(host, shape, k, size, dtype):
    """With all that may follow, pooled: a small result can have a tiny error."""
    found = []
    for i, act in enumerate(ACTS):
        for residual, of in ((True, dict(bias=i == 1)), (False, dict(norm=i == 2))):
            call = draw(dtype, shape, k, size, residual, act, **of)
            y = host("conv_halo", *arguments(**call))
            assert y.is_contiguous(memory_format=torch.channels_last)
            found.append((y, *theirs(call)))
    rule(*(torch.cat([t.flatten() for t in of]) for of in zip(*found, strict=True)))
    assert set(host.kernels()) == {"conv_halo_fwd_bwd"}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_of_all_sizes(host, dtype, device):
    """Where it fits, the launch is one that the device has, and gives the same bits."""
    call = draw(dtype, (3, 16, 9, 10), 24)
    expected = host("conv_halo", *arguments(**call))
    host.use(host.device(*device, clusters=False))
    host.launches.clear()
    assert torch.equal(host("conv_halo", *arguments(**call)), expected)
    (launch,) = host.launches
    assert launch.blocks <= 2 * device[0] and launch.shared_bytes <= device[1] << 10
    large = draw(dtype, (2, 64, 9, 10), 64)
    fits = host("conv_halo_fits", host.of_tensors, call["x"].element_size(), 2, 9, 10, 64, 64, 3, 0)
    assert fits == (device[1] > (99 if dtype == torch.float32 else 48))
    host.launches.clear()
    if fits:
        rule(host("conv_halo", *arguments(**large)), *theirs(large))
    else:
        refused(host, "convolutions of 64 to 64 channels are too large", "conv_halo",
                *arguments(**large))  # fmt: skip


@pytest.mark.parametrize("shape,k,size", SHAPES, ids=str)
def test_float32_in_tf32(host, shape, k, size):
    call = draw(torch.float32, shape, k, size)
    rule(host("conv_halo", *arguments(**call, tf32=True)), *theirs(call, True))


def merged(partial):
    mean, m2, n = partial.double().unbind(1)
    of_all = (mean * n).sum(0) / n.sum(0)
    return of_all, (m2 + n * (mean - of_all) ** 2).sum(0) / n.sum(0), n.sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape,k,size", sweep(SHAPES, quick=SHAPES[1:5:2] + SHAPES[5:], unpack=True)
)
def test_in_training(host, shape, k, size, dtype):
    """Statistics of the output, and the input's gradient with its sums."""
    call, (n, c, h, w) = draw(dtype, shape, k, size, False, bias=True), shape
    x, conv = call["x"], call["conv"]
    y, partial = host("conv_halo_statistics", x, conv.weight, conv.bias, False)
    padding = size // 2
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=padding)
    rule(y, F.conv2d(x, conv.weight, conv.bias, padding=padding), exact)
    assert partial.shape == (host.launches[0].blocks, 3, k)
    mean, var, count = merged(partial)
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert (count == n * h * w).all()
    torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, exact_var, rtol=1e-5, atol=1e-8)

    stats = torch.rand(5, c) + 0.1
    for weight in (conv.weight, at_offset(conv.weight.contiguous(), 1)):
        dx, partial = host("conv_halo_gradient", y, weight, x, stats, False)
        centre, scale, shift = stats[2:].view(3, -1, 1, 1)
        stopped = (x.float() - centre) * scale + shift <= 0
        of = (F.conv_transpose2d(y.to(d), weight.to(d), padding=padding).masked_fill(stopped, 0)
              for d in (dtype, torch.float64))  # fmt: skip
        rule(dx, *of)
        deviation = x.double() - stats[0].view(-1, 1, 1)
        for sums, values in ((partial[:, 0], dx.double()), (partial[:, 1], dx * deviation)):
            exact, largest = values.sum((0, 2, 3)), values.abs().sum((0, 2, 3))
            assert ((sums.double().sum(0) - exact).abs() <= 1e-6 * largest).all()


def test_places_of_tensors(host):
    call = draw(torch.bfloat16, (2, 16, 6, 6), 16)
    expected, conv = host("conv_halo", *arguments(**call)), call["conv"]
    wide = torch.zeros(16, 3)
    wide[:, 1] = conv.norm.weight
    for changed in (
        dict(x=at_offset(call["x"], 1)),
        dict(residual=at_offset(call["residual"], 3)),
        dict(conv=conv._replace(weight=conv.weight.contiguous())),
        dict(conv=conv._replace(weight=at_offset(conv.weight, 1))),
        dict(conv=conv._replace(weight=torch.cat([conv.weight] * 2, 3)[..., :3])),
        dict(conv=conv._replace(norm=conv.norm._replace(weight=wide[:, 1]))),
    ):
        assert torch.equal(host("conv_halo", *arguments(**call | changed)), expected)


def refused(host, message, name, *args):
    host.launches.clear()
    with pytest.raises(RuntimeError, match=message):
        host(name, *args)
    assert not host.launches


NAMES = ("x", "weight", "bias", "mean", "var", "norm_weight", "norm_bias", "eps", "residual", "act")


def test_calls_that_are_refused(host):
    call = draw(torch.bfloat16, (2, 16, 6, 6), 24)
    args, x, weight = arguments(**call), call["x"], call["conv"].weight
    other, ok = host.device(20), torch.ones(24)
    of_map = "x must be a float32, bfloat16 or float16 CUDA tensor"
    of_weight = "weight must be of a 1x1 or 3x3 convolution"
    for message, changed in (
        ("act must be 0, 1 or 2", dict(act=3)),
        ("a norm must have a mean and a variance", dict(mean=None)),
        ("a norm must have a mean and a variance", dict(mean=None, var=None)),
        (r"bias must have shape \(24,\)", dict(bias=ok[:23])),
        ("var must have shape", dict(var=ok.double())),
        ("norm_bias must have shape", dict(norm_bias=host.place(ok.clone(), other))),
        (of_map, dict(x=x.contiguous())),
        (of_map, dict(x=x.double())),
        (of_map, dict(x=x[0])),
        (of_map, dict(x=host.place(x.clone(), -1), mean=None, var=None, norm_weight=None,
                      norm_bias=None)),
        (of_weight, dict(weight=weight[..., :2])),
        (of_weight, dict(weight=weight[:, :8])),
        (of_weight, dict(weight=weight.float())),
        (of_weight, dict(weight=torch.randn(24, 16, 5, 5).bfloat16())),
        (of_weight, dict(weight=weight.flatten(1))),
        (of_weight, dict(weight=host.place(weight.clone(), other))),
        ("residual must be a float32", dict(residual=call["residual"].contiguous())),
        ("residual must have x's shape", dict(residual=x)),
        ("residual must have x's shape", dict(residual=call["residual"].half())),
    ):  # fmt: skip
        given = list(args)
        for name, value in changed.items():
            given[NAMES.index(name)] = value
        refused(host, message, "conv_halo", *given)
    wide = draw(torch.bfloat16, (1, 65, 3, 3), 24, residual=False)
    refused(
        host, "convolutions of 65 to 24 channels are too large", "conv_halo", *arguments(**wide)
    )
    y, stats = call["residual"], torch.rand(5, 16)
    for wrong in (stats[:4], stats[:, :15], stats.double(), torch.rand(16, 5).T,
                  host.place(stats.clone(), other)):  # fmt: skip
        refused(host, r"stats must be of bn_act: float32 of shape \(5, 16\)", "conv_halo_gradient",
                y, weight, x, wrong, False)  # fmt: skip


def test_sizes_of_0(host):
    """Nothing is launched."""
    call = draw(torch.bfloat16, (2, 16, 6, 6), 24)
    x, weight = call["x"][:0], call["conv"].weight
    empty = call | dict(x=x, residual=call["residual"][:0])
    assert host("conv_halo", *arguments(**empty)).shape == (0, 24, 6, 6)
    y, partial = host("conv_halo_statistics", x, weight, None, False)
    assert y.numel() == 0 and partial.shape == (0, 3, 24)
    dx, partial = host("conv_halo_gradient", y, weight, x, torch.rand(5, 16), False)
    assert dx.shape == x.shape and partial.shape == (0, 2, 16)
    flat = image(2, 16, 0, 6).bfloat16()
    assert host("conv_halo_statistics", flat, weight, None, False)[0].shape == (2, 24, 0, 6)
    assert not host.launches


@pytest.mark.parametrize("shape", [(2**26, 64, 1, 1), (1, 64, 2**15, 2**11), (700, 64, 300, 300)])
@pytest.mark.parametrize("size", [1, 3])
def test_more_than_2_to_the_31_elements(host, shape, size):
    host.set(runs=False, fakes=True)
    weight = torch.randn(64, 64, size, size).bfloat16()
    y, partial = host(
        "conv_halo_statistics", host.fake(shape, True, torch.bfloat16), weight, None, False
    )
    assert tuple(y.shape) == shape and partial.size(0) == host.launches[0].blocks
    assert host.launches[0].blocks in (8, 16)
    more = host.fake((2**31, 8, 1, 1), True, torch.bfloat16)  # whose pixels an int cannot count
    refused(host, "are too large", "conv_halo_statistics", more, weight[:, :8], None, False)


@pytest.mark.parametrize(
    "function", ["cudaFuncSetAttribute", "cudaFuncGetAttributes", "cudaDeviceGetAttribute",
                 "cudaLaunchKernelEx", "cudaGetDevice"]
)  # fmt: skip
def test_an_error_of_the_runtime_is_said(host, function):
    host.use(host.device(number=10 + len(function)))
    host.refuse(function, 101)
    call = draw(torch.bfloat16, (2, 16, 6, 6), 24)
    with pytest.raises(RuntimeError, match="CUDA error 101 in"):
        host("conv_halo", *arguments(**call))


def test_compiled_code_that_is_too_old(host):
    host.use(host.device(ptx=75))
    assert not host("conv_halo_fits", host.of_tensors, 2, 2, 9, 10, 8, 8, 3, 0)
    with pytest.raises(RuntimeError):  # a number of no device
        host("conv_halo_fits", 10**6, 2, 2, 9, 10, 8, 8, 3, 0)


FAULTS = {
    "no guard": (HostError, "on device 0, tensors are on"),
    "default stream": (HostError, "is not on the current stream"),
    "no opt-in": (RuntimeError, "CUDA error 1 in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(host, fault):
    call = draw(torch.bfloat16, (3, 64, 14, 14), 64)
    host.use(host.device(number=1 + [*FAULTS].index(fault)))
    host.plant(fault)
    error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        rule(host("conv_halo", *arguments(**call)), *theirs(call))


def test_a_planted_grid_that_is_too_small(host):
    """Blocks take the tiles in turn, so y is right; some sums are missing."""
    call = draw(torch.bfloat16, (3, 16, 14, 14), 24)
    host.plant("smaller grid")
    _, partial = host("conv_halo_statistics", call["x"], call["conv"].weight, None, False)
    assert partial[:-1].isfinite().all() and not partial[-1].isfinite().any()


@pytest.mark.parametrize("kilobytes", [99, 163, 227])  # of sm_86 and sm_89, sm_80, sm_90 and later
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_fits_runs(host, dtype, kilobytes):
    """The sums of training's epilogues take shared memory too."""
    host.set(runs=False, fakes=True)
    host.use(host.device(84, kilobytes))
    answers = set()
    for c, k, side, size in itertools.product(*[(16, 32, 48, 64)] * 2, (1, 7, 28, 200), (1, 3)):
        bytes_of = torch.finfo(dtype).bits // 8
        x, y = (host.fake((8, n, side, side), True, dtype) for n in (c, k))
        weight = torch.zeros(k, c, size, size, dtype=dtype)
        calls = (
            (c, k, ("conv_halo", x, weight, *[None] * 5, 0.0, y, 1, False)),
            (c, k, ("conv_halo_statistics", x, weight, None, False)),
            (k, c, ("conv_halo_gradient", y, weight, x, torch.zeros(5, c), False)),
        )
        for epilogue, (first, second, call) in enumerate(calls):
            sizes = host.of_tensors, bytes_of, 8, side, side, first, second, size
            answers.add(host("conv_halo_fits", *sizes, epilogue))
            if host("conv_halo_fits", *sizes, epilogue):
                host(*call)
            else:
                refused(host, "are too large", *call)
    assert answers == ({True, False} if dtype == torch.float32 and kilobytes < 227 else {True})
    refused(host, "epilogue must be", "conv_halo_fits", 1, 2, 8, 8, 8, 16, 16, 3, 3)
