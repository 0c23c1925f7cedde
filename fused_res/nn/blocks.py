"""Residual blocks whose BatchNorm, add and ReLU run fused: ``FusedResBlock`` and what ``fuse_``
makes.

A block keeps ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` children under their own names. A
``BlockPlan`` says in which order they act; ``run_block`` follows it in one op where its children
are nothing but convolutions and BatchNorms, else with one op per normalisation.
"""

from __future__ import annotations

import functools
import operator
import types
import warnings
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..dispatch import inference_conv
from ..env import BACKENDS
from ..ops.bn_act import bn_act_norms
from ..ops.conv_bn_act import (
    Call,
    Run,
    conv_bn_act,
    fuses_convolutions,
    out_shape,
    prepared,
    under_modes,
)
from ..ops.convolutions import Convolutions, joined
from ..ops.res_block import check_recompute, whole
from ..ops.sync_bn_act import sync_bn_act
from ..reference import Act, ConvNorm, Norm
from ..run.description import NORMS, has_hooks
from ..run.guards import Record, guard_of, holds_compiled
from ..run.reads import Reads
from ..run.weight_cache import fingerprint

_FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_WITH_ACT = {("timm.layers.norm_act", name) for name in ("BatchNormAct2d", "FrozenBatchNormAct2d")}


def _known_as(module: nn.Module | None) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_norm_act(module: nn.Module | None) -> bool:
    """Whether it is timm's BatchNorm, which calls its children ``drop`` and ``act`` afterwards."""
    return _known_as(module) in _WITH_ACT


def is_frozen(module: nn.Module | None) -> bool:
    """Whether it is a BatchNorm of constants: all four of its tensors are buffers."""
    return _known_as(module) in _FROZEN


def is_norm(module: nn.Module | None) -> bool:
    """Whether it is a BatchNorm that we know."""
    return type(module) in NORMS or is_norm_act(module) or is_frozen(module)


def has_frozen(block: nn.Module) -> bool:
    return any(map(is_frozen, block.modules()))


def uses_batch(bn: nn.Module) -> bool:
    """Whether it normalises by the statistics of its input."""
    return not is_frozen(bn) and (bn.training or bn.running_mean is None)


class Stage(NamedTuple):
    """Children called in turn, by dotted name: ``before`` (dropout, pooling), a convolution, a
    norm."""

    conv: str | None
    norm: str | None
    relu: bool = False
    before: tuple[str, ...] = ()


class BlockPlan(NamedTuple):
    """A residual block, or a part of one, in normal form.

    branch: what the block adds to its shortcut. ``relu`` of the last stage: before the add.
    shortcut: None for the input itself.
    skip: ``add``, ``concat`` of (input, branch), or ``none``.
    relu: whether a ReLU follows the add.
    frozen: whether it has norms of constants, which promote what is not of their dtype.
    into: what the add is written into, whose dtype and shape stay: ``branch`` or ``shortcut``.
    record: all that the block's forward read when the plan was made; None: of a part.
    """

    branch: tuple[Stage, ...]
    shortcut: Stage | None
    skip: str
    relu: bool
    frozen: bool = False
    into: str = ""
    record: Record | None = None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        if self.record is None:
            return BlockPlan, tuple(self)
        return Unplanned, (self.record.opaque,)


class Unplanned(NamedTuple):
    """What a pickle has in place of a plan: where it is read the code may be another, so the
    forward is looked at anew. Until then it is the block's own."""

    opaque: frozenset[str]
    record = None
    inputs = 0
    skip = ""


def child(module: nn.Module, path: str) -> nn.Module:
    """A child by dotted name."""
    if path in module._modules:
        return module._modules[path]
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def is_exported() -> bool:
    """Whether a graph for elsewhere is being made (torch.export, ONNX, TorchScript): it gets the
    modules' own ops."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def group_of(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes that share their statistics in ``bn.forward``; None: it is a BatchNorm2d's."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def norm_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> Norm:
    """What ``bn.forward`` would pass to ``F.batch_norm``; counts the batch as it would."""
    if is_frozen(bn):
        return Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked)
    tracked = not bn.training or bn.track_running_stats
    bias = bn.bias
    if bias is None and bn.weight is not None:  # BatchNorm2d(..., bias=False)
        bias = torch.zeros_like(bn.weight, requires_grad=False)
    weight = bn.weight
    if weight is None and bias is not None:
        weight = torch.ones_like(bias, requires_grad=False)
    return Norm(
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        weight,
        bias,
        bn.training or (bn.running_mean is None and bn.running_var is None),
        momentum,
        bn.eps,
    )


def _convolve(block: nn.Module, stage: Stage, x: Tensor) -> Tensor:
    for name in stage.before:
        x = child(block, name)(x)
    return x if stage.conv is None else child(block, stage.conv)(x)


def _normalise(
    block: nn.Module,
    stage: Stage,
    x: Tensor,
    residual: Tensor | None = None,
    shortcut: Stage | None = None,
    act: Act | None = None,
) -> Tensor:
    """The norm of ``stage``, of ``x``, and that of ``shortcut``, of ``residual``, if they have
    them."""
    if act is None:
        act = "relu" if stage.relu else "none"
    if stage.norm is None:
        return F.relu(x) if act == "relu" else x
    if x.dim() != 4:  # before a batch is counted
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    bn, second = child(block, stage.norm), None
    group = group_of(bn)
    if shortcut is not None and shortcut.norm is not None:
        second = child(block, shortcut.norm)
        if group_of(second) is not group:
            residual, second = _normalise(block, shortcut, residual), None
    norms = norm_of(bn), None if second is None else norm_of(second)
    if group is None:
        return bn_act_norms(x, norms[0], residual, norms[1], act, block.backend)
    return sync_bn_act(x, norms[0], group, residual, norms[1], act, block.backend)


def _stage_of_whole(block: nn.Module, stage: Stage) -> tuple[ConvNorm, Tensor | None] | None:
    """A stage as ``res_block`` takes it, and what counts its batches; None where that would not do
    the same.

    Looks into the modules' dictionaries: their attributes cost more than the kernels of a small
    block.
    """
    if stage.before or stage.conv is None or stage.norm is None:
        return None
    conv, bn = child(block, stage.conv), child(block, stage.norm)
    frozen = is_frozen(bn)
    if (
        conv.padding_mode != "zeros"
        or (not frozen and bn.momentum is None)  # a count that is on the device
        or group_of(bn) is not None
    ):
        return None
    kernel, affine, state = conv._parameters, bn._parameters, bn._buffers
    if frozen:
        affine = state = {"num_batches_tracked": None, **state}
    try:
        weight, bias = kernel["weight"], kernel["bias"]
        gamma, beta, counter = affine["weight"], affine["bias"], state["num_batches_tracked"]
        mean, var = state["running_mean"], state["running_var"]
    except KeyError:  # some are plain attributes, or gone
        return None
    sizes = conv.stride, conv.padding, conv.dilation
    for size in sizes:
        if type(size) is not tuple or len(size) != 2:
            if isinstance(conv.padding, str):
                return None
            sizes = tuple(map(_pair, sizes))
            break
    if (gamma is None) != (beta is None):
        return None
    training = not frozen and (bn.training or mean is None)
    if training and (not bn.track_running_stats or counter is None):
        return None
    momentum = 0.0 if frozen else bn.momentum
    norm = Norm(mean, var, gamma, beta, training, momentum, bn.eps)
    found = ConvNorm(weight, bias, *sizes, conv.groups, norm)
    return found, counter if training else None


def _run_whole(block: nn.Module, plan: BlockPlan, act: Act, x: Tensor) -> Tensor | None:
    """``run_block(block, plan, x)`` in one op; None where it must be run stage by stage."""
    if torch.compiler.is_compiling() or plan.skip == "concat":
        return None
    stages = []
    for stage in plan.branch if plan.shortcut is None else (*plan.branch, plan.shortcut):
        found = _stage_of_whole(block, stage)
        if found is None:
            return None
        stages.append(found)
    if not all(stage.relu for stage in plan.branch[:-1]):
        return None
    shortcut = None if plan.skip == "add" else False
    if plan.shortcut is not None:
        shortcut = stages[-1][0]
    branch = [stage for stage, _ in stages[: len(plan.branch)]]
    counters = [counter for _, counter in stages if counter is not None]
    return whole(x, branch, shortcut, act, block.backend, counters, block.recompute)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as ``F.conv2d`` takes it: a number, or one or two of them."""
    first, *rest = (size,) if isinstance(size, int) else size
    return (first, *rest) if rest else (first, first)


def _overridden(conv: nn.Module) -> bool:
    return "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__


def conv_norm_of(conv: nn.Module, bn: nn.Module | None) -> ConvNorm | None:
    """A convolution and what follows it as ``conv_bn_act`` takes them; None where it does not."""
    if (
        type(conv) is not nn.Conv2d
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or has_hooks(conv)
        or (not torch.compiler.is_compiling() and _overridden(conv))
    ):
        return None
    norm = None if bn is None else norm_of(bn)
    sizes = map(_pair, (conv.stride, conv.padding, conv.dilation))
    return ConvNorm(conv.weight, conv.bias, *sizes, conv.groups, norm)


class _Part(NamedTuple):
    """A convolution or BatchNorm of a block, by what its result depends on beside what the block's
    guard compares; not the module itself, which may lead back to the block."""

    path: tuple[str, ...]
    settings: Callable[[dict], tuple]
    values: tuple  # of the settings
    tensors: tuple[tuple[str, tuple[str, str], tuple[Tensor | None, Tensor | None]], ...]

    def is_in(self, block: nn.Module) -> bool:
        own = block.__dict__
        try:
            for name in self.path:
                own = own["_modules"][name].__dict__
            if self.settings(own) != self.values:
                return False
            for part, (first, second), (a, b) in self.tensors:
                of = own[part]
                if of[first] is not a or of[second] is not b:
                    return False
        except KeyError:  # one is no longer there
            return False
        return True


class _Source(NamedTuple):
    """What a block for inference is made from."""

    branch: tuple[Stage, ...]  # of the plan, which may lead back to the block
    backend: str | None
    parts: tuple[_Part, ...]
    tensors: list[Tensor]
    fingerprint: tuple

    def holds(self, block: nn.Module, plan: BlockPlan) -> bool:
        return (
            self.branch is plan.branch
            and self.backend == block.backend
            and all([part.is_in(block) for part in self.parts])
            and fingerprint(self.tensors) == self.fingerprint
        )


class _Prepared(NamedTuple):
    """A block for inference on inputs of one size, and what it was made from: looking all of that
    up again costs more than a small kernel."""

    source: _Source
    steps: list[Run]

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        for step in self.steps[:-1]:
            x = step(x, None)
        return self.steps[-1](x, residual)


# block -> id of a plan -> sizes
_prepared: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, _Prepared]]] = WeakKeyDictionary()
MOST_SIZES = 4  # of a block's inputs, for each of its plans
_SETTINGS = "stride", "padding", "dilation", "groups", "padding_mode", "training", "eps"


def _part_of(module: nn.Module, path: str, running: bool) -> _Part | None:
    """None where it has plain attributes for parameters, say."""
    own = module.__dict__
    names = [("_buffers" if is_frozen(module) else "_parameters", ("weight", "bias"))]
    if running:
        names.append(("_buffers", ("running_mean", "running_var")))
    if not all(own[part].keys() >= set(pair) for part, pair in names):
        return None
    tensors = tuple((part, pair, tuple(map(own[part].get, pair))) for part, pair in names)
    settings = itemgetter(*(name for name in _SETTINGS if name in own))
    return _Part(tuple(path.split(".")), settings, settings(own), tensors)


def _source_of(block: nn.Module, plan: BlockPlan) -> _Source | None:
    """As a block is now; None where one of its tensors can change unseen."""
    stages = plan.branch if plan.shortcut is None else (*plan.branch, plan.shortcut)
    if any(stage.before for stage in stages):
        return None
    paths = [(s.conv, False) for s in stages if s.conv is not None]
    paths += [(s.norm, True) for s in stages if s.norm is not None]
    parts = [_part_of(child(block, path), path, running) for path, running in paths]
    tensors = _tensors_of(parts)
    if tensors is None:
        return None
    return _Source(plan.branch, block.backend, tuple(parts), tensors, fingerprint(tensors))


def _tensors_of(parts: list[_Part | None]) -> list[Tensor] | None:
    """None where one can change unseen."""
    if None in parts:
        return None
    tensors = [t for p in parts for *_, pair in p.tensors for t in pair if t is not None]
    return None if any(t.is_inference() for t in tensors) else tensors


def tensors_of(conv: nn.Module, bn: nn.Module | None) -> list[Tensor] | None:
    """The tensors of a convolution and a BatchNorm; None where one can change unseen."""
    norm = [] if bn is None else [_part_of(bn, "", True)]
    return _tensors_of([_part_of(conv, "", False), *norm])


def _key(x: Tensor, residual: Tensor | None = None) -> tuple:
    other = None if residual is None else (residual.shape, residual.stride(), residual.dtype)
    return x.shape, x.stride(), x.dtype, other, torch.get_num_threads(), *inference_conv.state()


def prepared_block(block: FusedForward, x: Tensor) -> _Prepared | None:
    """What the last ``block(x)`` prepared, while it holds."""
    kept = _prepared.get(block, {}).get(id(block.plan), {}).get(_key(x))
    own = "forward" in block.__dict__ or not block._is_as_recorded()
    return None if own or kept is None or not kept.source.holds(block, block.plan) else kept


def _run_inference(
    block: nn.Module, plan: BlockPlan, act: Act, x: Tensor, added: Tensor | None
) -> Tensor | None:
    """``run_block`` with one op per convolution; None where it is not for inference."""
    if x.dim() != 4 or plan.branch[-1].conv is None:
        return None
    if added is not None and (not isinstance(added, Tensor) or added.dtype != x.dtype):
        return None
    grads = torch.is_grad_enabled()
    fast = not grads and not torch.compiler.is_compiling() and x.is_cpu and not under_modes(x)
    fast = fast and (added is None or not under_modes(added))
    if fast:
        key = _key(x, added)
        sizes = _prepared.get(block, {}).get(id(plan))
        kept = None if sizes is None else sizes.get(key)
        if kept is not None and kept.source.holds(block, plan):
            return kept.run(x, x if added is None and plan.skip != "none" else added)
        if kept is not None:
            sizes.clear()  # they keep what was replaced
    stages = plan.branch if plan.shortcut is None else (*plan.branch, plan.shortcut)
    norms = [None if s.norm is None else child(block, s.norm) for s in stages]
    if any(bn is not None and uses_batch(bn) for bn in norms):
        return None
    wanted = grads and (x.requires_grad or (added is not None and added.requires_grad))
    if wanted or (grads and any(p.requires_grad for p in block.parameters())):
        return None
    if not fuses_convolutions(x, block.backend):
        return None
    source = _source_of(block, plan) if fast else None  # before any weight is read
    convs = []
    for stage, bn in zip(stages, norms, strict=True):
        if stage.conv is None:  # a shortcut that only pools
            continue
        conv = conv_norm_of(child(block, stage.conv), bn)
        if conv is None:
            return None
        convs.append(conv)
    out, residual = x, x if added is None else added
    steps = []

    def run(call: Call) -> Tensor:
        step = None if source is None else prepared(call, block.backend)
        if step is None:
            return conv_bn_act(*call, block.backend)
        steps.append(step)
        return step(call.x, call.residual)

    for stage, conv in zip(plan.branch, convs, strict=False):
        for name in stage.before:
            out = child(block, name)(out)
        if stage is not plan.branch[-1]:
            out = run(Call(out, conv, act="relu" if stage.relu else "none"))
    for name in () if plan.shortcut is None else plan.shortcut.before:
        residual = child(block, name)(residual)
    conv, *shortcut = convs[len(plan.branch) - 1 :]
    concat = plan.skip == "concat"
    if plan.skip == "none":
        residual = None
    elif not concat:
        shape = out_shape(residual, shortcut[0]) if shortcut else residual.shape
        if shape != out_shape(out, conv):
            return None  # broadcast
    y = run(Call(out, conv, residual, *(shortcut or [None]), concat, act))
    # another thread may have written to the weights meanwhile
    if source is not None and len(steps) == len(plan.branch) and source.holds(block, plan):
        if all(isinstance(step, Convolutions) for step in steps):
            steps = [joined(steps)]
        sizes = _prepared.setdefault(block, {}).setdefault(id(plan), {})
        while len(sizes) >= MOST_SIZES:
            sizes.pop(next(iter(tuple(sizes))), None)
        sizes[key] = _Prepared(source, steps)
    return y


def run_block(
    block: nn.Module, plan: BlockPlan, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A block, or a part of it, its normalisations fused with what follows them.

    Args:
        residual: what the shortcut starts from; default: ``x``.
    """
    last = plan.branch[-1]
    # after a concatenation the second of two ReLUs does what the first does
    act = "relu" if plan.relu else "relu_before_add" if last.relu else "none"
    y = _run_inference(block, plan, act, x, residual)
    if y is None and residual is None:
        y = _run_whole(block, plan, act, x)
    if y is not None:
        return y
    out = x
    for stage in plan.branch[:-1]:
        out = _normalise(block, stage, _convolve(block, stage, out))
    out = _convolve(block, last, out)
    if plan.skip == "none":
        return _normalise(block, last, out, act=act)
    if plan.skip == "concat":
        out = torch.cat((x, _normalise(block, last, out)), dim=1)
        return F.relu(out) if plan.relu else out

    shortcut = plan.shortcut
    residual = x if residual is None else residual
    if shortcut is not None:
        residual = _convolve(block, shortcut, residual)
    fits = isinstance(residual, Tensor) and residual.shape == out.shape
    fits = fits and residual.dtype == out.dtype
    if last.norm is None or not fits:  # nothing to fuse the add into, or PyTorch's promotion rules
        if shortcut is not None:
            residual = _normalise(block, shortcut, residual)
        out = _normalise(block, last, out)
        if plan.into == "shortcut":
            out, residual = residual, out
        out = operator.iadd(out, residual) if plan.into else out + residual
        return F.relu(out) if plan.relu else out
    return _normalise(block, last, out, residual, shortcut, act)


def plain_twin(module: nn.Module) -> nn.Module:
    """What TorchScript, which reads source, gets instead: the same module, of the class in front of
    which ours was put."""
    warnings.warn(
        "torch.jit.script puts PyTorch's own blocks into the model in place of the fused ones: "
        "script a copy.deepcopy of it, or fuse_ it again",
        stacklevel=2,
    )
    ours = (FusedForward, type(module))
    cls = next(c for c in type(module).__mro__ if not issubclass(c, ours))
    plain = cls.__new__(cls)
    plain.__dict__ = dict(module.__dict__)
    return plain


def is_for_kernels(x: object) -> bool:
    """Whether it is a tensor with strides; of other layouts (MKL-DNN's, sparse ones) PyTorch's own
    ops may be capable."""
    return isinstance(x, Tensor) and x.layout is torch.strided


def with_signature_of(forward: Callable, original: Callable) -> Callable:
    """The function ``forward`` with the signature, name and docstring of another."""
    made = types.FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
    functools.update_wrapper(made, original)
    made.runs_plan = getattr(forward, "runs_plan", False)
    return made


def runs_plan(module: nn.Module) -> bool:
    """Whether a call of a module runs its ``BlockPlan``; a subclass may have another forward."""
    return getattr(type(module).forward, "runs_plan", False)


class FusedForward:
    """Mixin in front of a block's own class: runs ``plan`` where that does the same as its
    forward."""

    plan: BlockPlan
    backend: str | None = None
    recompute: str | None = None

    def forward(self, *args, **kwargs):
        plain = len(args) != 1 or kwargs or not is_for_kernels(args[0])
        if plain or is_exported() or not self._is_as_recorded() or self._promotes(args[0]):
            return super().forward(*args, **kwargs)
        return run_block(self, self.plan, args[0])

    forward.runs_plan = True

    def __prepare_scriptable__(self) -> nn.Module:
        return plain_twin(self)

    def _promotes(self, x: Tensor) -> bool:
        """Whether norms of constants may turn what they are given into another dtype."""
        return self.plan.frozen and (
            torch.is_autocast_enabled(x.device.type)
            or any(m.weight.dtype != x.dtype for m in self.modules() if is_frozen(m))
        )

    def _is_as_recorded(self) -> bool:
        """Whether all that the block's forward read when the plan was made is as it was."""
        record = self.plan.record
        if record is None:
            return False
        if torch.compiler.is_compiling():
            return holds_compiled(self, record)
        return not _has_any_global_hook() and guard_of(self, record).same


_DOC = reference.ResBlock.__doc__ or ""  # there is none with python -OO


class FusedResBlock(FusedForward, reference.ResBlock):
    __doc__ = _DOC.replace(
        "A residual block in plain PyTorch, of any kind ``fused_res.FusedResBlock`` has.",
        "A residual block with fused BatchNorm, add and ReLU, forward and backward.\n\n"
        "    ``FusedResBlock(in_channels, out_channels, stride=1)`` is the basic block.\n"
        "    Checkpoints of torchvision's blocks load into it and the other way round.",
    ).replace(
        "        device, dtype: of the parameters.\n",
        "        device, dtype: of the parameters.\n"
        "        backend: auto, cpu, cuda, triton or eager, for this block alone.\n"
        "        recompute: ``last``: the backward pass computes the last convolution again,\n"
        "            instead of keeping its output.\n",
    )

    def __init__(
        self, *args, backend: str | None = None, recompute: str | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be one of: {', '.join(BACKENDS)}")
        self.backend = backend
        self.recompute = check_recompute(recompute)
        self.plan = self._planned()

    def _planned(self) -> BlockPlan:
        has_norm = self.kind != "plain"
        branch = [
            Stage(f"conv{i}", f"bn{i}" if has_norm else None, relu=True)
            for i in range(1, self.depth + 1)
        ]
        before = ("dropout",) if self.dropout is not None else ()
        branch[-1] = branch[-1]._replace(relu=self.relu_placement == "before", before=before)
        shortcut = None
        if self.downsample is not None:
            shortcut = Stage("downsample.0", "downsample.1" if has_norm else None)
        return BlockPlan(
            tuple(branch),
            shortcut,
            "concat" if self.skip == "concat" else "add",
            self.relu_placement == "after",
            record=Record(self, self._reads()),
        )

    def __setstate__(self, state):
        super().__setstate__(state)
        if isinstance(self.plan, Unplanned):
            self.plan = self._planned()

    def _reads(self) -> Reads:
        """What ``ResBlock.forward`` reads, which is known without a trace."""
        names = {"depth", "dropout", "kind", "relu", "relu_placement", "skip", "downsample"}
        names |= {f"{name}{i}" for name in ("conv", "bn") for i in range(1, self.depth + 1)}
        leaves = (name for name, m in self.named_modules() if name and not m._modules)
        return Reads({"": frozenset(names)}, frozenset(leaves))
