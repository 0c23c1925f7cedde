"""Single convolutions of blocks in training, forward or backward, with the passes over memory that
come with them: the library's, and ours in Triton in each configuration.

The kernels are imported where they are called: without Triton the other suites still run.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from programs import Program
from torch import Tensor
from workloads import Workload

from fused_res.dispatch import training_conv
from fused_res.dispatch.backends import why_not


def values(workload: Workload, device: str = "cpu") -> dict[str, Tensor]:
    from fused_res.dispatch.training_conv_candidates import values as of_call

    return of_call(workload.call, device)


def described(workload: Workload) -> dict[str, object]:
    """The call as ``dispatch/shipped_timings.py`` tells it from others, in some of its fields."""
    row = training_conv.row_of(workload.call, {})
    return {"op": row.op, "shape": list(row.shape), "like": row.like}


def moved_bytes(workload: Workload) -> int:
    """What the convolution's operands and result, and what comes with it in passes of their own
    with ours, read and write."""
    call = workload.call
    item, x = call.dtype.itemsize, torch.Size(call.shape).numel()
    steps = call.stride[0] * call.stride[1]
    out = x // call.shape[1] * call.weight[0] // steps
    used = x // steps if call.weight[2:] == (1, 1) else x
    size = used + out + torch.Size(call.weight).numel()
    if not call.backward:
        size += 2 * out  # a -> y
    elif training_conv.trains(call) is not None:
        size += 5 * x  # a; g, a -> da, z
    elif call.end:
        size += used
    return item * size + (x // 8 if call.end == training_conv.ADD else 0)


class StepsProgram(Program):
    """``choice``: as of ``fused_res.dispatch.training_conv``."""

    def __init__(self, choice: int, workload: Workload, v: dict[str, Tensor]) -> None:
        from fused_res.dispatch.training_conv_candidates import Steps

        # statistics and sums may be updated in place
        self.initial, self.v = v, {name: t.clone() for name, t in v.items()}
        self.steps, self.choice = Steps(workload.call, self.v), choice
        self.inputs = tuple(self.v.values())
        self.directions = workload.directions
        self.calls = {workload.directions[0]: lambda: tuple(self.steps.run(choice).values())}

    def result(self) -> dict[str, Tensor]:
        for name, t in self.v.items():
            t.copy_(self.initial[name])
        return {name: t.clone() for name, t in self.steps.run(self.choice).items()}


def exact_result(workload: Workload, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, by autograd."""
    call = workload.call
    v = {name: t.double() if t.is_floating_point() else t for name, t in v.items()}
    convolve = partial(F.conv2d, weight=v["weight"], stride=call.stride, padding=call.padding)

    def normalized(a: Tensor) -> Tensor:
        norm = (
            v["mean"].clone(),
            v["var"].clone(),
            v["gamma"],
            v["beta"],
            training_conv.trains(call),
        )
        return F.relu(F.batch_norm(a, *norm))

    if not call.backward:
        return {"y": normalized(convolve(v["x"]))}
    if "a" in v:
        parameters = ["gamma", "beta"] if training_conv.trains(call) else []
        leaves = [v[name].requires_grad_() for name in ("a", *parameters)]
        z = normalized(v["a"])
        grads = torch.autograd.grad(convolve(z), leaves, v["dy"])
        names = ("y", *(f"d{name}" for name in parameters))
        return {"z": z.detach(), **dict(zip(names, grads, strict=True))}
    x = v["x"].requires_grad_()
    (dx,) = torch.autograd.grad(convolve(x), x, v["dy"])
    return {"y": dx + v["masked"] if "masked" in v else dx + v.get("other", 0)}


def implementations(workload: Workload, device: str) -> list[tuple[str, object, object]]:
    """(name, configuration or None, what builds its program) of all that can run the workload."""
    kind = torch.device(device).type
    reason = why_not("bn_act", "triton", kind, workload.dtype)
    if reason:
        raise RuntimeError(f"suite {workload.suite} wants Triton: {reason}")
    from fused_res.dispatch.training_conv_candidates import Steps

    return [
        (
            training_conv.name_of(choice),
            training_conv.config_of(choice),
            partial(StepsProgram, choice),
        )
        for choice in Steps(workload.call, values(workload, device)).candidates()
    ]
