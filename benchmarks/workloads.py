"""What is timed: the workloads of each suite, and the rivals that run them.

A rival is built into a ``Program``: a forward pass, the tensors to differentiate and a gradient to
start from. All rivals of a workload get the same values, and those of one layout the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fused_res import reference
from fused_res.backends import BACKENDS, why_not
from fused_res.ops.bn_act import bn_act

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Workload:
    """``layout`` is that of x, or None where each rival has its own (``blocks``)."""

    suite: str
    name: str
    shape: tuple[int, int, int, int]
    layout: str | None = None
    kind: str = "basic"
    width: int | None = None

    def block_arguments(self) -> tuple[tuple[int, int], dict]:
        channels = self.shape[1]
        return (channels, channels), {"kind": self.kind, "width": self.width}


def _op(shape: tuple[int, int, int, int], layout: str) -> Workload:
    return Workload("ops", f"bn_act {'x'.join(map(str, shape))} {layout}", shape, layout)


def _block(kind: str, shape: tuple[int, int, int, int], width: int | None = None) -> Workload:
    channels = f"{shape[1]}-{width}" if width else f"{shape[1]}"
    name = f"{kind} {channels}ch {shape[2]}x{shape[3]} batch {shape[0]}"
    return Workload("blocks", name, shape, None, kind, width)


OP_SHAPES = (
    (32, 64, 56, 56),
    (32, 64, 32, 32),
    (32, 512, 7, 7),
    (16, 256, 56, 56),
    (64, 32, 16, 16),
    (64, 32, 8, 8),
)
SUITES = {
    "ops": [_op(shape, layout) for layout in FORMATS for shape in OP_SHAPES],
    "blocks": [
        _block("basic", (32, 64, 56, 56)),
        _block("basic", (32, 64, 32, 32)),
        _block("basic", (32, 512, 7, 7)),
        _block("bottleneck", (16, 256, 56, 56), 64),
        _block("single", (64, 32, 16, 16)),
        _block("single", (64, 32, 8, 8)),
    ],
}
QUICK_SUITES = {
    "ops": [_op((8, 16, 12, 12), layout) for layout in FORMATS],
    "blocks": [_block("bottleneck", (4, 64, 12, 12), 16), _block("single", (8, 16, 9, 9))],
}


def ideal_bytes(workload: Workload) -> dict[str, int]:
    """Bytes an ideal bn_act (the op, or every one of a block beside library convolutions) moves.

    Statistics need a pass of their own, so x is read twice forward, x and dy twice backward.
    """
    n, c, h, w = workload.shape
    pixels = 4 * n * h * w
    mask = n * c * h * w // 8
    forward = 4 * pixels * c + mask  # x, x, residual -> y, mask
    backward = 6 * pixels * c + 2 * mask  # dy, x, mask; dy, x, mask -> dx, dresidual
    if workload.suite == "blocks":
        inner = workload.width or c
        convs = {
            "basic": [(c, inner, 3), (inner, c, 3)],
            "bottleneck": [(c, inner, 1), (inner, inner, 3), (inner, c, 1)],
            "single": [(c, c, 3)],
        }[workload.kind]
        if workload.kind == "single":
            backward -= pixels * c  # the ReLU comes before the add: dresidual is dy
        backward += 3 * pixels * c  # the gradients of branch and skip, added
        for c_in, c_out, k in convs:
            weight = 4 * c_in * c_out * k * k
            forward += pixels * (c_in + c_out) + weight
            backward += 2 * pixels * (c_in + c_out) + 2 * weight
        for _, c_out, _ in convs[:-1]:
            forward += 3 * pixels * c_out  # a, a -> z
            backward += 5 * pixels * c_out  # dz, a; dz, a -> da
    return {"forward": forward, "forward+backward": forward + backward}


@dataclass
class Program:
    forward: Callable[[], Tensor]
    wrt: dict[str, Tensor]
    state: dict[str, Tensor]  # running statistics
    dy: Tensor
    initial: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.initial = {name: t.clone() for name, t in self.state.items()}

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), tuple(self.wrt.values()), self.dy)

    def result(self) -> dict[str, Tensor]:
        """Output, gradients and running statistics of one step from the initial statistics."""
        for name, t in self.state.items():
            t.copy_(self.initial[name])
        y = self.forward()
        # clones: a CUDA graph overwrites its outputs
        result = {"y": y.detach().clone()}
        grads = torch.autograd.grad(y, tuple(self.wrt.values()), self.dy)
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


Build = Callable[[Workload, dict[str, Tensor]], Program]


@dataclass(frozen=True)
class Rival:
    """``slack``: how many times PyTorch's own error this rival may have."""

    name: str
    layout: str
    slack: float
    build: Build

    @property
    def label(self) -> str:
        return f"{self.name} {self.layout}"


def values(workload: Workload, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random float32 inputs, and for a block its parameters under their names."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = workload.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out = {"x": normal(n, c, h, w), "dy": normal(n, c, h, w)}
    if workload.suite == "ops":
        out["residual"] = normal(n, c, h, w)
        out["weight"], out["bias"] = 1 + 0.2 * normal(c), 0.2 * normal(c)
        out["running_mean"], out["running_var"] = torch.zeros(c), torch.ones(c)
    else:
        args, kwargs = workload.block_arguments()
        for name, p in reference.ResBlock(*args, **kwargs).named_parameters():
            if p.dim() == 4:  # He et al., 2015
                out[name] = normal(*p.shape) * (2 / p[0].numel()) ** 0.5
            else:
                out[name] = float(name.endswith("weight")) + 0.2 * normal(*p.shape)
    out = {name: t.to(device) for name, t in out.items()}
    _separate(workload, out)
    return out


def _relu_inputs(workload: Workload, v: dict[str, Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad():
        if workload.suite == "ops":
            program = op_program(partial(reference.bn_act, act="none"), workload, v)
            seen.append(program.forward())
        else:
            program = block_program(reference.ResBlock, workload, v)
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


def op_program(call: Callable[..., Tensor], workload: Workload, v: dict[str, Tensor]) -> Program:
    v = _place(v, workload.layout or "NCHW")
    state = {name: v[name] for name in ("running_mean", "running_var")}
    wrt = {name: v[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    norm = reference.Norm(*state.values(), v["weight"], v["bias"], training=True)
    return Program(lambda: call(v["x"], norm, v["residual"]), wrt, state, v["dy"])


@dataclass
class BlockProgram(Program):
    module: torch.nn.Module


def block_program(
    factory: Callable[..., torch.nn.Module],
    workload: Workload,
    v: dict[str, Tensor],
    layout: str = "NCHW",
    wrap: Callable = lambda module: module,
) -> BlockProgram:
    v = _place(v, layout)
    args, kwargs = workload.block_arguments()
    module = factory(*args, **kwargs, device=v["x"].device, dtype=v["x"].dtype)
    module.load_state_dict({k: t for k, t in v.items() if k not in ("x", "dy")}, strict=False)
    module = module.to(memory_format=FORMATS[layout]).train()
    state = {name: t for name, t in module.named_buffers() if t.is_floating_point()}
    wrt = {"x": v["x"].requires_grad_(), **dict(module.named_parameters())}
    call = wrap(module)
    return BlockProgram(lambda: call(v["x"]), wrt, state, v["dy"], module)


def exact_program(workload: Workload, v: dict[str, Tensor]) -> Program:
    """The workload in float64, by the reference."""
    if workload.suite == "ops":
        return op_program(reference.bn_act, workload, double(v))
    return block_program(reference.ResBlock, workload, double(v))


def _fused_op(backend: str, x: Tensor, norm: reference.Norm, residual: Tensor) -> Tensor:
    return bn_act(x, *norm, residual=residual, backend=backend)


def fused_backends(device: str) -> list[str]:
    return [
        name
        for name in BACKENDS
        if name not in ("auto", "eager")
        and why_not("bn_act", name, torch.device(device).type, torch.float32) is None
    ]


def compile_modes(max_autotune: bool) -> dict[str, dict]:
    # one fixed shape and no graph break: what torch.compile is best at
    fixed = {"fullgraph": True, "dynamic": False}
    modes = {"compile": fixed}
    if max_autotune:
        modes["compile-max-autotune"] = {**fixed, "mode": "max-autotune"}
    return modes


# torch.compile may reassociate sums as it likes: it is timed with this much more error than eager
COMPILE_SLACK = 32.0
OUR_SLACK = 1.5


def rivals(workload: Workload, device: str, modes: dict[str, dict]) -> list[Rival]:
    """Who runs ``workload``: PyTorch first, then torch.compile in ``modes``, then our backends."""
    if workload.suite == "ops":
        layout = workload.layout

        def op(call: Callable) -> Build:
            return partial(op_program, call)

        out = [Rival("eager", layout, 1.0, op(reference.bn_act))]
        for name, options in modes.items():
            compiled = torch.compile(reference.bn_act, **options)
            out.append(Rival(name, layout, COMPILE_SLACK, op(compiled)))
        for name in fused_backends(device):
            call = partial(_fused_op, name)
            out.append(Rival(f"fused_res-{name}", layout, OUR_SLACK, op(call)))
        return out

    from fused_res import FusedResBlock

    def block(factory: Callable, layout: str, wrap: Callable = lambda module: module) -> Build:
        return partial(block_program, factory, layout=layout, wrap=wrap)

    cl = "channels_last"
    out = [Rival("eager", layout, 1.0, block(reference.ResBlock, layout)) for layout in FORMATS]
    for name, options in modes.items():
        build = block(reference.ResBlock, cl, partial(torch.compile, **options))
        out.append(Rival(name, cl, COMPILE_SLACK, build))
    for name in fused_backends(device):
        build = block(partial(FusedResBlock, backend=name), cl)
        out.append(Rival(f"fused_res-{name}", cl, OUR_SLACK, build))
    return out
