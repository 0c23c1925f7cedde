"""Plans: the order in which a block's children act, and which of them run fused together."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..reference import Act
from ..run.guards import Record


class Stage(NamedTuple):
    """Children that are called in this order: ``before`` (dropout, pooling), a convolution, a norm.
    They are given by dotted name."""

    conv: str | None
    norm: str | None
    relu: bool = False
    before: tuple[str, ...] = ()


class BlockPlan(NamedTuple):
    """A residual block, or a segment of one, in normal form.

    branch: the stages before the add. If the last one has ``relu``, a ReLU comes before the add.
    shortcut: the stage of a projection; None: the input itself is added.
    skip: ``add``, ``concat`` of (input, branch), or ``none``.
    relu: whether a ReLU follows the add.
    frozen: whether a norm is frozen; such norms promote inputs of other dtypes.
    into: the operand that an in-place add writes into, ``branch`` or ``shortcut``. The result keeps
        its dtype and shape.
    record: everything that the block's forward read when the plan was made; None for a segment.
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
        """The stages of the branch, then that of the shortcut."""
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
    """Replaces a plan in a pickle. The code may have changed when the pickle is read, so the
    forward is traced again then. Until then the block runs its own forward.

    stem: as in a ``PartialPlan``.
    """

    opaque: frozenset[str]
    stem: bool = False
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
    """The fused segments of a block that is not one ``BlockPlan``, or of a module that is no block.

    usual: the program that the block runs.
    quiet: the program or plan for when the children ``quieted`` are in eval mode; None: ``usual``.
    quieted: children that return their input in eval mode (dropout, drop path), by dotted name.
    inputs: the number of leading arguments that must be tensors. Other calls run the block's own
        forward.
    reason: why the whole block is not one plan; of a stem, what is fused.
    frozen, record: as in a ``BlockPlan``.
    stem: whether the module is no block.
    """

    usual: Program
    quiet: Program | BlockPlan | None
    quieted: tuple[str, ...]
    inputs: int
    reason: str
    frozen: bool
    record: Record | None = None
    stem: bool = False

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Unplanned, (self.record.opaque, self.stem)

    @property
    def norms(self) -> int:
        """The number of BatchNorms that run fused."""
        return sum(len(plan.stages) for plan in self.usual.segments)


def runs_plan(module: nn.Module) -> bool:
    """Whether the forward of a module runs a ``BlockPlan``. A subclass may have another forward."""
    return getattr(type(module).forward, "runs_plan", False)
