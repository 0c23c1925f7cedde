"""The emulation of CUDA kernels: that it sees races and what memory costs, in kernels of which both
are known."""

import os
import shutil
from ctypes import c_bool, c_char_p, c_int, c_uint64, c_void_p

import pytest
import torch

from cuda_emulation import Cost, EmulationError, Library

COMPILER = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SEEDS = range(20)


class Toys(Library):
    """``toys_emulated.cpp``."""

    def __init__(self, folder, compiler):
        super().__init__("toys_emulated", folder, compiler)
        library = self.library
        library.name_of.restype = library.run_toy.restype = library.run_strided.restype = c_char_p
        library.run_toy.argtypes = [c_int, c_bool, c_void_p, c_void_p, c_uint64]
        library.run_strided.argtypes = [c_int, c_int, c_void_p]
        self.names = []
        while name := library.name_of(len(self.names)):
            self.names.append(name.decode())

    def run(self, name, right, seed):
        self._start()
        out, given = torch.zeros(128), torch.ones(256)
        pointers = self._pointer("out", out, True), self._pointer("in", given)
        self._finish(self.library.run_toy(self.names.index(name), right, *pointers, seed))

    def strided(self, bytes, stride):
        self._start()
        self.count_requests(True)
        out = torch.zeros(32 * stride // 4 + 64, dtype=torch.int32)
        out = out[(-out.data_ptr() // 4) % 32 :]  # to the start of 128 bytes
        self._finish(self.library.run_strided(bytes, stride, self._pointer("out", out, True)))
        self.count_requests(False)
        return self.requests()


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return Toys(tmp_path_factory.mktemp("emulation"), COMPILER)


FAULTS = {
    "block_barrier": "race: a .* of shared memory .* with a (read|write)",
    "write_after_read": "race: a .* of shared memory .* with a (read|write)",
    "warp_barrier": "race: a .* of shared memory .* with a (read|write)",
    "barrier_of_too_few": "race: a .* of shared memory .* with a (read|write)",
    "matrix": "race: a .* of shared memory .* with a (read|write)",
    "lanes_apart": "lanes that went different ways do something together",
    "wait_for_copy": "race: a read of shared memory .* with a copy that was not waited for",
    "wait_for_too_few": "race: a read of shared memory .* with a copy that was not waited for",
    "copy_of_another": "race: a .* of shared memory .* with a",
    "copy_too_early": "race: a .* of shared memory .* with a",
    "source_too_early": "race: a write of out at .* before a copy of it was waited for",
    "source_of_its_own": "race: a write of out at .* before a copy of it was waited for",
    "narrow": "race: a write of shared memory .* narrower than what is looked at",
    "cluster_wait": "race: a .* of shared memory .* with a (read|write)",
    "cluster_of_one": "race: a .* of shared memory .* with a (read|write)",
    "cluster_start": "another block's shared memory before it may have started",
    "cluster_end": "a block may have ended before another's access to its shared memory",
    "grid_wait": "race: a .* of out at .* with a (read|write)",
    "grid_write_after_read": "race: a .* of out at .* with a (read|write)",
    "blocks_meet": "race: a write of out at .* with a write",
    "block_reads": "race: a .* of out at .* with a (read|write)",
    "threads_meet": "race: a write of out at .* with a write",
}


def test_each_kind_of_fault_is_listed(toys):
    assert toys.names == list(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_race_is_found_in_any_order_of_threads(toys, name):
    for seed in SEEDS:
        with pytest.raises(EmulationError, match=f"{name}: {FAULTS[name]}"):
            toys.run(name, False, seed)


@pytest.mark.parametrize("name", FAULTS)
def test_no_race_is_found_where_there_is_none(toys, name):
    for seed in SEEDS:
        toys.run(name, True, seed)


# bytes of an access, bytes from lane to lane -> wavefronts, the least; sectors, the least
@pytest.mark.parametrize(
    "bytes, stride, waves, least_waves, sectors, least_sectors",
    [
        (4, 4, 1, 1, 4, 4),
        (4, 8, 2, 1, 8, 4),
        (4, 128, 32, 1, 32, 4),
        (4, 132, 1, 1, 32, 4),
        (8, 8, 2, 2, 8, 8),
        (8, 16, 4, 2, 16, 8),
        (16, 16, 4, 4, 16, 16),
        (16, 32, 8, 4, 32, 16),
        (16, 48, 4, 4, 32, 16),
        (16, 128, 32, 4, 32, 16),
        (16, 144, 4, 4, 32, 16),
    ],
)
def test_memory_costs_what_is_known(
    toys, bytes, stride, waves, least_waves, sectors, least_sectors
):
    assert toys.strided(bytes, stride) == {
        ("strided", "shared", "store"): Cost(1, waves, least_waves),
        ("strided", "global", "store"): Cost(1, sectors, least_sectors),
    }
