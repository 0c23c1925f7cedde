"""Recognises residual blocks by the dataflow in a ``torch.fx`` trace of their own forward.

Operations and their operands decide (convolution, BatchNorm, ReLU, add), not class or attribute
names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import takewhile

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from ..run.description import Unknowable, has_hooks
from ..run.guards import Record
from ..run.reads import Reads
from .modules import has_frozen, is_norm, is_norm_act
from .partial import IN_PLACE_ADDS, partial_plan
from .plan import BlockPlan, PartialPlan, Stage
from .trace import Nodes, Trace, Tracer, Unfusable, Untraceable, in_words, trace

_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)


def _check_child(nodes: Nodes, node: fx.Node, known: bool, base: str) -> str:
    module, name = nodes.module(node), node.target
    if parametrize.is_parametrized(module):
        raise Unfusable(f"parametrization on {name}")
    if not known:
        raise Unfusable(f"{name} is a {type(module).__name__}, a subclass of {base}")
    return name


def _chain(nodes: Nodes, node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The nodes from the input ``x`` to ``node``. Each must be the only user of the one before."""
    chain = []
    while node is not x:
        if node.op == "placeholder":
            raise Unfusable(f"its forward takes a second input, {node.name}")
        if nodes.operands_of_add(node) or nodes.operands_of_cat(node):
            raise Unfusable("more than one add or concatenation")
        inputs = node.all_input_nodes
        if len(inputs) != 1:
            raise Unfusable(f"not fusable: {nodes.describe(node)}")
        if len(node.users) != 1:
            raise Unfusable(f"the output of {nodes.describe(node)} is used {len(node.users)} times")
        chain.append(node)
        node = inputs[0]
    return chain[::-1]


def _stages(nodes: Nodes, chain: list[fx.Node], opaque: bool) -> list[Stage]:
    """A chain as stages. ``opaque``: any traced child may stand before a convolution."""
    stages: list[Stage] = []
    before: list[str] = []
    for node in chain:
        module = nodes.module(node)
        last = stages[-1] if stages and not before else None
        if isinstance(module, nn.Conv2d):
            name = _check_child(nodes, node, type(module) is nn.Conv2d, "Conv2d")
            stages.append(Stage(name, None, before=tuple(before)))
            before = []
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) or is_norm(module):
            name = _check_child(nodes, node, is_norm(module), "BatchNorm2d")
            if last is None or last.norm or last.relu:
                raise Unfusable(f"{name} does not follow a convolution")
            stages[-1] = last._replace(norm=name)
        elif nodes.is_relu(node):
            if last is None or last.relu:
                raise Unfusable("a ReLU does not follow a convolution or its norm")
            stages[-1] = last._replace(relu=True)
        elif module is not None and (opaque or isinstance(module, _DROPOUTS)):
            before.append(node.target)
        else:
            raise Unfusable(f"not fusable: {nodes.describe(node)}")
    if before and (not opaque or stages):
        raise Unfusable(f"not fusable: {before[0]} after the last norm")
    if before:
        stages.append(Stage(None, None, before=tuple(before)))
    return stages


def _before_convs(nodes: Nodes, chain: list[fx.Node]) -> list[fx.Node]:
    """The nodes before the first convolution of a chain; their result may be the input itself."""
    return list(takewhile(lambda n: not isinstance(nodes.module(n), nn.Conv2d), chain))


def _refuse_writes(nodes: Nodes, end: fx.Node, chains: list[list[fx.Node]]) -> None:
    """Refuses a branch or shortcut that may write into the input: both read it, in any order.

    ``end`` joins the ``chains``. If it works in place, it writes into the first of them.
    """
    early = [_before_convs(nodes, chain) for chain in chains]
    for node in (*early[0], *early[1]):
        if getattr(nodes.module(node), "inplace", False):
            raise Unfusable(f"{nodes.describe(node)} may write into its input")
    if end.target in IN_PLACE_ADDS and early[0] == chains[0]:
        raise Unfusable("it may write its output into its input")


def _refuse_others(nodes: Nodes, known: set[fx.Node]) -> None:
    """Refuses a node that is not ``known`` and has an effect: the plan does not run it."""
    for node in nodes.graph.nodes:
        if node not in known and (node.op == "call_module" or nodes.writes(node)):
            raise Unfusable(f"{nodes.describe(node)} is run beside branch and shortcut")


def _parse(nodes: Nodes) -> BlockPlan:
    inputs = [n for n in nodes.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in nodes.graph.nodes if n.op == "output")
    x, end = inputs[0], output.args[0]
    if not isinstance(end, fx.Node):
        raise Unfusable("its forward returns more than one tensor")
    after = map(nodes.module, x.users)
    if any(isinstance(module, _NormBase) or is_norm(module) for module in after):
        raise Unfusable("pre-activation order: a norm before the first convolution")
    called = [n.target for n in nodes.graph.nodes if n.op == "call_module" and not nodes.is_relu(n)]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise Unfusable(f"{twice[0]} is used {called.count(twice[0])} times")
    relu = nodes.is_relu(end)
    if relu:
        (end,) = end.all_input_nodes
    operands = nodes.operands_of_add(end)
    skip = "add" if operands else "concat"
    if operands is None:
        operands = nodes.operands_of_cat(end)
        if operands is None:
            raise Unfusable("the residual add is not the last thing it does")
        if len(operands) != 2 or operands[0] is not x:
            raise Unfusable("it concatenates something else than (input, branch)")
    chains = [_chain(nodes, operand, x) for operand in operands]
    _refuse_writes(nodes, end, chains)
    if skip == "concat":
        shortcut_chain, branch_chain = chains
    else:  # the branch is the side that does more; of equals, the left one

        def weight(chain: list[fx.Node]) -> tuple[int, int]:
            convs = [m for m in map(nodes.module, chain) if isinstance(m, nn.Conv2d)]
            return len(convs), sum(_pair(m.kernel_size)[0] for m in convs)

        branch_chain, shortcut_chain = sorted(chains, key=weight, reverse=True)
    _refuse_others(nodes, {x, end, output, *output.all_input_nodes, *chains[0], *chains[1]})
    into = ""
    if end.target in IN_PLACE_ADDS:
        into = "branch" if operands[0] in branch_chain[-1:] else "shortcut"
    branch = _stages(nodes, branch_chain, opaque=False)
    shortcut = _stages(nodes, shortcut_chain, opaque=True)
    if not branch or branch[0].conv is None:
        raise Unfusable("no convolution in the branch")
    if len(shortcut) > 1 or (shortcut and shortcut[0].relu):
        raise Unfusable("its shortcut is more than one convolution and norm")
    if branch[-1].relu and relu:
        if skip == "add":
            raise Unfusable("a ReLU both before and after the add")
        branch[-1] = branch[-1]._replace(relu=False)  # the second ReLU does the work of both
    if not any(stage.norm for stage in branch):
        raise Unfusable("it has no normalisation to fuse")
    end_of_shortcut = shortcut[0] if shortcut else None
    frozen = has_frozen(nodes.block)
    return BlockPlan(tuple(branch), end_of_shortcut, skip, relu, frozen, into)


def traces_of(block: nn.Module, opaque: Collection[str]) -> tuple[Trace, Trace, Reads]:
    """The traces in training and in eval mode, and the reads of both."""
    training = trace(block, True, Tracer(opaque))
    in_eval = trace(block, False, Tracer(opaque), known=training.reads)
    reads = training.reads | in_eval.reads
    if not training.reads.covers(in_eval.reads):  # no mode may change a read of the other
        in_eval = trace(block, False, Tracer(opaque), known=reads)
    return training, in_eval, reads


def check_traces(training: Trace, in_eval: Trace) -> None:
    """
    Raises:
        Unfusable: the traces do not determine the forward's result, or differ.
    """
    training.seen(), in_eval.seen()
    if str(training.graph) != str(in_eval.graph):
        raise Unfusable("its forward differs between training and eval mode")


def without_acts(block: nn.Module, reads: Reads) -> Reads:
    """The children that timm's BatchNorm calls are part of the plan."""
    with_act = {name for name, module in block.named_modules() if is_norm_act(module)}
    return replace(reads, leaves=reads.leaves - with_act)


def plan_of(block: nn.Module, opaque: Collection[str] = ()) -> BlockPlan | PartialPlan | None:
    """The plan of a residual block, or of its segments that can be fused; None where the module is
    no residual block.

    The forward is traced twice, in training and in eval mode. The block is not changed.

    Args:
        opaque: names of children that are traced as one call.

    Raises:
        Untraceable: it may be a residual block, but a trace cannot show it.
        Unfusable: it is a residual block in which nothing can be fused.
    """
    try:
        training, in_eval, reads = traces_of(block, opaque)
    except Unfusable:
        raise
    except Exception as error:
        _refuse_hooks(block)  # modules with the old weight_norm cannot be copied
        if sum(isinstance(m, nn.Conv2d) for m in block.modules()) < 2:
            return None
        raise Untraceable(f"torch.fx cannot trace it: {in_words(error)}") from error
    nodes = Nodes(block, training.graph)
    if not nodes.look_residual():
        return None
    check_traces(training, in_eval)
    _refuse_hooks(block)
    try:
        record = Record(block, without_acts(block, reads), frozenset(opaque))
    except Unknowable as reason:
        raise Unfusable(str(reason)) from None
    nodes.split_norms()
    try:
        plan = _parse(nodes)
    except Unfusable as reason:
        plan = _partial_plan(nodes, Nodes(block, in_eval.graph), str(reason))
        if plan is None:
            raise
    return plan._replace(record=record)


def _partial_plan(nodes: Nodes, in_eval: Nodes, reason: str) -> PartialPlan | None:
    quieted, quiet = in_eval.without_what_is_quiet(), None
    if quieted:
        in_eval.split_norms()
        try:
            quiet = _parse(in_eval)
        except Unfusable:
            quiet = in_eval
    return partial_plan(nodes, quiet, quieted, reason)


def _refuse_hooks(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if name and has_hooks(module):
            raise Unfusable(f"hooks on {name}")
        if name and "forward" in module.__dict__:
            raise Unfusable(f"a forward of its own on {name}")
