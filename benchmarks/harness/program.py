"""What a rival is built into: calls that are timed, and the result that is checked.

All rivals of a workload get the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from graphs import Graphed, outputs
from parted import Parted
from torch import Tensor, nn
from workloads import FORMATS, STEP, Workload

from fused_res import reference
from fused_res.reference import Norm


class Program:
    """``calls``: what is timed, by direction. The last of ``directions`` is what is checked.

    ``inputs``: the tensors that every call is given, always the same.
    """

    directions: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    calls: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]

    def run(self) -> tuple[Tensor, ...]:
        return outputs(self.calls[self.directions[-1]]())

    def capture(self, device: str) -> None:
        """From now on every call is a replay of a CUDA graph of it."""
        self.calls = {name: Graphed(call, device) for name, call in self.calls.items()}

    def release(self) -> None:
        """Frees what a step leaves behind."""

    def result(self) -> dict[str, Tensor]:
        """The output ``y`` and whatever else a step computes, from the initial state."""
        raise NotImplementedError


@dataclass
class TensorProgram(Program):
    """An op or a block: ``forward``, the tensors to differentiate and a gradient to start from.

    ``state``: running statistics, which a training step changes.
    """

    forward: Callable[[], Tensor]
    directions: tuple[str, ...]
    wrt: dict[str, Tensor]
    state: dict[str, Tensor]
    dy: Tensor
    inputs: tuple[Tensor, ...]
    module: nn.Module | None = None
    initial: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.initial = {name: t.clone() for name, t in self.state.items()}
        known = {"forward": self.forward, STEP: self.step, "eval": self.evaluate}
        self.calls = {name: known[name] for name in self.directions}

    def step(self) -> tuple[Tensor, ...]:
        y = self.forward()
        return y, *torch.autograd.grad(y, tuple(self.wrt.values()), self.dy)

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def result(self) -> dict[str, Tensor]:
        """Output, and in training gradients and running statistics."""
        for name, t in self.state.items():
            t.copy_(self.initial[name])
        y, *grads = self.run()
        # clones: a CUDA graph overwrites its outputs
        result = {"y": y.detach().clone()}
        if "eval" in self.directions:
            return result
        result.update((f"d{k}", g.clone()) for k, g in zip(self.wrt, grads, strict=True))
        result.update((k, t.clone()) for k, t in self.state.items())
        return result

    def saved_bytes(self) -> int:
        """Bytes of the distinct storages saved for backward, parameters excluded."""
        own = {t.untyped_storage().data_ptr() for k, t in self.wrt.items() if k != "x"}
        storages = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()
        del y
        return sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)


def plain_block(workload: Workload) -> type[nn.Module]:
    """PyTorch's."""
    return reference.ResBlock if workload.extra is None else Parted


def values(workload: Workload, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random inputs, and for a block its parameters under their names.

    What has four dimensions is of the workload's dtype; BatchNorm's is float32, as under autocast.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, c, h, w = workload.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    out = {"x": normal(n, c, h, w), "dy": normal(*workload.shape_out())}
    if workload.suite == "ops":
        out["residual"] = normal(n, c, h, w)
        out["weight"], out["bias"] = 1 + 0.2 * normal(c), 0.2 * normal(c)
        out["running_mean"], out["running_var"] = (
            torch.zeros(c, device=device),
            torch.ones(c, device=device),
        )
    else:
        args, kwargs = workload.block_arguments()
        block = plain_block(workload)(*args, **kwargs)
        for name, p in block.named_parameters():
            if p.dim() == 4:  # He et al., 2015
                out[name] = normal(*p.shape) * (2 / p[0].numel()) ** 0.5
            else:
                out[name] = float(name.endswith("weight")) + 0.2 * normal(*p.shape)
        for name, t in block.named_buffers():
            if not workload.training and t.is_floating_point():
                # around the statistics that the convolutions' outputs have
                out[name] = 0.2 * normal(*t.shape)
                if name.endswith("var"):
                    out[name] = 2 + out[name].abs()
    out = {name: t.to(workload.dtype) if t.dim() == 4 else t for name, t in out.items()}
    if workload.training and workload.dtype == torch.float32:
        _separate(workload, out)
    return out


def _relu_inputs(workload: Workload, v: dict[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad():
        if workload.suite == "ops":
            program = op_program(partial(reference.bn_act, act="none"), workload, v)
            seen.append(program.forward())
        else:
            program = block_program(plain_block(workload), workload, v)
            program.module.relu.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            program.forward()
    return seen


def double(v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in v.items()}


def _separate(workload: Workload, v: dict[str, Tensor]) -> None:
    """Nudges inputs until no ReLU's sign depends on rounding.

    A ReLU that rounds to the other side of zero is nobody's error, and moves every gradient by more
    than rounding does. In millions of elements a few always would.
    """
    target = v["residual" if workload.suite == "ops" else "x"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        exact, rounded = _relu_inputs(workload, double(v)), _relu_inputs(workload, v)
        near = torch.zeros_like(target[:, 0], dtype=torch.bool)
        for e, r in zip(exact, rounded, strict=True):
            near |= (e.abs() < 4 * (r - e).abs().max()).any(1)
        count = int(near.sum())
        if not count:
            return
        nudge = 1e-3 * torch.randn((count, target.size(1)), generator=generator)
        target.permute(0, 2, 3, 1)[near] += nudge.to(target.device)
    raise RuntimeError(f"{workload.name}: {count} ReLU inputs stay near zero")


def _place(v: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    return {
        name: t.detach().to(memory_format=FORMATS[layout]) if t.dim() == 4 else t.detach().clone()
        for name, t in v.items()
    }


def op_program(call: Callable[..., Tensor], workload: Workload, v: dict[str, Tensor]):
    v = _place(v, workload.layout or "NCHW")
    state = {name: v[name] for name in ("running_mean", "running_var")}
    wrt = {name: v[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    norm = Norm(*state.values(), v["weight"], v["bias"], training=True)
    forward = partial(call, v["x"], norm, v["residual"])
    inputs = *wrt.values(), *state.values()
    return TensorProgram(forward, workload.directions, wrt, state, v["dy"], inputs)


def block_program(
    factory: Callable[..., nn.Module],
    workload: Workload,
    v: dict[str, Tensor],
    layout: str = "NCHW",
    wrap: Callable = lambda module: module,
) -> TensorProgram:
    """``factory``'s block with the values ``v``; what is called is ``wrap`` of it."""
    v = _place(v, layout)
    args, kwargs = workload.block_arguments()
    module = factory(*args, **kwargs, device=v["x"].device, dtype=v["bn1.weight"].dtype)
    module.load_state_dict({k: t for k, t in v.items() if k not in ("x", "dy")}, strict=False)
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d)):  # BatchNorm stays in float32
            part.to(v["x"].dtype)
    module = module.to(memory_format=FORMATS[layout]).train(workload.training)
    state = {name: t for name, t in module.named_buffers() if t.is_floating_point()}
    wrt = {"x": v["x"], **dict(module.named_parameters())} if workload.training else {}
    if workload.training:
        v["x"].requires_grad_()
    call, x = wrap(module), v["x"]
    return TensorProgram(lambda: call(x), workload.directions, wrt, state, v["dy"], (x,), module)


def exact_program(workload: Workload, v: dict[str, Tensor]) -> TensorProgram:
    """The workload in float64, by the reference."""
    if workload.suite == "ops":
        return op_program(reference.bn_act, workload, double(v))
    return block_program(plain_block(workload), workload, double(v))
