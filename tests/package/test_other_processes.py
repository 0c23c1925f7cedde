"""Other programs: an interpreter without docstrings, a machine without a home, and models that have
no fused block."""

import os
import subprocess
import sys

import pytest
import torch
from sweeps import sweep

import fused_res
from fused_res import env
from fused_res.dispatch import user_timings


def python(code, *options, cwd=None, **environ):
    """What a process of its own prints; None in ``environ``: without the variable."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    variables = {name: value for name, value in variables.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=cwd,
        env=variables, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- python -OO

BLOCKS = """
import copy, pkgutil, importlib, torch, fused_res
from fused_res import cli
for module in pkgutil.walk_packages(fused_res.__path__, "fused_res."):
    if "__main__" not in module.name and "kernels" not in module.name and "_C" not in module.name:
        importlib.import_module(module.name)
net = torch.nn.Sequential(
    fused_res.FusedResBlock(8, 8), fused_res.reference.ResBlock(8, 16, 2, kind="bottleneck")
)
plain = copy.deepcopy(net)
fused = fused_res.fuse_(net).fused
if fused != ["1"]:
    raise SystemExit(f"fused {fused}")
x = torch.randn(2, 8, 6, 6)
net(x).sum().backward()
plain.load_state_dict(net.state_dict())
served = fused_res.optimize_for_inference(net, x, tune=False)
with fused_res.backend("eager"), torch.no_grad():
    expected = plain.eval()(x)
torch.testing.assert_close(served(x), expected, rtol=1e-4, atol=1e-4)
raise SystemExit(cli.main(["doctor"]))
"""


def test_without_docstrings_and_asserts():
    assert "fused_res" in python(BLOCKS, "-OO")


# --- no home

NO_PASSWD = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
SERVE = """
import os, warnings, torch, fused_res
from fused_res import cli
from fused_res.dispatch import tuning, user_timings
tuning.ROUNDS, tuning.SCRATCH = (1, 1), {"cpu": 1}
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), fused_res.FusedResBlock(8, 8))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    fused_res.optimize_for_inference(net, torch.randn(1, 3, 8, 8))(torch.randn(2, 3, 8, 8))
print(*(str(w.message) for w in said if "tune could not write" in str(w.message)))
for args in (["doctor"], ["tune", "--list"], ["tune", "--clear"]):
    if cli.main(args):
        raise SystemExit(f"{args} failed")
print("files:", os.listdir("."), "tables:", user_timings.files())
"""
HOMELESS = {"FUSED_RES_CACHE": None, "XDG_CACHE_HOME": None}


@pytest.mark.parametrize("home", [None, "/dev/null/nobody"])
def test_without_a_home(home, tmp_path):
    out = python(NO_PASSWD + SERVE, cwd=tmp_path, HOME=home, **HOMELESS)
    assert "files: [] tables: []" in out and os.listdir(tmp_path) == []
    reason = "Not a directory" if home == "/dev/null/nobody" else "there is no home directory"
    assert reason in out
    assert "FUSED_RES_CACHE must name a folder" in out


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"XDG_CACHE_HOME": "relative"}, os.path.expanduser("~/.cache/fused_res")),
        ({"XDG_CACHE_HOME": "~/x"}, os.path.expanduser("~/.cache/fused_res")),
        ({"FUSED_RES_CACHE": "~nobody-of-this-name/x"}, None),
        ({"FUSED_RES_CACHE": "relative"}, "relative"),
    ],
)
def test_the_folder_of_tables(variables, folder):
    assert env.read(variables).cache == folder


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_none(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert env.read({}).cache is None and env.read({"XDG_CACHE_HOME": "/x"}).cache == "/x/fused_res"


def test_nothing_is_written_without_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_timings, "settings", user_timings.settings._replace(cache=None))
    assert user_timings.table(torch.device("cpu")) == ({}, {}) and user_timings.files() == []
    with pytest.raises(OSError, match="no home directory"):
        user_timings.write(torch.device("cpu"), [])
    assert os.listdir(tmp_path) == []


# --- import fused_res changes nothing for others

# Before and after the import: all names of PyTorch's modules and classes, with how much is in each
# dictionary, list and set; and what is compiled of a model, an optimiser and a whole step.
IMPORTED = """
import sys, types, warnings
import torch, torch._dynamo, torch._functorch.config, torch._inductor.config
from torch import fx, nn
from torch._dynamo.utils import counters

def size(value):
    return len(value) if isinstance(value, (dict, list, set)) else None

def names():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "torch" or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value), size(value)
            if type(value) is type:
                members = list(vars(value).items())
                found |= {(name, key, k): (id(v), size(v)) for k, v in members}
    return found

def compiled():
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    def record(module, inputs):
        graphs.append(module.print_readable(print_output=False))
        return module.forward

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def step(x):
        optimiser.zero_grad()
        net(x).square().mean().backward()
        optimiser.step()

    model, update, whole = (torch.compile(f, backend=record) for f in (net, optimiser.step, step))
    for _ in range(2):
        x = torch.randn(2, 3, 6, 6)
        model(x).sum().backward()
        update()
        whole(x)
    return graphs, fx.symbolic_trace(net).code, {k: dict(v) for k, v in counters.items()}

warnings.simplefilter("ignore")
for _ in range(2):  # what the first time loads and counts is there
    there, alone = names(), compiled()
there = names()
import fused_res
now, beside = names(), compiled()
print(f"graphs: {len(alone[0])}, the same: {beside == alone}")
for name, value in there.items():
    if now.get(name, value) != value:
        print(*name)
"""
KNOWN = {  # the package's own ops and library
    "torch.library _impls", "torch.library _defs", "torch.jit._builtins _builtin_table",
    "torch.ops loaded_libraries", "torch.ops _dir",
}  # fmt: skip


def test_importing_changes_nothing_for_others():
    first, *changed = python(IMPORTED).splitlines()
    assert first == "graphs: 4, the same: True"
    assert set(changed) <= KNOWN


# --- and a compiled optimiser's steps are seen where weights are kept


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"fused": True})]
)
@pytest.mark.filterwarnings("ignore")
def test_steps_of_compiled_optimisers_are_seen(kind, options, backend):
    torch._dynamo.reset()
    block, x = fused_res.FusedResBlock(8, 8), torch.randn(2, 8, 6, 6)
    block(x).square().mean().backward()
    block.eval()
    step = kind(block.parameters(), 1e-3, **options).step
    if backend is not None:
        step = torch.compile(step, backend=backend)
    step()  # compiled before anything of this block is kept
    for _ in range(3):
        with torch.no_grad():
            block(x)
        step()
        with torch.no_grad():
            ours = block(x)
            with fused_res.backend("eager"):
                torch.testing.assert_close(ours, block(x), rtol=1e-5, atol=1e-6)


# --- classes of __main__ and of functions, by value, in another process

SENDER = """
import sys, cloudpickle, torch, torch.nn.functional as F
from torch import fx, nn
import fused_res

def scaled(x):
    return x * 0.5

@fx.wrap
def helper(x):
    return x * torch.sigmoid(x)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(self.branch(x) + x)

class Parts(Block):
    def forward(self, x):
        return F.relu(scaled(self.branch(x)) + x)

class Helper(Block):
    def forward(self, x):
        return helper(self.branch(x) + x)

def local():
    class Local(Block):
        def forward(self, x):
            return F.relu(super().branch(x) + x)
    return Local()

made = {"whole": Block, "parts": Parts, "helper": Helper, "local": local}[sys.argv[1]]().eval()
x = torch.randn(2, 8, 6, 6)
report = fused_res.fuse_(made)
if not (report.fused or report.partly):
    raise SystemExit(str(report))
if sys.argv[2] == "served":
    made = fused_res.optimize_for_inference(made, x, tune=False)
with torch.no_grad():
    y = made(x)
if sys.argv[2] == "class":
    made = type(made), made.state_dict()
with open(sys.argv[3], "wb") as file:
    cloudpickle.dump((made, x, y), file)
"""
RECEIVER = """
import copy, pickle, sys, torch
{extra}
with open(sys.argv[1], "rb") as file:
    made, x, y = pickle.load(file)
if isinstance(made, tuple):
    kind, state = made
    made = kind.original()
    made.__class__ = kind
    made.load_state_dict(state)
with torch.no_grad():
    torch.testing.assert_close(made.eval()(x), y)
    torch.testing.assert_close(copy.deepcopy(made)(x), y)
"""
# a function of the same name that is not the one which was sent
OTHER = "def helper(x):\n    return x * 0"


@pytest.mark.parametrize(
    ("name", "extra", "kind"),
    sweep(
        [
            ("whole", "", "served"),
            ("local", "", "block"),
            ("helper", "", "class"),
            ("helper", OTHER, "block"),
            ("helper", OTHER, "served"),
        ],
        quick=[("whole", "", "served"), ("helper", OTHER, "block")],
        unpack=True,
    ),
)
def test_classes_of_main_in_another_process(name, extra, kind, tmp_path):
    file = str(tmp_path / "sent")
    run = [sys.executable, "-c"]
    for code, *args in ((SENDER, name, kind, file), (RECEIVER.format(extra=extra), file)):
        done = subprocess.run([*run, code, *args], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
