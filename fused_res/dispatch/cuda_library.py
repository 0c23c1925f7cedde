"""Whether this driver and these GPUs can run the CUDA library.

The library names its CUDA runtime and the architectures that it has code for. Without this check a
kernel would fail at its first launch, where nothing can fall back any more. The driver's version is
asked without CUDA being initialised; the GPUs are looked at when the program does that.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LEAST_CAPABILITY = 8, 0  # the kernels copy asynchronously and multiply bfloat16


class Facts(NamedTuple):
    """runtime, driver: CUDA versions, 13000 for 13.0; driver 0: there is none.
    code: architectures as in TORCH_CUDA_ARCH_LIST."""

    runtime: int
    driver: int
    code: tuple[str, ...]


def parse(text: str) -> Facts:
    """Facts from the text of ``fused_res_cuda_facts`` in ``csrc/cuda/ops.cu``."""
    words = dict(word.split("=", 1) for word in text.split())
    code = tuple(filter(None, words["code"].split(";")))
    return Facts(int(words["runtime"]), int(words["driver"]), code)


def read(path: Path) -> Facts:
    """The facts of a library that is loaded already.

    Raises:
        AttributeError: it is older than this module.
    """
    function = ctypes.CDLL(str(path)).fused_res_cuda_facts
    function.restype = ctypes.c_char_p
    return parse(function().decode())


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, for example ``9.0a``, runs on a device, or its PTX does."""
    numbers, suffix, ptx = re.fullmatch(r"(\d+\.\d+)([af]?)(\+PTX)?", architecture).groups()
    of = tuple(map(int, numbers.split(".")))
    if suffix == "a":
        return capability == of
    return capability >= of if ptx and not suffix else capability[0] == of[0] and capability >= of


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not(facts: Facts) -> str | None:
    """Why the driver cannot run the library; None where it can."""
    if facts.driver // 1000 < facts.runtime // 1000:
        return (
            f"it is built with CUDA {_version(facts.runtime)}, and the driver is for CUDA "
            f"{_version(facts.driver)}: a newer driver or an older nvcc is needed"
        )
    return None


def why_not_on(devices: Sequence[tuple[int, int]], facts: Facts) -> str | None:
    """Why one of the devices, of these compute capabilities, cannot run it; None where all can."""
    for i, capability in enumerate(devices):
        device = f"GPU {i} (compute capability {'.'.join(map(str, capability))})"
        if capability < LEAST_CAPABILITY:
            return f"{device} is older than 8.0; CUDA_VISIBLE_DEVICES can hide it"
        able = [architecture for architecture in facts.code if runs_on(architecture, capability)]
        if not able:
            return (
                f"{device} has no code in it, only {', '.join(facts.code)} have: "
                "TORCH_CUDA_ARCH_LIST chooses the architectures when fused_res is built"
            )
        machine_code = any(runs_on(name.removesuffix("+PTX"), capability) for name in able)
        if not machine_code and facts.driver < facts.runtime:
            return (
                f"{device} has only PTX in it, of CUDA {_version(facts.runtime)}, and the driver "
                f"is for CUDA {_version(facts.driver)}: a newer driver is needed"
            )
    return None
