"""Hardware counters of a launch of each kind of kernel, at sizes of ResNet-50, by Nsight Compute:
``python benchmarks/device/counters.py``.

Where the counters cannot be read, or there is no GPU, the kernels just run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
from harness.program import CL  # noqa: E402
from suites import convs, inference, ops  # noqa: E402

from device import smoke  # noqa: E402

KERNELS = "regex:bn_act|training_convolution|conv_bn_act|conv_halo|res_chain"
METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)  # fmt: skip


def trials() -> list[smoke.Trial]:
    """Of five kinds of kernel: BatchNorm, three convolutions, a chain."""
    n, c, size = (256, 64, 56) if smoke.HAS_GPU else (2, 16, 6)
    shape, halo = (n, c, size, size), convs.Conv(c, 3, 1)
    calls = convs.training_convs_of("bottleneck", (4 * c,), size, n)
    return [
        smoke.Trial(ops.op(shape, CL, "bf16"), "cuda" if smoke.HAS_GPU else "cpu"),
        smoke.Trial(next(w for w in calls if w.call.backward), "triton"),
        smoke.Trial(convs.conv(shape, "bf16", convs.Conv(4 * c, 1, 1, "add")), "triton"),
        smoke.Trial(convs.conv(shape, "bf16", halo), "conv_halo"),
        smoke.Trial(inference.chain(9, c, 16 if smoke.HAS_GPU else 6, n, "bf16"),
                    "cuda" if smoke.HAS_GPU else "cpu"),
    ]  # fmt: skip


def run_once() -> int:
    """How many kernels ran; only what is between the profiler's marks is counted."""
    count = 0
    for trial in trials():
        _, able, why = smoke.candidates(trial)
        for one in able:
            program = one.build(trial.workload.values(smoke.DEVICE))
            program.run()
            if smoke.HAS_GPU:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            program.run()
            if smoke.HAS_GPU:
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            count += 1
        print(trial.workload.name, "ran" if able else f"cannot run: {'; '.join(why)}", flush=True)
    return count


def main() -> int:
    found = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if "--once" in sys.argv or not smoke.HAS_GPU or not Path(found).exists():
        if "--once" not in sys.argv:
            print("no GPU or no ncu: no counters are read")
        return 0 if run_once() else 1
    options = ["--csv", "--clock-control", "none", "--profile-from-start", "off", "-k", KERNELS]
    options += ["--metrics", ",".join(METRICS)]
    if subprocess.run([found, *options, sys.executable, __file__, "--once"]).returncode == 0:
        return 0
    print("ncu cannot read the counters here, see above: the kernels run without it")
    return 0 if run_once() else 1


if __name__ == "__main__":
    sys.exit(main())
