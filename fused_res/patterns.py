"""Recognises residual blocks by their dataflow: a ``torch.fx`` trace of the block's own forward.

What counts is what flows where (convolution, BatchNorm, ReLU, add), not class or attribute names.
"""

from __future__ import annotations

import copy
import operator
import random

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from .nn.blocks import NORMS, BlockPlan, Stage, bypassed_children, child, has_hooks

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)


class Unfusable(Exception):
    """The module is a residual block that cannot be fused; the message says why."""


def in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # fx itself shows x += y as x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class Tracer(fx.Tracer):
    """Sees convolutions, norms and whatever has no children as one call each."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = torch.is_autocast_enabled("cpu")
        self.modes_changed = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args, **kwargs) -> fx.Node:
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.modes_changed |= modes != (True, self.autocast)
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, (nn.Conv2d, _NormBase)) or parametrize.is_parametrized(module):
            return True
        return not any(True for _ in module.children())


def _state(block: nn.Module) -> list:
    return [
        (name, {k: v for k, v in m.__dict__.items() if k[0] != "_"}, {
            k: (id(t), t._version) for k, t in (*m._buffers.items(), *m._parameters.items())
            if t is not None
        })
        for name, m in block.named_modules()
    ]  # fmt: skip


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module))


def trace(
    block: nn.Module, training: bool, tracer: Tracer | None = None, inputs: int | None = None
) -> fx.Graph:
    """The graph of the block's forward in one mode, traced on a copy: a forward may write state.

    Args:
        inputs: how many the forward is given, if it takes ``*inputs``.

    Raises:
        Unfusable: the forward does something that a trace does not show.
    """
    block = copy.deepcopy(block)
    for m in block.modules():  # attributes, not train(): models override that (to freeze a norm)
        m.training = training
    tracer, before = tracer or Tracer(), _state(block)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        drawn, python_drawn = torch.get_rng_state(), random.getstate()
        try:
            graph = tracer.trace(block, inputs and (fx.PH,) * inputs)
            same = torch.equal(drawn, torch.get_rng_state()) and python_drawn == random.getstate()
        finally:
            random.setstate(python_drawn)
    if not same:
        raise Unfusable("its forward draws random numbers")
    if tracer.modes_changed:
        raise Unfusable("its forward changes the grad or autocast mode")
    if _state(block) != before:
        raise Unfusable("its forward writes to the module")
    for node in list(graph.nodes):
        if node.op == "call_module" and _does_nothing(child(block, node.target)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


class Nodes:
    """The traced nodes of a block, by what they do."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, graph

    def module(self, node: fx.Node) -> nn.Module | None:
        return child(self.block, node.target) if node.op == "call_module" else None

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.target in _RELUS and len(node.all_input_nodes) == 1

    def operands_of_add(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
            return None
        operands = (*node.args, *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs))
        extra = set(node.kwargs) - {"input", "other"}
        if extra or len(operands) != 2 or not all(isinstance(o, fx.Node) for o in operands):
            return None
        return operands

    def operands_of_cat(self, node: fx.Node) -> list[fx.Node] | None:
        if node.op != "call_function" or node.target not in _CATS:
            return None
        values = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        if values.get("dim", values.get("axis", 0)) not in (1, -3):
            return None
        tensors = values.get("tensors")
        return list(tensors) if isinstance(tensors, (list, tuple)) else None

    def describe(self, node: fx.Node) -> str:
        """A node in words, by the innermost child it belongs to."""
        module = self.module(node)
        if module is not None:
            return f"{node.target} ({type(module).__name__})"
        stack = node.meta.get("nn_module_stack") or {}
        owners = [path for path in stack if path]
        name = getattr(node.target, "__name__", str(node.target))
        if owners:
            path = owners[-1]
            return f"{path} ({type(child(self.block, path)).__name__})"
        return f"{name}()"


def _check_child(nodes: Nodes, node: fx.Node, *expected: type) -> str:
    module, name = nodes.module(node), node.target
    if parametrize.is_parametrized(module):
        raise Unfusable(f"parametrization on {name}")
    if type(module) not in expected:
        kind = type(module).__name__
        raise Unfusable(f"{name} is a {kind}, a subclass of {expected[0].__name__}")
    return name


def _chain(nodes: Nodes, node: fx.Node, x: fx.Node) -> list[fx.Node]:
    """The nodes from the input ``x`` to ``node``, which must follow each other with no side
    exits."""
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
    """A chain as stages. ``opaque``: any child without children may stand before a convolution."""
    stages: list[Stage] = []
    before: list[str] = []
    for node in chain:
        module = nodes.module(node)
        last = stages[-1] if stages and not before else None
        if isinstance(module, nn.Conv2d):
            stages.append(Stage(_check_child(nodes, node, nn.Conv2d), None, before=tuple(before)))
            before = []
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            name = _check_child(nodes, node, *NORMS)
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


def _parse(nodes: Nodes) -> BlockPlan:
    inputs = [n for n in nodes.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in nodes.graph.nodes if n.op == "output")
    x, end = inputs[0], output.args[0]
    if not isinstance(end, fx.Node):
        raise Unfusable("its forward returns more than one tensor")
    if any(isinstance(nodes.module(user), _NormBase) for user in x.users):
        raise Unfusable("pre-activation order: a norm before the first convolution")
    called = [n.target for n in nodes.graph.nodes if n.op == "call_module" and not nodes.is_relu(n)]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise Unfusable(f"{twice[0]} is used {called.count(twice[0])} times")
    relu = nodes.is_relu(end)
    if relu:
        (end,) = end.all_input_nodes
    operands = nodes.operands_of_add(end)
    if operands and operands[0] is x and end.target in (operator.iadd, "add_"):
        raise Unfusable("it writes its output into its input")
    skip = "add" if operands else "concat"
    if operands is None:
        operands = nodes.operands_of_cat(end)
        if operands is None:
            raise Unfusable("the residual add is not the last thing it does")
        if len(operands) != 2 or operands[0] is not x:
            raise Unfusable("it concatenates something else than (input, branch)")
    chains = [_chain(nodes, operand, x) for operand in operands]
    if skip == "concat":
        shortcut_chain, branch_chain = chains
    else:  # the branch is the side that does more; of equals, the left one

        def weight(chain: list[fx.Node]) -> tuple[int, int]:
            convs = [m for m in map(nodes.module, chain) if isinstance(m, nn.Conv2d)]
            return len(convs), sum(m.kernel_size[0] for m in convs)

        branch_chain, shortcut_chain = sorted(chains, key=weight, reverse=True)
    branch = _stages(nodes, branch_chain, opaque=False)
    shortcut = _stages(nodes, shortcut_chain, opaque=True)
    if not branch or branch[0].conv is None:
        raise Unfusable("no convolution in the branch")
    if len(shortcut) > 1 or (shortcut and shortcut[0].relu):
        raise Unfusable("its shortcut is more than one convolution and norm")
    if branch[-1].relu and relu and skip == "add":
        raise Unfusable("a ReLU both before and after the add")
    if not any(stage.norm for stage in branch):
        raise Unfusable("it has no normalisation, which is what is fused")
    end_of_shortcut = shortcut[0] if shortcut else None
    bypassed = bypassed_children(nodes.block, branch, end_of_shortcut)
    return BlockPlan(tuple(branch), end_of_shortcut, skip, relu, bypassed)


def looks_residual(nodes: Nodes) -> bool:
    convolves = any(isinstance(nodes.module(n), nn.Conv2d) for n in nodes.graph.nodes)
    joins = any(
        n.op in ("call_function", "call_method")
        and n.target in _ADDS | _CATS
        and len(n.all_input_nodes) > 1
        for n in nodes.graph.nodes
    )
    return convolves and joins


def plan_of(block: nn.Module) -> BlockPlan | None:
    """The plan of a residual block; None where the module is not one.

    The block's forward is traced twice, in training and in eval mode, and nothing of it is changed.

    Raises:
        Unfusable: it is a residual block, but not one that can be fused.
    """
    try:
        graph, in_eval = trace(block, True), trace(block, False)
    except Unfusable:
        raise
    except Exception as error:
        _refuse_hooks(block)  # a weight_norm of the old kind cannot even be copied
        if sum(isinstance(m, nn.Conv2d) for m in block.modules()) < 2:
            return None
        raise Unfusable(f"torch.fx cannot trace it: {in_words(error)}") from error
    nodes = Nodes(block, graph)
    if not looks_residual(nodes):
        return None
    if str(graph) != str(in_eval):
        raise Unfusable("its forward differs between training and eval mode")
    _refuse_hooks(block)
    return _parse(nodes)


def _refuse_hooks(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if name and has_hooks(module):
            raise Unfusable(f"hooks on {name}")
