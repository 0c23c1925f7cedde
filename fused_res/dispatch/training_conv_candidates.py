"""The candidates for a convolution of a block in training; ``tune(..., train=True)`` times them.

Each candidate runs the steps of ``kernels/res_block.py`` that the candidate changes.
Forward: the convolution, BatchNorm's statistics and the pass that applies them. Backward: the
gradient of the convolution's input, then the gradient of the ReLU and BatchNorm before it, or the
sum with the gradient from the block's other path.

Two steps are left out. ATen computes the weight's gradient with every candidate. The last stage
writes a masked copy of dy where ATen runs the convolution of the first one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import bn_act_bwd, bn_act_fwd, res_block, training_convolution
from ..kernels.training_convolution import Epilogue
from ..ops import conv_halo
from ..ops.bn_act import unpack_mask
from ..reference import ACTS, Norm
from .training_conv import (
    ADD,
    ADD_IN_PLACE,
    ATEN,
    HALO,
    RELU,
    STATISTICS,
    TRITON,
    Call,
    tensors_of,
    trains,
)

_RELU = ACTS.index("relu")


def values(call: Call, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for a call; BatchNorm's are float32.

    dy: gradient of the convolution's output.
    a: input of the BatchNorm and ReLU before the convolution.
    other, mask: the gradient from the block's other path, and the mask of the ReLU that it passes.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def image(shape: tuple[int, ...]) -> Tensor:
        return normal(*shape).to(call.dtype, memory_format=torch.channels_last)

    n, c, h, w = call.shape
    v = {"weight": image(call.weight) * (2 / (c * call.weight[2] * call.weight[3])) ** 0.5}
    x, conv = tensors_of(call, "meta")
    inside = trains(call) is not None
    if call.backward:
        v["dy"] = image(torch.conv2d(x, conv.weight, None, *conv[2:5]).shape)
    v["a" if call.backward and inside else "x"] = image(call.shape)
    if call.epilogue in (ADD, ADD_IN_PLACE):
        v["other"] = image(call.shape)
    if call.epilogue == ADD:
        size = n * h * w, -(-c // 8)
        v["mask"] = torch.randint(256, size, generator=generator, device=device).to(torch.uint8)
        v["masked"] = v["other"] * unpack_mask(v["mask"], v["other"])
    if inside:
        channels = c if call.backward else call.weight[0]
        v |= {"gamma": 1 + 0.2 * normal(channels), "beta": 0.2 * normal(channels)}
        v |= {"mean": 0.2 * normal(channels), "var": 2 + 0.2 * normal(channels).abs()}
    return v


class Steps:
    """A call on its tensors."""

    def __init__(self, call: Call, v: dict[str, Tensor]) -> None:
        self.call, self.v = call, v
        self.conv = tensors_of(call, "meta")[1]._replace(weight=v["weight"])
        if "a" in v:
            self.stats = self._normalized(v["a"])[2]

    def _normalized(self, a: Tensor, partial: Tensor | None = None) -> tuple[Tensor, ...]:
        """Output, mask and stats of the BatchNorm and its ReLU."""
        tensors = map(self.v.get, ("mean", "var", "gamma", "beta"))
        norm = Norm(*tensors, trains(self.call), 0.1, 1e-5)
        call = bn_act_fwd.Call(a, norm, act=_RELU, save_mask=False, statistics=partial)
        return bn_act_fwd.forward(call)

    def candidates(self) -> list[int]:
        """ATen, Triton in each configuration that may be the fastest, and ``conv_halo``."""
        if self.call.backward:
            phase = training_convolution.gradient_phases(self.call.shape[2:], self.conv)[0]
            image, channels = self.v["dy"], self.call.weight[1]
        else:
            phase = training_convolution.forward_phase(self.v["x"], self.conv)
            image, channels = self.v["x"], self.call.weight[0]
        found = training_convolution.candidates(image, channels, phase)
        halo = [HALO] if self._halos() else []
        return [ATEN, *(TRITON + 1 + i for i in found), *halo]

    def _halos(self) -> bool:
        """Whether ``conv_halo`` has the call's epilogue and can run the convolution."""
        x = self.v["a"] if self.call.backward and "a" in self.v else self.v.get("x")
        return self.call.epilogue in (STATISTICS, RELU) and conv_halo.trains(x, self.conv)

    def run(self, candidate: int) -> dict[str, Tensor]:
        """The results by name. Changes the running statistics, and ``other`` if added in place."""
        if not self.call.backward:
            return self._forward(candidate)
        return self._into_relu(candidate) if "a" in self.v else self._into_sum(candidate)

    def _forward(self, candidate: int) -> dict[str, Tensor]:
        of = res_block.Candidates(forward=candidate)
        a, partial = res_block.convolve(self.v["x"], self.conv, of, trains(self.call), conv_halo)
        return {"y": self._normalized(a, partial)[0]}

    def _aten(self, x: Tensor) -> Tensor:
        """The gradient of the input; ATen looks at the sizes of x alone."""
        wanted = True, False, False
        return res_block.aten_backward(self.v["dy"], x, self.conv, wanted)[0]

    def _triton(self, candidate: int, epilogue: Epilogue, out: Tensor | None = None):
        config, size = res_block.config_of(candidate), self.call.shape[2:]
        return training_convolution.input_gradient(
            self.v["dy"], self.conv, size, epilogue, config, out
        )

    def _into_relu(self, candidate: int) -> dict[str, Tensor]:
        a, training = self.v["a"], trains(self.call)
        norm = bn_act_bwd.NormCall(self.v["gamma"], training)
        wanted = bn_act_bwd.Wanted(x=True, residual=False, parameters=training)
        if candidate == ATEN:
            z, mask = bn_act_fwd.reapply(a, self.stats)
            found = bn_act_bwd.backward(
                bn_act_bwd.Call(self._aten(z), a, norm, self.stats, mask, act=_RELU, wanted=wanted)
            )
        else:
            if candidate == HALO:
                g, sums = conv_halo.input_gradient(self.v["dy"], self.conv, a, self.stats)
            else:
                epilogue = Epilogue(training_convolution.RELU, a=a, stats=self.stats)
                g, sums = self._triton(candidate, epilogue)
            found, z = bn_act_bwd.backward_of_sums(
                bn_act_bwd.SumsCall(g, a, norm, self.stats, sums, wanted, True)
            )
        parameters = {"dgamma": found.dweight, "dbeta": found.dbias} if training else {}
        return {"y": found.dx, "z": z, **parameters}

    def _into_sum(self, candidate: int) -> dict[str, Tensor]:
        other, mask = self.v.get("other"), self.v.get("mask")
        out = other if self.call.epilogue == ADD_IN_PLACE else None
        if candidate != ATEN:
            kind = training_convolution.NOTHING if other is None else training_convolution.ADD
            return {"y": self._triton(candidate, Epilogue(kind, other=other, mask=mask), out)[0]}
        dx = self._aten(self.v["x"])
        if other is None:
            return {"y": dx}
        return {"y": other.add_(dx) if out is not None else dx.add_(self.v["masked"])}
