"""``OptimizedModel``: the class of the models that ``optimize_for_inference`` returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..fuse.modules import is_exported
from ..fuse.swap import FuseReport, fused_class
from ..nn.blocks import with_signature_of
from ..run.reads import Reads
from ..run.weight_cache import forget_weights
from .calls import Call, Parameters, has_no_tensor
from .outside_blocks import function, fuse_convolutions, graph_of
from .prepared import PreparedForward

WARM_UPS = 3  # before a CUDA graph is captured: cuDNN and cuBLAS choose algorithms


class Input(NamedTuple):
    """A tensor of the example."""

    shape: tuple[int, ...]
    rank: int
    rest: tuple[int, ...]  # the shape without the batch
    dtype: torch.dtype
    device: torch.device

    def is_of(self, t: Tensor) -> bool:
        return t.dtype == self.dtype and t.device == self.device

    def fits(self, t: Tensor, any_size: bool) -> bool:
        if t.dim() != self.rank:
            return False
        images = any_size and t.dim() == 4
        return t.shape[1] == self.shape[1] if images else t.shape[1:] == self.rest


def input_like(t: Tensor) -> Input:
    return Input(tuple(t.shape), t.dim(), tuple(t.shape[1:]), t.dtype, t.device)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any
    weights: list[Tensor]  # keeps the memory that the graph reads


@dataclass
class Serving:
    """The state of an ``OptimizedModel`` beside the model."""

    call: Call
    inputs: tuple[Input, ...]
    channels_last: bool
    cuda_graph: bool
    freeze: bool
    report: FuseReport
    traced: bool = False
    any_size: bool = False  # the trace is right for other heights and widths
    output: pytree.TreeSpec | None = None  # if torch.fx does not keep the output's classes
    run: Callable | None = None  # the forward with its convolutions fused
    prepared: PreparedForward | None = None  # the same, with its steps looked up once
    is_traced: bool | None = None  # of a frozen model: it is as it was traced
    captured: _Captured | None = None

    def __getstate__(self):
        return self.__dict__ | dict.fromkeys(("run", "prepared", "is_traced", "captured"))


class OptimizedModel(nn.Module):
    """A copy of a model for serving, made by ``optimize_for_inference``. Its class is a subclass of
    the model's class.

    ``state_dict``, ``load_state_dict``, children, hooks and attributes are the model's. Weights may
    be loaded or changed at any time. With ``freeze`` or ``cuda_graph``, call ``recapture`` after
    every change, unless it was made by the model's own ``load_state_dict``. If another value that
    ``forward`` reads (an attribute, a global, a helper function) has changed, the model's own
    forward runs, with fused blocks.

    ``forward`` has the signature of the model's forward, and returns the same. Calls that differ
    from the example in the tensors' values, batch, height and width run fused as a whole. Other
    calls (another optional argument, one tensor given twice) run the model's own forward, with
    fused blocks. Both run under ``torch.no_grad``, not ``inference_mode``: autograd may use the
    results. For gradients of the input or the weights use ``fuse_`` alone.

    Raises:
        TypeError, ValueError: in a call, an input has another dtype or device than in the example;
            or, with a CUDA graph, another argument or shape differs. The message names it.
        RuntimeError: ``train()`` was called, or a conversion to another device or dtype.

    Examples:
        >>> net = fused_res.models.create("resnet20")
        >>> served = fused_res.optimize_for_inference(net, torch.randn(1, 3, 32, 32), tune=False)
        >>> served(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    # names begin with _serving, so that none hides an attribute of the model
    model_class: type[nn.Module]
    _serving_parameters: Parameters
    _serving: Serving

    @property
    def report(self) -> FuseReport:
        """The fused blocks and convolutions, and the skipped ones with reasons."""
        return self._serving.report

    def extra_repr(self) -> str:
        inputs = [(i.shape, i.dtype, str(i.device)) for i in self._serving.inputs]
        own = super().extra_repr()
        flags = f"cuda_graph={self._serving.cuda_graph}, freeze={self._serving.freeze}"
        return f"{own}{', ' if own else ''}inputs={inputs}, {flags}"

    def _get_name(self) -> str:
        return f"Optimized{super()._get_name()}"

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
        if is_exported():  # without changing the grad mode, which is no plain op
            inputs = serving.call.inputs(self._serving_parameters, args, kwargs)
            ranks = [i.rank for i in serving.inputs]
            if inputs is None or not _distinct(inputs) or [t.dim() for t in inputs] != ranks:
                return super().forward(*args, **kwargs)
            run = self._serving_function()
            y = run(self, *inputs)
            return self._serving_as_returned(y) if run is serving.run else y
        if not serving.cuda_graph:
            return self._serving_answer(args, kwargs)
        inputs = self._serving_inputs(args, kwargs)
        if inputs is None:
            return self._serving_answer(args, kwargs)
        if serving.captured is None:
            self.recapture()
        graph, static, output, _ = serving.captured
        for to, given in zip(static, inputs, strict=True):
            to.copy_(given.detach())
        graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, output)

    def _serving_inputs(self, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The tensors of a call that the example's trace can run, else None.

        Raises:
            TypeError, ValueError: a tensor has another dtype or device than in the example, or a
                CUDA graph cannot run the call.
        """
        serving = self._serving
        order = serving.call.forms.get((len(args), *kwargs))
        if order:  # the fast path
            values = (*args, *kwargs.values()) if kwargs else args
            inputs = [values[i] for i in order]
            for t, (_, rank, rest, dtype, device) in zip(inputs, serving.inputs, strict=True):
                if not isinstance(t, Tensor) or t.dtype != dtype or t.device != device:
                    break
                if t.shape[1:] != rest or t.dim() != rank:
                    break
            else:
                if len(inputs) == 1 or _distinct(inputs):
                    return inputs
        inputs = serving.call.inputs(self._serving_parameters, args, kwargs)
        if inputs is not None:
            pairs = list(zip(inputs, serving.inputs, strict=True))
        elif torch.compiler.is_compiling():
            return None
        else:
            shared = serving.call.shared(self._serving_parameters, args, kwargs)
            pairs = [(t, serving.inputs[i]) for i, t in shared]
        for t, want in pairs:
            if not want.is_of(t) or serving.cuda_graph:
                _check(t, want, args, kwargs, serving.cuda_graph)
        if inputs is None and serving.cuda_graph:
            raise TypeError(
                "a model optimised with cuda_graph=True must be called with the example's "
                f"arguments, got {_in_short(args, kwargs)}"
            )
        if inputs is None or not _distinct(inputs):  # a trace takes the two for different tensors
            return None
        return inputs if all(want.fits(t, serving.any_size) for t, want in pairs) else None

    def _serving_answer(self, args: tuple, kwargs: dict):
        """Runs a call that is not exported and has no CUDA graph."""
        channels_last = self._serving.channels_last
        inputs = self._serving_inputs(args, kwargs)
        if inputs is not None:
            laid = [_laid_out(t) for t in inputs] if channels_last else inputs
            y = self._serving_run(laid)
        else:
            inputs = laid = values = [*args, *kwargs.values()]
            if channels_last and all(isinstance(v, Tensor) or has_no_tensor(v) for v in values):
                made = {id(v): _laid_out(v) for v in values if isinstance(v, Tensor)}
                laid = [made.get(id(v), v) for v in values]
            named = dict(zip(kwargs, laid[len(args) :], strict=True))
            with torch.no_grad():
                y = super().forward(*laid[: len(args)], **named)
        if laid is not inputs:
            for given, made in zip(inputs, laid, strict=True):
                if made is not given:
                    _write_back(given, made)
        return y

    def _serving_function(self) -> Callable:
        serving = self._serving
        if not serving.traced:
            return type(self)._plain_forward
        if serving.run is None:  # a copy, or read from a file
            try:
                self._serving_fuse(*graph_of(self, len(serving.inputs)), FuseReport())
            except Exception:  # the code may have changed since it was saved
                serving.traced = False
                return type(self)._plain_forward
        if torch.compiler.is_compiling():
            return serving.run if serving.prepared.is_of(self) else type(self)._plain_forward
        if serving.is_traced is None or not serving.freeze:
            serving.is_traced = serving.prepared.is_of(self)
        return serving.run if serving.is_traced else type(self)._plain_forward

    def _serving_fuse(self, graph: fx.Graph, reads: Reads, report: FuseReport) -> None:
        found = FuseReport()
        fuse_convolutions(self, graph, found)
        self._serving.prepared = PreparedForward(self, graph, reads)
        self._serving.run = function(self, graph)
        report.fused += found.fused
        report.skipped += found.skipped

    def _serving_as_returned(self, y: Any) -> Any:
        kind = self._serving.output
        return y if kind is None else pytree.tree_unflatten(pytree.tree_leaves(y), kind)

    def _serving_run(self, inputs: list[Tensor]):
        serving = self._serving
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # no_grad does the same and takes 1 us longer
        try:
            run, prepared = self._serving_function(), serving.prepared
            if prepared is None or run is not serving.run:
                return run(self, *inputs)
            if torch.compiler.is_compiling():
                y = run(self, *inputs)
            else:
                y = prepared(self, inputs, run, serving.freeze)
        finally:
            torch._C._set_grad_enabled(grad)
        return self._serving_as_returned(y)

    def _plain_forward(self, *inputs):
        """The model's own forward, called as the example was."""
        args, kwargs = self._serving.call.with_tensors(inputs)
        return super().forward(*args, **kwargs)

    def _serving_forget(self) -> None:
        self._serving.captured = self._serving.is_traced = None
        if self._serving.prepared is not None:
            self._serving.prepared.forget()

    def recapture(self) -> None:
        """Updates the model after a change of weights or modules: captures the CUDA graph again,
        and forgets the kept steps of a frozen model.

        Raises:
            RuntimeError: the model was made without ``cuda_graph=True`` or ``freeze=True``.
        """
        serving = self._serving
        if not serving.cuda_graph and not serving.freeze:
            raise RuntimeError(
                "there is nothing to capture: it was optimised without cuda_graph or freeze"
            )
        forget_weights()
        self._serving_forget()  # frees the old graph's memory first
        if not serving.cuda_graph:
            return
        device = serving.inputs[0].device
        with torch.cuda.device(device):
            static = [torch.zeros(i.shape, dtype=i.dtype, device=device) for i in serving.inputs]
            if serving.channels_last:
                static = list(map(_laid_out, static))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._serving_run(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._serving_run(static)
        weights = [t.detach() for t in (*self.parameters(), *self.buffers())]
        serving.captured = _Captured(graph, static, output, weights)

    def load_state_dict(self, *args, **kwargs):
        self._serving_forget()
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:  # steps that were kept meanwhile may have some old weights
            self._serving_forget()

    def _apply(self, fn, recurse=True):
        # for to(), cuda(), half(), ...: an empty tensor shows the new dtype and device
        for t in (*self.parameters(), *self.buffers()):
            made = fn(t.new_empty(0))
            if (made.dtype, made.device) != (t.dtype, t.device):
                raise RuntimeError(
                    f"the model was optimised for {t.dtype} on {t.device}, got {made.dtype} on "
                    f"{made.device}: convert the model and optimise that"
                )
        self._serving_forget()
        try:
            return super()._apply(fn, recurse)
        finally:
            self._serving_forget()

    def __reduce_ex__(self, protocol):
        # the class is made at run time, so copies and pickles name its sources
        cls, fused = type(self).model_class, None
        if "original" in cls.__dict__:  # the whole model is a block that fuse_ changed
            cls, fused = cls.original, (cls.plan, cls.recompute)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (cls, fused), state


@functools.cache
def optimized_class(model_class: type[nn.Module]) -> type[nn.Module]:
    # the class before fuse_ has the signature of the forward
    original = model_class.__dict__.get("original", model_class)

    body = {
        # exporters name inputs by its signature
        "forward": with_signature_of(OptimizedModel.forward, original.forward),
        "model_class": model_class,
        "_serving_parameters": Parameters(original.forward),
        "_serving_class": staticmethod(optimized_class),  # fuse_ must not import this module
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "__qualname__": f"Optimized{original.__qualname__}",
    }
    # the original name: transformers saves it and looks it up
    return type(original.__name__, (OptimizedModel, model_class), body)


def _rebuild(cls: type[nn.Module], fused) -> nn.Module:
    made = optimized_class(cls if fused is None else fused_class(cls, *fused))
    return made.__new__(made)


def _laid_out(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # else it has no version counter
            return t.contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.channels_last)


def _distinct(inputs: list[Tensor]) -> bool:
    return len(set(map(id, inputs))) == len(inputs)


def _write_back(given: Tensor, made: Tensor) -> None:
    """Copies the result back to the input if the forward wrote to the converted tensor."""
    if not torch.compiler.is_compiling() and not made.is_inference() and made._version:
        with torch.no_grad():
            given.copy_(made)


def _place(t: Tensor, args: tuple, kwargs: dict) -> str:
    """The name or position of the argument that is the tensor."""
    for i, value in enumerate(args):
        if value is t:
            return f"inputs[{i}]"
    return next(name for name, value in kwargs.items() if value is t)


def _check(t: Tensor, want: Input, args: tuple, kwargs: dict, fixed: bool) -> None:
    where = _place(t, args, kwargs)
    if t.dtype != want.dtype:
        raise TypeError(f"{where} must be {want.dtype}, as the example, got {t.dtype}")
    if t.device != want.device:
        raise ValueError(f"{where} must be on {want.device}, as the example, got {t.device}")
    if fixed and t.shape != want.shape:
        raise ValueError(
            f"{where} must have shape {want.shape}, as the example, got {tuple(t.shape)}"
        )


def _in_short(args: tuple, kwargs: dict) -> str:
    def words(value: Any) -> str:
        return "a tensor" if isinstance(value, Tensor) else f"{value!r:.40}"

    given = [words(v) for v in args] + [f"{name}={words(v)}" for name, v in kwargs.items()]
    return f"({', '.join(given)})"
