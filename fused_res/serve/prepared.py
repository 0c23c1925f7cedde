"""A traced model's forward whose fused parts are looked up once, not in every part.

A fused block checks in each call whether what it prepared still holds. Between two kernels that
read a network's weights nothing of that is in a cache, and it takes 0.2 ms a block: a tenth of a
ResNet-50 at batch 1. Here the modules of all parts are checked in one pass and their tensors by one
fingerprint.
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

from ..dispatch import inference_conv
from ..fuse.trace import Unfusable
from ..nn.blocks import MOST_SIZES, FusedForward, child, prepared_block, runs_plan
from ..nn.sequential import FusedSequential, chain_of, linked, links, unique
from ..ops.conv_bn_act import under_modes
from ..run.conv_norm import conv_norm_relu, prepared_conv
from ..run.description import Unknowable, has_hooks
from ..run.guards import Record, Watch, guard_of, holds_compiled
from ..run.places import Places
from ..run.reads import Reads
from ..run.weight_cache import fingerprint
from .outside_blocks import function

Step = Callable[[Tensor], Tensor]


class _Found(NamedTuple):
    """``run``: a part for inputs of one size, while ``tensors`` have this fingerprint and
    ``places`` hold."""

    run: Step
    tensors: list[Tensor]
    fingerprint: tuple
    places: Places = Places()


class _Block(NamedTuple):
    path: str

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return list(child(model, self.path).modules())

    def plain(self, model: nn.Module, x: Tensor) -> Tensor:
        return child(model, self.path)(x)

    def find(self, model: nn.Module, x: Tensor) -> _Found | None:
        block = child(model, self.path)
        if not runs_plan(block) or any(map(has_hooks, block.modules())):
            return None
        kept = prepared_block(block, x)
        if kept is None:
            return None
        places, source = guard_of(block, block.plan.record).places, kept.source
        if places is None:
            return None
        return _Found(lambda x: kept.run(x, x), source.tensors, source.fingerprint, places)


class _Chain(NamedTuple):
    """Blocks that follow each other and keep the size of their input."""

    paths: tuple[str, ...]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return [m for path in self.paths for m in child(model, path).modules()]

    def plain(self, model: nn.Module, x: Tensor) -> Tensor:
        for path in self.paths:
            x = child(model, path)(x)
        return x

    def find(self, model: nn.Module, x: Tensor) -> _Found | None:
        blocks = [child(model, path) for path in self.paths]
        made, found, steps, i = list(map(linked, blocks)), [], [], 0
        while i < len(blocks):
            tensors = unique(t for one in made[i:] if one is not None for t in one.tensors)
            before = fingerprint(tensors)
            chain, count = chain_of(blocks[i:], made[i:], x)
            if chain is None:
                one = _Block(self.paths[i]).find(model, x)
            else:
                places = Places()
                for link in made[i : i + count]:
                    places.add(link.places)
                one = _Found(chain, tensors, before, places)
            if one is not None:
                found.append(one)
            steps.append(blocks[i] if one is None else one.run)
            i += count

        def run(x: Tensor) -> Tensor:
            for step in steps:
                x = step(x)
            return x

        tensors = unique(t for one in found for t in one.tensors)
        before = fingerprint(tensors)
        still = all(fingerprint(one.tensors) == one.fingerprint for one in found)
        places = Places()
        for one in found:
            places.add(one.places)
        return _Found(run, tensors, before, places) if found and still else None


class _Conv(NamedTuple):
    """Paths of a convolution and what follows it, or whether a ReLU does."""

    conv: str
    bn: str | None
    relu: str | bool

    def _parts(self, model: nn.Module) -> list:
        return [child(model, p) if type(p) is str else p for p in self]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        return [part for part in self._parts(model) if isinstance(part, nn.Module)]

    def plain(self, model: nn.Module, x: Tensor) -> Tensor:
        return conv_norm_relu(x, *self._parts(model))

    def find(self, model: nn.Module, x: Tensor) -> _Found | None:
        found = prepared_conv(x, *self._parts(model))
        return None if found is None else _Found(*found)


_Part = _Block | _Chain | _Conv


def _run(steps: list[Step], i: int, x: Tensor) -> Tensor:
    return steps[i](x)


def _only_arg(node: fx.Node) -> fx.Node | None:
    alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return node.args[0] if alone else None


def _runs(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """By the first: calls of blocks that may be part of a chain, each of what the one before
    returns to it alone."""
    runs: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        x = _only_arg(node) if node.op == "call_module" else None
        if x is not None and links(child(model, node.target)):
            before = runs.pop(x) if x in runs and len(x.users) == 1 else []
            runs[node] = [*before, node]
    return {run[0]: run for run in runs.values() if len(run) > 1}


def _with_steps(model: nn.Module, graph: fx.Graph) -> tuple[fx.Graph, list[_Part]]:
    """The graph with one more input, a list of what runs each fused part; and the parts. Blocks in
    containers are called in the containers' place."""
    made, values = fx.Graph(), {}
    runs = _runs(model, graph)
    chained = {node for run in runs.values() for node in run[1:]}
    steps, parts = made.placeholder("fused_res_steps"), []

    def add(part: _Part, x: fx.Node) -> fx.Node:
        parts.append(part)
        return made.call_function(_run, (steps, len(parts) - 1, x))

    def add_module(path: str, x: fx.Node) -> fx.Node:
        module = child(model, path)
        if isinstance(module, FusedForward):
            return add(_Block(path), x)
        inside = any(isinstance(m, FusedForward) for m in module.modules())
        plain = type(module) in (nn.Sequential, FusedSequential)
        if not inside or not plain or has_hooks(module):
            return made.call_module(path, (x,))
        for linking, group in groupby(module._modules, lambda name: links(module._modules[name])):
            paths = [f"{path}.{name}" for name in group]
            if linking and len(paths) > 1:
                x = add(_Chain(tuple(paths)), x)
                continue
            for each in paths:
                x = add_module(each, x)
        return x

    for node in graph.nodes:
        if node in chained:
            continue
        if node in runs:
            # in place of the first: what comes between them may write to the chain's input
            paths = tuple(one.target for one in runs[node])
            values[runs[node][-1]] = add(_Chain(paths), values[_only_arg(node)])
        elif node.op == "call_function" and node.target is conv_norm_relu:
            x, *rest = node.args
            paths = [p.target if isinstance(p, fx.Node) else p for p in rest]
            values[node] = add(_Conv(*paths), values[x])
        elif node.op == "call_module" and _only_arg(node) is not None:
            values[node] = add_module(node.target, values[_only_arg(node)])
        else:
            values[node] = made.node_copy(node, values.__getitem__)
    for node in reversed(made.nodes):
        if node.op == "get_attr" and not node.users:
            made.erase_node(node)
    return made, parts


class _Kept(NamedTuple):
    """What runs the parts of inputs of some sizes; ``forgotten``: how often all had been."""

    watch: Watch
    places: Places
    tensors: list[Tensor]
    fingerprint: tuple
    steps: list[Step]
    forgotten: int

    def holds(self) -> bool:
        return (
            self.watch.holds()
            and self.places.hold()
            and fingerprint(self.tensors) == self.fingerprint
        )


def _size(x: Tensor) -> tuple:
    return type(x), x.shape, x.stride(), x.dtype, x.device


def _step(size: tuple, run: Step, plain: Step) -> Step:
    def step(x: Tensor) -> Tensor:
        return run(x) if _size(x) == size else plain(x)

    return step


def _above(paths: list[str]) -> list[str]:
    """The paths of all modules that lead to some, but for the model itself."""
    found = {}
    for path in paths:
        names = path.split(".")
        found |= dict.fromkeys(".".join(names[:i]) for i in range(1, len(names)))
    return list(found)


class PreparedForward:
    """The forward of ``graph``, traced from a model with its convolutions fused."""

    def __init__(self, model: nn.Module, graph: fx.Graph, reads: Reads) -> None:
        """
        Raises:
            Unfusable: the forward read something that cannot be compared.
        """
        graph, self._parts = _with_steps(model, graph)
        self._forward = function(model, graph)
        called = [n.target for n in graph.nodes if n.op in ("call_module", "get_attr")]
        for part in self._parts:
            called += [
                p for p in (part.paths if isinstance(part, _Chain) else part) if type(p) is str
            ]
        self._containers = _above(called)
        leaves = reads.leaves.difference(self._containers)
        try:
            self._record = Record(model, replace(reads, leaves=leaves), calls=True)
        except Unknowable as reason:
            raise Unfusable(str(reason)) from None
        self._kept: dict[tuple, _Kept] = {}
        self._forgotten = 0  # times

    def is_of(self, model: nn.Module) -> bool:
        """Whether all that the model's forward read when it was traced is as it was."""
        if torch.compiler.is_compiling():
            return holds_compiled(model, self._record)
        return guard_of(model, self._record).same

    def forget(self) -> None:
        self._forgotten += 1
        self._kept.clear()

    def __call__(self, model: nn.Module, inputs: list[Tensor], plain: Callable, frozen: bool):
        """``plain(model, *inputs)``, without gradients. Frozen: as it was when inputs of these
        sizes came first."""
        usual = all(x.is_cpu and not under_modes(x) for x in inputs)
        if not usual or _has_any_global_hook():
            return plain(model, *inputs)
        sizes = [(x.shape, x.stride(), x.dtype) for x in inputs]
        key = *sizes, torch.get_num_threads(), *inference_conv.state()
        kept = self._kept.get(key)
        if kept is None or kept.forgotten != self._forgotten or not (frozen or kept.holds()):
            return self._prepare(key, model, inputs)
        return self._forward(model, kept.steps, *inputs)

    def _prepare(self, key: tuple, model: nn.Module, inputs: list[Tensor]):
        self._kept.pop(key, None)  # it keeps what was replaced
        forgotten = self._forgotten
        modules = [model, *(child(model, path) for path in self._containers)]
        watch = Watch(modules + [m for part in self._parts for m in part.modules(model)])
        plains = [partial(part.plain, model) for part in self._parts]
        steps, found = list(plains), []

        def recorder(i: int, part: _Part) -> Step:
            def record(x: Tensor) -> Tensor:
                y = plains[i](x)
                one = part.find(model, x)
                if one is not None:
                    steps[i] = _step(_size(x), one.run, plains[i])
                    found.append(one)
                return y

            return record

        y = self._forward(model, [recorder(*p) for p in enumerate(self._parts)], *inputs)
        if not found:
            return y
        tensors = [t for one in found for t in one.tensors]
        places = Places()
        for one in found:
            places.add(one.places)
        kept = _Kept(watch, places, tensors, fingerprint(tensors), steps, forgotten)
        # what was found holds still, so the fingerprint of all is of what it was made from
        if kept.holds() and all(fingerprint(one.tensors) == one.fingerprint for one in found):
            while len(self._kept) >= MOST_SIZES:
                self._kept.pop(next(iter(tuple(self._kept)), None), None)
            self._kept[key] = kept  # of no use if all was forgotten meanwhile
        return y
