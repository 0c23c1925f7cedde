"""Fuses convolutions outside residual blocks, in a graph of the model's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from ..fuse.modules import child
from ..fuse.swap import FuseReport
from ..fuse.trace import Nodes, Tracer, only_user, trace
from ..nn.blocks import FusedForward
from ..run.chain import is_link
from ..run.description import NORMS, has_hooks
from ..run.reads import Reads
from .conv_norm import conv_norm_relu, plain_conv_norm


def convolves(module: nn.Module) -> bool:
    """Whether a module has convolutions outside of fused blocks."""
    if isinstance(module, FusedForward):
        return False
    return isinstance(module, nn.Conv2d) or any(map(convolves, module.children()))


def chains(module: nn.Module) -> bool:
    """Whether a module has several blocks that ``is_link`` allows in a chain."""
    return sum(map(is_link, module.modules())) > 1


class _Tracer(Tracer):
    """Enters the modules that have convolutions outside of fused blocks, and with ``enters`` those
    that have blocks for a chain. It records every other module as one call."""

    traced_func_name = "_plain_forward"
    grad = False

    def __init__(self, enters: bool) -> None:
        super().__init__()
        self._enters = enters

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = super().is_leaf_module(module, qualified_name)
        # PreparedForward finds the blocks in an nn.Sequential
        enters = self._enters and not isinstance(module, nn.Sequential) and chains(module)
        return leaf or has_hooks(module) or not (convolves(module) or enters)


def graph_of(model: nn.Module, inputs: int) -> tuple[fx.Graph, Reads]:
    """The graph of ``model._plain_forward`` with so many inputs, and its reads.

    Raises:
        Unfusable: a trace does not show everything that the forward does.
    """
    try:
        return _graph_of(model, inputs, enters=True)
    except Exception:  # a forward may raise anything for a proxy
        return _graph_of(model, inputs, enters=False)


def _graph_of(model: nn.Module, inputs: int, enters: bool) -> tuple[fx.Graph, Reads]:
    reads = trace(model, False, _Tracer(enters), inputs).seen().reads
    found = trace(model, False, _Tracer(enters), inputs, known=reads).seen()  # it changes no read
    return found.graph, found.reads


def function(model: nn.Module, graph: fx.Graph) -> Callable:
    """A graph as a function of the model and its inputs. It keeps no reference to the model."""
    return type(fx.GraphModule(model, graph)).forward


def _is_dtype(view: fx.Node) -> bool:
    return "dtype" in view.kwargs or any(isinstance(a, torch.dtype) for a in view.args)


def fuse_convolutions(model: nn.Module, graph: fx.Graph, report: FuseReport) -> None:
    """Replaces each convolution, and the BatchNorm and ReLU after it, by one call in the graph."""
    nodes = Nodes(model, graph)
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "view" and not _is_dtype(node):
            node.target = "reshape"  # the same, also for channels_last maps
        if type(nodes.module(node)) is not nn.Conv2d or len(node.args) != 1:
            continue
        chain, bn, relu = [node], None, False
        after = only_user(node)
        if after is not None and type(nodes.module(after)) in NORMS:
            chain, bn, after = [*chain, after], after.target, only_user(after)
        if after is not None and nodes.is_relu(after):
            chain, relu = [*chain, after], after.target if after.op == "call_module" else True
        if len(chain) == 1:
            continue
        name = " + ".join(n.target if n.op == "call_module" else "relu" for n in chain)
        paths = node.target, bn, relu
        if plain_conv_norm(*(child(model, p) if type(p) is str else p for p in paths)) is None:
            reason = "hooks, padding that is not zeros, or a BatchNorm without running statistics"
            report.skipped.append((name, reason))
            continue
        with graph.inserting_before(node):  # not later: a node may overwrite its input
            modules = [graph.get_attr(p) if type(p) is str else p for p in paths]
            fused = graph.call_function(conv_norm_relu, (node.args[0], *modules))
        chain[-1].replace_all_uses_with(fused)
        for old in reversed(chain):
            graph.erase_node(old)
        report.fused.append(name)
