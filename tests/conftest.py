import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter: so says this variable where they are
# imported. The processes that tests start are not to inherit it.
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import fused_res

        if fused_res.backends.STATUS["triton"] is None:
            import fused_res.kernels.bn_act


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
