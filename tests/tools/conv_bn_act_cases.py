"""Calls of conv_bn_act in any dtype, held against float64."""

import torch
from errors import rule

from fused_res import reference
from fused_res.reference import ConvNorm, Norm


def to(value, dtype, parameters):
    """A call, or a part of it, in another dtype; its BatchNorms' channels in ``parameters``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if isinstance(value, Norm):
        return Norm(*(to(v, parameters, parameters) for v in value))
    if isinstance(value, ConvNorm):
        return ConvNorm(*(to(v, dtype, parameters) for v in value))
    if isinstance(value, dict):
        return {name: to(v, dtype, parameters) for name, v in value.items()}
    return value


def assert_rule(calls, dtype, run, of=""):
    """Pooled over the calls: PyTorch's own largest errors differ from draw to draw by more than the
    rule allows."""
    results = []
    for call in calls:
        rounded = to(call, dtype, torch.float32)
        exact = to(rounded, torch.float64, torch.float64)
        pair = reference.conv_bn_act(**rounded), reference.conv_bn_act(**exact)
        results.append([y.flatten() for y in (run(**rounded), *pair)])
    rule(*map(torch.cat, zip(*results, strict=True)), f"{dtype} {of}")
