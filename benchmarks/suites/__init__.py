"""Every suite, by name: each file of this folder with ``SUITES`` registers its own."""

from __future__ import annotations

import importlib
import pkgutil

from harness.suite import Suite, Workload

_modules = [importlib.import_module(f"suites.{m.name}") for m in pkgutil.iter_modules(__path__)]
_found = [suite for module in _modules for suite in getattr(module, "SUITES", ())]
SUITES: dict[str, Suite] = {s.name: s for s in sorted(_found, key=lambda s: (s.order, s.name))}


def workloads(name: str, gpu: bool = False, quick: bool = False) -> list[Workload]:
    make = SUITES[name].workloads
    return make(gpu, quick) if make else []
