"""A fused block runs its plan while all that its forward read is as it was, and its own forward
else; and what the ecosystem does with a block works as with the block it was made from."""

import copy
import cProfile
import gc
import inspect
import io
import pickle
import sys
import threading
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fused_res
from fused_res import FusedResBlock
from fused_res.fuse.modules import is_frozen
from fused_res.nn.blocks import FusedForward
from fused_res.reference import ResBlock
from fused_res.run.guards import Record, guard_of
from fused_res.run.reads import Reads

X = torch.randn(2, 8, 6, 6)
FACTOR = 0.5


def far(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def pair(module):
    ours = copy.deepcopy(module)
    return module, ours, fused_res.fuse_(ours)


def same(plain, ours, x=X, modes=(True, False), what=""):
    for training in modes:
        plain.train(training), ours.train(training)
        with torch.set_grad_enabled(training):
            expected = plain(x)
            assert far(ours(x), expected) < 1e-4, f"{what}, training={training}"


def runs_plan(block):
    return guard_of(block, block.plan.record).same


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


def halved(y):
    return y * FACTOR


class Config:
    scale = 0.5


class Reading(Block):
    K = 0.5

    def __init__(self):
        super().__init__()
        self.scale, self.act, self.table, self.config = 0.5, F.relu, {"k": [0.5]}, Config()

    def forward(self, x):
        y = halved(self.bn(self.conv(x))) * self.scale * self.table["k"][0] * self.K
        return self.act(y * self.config.scale + x)


# --- what was read, and when it is read again


def test_what_resblock_reads_is_what_a_trace_reads():
    """``FusedResBlock`` says without a trace what its forward reads."""
    every = [{}, {"kind": "bottleneck"}, {"kind": "single"}, {"dropout": 0.5}]
    every += [{"skip": "concat"}, {"skip": "projection", "stride": 2}]
    for options in every:
        plain, ours = ResBlock(8, 8, **options), FusedResBlock(8, 8, **options)
        fused_res.fuse_(plain)
        (traced,) = (m.plan.record.reads for m in plain.modules() if isinstance(m, FusedForward))
        names = traced.attributes[""].difference(dir(nn.Module))
        assert names <= ours._reads().attributes[""], options


def test_a_change_and_back():
    plain, ours, report = pair(Reading())
    assert report.partly
    same(plain, ours)
    for name, other in (("scale", 2.0), ("act", F.gelu), ("table", {"k": [2.0]})):
        before = getattr(plain, name)
        for m in (plain, ours):
            setattr(m, name, other)
        same(plain, ours, what=name)
        assert not runs_plan(ours)
        for m in (plain, ours):
            setattr(m, name, copy.deepcopy(before))
        same(plain, ours, what=name)
        assert runs_plan(ours)


def test_fuse_again_takes_what_is_there_now():
    plain, ours, _ = pair(Reading())
    for m in (plain, ours):
        m.scale = 2.0
    assert not runs_plan(ours)
    assert fused_res.fuse_(ours).partly and runs_plan(ours)
    same(plain, ours)
    assert fused_res.unfuse_(ours) == [""] and type(ours) is Reading


def test_fuse_again_what_cannot_be_fused_any_more():
    plain, ours, _ = pair(nn.Sequential(Reading(), Block()))
    for m in (plain, ours):
        m[0].act = lambda y: y.clamp(min=float(torch.rand(1)) * 0)
    report = fused_res.fuse_(ours)
    assert [name for name, _ in report.skipped] == ["0"]
    same(plain, ours)


def test_what_is_equal_and_another_object_keeps_the_plan():
    _, ours, _ = pair(Reading())
    ours(X)
    ours.scale, ours.table = float("0.5"), {"k": [float("0.5")]}
    ours.config = Config()
    ours.unread = object()
    assert runs_plan(ours)


def test_attributes_of_other_types_and_signs():
    class Typed(Block):
        scale = 0.0

        def forward(self, x):
            k = 2.0 if isinstance(self.scale, bool) or str(self.scale)[0] == "-" else 1.0
            return torch.relu(self.bn(self.conv(x)) * k + x)

    for value in (True, -0.0, False, 0):
        plain, ours, _ = pair(Typed())
        same(plain, ours)
        for m in (plain, ours):
            m.scale = value
        same(plain, ours, what=repr(value))


def test_classes_change():
    class Base(Block):
        def gate(self, y):
            return y * 0.5

    class Sub(Base):
        def forward(self, x):
            return torch.relu(super().gate(self.bn(self.conv(x))) + x)

    plain, ours, report = pair(Sub())
    assert report.partly
    same(plain, ours)
    Base.gate = lambda self, y: y * 2.0
    same(plain, ours, what="a method of a base")
    Sub.forward = lambda self, x: self.bn(self.conv(x))
    same(plain, ours, what="forward")


def test_a_parent_that_is_read_does_not_keep_the_block_alive():
    class Child(Block):
        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) * self.parent[0].gain + x)

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.block = 0.5, Child()
            self.block.parent = [self]

        def forward(self, x):
            return self.block(x)

    plain, ours, _ = pair(Parent())
    same(plain, ours)
    for m in (plain, ours):
        m.gain = 2.0
    same(plain, ours)
    alive = weakref.ref(ours.block)
    del ours, m
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("how", ["closure", "default", "method", "list"])
def test_what_leads_back_does_not_keep_the_block_alive(how):
    class Leading(Block):
        def __init__(self):
            super().__init__()
            self.gain, me = 0.5, self
            self.gate = {
                "closure": lambda y: y * me.gain,
                "default": lambda y, me=self: y * me.gain,
                "method": self.gated,
                "list": [self],
            }[how]

        def gated(self, y):
            return y * self.gain

        def forward(self, x):
            y = self.bn(self.conv(x))
            y = self.gate(y) if callable(self.gate) else y * self.gate[0].gain
            return torch.relu(y + x)

    block = Leading().eval()
    assert fused_res.fuse_(block).partly
    with torch.no_grad():
        y = block(X)
        block.gain = 2.0
        assert not torch.allclose(block(X), y)
    alive = weakref.ref(block)
    del block
    gc.collect()
    assert alive() is None


ASKS = {
    "a helper": lambda self, y, x: asks_for_a_tensor(y),
    "is_tensor": lambda self, y, x: F.relu(y) if torch.is_tensor(y) else y,
    "hasattr": lambda self, y, x: y if hasattr(x, "mask") else F.relu(y),
    "an attribute": lambda self, y, x: y if getattr(x, "_mask", None) is not None else F.relu(y),
    "dtypes in a set": lambda self, y, x: F.relu(y) if x.dtype in {torch.float32} else y,
    "dtype in a table": lambda self, y, x: y * {torch.float32: 2.0}.get(x.dtype, 0.5),
    "dtype as text": lambda self, y, x: F.relu(y) if str(x.dtype) == "torch.float32" else y,
    "dtype by is": lambda self, y, x: F.relu(y) if x.dtype is torch.float32 else y,
    "size as an int": lambda self, y, x: F.relu(y) if isinstance(x.shape[2], int) else y,
    "grad_fn": lambda self, y, x: y if x.grad_fn is not None else F.relu(y),
    "type": lambda self, y, x: F.relu(y) if type(y) is torch.Tensor else y,
    "itself": lambda self, y, x: F.relu(y) if KNOWN.get(self, True) else y,
    "traced": lambda self, y, x: y if torch.fx._symbolic_trace.is_fx_tracing() else F.relu(y),
}
KNOWN = {}


def asks_for_a_tensor(y):
    return F.relu(y) if isinstance(y, torch.Tensor) else y


@pytest.mark.parametrize("name", ASKS)
def test_forwards_that_ask_a_proxy(name):
    """A proxy answers otherwise than a tensor."""

    class Asks(Block):
        def forward(self, x):
            return ASKS[name](self, self.bn(self.conv(x)) + x, x)

    plain, ours, _ = pair(Asks())
    same(plain, ours, what=name)


def test_other_threads_draw_on():
    """A trace puts back what the forward drew, not what others drew meanwhile."""
    stop, drawn = threading.Event(), []

    def draw():
        while not stop.is_set():
            drawn.append(torch.rand(1, dtype=torch.float64).item())

    worker = threading.Thread(target=draw)
    worker.start()
    try:
        for _ in range(8):
            assert fused_res.fuse_(Block()).fused
    finally:
        stop.set()
        worker.join()
    assert len(set(drawn)) == len(drawn) > 8


def test_imports_in_the_forward(monkeypatch):
    settings = types.ModuleType("settings_of_a_test")
    settings.gain = 0.5
    monkeypatch.setitem(sys.modules, "settings_of_a_test", settings)

    class Imports(Block):
        def forward(self, x):
            from settings_of_a_test import gain

            return torch.relu(self.bn(self.conv(x)) * gain + x)

    plain, ours, _ = pair(Imports())
    same(plain, ours)
    settings.gain = 2.0
    same(plain, ours)


def test_a_norm_without_a_weight():
    plain, ours, _ = pair(Block().eval())
    plain.bn.weight = ours.bn.weight = None
    same(plain, ours)


def test_only_the_right_reasons():
    """What decides nothing, or the same in each call, is no reason to leave a block alone."""

    class Everyday(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_scripting() or not hasattr(self, "conv"):
                return x
            kinds = [len(p) for p in ("a", "bc") if p.startswith("a")]
            y = self.bn(self.conv(x)) * float(max(kinds)) * getattr(Config, "scale", 1.0)
            return F.dropout(torch.relu(y + x), 0.0, True)

    plain, ours, report = pair(Everyday())
    assert report.partly and not report.skipped, report
    same(plain, ours)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, monkeypatch):
    """A compiler guards what a fused block compares."""
    torch._dynamo.reset()  # it stops at eight versions of a function
    module = sys.modules[__name__]
    plain, ours, _ = pair(Reading().eval())
    compiled = torch.compile(ours, backend=backend, fullgraph=True)

    def check(what):
        with torch.no_grad():
            assert far(compiled(X), plain(X)) < 1e-4, what

    check("as made")
    changes = {
        "number": lambda m: setattr(m, "scale", 2.0),
        "function": lambda m: setattr(m, "act", torch.sigmoid),
        "list": lambda m: m.table["k"].__setitem__(0, 3.0),
        "object": lambda m: setattr(m.config, "scale", 3.0),
        "child": lambda m: setattr(m, "bn", nn.Identity()),
    }
    for name, change in changes.items():
        for m in (plain, ours):
            change(m)
        check(name)
    torch._dynamo.reset()
    plain, ours, _ = pair(Reading().eval())
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    check("another")
    monkeypatch.setattr(module, "FACTOR", 2.0)
    check("global")
    monkeypatch.setattr(module, "halved", lambda y: y * 3.0)
    check("helper")
    monkeypatch.setattr(Reading, "forward", lambda self, x: self.conv(x))
    check("forward")


# --- a trace disturbs nothing


def test_traces_while_other_threads_run_models():
    """torch.fx puts functions of its own in place of all modules' while it traces."""
    net, stop, wrong = nn.Sequential(Block(), Block()).eval(), threading.Event(), []
    with torch.no_grad():
        expected = net(X)

    def run():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(net(X), expected):
                        wrong.append("another result")
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=run) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for worker in workers:
            worker.start()
        for _ in range(10):
            assert fused_res.fuse_(nn.Sequential(Block(), Reading())).fused
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


def test_a_trace_leaves_profilers_and_the_collector_alone():
    def profile(frame, event, arg):
        pass

    sys.setprofile(profile)
    try:
        fused_res.fuse_(Reading())
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert gc.isenabled() and "__getattribute__" not in vars(nn.Module)
    profiler = cProfile.Profile()
    profiler.enable()
    fused_res.fuse_(Reading())
    halved(1.0)
    profiler.disable()
    assert any("halved" in str(entry.code) for entry in profiler.getstats())


def test_what_cannot_be_copied():
    """A SyncBatchNorm keeps its process group; others keep locks."""
    plain = Block()
    plain.bn = nn.SyncBatchNorm(8)
    plain.bn.process_group, plain.lock = threading.Lock(), threading.Lock()
    assert fused_res.fuse_(plain).fused == [""]


# --- classes, signatures, layouts


class Tagged(ResBlock):
    def __init_subclass__(cls, tag, **kwargs):
        super().__init_subclass__(**kwargs)


class Sealed(Block):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("sealed")


class Meta(type):
    def __new__(cls, name, bases, body):
        if any(isinstance(base, Meta) for base in bases):
            raise RuntimeError("no subclasses")
        return super().__new__(cls, name, bases, body)


class OfMeta(Block, metaclass=Meta):
    pass


@pytest.mark.parametrize("make", [lambda: Tagged(8, 8), Sealed, OfMeta])
def test_classes_that_refuse_a_subclass(make):
    net = nn.Sequential(ResBlock(8, 8), make(), ResBlock(8, 8))
    plain = copy.deepcopy(net)
    with pytest.raises(ValueError, match="strict=True"):
        fused_res.fuse_(net, strict=True)
    assert [type(m) for m in net] == [type(m) for m in plain]
    report = fused_res.fuse_(net)
    assert report.fused == ["0", "2"]
    ((name, reason),) = report.skipped
    assert name == "1" and "cannot have a subclass" in reason
    same(plain, net)


@pytest.mark.parametrize("make", [lambda: ResBlock(8, 8), Block, Reading])
def test_a_block_as_root(make):
    plain, ours, _ = pair(make().eval())
    assert inspect.signature(plain.forward) == inspect.signature(ours.forward)
    graph = fx.symbolic_trace(ours)
    torch.testing.assert_close(graph(X), plain(X), rtol=1e-4, atol=1e-5)
    n = torch.export.Dim("n", min=2, max=64)
    exported = torch.export.export(ours, (X,), dynamic_shapes={"x": {0: n}}).module()
    torch.testing.assert_close(exported(X[:3]), plain(X[:3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x=X), plain(x=X), rtol=1e-4, atol=1e-5)


def test_onnx_has_the_inputs_name():
    onnx = pytest.importorskip("onnx")
    ours = ResBlock(8, 8).eval()
    fused_res.fuse_(ours)
    file = io.BytesIO()
    torch.onnx.export(ours, (X,), file, dynamo=False)
    names = [i.name for i in onnx.load_from_string(file.getvalue()).graph.input]
    assert len(names) == 1 and "onnx" not in names[0]


@pytest.mark.parametrize("make", [lambda: ResBlock(8, 8), Block, Reading])
def test_other_layouts(make):
    plain, ours, _ = pair(make().eval())
    with torch.no_grad():
        if make is Block or "ResBlock" in str(type(plain)):
            expected = plain(X.to_mkldnn()).to_dense()
            assert far(ours(X.to_mkldnn()).to_dense(), expected) < 1e-4
        for x in (X.to_sparse(), "words", None):
            with pytest.raises(Exception) as a:
                plain(x)
            with pytest.raises(type(a.value)):
                ours(x)


SIZES = [("stride", 1), ("padding", 1), ("dilation", 1), ("stride", [1, 1]), ("padding", (1,)),
         ("kernel_size", 3)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SIZES)
@pytest.mark.parametrize("before", [True, False])
def test_sizes_as_numbers(name, value, before):
    for make in (Block, lambda: ResBlock(8, 8), lambda: nn.Sequential(*(Block() for _ in "abc"))):
        plain = make()
        convs = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)]
        for n in convs if before else ():
            setattr(plain.get_submodule(n), name, value)
        plain, ours, report = pair(plain)
        assert report.fused
        for m in (plain, ours):
            for n in convs:
                setattr(m.get_submodule(n), name, value)
        same(plain, ours)
        served = fused_res.optimize_for_inference(plain.eval(), X, tune=False)
        same(plain, served, modes=(False,))


# --- copies and pickles


def helper_of_this_module(y):
    return y * 0.5


class Helped(Block):
    def forward(self, x):
        return torch.relu(helper_of_this_module(self.bn(self.conv(x))) + x)


@pytest.mark.parametrize("make", [Block, Helped, Reading, lambda: FusedResBlock(8, 8)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compare_too(make, copied, monkeypatch):
    plain = make()
    ours = copy.deepcopy(plain)
    if not isinstance(ours, FusedForward):
        fused_res.fuse_(ours)
    ours = copied(ours)
    assert isinstance(ours, FusedForward)
    same(plain, ours)
    assert runs_plan(ours)
    monkeypatch.setattr(sys.modules[__name__], "helper_of_this_module", lambda y: y * 2.0)
    same(plain, ours)
    for m in (plain, ours):
        m.register_forward_hook(lambda m, args, y: y * 3)
    same(plain, ours)


def test_a_pickle_of_another_forward(monkeypatch):
    """The code may be another where a pickle is read."""
    ours = Helped().eval()
    fused_res.fuse_(ours)
    data = pickle.dumps(ours)
    monkeypatch.setattr(Helped, "forward", lambda self, x: self.conv(x))
    read = pickle.loads(data)
    torch.testing.assert_close(read(X), ours.conv(X), rtol=1e-4, atol=1e-5)


def test_records_compare_by_what_was_read():
    a, b = Block(), Block()
    reads = Reads({"": frozenset({"conv", "bn"})})
    assert Record(a, reads) == Record(b, reads) and hash(Record(a, reads)) == hash(Record(b, reads))
    b.bn = nn.Identity()
    assert Record(a, reads) != Record(b, reads)
    assert not is_frozen(a.bn)


# --- served models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        block = ResBlock(8, 8)
        self.stem, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.ModuleList([block, ResBlock(8, 8), block])
        self.scale, self.config, self.extra = 0.5, Config(), nn.ModuleList()

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x))) * self.scale * self.config.scale * FACTOR
        for block in (*self.body, *self.extra):
            x = block(x)
        return x


SERVED = {
    "number": lambda m: setattr(m, "scale", 2.0),
    "object": lambda m: setattr(m.config, "scale", 2.0),
    "first of two places": lambda m: m.body.__setitem__(0, nn.Identity()),
    "second of two places": lambda m: m.body.__setitem__(2, nn.Identity()),
    "one more": lambda m: m.body.append(nn.Tanh()),
    "into an empty list": lambda m: m.extra.append(nn.Tanh()),
    "hook": lambda m: m.body.register_forward_hook(lambda *a: None),
    "the stem's hook": lambda m: m.stem.register_forward_hook(lambda m, args, y: y * 2),
    "block's attribute": lambda m: setattr(m.body[1], "relu_placement", "before"),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name):
    plain = Net().eval()
    served = fused_res.optimize_for_inference(plain, X, tune=False)
    assert any("+" in row for row in served.report.fused), served.report
    same(plain, served, modes=(False,))
    for m in (plain, served):
        SERVED[name](m)
    for _ in range(2):
        same(plain, served, modes=(False,), what=name)


def test_served_globals(monkeypatch):
    plain = Net().eval()
    served = fused_res.optimize_for_inference(plain, X, tune=False)
    same(plain, served, modes=(False,))
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    same(plain, served, modes=(False,))
    copied = pickle.loads(pickle.dumps(served))
    same(plain, copied, modes=(False,))


def test_refresh_wants_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        fused_res.refresh([])
    fused_res.refresh(nn.Linear(1, 1))
