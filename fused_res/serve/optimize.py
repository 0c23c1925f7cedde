"""``optimize_for_inference``: a copy of a model that serves inputs like one example."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..dispatch import inference_conv, tuning, user_timings
from ..fuse.modules import child, is_norm_act
from ..fuse.plan import BlockPlan
from ..fuse.swap import FuseReport, fuse_, refuse_wrapped, unfuse_, unfuse_stems
from ..fuse.trace import Unfusable, in_words
from ..run.weight_cache import forget_weights
from .calls import Call, example_call, is_plain
from .model import OptimizedModel, Serving, input_like, optimized_class
from .outside_blocks import chains, convolves, function, graph_of


def _equal(a: Any, b: Any) -> bool:
    """Whether a trace's result ``a`` equals ``b``, up to the rounding of other kernels."""
    if type(a) is type(b) and is_dataclass(a):  # pytree does not know these
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
    """Gives partly fused blocks their own forward back, if the graph of the whole model can fuse
    the same segments: then the trace can see into them."""
    for name in [name for name, _ in report.partly]:
        block = model.get_submodule(name)
        more = isinstance(block.plan.quiet, BlockPlan) or any(
            segment.skip == "add" or any(is_norm_act(child(block, s.norm)) for s in segment.branch)
            for segment in block.plan.usual.segments
        )
        if not more or not name:  # a whole model is a graph itself
            unfuse_(block)
            report.partly = [row for row in report.partly if row[0] != name]


def _is_for_any_size(model: OptimizedModel, run: Callable, inputs: list[Tensor]) -> bool:
    """Whether the trace and the model agree for images of another height and width. If the forward
    reads sizes, the trace may have fixed those of the example."""
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
        except Exception:  # a forward may raise anything for a size that it rejects
            continue
        try:
            return _all_equal(run(model, *others()), expected)
        except Exception:
            return False
    return False


def _fuse_outside_blocks(model: OptimizedModel, inputs: list[Tensor], expected: Any) -> None:
    """Fuses the convolutions outside blocks, if a trace determines the model's result."""
    serving, reason = model._serving, None
    wanted, kind = pytree.tree_flatten(expected)
    try:
        graph, reads = graph_of(model, len(inputs))
        run = function(model, graph)
        with torch.no_grad():
            found, traced_kind = pytree.tree_flatten(run(model, *[t.clone() for t in inputs]))
            if len(found) != len(wanted) or not all(map(_equal, found, wanted)):
                reason = "a trace of the model returns another result"
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
    """Measures, unless the user's table has all convolutions that run."""
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


@torch.inference_mode(False)  # inference tensors have no version counters
def optimize_for_inference(
    model: nn.Module,
    example: Tensor | tuple[Tensor | None, ...] | Mapping[str, Any],
    *,
    tune: bool = True,
    cuda_graph: bool = False,
    freeze: bool = False,
    channels_last: bool = True,
) -> OptimizedModel:
    """A copy of ``model`` for serving: in eval mode, channels_last, blocks and convolutions fused.

    ``model`` is not changed. The copy has the same ``state_dict`` keys and weights of its own, so
    delete ``model`` if memory is short. Residual blocks are fused as by ``fuse_``. Outside of
    blocks, a convolution and the BatchNorm or ReLU after it run as one op, if ``torch.fx`` can
    trace the model. The rest runs as before, and ``report`` has the reasons.

    Args:
        model: any module that is not wrapped, compiled or scripted.
        example: the inputs of a call: a tensor, a tuple of tensors, or a dict of keyword arguments
            (``{"pixel_values": images}``, or the output of a processor of transformers), which may
            have other values too. Calls must have its dtypes and devices. Calls that differ from it
            in batch, height and width alone run fastest. Other calls run too (see
            ``OptimizedModel``), but not in a CUDA graph, which has the example's shapes.
        tune: time the kernels for ``example``, as ``fused_res.tune`` does, unless its table has
            them already.
        cuda_graph: capture the forward in a CUDA graph and replay that, which saves the launches of
            small batches. Outputs are copied. The graph serves one thread and stream at a time.
        freeze: on a CPU, trust that weights, modules and hooks do not change after the first call
            with inputs of a size, and do not check them in each call: this saves time in small
            networks. Call ``OptimizedModel.recapture`` after a change.
        channels_last: convert the weights, and each input with 4 dimensions, to this layout. A
            model that cannot run in it keeps its layout.

    Returns:
        OptimizedModel: called like ``model``.

    Raises:
        TypeError: ``model`` is not a module; ``example`` has no tensors or is of another type.
        ValueError: ``model`` is wrapped, compiled, scripted, optimised or cannot be copied;
            ``example`` is not on a CUDA device with ``cuda_graph``, or not on a CPU with
            ``freeze``.
        RuntimeError: ``cuda_graph`` without a CUDA device.
        Exception: any that ``model`` raises for ``example``.

    Warns:
        UserWarning: the timings could not be written to a file. This process uses them all the
            same.

    Examples:
        >>> net = fused_res.models.create("resnet20")
        >>> served = fused_res.optimize_for_inference(net, torch.randn(1, 3, 32, 32), tune=False)
        >>> served(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """
    refuse_wrapped(model, "optimize_for_inference")
    if any(isinstance(m, OptimizedModel) for m in model.modules()):
        raise ValueError("model must not be optimised, but it or a part of it is already")
    if cuda_graph and not torch.cuda.is_available():
        raise RuntimeError("cuda_graph=True needs a CUDA device, and PyTorch finds none")
    args, kwargs = example_call(example)
    _check_example(args, kwargs, cuda_graph, freeze)
    model = _copied(model, args, kwargs, cuda_graph, freeze)

    def again() -> tuple[tuple, dict[str, Any]]:  # a forward may write to its input
        return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))

    expected = model._serving_answer(*again())
    if not model._serving.call.is_known:
        reason = "convolutions outside blocks: an argument is neither a tensor nor a plain value"
        model.report.skipped.append(("", reason))
    elif convolves(model) or chains(model):
        tensors = [t.detach().clone() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        _fuse_outside_blocks(model, tensors, expected)
    if channels_last:
        _convert(model, *again())
    if tune:
        _tune(model, *again())
    if cuda_graph:
        model.recapture()
    return model


def _copied(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], cuda_graph: bool, freeze: bool
) -> OptimizedModel:
    """A copy in eval mode with fused blocks, of a class that serves calls like the example."""
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"model must be one that can be copied, got {in_words(error)}") from error
    model.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fuse_ found no residual block")
        report = fuse_(model, stems=False)
    _leave_to_the_graph(model, report)
    unfuse_stems(model)  # the graph has all convolutions outside of blocks
    model.__class__ = optimized_class(type(model))
    call = Call(model._serving_parameters, args, kwargs)
    inputs = tuple(input_like(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    model._serving = Serving(call, inputs, False, cuda_graph, freeze, report)
    return model


def _convert(model: OptimizedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Converts the model to channels_last, unless it cannot run in that layout."""
    serving = model._serving
    serving.channels_last = True
    _set_layout(model, torch.channels_last)
    try:
        model._serving_answer(args, kwargs)
    except RuntimeError as error:
        serving.report.skipped.append(("", f"channels_last: {in_words(error)}"))
        serving.channels_last = False
        _set_layout(model, torch.contiguous_format)
    else:
        serving.report.advice.clear()  # the model follows it now


def refresh(model: nn.Module) -> None:
    """Makes packed weights again at their next use, and captures CUDA graphs again.

    Most changes of weights need no ``refresh``: by an optimizer, by ``load_state_dict``, by
    operations in place, of a whole weight through ``.data``. Call it after single values were
    written past PyTorch's version counters: through ``numpy()``, DLPack or ``.data``, by raw
    operators such as ``torch._fused_sgd_``, or by another process to shared memory.

    Args:
        model: any module with fused blocks, or an ``OptimizedModel``.

    Raises:
        TypeError: ``model`` is not a module.

    Examples:
        >>> net = fused_res.models.create("resnet20")
        >>> net.conv1.weight.detach().numpy()[0, 0] = 0
        >>> fused_res.refresh(net)
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
