"""Finds convolution, BatchNorm and ReLU outside of residual blocks: the stem of a network.

The forward of a module that is no block is traced again, with the blocks inside as single calls.
The module gets a partial plan. Its guard looks at the stem alone: a module that the program calls
after the stem (pooling, a stage, the classifier) may be replaced, hooked or fused at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import pairwise

from torch import fx, nn
from torch.nn.utils import parametrize

from ..nn.blocks import FusedStem
from ..nn.sequential import FusedSequential
from ..run.description import Unknowable, has_hooks
from ..run.guards import Record, guard_of
from ..run.places import walk
from ..run.reads import Reads
from .match import check_traces, traces_of, without_acts
from .modules import is_frozen, is_norm
from .partial import Segment, find_segments, program
from .plan import PartialPlan
from .trace import Nodes, Unfusable, Untraceable, in_words


def _is_stem(segment: Segment) -> bool:
    """Whether it is convolution, norm and ReLU, once or more often. A maxpool after it stays
    PyTorch's: an op that pools too would take the pool's node into the segment here."""
    has_relu = segment.relu or segment.before
    return bool(segment.conv is not None and segment.residual is None and has_relu)


def _in_words(nodes: Nodes, segment: Segment) -> str:
    names = [n.target if n.op == "call_module" else "relu" for n in segment.nodes]
    return " + ".join(names)


def _called_after(graph: fx.Graph, segments: int) -> frozenset[str]:
    """The modules that the program calls when all segments have run."""
    calls = [n.target for n in graph.nodes if n.op == "call_module"]
    last = max(calls.index(f"_segment_{i}") for i in range(segments))
    return frozenset(calls[last + 1 :]) - frozenset(calls[:last])


def _check(module: nn.Module, reads: Reads, called: frozenset[str]) -> None:
    """
    Raises:
        Unfusable: the forward looks into a module that is one call, or a module that is not only
            ``called`` has hooks.
    """
    for path, names in reads.attributes.items():
        inside = any(path.startswith(f"{leaf}.") for leaf in reads.leaves)
        if inside and any(not hasattr(nn.Module, name) for name in names):
            raise Unfusable(f"its forward reads attributes of {path}")
    for path, inner in walk(module, reads.leaves)[0]:
        if not path or inner is None or path in called:
            continue
        if has_hooks(inner) or "forward" in inner.__dict__:
            raise Unfusable(f"hooks or a forward of its own on {path}")


def stem_plan_of(module: nn.Module, opaque: Collection[str]) -> PartialPlan | None:
    """The plan of a module that is no block; None where it has nothing to fuse outside of blocks.

    Args:
        opaque: the paths of blocks, of the modules that have blocks inside, and of others that are
            traced as one call.

    Raises:
        Unfusable: a trace does not determine what its forward does.
    """
    try:
        training, in_eval, reads = traces_of(module, opaque)
    except Unfusable:
        raise
    except Exception as error:  # a forward may raise anything for a proxy
        raise Untraceable(f"torch.fx cannot trace it: {in_words(error)}") from error
    refused = None
    try:
        check_traces(training, in_eval)
    except Unfusable as why:
        refused = why
    nodes = Nodes(module, training.graph)
    nodes.split_norms()
    segments = list(filter(_is_stem, find_segments(nodes)))
    if not segments:
        return None
    if refused is not None:
        raise refused
    inputs = nodes.graph.find_nodes(op="placeholder")
    if len(inputs) != 1 or inputs[0].target.startswith("*"):
        raise Unfusable("its forward takes more than one input")
    reason = ", ".join(_in_words(nodes, segment) for segment in segments)
    frozen = any(is_frozen(nodes.module(n)) for segment in segments for n in segment.nodes)
    usual = program(nodes, "_segment_", segments)
    if usual is None:
        raise Unfusable("its forward makes tensors")
    called = _called_after(nodes.graph, len(segments))
    reads = without_acts(module, reads)
    _check(module, reads, called)
    try:
        record = Record(module, reads, frozenset(opaque), called)
    except Unknowable as why:
        raise Unfusable(str(why)) from None
    return PartialPlan(usual, None, (), 1, reason, frozen, record, stem=True)


def _has(modules: Iterable[nn.Module]) -> tuple[bool, bool]:
    """Whether a convolution, and whether a norm, is among them."""
    found = list(modules)
    return any(isinstance(m, nn.Conv2d) for m in found), any(map(is_norm, found))


def _is_done(module: nn.Module) -> bool:
    return isinstance(module, FusedStem) and guard_of(module, module.plan.record).same


Found = tuple[str, nn.Module, PartialPlan | str]


class _Outside:
    """The modules of a model that are outside of ``blocks``, which are names."""

    def __init__(
        self, model: nn.Module, blocks: Collection[str], is_link: Callable[[nn.Module], bool]
    ) -> None:
        self._blocks, self._is_link = frozenset(blocks), is_link
        self._around = {""} | {n[:i] for n in blocks for i, c in enumerate(n) if c == "."}
        inner = tuple(f"{name}." for name in blocks)
        names = [name for name, _ in model.named_modules()]
        self._inside = {n for n in names if n in self._blocks or n.startswith(inner)}

    def visit(self, module: nn.Module, name: str) -> list[Found]:
        """The plans in a module. Where there is none, the reason why it is not traced."""
        inner = module.named_modules(prefix=name)
        if not all(_has(m for n, m in inner if n not in self._inside)):
            return []
        own: list[Found] = []
        seen = _is_done(module)
        if not seen and self._is_candidate(module):
            try:
                plan = stem_plan_of(module, self._opaque(module, name))
                own, seen = [(name, module, plan)] if plan else [], True
            except Unfusable as reason:
                own = [(name, module, str(reason))]
        prefix = f"{name}." if name else ""
        for key, child in module.named_children():
            path = prefix + key
            if path not in self._inside and (not seen or path in self._around):
                own += self.visit(child, path)
        plans = [found for found in own if isinstance(found[2], PartialPlan)]
        return plans or own[:1]

    def _is_candidate(self, module: nn.Module) -> bool:
        """Whether it has a forward that a plan may replace."""
        cls = type(module)
        if isinstance(module, (fx.GraphModule, FusedSequential)) or "model_class" in vars(cls):
            return False  # a graph, a row of blocks, a served model
        if cls.forward is nn.Sequential.forward:  # which runs a row of blocks as one call
            return not any(map(all, pairwise(map(self._is_link, module))))
        leaf = is_norm(module) or not module._modules or parametrize.is_parametrized(module)
        return not leaf and cls.forward is not nn.Module.forward

    def _opaque(self, module: nn.Module, name: str) -> list[str]:
        """The paths inside that are traced as one call: blocks and what is around them, and modules
        that have nothing to fuse, which perhaps cannot be traced."""
        prefix = f"{name}." if name else ""
        known = self._blocks | self._around
        return [
            path
            for path, inner in module.named_modules()
            if path and (prefix + path in known or not any(_has(inner.modules())))
        ]


def stems_of(
    model: nn.Module, blocks: Collection[str], is_link: Callable[[nn.Module], bool]
) -> list[Found]:
    """Names and plans of the modules that have convolution, norm and ReLU outside of the blocks, or
    reasons why there is no plan.

    Args:
        blocks: the names of the blocks, fused or not.
        is_link: whether a module will be a block that ``is_link`` allows in a chain.
    """
    return [] if "" in blocks else _Outside(model, blocks, is_link).visit(model, "")
