"""The fused ops, one file each: schema, fake, autograd Function, public function."""

import hashlib
from pathlib import Path

import torch
import torch.compiler.config

from ..version import __version__


def fingerprint() -> str:
    """The version and a hash of the files that say what the ops are given and return."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)
    return f"fused_res-{__version__}-{hashlib.sha256(content).hexdigest()[:16]}"


# What torch.compile keeps on disk knows our ops by name only: without this, a graph compiled with
# an earlier version would be loaded, and fail on results of other shapes.
tags = (torch.compiler.config.cache_key_tag, fingerprint())
torch.compiler.config.cache_key_tag = "+".join(filter(None, tags))

library = torch.library.Library("fused_res", "DEF")
library.define("cpu_isa(int level) -> int")
library.define("empty_cache() -> int")
library.define("cuda_plan(int plan) -> int")
library.define("training_winograd(int limit) -> int")
