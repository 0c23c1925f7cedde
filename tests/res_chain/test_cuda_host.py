"""The host code of res_chain's CUDA kernels, run on the CPU by tests/cuda_emulation/host.py: by the
1.5 x rule on devices of all sizes, with and without clusters; its checks and its launches. And
faults planted, which must be caught."""

import pytest
import torch
from cuda_emulation import at_offset, to_tf32
from cuda_emulation.host import HostError
from errors import rule
from res_chain_cases import KINDS, blocks_of, by_blocks, double, image
from sweeps import sweep

from fused_res import reference
from fused_res.ops.res_chain import Link, parameters

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# of the tests on a GPU; with fewer images
SHAPES = [(1, 32, 16, 16), (2, 64, 15, 15), (3, 24, 8, 12), (40, 16, 7, 7), (3, 13, 1, 1)]
CLUSTERS = dict(zip(SHAPES, (8, 4, 2, 1, 1), strict=True))  # blocks of one
# multiprocessors, shared memory of a block in KB, clusters
DEVICES = [(1, 48, False), (20, 99, False), (132, 163, False), (132, 227, False), (20, 227, True),
           (132, 227, True)]  # fmt: skip


def draw(shape, dtype, kind="basic", count=2):
    def of(conv):
        bias = None if conv.bias is None else conv.bias.to(dtype)
        return conv._replace(weight=conv.weight.to(dtype), bias=bias)

    blocks = [
        Link([of(conv) for conv in block.convs], block.act)
        for block in blocks_of(kind, shape[1], count)
    ]
    return image(*shape).to(dtype), blocks


def call(host, x, blocks, tf32=False):
    return host("res_chain_params", x, *parameters(blocks), tf32)


def fits(host, x, blocks):
    sizes = host.of_tensors, x.element_size(), *x.shape[1:]
    return host("res_chain_fits", *sizes, parameters(blocks).program)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sweep(SHAPES, quick=SHAPES[1:]), ids=str)
def test_error_is_within_the_rule(host, shape, dtype, kind):
    x, blocks = draw(shape, dtype, kind)
    y = call(host, x, blocks)
    assert y.stride() == x.stride()
    rule(y, by_blocks(x, blocks), by_blocks(x.double(), double(blocks)))
    assert host.kernels() == ["res_chain_fwd_pack", "res_chain_fwd"]
    assert host.launches[1].cluster == CLUSTERS[shape]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_of_all_sizes(host, dtype, device):
    """Where it fits, the launch is one that the device has, and gives the same bits."""
    x, blocks = draw((3, 16, 8, 8), dtype)
    expected = call(host, x, blocks)
    large = draw((2, 128, 64, 64), dtype, count=1)
    host.use(host.device(*device))
    found = []
    for size in ((3, 16, 8, 8), (1, 48, 28, 28), (1, 128, 16, 16)):
        pair = (x, blocks) if size[0] == 3 else draw(size, dtype, count=1)
        host.launches.clear()
        found.append(fits(host, *pair))
        host.set(runs=size[0] == 3)
        if found[-1]:
            y = call(host, *pair)
            pack, chain = host.launches
            assert chain.shared_bytes <= device[1] << 10 and chain.cluster <= 8
            assert (pack.blocks, pack.rows, chain.threads) == (8, len(pair[1]) * 2, 256)
            assert device[2] or chain.cluster == 1
            if size[0] == 3:
                assert torch.equal(y, expected)
        else:
            refused(host, "do not fit in this device's shared memory", *pair)
    assert found[0] == (device[1] > 48 or dtype != torch.float32) and not fits(host, *large)
    assert found[2] or device[1] < 227 or dtype == torch.float32


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_as_it_is_allowed(host, tf32):
    x, blocks = draw((2, 24, 8, 12), torch.float32, "single", 1)
    (conv,) = blocks[0].convs
    y = call(host, x, blocks, tf32)
    given = [Link([conv._replace(weight=to_tf32(conv.weight))])] if tf32 else blocks
    theirs = reference.conv_bn_act(to_tf32(x) if tf32 else x, given[0].convs[0], x)
    rule(y, theirs, by_blocks(x.double(), double(blocks)))


def test_places_of_tensors(host):
    """An odd address, and weights and norms of any layout and address."""
    x, blocks = draw((2, 16, 6, 6), torch.bfloat16)
    expected = call(host, x, blocks)

    def moved(conv, weight):
        wide = torch.zeros(conv.norm.weight.numel(), 3)
        wide[:, 1] = conv.norm.weight
        return conv._replace(weight=weight(conv.weight), norm=conv.norm._replace(weight=wide[:, 1]))

    for weight in (torch.Tensor.contiguous, lambda w: at_offset(w, 1),
                   lambda w: torch.cat([w, w], 3)[..., :3]):  # fmt: skip
        others = [Link([moved(c, weight) for c in b.convs], b.act) for b in blocks]
        assert torch.equal(call(host, at_offset(x, 1), others), expected)


def test_more_convolutions_than_one_launch_packs(host):
    x, blocks = draw((2, 8, 3, 3), torch.bfloat16, "single", 1)
    call(host, x, blocks * 100)
    assert [launch.rows for launch in host.launches[:3]] == [48, 48, 4]


def refused(host, message, given, blocks, **changed):
    args = [given, *parameters(blocks), False]
    names = ["x", "weights", "biases", "norms", "eps", "program"]
    for name, value in changed.items():
        args[names.index(name)] = value
    host.launches.clear()
    with pytest.raises(RuntimeError, match=message):
        host("res_chain_params", *args)
    assert not host.launches


def test_calls_that_are_refused(host):
    x, blocks = draw((2, 16, 6, 6), torch.bfloat16, "single", 1)
    weights, _, norms, _, program = parameters(blocks)
    other = host.device(20)
    ok, numbers = torch.ones(16), "size must be 1 or 3, channels 1 to 128, act 0, 1 or 2, last 0"
    for message, changed in (
        ("x must be a non-empty CUDA tensor", dict(x=x.contiguous())),
        ("x must be a non-empty CUDA tensor", dict(x=x[:0])),
        ("x must be a non-empty CUDA tensor", dict(x=host.place(x.clone(), -1))),
        ("x must be float32, bfloat16 or float16", dict(x=x.double())),
        ("x must have at most 128 channels", dict(x=image(1, 129, 2, 2))),
        ("weights must be at least one, with as many biases", dict(biases=[])),
        ("weights must be at least one, with as many biases", dict(weights=[])),
        (numbers, dict(program=[2, *program[1:]])),
        (numbers, dict(program=[3, 129, 1, 1])),
        (numbers, dict(program=[3, 16, 3, 1])),
        (numbers, dict(program=[3, 16, 1, 2])),
        ("a block must end with the channels of x", dict(program=[3, 15, 1, 1])),
        ("and have ReLUs", dict(program=[3, 16, 0, 0])),
        (r"weights must have shape \(16, 16, 3, 3\)", dict(weights=[weights[0].half()])),
        ("weights must have shape", dict(weights=[weights[0][:, :8]])),
        ("weights must have shape", dict(weights=[host.place(weights[0].clone(), other)])),
        ("norms must have a mean and a variance", dict(norms=[ok, None, None, None])),
        ("norms must have a mean and a variance", dict(norms=[None, None, ok, None])),
        ("norms must have shape", dict(norms=[ok[:15], *norms[1:]])),
        ("norms must have shape", dict(norms=[host.place(ok.clone(), other), *norms[1:]])),
        ("biases must have shape", dict(biases=[ok.half()])),
        ("the last convolution must end a block", dict(program=[3, 16, 1, 0])),
        ("do not fit in this device's shared memory", dict(x=image(1, 16, 300, 300).bfloat16())),
    ):
        refused(host, message, x, blocks, **changed)


def test_programs_that_do_not_fit(host):
    device, program = host.of_tensors, [3, 16, 1, 1]
    assert host("res_chain_fits", device, 2, 16, 8, 8, program)
    for sizes in ((2, 0, 8, 8), (2, 129, 8, 8), (2, 16, 2**16, 1), (2, 16, 1, 2**16),
                  (2, 16, 2**15, 2**15)):  # fmt: skip
        assert not host("res_chain_fits", device, *sizes, program)
    for wrong in ([], program[:3], [*program, 3], [3, 0, 1, 1], [3, 129, 1, 1]):
        assert not host("res_chain_fits", device, 2, 16, 8, 8, wrong)


def test_compiled_code_that_is_too_old(host):
    """Of sm_75 nothing fits; of sm_80 there are no clusters, whatever the device."""
    x, blocks = draw((1, 16, 16, 16), torch.bfloat16)
    host.use(host.device(ptx=75))
    assert not fits(host, x, blocks)
    refused(host, "do not fit", x, blocks)
    host.use(host.device(ptx=80))
    call(host, x, blocks)
    assert host.launches[-1].cluster == 1


@pytest.mark.parametrize("function", ["cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters",
                                      "cudaFuncGetAttributes", "cudaDeviceGetAttribute",
                                      "cudaLaunchKernelEx"])  # fmt: skip
def test_an_error_of_the_runtime(host, function):
    """Is said; a device that does not answer about its clusters has none."""
    x, blocks = draw((1, 16, 16, 16), torch.bfloat16)
    host.use(host.device(number=10 + len(function)))
    host.refuse(function, 101)
    if function == "cudaOccupancyMaxActiveClusters":
        call(host, x, blocks)
        assert host.launches[-1].cluster == 1
        return
    with pytest.raises(RuntimeError, match="CUDA error 101 in"):
        call(host, x, blocks)


@pytest.mark.parametrize("shape", [(2**23, 128, 2, 2), (2**27, 16, 1, 1)])
def test_more_than_2_to_the_31_elements(host, shape):
    host.set(runs=False, fakes=True)
    _, blocks = draw((1, *shape[1:]), torch.bfloat16, "single")
    y = call(host, host.fake(shape, True, torch.bfloat16), blocks)
    chain = host.launches[-1]
    assert tuple(y.shape) == shape and chain.blocks % 132 < 133
    assert chain.blocks * (227 << 10) * 2 > shape[0] and chain.blocks <= shape[0]
    too_many = host.fake((2**28, 8, 1, 1), True, torch.bfloat16)
    refused(host, "do not fit", too_many, draw((1, 8, 1, 1), torch.bfloat16)[1])


FAULTS = {
    "no guard": (HostError, "on device 0, tensors are on"),
    "default stream": (HostError, "is not on the current stream"),
    "no opt-in": (RuntimeError, "CUDA error 1 in"),
    "smaller grid": (AssertionError, "not finite elsewhere"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(host, fault):
    x, blocks = draw((3, 64, 12, 8), torch.bfloat16)
    host.use(host.device(clusters=False, number=2 + list(FAULTS).index(fault)))
    host.plant(fault)
    error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        rule(call(host, x, blocks), by_blocks(x, blocks), by_blocks(x.double(), double(blocks)))
