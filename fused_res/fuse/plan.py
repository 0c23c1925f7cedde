"""Plans: the order in which a block's children act, and which of them run fused together."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..reference import Act
from ..run.guards import Record


class Stage(NamedTuple):
    """Children called in turn, by dotted name: ``before`` (dropout, pooling), a convolution, a
    norm."""

    conv: str | None
    norm: str | None
    relu: bool = False
    before: tuple[str, ...] = ()


class BlockPlan(NamedTuple):
    """A residual block, or a segment of one, in normal form.

    branch: the stages before the add. ``relu`` of the last stage: a ReLU comes before the add.
    shortcut: the stage of a projection; None: the input itself is added.
    skip: ``add``, ``concat`` of (input, branch), or ``none``.
    relu: whether a ReLU follows the add.
    frozen: whether a norm has constants for statistics; such norms promote inputs of other dtypes.
    into: the operand that an in-place add writes into, ``branch`` or ``shortcut``; its dtype and
        shape stay.
    record: all that the block's forward read when the plan was made; None for a segment.
    """

    branch: tuple[Stage, ...]
    shortcut: Stage | None
    skip: str
    relu: bool
    frozen: bool = False
    into: str = ""
    record: Record | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The branch's, then the shortcut's."""
        return self.branch if self.shortcut is None else (*self.branch, self.shortcut)

    @property
    def act(self) -> Act:
        """The activation of the last op, and whether it comes before the add.

        After a concatenation the second of two ReLUs does the work of both.
        """
        return "relu" if self.relu else "relu_before_add" if self.branch[-1].relu else "none"

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        if self.record is None:
            return BlockPlan, tuple(self)
        return Unplanned, (self.record.opaque,)


class Unplanned(NamedTuple):
    """Stands for a plan in a pickle. The code may have changed when the pickle is read, so the
    forward is traced anew then. Until then the block runs its own forward."""

    opaque: frozenset[str]
    record = None
    inputs = 0
    skip = ""


class Program(NamedTuple):
    """A forward that calls its fused segments as ``self._segment_0(x, residual)`` and so on.

    source: the text of a function ``forward``.
    names: its globals, by name.
    segments: the plans that ``_segment_0``, ... run.
    """

    source: str
    names: tuple[tuple[str, object], ...]
    segments: tuple[BlockPlan, ...]


class PartialPlan(NamedTuple):
    """The fused segments of a block that is not one ``BlockPlan``.

    usual: the program that it runs.
    quiet: the program, or plan, while the children ``quieted`` are in eval mode; None: ``usual``.
    quieted: children that return their input in eval mode (dropout, drop path), by dotted name.
    inputs: the number of tensors that its forward takes first; other calls run its own forward.
    reason: why the whole block is not one plan.
    frozen, record: as in a ``BlockPlan``.
    """

    usual: Program
    quiet: Program | BlockPlan | None
    quieted: tuple[str, ...]
    inputs: int
    reason: str
    frozen: bool
    record: Record | None = None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Unplanned, (self.record.opaque,)

    @property
    def norms(self) -> int:
        """The number of BatchNorms that run fused."""
        return sum(len(plan.stages) for plan in self.usual.segments)


def runs_plan(module: nn.Module) -> bool:
    """Whether a call of a module runs its ``BlockPlan``; a subclass may have another forward."""
    return getattr(type(module).forward, "runs_plan", False)
