"""The CUDA kernel of chains of residual blocks, run on the CPU by tests/cuda_emulation: against
fp64 by the 1.5 x rule, bit by bit under shuffled thread orders, within bounds, without bank
conflicts. And faults planted in it, which these checks must catch."""

import os
import shutil

import pytest
import torch
from cuda_emulation import EmulationError, at_offset
from cuda_emulation.res_chain import CLUSTERS, LARGE, SMALL, ChainDevice, ChainEmulation
from cuda_emulation.res_chain import KINDS as PRODUCTS
from errors import rule
from res_chain_cases import KINDS, blocks_of, by_blocks, double, image, stage
from sweeps import sweep

from fused_res import BackendUnavailable, reference
from fused_res.ops.res_chain import Link, parameters, res_chain
from fused_res.reference import ACTS

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]
DTYPES = dict(
    zip(PRODUCTS, (torch.bfloat16, torch.float16, torch.float32, torch.float32), strict=True)
)


def wide(c):
    k = 72 if c > 64 else c + 8
    return [stage(c, k, 1), stage(k, k, 3, bias=True), stage(k, c, 1, norm=False)]


BLOCKS = {**KINDS, "wide": wide}


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    emulation = ChainEmulation(tmp_path_factory.mktemp("emulation"), COMPILER)
    emulation.count_requests(True)
    return emulation


@pytest.fixture(autouse=True)
def defaults(emulation):
    emulation.device, emulation.tf32, emulation.seed = LARGE, False, 0


def cast(blocks, dtype):
    """Weights and biases in ``dtype``, BatchNorms in float32."""

    def of(conv):
        bias = None if conv.bias is None else conv.bias.to(dtype)
        return conv._replace(weight=conv.weight.to(dtype), bias=bias)

    return [Link([of(conv) for conv in block.convs], block.act) for block in blocks]


def draw(products, shape, kind="single", count=2, act="relu"):
    """x and blocks."""
    dtype = DTYPES[products]
    blocks = [Link(BLOCKS[kind](shape[1]), act) for _ in range(count)]
    return image(*shape).to(dtype), cast(blocks, dtype)


def to_tf32(t):
    bits = t.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def in_tf32(x, blocks):
    """In PyTorch's ops, as its convolutions on a GPU take float32 where TF32 is allowed."""
    for block in blocks:
        z = x
        for i, conv in enumerate(block.convs):
            last = i + 1 == len(block.convs)
            rounded = conv._replace(weight=to_tf32(conv.weight))
            end = (x, None, False, block.act) if last else ()
            z = reference.conv_bn_act(to_tf32(z), rounded, *end)
        x = z
    return x


def check(emulation, products, x, blocks):
    emulation.tf32 = products == "tf32"
    y = emulation(x, blocks)
    theirs = (in_tf32 if emulation.tf32 else by_blocks)(x, blocks)
    rule(y, theirs, by_blocks(x.double(), double(blocks)))
    assert not emulation.bank_conflicts()
    return y


SHAPES = [(2, 8, 15, 15), (3, 16, 7, 7), (3, 24, 8, 12), (2, 40, 7, 7), (1, 32, 16, 16),
          (1, 64, 8, 16), (1, 100, 8, 12), (1, 128, 7, 7), (40, 16, 1, 1),
          (2, 13, 3, 9)]  # fmt: skip


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_within_the_rule(emulation, shape, kind, products):
    act = ACTS[(shape[1] // 8 + PRODUCTS.index(products)) % 3]
    check(emulation, products, *draw(products, shape, kind, 2, act))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("act", ACTS)
def test_what_follows_a_block(emulation, act, products):
    x, blocks = draw(products, (2, 16, 6, 6), "single", 1, act)
    _, others = draw(products, (2, 16, 6, 6), "bottleneck", 1, act)
    check(emulation, products, x, blocks + others + blocks + others)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_hundred_blocks(emulation, products):
    x, blocks = draw(products, (3, 8, 5, 5), "single", 100, "relu_before_add")
    blocks = [Link([b.convs[0]._replace(weight=b.convs[0].weight * 0.2)], b.act) for b in blocks]
    check(emulation, products, x, blocks)


@pytest.mark.parametrize("products", PRODUCTS)
def test_groups_of_images_that_do_not_come_out_even(emulation, products):
    for shape, kind in (((7, 24, 9, 7), "basic"), ((11, 16, 7, 7), "bottleneck")):
        x, blocks = draw(products, shape, kind)
        emulation.device = SMALL
        plan = emulation.plan(x, blocks)
        assert 1 < plan.group < len(x) and len(x) % plan.group
        y = check(emulation, products, x, blocks)
        emulation.device = LARGE  # there a block has one image
        assert torch.equal(emulation(x, blocks), y)


@pytest.mark.parametrize("products", PRODUCTS)
def test_more_pixels_than_the_warps_hold(emulation, products):
    x, blocks = draw(products, (1, 8, 32, 32), "basic", 1)
    emulation.tf32 = products == "tf32"
    plan = emulation.plan(x, blocks)
    assert plan.rows == (2 if products == "exact" else 4)
    check(emulation, products, x, blocks)
    # the weights of two convolutions, for each pass of 8 warps with some tiles of 16 pixels
    read, _ = emulation.counts()["res_chain", "workspace"]
    assert read == 32 * 32 / (8 * plan.rows * 16) * plan.packed_bytes + 2 * 16


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", ["single", "basic", "bottleneck"])
def test_blocks_of_a_cluster_share_an_image(emulation, kind, products):
    for shape, cluster in (((2, 16, 16, 16), 8), ((3, 24, 13, 9), 4), ((1, 12, 3, 40), 2)):
        x, blocks = draw(products, shape, kind)
        alone = check(emulation, products, x, blocks)
        emulation.device = CLUSTERS
        assert emulation.plan(x, blocks).cluster == cluster
        for emulation.seed in range(3):
            assert torch.equal(emulation(x, blocks), alone)
        assert not emulation.bank_conflicts()
        read, _ = emulation.counts()["res_chain", "x"]
        rows = 2 * (cluster - 1) * x[:, :, 0].numel()  # that two blocks need
        assert read == (x.numel() + rows) * x.element_size()
        emulation.device = LARGE


def test_an_image_that_fits_only_a_cluster(emulation):
    x, blocks = draw("exact", (150, 64, 20, 20), "single", 1)
    assert emulation.plan(x, blocks) is None
    emulation.device = CLUSTERS
    assert emulation.plan(x, blocks).cluster == 2
    check(emulation, "exact", x[:1], blocks)


def test_plans(emulation):
    x, blocks = draw("bf16", (1, 32, 16, 16), "basic", 50)

    def plan(images, multiprocessors=132, kilobytes=227):
        emulation.device = ChainDevice(multiprocessors, kilobytes << 10, False)
        return emulation.plan(x.expand(images, -1, -1, -1), blocks)

    # a block an image until each multiprocessor has one; then as few waves as memory allows
    assert [plan(n).group for n in (1, 132, 133, 264, 265, 396, 397, 1000)] == [
        1, 1, 2, 2, 3, 3, 2, 3]  # fmt: skip
    assert plan(1000, 132, 163).group == 2 and plan(1000, 108, 99).group == 1
    assert all(plan(n, 132, 163).shared_bytes <= 163 << 10 for n in (1, 500, 5000))
    assert plan(1, 132, 64) is None
    emulation.device = CLUSTERS
    clusters = [
        emulation.plan(x.expand(n, -1, -1, -1), blocks).cluster for n in (1, 16, 17, 66, 67)
    ]
    assert clusters == [8, 8, 4, 2, 1]
    emulation.device = LARGE
    wide = draw("exact", (1, 128, 16, 16), "single", 1)
    assert emulation.plan(*wide) is None
    assert emulation.plan(*draw("bf16", (1, 8, 200, 200))) is None


@pytest.mark.parametrize("products", PRODUCTS)
def test_bitwise_the_same_for_any_order_of_threads(emulation, products):
    emulation.device, emulation.tf32 = SMALL, products == "tf32"
    x, blocks = draw(products, (3, 40, 7, 7), "bottleneck")
    first, *others = (emulation(x, blocks) for emulation.seed in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_tied_weights_are_packed_once(emulation):
    x, (block,) = draw("bf16", (2, 16, 7, 7), "basic", 1)
    copy = Link([c._replace(weight=c.weight.clone()) for c in block.convs], block.act)
    tied, untied = (emulation.plan(x, blocks) for blocks in ([block] * 5, [block, copy]))
    assert 2 * tied.packed_bytes == untied.packed_bytes
    assert torch.equal(check(emulation, "bf16", x, [block] * 2), emulation(x, [block, copy]))


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_tensor_crosses_memory_once(emulation, products):
    """And weights of any layout are packed alike."""
    x, blocks = draw(products, (5, 24, 6, 6), "basic")
    y = check(emulation, products, x, blocks)
    size = x.numel() * x.element_size()
    counts = emulation.counts()
    assert counts["res_chain", "x"] == (size, 0) and counts["res_chain", "y"] == (0, size)
    packed = emulation.plan(x, blocks).packed_bytes
    read, written = counts["res_chain", "workspace"]
    assert (read, written) == (5 * (packed + 4 * 16), 0)
    plain = [
        Link([c._replace(weight=c.weight.contiguous()) for c in b.convs], b.act) for b in blocks
    ]
    assert torch.equal(emulation(x, plain), y)


@pytest.mark.parametrize("products", PRODUCTS)
def test_addresses_that_are_not_aligned(emulation, products):
    x, blocks = draw(products, (2, 16, 6, 6))
    check(emulation, products, at_offset(x, 1), blocks)


def test_half_precision_norms(emulation):
    for products in ("bf16", "fp16"):
        x, blocks = draw(products, (2, 16, 6, 6), "basic")

        def norms(dtype, blocks=blocks, half=x.dtype):
            return [
                Link([c._replace(norm=c.norm._replace(**{
                    name: getattr(c.norm, name).to(half).to(dtype)
                    for name in ("running_mean", "running_var", "weight", "bias")
                })) for c in b.convs], b.act)
                for b in blocks
            ]  # fmt: skip

        assert torch.equal(emulation(x, norms(x.dtype)), emulation(x, norms(torch.float32)))


@pytest.mark.parametrize("products", PRODUCTS)
def test_not_finite_values_go_where_they_go_in_pytorch(emulation, products):
    """Also where channels are padded to 16."""
    x, blocks = draw(products, (2, 12, 6, 6), "basic")
    x[1, 3, 2, 2], x[1, 5, 4, 4] = float("nan"), float("inf")
    emulation.tf32 = products == "tf32"
    y, expected = emulation(x, blocks), by_blocks(x, blocks)
    assert torch.equal(y.isfinite(), expected.isfinite()) and y[0].isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan())


# --- faults, planted


FAULTS = ["WRONG_TAP", "WRONG_FRAGMENT", "EVEN_PITCH"]


@pytest.mark.parametrize("fault", sweep(FAULTS, quick=["WRONG_FRAGMENT"]))
def test_a_fault_is_caught(tmp_path, fault):
    broken = ChainEmulation(tmp_path, COMPILER, (f"-DPLANT_{fault}",))
    x, blocks = draw("bf16", (1, 32, 8, 8), "basic")
    with pytest.raises(AssertionError):
        check(broken, "bf16", x, blocks)


MISSING = {
    "CHUNK_SYNC": "race: .* shared memory",
    "WAIT": "race: .* with a copy that was not waited for",
    "WARP_SYNC": "lanes that went different ways",
    "CLUSTER_BARRIER": "another block.s shared memory before it may have started",
}


@pytest.mark.parametrize("what", sweep(MISSING, quick=["CHUNK_SYNC", "CLUSTER_BARRIER"]))
def test_what_is_not_waited_for_is_caught_in_any_order(tmp_path, what):
    broken = ChainEmulation(tmp_path, COMPILER, (f"-DPLANT_MISSING_{what}",))
    broken.device = CLUSTERS
    shape = (1, 32, 8, 8) if what == "CLUSTER_BARRIER" else (1, 24, 8, 7)
    x, blocks = draw("bf16", shape, "basic")
    for broken.seed in range(20):
        with pytest.raises(EmulationError, match=f"res_chain: {MISSING[what]}"):
            broken(x, blocks)


@pytest.mark.parametrize("access", ["load", "store"])
def test_an_access_out_of_bounds_is_caught(emulation, access):
    """Of tensors shorter than the call says."""
    x, blocks = draw("bf16", (2, 16, 6, 6))
    last = emulation._pointer

    def shorter(name, t, written=False):
        wrong = t is not None and name == {"load": "x", "store": "y"}[access]
        return last(name, t[:1] if wrong else t, written)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EmulationError) as caught:
        patch.setattr(emulation, "_pointer", shorter)
        emulation(x, blocks)
    assert f"res_chain: {access} out of bounds" in str(caught.value)


# --- the op


def test_parameters_are_passed_as_they_are():
    blocks = blocks_of("basic", 16, 1) + blocks_of("no norm", 16, 1, "relu_before_add")
    given = parameters(blocks)
    convs = [conv for block in blocks for conv in block.convs]
    assert all(a is b.weight for a, b in zip(given.weights, convs, strict=True))
    assert given.norms[0] is convs[0].norm.running_mean and given.norms[8:] == [None] * 4
    assert given.eps == [1e-5, 1e-5, 0.0]
    assert given.program == [3, 16, 1, 0, 3, 16, 1, 1, 3, 16, 2, 1]
    x = image(2, 16, 6, 6).to("meta")
    y = torch.ops.fused_res.res_chain_params(x, *given, False)
    assert y.shape == x.shape and y.stride() == x.stride()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_that_is_named_does_not_fall_back():
    with pytest.raises(BackendUnavailable):
        res_chain(image(2, 16, 6, 6), blocks_of("single", 16, 1), "cuda")
