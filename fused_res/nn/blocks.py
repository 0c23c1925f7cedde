"""Residual blocks with fused BatchNorm, add and ReLU: ``FusedResBlock``, and the mixins of the
blocks that ``fuse_`` changes.

A block keeps ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` children under their own names. Its plan
is the order in which they act. ``run`` executes the plan.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..dispatch.backends import is_auto
from ..dispatch.cpu_rules import stem_pays
from ..env import BACKENDS, Backend
from ..fuse.modules import child, is_exported, is_for_kernels, is_frozen
from ..fuse.plan import BlockPlan, PartialPlan, Stage, Unplanned
from ..ops.res_block import Eager, check_recompute
from ..reference import Kind, ReluPlacement, Skip
from ..run.block import run_block
from ..run.guards import Record, guard_of, passes_compiled
from ..run.own_forward import leave, runs_own_forward
from ..run.reads import Reads


def plain_twin(module: nn.Module) -> nn.Module:
    """The module with the class behind the mixin: TorchScript compiles that class's source."""
    warnings.warn(
        "torch.jit.script puts PyTorch's own blocks into the model in place of the fused ones: "
        "script a copy.deepcopy of it, or fuse_ it again",
        stacklevel=2,
    )
    mixed = (Planned, type(module))
    cls = next(c for c in type(module).__mro__ if not issubclass(c, mixed))
    plain = cls.__new__(cls)
    plain.__dict__ = dict(module.__dict__)
    return plain


def with_signature_of(forward: Callable, original: Callable) -> Callable:
    """The function ``forward`` with the signature, name and docstring of ``original``."""
    code = forward.__code__.replace()  # torch.compile counts its compilations of each code object
    made = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    functools.update_wrapper(made, original)
    made.runs_plan = getattr(forward, "runs_plan", False)
    return made


class Planned:
    """What the mixins share. They stand in front of a module's own class, and run ``plan`` in every
    call in which it computes the same as the class's forward."""

    plan: BlockPlan | PartialPlan
    backend: str | None = None
    recompute: str | None = None

    def __prepare_scriptable__(self) -> nn.Module:
        return plain_twin(self)

    def _promotes(self, x: Tensor) -> bool:
        """Whether a frozen norm may promote its input to another dtype."""
        return self.plan.frozen and (
            torch.is_autocast_enabled(x.device.type)
            or any(m.weight.dtype != x.dtype for m in self.modules() if is_frozen(m))
        )

    def _is_as_recorded(self) -> bool:
        """Whether everything that the forward read when the plan was made is unchanged."""
        record = self.plan.record
        if record is None:
            return False
        if torch.compiler.is_compiling():
            return passes_compiled(self, record)
        return not _has_any_global_hook() and guard_of(self, record).same

    def _run_segments(self, *args, **kwargs):
        """The forward of a ``PartialPlan``."""
        plan = self.plan
        plain = kwargs or len(args) < max(plan.inputs, 1) or runs_own_forward(self, args[0])
        if plain or not all(map(is_for_kernels, args[: plan.inputs])):
            return super().forward(*args, **kwargs)
        if is_exported() or not self._is_as_recorded() or self._promotes(args[0]):
            return super().forward(*args, **kwargs)
        if plan.quiet is not None and not any(child(self, n).training for n in plan.quieted):
            return self._quiet(*args)
        return self._usual(*args)


class FusedForward(Planned):
    """The mixin of blocks."""

    plan: BlockPlan

    def forward(self, *args, **kwargs):
        if len(args) != 1 or kwargs or runs_own_forward(self, args[0]):
            return super().forward(*args, **kwargs)
        if (
            not is_for_kernels(args[0])
            or is_exported()
            or not self._is_as_recorded()
            or self._promotes(args[0])
        ):
            return super().forward(*args, **kwargs)
        y = run_block(self, self.plan, args[0])
        if isinstance(y, Eager):
            if y.final:
                leave(self, args[0])
            return super().forward(args[0])
        return y

    forward.runs_plan = True


class FusedPartialForward(FusedForward):
    """The mixin of blocks that are fused in part."""

    plan: PartialPlan
    forward = Planned._run_segments


class FusedStem(Planned):
    """The mixin of modules outside of blocks, such as a whole network. It is no ``FusedForward``:
    the blocks inside count by themselves."""

    plan: PartialPlan

    def forward(self, *args, **kwargs):
        of_tensor = args and not is_exported() and is_for_kernels(args[0])
        if of_tensor and not stem_pays(args[0]) and is_auto(self.backend):
            return super().forward(*args, **kwargs)
        return self._run_segments(*args, **kwargs)


class FusedResBlock(FusedForward, reference.ResBlock):
    """A residual block with fused BatchNorm, add and ReLU, forward and backward.

    Basic and bottleneck blocks are those of He et al., 2016 (https://arxiv.org/abs/1512.03385). The
    3x3 convolution has the stride. Children are named as in torchvision, ``conv1 bn1 conv2 bn2
    [conv3 bn3] [downsample.0 downsample.1]``, so each loads the other's checkpoints.
    ``fused_res.reference.ResBlock`` is the same block in plain PyTorch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the branch's output. The block's output has as many, and with
            ``skip="concat"`` ``in_channels`` more.
        stride: of the branch's (first) 3x3 convolution, and of the projection.
        kind: ``basic`` (two 3x3), ``bottleneck`` (1x1, 3x3, 1x1), ``single`` (one 3x3) or ``plain``
            (two 3x3 without normalisation).
        skip: ``identity``, ``projection`` (1x1 convolution and, unless plain, BatchNorm) or
            ``concat`` (the output is ``cat((x, branch), dim=1)``). Default: identity where the
            shapes allow it, else projection.
        groups: of the 3x3 convolutions.
        dilation: of the 3x3 convolutions, padded so that the size stays.
        width: channels inside the branch. Default: ``out_channels``; a quarter in a bottleneck.
        bias: whether the convolutions have a bias. Default: in plain blocks alone.
        relu: ``after`` the add, ``before`` it (on the branch), or ``none``. Default: before the add
            in a single block, none with ``skip="concat"``, else after.
        dropout: probability of ``nn.Dropout`` on the last convolution's input
            (Zagoruyko and Komodakis, 2016).
        eps, momentum, affine, track_running_stats: of every ``nn.BatchNorm2d``.
        device, dtype: of the parameters.
        backend: the backend of this block alone. Default: the one that ``fused_res.backend`` or
            ``FUSED_RES_BACKEND`` names.
        recompute: ``last``: the backward pass computes the last convolution again, and the forward
            pass does not keep its output. None: the output is kept.

    Shape:
        (N, in_channels, H, W) -> (N, out_channels [+ in_channels], H / stride, W / stride), sizes
        rounded up; float32, bfloat16, float16 or float64.

    Raises:
        ValueError: an argument is out of range or two do not fit together; the message names them.
        BackendUnavailable: in a call, the ``backend`` that was named cannot run the block.

    Examples:
        >>> block = FusedResBlock(64, 128, stride=2).to(memory_format=torch.channels_last)
        >>> block(torch.randn(8, 64, 32, 32)).shape
        torch.Size([8, 128, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kind: Kind = "basic",
        skip: Skip | None = None,
        groups: int = 1,
        dilation: int = 1,
        width: int | None = None,
        bias: bool | None = None,
        relu: ReluPlacement | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
        recompute: Literal["last"] | None = None,
    ) -> None:
        norm = {"eps": eps, "momentum": momentum, "affine": affine}
        super().__init__(
            in_channels, out_channels, stride, kind=kind, skip=skip, groups=groups,
            dilation=dilation, width=width, bias=bias, relu=relu, dropout=dropout, **norm,
            track_running_stats=track_running_stats, device=device, dtype=dtype,
        )  # fmt: skip
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
        """The reads of ``ResBlock.forward``; they are known without a trace."""
        names = {"depth", "dropout", "kind", "relu", "relu_placement", "skip", "downsample"}
        names |= {f"{name}{i}" for name in ("conv", "bn") for i in range(1, self.depth + 1)}
        leaves = (name for name, m in self.named_modules() if name and not m._modules)
        return Reads({"": frozenset(names)}, frozenset(leaves))
