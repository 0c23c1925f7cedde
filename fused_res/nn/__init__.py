"""Drop-in modules."""

from .blocks import FusedResBlock

__all__ = ["FusedResBlock"]
