"""``optimize_for_inference``: a copy of a model, made to serve inputs like one example."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..dispatch import inference_conv, tuning, user_timings
from ..fuse.modules import child, is_exported, is_norm_act
from ..fuse.plan import BlockPlan
from ..fuse.swap import FuseReport, fuse_, fused_class, refuse_wrapped, unfuse_
from ..fuse.trace import Unfusable, in_words
from ..run.reads import Reads
from ..run.weight_cache import forget_weights
from .calls import Call, Parameters, example_call, holds_no_tensor, is_plain
from .outside_blocks import chains, convolves, function, fuse_convolutions, graph_of
from .prepared import PreparedForward

WARM_UPS = 3  # before a CUDA graph is captured: libraries choose algorithms and allocate


class _Input(NamedTuple):
    """A tensor of the example."""

    shape: tuple[int, ...]
    rank: int
    rest: tuple[int, ...]  # of the shape, without the batch
    dtype: torch.dtype
    device: torch.device

    def is_of(self, t: Tensor) -> bool:
        return t.dtype == self.dtype and t.device == self.device

    def fits(self, t: Tensor, any_size: bool) -> bool:
        if t.dim() != self.rank:
            return False
        images = any_size and t.dim() == 4
        return t.shape[1] == self.shape[1] if images else t.shape[1:] == self.rest


def _input_like(t: Tensor) -> _Input:
    return _Input(tuple(t.shape), t.dim(), tuple(t.shape[1:]), t.dtype, t.device)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Any
    weights: list[Tensor]  # keeps the memory that the graph reads


@dataclass
class _Serving:
    """All that an ``OptimizedModel`` has beside its model."""

    call: Call
    inputs: tuple[_Input, ...]
    channels_last: bool
    cuda_graph: bool
    freeze: bool
    report: FuseReport
    traced: bool = False
    any_size: bool = False  # the trace was found to be right for another height and width
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
    ``recapture`` after changing anything other than by its own ``load_state_dict``. Where what else
    ``forward`` reads (attributes, globals, helper functions) differs from when it was made, the
    model's own forward runs, in which its blocks are fused still.

    ``forward`` has the model's signature and returns what the model returns:

        served = fused_res.optimize_for_inference(model, {"pixel_values": images})
        served(pixel_values=images).logits
        served(other_images, output_hidden_states=True).hidden_states

    Calls that differ from the example in their tensors' values, batch, height and width run fused
    as a whole. Others (another optional argument, one tensor given twice) run the model's own
    forward, in which its blocks are fused still. Both run without gradients (``torch.no_grad``, not
    ``inference_mode``: what it returns may go on into a graph of autograd's). Where gradients of
    the input or weights are wanted use ``fuse_``.

    Raises:
        TypeError, ValueError: an input has another dtype or device than in the example, or, with a
            CUDA graph, the call is another one; says which.
        RuntimeError: training is asked for, or another device or dtype.
    """

    # names that begin with _serving, so that none hides one of the model's own
    model_class: type[nn.Module]
    _serving_parameters: Parameters
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
        if is_exported():  # with no change of the grad mode, which is no plain op
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
        """The tensors of a call that the example's trace does; None where it is another call.

        Raises:
            TypeError, ValueError: a tensor that the example has too is of another dtype or device;
                it is another call for a CUDA graph.
        """
        serving = self._serving
        order = serving.call.forms.get((len(args), *kwargs))
        if order:  # what is called most comes out of here
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
        if inputs is None or not _distinct(inputs):  # a trace does not know two as one
            return None
        return inputs if all(want.fits(t, serving.any_size) for t, want in pairs) else None

    def _serving_answer(self, args: tuple, kwargs: dict):
        """What a call returns that is not exported and has no CUDA graph."""
        channels_last = self._serving.channels_last
        inputs = self._serving_inputs(args, kwargs)
        if inputs is not None:
            laid = [_laid_out(t) for t in inputs] if channels_last else inputs
            y = self._serving_run(laid)
        else:
            inputs = laid = values = [*args, *kwargs.values()]
            if channels_last and all(isinstance(v, Tensor) or holds_no_tensor(v) for v in values):
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
            except Exception:  # the code may be another than when it was written
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
        torch._C._set_grad_enabled(False)  # as no_grad does, which takes a microsecond
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
        forget_weights()
        self._serving_forget()  # frees its memory first
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
        finally:  # what was kept meanwhile may be of half of the weights
            self._serving_forget()

    def _apply(self, fn, recurse=True):
        # to(), cuda(), half(), ...: what they do to a tensor of no elements tells what they are
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
    # a block that fuse_ changed has the forward of the class that it was
    original = model_class.__dict__.get("original", model_class)

    own = OptimizedModel.forward
    forward = FunctionType(own.__code__, own.__globals__, closure=own.__closure__)
    functools.update_wrapper(forward, original.forward)  # exporters name inputs by its signature
    body = {
        "forward": forward,
        "model_class": model_class,
        "_serving_parameters": Parameters(original.forward),
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
        "__qualname__": f"Optimized{original.__qualname__}",
    }
    # the name that its class has in libraries: transformers writes and looks it up
    return type(original.__name__, (OptimizedModel, model_class), body)


def _rebuild(cls: type[nn.Module], fused) -> nn.Module:
    made = _optimized_class(cls if fused is None else fused_class(cls, *fused))
    return made.__new__(made)


def _laid_out(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # else it does not count what is written into it
            return t.contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.channels_last)


def _distinct(inputs: list[Tensor]) -> bool:
    return len(set(map(id, inputs))) == len(inputs)


def _write_back(given: Tensor, made: Tensor) -> None:
    """Does to an input what a forward did to the tensor that was made of it."""
    if not torch.compiler.is_compiling() and not made.is_inference() and made._version:
        with torch.no_grad():
            given.copy_(made)


def _place(t: Tensor, args: tuple, kwargs: dict) -> str:
    """Words for the argument that a tensor is."""
    for i, value in enumerate(args):
        if value is t:
            return f"inputs[{i}]"
    return next(name for name, value in kwargs.items() if value is t)


def _check(t: Tensor, want: _Input, args: tuple, kwargs: dict, fixed: bool) -> None:
    if t.dtype != want.dtype:
        where = _place(t, args, kwargs)
        raise TypeError(f"{where} must be {want.dtype}, as the example, got {t.dtype}")
    if t.device != want.device:
        where = _place(t, args, kwargs)
        raise ValueError(f"{where} must be on {want.device}, as the example, got {t.device}")
    if fixed and t.shape != want.shape:
        where = _place(t, args, kwargs)
        raise ValueError(
            f"{where} must have shape {want.shape}, as the example, got {tuple(t.shape)}"
        )


def _in_short(args: tuple, kwargs: dict) -> str:
    def words(value: Any) -> str:
        return "a tensor" if isinstance(value, Tensor) else f"{value!r:.40}"

    given = [words(v) for v in args] + [f"{name}={words(v)}" for name, v in kwargs.items()]
    return f"({', '.join(given)})"


def _equal(a: Any, b: Any) -> bool:
    """Whether a trace returned ``a`` for ``b``, perhaps by other kernels, which round otherwise."""
    if type(a) is type(b) and is_dataclass(a):  # and nothing that pytree knows
        return all(_all_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
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


def _all_equal(a: Any, b: Any) -> bool:
    found, wanted = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(found) == len(wanted) and all(map(_equal, found, wanted))


def _leave_to_the_graph(model: nn.Module, report: FuseReport) -> None:
    """Gives blocks of which no more is fused than the graph of the model will fuse their own
    forward back, so that it is seen."""
    for name in [name for name, _ in report.partly]:
        block = model.get_submodule(name)
        more = isinstance(block.plan.quiet, BlockPlan) or any(
            part.skip == "add" or any(is_norm_act(child(block, s.norm)) for s in part.branch)
            for part in block.plan.usual.segments
        )
        if not more or not name:  # a whole model is a graph itself
            unfuse_(block)
            report.partly = [row for row in report.partly if row[0] != name]


def _is_for_any_size(model: OptimizedModel, run: Callable, inputs: list[Tensor]) -> bool:
    """Whether a trace does what the model does for images of another height and width, too: where
    the forward asks for sizes, a trace may have kept the example's."""
    if not any(t.dim() == 4 for t in inputs):
        return False

    def half(t: Tensor) -> Tensor:
        return t[..., : (t.shape[-2] + 1) // 2, : (t.shape[-1] + 1) // 2]

    def double(t: Tensor) -> Tensor:
        return t.repeat(1, 1, 2, 2)

    for change in (half, double):
        if all(change(t).shape == t.shape for t in inputs if t.dim() == 4):
            continue

        def others(change: Callable = change) -> list[Tensor]:
            return [change(t).clone() if t.dim() == 4 else t.clone() for t in inputs]

        try:
            expected = model._plain_forward(*others())
        except Exception:  # whatever a forward raises of a size that it does not take
            continue
        try:
            return _all_equal(run(model, *others()), expected)
        except Exception:
            return False
    return False


def _fuse_outside_blocks(model: OptimizedModel, inputs: list[Tensor], expected: Any) -> None:
    """Fuses the convolutions outside blocks, if a trace of the model shows all it does."""
    serving, reason = model._serving, None
    wanted, kind = pytree.tree_flatten(expected)
    try:
        graph, reads = graph_of(model, len(inputs))
        run = function(model, graph)
        with torch.no_grad():
            found, traced_kind = pytree.tree_flatten(run(model, *[t.clone() for t in inputs]))
            if len(found) != len(wanted) or not all(map(_equal, found, wanted)):
                reason = "a trace of it does not return what it returns"
            serving.any_size = reason is None and _is_for_any_size(model, run, inputs)
        serving.output = None if kind == traced_kind else kind
    except Unfusable as error:
        reason = str(error)
    except Exception as error:
        reason = f"torch.fx cannot trace it: {in_words(error)}"
    if reason is not None:
        serving.report.skipped.append(("", f"convolutions outside blocks: {reason}"))
        return
    try:
        model._serving_fuse(graph, reads, serving.report)
    except Unfusable as error:
        serving.report.skipped.append(("", f"convolutions outside blocks: {error}"))
        return
    serving.traced = True


def _set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=layout)


def _tune(model: OptimizedModel, args: tuple, kwargs: dict) -> None:
    """Measures, if a convolution runs that the user's table does not have."""
    with inference_conv.recording() as calls:
        model._serving_answer(args, kwargs)
    if all(user_timings.find(key.device, inference_conv.row_of(key, {})) for key in calls):
        return
    try:
        tuning.tune(model, kwargs or args)
    except tuning.TableNotWritten as error:
        warnings.warn(str(error), stacklevel=3)


def _check_example(args: tuple, kwargs: dict, cuda_graph: bool, freeze: bool) -> None:
    for name, t in (*enumerate(args), *kwargs.items()):
        if not isinstance(t, Tensor):
            if cuda_graph and not is_plain(t):
                raise TypeError(
                    f"example[{name!r}] must be a tensor or a plain value with cuda_graph=True, "
                    f"got {type(t).__name__}"
                )
            continue
        if cuda_graph and t.device.type != "cuda":
            raise ValueError(
                f"example[{name!r}] must be on a CUDA device with cuda_graph=True, got {t.device}"
            )
        if freeze and t.device.type != "cpu":
            raise ValueError(f"example[{name!r}] must be on a CPU with freeze=True, got {t.device}")


@torch.inference_mode(False)  # what is made in it has no version counters: nothing could be kept
def optimize_for_inference(
    model: nn.Module,
    example: Tensor | tuple[Tensor | None, ...] | Mapping[str, Any],
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
        example: what it will be called with: a tensor, a tuple of tensors, or a dict of keyword
            inputs (``{"pixel_values": images}``, or what a processor of transformers returns), in
            which other values may be. Tensors must have its dtypes and devices. Calls like it, of
            any batch, height and width, run fastest; others run too (see ``OptimizedModel``), but
            for those of a CUDA graph, which has the example's shapes.
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
        OptimizedModel: called as ``model`` is, with its signature; see there.

    Raises:
        TypeError: ``model`` is not a module, ``example`` not tensors or a dict that has some.
        ValueError: ``model`` is wrapped, compiled, scripted, optimised or cannot be copied;
            ``example`` is not on a CUDA device with ``cuda_graph``, or on one with ``freeze``.
        RuntimeError: ``cuda_graph`` without a CUDA device.

    Warns:
        UserWarning: what ``tune`` measured could not be written; it holds in this process.

    Whatever ``model`` raises of the example is raised too.
    """
    refuse_wrapped(model, "optimize_for_inference")
    if any(isinstance(m, OptimizedModel) for m in model.modules()):
        raise ValueError("model must not be optimised, but it or a part of it is already")
    if cuda_graph and not torch.cuda.is_available():
        raise RuntimeError("cuda_graph=True needs a CUDA device, and PyTorch finds none")
    args, kwargs = example_call(example)
    _check_example(args, kwargs, cuda_graph, freeze)
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
    call = Call(model._serving_parameters, args, kwargs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    inputs = tuple(map(_input_like, tensors))
    serving = model._serving = _Serving(call, inputs, False, cuda_graph, freeze, report)

    def again() -> tuple[tuple, dict[str, Any]]:  # a forward may write to its input
        return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))

    expected = model._serving_answer(*again())
    if not call.is_known:
        report.skipped.append(
            (
                "",
                "convolutions outside blocks: an argument is neither a tensor nor a plain value",
            )
        )
    elif convolves(model) or chains(model):
        _fuse_outside_blocks(model, [t.detach().clone() for t in tensors], expected)
    if channels_last:
        serving.channels_last = True
        _set_layout(model, torch.channels_last)
        try:
            model._serving_answer(*again())
        except RuntimeError as error:
            report.skipped.append(("", f"channels_last: {in_words(error)}"))
            serving.channels_last = False
            _set_layout(model, torch.contiguous_format)
        else:
            report.advice.clear()  # it is followed
    if tune:
        _tune(model, *again())
    if cuda_graph:
        model.recapture()
    return model


def refresh(model: nn.Module) -> None:
    """Makes all that was derived from weights new when it is used next, and captures what has a
    CUDA graph again.

    Most changes of weights are seen without: by an optimizer, ``load_state_dict``, operations in
    place, whole weights through ``.data``. Single values that are written past PyTorch's version
    counters are not: through ``numpy()``, DLPack, ``.data``, raw operators such as
    ``torch._fused_sgd_``, or by another process to shared memory.

        model.conv1.weight.detach().numpy()[0, 0] = 0
        fused_res.refresh(model)

    Args:
        model: any module that has fused blocks, or what ``optimize_for_inference`` returned.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    forget_weights()
    for module in model.modules():
        if isinstance(module, OptimizedModel):
            if module._serving.cuda_graph:
                module.recapture()
            else:
                module._serving_forget()
