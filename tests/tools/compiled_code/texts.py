"""What Triton's compiler made of kernels, as text; in a process in which Triton compiles instead of
interpreting: ``python texts.py sm_90 bn_act`` prints JSON."""

from __future__ import annotations

import base64
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from unittest import mock

import kernels_report as report
import torch

from fused_res.kernels import bn_act_fwd, conv_tiles

TRAINING, INFERENCE = report.training_configurations, report.conv_configurations


def reapplied() -> list:
    """The pass over the elements of a ReLU without a residual."""
    found = []
    for layout, shapes in report.SHAPES.items():
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        for dtype in report.DTYPES:
            x = torch.empty(shapes[0], dtype=dtype, device="meta").to(memory_format=memory)
            stats = torch.empty(5, shapes[0][1], device="meta")
            with report.recording(str(dtype), layout, "none") as launched:
                bn_act_fwd.reapply(x, stats)
            found += launched
    return list(dict.fromkeys(found))


def _few(configurations: list) -> list:
    """Of each tile one, with another epilogue each time."""
    tiles: dict[tuple, list] = {}
    for c in configurations:
        tiles.setdefault((c.tile, c.stages, c.dtype), []).append(c)
    return [same[i % len(same)] for i, same in enumerate(tiles.values())]


def chosen(what: str) -> list:
    """descriptor: all kernels with tensor descriptors; few: some of them; pointer: the other
    convolutions; bn_act: all of it; relu: those that compute the sign of a ReLU once more,
    half of the convolutions."""
    if what == "bn_act":
        return report.configurations()
    if what == "relu":
        again = [c for c in report.configurations() if c.kernel.endswith("reapply_kernel")]
        epilogues = [c for c in TRAINING() if c.residual == "RELU"]
        return reapplied() + again + epilogues[::2]
    kind = "pointer" if what == "pointer" else "descriptor"
    every = [c for c in TRAINING() + INFERENCE() if c.kernel.endswith(f"_{kind}_kernel")]
    return _few(every) if what == "few" else every


def text(c, target: str) -> dict:
    """Of one compilation."""
    if target != "sm_80" and dict(c.constants).get("PRECISION") == "tf32":
        config = conv_tiles.CONFIGS[0]._replace(kind="pointer", stages=c.stages)
        c = c._replace(stages=conv_tiles.pipeline(config, through_async_proxy=True))
    made = report.build(c, target)
    return {
        "kernel": c.kernel,
        "name": f"{c.kernel} {c.dtype} {c.tile} {c.layout} {c.residual}",
        "residual": c.residual,
        "constants": dict(c.constants),
        "ptx": made.asm["ptx"],
        "ttgir": made.asm["ttgir"],
        "cubin": base64.b64encode(made.asm["cubin"]).decode(),
    }


def main(target: str, what: str) -> None:
    configurations = chosen(what)
    with ProcessPoolExecutor(2) as pool, mock.patch.dict("os.environ", OMP_NUM_THREADS="1"):
        texts = list(pool.map(partial(text, target=target), configurations))
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
