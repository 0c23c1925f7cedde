"""Partial fusion: finds the segments of a block that can be fused, and writes a new forward that
calls them. It is for blocks that are not one ``BlockPlan``."""

from __future__ import annotations

import operator
from operator import attrgetter
from typing import NamedTuple

from torch import fx, nn
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from ..ops.res_block import MOST_STAGES
from .modules import has_frozen, is_norm
from .plan import BlockPlan, PartialPlan, Program, Stage
from .trace import Nodes, only_user

IN_PLACE_ADDS = (operator.iadd, "add_")


class Segment(NamedTuple):
    """Nodes that become one call: {convolution, norm, ReLU,} [convolution,] norm [, add] [, ReLU].

    x, residual: the inputs.
    shortcut: the nodes of the convolution and norm that ``residual`` goes through.
    before: convolutions and norms of earlier stages.
    into: as in a ``BlockPlan``.
    """

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    conv: fx.Node | None
    norm: fx.Node
    relu: bool
    residual: fx.Node | None = None
    shortcut: tuple[fx.Node, fx.Node] | None = None
    relu_after: bool = False
    before: tuple[tuple[fx.Node, fx.Node], ...] = ()
    into: str = ""

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return (self.x,) if self.residual in (None, self.x) else (self.x, self.residual)

    def plan(self) -> BlockPlan:
        conv = None if self.conv is None else self.conv.target
        adds = self.residual is not None
        stages = [Stage(c.target, n.target, True) for c, n in self.before]
        stages.append(Stage(conv, self.norm.target, self.relu and adds))
        shortcut = None if self.shortcut is None else Stage(*(n.target for n in self.shortcut))
        relu = self.relu_after or (self.relu and not adds)
        skip = "add" if adds else "none"
        return BlockPlan(tuple(stages), shortcut, skip, relu, into=self.into)


def _calls(nodes: Nodes, node: fx.Node, known: bool) -> bool:
    """Whether it calls a module with one tensor; the module is ``known`` and called once."""
    return (
        known
        and len(node.args) == 1
        and not node.kwargs
        and not parametrize.is_parametrized(nodes.module(node))
        and nodes.times_called(node) == 1
    )


def _movable(nodes: Nodes, segment: Segment) -> bool:
    """Whether the segment can run at its last node: no node in between overwrites its tensors."""
    order = list(nodes.graph.nodes)
    first, last = (of(order.index(n) for n in segment.nodes) for of in (min, max))
    between = [n for n in order[first:last] if n not in segment.nodes]
    # a read of the norms' statistics must keep its place
    owners = {n.target.rpartition(".")[0] for n in nodes.graph.find_nodes(op="get_attr")}
    if between and any(n.op == "call_module" and n.target in owners for n in segment.nodes):
        return False
    return not any(nodes.writes(n) and not _into_its_own(nodes, n) for n in between)


def _is_own(nodes: Nodes, node: fx.Node) -> bool:
    """Whether no other node can see the result of a node that has one user."""
    module = nodes.module(node)
    if type(module) in (nn.Conv2d, nn.Linear) or is_norm(module):
        return True
    if nodes.operands_of_add(node) is None and not nodes.is_relu(node):
        return False
    return not nodes.writes(node) or _into_its_own(nodes, node)


def _into_its_own(nodes: Nodes, node: fx.Node) -> bool:
    """Whether a node writes only into a tensor that no other node can see."""
    (into,) = node.args[:1] or (None,)
    own = isinstance(into, fx.Node) and only_user(into) is node and _is_own(nodes, into)
    return own and nodes.writes_first(node)


def _around_norm(nodes: Nodes, norm: fx.Node) -> Segment:
    (x,) = norm.args
    segments = [Segment((norm,), x, None, norm, relu=False)]
    conv = type(nodes.module(x)) is nn.Conv2d and only_user(x) is norm
    if conv and _calls(nodes, x, True):
        segments.append(segments[-1]._replace(nodes=(x, norm), x=x.args[0], conv=x))
    after = only_user(norm)
    if after is not None and nodes.is_relu(after):
        segments += [p._replace(nodes=(*p.nodes, after), relu=True) for p in segments]
    return next(p for p in reversed(segments) if _movable(nodes, p))


def _with_add(nodes: Nodes, add: fx.Node, by_last: dict[fx.Node, Segment]) -> Segment | None:
    """The segment whose last op is this add, from the segments of its operands."""
    operands = nodes.operands_of_add(add)
    if operands is None or operands[0] is operands[1]:
        return None
    found = [by_last.get(o) if only_user(o) is add else None for o in operands]
    if add.target in IN_PLACE_ADDS and not _into_its_own(nodes, add):
        return None  # other nodes may see the tensor that it writes into
    found = [None if one is None or one.residual is not None else one for one in found]
    candidates = []
    sides = (*found, operands[1], "branch"), (*found[::-1], operands[0], "shortcut")
    for one, other, residual, left in sides:
        if one is None:
            continue
        into = left if add.target in IN_PLACE_ADDS else ""
        segment = one._replace(nodes=(*one.nodes, add), residual=residual, into=into)
        if other is not None and other.conv is not None and not other.relu:
            both = (*other.nodes, *segment.nodes)
            shortcut = other.conv, other.norm
            candidates.append(segment._replace(nodes=both, residual=other.x, shortcut=shortcut))
        candidates.append(segment)
    # the branch is the side with the larger kernel; then prefer one pass for both norms
    candidates.sort(key=lambda p: (_work(nodes, p), p.shortcut is not None), reverse=True)
    for segment in candidates:
        after = only_user(add)
        if after is not None and nodes.is_relu(after) and not segment.relu:
            longer = segment._replace(nodes=(*segment.nodes, after), relu_after=True)
            if _movable(nodes, longer):
                return longer
        if _movable(nodes, segment):
            return segment
    return None


def _work(nodes: Nodes, segment: Segment) -> int:
    return 0 if segment.conv is None else _pair(nodes.module(segment.conv).kernel_size)[0]


def find_segments(nodes: Nodes) -> list[Segment]:
    segments = [
        _around_norm(nodes, n)
        for n in nodes.graph.nodes
        if n.op == "call_module" and _calls(nodes, n, is_norm(nodes.module(n)))
    ]
    by_last = {segment.nodes[-1]: segment for segment in segments}
    for add in nodes.graph.nodes:
        longer = _with_add(nodes, add, by_last)
        if longer is not None:
            inside = set(longer.nodes)
            by_last = {last: p for last, p in by_last.items() if not set(p.nodes) <= inside}
            by_last[longer.nodes[-1]] = longer
    for segment in list(by_last.values()):  # in the order of the graph
        _join(nodes, segment, by_last)
    return list(by_last.values())


def _join(nodes: Nodes, segment: Segment, by_last: dict[fx.Node, Segment]) -> None:
    """Joins a segment that begins with a convolution to the one before it that ends with a ReLU."""
    before = by_last.get(segment.x)
    if before is None or segment.conv is None or before.conv is None or before.residual is not None:
        return
    if not before.relu or only_user(segment.x) is not segment.conv:
        return
    longer = segment._replace(
        nodes=(*before.nodes, *segment.nodes),
        x=before.x,
        before=(*before.before, (before.conv, before.norm)),
    )
    if len(longer.before) < MOST_STAGES - 1 and _movable(nodes, longer):
        del by_last[segment.x]
        by_last[segment.nodes[-1]] = longer


def _is_on(block: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(block)
    except AttributeError:
        return False
    return True


def program(nodes: Nodes, prefix: str, segments: list[Segment]) -> Program | None:
    """The graph as a program that calls the segments; None where there is none, or where it cannot
    be written as source. The graph is changed."""
    graph = nodes.graph
    fused: dict[fx.Node, fx.Node] = {}
    for i, segment in enumerate(segments):
        last = segment.nodes[-1]
        with graph.inserting_before(last):
            call = graph.call_module(f"{prefix}{i}", tuple(fused.get(n, n) for n in segment.inputs))
        last.replace_all_uses_with(call)
        fused[last] = call
    gone = {node for segment in segments for node in segment.nodes}
    for node in reversed(list(graph.nodes)):
        if node in gone:
            graph.erase_node(node)
    attributes = [n.target for n in graph.find_nodes(op="get_attr")]
    if not segments or not all(_is_on(nodes.block, path) for path in attributes):
        return None  # fx keeps constants of the forward in its own copy of the block
    code = graph.python_code("self")
    found = compile(code.src, "", "exec")
    (body,) = (c for c in found.co_consts if hasattr(c, "co_names"))
    used = {*found.co_names, *body.co_names}
    names = tuple((name, value) for name, value in code.globals.items() if name in used)
    return Program(code.src, names, tuple(p.plan() for p in segments))


def partial_plan(
    nodes: Nodes, quiet: Nodes | BlockPlan | None, quieted: tuple[str, ...], reason: str
) -> PartialPlan | None:
    """The partial plan of a block; None where nothing can be fused.

    Args:
        nodes: the nodes of its graph. The graph is changed.
        quiet: the nodes without the children ``quieted``, or the plan of the whole block then.
        reason: why the whole block is not one plan.
    """
    inputs = [n for n in nodes.graph.nodes if n.op == "placeholder"]
    if any(n.target.startswith("*") for n in inputs):
        return None
    while inputs and not inputs[-1].users:
        inputs.pop()
    usual = program(nodes, "_segment_", find_segments(nodes))
    if usual is None:
        return None
    if isinstance(quiet, Nodes):
        quiet = program(quiet, "_quiet_segment_", find_segments(quiet))
    frozen = has_frozen(nodes.block)
    return PartialPlan(usual, quiet, quieted, len(inputs), reason, frozen)
