"""Launches of Triton's kernels by a driver that stands for a GPU's: ``prepared_launches.py WHAT
CAPABILITY``. Prints how many kernels came from TRITON_CACHE_DIR, and how many were compiled.

``fill`` compiles some as ``make gpu-prepare`` does. ``few`` launches the same as a GPU's machine
does, on tensors with memory; ``every`` all that both runs of ``make gpu`` launch, on meta tensors.
Nothing runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import triton  # noqa: E402
from device import launches  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from fused_res.dispatch import training_conv, training_conv_candidates  # noqa: E402


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        assert binary[:4] == b"\x7fELF"
        return 1, 1, 32, 0, 1024


class Device(launches.Device):
    """Launches nothing, and counts."""

    launched = 0
    utils = Utils()

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def launcher_cls(self, src: object, metadata: object):
        def count(*args: object) -> None:
            Device.launched += 1

        return count


def few(device: str, run) -> None:
    """Both ways of a convolution with its norm, in every epilogue."""
    shape = 2, 64, 8, 8
    sizes = (1, 1), (1, 1), (1, 1), 1, False
    for backward, epilogue in ((False, training_conv.STATISTICS), (True, training_conv.RELU)):
        call = training_conv.Call(
            torch.device(device), torch.bfloat16, shape, True, (64, 64, 3, 3), *sizes, backward,
            epilogue,
        )  # fmt: skip
        run(call)


def on_memory(call: training_conv.Call) -> None:
    steps = training_conv_candidates.Steps(call, training_conv_candidates.values(call, "cpu"))
    for candidate in [training_conv.ATEN, *steps.candidates()[1:2]]:
        steps.run(candidate)


def main(what: str, capability: int) -> None:
    hits: list[bool] = []
    if what == "fill":
        with launches.collecting(capability) as found:
            few("meta", lambda call: launches.training_convolution(call, 1))
        errors = launches.compile_all(found, capability, 1)
        assert not errors, errors
        print(json.dumps({"compiled": len(found)}))
        return
    driver.set_active(Device(capability))
    triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    with launches.on_device(capability):
        if what == "every":
            launches.every_launch()
        else:
            few("cpu", on_memory)
    counts = {"taken": sum(hits), "compiled": hits.count(False), "launched": Device.launched}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
