"""Every environment variable that fused_res reads at run time.

======================  ==========================  =============================================
variable                values (first is default)   meaning
======================  ==========================  =============================================
FUSED_RES_AUTOTUNE      1 0 full                    on a GPU: measure at first use (``full``: more)
FUSED_RES_BACKEND       auto cpu cuda triton eager  backend; ``eager`` turns all kernels off
FUSED_RES_CACHE         ~/.cache/fused_res          folder of the timings of ``fused_res.tune``
FUSED_RES_CPU_ISA       best plain avx2 avx512      highest instruction set of the CPU kernels
FUSED_RES_LOG           off dispatch                ``dispatch``: log what ran and why to stderr
FUSED_RES_WINOGRAD      4 2 0                       largest Winograd tile on a CPU (training: 2)
======================  ==========================  =============================================

They are read once, when ``fused_res`` is imported. If ``XDG_CACHE_HOME`` is an absolute path, it
replaces ``~/.cache``. Without a home directory no file is written. Variables of the build are in
``setup.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Backend = Literal["auto", "cpu", "cuda", "triton", "eager"]
BACKENDS = get_args(Backend)
CPU_ISAS = ("best", "plain", "avx2", "avx512")
AUTOTUNES = ("1", "0", "full")
LOGS = ("off", "dispatch")
WINOGRADS = ("4", "2", "0")


class Settings(NamedTuple):
    autotune: str
    backend: str
    cache: str | None
    cpu_isa: str
    log: str
    winograd: int


def _cache(environ: Mapping[str, str]) -> str | None:
    """The folder; None where no home directory is known."""
    given = environ.get("FUSED_RES_CACHE")
    if given:
        folder = os.path.expanduser(given)
        return None if folder.startswith("~") else folder  # an unknown user's home
    caches = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # the XDG specification ignores these
        home = os.path.expanduser("~") if os.environ.get("HOME") != "" else ""
        caches = os.path.join(home, ".cache")
    return os.path.join(caches, "fused_res") if os.path.isabs(caches) else None


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in ``environ``.

    Raises:
        ValueError: the value of a variable is not documented.
    """

    def one_of(name: str, values: tuple[str, ...]) -> str:
        value = environ.get(name) or values[0]
        if value not in values:
            raise ValueError(
                f"environment variable {name}={value!r} must be one of: {', '.join(values)}"
            )
        return value

    return Settings(
        one_of("FUSED_RES_AUTOTUNE", AUTOTUNES),
        one_of("FUSED_RES_BACKEND", BACKENDS),
        _cache(environ),
        one_of("FUSED_RES_CPU_ISA", CPU_ISAS),
        one_of("FUSED_RES_LOG", LOGS),
        int(one_of("FUSED_RES_WINOGRAD", WINOGRADS)),
    )


settings = read()
