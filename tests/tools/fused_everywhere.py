"""A pytest plugin for other projects' tests: the nets that timm and torchvision make are fused.

PYTHONPATH=tests/tools python -m pytest -p fused_everywhere -k resnet .../timm/tests/test_models.py
"""

import functools
import importlib
import warnings

from model_libraries import timm, torchvision

import fused_res

NETS = {
    torchvision.models: ("resnet.ResNet", "regnet.RegNet"),
    timm.models: (
        "byobnet.ByobNet", "cspnet.CspNet", "dla.DLA", "dpn.DPN", "hrnet.HighResolutionNet",
        "regnet.RegNet", "resnet.ResNet", "resnetv2.ResNetV2", "senet.SENet", "tresnet.TResNet",
        "vovnet.VovNet",
    ),
}  # fmt: skip
counts = {"nets": 0, "whole": 0, "in part": 0, "skipped": 0}


def fuses(make):
    @functools.wraps(make)
    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = fused_res.fuse_(self)
        made = 1, len(report.fused), len(report.partly), len(report.skipped)
        for key, count in zip(counts, made, strict=True):
            counts[key] += count

    return init


for package, names in NETS.items():
    for name in names:
        module, _, cls = name.rpartition(".")
        net = getattr(importlib.import_module(f"{package.__name__}.{module}"), cls)
        net.__init__ = fuses(net.__init__)


def pytest_terminal_summary(terminalreporter):
    found = ", ".join(f"{count} {key}" for key, count in counts.items())
    terminalreporter.write_line(f"fused: {found}")
