"""Weights folded with BatchNorm must never be stale: forward, change, forward, for every way to
change what they are made of; and they are seen nowhere and live no longer than the model."""

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import fused_res
from fused_res import FusedResBlock
from fused_res.dispatch import inference_conv
from fused_res.ops import conv_bn_act
from fused_res.reference import ResBlock
from fused_res.run import weight_cache

pytestmark = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


X = torch.randn(2, 8, 7, 6, generator=torch.Generator().manual_seed(1))
WAYS = {"onednn": torch.contiguous_format, "own": torch.channels_last}


@pytest.fixture(autouse=True, params=WAYS)
def way(request, monkeypatch):
    """Every convolution by ATen, on an NCHW input; or by a fused kernel that can run it,
    on a channels_last one, for which a block keeps what it has looked up."""
    own = ("winograd4", "direct")

    def choose(call, backend):
        if call.x.dtype == torch.float64:
            return inference_conv.Candidate("eager", "the test's")
        reasons = inference_conv.why_not(call, "cpu")
        able = [name for name in own if request.param == "own" and not reasons[name]]
        return inference_conv.Candidate((able or ["onednn"])[0], "the test's")

    monkeypatch.setattr(inference_conv, "choose", choose)
    monkeypatch.setitem(globals(), "X", X.contiguous(memory_format=WAYS[request.param]))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fused_res.backend("cpu"):
        yield request.param
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(ResBlock(8, 16, 2), ResBlock(16, 16))

    def forward(self, x):
        return self.blocks(self.bn1(self.conv1(x)).relu())


BLOCKS = {
    "basic": ((8, 16, 2), {}),
    "bottleneck": ((8, 8), {"kind": "bottleneck", "width": 16}),
    "plain": ((8, 8), {"kind": "plain"}),
    "wide": ((8, 64, 2), {}),
}
MODELS = ["basic", "bottleneck", "plain", "fused"]


def pair(name="basic"):
    """(ours, theirs): the same parameters and statistics, in eval mode."""
    if name == "fused":
        theirs = randomise(Net())
        ours = copy.deepcopy(theirs)
        assert len(fused_res.fuse_(ours).fused) == 2
    else:
        args, kwargs = BLOCKS[name]
        theirs = randomise(ResBlock(*args, **kwargs))
        ours = FusedResBlock(*args, **kwargs)
        ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def randomise(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
    return model


def conv_of(model):
    """The second of the 3x3 convolutions: its input is a ReLU's output."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.size(2) == 3][-1]


def bn_of(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def look(model, x=None):
    with torch.no_grad():
        return model(X if x is None else x)


def same(ours, theirs, x=None, where=""):
    torch.testing.assert_close(
        look(ours, x), look(theirs, x), rtol=1e-4, atol=1e-4, msg=lambda m: f"{where}: {m}"
    )


def check(ours, theirs, change, visible=True):
    """Forward, change, forward, and once more; ``change`` does the same to both."""
    same(ours, theirs, where="before")
    for i in range(2):
        before = look(theirs)
        for model in (ours, theirs):
            torch.manual_seed(i)
            change(model)
        if visible:
            assert not torch.allclose(look(theirs), before, rtol=1e-2, atol=1e-2), "no change"
        same(ours, theirs, where=f"after change {i + 1}")


@torch.no_grad()
def one_element(t):
    t[(0,) * t.dim()] += 4


@torch.no_grad()
def random_(t):
    t.copy_(torch.rand_like(t))


def train_step(model, make=None):
    make = make or (lambda parameters: torch.optim.SGD(parameters, 0.3))
    model.train()
    optimizer = make(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    model.eval()


def step_in_eval(make):
    def change(model):
        optimizer = make(model.parameters())
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return change


def new_state(model):
    return {n: torch.rand_like(t) if t.is_floating_point() else t.clone()
            for n, t in model.state_dict().items()}  # fmt: skip


def set_data(t):
    t.data = torch.rand_like(t)


def swap_parameter(model):
    model.weight = nn.Parameter(torch.rand_like(model.weight))


def dilate(conv):
    conv.dilation = conv.padding = (conv.dilation[0] + 1,) * 2


def to_and_back(model):
    return model.to(torch.float16).float()


def load_through_a_file(model):
    file = io.BytesIO()
    torch.save(new_state(model), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def average_into(model):
    """An exponential moving average, as EMA code writes it, and back."""
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(0.5).add_(torch.rand_like(p), alpha=0.5)


def through_numpy(t):
    t.detach().numpy()[:] *= 3


def as_views_of_a_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    look(model)
    vector.mul_(1.5)  # the parameters' own version counters stand still


def in_inference_mode(t):
    with torch.inference_mode():
        t.mul_(2)


def foreach(model):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 1.5)


def replace(model, old, new):
    """By ``new``, under every name it has."""
    new.load_state_dict(new_state(new))
    for m in list(model.modules()):
        for name, child in list(m.named_children()):
            if child is old:
                setattr(m, name, new.eval())


def another_convolution(model):
    old = conv_of(model)
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    replace(model, old, new)


CHANGES = {
    "in place": lambda m: random_(conv_of(m).weight),
    "one element": lambda m: one_element(conv_of(m).weight),
    "one element of a view": lambda m: one_element(conv_of(m).weight.detach().flatten()[37:]),
    "every parameter at once": foreach,
    "in inference mode": lambda m: in_inference_mode(conv_of(m).weight),
    ".data in place": lambda m: conv_of(m).weight.data.mul_(2),
    ".data copied into": lambda m: conv_of(m).weight.data.copy_(torch.rand_like(conv_of(m).weight)),
    ".data set": lambda m: set_data(conv_of(m).weight),
    "average": average_into,
    "numpy": lambda m: through_numpy(conv_of(m).weight),
    "views of a vector": as_views_of_a_vector,
    "parameter": lambda m: swap_parameter(conv_of(m)),
    "module": another_convolution,
    "dilation": lambda m: dilate(conv_of(m)),
    "initialised anew": lambda m: conv_of(m).reset_parameters(),
    "load_state_dict": lambda m: m.load_state_dict(new_state(m), strict=True),
    "load_state_dict, assign": lambda m: m.load_state_dict(new_state(m), assign=True),
    "file": load_through_a_file,
    "SGD": step_in_eval(lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)),
    "SGD, foreach": step_in_eval(lambda p: torch.optim.SGD(p, 0.3, foreach=True)),
    "SGD, fused": step_in_eval(lambda p: torch.optim.SGD(p, 0.3, fused=True)),
    "Adam": step_in_eval(lambda p: torch.optim.Adam(p, 0.1)),
    "Adam, foreach": step_in_eval(lambda p: torch.optim.Adam(p, 0.1, foreach=True)),
    "Adam, fused": step_in_eval(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "train": train_step,
}
OF_A_NORM = {
    "running_mean": lambda bn: random_(bn.running_mean),
    "running_var": lambda bn: random_(bn.running_var),
    "weight": lambda bn: random_(bn.weight),
    "bias": lambda bn: random_(bn.bias),
    "one element": lambda bn: one_element(bn.bias),
    "eps": lambda bn: setattr(bn, "eps", bn.eps + 1.0),
    "parameter": swap_parameter,
    "buffer": lambda bn: setattr(bn, "running_mean", torch.rand_like(bn.running_mean)),
    ".data of running_var": lambda bn: bn.running_var.data.mul_(4),
    ".data of one element": lambda bn: one_element(bn.bias.data),
    ".data of weight set": lambda bn: set_data(bn.weight),
    "reset": lambda bn: (random_(bn.running_mean), bn.reset_running_stats()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", CHANGES)
def test_change(change, name):
    check(*pair(name), CHANGES[change])


@pytest.mark.parametrize("name", ["basic", "bottleneck", "fused"])
def test_another_norm(name):
    check(
        *pair(name),
        lambda m: replace(m, bn_of(m), nn.BatchNorm2d(bn_of(m).num_features)),
    )


@pytest.mark.parametrize("name", ["basic", "bottleneck", "fused"])
def test_another_projection(name):
    def change(model):
        for m in model.modules():
            if getattr(m, "downsample", None) is not None:
                m.downsample = copy.deepcopy(m.downsample)
                random_(m.downsample[0].weight)

    check(*pair(name), change, visible=name != "bottleneck")


@pytest.mark.parametrize("name", ["basic", "bottleneck", "fused"])
@pytest.mark.parametrize("change", OF_A_NORM)
def test_change_of_a_norm(change, name):
    visible = change != "reset"
    check(*pair(name), lambda model: OF_A_NORM[change](bn_of(model)), visible)


def test_bias_of_a_convolution():
    check(*pair("plain"), lambda m: random_(conv_of(m).bias))
    check(*pair("plain"), lambda m: conv_of(m).bias.data.add_(1))


@pytest.mark.parametrize("name", MODELS)
def test_types_and_memory_formats(name):
    ours, theirs = pair(name)
    check(ours, theirs, to_and_back, visible=False)
    for layout in (torch.channels_last, torch.contiguous_format):
        check(ours, theirs, lambda m, layout=layout: m.to(memory_format=layout), visible=False)
    with fused_res.backend("auto"):
        same(ours.double(), theirs.double(), X.double())
    same(ours.float(), theirs.float())
    for model in (ours, theirs):
        one_element(conv_of(model.bfloat16()).weight)
    torch.testing.assert_close(
        look(ours, X.bfloat16()), look(theirs, X.bfloat16()), rtol=5e-2, atol=5e-2
    )
    same(ours.float(), theirs.float())


def test_a_new_tensor_where_the_old_one_was():
    """Freed memory and Python ids are used again: neither tells one tensor from another."""
    ours, theirs = pair()
    for _ in range(5):
        for name in ("running_mean", "running_var", "weight", "bias"):
            new = torch.rand(bn_of(ours).num_features)
            for model in (ours, theirs):
                setattr(bn_of(model), name, None)
                t = new.clone()
                setattr(bn_of(model), name, nn.Parameter(t) if name in ("weight", "bias") else t)
            same(ours, theirs, where=name)


def test_swap_tensors():
    ours, theirs = pair()
    same(ours, theirs)
    for model in (ours, theirs):
        torch.manual_seed(3)
        torch.utils.swap_tensors(
            conv_of(model).weight, nn.Parameter(torch.rand_like(conv_of(model).weight))
        )
    same(ours, theirs)


@pytest.mark.parametrize("part", ["filter", "input channel", "tap"])
def test_part_of_a_weight_through_data(part):
    """As pruning code does; changes through ``.data`` are not counted by PyTorch."""
    ours, theirs = pair("wide")
    which = {"filter": (5,), "input channel": (slice(None), 5), "tap": (slice(None),) * 2 + (0, 1)}
    check(ours, theirs, lambda m: conv_of(m).weight.data[which[part]].add_(1))


def test_fused_optimizer_that_trains_one_filter():
    """PyTorch's fused optimizers do not count their changes."""

    def change(model):
        weight = conv_of(model).weight
        optimizer = torch.optim.SGD([weight], 3.0, fused=True)
        model(X).square().mean().backward()
        weight.grad[torch.arange(len(weight)) != 5] = 0
        optimizer.step()
        optimizer.zero_grad()

    ours, theirs = pair("wide")
    for _ in range(2):
        check(ours, theirs, change, visible=False)


@pytest.fixture
def swapped_by_module_to():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_conversion_by_swapping(swapped_by_module_to):
    check(*pair(), lambda m: m.load_state_dict(new_state(m)))
    check(*pair(), to_and_back, visible=False)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight):
        return weight * self.scale


@pytest.mark.parametrize("name", MODELS)
def test_parametrized(name):
    ours, theirs = pair(name)
    same(ours, theirs)
    for model in (ours, theirs):
        parametrize.register_parametrization(conv_of(model), "weight", Scaled())
    check(ours, theirs, lambda m: conv_of(m).parametrizations.weight[0].scale.data.mul_(2))
    for model in (ours, theirs):
        parametrize.remove_parametrizations(conv_of(model), "weight")
    same(ours, theirs)
    for model in (ours, theirs):
        parametrizations.weight_norm(conv_of(model))
    check(ours, theirs, lambda m: random_(conv_of(m).parametrizations.weight.original1))
    with parametrize.cached():
        same(ours, theirs)


def test_a_convolution_shared_by_blocks_with_other_norms():
    pairs = [pair() for _ in range(6)]
    for i in range(2):
        for which in range(6):
            pairs[which][i].conv2 = pairs[0][i].conv2
    for _ in range(2):
        for ours, theirs in pairs:
            same(ours, theirs)
        for model in pairs[0]:
            one_element(model.conv2.weight)
    for model in pairs[3]:
        one_element(model.bn2.weight)
    for ours, theirs in pairs:
        same(ours, theirs)


def test_packed_weights_are_made_once(monkeypatch):
    made = []
    fold = weight_cache.scale_and_shift
    for module in (weight_cache, conv_bn_act):
        monkeypatch.setattr(module, "scale_and_shift", lambda conv: made.append(conv) or fold(conv))
    models = [pair()[0] for _ in range(3)]  # a convolution with three norms
    for model in models:
        model.conv2 = models[0].conv2
    for i in range(3):
        for model in models:
            look(model)
        assert bool(made) == (i == 0)
        made.clear()


def test_types_in_turn():
    """Under autocast a convolution runs in another type than its weight's."""
    ours, theirs = pair()
    for _ in range(3):
        same(ours, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            a, b = look(ours), look(theirs)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-1)


def test_a_norm_shared_by_convolutions():
    ours, theirs = pair()
    for model in (ours, theirs):
        model.bn2 = model.bn1
        model.downsample[1] = model.bn1
    check(ours, theirs, lambda m: one_element(m.bn1.weight))
    check(ours, theirs, lambda m: random_(m.conv1.weight))


def test_two_convolutions_that_share_a_weight():
    ours, theirs = pair("plain")
    for model in (ours, theirs):
        model.conv2.weight = model.conv1.weight
    check(ours, theirs, lambda m: random_(m.conv1.weight))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_set_after_a_first_forward_is_heeded(name):
    ours, theirs = pair(name)
    same(ours, theirs)
    seen = []
    handles = [
        conv_of(ours).register_forward_hook(lambda m, args, y: seen.append("after") or y * 2),
        conv_of(theirs).register_forward_hook(lambda m, args, y: y * 2),
        conv_of(ours).register_forward_pre_hook(lambda m, args: seen.append("before")),
    ]
    same(ours, theirs)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    for model in (ours, theirs):
        conv = conv_of(model)
        conv.forward = lambda x, conv=conv: nn.Conv2d.forward(conv, x) - 1
    same(ours, theirs)
    for model in (ours, theirs):
        del conv_of(model).forward
    same(ours, theirs)
    with fused_res.backend("eager"):
        assert torch.equal(look(ours), look(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_eval_train_eval(name):
    ours, theirs = pair(name)
    check(ours, theirs, lambda m: (m.train(), m(X), m.eval()), visible=False)
    check(ours, theirs, train_step)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", MODELS)
def test_copies(duplicate, name):
    ours, theirs = pair(name)
    same(ours, theirs)
    mine, plain = duplicate(ours), copy.deepcopy(theirs)
    same(mine, plain)
    for changed in ((mine, plain), (ours, theirs), (mine, plain, ours, theirs)):
        for model in changed:
            one_element(conv_of(model).weight)
            one_element(conv_of(model).weight)
        same(mine, plain)
        same(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_functional_call(name):
    ours, theirs = pair(name)
    for _ in range(2):
        same(ours, theirs)
        state = new_state(ours)
        with torch.no_grad():
            torch.testing.assert_close(
                functional_call(ours, state, X), functional_call(theirs, state, X),
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_weights_made_in_inference_mode(name):
    """They have no version counter."""
    ours, theirs = pair(name)
    with torch.inference_mode():
        state = new_state(ours)
    for model in (ours, theirs):
        model.requires_grad_(False).load_state_dict(state, assign=True)
        assert conv_of(model).weight.is_inference()
    for which in (conv_of, conv_of, lambda m: getattr(m, "bn2", conv_of(m))):
        same(ours, theirs)
        with torch.inference_mode():
            same(ours, theirs)
            for model in (ours, theirs):
                one_element(which(model).weight)
            same(ours, theirs)
    same(ours, theirs)


def test_compiled():
    torch._dynamo.reset()
    ours, theirs = pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for change in (conv_of, bn_of, conv_of):
        same(compiled, theirs)
        for model in (ours, theirs):
            one_element(change(model).weight)
    same(compiled, theirs)
    torch._dynamo.reset()


def test_threads():
    ours, _ = pair("fused")
    xs = [torch.randn(1 + i % 6, 8, 7, 6) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:  # the first calls pack the weights, all at once
        found = list(pool.map(lambda x: look(ours, x), xs))
    for y, x in zip(found, xs, strict=True):
        assert torch.equal(y, look(ours, x))


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_seen_nowhere(name):
    ours, _ = pair(name)

    def seen():
        names = [list(part) for part in (ours.state_dict(), dict(ours.named_buffers()),
                                         dict(ours.named_parameters()))]  # fmt: skip
        attributes = [sorted(vars(m)) for m in ours.modules()]
        of_tensors = [vars(p) for p in ours.parameters()]
        return names, attributes, of_tensors, len(pickle.dumps(ours))

    gc.collect()  # what other tests left may go at any moment
    before, kept = seen(), len(weight_cache._packed)
    look(ours)
    assert len(weight_cache._packed) > kept, "nothing was folded"
    assert seen() == before


@pytest.fixture
def count():
    """Counts the tensors that were made in the test and live."""
    gc.collect()
    gc.freeze()

    def of_now():
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())

    yield of_now
    gc.unfreeze()


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_live_as_long_as_the_model(name, count):
    kept, tensors = len(weight_cache._packed), count()
    ours, theirs = pair(name)
    weight = weakref.ref(conv_of(ours).weight)
    same(ours, theirs)
    assert len(weight_cache._packed) > kept
    del ours, theirs
    assert count() == tensors
    assert weight() is None and len(weight_cache._packed) == kept


def test_packed_weights_do_not_add_up(count):
    ours = pair()[0]
    look(ours)
    tensors = count()
    for _ in range(20):
        one_element(conv_of(ours).weight)
        look(ours)
    assert count() == tensors
    for batch in range(1, 20):
        look(ours, torch.randn(batch, 8, 6, 6))
    assert count() < tensors + 40


class Doubled(nn.Parameter):
    """Stands for what convolves in a way of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.conv2d, nn.functional.conv2d):
            args = (args[0], args[1].detach().as_subclass(torch.Tensor) * 2, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def to_attribute(module, name):
    value = getattr(module, name).detach().clone()
    delattr(module, name)
    setattr(module, name, value)


UNUSUAL = {
    "weight": (lambda m: to_attribute(conv_of(m), "weight"),
               lambda m: setattr(conv_of(m), "weight", conv_of(m).weight * 3)),
    "statistics": (lambda m: to_attribute(bn_of(m), "running_mean"),
                   lambda m: setattr(bn_of(m), "running_mean", bn_of(m).running_mean + 3)),
    "subclass": (lambda m: None, lambda m: setattr(
        conv_of(m), "weight", conv_of(m).weight.detach().as_subclass(Doubled))),
    "hooks' dictionary": (lambda m: None, lambda m: (
        setattr(conv_of(m), "_forward_hooks", type(conv_of(m)._forward_hooks)()),
        conv_of(m).register_forward_hook(lambda module, args, y: y * 3))),
    "_conv_forward": (lambda m: None, lambda m: setattr(
        conv_of(m), "_conv_forward", lambda x, w, b: nn.functional.conv2d(x, w * 3, b, 1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_modules_are_heeded(what):
    ours, theirs = pair("wide")
    before, change = UNUSUAL[what]
    for step in (before, lambda m: None, change, lambda m: None):
        for model in (ours, theirs):
            step(model)
        same(ours, theirs, where=what)


class Changing(ResBlock):
    last = True

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + x
        return y.relu() if self.last else y


def test_fused_again_with_another_forward():
    theirs = nn.Sequential(Changing(8, 8)).eval()
    ours = copy.deepcopy(theirs)
    for last in (True, False, True):
        for model in (ours, theirs):
            model[0].last = last
        fused_res.fuse_(ours)
        same(ours, theirs)
        same(ours, theirs)
        fused_res.unfuse_(ours)


@pytest.mark.parametrize("how", ["hook", "method", "parent", "library's op"])
def test_blocks_that_lead_to_themselves_are_freed(how, monkeypatch):
    block = FusedResBlock(8, 8, groups=2).eval()
    if how == "hook":
        block.register_forward_hook(lambda *_, b=block: None)
    elif how == "method":
        block.itself = block.extra_repr
    elif how == "parent":
        block.conv1.parent = [block]
    else:
        monkeypatch.setattr(
            inference_conv, "choose", lambda *_: inference_conv.Candidate("bn_act", "the test's")
        )
    x = X.clone(memory_format=torch.preserve_format)
    look(block, x)
    look(block, x)
    alive = [weakref.ref(t) for t in (block, x)]
    if how == "library's op":
        del x
        gc.collect()
        assert alive[1]() is None, "an input is kept"
    del block
    gc.collect()
    assert alive[0]() is None


def test_images_without_a_batch():
    ours, theirs = pair("plain")
    same(ours, theirs, X[0])
    same(ours, theirs, X[0])


# --- other threads, and what is written past the version counters


class Downsampling(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(c, 2 * c, 3, 2, 1), nn.BatchNorm2d(2 * c)
        self.c2, self.b2 = nn.Conv2d(2 * c, 2 * c, 3, 1, 1), nn.BatchNorm2d(2 * c)
        self.c3, self.b3 = nn.Conv2d(c, 2 * c, 1, 2), nn.BatchNorm2d(2 * c)

    def forward(self, x):
        y = torch.relu(self.b1(self.c1(x)))
        return torch.relu(self.b2(self.c2(y)) + self.b3(self.c3(x)))


def _blocks():
    return nn.Sequential(Downsampling(32), Downsampling(64)).eval()


def _chain():
    chain = nn.Sequential(*(ResBlock(32, 32, kind="single", relu="before") for _ in range(6)))
    return chain.eval().to(memory_format=torch.channels_last)


def _stem():
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).eval()


def _fused(model, x):
    ours = copy.deepcopy(model)
    fused_res.fuse_(ours)
    return ours


def _served(model, x):
    return fused_res.optimize_for_inference(model, x, tune=False)


def _frozen(model, x):
    return fused_res.optimize_for_inference(model, x, tune=False, freeze=True)


SERVERS = {
    "fused blocks": (_blocks, _fused),
    "fused chain": (_chain, _fused),
    "served blocks": (_blocks, _served),
    "served chain": (_chain, _served),
    "served convolution": (_stem, _served),
    "frozen blocks": (_blocks, _frozen),
    "frozen chain": (_chain, _frozen),
}
RELOADS = 300  # in all


@pytest.mark.parametrize("server", SERVERS)
def test_reloads_while_threads_serve(server):
    """The weights that are used after a reload are those that were loaded, whatever was packed
    while they were written."""
    make, ours_of = SERVERS[server]
    x = torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
    model = make()
    ours, a = ours_of(model, x), model.state_dict()
    b = {k: v * 1.1 if v.is_floating_point() else v for k, v in a.items()}
    with torch.no_grad():
        expected = {}
        for name, state in (("a", a), ("b", b)):
            reference = make()
            reference.load_state_dict(state)
            expected[name] = reference(x)
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    stop, failed = threading.Event(), []

    def serve():
        torch.set_num_threads(1)
        with torch.no_grad():
            while not stop.is_set():
                try:
                    ours(x)
                except Exception as error:
                    failed.append(error)

    workers = [threading.Thread(target=serve) for _ in range(3)]
    wrong = 0
    try:
        for worker in workers:
            worker.start()
        for i in range(-(-RELOADS // len(SERVERS))):
            name = "ab"[i % 2]
            ours.load_state_dict({"a": a, "b": b}[name])
            with torch.no_grad():
                y = ours(x)
            wrong += not torch.allclose(y, expected[name], rtol=1e-4, atol=1e-4)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
    assert not failed and not wrong, (wrong, failed[:1])
    assert not torch.allclose(expected["a"], expected["b"], rtol=1e-2, atol=1e-2)


def _by_numpy(w):
    w.detach().numpy()[-3, -2, 0, 0] = 30


def _by_dlpack(w):
    torch.from_dlpack(w.detach())[-3, -2, 0, 0] = 30


def _by_data(w):
    w.data[-3, -2, 0, 0] = 30


def _by_a_raw_op(w):
    g = torch.zeros_like(w)
    g[-3, -2, 0, 0] = -1
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 30.0, "dampening": 0.0}
    torch._fused_sgd_([w], [g], [], **options, nesterov=False, maximize=False, is_first_step=True)


ROUTES = [_by_numpy, _by_dlpack, _by_data, _by_a_raw_op]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("server", SERVERS)
def test_refresh(server, route):
    make, ours_of = SERVERS[server]
    x = torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
    model = make()
    ours = ours_of(model, x)
    with torch.no_grad():
        ours(x)
        for m in (model, ours):
            route(next(w for n, w in m.named_parameters() if w.dim() == 4))
        fused_res.refresh(ours)
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-3)
