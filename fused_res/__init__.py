"""Fused conv + BatchNorm + ReLU + residual blocks for PyTorch."""

from .backends import BackendUnavailable, backend
from .version import __version__

__all__ = ["BackendUnavailable", "__version__", "backend"]
