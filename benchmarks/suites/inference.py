"""What runs a net or a block in eval mode: PyTorch, other runtimes, cuDNN's fused calls, and ours.

Convolutions and linear layers are of the workload's dtype, BatchNorm of float32; no autocast, which
would cast the weights in every call.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import torch
from folding import FoldedBlock
from nets import Values, folded, fused
from programs import Program
from roofline import module_of
from torch import Tensor, nn
from workloads import CL, FORMATS, Workload

import fused_res

# What makes of a net and its input the call that is timed, which is given the input again.
Prepare = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


class InferenceProgram(Program):
    """``prepare``'s call of the workload's module, given the values ``v``."""

    def __init__(
        self, prepare: Prepare, workload: Workload, v: Values | dict, layout: str = CL
    ) -> None:
        if workload.net:
            x, state = v.x, v.state
        else:
            x, state = v["x"], {k: t for k, t in v.items() if k not in ("x", "dy")}
        module = module_of(workload).to(x.device)
        module.load_state_dict(state, strict=False)  # a block's values count no batches
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(workload.dtype)
        module = module.to(memory_format=FORMATS[layout]).eval()
        self.x = x.to(workload.dtype, memory_format=FORMATS[layout])
        self.inputs = (self.x,)
        self.directions = workload.directions
        self.calls = {"eval": self.evaluate}
        with torch.no_grad():
            self.call = prepare(module, self.x)

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x)

    def result(self) -> dict[str, Tensor]:
        return {"y": self.run()[0].clone()}


def eager(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return module


def compiled(
    module: nn.Module, x: Tensor, freezing: bool, mode: str = "default"
) -> Callable[[Tensor], Tensor]:
    """``torch.compile`` of one fixed shape, told that ``x`` stays where it is.

    freezing: BatchNorm folded and weights in the layout that kernels like. The global setting asks
    for it: the one in ``options=`` is not seen where the graph is traced. It is there so that two
    rivals differ: else the second one is silently given the graph of the first.
    """
    if mode != "default":  # has CUDA graphs
        torch._dynamo.mark_static_address(x, guard=False)
    options = {**torch._inductor.list_mode_options(mode), "freezing": freezing}
    call = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    with torch._inductor.config.patch(freezing=freezing):
        call(x)
    return call


def optimized(module: nn.Module, x: Tensor, freeze: bool = False) -> Callable[[Tensor], Tensor]:
    return fused_res.optimize_for_inference(module, x, freeze=freeze)


def with_backend(module: nn.Module, x: Tensor, backend: str) -> Callable[[Tensor], Tensor]:
    """The residual blocks fused, run by ``backend`` or not at all; the rest is PyTorch's."""
    return fused(nn.Sequential(module), backend)


def cudnn_fused(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.Sequential):
        return folded(module, x.dtype)
    return FoldedBlock(module, x.dtype)


def _onnx(module: nn.Module, x: Tensor) -> bytes:
    # By the older exporter: BatchNorm is folded by either, but the newer one takes 5.7 s for a
    # ResNet-50 where this takes 1.0 s, and ONNX Runtime is 6 % slower with what it writes.
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, dynamo=False)
    return file.getvalue()


def onnxruntime(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As many threads as PyTorch has. Imports what may not be there: a rival that is refused."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        _onnx(module, x), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As many threads as PyTorch has, and float32 inside, which is not its default everywhere."""
    import openvino

    core = openvino.Core()
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = core.compile_model(
        core.read_model(_onnx(module, x)),
        "CPU",
        {**threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
    )
    request = model.create_infer_request()

    def call(x: Tensor) -> Tensor:
        out = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0])

    return call


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino}
