"""Residual blocks whose BatchNorm, add and ReLU run fused: ``FusedResBlock``, and the mixins of the
blocks that ``fuse_`` changes.

A block keeps ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` children under their own names. Its plan
says in which order they act, and ``run`` follows the plan.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import reference
from ..env import BACKENDS
from ..fuse.modules import child, is_exported, is_for_kernels, is_frozen
from ..fuse.plan import BlockPlan, PartialPlan, Stage, Unplanned
from ..ops.res_block import check_recompute
from ..run.block import run_block
from ..run.guards import Record, guard_of, passes_compiled
from ..run.reads import Reads


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


def with_signature_of(forward: Callable, original: Callable) -> Callable:
    """The function ``forward`` with the signature, name and docstring of another."""
    made = types.FunctionType(forward.__code__, forward.__globals__, closure=forward.__closure__)
    functools.update_wrapper(made, original)
    made.runs_plan = getattr(forward, "runs_plan", False)
    return made


class FusedForward:
    """Mixin in front of a block's own class: runs its ``plan`` where that computes the same as its
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
            return passes_compiled(self, record)
        return not _has_any_global_hook() and guard_of(self, record).same


class FusedPartialForward(FusedForward):
    """Mixin in front of a block's own class: runs its ``PartialPlan`` where that computes the same
    as its forward."""

    plan: PartialPlan

    def forward(self, *args, **kwargs):
        plan = self.plan
        plain = kwargs or len(args) < plan.inputs
        plain = plain or not all(map(is_for_kernels, args[: plan.inputs]))
        if plain or is_exported() or not self._is_as_recorded() or self._promotes(args[0]):
            return super(FusedForward, self).forward(*args, **kwargs)
        if plan.quiet is not None and not any(child(self, n).training for n in plan.quieted):
            return self._quiet(*args)
        return self._usual(*args)


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
