"""A whole residual block in one call each way: the op ``res_block``.

Convolutions run in cuDNN or oneDNN, or on a CPU in native kernels where these are faster
(``csrc/cpu/training_convolution.cpp``). ``bn_act`` does the rest. One call saves the host's work
between the kernels, which takes several times as long as a small kernel.
``reference.res_block`` is the specification; ``csrc/res_block.h`` runs the stages.

The forward pass saves the convolutions' outputs, the statistics, and one bit for each element of y.
The backward pass computes the activations between the convolutions again, bit by bit the same. With
``recompute="last"`` it computes the last convolution's output again too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..dispatch import first_use, training_block, training_conv
from ..dispatch.backends import asked_for, taken_by_auto
from ..dispatch.cpu_rules import whole_block_pays
from ..dispatch.training_block import Candidate
from ..reference import ACTS, Act, ConvNorm, Norm, Shortcut
from . import conv_halo, library
from .bn_act import bn_act_norms, is_nchw, laid_out

# The lists have an entry for each stage, the shortcut's last.
# parameters: the convolution's weight and bias, the BatchNorm's weight and bias.
# running: the running mean and variance.
# counters: num_batches_tracked of each BatchNorm that trains; may be empty.
# integers: the convolution's stride, padding and dilation (2 each) and groups; 1 if the BatchNorm
# trains. numbers: momentum and eps.
# shortcut: IDENTITY (the op adds x), PROJECTION (it adds the last stage's output) or NOTHING.
# act: of the last stage; a ReLU follows each other stage of the branch.
# The op returns y. With `save` it also returns the convolutions' outputs (without the branch's last
# one if `recompute`), the stats of each bn_act, and the last bn_act's mask.
# It returns an empty list, and does nothing, where x does not fit the stages.
_FWD = (
    "(Tensor x, Tensor?[] parameters, Tensor(a!)[] running, Tensor(b!)[] counters, int[] integers, "
    "float[] numbers, int shortcut, int act, bool save, bool recompute) -> Tensor[]"
)
# needs: bit 0 for x, then three bits for each stage: the convolution's weight, its bias, the
# BatchNorm. The op returns the gradients that these bits ask for, in this order. The gradient of x
# may come as two tensors, which the caller adds; an empty second one stands for dy.
_BWD = (
    "(Tensor dy, Tensor x, Tensor?[] parameters, Tensor[] saved, int[] integers, int shortcut, "
    "int act, bool recompute, int needs) -> Tensor[]"
)
PARAMETERS, INTEGERS = 4, 8
IDENTITY, PROJECTION, NOTHING = range(3)
MOST_STAGES = 20  # bits of needs
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
library.define(f"res_block_fwd{_FWD}")
library.define(f"res_block_bwd{_BWD}")
# Triton's kernels have separate ops, as in bn_act. candidates: for each stage the two numbers of
# `Candidates` in kernels/res_block.py. The gradient of x is one tensor.
for _name, _schema in (("res_block_fwd", _FWD), ("res_block_bwd", _BWD)):
    library.define(f"{_name}_triton{_schema.replace(') ->', ', int[] candidates) ->')}")
# The number of a branch's convolutions that native kernels run. sizes, for each convolution: its
# weight's shape (4), stride, padding and dilation (2 each) and groups.
library.define("training_convolutions(int[] image, int[] sizes) -> int")
_forward = torch.ops.fused_res.res_block_fwd.default
_backward = torch.ops.fused_res.res_block_bwd.default
_forward_triton = torch.ops.fused_res.res_block_fwd_triton.default
_backward_triton = torch.ops.fused_res.res_block_bwd_triton.default
_training_convolutions = torch.ops.fused_res.training_convolutions.default


@torch.library.register_fake("fused_res::res_block_fwd", lib=library)
@torch.library.register_fake("fused_res::res_block_fwd_triton", lib=library)
def _(x, parameters, running, counters, integers, numbers, shortcut, act, save, recompute,
      candidates=None):  # fmt: skip
    def convolve(stage, x):
        weight, bias = parameters[PARAMETERS * stage : PARAMETERS * stage + 2]
        n = integers[INTEGERS * stage :]
        return torch.convolution(x, weight, bias, n[:2], n[2:4], n[4:6], False, (0, 0), n[6])

    outputs, kept, z = [], [], x
    projects = shortcut == PROJECTION
    branch = len(numbers) // 2 - projects
    for stage in range(branch):
        outputs.append(convolve(stage, z))
        last = stage + 1 == branch
        z, mask, stats = torch.ops.fused_res.bn_act_fwd(
            outputs[-1], None, None, None, None, True, 0.0, 1.0, None, False, None, None, None,
            None, False, 0.0, 1.0, act if last else ACTS.index("relu"), save,
        )  # fmt: skip
        kept.append(torch.cat((stats, stats[:2])) if last and projects else stats)
    if recompute:
        outputs.pop()
    if projects:
        outputs.append(convolve(branch, x))
    return [z, *outputs, *kept, mask] if save else [z]


@torch.library.register_fake("fused_res::res_block_bwd", lib=library)
@torch.library.register_fake("fused_res::res_block_bwd_triton", lib=library)
def _(dy, x, parameters, saved, integers, shortcut, act, recompute, needs, candidates=None):
    gradients = []
    if needs & 1:
        gradients.append(torch.empty_like(x))
        if candidates is None and shortcut != NOTHING:
            passes = shortcut == IDENTITY and act != ACTS.index("relu")
            gradients.append(x.new_empty(0) if passes else torch.empty_like(x))
    for stage in range(len(parameters) // PARAMETERS):
        weight, bias, *norm = parameters[PARAMETERS * stage : PARAMETERS * (stage + 1)]
        for bit, tensors in enumerate(([weight], [bias], norm)):
            if needs >> (1 + 3 * stage + bit) & 1:
                gradients += tensors
    return [torch.empty_like(t) for t in gradients]


@torch.library.impl(library, "res_block_fwd_triton", "CompositeExplicitAutograd")
def _(
    x, parameters, running, counters, integers, numbers, shortcut, act, save, recompute, candidates
):
    from ..kernels import res_block as kernels

    call = _Call(running, counters, integers, numbers, shortcut, act, recompute, candidates)
    stages = _stages(call, parameters)
    if not _takes(x, *stages):
        return []
    if counters:
        torch._foreach_add_(counters, 1)
    by_stage = [*map(kernels.Candidates, candidates[::2], candidates[1::2])]
    block = kernels.Block(x, *stages, act, recompute, by_stage, conv_halo)
    return kernels.forward(block, save)


@torch.library.impl(library, "res_block_bwd_triton", "CompositeExplicitAutograd")
def _(dy, x, parameters, saved, integers, shortcut, act, recompute, needs, candidates):
    from ..kernels import res_block as kernels

    count = len(parameters) // PARAMETERS
    call = _Call([None] * 2 * count, [], integers, [0.0] * 2 * count, shortcut, act, recompute,
                 candidates)  # fmt: skip
    by_stage = [*map(kernels.Candidates, candidates[::2], candidates[1::2])]
    block = kernels.Block(x, *_stages(call, parameters), act, recompute, by_stage, conv_halo)
    return kernels.backward(block, dy, saved, needs)


def _takes(x: Tensor, branch: list[ConvNorm], shortcut: Shortcut) -> bool:
    """Whether the stages can run on x, by the rules of ``csrc/res_block.h``."""
    if x.dim() != 4 or x.numel() == 0:
        return False

    def after(image: tuple[int, ...], stage: ConvNorm) -> tuple[int, ...] | None:
        weight, bias, stride, padding, dilation, groups, norm = stage
        convolution, channels = (weight, bias), norm[:4]
        if weight.dim() != 4 or groups < 1 or weight.size(1) * groups != image[0]:
            return None
        if any(t is not None and (t.dtype, t.device) != (x.dtype, x.device) for t in convolution):
            return None
        image = (
            len(weight),
            *(
                (size + 2 * pad - step * (taps - 1) - 1) // each + 1 if each > 0 else 0
                for size, taps, each, pad, step in zip(
                    image[1:], weight.shape[2:], stride, padding, dilation, strict=True
                )
            ),
        )
        kinds = (x.dtype, x.dtype if x.dtype == torch.float64 else torch.float32)
        fits = all(
            t is None
            or (t.shape == image[:1] and t.device == x.device and t.dtype in kinds)
            for t in channels
        ) and (norm.weight is None) == (norm.bias is None)  # fmt: skip
        if norm.training:
            fits = fits and norm.eps > 0 and len(x) * image[1] * image[2] > 1
        return image if fits and norm.eps >= 0 and min(image) > 0 else None

    image = tuple(x.shape[1:])
    for stage in branch:
        image = after(image, stage)
        if image is None:
            return False
    if shortcut is False:
        return True
    return image == (tuple(x.shape[1:]) if shortcut is None else after(x.shape[1:], shortcut))


class _Call(NamedTuple):
    """The arguments of a call, without the tensors that may need gradients."""

    running: list[Tensor]
    counters: list[Tensor]
    integers: list[int]
    numbers: list[float]
    shortcut: int
    act: int
    recompute: bool
    candidates: list[int] | None  # None: the C++ implementation decides


def _flatten(
    branch, shortcut, act, counters, recompute, candidates
) -> tuple[_Call, list[Tensor | None]]:
    kind = PROJECTION if shortcut else NOTHING if shortcut is False else IDENTITY
    call = _Call([], counters, [], [], kind, ACTS.index(act), recompute, candidates)
    parameters = []
    for conv_weight, conv_bias, stride, padding, dilation, groups, norm in (
        (*branch, shortcut) if shortcut else branch
    ):
        running_mean, running_var, weight, bias, training, momentum, eps = norm
        parameters += (conv_weight, conv_bias, weight, bias)
        call.running.extend((running_mean, running_var))
        call.integers.extend((*stride, *padding, *dilation, groups, training))
        call.numbers.extend((momentum, eps))
    return call, parameters


def _stages(call: _Call, parameters) -> tuple[list[ConvNorm], Shortcut]:
    """The branch and the shortcut of a call: the inverse of ``_flatten``."""
    stages = []
    for i in range(len(call.numbers) // 2):
        conv_weight, conv_bias, weight, bias = parameters[PARAMETERS * i : PARAMETERS * (i + 1)]
        *sizes, groups, training = call.integers[INTEGERS * i : INTEGERS * (i + 1)]
        running = call.running[2 * i : 2 * i + 2]
        norm = Norm(*running, weight, bias, bool(training), *call.numbers[2 * i : 2 * i + 2])
        stages.append(
            ConvNorm(conv_weight, conv_bias, sizes[:2], sizes[2:4], sizes[4:], groups, norm)
        )
    if call.shortcut == PROJECTION:
        return stages[:-1], stages[-1]
    return stages, None if call.shortcut == IDENTITY else False


def _run(x, parameters, call, save) -> list[Tensor]:
    *rest, recompute, candidates = call
    if candidates is None:
        result = _in_pytorchs_terms(_forward, x, parameters, *rest, save, recompute)
    else:
        args = x, parameters, *rest, save, recompute, candidates
        result = _in_pytorchs_terms(_forward_triton, *args)
    if not result:
        raise _DoesNotFit
    return result


def _in_pytorchs_terms(op, *args):
    """Runs ``op`` and restores the type of an out-of-memory error.

    Errors inside ATen pass through the C interface as text alone (torch 2.13 and newer).
    """
    try:
        return op(*args)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def _differentiable_bwd(call, x, parameters, wanted, dy):
    """The backward pass in PyTorch's ops, for a second derivative or a batch of gradients.

    The block is computed again, on aliases: one tensor may depend on another or appear twice.
    """
    # running statistics only for the norms that read them
    trains = [t for t in call.integers[INTEGERS - 1 :: INTEGERS] for _ in range(2)]
    running = [None if t else r for t, r in zip(trains, call.running, strict=True)]
    call = call._replace(running=running)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        tensors = [None if t is None else t.view_as(t) for t in (x, *parameters)]
        y = reference.res_block(tensors[0], *_stages(call, tensors[1:]), ACTS[call.act])
    inputs = [t for t, flag in zip(tensors, wanted, strict=True) if flag]
    grads = iter(torch.autograd.grad(y, inputs, dy, create_graph=torch.is_grad_enabled()))
    return [next(grads) if flag else None for flag in wanted]


def _reads_x(call: _Call, wanted: tuple[bool, ...]) -> bool:
    """Whether the backward pass reads the values of x; ``wanted``: of the parameters."""
    stages = len(call.numbers) // 2
    again = call.recompute and stages == 1 + (call.shortcut == PROJECTION)
    of_shortcut = call.shortcut == PROJECTION and wanted[PARAMETERS * (stages - 1)]
    return wanted[0] or of_shortcut or again


class _ResBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, *parameters):
        y, *saved = _run(x, parameters, call, True)
        # As in PyTorch, a later op may overwrite x where no gradient depends on its values.
        ctx.x = None if _reads_x(call, ctx.needs_input_grad[2:]) else (x.detach(), x._version)
        ctx.save_for_backward(None if ctx.x else x, *parameters, *saved)
        ctx.call = call
        ctx.layouts = [is_nchw(t) for t in saved[: len(call.numbers) // 2 - call.recompute]]
        return y

    @staticmethod
    def backward(ctx, dy):
        call, (x, *rest) = ctx.call, ctx.saved_tensors
        count = len(call.numbers) // 2 * PARAMETERS
        parameters, saved = rest[:count], rest[count:]
        wants_x, *wants = ctx.needs_input_grad[1:]
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # grad(is_grads_batched=True)
        differentiable = batched or torch.is_grad_enabled()
        differentiable = differentiable or torch._C._are_functorch_transforms_active()
        if ctx.x:
            x, version = ctx.x
            if differentiable and x._version != version:
                raise RuntimeError("a block's input has been modified by an inplace operation, and "
                                   "is needed for a second derivative")  # fmt: skip
        if differentiable:
            return None, *_differentiable_bwd(call, x, parameters, (wants_x, *wants), dy)

        for i, nchw in enumerate(ctx.layouts):
            saved[i] = laid_out(saved[i], nchw)
        needs, bit, flags = int(wants_x), 1, []
        for i in range(0, count, PARAMETERS):
            weight, bias, norm = wants[i], wants[i + 1], wants[i + 2] or wants[i + 3]
            needs |= (weight | bias << 1 | norm << 2) << bit
            flags += (weight, bias, norm, norm)
            bit += 3
        args = dy, x, parameters, saved, call.integers, *call[4:7], needs
        if call.candidates is None:
            grads = _in_pytorchs_terms(_backward, *args)
        else:
            grads = _in_pytorchs_terms(_backward_triton, *args, call.candidates)
        of_x, of_parameters = grads[: len(grads) - sum(flags)], grads[len(grads) - sum(flags) :]
        dx = of_x[0] if wants_x else None
        if len(of_x) == 2:
            dx += of_x[1] if of_x[1].numel() else dy
        rest = iter(of_parameters)
        return None, dx, *(next(rest) if flag else None for flag in flags)


class _DoesNotFit(Exception):
    pass


def _convolves(x: Tensor, branch: list[ConvNorm]) -> bool:
    """Whether native kernels run most of a block's convolutions."""
    if (
        x.dim() != 4
        or x.dtype != torch.float32
        or not x.is_contiguous(memory_format=torch.channels_last)
        or torch.is_autocast_enabled("cpu")
        or any(c.weight.dim() != 4 for c in branch)
    ):
        return False
    sizes = []
    for c in branch:
        sizes += (*c.weight.shape, *c.stride, *c.padding, *c.dilation, c.groups)
    return 2 * _training_convolutions(x.shape, sizes) > len(branch)


def _is_seen_op_by_op() -> bool:
    """Whether the compiler, or a mode that counts or chooses ops, must see the convolutions. In
    forward-mode AD a parameter may have a tangent."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


class Eager(NamedTuple):
    """``auto`` takes PyTorch's ops for a block. final: whether later calls get the same."""

    final: bool


def _candidate(
    call: training_block.Call, name: str, named: bool, is_bare: bool
) -> Candidate | Eager | None:
    """What runs a block in one call; None where it runs stage by stage.

    Args:
        name: of a backend, or ``auto`` on a GPU.
        named: whether the user named the backend.
        is_bare: the block is one convolution and a BatchNorm with nothing after it. PyTorch may run
            that faster (``bn_act``).
    """
    if name == "auto":
        found = training_block.choose(call)
        return (
            Eager(found.final) if found.name == "eager" else training_block.CANDIDATES[found.name]
        )
    if name == "triton":
        otherwise = training_conv.ALL if named else training_conv.TIMED
        return Candidate(name, training_block.convolutions_of_triton(call, otherwise))
    pays = name != "cpu" or whole_block_pays(call.x.numel(), call.recompute, is_bare)
    return training_block.CANDIDATES[name] if pays or _convolves(call.x, call.branch) else None


def _autocast(x: Tensor, branch, shortcut, dtype: torch.dtype):
    """x, branch and shortcut with the convolutions' operands cast as autocast casts them."""

    def narrowed(stage: ConvNorm) -> ConvNorm:
        bias = None if stage.bias is None else stage.bias.to(dtype)
        return stage._replace(weight=stage.weight.to(dtype), bias=bias)

    return x.to(dtype), [*map(narrowed, branch)], narrowed(shortcut) if shortcut else shortcut


def res_block(
    x: Tensor,
    branch: list[ConvNorm],
    shortcut: Shortcut = None,
    act: Act = "relu",
    backend: str | None = None,
    recompute: str | None = None,
) -> Tensor:
    """A residual block (He et al., 2016): convolutions with BatchNorms, the shortcut added.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64, NCHW or channels_last.
        branch: convolutions with BatchNorms, one or more; a ReLU follows each but the last.
        shortcut: a convolution and BatchNorm of ``x``, added to the branch; None: ``x`` itself is
            added; False: nothing is added.
        act: ``relu`` (after the add), ``relu_before_add``, or ``none``.
        backend: auto, cpu, cuda, triton or eager; default: set by ``fused_res.backend`` or
            ``FUSED_RES_BACKEND``, else auto.
        recompute: ``last``: the backward pass computes the branch's last convolution again, and its
            output is not kept; None: it is kept. A block that runs stage by stage (inside
            ``torch.compile``, for example) always keeps it.

    Returns:
        (N, K, P, Q) of x's dtype, in the memory format of the last convolution's output.

    Raises:
        ValueError: a shape, device or value does not fit; training with one value per channel.
        TypeError: a dtype does not fit.
        RuntimeError: a convolution cannot take its input; the message is PyTorch's.
        BackendUnavailable: the backend was named and cannot run this.

    Examples:
        >>> norm = Norm(None, None, torch.ones(64), torch.zeros(64), training=True)
        >>> conv = ConvNorm(torch.randn(64, 64, 3, 3), None, (1, 1), (1, 1), (1, 1), 1, norm)
        >>> y = res_block(torch.randn(8, 64, 14, 14), [conv, conv])  # a basic block
    """
    if not branch:
        raise ValueError("branch must have at least one stage, got none")
    if act not in ACTS:
        raise ValueError(f"act={act!r} must be one of: {', '.join(ACTS)}")
    y = whole(x, branch, shortcut, act, backend, [], check_recompute(recompute))
    if isinstance(y, Tensor):
        return y
    if y is not None:
        return reference.res_block(x, branch, shortcut, act)
    return reference.res_block(x, branch, shortcut, act, partial(bn_act_norms, backend=backend))


def check_recompute(recompute: str | None) -> str | None:
    if recompute not in (None, "last"):
        raise ValueError(f"recompute={recompute!r} must be None or 'last'")
    return recompute


def whole(x, branch, shortcut, act, backend, counters, recompute=None) -> Tensor | Eager | None:
    """``res_block`` in one call. Nothing is done, and the result is ``Eager`` where PyTorch's ops
    run it, None where it must run stage by stage.

    counters: num_batches_tracked of each BatchNorm that trains, or empty; each is increased by one.

    Raises:
        BackendUnavailable: a backend was named and cannot run bn_act.
    """
    found = chosen(x, branch, shortcut, act, backend, recompute)
    return _run_as(*found[:2], counters, found.needs_grad) if isinstance(found, Chosen) else found


class Chosen(NamedTuple):
    """A block that runs in one call. ``call`` has its tensors as autocast casts them."""

    call: training_block.Call
    candidate: Candidate
    needs_grad: bool


def chosen(x, branch, shortcut, act, backend, recompute) -> Chosen | Eager | None:
    """What ``whole`` runs; nothing runs here."""
    if _is_seen_op_by_op():
        return None
    name = asked_for("bn_act", backend, x)
    is_auto = name == "auto"
    measures = is_auto and first_use.covers(x)
    if is_auto and not measures:
        name = taken_by_auto("bn_act", x)
    if name == "eager":
        return None
    device_type = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        if shortcut is None and x.dtype != dtype:
            return None  # x and the branch differ in dtype: PyTorch's rules of promotion
        stages = (*branch, shortcut) if shortcut else branch
        if any(stage.weight.dtype == torch.float64 for stage in stages):
            return None  # autocast does not cast float64
        x, branch, shortcut = _autocast(x, branch, shortcut, dtype)
    needs_grad = _needs_grad(x, (*branch, shortcut) if shortcut else branch)
    if needs_grad is None or (measures and not (needs_grad and x.dim() == 4 and x.numel())):
        return None
    call = training_block.Call(x, branch, shortcut, act, recompute is not None)
    training_block.record(call)
    is_bare = is_auto and shortcut is False and act == "none" and len(branch) == 1
    candidate = _candidate(call, name, not is_auto, is_bare)
    if not isinstance(candidate, Candidate):
        return candidate
    return Chosen(call, candidate, needs_grad)


def _needs_grad(x: Tensor, stages: Sequence[ConvNorm]) -> bool | None:
    """Whether a call with these tensors is differentiated; None where the op cannot take them."""
    # a subclass may define its own convolution
    if type(x) not in _PLAIN or len(stages) > MOST_STAGES:
        return None
    wants = x.requires_grad
    for stage in stages:
        norm = stage.norm
        if norm[0] is None or norm[1] is None:
            return None
        for t in (stage[0], stage[1], norm[2], norm[3]):
            if t is not None:
                if type(t) not in _PLAIN:
                    return None
                wants = wants or t.requires_grad
    return wants and torch.is_grad_enabled()


def _run_as(
    call: training_block.Call, candidate: Candidate, counters: list[Tensor], needs_grad: bool
) -> Tensor | None:
    """The block in one call; None where x does not fit the stages."""
    x, branch, shortcut, act, recompute = call
    candidates = None
    if candidate.backend == "triton":
        candidates = training_conv.chosen_for(x, branch, shortcut, candidate.convolutions)
    flat, parameters = _flatten(branch, shortcut, act, counters, recompute, candidates)
    try:
        if needs_grad:
            return _ResBlock.apply(flat, x, *parameters)
        return _run(x, parameters, flat, False)[0]
    except _DoesNotFit:
        return None


def _run_sample(call: training_block.Call, candidate: Candidate | None) -> Tensor:
    """A block on random tensors, by a candidate; None: in PyTorch's ops."""
    if candidate is None:
        return reference.res_block(*call[:4])
    y = _run_as(call, candidate, [], True)
    if y is None:
        raise ValueError("the input does not fit the stages")
    return y


training_block.register(_run_sample)
