"""A convolution of a block in training, one way, with all that depends on whose it is: what
``tune(..., train=True)`` times. The steps are those of ``kernels/res_block.py``.

Forward: the convolution, BatchNorm's statistics and the pass that applies them. Backward: the
gradient of its input, then of the ReLU and BatchNorm before it, or the sum with what passes the
block by. The weight's gradient is the library's either way and left out; so is the masked copy of
dy that the end of a block writes where the library is to add it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import bn_act_bwd, bn_act_fwd, res_block
from ..kernels import training_convolution as own
from ..ops import conv_halo
from ..ops.bn_act import unpack_mask
from ..reference import ACTS, Norm
from .training_conv import (
    ADD,
    ADD_IN_PLACE,
    HALO,
    LIBRARY,
    OWN,
    RELU,
    STATISTICS,
    Call,
    tensors_of,
    trains,
)

_RELU = ACTS.index("relu")


def values(call: Call, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for a call; BatchNorm's are float32.

    ``dy`` is of the convolution's output; ``a``, of its input's shape, is what the BatchNorm and
    ReLU before it read; ``other`` is added to the gradient, where ``mask`` lets it through.
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
    if call.end in (ADD, ADD_IN_PLACE):
        v["other"] = image(call.shape)
    if call.end == ADD:
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
        """The library, and our own in each configuration that may be the fastest."""
        if self.call.backward:
            phase = own.gradient_phases(self.call.shape[2:], self.conv)[0]
            found = own.candidates(self.v["dy"], self.call.weight[1], phase)
        else:
            phase = own.forward_phase(self.v["x"], self.conv)
            found = own.candidates(self.v["x"], self.call.weight[0], phase)
        halo = [HALO] if self._halos() else []
        return [LIBRARY, *(OWN + 1 + i for i in found), *halo]

    def _halos(self) -> bool:
        """Whether ``conv_halo`` has the end that comes with the call."""
        x = self.v["a"] if self.call.backward and "a" in self.v else self.v.get("x")
        return self.call.end in (STATISTICS, RELU) and conv_halo.trains(x, self.conv)

    def run(self, choice: int) -> dict[str, Tensor]:
        """What is made, by name. Running statistics and what is added to in place change."""
        if not self.call.backward:
            return self._forward(choice)
        return self._into_relu(choice) if "a" in self.v else self._into_sum(choice)

    def _forward(self, choice: int) -> dict[str, Tensor]:
        of = res_block.Choice(forward=choice)
        a, partial = res_block.convolve(self.v["x"], self.conv, of, trains(self.call), conv_halo)
        return {"y": self._normalized(a, partial)[0]}

    def _library(self, x: Tensor) -> Tensor:
        """The gradient of the input x, which PyTorch wants to see, if not to read."""
        wanted = True, False, False
        return res_block.aten_backward(self.v["dy"], x, self.conv, wanted)[0]

    def _own(self, choice: int, end: own.Epilogue, out: Tensor | None = None):
        config, size = res_block.config_of(choice), self.call.shape[2:]
        return own.input_gradient(self.v["dy"], self.conv, size, end, config, out)

    def _into_relu(self, choice: int) -> dict[str, Tensor]:
        a, training = self.v["a"], trains(self.call)
        norm = bn_act_bwd.NormCall(self.v["gamma"], training)
        wanted = bn_act_bwd.Wanted(x=True, residual=False, parameters=training)
        if choice == LIBRARY:
            z, mask = bn_act_fwd.reapply(a, self.stats)
            found = bn_act_bwd.backward(
                bn_act_bwd.Call(
                    self._library(z), a, norm, self.stats, mask, act=_RELU, wanted=wanted
                )
            )
        else:
            if choice == HALO:
                g, sums = conv_halo.input_gradient(self.v["dy"], self.conv, a, self.stats)
            else:
                g, sums = self._own(choice, own.Epilogue(own.RELU, a=a, stats=self.stats))
            found, z = bn_act_bwd.backward_of_sums(
                bn_act_bwd.SumsCall(g, a, norm, self.stats, sums, wanted, True)
            )
        parameters = {"dgamma": found.dweight, "dbeta": found.dbias} if training else {}
        return {"y": found.dx, "z": z, **parameters}

    def _into_sum(self, choice: int) -> dict[str, Tensor]:
        other, mask = self.v.get("other"), self.v.get("mask")
        out = other if self.call.end == ADD_IN_PLACE else None
        if choice != LIBRARY:
            kind = own.NOTHING if other is None else own.ADD
            return {"y": self._own(choice, own.Epilogue(kind, other=other, mask=mask), out)[0]}
        dx = self._library(self.v["x"])
        if other is None:
            return {"y": dx}
        return {"y": other.add_(dx) if out is not None else dx.add_(self.v["masked"])}
