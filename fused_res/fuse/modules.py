"""Facts about convolution and BatchNorm modules: which of them kernels can run, and with which
arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..reference import ConvNorm, Norm
from ..run.description import NORMS, has_hooks

_FROZEN = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"),
}
_WITH_ACT = {("timm.layers.norm_act", name) for name in ("BatchNormAct2d", "FrozenBatchNormAct2d")}


def _known_as(module: nn.Module | None) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_norm_act(module: nn.Module | None) -> bool:
    """Whether it is timm's BatchNorm, which also calls its children ``drop`` and ``act``."""
    return _known_as(module) in _WITH_ACT


def is_frozen(module: nn.Module | None) -> bool:
    """Whether it is a frozen BatchNorm: its four tensors are buffers and constant."""
    return _known_as(module) in _FROZEN


def is_norm(module: nn.Module | None) -> bool:
    """Whether it is a BatchNorm that a plan may contain."""
    return type(module) in NORMS or is_norm_act(module) or is_frozen(module)


def has_frozen(block: nn.Module) -> bool:
    return any(map(is_frozen, block.modules()))


def uses_batch(bn: nn.Module) -> bool:
    """Whether it normalises by the statistics of its input."""
    return not is_frozen(bn) and (bn.training or bn.running_mean is None)


def child(module: nn.Module, path: str) -> nn.Module:
    """A child by dotted name."""
    if path in module._modules:
        return module._modules[path]
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def group_of(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes that share their statistics in ``bn.forward``; None: this process alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def norm_of(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> Norm:
    """The arguments that ``bn.forward`` gives to ``F.batch_norm``. Counts the batch as it does."""
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


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size of ``F.conv2d`` as a pair; it may be a number, or a sequence of one or two."""
    first, *rest = (size,) if isinstance(size, int) else size
    return (first, *rest) if rest else (first, first)


def _overridden(conv: nn.Module) -> bool:
    return "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__


def conv_norm_of(conv: nn.Module, bn: nn.Module | None) -> ConvNorm | None:
    """A convolution and its BatchNorm as an argument of ``conv_bn_act``; None where that cannot run
    them."""
    if (
        type(conv) is not nn.Conv2d
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
        or has_hooks(conv)
        or (not torch.compiler.is_compiling() and _overridden(conv))
    ):
        return None
    norm = None if bn is None else norm_of(bn)
    sizes = map(pair, (conv.stride, conv.padding, conv.dilation))
    return ConvNorm(conv.weight, conv.bias, *sizes, conv.groups, norm)


def tensors_of(conv: nn.Module | None, bn: nn.Module | None) -> list[Tensor] | None:
    """The tensors that a convolution and a BatchNorm compute with. None where a change could stay
    unseen: one is no parameter or buffer, or is an inference tensor."""
    tensors: list[Tensor | None] = []
    try:
        if conv is not None:
            tensors += map(conv._parameters.__getitem__, ("weight", "bias"))
        if bn is not None:
            affine = bn._buffers if is_frozen(bn) else bn._parameters
            tensors += map(affine.__getitem__, ("weight", "bias"))
            tensors += map(bn._buffers.__getitem__, ("running_mean", "running_var"))
    except KeyError:
        return None
    found = [t for t in tensors if t is not None]
    return None if any(t.is_inference() for t in found) else found


def is_for_kernels(x: object) -> bool:
    """Whether it is a strided tensor. PyTorch's own ops run other layouts (sparse, MKL-DNN)."""
    return isinstance(x, Tensor) and x.layout is torch.strided


def is_exported() -> bool:
    """Whether the model is being exported (torch.export, ONNX, TorchScript). An exported graph gets
    the modules' own ops."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
