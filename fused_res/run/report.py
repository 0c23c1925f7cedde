"""What ran each fused block in its last call, why, and the gain that was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import backends, first_use, inference_conv, training_block
from ..fuse.plan import BlockPlan
from ..ops.res_block import Chosen, Eager, chosen
from . import inference, training
from .guards import last_guard
from .own_forward import Input, last_input, runs_own_forward

_PYTORCH = "PyTorch's ops"


class RanBlock(NamedTuple):
    """A fused block's last call.

    mode: ``training`` or ``inference``; empty where the block was not called.
    ran: the kernels, or ``PyTorch's ops``.
    gain: how many times as fast as PyTorch's ops, where that was measured on this device.
    """

    name: str
    mode: str
    ran: str
    why: str
    gain: float | None = None


@dataclass
class RunReport:
    """The result of ``fused_res.report``. Prints as a table.

    blocks: one for each block that ``fuse_`` changed.

    Examples:
        >>> fused_res.report(torch.nn.Conv2d(3, 8, 1)).blocks
        []
    """

    blocks: list[RanBlock] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("block", "mode", "ran", "gain", "why")]
        for block in self.blocks:
            gain = "" if block.gain is None else f"{block.gain:.2f}x"
            name = block.name or "(the model)"
            rows.append((name, block.mode, block.ran, gain, block.why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def report(model: nn.Module) -> RunReport:
    """Says for each block that ``fuse_`` changed what ran in its last call, and why.

    The choice is made again for an input of the same size, as ``auto`` makes it now. A block in
    inference is called once, with an input of zeros.

    Args:
        model: any module.

    Returns:
        RunReport: a row for each block; ``print`` shows a table.

    Raises:
        TypeError: ``model`` is not a module.

    Examples:
        >>> net = torch.nn.Sequential(fused_res.reference.ResBlock(64, 64))
        >>> fused = fused_res.fuse_(net)
        >>> y = net(torch.randn(2, 64, 8, 8))
        >>> fused_res.report(net).blocks[0].mode
        'training'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = RunReport()
    for name, module in model.named_modules():
        plan = getattr(module, "plan", None)
        if plan is not None and hasattr(module, "_is_as_recorded"):
            with first_use.only_asked():
                found.blocks.append(_block(name, module, plan))
    return found


def _block(name: str, block: nn.Module, plan: object) -> RanBlock:
    of, guard = last_input(block), last_guard(block)
    backend = block.backend or backends.named()
    if backend == "eager":
        return RanBlock(name, "", _PYTORCH, "backend eager is named")
    dtype = next((p.dtype for p in block.parameters()), torch.float32)
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    if backend == "auto" and backends.never_fused(device.type, dtype):
        words = str(dtype).removeprefix("torch.")
        return RanBlock(name, "", _PYTORCH, f"no fused kernel is preferred for {words} on {device}")
    if guard is not None and not guard.same:
        return RanBlock(name, "", _PYTORCH, "changed since fuse_")
    if of is None:
        why = "not called, or only inside torch.compile or on backend eager"
        return RanBlock(name, "", "", why)
    why = _why_unlike(block, of)
    if why is not None:
        return RanBlock(name, _mode(of), "", f"{why} since its last call: call it again")
    if of.chained:
        why = "blocks that follow each other run in one call"
        return RanBlock(name, _mode(of), "res_chain", why)
    if not isinstance(plan, BlockPlan):
        return RanBlock(name, _mode(of), "fused segments", plan.reason)
    autocast = torch.autocast(of.device.type, of.autocast, of.autocast is not None)
    with torch.set_grad_enabled(of.grad), autocast:
        x = torch.empty_strided(of.shape, of.strides, dtype=of.dtype, device=of.device).zero_()
        return _explained(name, block, plan, x, of)


def _why_unlike(block: nn.Module, of: Input) -> str | None:
    """Why a block cannot be asked for its last call any more; None where it can."""
    parameters = list(block.parameters())
    if block.training != of.training:
        return "its mode has changed"
    if any(p.device != of.device for p in parameters):
        return "it was moved"
    like = of.autocast is not None or any(p.dtype == of.dtype for p in parameters)
    return None if like else "it was cast"


def _mode(of: Input) -> str:
    return "training" if of.grad else "inference"


def _explained(name: str, block: nn.Module, plan: BlockPlan, x: Tensor, of: Input) -> RanBlock:
    convs = inference.convolutions_of(block, plan, x, None)
    if convs is not None:
        with inference_conv.watching() as found:
            inference.run(block, plan, convs, x, None)
        ran = ", ".join(dict.fromkeys(c.implementation for c in found))
        why = "; ".join(dict.fromkeys(c.reason for c in found))
        return RanBlock(name, "inference", _PYTORCH if ran == "eager" else ran, why)
    arguments = training.arguments_of(block, plan)
    if arguments is None:
        norm = backends.choose("bn_act", block.backend, x)
        return RanBlock(name, _mode(of), f"bn_act on {norm}", "the block runs stage by stage")
    grad = of.grad
    found = chosen(x.requires_grad_(grad), *arguments[:3], block.backend, block.recompute)
    if isinstance(found, Eager) or runs_own_forward(block, x):
        call = training_block.Call(x, *arguments[:3], block.recompute is not None)
        return RanBlock(name, _mode(of), _PYTORCH, training_block.choose(call).reason)
    if not isinstance(found, Chosen):
        norm = backends.choose("bn_act", block.backend, x)
        return RanBlock(name, _mode(of), f"bn_act on {norm}", "one call for the block does not pay")
    ran = f"res_block on {found.candidate.backend}"
    if found.candidate.convolutions:
        ran += f" (convolutions in Triton: {found.candidate.convolutions})"
    return RanBlock(name, _mode(of), ran, *_why(found, block.backend))


def _why(found: Chosen, backend: str | None) -> tuple[str, float | None]:
    """Why a candidate runs a block, and its gain."""
    row = training_block.timed_row(found.call)
    candidates = training_block.CANDIDATES
    name = next((n for n, of in candidates.items() if of == found.candidate), "")
    gain = None if row is None else first_use.gain_of(row, name)
    if not backends.is_auto(backend):
        return f"backend {found.candidate.backend} is named", gain
    if first_use.covers(found.call.x.device):
        return training_block.choose(found.call).reason, gain
    return "preferred on a CPU, by measurements (dispatch/cpu_rules.py)", gain
