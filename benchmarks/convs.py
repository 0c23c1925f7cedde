"""Single calls of ``conv_bn_act``: every implementation of it, Triton's in each configuration."""

from __future__ import annotations

from functools import partial

import torch
from programs import Program
from torch import Tensor
from workloads import Workload

from fused_res import reference
from fused_res.dispatch import inference_conv
from fused_res.dispatch.backends import why_not
from fused_res.ops.conv_bn_act import IMPLEMENTATIONS, Call, run_as
from fused_res.reference import ConvNorm, Norm


def _conv_norm(v: dict[str, Tensor], prefix: str, stride: int) -> ConvNorm:
    weight = v[f"{prefix}.weight"]
    norm = Norm(*(v[f"{prefix}.{name}"] for name in ("mean", "var", "gamma", "beta")))
    return ConvNorm(weight, None, (stride,) * 2, (weight.size(2) // 2,) * 2, (1, 1), 1, norm)


def values(workload: Workload, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """What has four dimensions is of the workload's dtype, BatchNorm of float32."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    conv, (n, c, h, w) = workload.conv, workload.shape
    p, q = -(-h // conv.stride), -(-w // conv.stride)
    out = {"x": normal(n, c, h, w)}
    filters = {"conv": (c, conv.size)}
    if conv.residual == "add":
        out["residual"] = normal(n, conv.out_channels, p, q)
    elif conv.residual == "shortcut":
        filters["shortcut"] = conv.shortcut_channels, 1
        step = conv.shortcut_stride
        out["residual"] = normal(n, conv.shortcut_channels, step * p, step * q)
    for name, (channels, size) in filters.items():
        k = conv.out_channels
        scale = (2 / (channels * size * size)) ** 0.5  # He et al., 2015
        out[f"{name}.weight"] = scale * normal(k, channels, size, size)
        out |= {f"{name}.mean": 0.2 * normal(k), f"{name}.var": 2 + 0.2 * normal(k).abs()}
        out |= {f"{name}.gamma": 1 + 0.2 * normal(k), f"{name}.beta": 0.2 * normal(k)}
    return {
        name: t.to(workload.dtype, memory_format=torch.channels_last) if t.dim() == 4 else t
        for name, t in out.items()
    }


def call_of(workload: Workload, v: dict[str, Tensor]) -> Call:
    conv = workload.conv
    shortcut = None
    if conv.residual == "shortcut":
        shortcut = _conv_norm(v, "shortcut", conv.shortcut_stride)
    return Call(v["x"], _conv_norm(v, "conv", conv.stride), v.get("residual"), shortcut)


def described(workload: Workload) -> dict[str, object]:
    """The call as ``dispatch/shipped_timings.py`` tells it from others, in two of its fields."""
    row = inference_conv.row_of(
        inference_conv.key_of(call_of(workload, values(workload, "meta"))), {}
    )
    return {"shape": list(row.shape), "like": row.like}


class ConvProgram(Program):
    """``run``: what is given a ``Call``."""

    def __init__(self, run, workload: Workload, v: dict[str, Tensor]) -> None:
        call = call_of(workload, v)
        self.inputs = (call.x,)
        self.directions = workload.directions
        self.calls = {"eval": torch.no_grad()(partial(run, call))}

    def result(self) -> dict[str, Tensor]:
        return {"y": self.run()[0].clone()}


def eager(call: Call) -> Tensor:
    return reference.conv_bn_act(*call)


def implementations(workload: Workload, device: str) -> list[tuple[str, object, object]]:
    """(name, configuration or None, what runs a ``Call``) of all that can run the workload."""
    call = call_of(workload, values(workload, device))
    found = []
    for name, implementation in IMPLEMENTATIONS.items():
        kind = torch.device(device).type
        if why_not("conv_bn_act", implementation.backend, kind, workload.dtype):
            continue
        if implementation.why_not(call):
            continue
        configs = [None] if implementation.configs is None else implementation.configs(call)
        for config in configs:
            choice = inference_conv.Choice(name, "timed", config)
            found.append((name, config, partial(run_as, choice=choice)))
    return found
