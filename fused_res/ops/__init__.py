"""The fused ops, one file each: schema, fake, autograd Function, public function."""

import hashlib
from pathlib import Path

import torch
import torch.compiler.config

from ..version import __version__


def fingerprint() -> str:
    """The version and a hash of this folder's files, which define the ops' schemas."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)
    return f"fused_res-{__version__}-{hashlib.sha256(content).hexdigest()[:16]}"


# torch.compile's cache on disk knows custom ops by name only. Without this tag it would load a
# graph of an earlier version, which fails where an op returns other shapes now.
tags = (torch.compiler.config.cache_key_tag, fingerprint())
torch.compiler.config.cache_key_tag = "+".join(filter(None, tags))

library = torch.library.Library("fused_res", "DEF")
library.define("cpu_isa(int level) -> int")
library.define("empty_cache() -> int")
library.define("cuda_plan(int plan) -> int")
library.define("training_winograd(int limit) -> int")
