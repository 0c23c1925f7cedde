"""A traced model's forward that looks up the steps of its fused calls once, not in every call.

A fused block checks in each call whether its kept steps are still valid. Between two kernels that
read a network's weights this takes 0.2 ms a block, because nothing of it is in a cache then: a
tenth of a ResNet-50 at batch 1. Here one guard checks the modules of all fused calls together, and
one fingerprint their tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..fuse.modules import child
from ..fuse.plan import runs_plan
from ..fuse.trace import Unfusable
from ..nn.blocks import FusedForward
from ..nn.sequential import FusedSequential
from ..ops.conv_bn_act import under_modes
from ..run.chain import chain_of, is_link, linked, places_of, unique_tensors
from ..run.description import Unknowable, has_hooks
from ..run.guards import ModulesGuard, Record, guard_of, passes_compiled
from ..run.inference import kept_for, run_kept
from ..run.kept import Kept, keep, size_of
from ..run.places import Places
from ..run.reads import Reads
from ..run.weight_cache import fingerprint
from .conv_norm import conv_norm_relu, prepared_conv
from .outside_blocks import function

Step = Callable[[Tensor], Tensor]


class _Found(NamedTuple):
    """A step for inputs of one size. It is valid while tensors and places are unchanged."""

    run: Step
    tensors: list[Tensor]
    fingerprint: tuple
    places: Places = Places()


def _prepared_block(block: nn.Module, x: Tensor) -> _Found | None:
    """The steps that a fused block has kept for such inputs."""
    if not runs_plan(block) or any(map(has_hooks, block.modules())):
        return None
    if "forward" in block.__dict__ or not block._is_as_recorded():
        return None
    kept, places = kept_for(block, block.plan, x), guard_of(block, block.plan.record).places
    if kept is None or places is None:
        return None
    return _Found(lambda x: run_kept(kept, x, x), kept.tensors, kept.fingerprint, places)


class _BlocksSite(NamedTuple):
    """A call of a fused block, or calls of consecutive blocks that keep the size of their input."""

    paths: tuple[str, ...]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return [m for path in self.paths for m in child(model, path).modules()]

    def plain(self, model: nn.Module, x: Tensor) -> Tensor:
        for path in self.paths:
            x = child(model, path)(x)
        return x

    def find(self, model: nn.Module, x: Tensor) -> _Found | None:
        blocks = [child(model, path) for path in self.paths]
        if len(blocks) == 1:
            return _prepared_block(blocks[0], x)
        made, found, steps, i = list(map(linked, blocks)), [], [], 0
        while i < len(blocks):
            tensors = unique_tensors(made[i:])
            before = fingerprint(tensors)
            chain, count = chain_of(blocks[i:], made[i:], x)
            if chain is None:
                one = _prepared_block(blocks[i], x)
            else:
                one = _Found(chain, tensors, before, places_of(made[i : i + count]))
            if one is not None:
                found.append(one)
            steps.append(blocks[i] if one is None else one.run)
            i += count

        def run(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        tensors = unique_tensors(found)
        before = fingerprint(tensors)
        return _Found(run, tensors, before, places_of(found)) if _unchanged(found) else None


class _ConvSite(NamedTuple):
    """A call of a convolution, and of the BatchNorm and ReLU after it, by path; ``relu`` may be a
    bool."""

    conv: str
    bn: str | None
    relu: str | bool

    def _called(self, model: nn.Module) -> list:
        return [child(model, p) if type(p) is str else p for p in self]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return [m for m in self._called(model) if isinstance(m, nn.Module)]

    def plain(self, model: nn.Module, x: Tensor) -> Tensor:
        return conv_norm_relu(x, *self._called(model))

    def find(self, model: nn.Module, x: Tensor) -> _Found | None:
        found = prepared_conv(x, *self._called(model))
        return None if found is None else _Found(*found)


_Site = _BlocksSite | _ConvSite


def _unchanged(found: list[_Found]) -> bool:
    """Whether steps were found and their weights are unchanged."""
    return bool(found) and all(fingerprint(one.tensors) == one.fingerprint for one in found)


def _run(steps: list[Step], i: int, x: Tensor) -> Tensor:
    return steps[i](x)


def _only_arg(node: fx.Node) -> fx.Node | None:
    alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return node.args[0] if alone else None


def _runs(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Runs of calls of blocks that ``is_link`` allows, by their first call. Each call is the only
    user of the one before."""
    runs: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        x = _only_arg(node) if node.op == "call_module" else None
        if x is not None and is_link(child(model, node.target)):
            before = runs.pop(x) if x in runs and len(x.users) == 1 else []
            runs[node] = [*before, node]
    return {run[0]: run for run in runs.values() if len(run) > 1}


def _with_steps(model: nn.Module, graph: fx.Graph) -> tuple[fx.Graph, list[_Site]]:
    """The graph with one more input, the list of steps that run its fused calls; and the sites of
    these calls. Containers of blocks are replaced by calls of their blocks."""
    made, values = fx.Graph(), {}
    runs = _runs(model, graph)
    chained = {node for run in runs.values() for node in run[1:]}
    steps, sites = made.placeholder("fused_res_steps"), []

    def add(site: _Site, x: fx.Node) -> fx.Node:
        sites.append(site)
        return made.call_function(_run, (steps, len(sites) - 1, x))

    def add_module(path: str, x: fx.Node) -> fx.Node:
        module = child(model, path)
        if isinstance(module, FusedForward):
            return add(_BlocksSite((path,)), x)
        inside = any(isinstance(m, FusedForward) for m in module.modules())
        plain = type(module) in (nn.Sequential, FusedSequential)
        if not inside or not plain or has_hooks(module):
            return made.call_module(path, (x,))
        for linking, group in groupby(module._modules, lambda name: is_link(module._modules[name])):
            paths = [f"{path}.{name}" for name in group]
            if linking and len(paths) > 1:
                x = add(_BlocksSite(tuple(paths)), x)
                continue
            for each in paths:
                x = add_module(each, x)
        return x

    for node in graph.nodes:
        if node in chained:
            continue
        if node in runs:
            # at the first: a node between them may write to the chain's input
            paths = tuple(one.target for one in runs[node])
            values[runs[node][-1]] = add(_BlocksSite(paths), values[_only_arg(node)])
        elif node.op == "call_function" and node.target is conv_norm_relu:
            x, *rest = node.args
            paths = [p.target if isinstance(p, fx.Node) else p for p in rest]
            values[node] = add(_ConvSite(*paths), values[x])
        elif node.op == "call_module" and _only_arg(node) is not None:
            values[node] = add_module(node.target, values[_only_arg(node)])
        else:
            values[node] = made.node_copy(node, values.__getitem__)
    for node in reversed(made.nodes):
        if node.op == "get_attr" and not node.users:
            made.erase_node(node)
    return made, sites


def _size(x: Tensor) -> tuple:
    return type(x), x.shape, x.stride(), x.dtype, x.device


def _step(size: tuple, run: Step, plain: Step) -> Step:
    def step(x: Tensor) -> Tensor:
        return run(x) if _size(x) == size else plain(x)

    return step


def _above(paths: list[str]) -> list[str]:
    """The paths of all modules above the given paths, without the model itself."""
    found = {}
    for path in paths:
        names = path.split(".")
        found |= dict.fromkeys(".".join(names[:i]) for i in range(1, len(names)))
    return list(found)


class PreparedForward:
    """The forward of ``graph``, which was traced from a model and has fused convolutions."""

    def __init__(self, model: nn.Module, graph: fx.Graph, reads: Reads) -> None:
        """
        Raises:
            Unfusable: the forward read a value that cannot be compared.
        """
        graph, self._sites = _with_steps(model, graph)
        self._forward = function(model, graph)
        called = [n.target for n in graph.nodes if n.op in ("call_module", "get_attr")]
        for site in self._sites:
            paths = site.paths if isinstance(site, _BlocksSite) else site
            called += [path for path in paths if type(path) is str]
        self._containers = _above(called)
        leaves = reads.leaves.difference(self._containers)
        try:
            self._record = Record(model, replace(reads, leaves=leaves), called=leaves)
        except Unknowable as reason:
            raise Unfusable(str(reason)) from None
        self._sizes: dict[tuple, Kept] = {}

    def is_of(self, model: nn.Module) -> bool:
        """Whether everything that the forward read when it was traced is unchanged."""
        if torch.compiler.is_compiling():
            return passes_compiled(model, self._record)
        return guard_of(model, self._record).same

    def forget(self) -> None:
        self._sizes = {}  # a call in another thread keeps the old dictionary

    def __call__(self, model: nn.Module, inputs: list[Tensor], plain: Callable, frozen: bool):
        """``plain(model, *inputs)`` without gradients. ``frozen``: with the weights and modules of
        the first call with inputs of these sizes."""
        usual = all(x.is_cpu and not under_modes(x) for x in inputs)
        if not usual or _has_any_global_hook():
            return plain(model, *inputs)
        sizes, size = self._sizes, tuple(map(size_of, inputs))
        kept = sizes.get(size)
        if kept is None or not (frozen or kept.passes(model)):
            sizes.pop(size, None)  # it keeps replaced modules alive
            return self._prepare(sizes, size, model, inputs)
        return self._forward(model, kept.steps, *inputs)

    def _prepare(
        self, sizes: dict[tuple, Kept], size: tuple, model: nn.Module, inputs: list[Tensor]
    ):
        modules = [model, *(child(model, path) for path in self._containers)]
        guard = ModulesGuard(
            model, modules + [m for site in self._sites for m in site.modules(model)]
        )
        plains = [partial(site.plain, model) for site in self._sites]
        steps, found = list(plains), []

        def recorder(i: int, site: _Site) -> Step:
            def record(x: Tensor) -> Tensor:
                y = plains[i](x)
                one = site.find(model, x)
                if one is not None:
                    steps[i] = _step(_size(x), one.run, plains[i])
                    found.append(one)
                return y

            return record

        y = self._forward(model, [recorder(*pair) for pair in enumerate(self._sites)], *inputs)
        tensors = [t for one in found for t in one.tensors]
        kept = Kept(steps, guard, places_of(found), tensors, fingerprint(tensors))
        # each step's own fingerprint is from before its weights were read
        if kept.passes(model) and _unchanged(found):
            keep(sizes, size, kept)
        return y
