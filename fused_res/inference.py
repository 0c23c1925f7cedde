"""``optimize_for_inference``: a copy of a model, made to serve inputs like one example."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import choices, tuned, tuning
from .graphs import Unfusable, in_words
from .nn.blocks import BlockPlan, child, is_exported, is_norm_act
from .prepared import PreparedForward
from .surgery import FuseReport, fuse_, fused_class, refuse_wrapped, unfuse_
from .tracing import chains, convolves, function, fuse_convolutions, graph_of

WARM_UPS = 3  # before a CUDA graph is captured: libraries choose algorithms and allocate


class _Input(NamedTuple):
    """What an input must be."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any
    weights: list[Tensor]  # keeps the memory that the graph reads


@dataclass
class _Serving:
    """All that an ``OptimizedModel`` has beside its model."""

    inputs: tuple[_Input, ...]
    channels_last: bool
    cuda_graph: bool
    freeze: bool
    report: FuseReport
    traced: bool = False
    output: pytree.TreeSpec | None = None  # a class torch.fx does not keep: dictionaries', say
    run: Callable | None = None  # the forward with its convolutions fused, made when needed
    prepared: PreparedForward | None = None  # the same, and what it runs looked up once
    is_traced: bool | None = None  # of a frozen model, whether it is still what was traced
    captured: _Captured | None = None

    def __getstate__(self):
        return self.__dict__ | dict.fromkeys(("run", "prepared", "is_traced", "captured"))


class OptimizedModel(nn.Module):
    """What ``optimize_for_inference`` returns: the copied model, its class a subclass of its own.

    ``state_dict``, ``load_state_dict``, children, hooks and attributes are the model's. Weights may
    be loaded or changed at any time; of a frozen model, or one with a CUDA graph, call
    ``recapture`` after changing anything other than by its own ``load_state_dict``. Plain Python
    attributes that ``forward`` reads are read when it is made.

    ``forward`` takes tensors by position and runs without gradients (``torch.no_grad``, not
    ``inference_mode``: what it returns may go on into a graph of autograd's). Where gradients of
    the input or weights are wanted use ``fuse_``.

    Raises:
        TypeError, ValueError: an input is not what the model was optimised for; says which.
        RuntimeError: training is asked for, or another device or dtype.
    """

    model_class: type[nn.Module]
    _serving: _Serving

    @property
    def report(self) -> FuseReport:
        """Blocks and convolutions that run fused, and what does not and why. Prints as a table."""
        return self._serving.report

    def extra_repr(self) -> str:
        inputs = [(i.shape, i.dtype, str(i.device)) for i in self._serving.inputs]
        own = super().extra_repr()
        flags = f"cuda_graph={self._serving.cuda_graph}, freeze={self._serving.freeze}"
        return f"{own}{', ' if own else ''}inputs={inputs}, {flags}"

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("mode must be False: the model was optimised for inference")
        return super().train(False)

    def forward(self, *args, **kwargs):
        serving = self._serving
        if serving.cuda_graph and (torch.compiler.is_compiling() or is_exported()):
            raise RuntimeError(
                "a model optimised with cuda_graph=True cannot be exported, traced or compiled: "
                "optimise it with cuda_graph=False for that"
            )
        if is_exported():  # with no change of the grad mode, which is no plain op
            return self._as_returned(self._function()(self, *args, **kwargs))
        inputs = _checked(args, kwargs, serving)
        if not serving.cuda_graph:
            return self._run(inputs)
        if serving.captured is None:
            self.recapture()
        graph, static, output, _ = serving.captured
        for to, given in zip(static, inputs, strict=True):
            to.copy_(given.detach())
        graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, output)

    def _function(self) -> Callable:
        serving = self._serving
        if not serving.traced:
            return type(self)._plain_forward
        if serving.run is None:  # a copy, or read from a file
            self._fuse(graph_of(self, len(serving.inputs)), FuseReport())
        if torch.compiler.is_compiling():
            return serving.run
        if serving.is_traced is None or not serving.freeze:
            serving.is_traced = serving.prepared.is_of(self)
        return serving.run if serving.is_traced else type(self)._plain_forward

    def _fuse(self, graph: fx.Graph, report: FuseReport) -> None:
        fuse_convolutions(self, graph, report)
        self._serving.run = function(self, graph)
        self._serving.prepared = PreparedForward(self, graph)

    def _as_returned(self, y: Any) -> Any:
        kind = self._serving.output
        return y if kind is None else pytree.tree_unflatten(pytree.tree_leaves(y), kind)

    def _run(self, inputs: list[Tensor]):
        with torch.no_grad():
            run, prepared = self._function(), self._serving.prepared
            if prepared is None or run is not self._serving.run or torch.compiler.is_compiling():
                y = run(self, *inputs)
            else:
                y = prepared(self, inputs, run, self._serving.freeze)
        return self._as_returned(y)

    def _plain_forward(self, *inputs, **kwargs):
        return super().forward(*inputs, **kwargs)

    def _forget(self) -> None:
        self._serving.captured = self._serving.is_traced = None
        if self._serving.prepared is not None:
            self._serving.prepared.forget()

    def recapture(self) -> None:
        """Looks at the weights as they are now: captures the CUDA graph again, and forgets what a
        frozen model has kept.

        Raises:
            RuntimeError: the model was made without ``cuda_graph=True`` or ``freeze=True``.
        """
        serving = self._serving
        if not serving.cuda_graph and not serving.freeze:
            raise RuntimeError(
                "there is nothing to capture: it was optimised without cuda_graph or freeze"
            )
        self._forget()  # frees its memory first
        if not serving.cuda_graph:
            return
        device = serving.inputs[0].device
        with torch.cuda.device(device):
            static = [torch.zeros(i.shape, dtype=i.dtype, device=device) for i in serving.inputs]
            static = [_laid_out(t, serving.channels_last) for t in static]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._run(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._run(static)
        weights = [t.detach() for t in (*self.parameters(), *self.buffers())]
        serving.captured = _Captured(graph, static, output, weights)

    def load_state_dict(self, *args, **kwargs):
        self._forget()
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:  # what was kept meanwhile may be of half of the weights
            self._forget()

    def _apply(self, fn, recurse=True):
        # to(), cuda(), half(), ...: what they do to a tensor of no elements tells what they are
        for t in (*self.parameters(), *self.buffers()):
            made = fn(t.new_empty(0))
            if (made.dtype, made.device) != (t.dtype, t.device):
                raise RuntimeError(
                    f"the model was optimised for {t.dtype} on {t.device}, got {made.dtype} on "
                    f"{made.device}: convert the model and optimise that"
                )
        self._forget()
        try:
            return super()._apply(fn, recurse)
        finally:
            self._forget()

    @staticmethod
    def serving(model_class: type[nn.Module]) -> type[OptimizedModel]:
        """The class of a served model of a class."""
        return _optimized_class(model_class)

    def __reduce_ex__(self, protocol):
        # the class is made at run time, so copies and pickles name what it is made from
        cls, fused = type(self).model_class, None
        if "original" in cls.__dict__:  # the whole model is a block that fuse_ changed
            cls, fused = cls.original, (cls.plan, cls.recompute)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (cls, fused), state


@functools.cache
def _optimized_class(model_class: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(model_class.forward)  # exporters name inputs by its signature
    def forward(self, *args, **kwargs):
        return OptimizedModel.forward(self, *args, **kwargs)

    body = {
        "forward": forward,
        "model_class": model_class,
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
    }
    return type(f"Optimized{model_class.__name__}", (OptimizedModel, model_class), body)


def _rebuild(cls: type[nn.Module], fused) -> nn.Module:
    made = _optimized_class(cls if fused is None else fused_class(cls, *fused))
    return made.__new__(made)


def _laid_out(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if channels_last and t.dim() == 4 else t


def _checked(args: tuple, kwargs: dict, serving: _Serving) -> list[Tensor]:
    """The inputs, in the layout the model runs in, if they are what it was optimised for."""
    wanted = serving.inputs
    if kwargs or len(args) != len(wanted):
        names = f" and {', '.join(kwargs)} by name" if kwargs else ""
        raise TypeError(
            f"inputs must be {len(wanted)} tensors by position, as the example, got {len(args)}"
            f"{names}"
        )
    for i, (t, want) in enumerate(zip(args, wanted, strict=True)):
        if not isinstance(t, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(t).__name__}")
        if t.dtype != want.dtype:
            raise TypeError(f"inputs[{i}] must be {want.dtype}, as the example, got {t.dtype}")
        if t.device != want.device:
            raise ValueError(
                f"inputs[{i}] must be on {want.device}, as the example, got {t.device}"
            )
        fixed = 0 if serving.cuda_graph else 1  # the batch is free but in a CUDA graph
        if t.dim() != len(want.shape) or t.shape[fixed:] != want.shape[fixed:]:
            shape = ", ".join((*["batch"] * min(fixed, t.dim()), *map(str, want.shape[fixed:])))
            raise ValueError(
                f"inputs[{i}] must have shape ({shape}), as the example, got {tuple(t.shape)}"
            )
    return [_laid_out(t, serving.channels_last) for t in args]


def _equal(a: Any, b: Any) -> bool:
    """Whether a trace returned ``a`` for ``b``, perhaps by other kernels, which round otherwise."""
    if not isinstance(a, Tensor):
        return type(a) is type(b) and a == b
    rtol, atol = 0.0, 0.0
    if a.is_floating_point():
        rtol = max(1e-5, 2 * torch.finfo(a.dtype).eps)
        atol = 1e-4 * float(b.detach()[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    try:
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError:
        return False
    return True


def _leave_to_the_graph(model: nn.Module, report: FuseReport) -> None:
    """Gives blocks of which no more is fused than the graph of the model will fuse their own
    forward back, so that it is seen."""
    for name in [name for name, _ in report.partly]:
        block = model.get_submodule(name)
        more = isinstance(block.plan.quiet, BlockPlan) or any(
            part.skip == "add" or any(is_norm_act(child(block, s.norm)) for s in part.branch)
            for part in block.plan.usual.parts
        )
        if not more or not name:  # a whole model is a graph itself
            unfuse_(block)
            report.partly = [row for row in report.partly if row[0] != name]


def _fuse_outside_blocks(model: OptimizedModel, inputs: list[Tensor], expected: Any) -> None:
    """Fuses the convolutions outside blocks, if a trace of the model shows all it does."""
    serving, reason = model._serving, None
    wanted, kind = pytree.tree_flatten(expected)
    try:
        graph = graph_of(model, len(inputs))
        with torch.no_grad():
            found, traced_kind = pytree.tree_flatten(function(model, graph)(model, *inputs))
        if len(found) != len(wanted) or not all(map(_equal, found, wanted)):
            reason = "a trace of it does not return what it returns"
        serving.output = None if kind == traced_kind else kind
    except Unfusable as error:
        reason = str(error)
    except Exception as error:
        reason = f"torch.fx cannot trace it: {in_words(error)}"
    if reason is not None:
        serving.report.skipped.append(("", f"convolutions outside blocks: {reason}"))
        return
    serving.traced = True
    model._fuse(graph, serving.report)


def _set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=layout)


def _tune(model: OptimizedModel, inputs: list[Tensor]) -> None:
    """Measures, if a convolution runs that the user's table does not have."""
    with choices.recording() as calls:
        model._run(inputs)
    if all(tuned.find(key.device, choices.row_of(key, {})) for key in calls):
        return
    try:
        tuning.tune(model, tuple(inputs))
    except tuning.TableNotWritten as error:
        warnings.warn(str(error), stacklevel=3)


def _check_example(example: Any, cuda_graph: bool, freeze: bool) -> tuple[Tensor, ...]:
    examples = (example,) if isinstance(example, Tensor) else example
    if not isinstance(examples, (tuple, list)) or not examples:
        got = "an empty one" if examples == () else type(examples).__name__
        raise TypeError(f"example must be a tensor or a tuple of tensors, got {got}")
    for i, t in enumerate(examples):
        if not isinstance(t, Tensor):
            raise TypeError(f"example[{i}] must be a tensor, got {type(t).__name__}")
        if cuda_graph and t.device.type != "cuda":
            raise ValueError(
                f"example[{i}] must be on a CUDA device with cuda_graph=True, got {t.device}"
            )
        if freeze and t.device.type != "cpu":
            raise ValueError(f"example[{i}] must be on a CPU with freeze=True, got {t.device}")
    return tuple(examples)


@torch.inference_mode(False)  # what is made in it has no version counters: nothing could be kept
def optimize_for_inference(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    tune: bool = True,
    cuda_graph: bool = False,
    freeze: bool = False,
    channels_last: bool = True,
) -> OptimizedModel:
    """A copy of ``model`` for serving: in eval mode, channels_last, its blocks and convolutions
    fused.

        serving = fused_res.optimize_for_inference(model, torch.randn(1, 3, 224, 224))
        print(serving.report)
        y = serving(x)

    ``model`` is not changed and shares no memory with the copy, which has the same ``state_dict``
    keys: there are two sets of weights until ``model`` is deleted. Residual blocks are fused as by
    ``fuse_``; elsewhere a convolution with the BatchNorm or ReLU that follows it runs as one op,
    where ``torch.fx`` can trace the model. What is not fused runs as before, and ``report`` says
    why.

    Args:
        model: any module, not wrapped, compiled or scripted.
        example: what it will be called with, a tensor or a tuple of tensors. Inputs must have its
            dtypes, devices and shapes but for the first dimension, the batch, which is free
            without a CUDA graph.
        tune: measure which kernels are fastest for ``example``, as ``fused_res.tune`` does, unless
            its table has them already.
        cuda_graph: capture the forward in a CUDA graph and replay it, which saves the launches of
            small batches. Outputs are copied; the graph serves one thread and stream at a time.
        freeze: on a CPU, trust that weights, modules and hooks stay as they are when inputs of a
            batch size first come, instead of looking at each in every call, which small networks
            notice: ``OptimizedModel.recapture`` after a change.
        channels_last: convert the weights, and each input with 4 dimensions, to this layout. A
            model that cannot run in it is left in the other.

    Returns:
        OptimizedModel: called as ``model`` is, with tensors by position; see there.

    Raises:
        TypeError: ``model`` is not a module, ``example`` not tensors.
        ValueError: ``model`` is wrapped, compiled, scripted, optimised or cannot be copied;
            ``example`` is not on a CUDA device with ``cuda_graph``, or on one with ``freeze``.
        RuntimeError: ``cuda_graph`` without a CUDA device.

    Warns:
        UserWarning: what ``tune`` measured could not be written; it holds in this process.

    Whatever ``model(*example)`` raises is raised too.
    """
    refuse_wrapped(model, "optimize_for_inference")
    if any(isinstance(m, OptimizedModel) for m in model.modules()):
        raise ValueError("model must not be optimised, but it or a part of it is already")
    if cuda_graph and not torch.cuda.is_available():
        raise RuntimeError("cuda_graph=True needs a CUDA device, and PyTorch finds none")
    examples = _check_example(example, cuda_graph, freeze)
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"model must be one that can be copied, got {in_words(error)}") from error
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fuse_ found no residual block")
        report = fuse_(model)
    _leave_to_the_graph(model, report)
    model.__class__ = _optimized_class(type(model))
    inputs = tuple(_Input(tuple(t.shape), t.dtype, t.device) for t in examples)
    serving = model._serving = _Serving(inputs, False, cuda_graph, freeze, report)

    def inputs_again() -> list[Tensor]:  # a forward may write to its input
        return [_laid_out(t.detach().clone(), serving.channels_last) for t in examples]

    expected = model._run(inputs_again())
    if convolves(model) or chains(model):
        _fuse_outside_blocks(model, inputs_again(), expected)
    if channels_last:
        serving.channels_last = True
        _set_layout(model, torch.channels_last)
        try:
            model._run(inputs_again())
        except RuntimeError as error:
            report.skipped.append(("", f"channels_last: {in_words(error)}"))
            serving.channels_last = False
            _set_layout(model, torch.contiguous_format)
    if tune:
        _tune(model, inputs_again())
    if cuda_graph:
        model.recapture()
    return model
