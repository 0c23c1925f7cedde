"""``fused-res train`` killed at any moment and resumed: as if it had never stopped."""

import os
import subprocess
import sys

import pytest
import train_killed
from sweeps import sweep


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no such call on this system")
@pytest.mark.parametrize("kills", sweep([6, 20], quick=[6]))
@pytest.mark.parametrize("name", train_killed.RUNS)
def test_killed_and_resumed_it_is_bit_for_bit_the_same(name, kills, tmp_path):
    pytest.importorskip("sklearn")
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    found = subprocess.run(
        [sys.executable, train_killed.__file__, name, str(kills), str(tmp_path)],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{kills} kills, ")
