"""Threads that share the maps of a chain: no more of them than cores."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_res
from fused_res.reference import ResBlock

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(
        fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels here"
    ),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

UNLIMITED = 2**63 - 1
V1 = "4:memory:/pod\n3:cpu,cpuacct:{}\n"
GROUPS = {
    "no cgroups": ({}, UNLIMITED),
    "v2, no limit": ({"proc/self/cgroup": "0::/\n", "cpu.max": "max 100000\n"}, UNLIMITED),
    "v2, 2.5": ({"proc/self/cgroup": "0::/\n", "cpu.max": "250000 100000\n"}, 2),
    "v2, half of one": ({"proc/self/cgroup": "0::/\n", "cpu.max": "50000 100000\n"}, 1),
    "v2, the outer group has less": (
        {
            "proc/self/cgroup": "0::/pod/main\n",
            "pod/cpu.max": "300000 100000\n",
            "pod/main/cpu.max": "400000 100000\n",
        },
        3,
    ),
    "v2, in a container": (
        {"proc/self/cgroup": "0::/known/to/the/host\n", "cpu.max": "400000 100000\n"},
        4,
    ),
    "v1": (
        {
            "proc/self/cgroup": V1.format("/pod/main"),
            "cpu/pod/cpu.cfs_quota_us": "-1\n",
            "cpu/pod/cpu.cfs_period_us": "100000\n",
            "cpu/pod/main/cpu.cfs_quota_us": "150000\n",
            "cpu/pod/main/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
    "v1, no limit": (
        {
            "proc/self/cgroup": V1.format("/"),
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        UNLIMITED,
    ),
    "nonsense": ({"proc/self/cgroup": "cpu\n::\n0::x\n", "cpu.max": "many\n"}, UNLIMITED),
}


def load(path):
    library = ctypes.CDLL(str(path))
    for name, argument in (("cpu_quota", ctypes.c_char_p), ("team_size", ctypes.c_int64)):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [argument]
    return library


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """csrc/cpu/cores.cpp and team.h as a library of their own."""
    path = tmp_path_factory.mktemp("cores") / "cores.so"
    root = Path(torch.__file__).parent
    source = Path(__file__).with_name("cores.cpp")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu"]
    subprocess.run([COMPILER, *flags, *include, str(source), "-o", str(path), *link], check=True)
    return path


@pytest.fixture(scope="module")
def library(path):
    return load(path)


@pytest.mark.parametrize("name", GROUPS)
def test_quota_of_a_cgroup(library, tmp_path, name):
    files, expected = GROUPS[name]
    for path, text in files.items():
        folder = "" if path.startswith("proc") else "sys/fs/cgroup"
        file = tmp_path / folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert library.cpu_quota(str(tmp_path).encode()) == expected


@pytest.fixture
def chain():
    """A chain and what it makes of an image with one thread; more threads are for the test."""
    torch.manual_seed(0)
    net = nn.Sequential(*[ResBlock(32, 32, kind="single", relu="before") for _ in range(20)]).eval()
    fused_res.fuse_(net)
    net.to(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 16, 16).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield net, x, packed(net, x)
    torch.set_num_threads(before)


def packed(net, x):
    """By Winograd's 4x4 whatever the number of threads, which also chooses the implementation."""
    weights = [torch.ops.fused_res.winograd_weight(b.conv1.weight, None, 4) for b in net]
    program = [4, 3, 32, 1, 1] * len(weights)
    return torch.ops.fused_res.packed_chain(weights, [None] * len(weights), program, x.size(1))


def cores(library):
    return min(len(os.sched_getaffinity(0)), library.cpu_quota(b""))


def test_a_team_has_no_more_threads_than_cores(library):
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    sizes = [library.team_size(threads) for threads in (1, 2, 3, 16)]
    torch.set_num_threads(before)
    assert sizes == [min(threads, cores(library)) for threads in (1, 2, 3, 16)]


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("threads", [2, 16])
def test_more_threads_than_cores(chain, images, threads):
    net, x, program = chain
    x = torch.randn(images, *x.shape[1:]).to(memory_format=torch.channels_last)
    expected, by_net = torch.ops.fused_res.res_chain(x, program), net(x)
    torch.set_num_threads(threads)
    for _ in range(3):
        assert torch.equal(torch.ops.fused_res.res_chain(x, program), expected)
    torch.testing.assert_close(net(x), by_net, rtol=1e-4, atol=1e-4)


def test_chains_in_several_python_threads(library, chain):
    _, x, program = chain
    inputs = [x * (i + 1) for i in range(6)]
    expected = [torch.ops.fused_res.res_chain(x, program) for x in inputs]
    torch.set_num_threads(4)
    wrong, sizes, started = [], [], threading.Barrier(len(inputs))

    def work(i):
        torch.set_num_threads(4)
        started.wait()
        for _ in range(20):
            sizes.append(library.team_size(4))
            if not torch.equal(torch.ops.fused_res.res_chain(inputs[i], program), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert all(1 <= size <= min(4, cores(library)) for size in sizes)
    # what each took is given back
    assert library.team_size(4) == min(4, cores(library))


ONE_CORE = """
import ctypes, os, sys, torch
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
import fused_res
torch.set_num_threads(4)
print(ctypes.CDLL(sys.argv[1]).team_size(4))
weights = [torch.ops.fused_res.winograd_weight(torch.randn(32, 32, 3, 3), None, 2)] * 4
chain = torch.ops.fused_res.packed_chain(weights, [None] * 4, [2, 3, 32, 1, 1] * 4, 32)
x = torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
y = torch.ops.fused_res.res_chain(x, chain)
torch.set_num_threads(1)
print(torch.equal(y, torch.ops.fused_res.res_chain(x, chain)))
"""


def test_a_process_of_one_core(path):
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "True"]
