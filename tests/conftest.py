import importlib
import importlib.util

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter: so says this variable where they are
# imported. It is set for that and in tests/test_triton.py; to other tests there is no Triton.
importlib.import_module("fused_res")
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("fused_res.kernels.bn_act")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
