import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fused_res.dispatch import inference_conv, tuning, user_timings

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
sys.path.append(str(Path(__file__).parent / "tools"))
from tensor_maps import tensor_maps  # noqa: F401  (a fixture of every test)

# Without a GPU Triton's kernels run in its interpreter: so says this variable where they are
# imported. It is set for that and in tests/*/test_triton.py; to other tests there is no Triton.
importlib.import_module("fused_res")
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("fused_res.kernels.bn_act")
        importlib.import_module("fused_res.kernels.conv_bn_act")
        importlib.import_module("fused_res.kernels.res_block")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Two threads on small maps wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    """csrc/cuda's host code on the CPU, built once for all tests of it, in any process."""
    from cuda_emulation.host import Host

    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    return Host(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder, compiler)


@pytest.fixture
def host(host_library):
    """On a device of 132 multiprocessors that has clusters, which is not the current one."""
    host_library.reset()
    return host_library


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """What is tuned goes to a folder of the tests' own, also from processes that they start."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_RES_CACHE", folder)
        patch.setattr(user_timings, "settings", user_timings.settings._replace(cache=folder))
        patch.setattr(tuning, "ROUNDS", (1, 1))  # the figures do not matter
        patch.setattr(tuning, "SCRATCH", {"cpu": 1, "cuda": 1})
        yield folder


@pytest.fixture(autouse=True)
def untuned(cache):
    """What one test measures chooses for no other."""
    yield
    for path in user_timings.files():
        path.unlink()
    user_timings.forget()
    inference_conv.forget()
