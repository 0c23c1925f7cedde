"""Fused conv + BatchNorm + ReLU + residual blocks for PyTorch.

    import fused_res
    print(fused_res.fuse_(model))        # fuses the residual blocks of a model, in place
    block = fused_res.FusedResBlock(64, 128, stride=2)

``fused_res.reference`` computes the same in plain PyTorch. ``fused_res.ops`` has the single ops.
"""

from . import models, ops, reference
from .dispatch.backends import BackendUnavailable, backend, empty_cache
from .dispatch.tuning import TableNotWritten, TuneReport, tune
from .fuse.swap import FuseReport, fuse_, unfuse_
from .nn import FusedResBlock
from .reference import Norm
from .run.report import RunReport, report
from .serve.model import OptimizedModel
from .serve.optimize import optimize_for_inference, refresh
from .version import __version__

__all__ = [
    "BackendUnavailable",
    "FuseReport",
    "FusedResBlock",
    "Norm",
    "OptimizedModel",
    "RunReport",
    "TableNotWritten",
    "TuneReport",
    "__version__",
    "backend",
    "empty_cache",
    "fuse_",
    "models",
    "ops",
    "optimize_for_inference",
    "reference",
    "refresh",
    "report",
    "tune",
    "unfuse_",
]


def __dir__() -> list[str]:
    return sorted(__all__)
