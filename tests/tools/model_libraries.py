"""The model libraries, imported once: ``from model_libraries import timm, torchvision``."""

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    # torchvision wants operators its library registers; beside a PyTorch without CUDA the one that
    # pip installs does not load, and nothing here calls them
    if "torchvision::nms" not in str(error):
        raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")  # lives as long as this module
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import timm
import transformers

__all__ = ["timm", "torchvision", "transformers"]
