"""A model that ``optimize_for_inference`` made is called as the model is: by keyword, with other
optional arguments, heights and widths, and returns what the model returns."""

import collections
import copy
import dataclasses
import inspect
import io
import pickle
import typing

import blocks
import pytest
import torch
import torch.nn.functional as F
from agreement import randomise
from torch import nn

import fused_res
from fused_res import optimize_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")

FREEZE = pytest.mark.parametrize("freeze", [False, True])
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
OTHER = [
    torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for shape in ((1, 3, 12, 12), (2, 3, 20, 14), (3, 3, 9, 16), (2, 3, 12, 12))
]


class Stem(nn.Module):
    """A convolution outside blocks, and a block."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = blocks.BasicBlock(8, 8)
        self.config = {"a": 1}

    def features(self, x):
        return self.block(F.relu(self.bn(self.conv(x))))

    def double(self, x):
        return 2 * x


def pair(make, example=X, **kwargs):
    model = randomise(make()).eval()
    return model, optimize_for_inference(model, example, **({"tune": False} | kwargs))


def leaves(y):
    if isinstance(y, torch.Tensor):
        return [y]
    if isinstance(y, dict):
        return [leaf for k, v in y.items() for leaf in (k, *leaves(v))]
    if isinstance(y, (tuple, list)):
        return [leaf for v in y for leaf in leaves(v)]
    if dataclasses.is_dataclass(y):
        return leaves(vars(y))
    return [y]


def same(served, model, *args, **kwargs):
    """Calls both; returns what the served one does."""
    with torch.no_grad():
        expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    got = served(*args, **kwargs)
    assert type(got) is type(expected)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert a == b
    return got


def convolutions(served, *args, **kwargs) -> int:
    """How often a BatchNorm of PyTorch's runs: 0 where the call runs fused as a whole."""
    with torch.profiler.profile() as profile:
        served(*args, **kwargs)
    return sum(e.count for e in profile.key_averages() if e.key == "aten::batch_norm")


needs_kernels = pytest.mark.skipif(
    fused_res.dispatch.backends.STATUS["cpu"] is not None, reason="no CPU kernels on this machine"
)


# --- arguments


class Optional(Stem):
    def forward(self, pixel_values, mask=None, scale=1.0, *, flip=False, names=("a",)):
        y = self.features(pixel_values.flip(-1) if flip else pixel_values) * scale
        y = y if mask is None else y * mask
        return y if names == ("a",) else dict.fromkeys(names, y)


CALLS = [
    {"scale": 2.0},
    {"scale": 2},
    {"scale": torch.tensor(3.0)},
    {"scale": -0.0},
    {"mask": torch.arange(12.0).view(1, 1, 12, 1)},
    {"mask": None, "flip": True},
    {"flip": False, "scale": 1.0},
    {"names": ("b", "c")},
    {"names": ["a"]},
]


@FREEZE
@pytest.mark.parametrize(
    "example", [X, (X,), (X, None), {"pixel_values": X}], ids=["alone", "tuple", "none", "dict"]
)
def test_keywords_and_optional_arguments(example, freeze):
    model, served = pair(Optional, example, freeze=freeze)
    assert len(served.report.fused) == 2, served.report
    for _ in range(2):
        same(served, model, X)
        same(served, model, pixel_values=X)
        for call in CALLS:
            same(served, model, X, **call)
            same(served, model, **call, pixel_values=X)
    same(served, model, X, None, 0.5, flip=True)


@needs_kernels
def test_what_is_like_the_example_is_fused():
    _, served = pair(Optional)
    for other in OTHER:
        assert convolutions(served, other) == convolutions(served, pixel_values=other) == 0
    assert convolutions(served, X, scale=1.0, mask=None) == 0
    assert convolutions(served, X, scale=2.0) == 1  # the stem's; its block is fused
    for example in ({"pixel_values": X, "scale": 2.0}, {"scale": 2.0, "pixel_values": X}):
        _, served = pair(Optional, example)
        assert convolutions(served, pixel_values=X, scale=2.0) == 0
        assert convolutions(served, X, None, 2.0) == 0
        assert convolutions(served, X) == 1


def test_the_example_has_other_values():
    mask = torch.rand(1, 1, 12, 1)
    model, served = pair(Optional, {"pixel_values": X, "mask": mask, "scale": 3.0, "flip": True})
    for call in ({"mask": mask, "scale": 3.0, "flip": True}, {"mask": mask}, {}, *CALLS):
        same(served, model, X, **call)
    same(served, model, X, mask, 3.0, flip=True)


class Any(Stem):
    def forward(self, *maps, **more):
        y = sum(map(self.features, maps))
        return y + sum(len(name) * value for name, value in more.items())


@FREEZE
def test_any_number_of_arguments(freeze):
    model, served = pair(Any, (X, X + 1), freeze=freeze)
    for args in ((X, X - 1), (X,), (X, X, X), (X[:1], X[1:])):
        same(served, model, *args)
        same(served, model, *args, gain=2.0, other=X[:, :1])
    model, served = pair(Any, {"gain": torch.tensor(2.0), "other": 3})
    same(served, model, gain=torch.tensor(5.0), other=3)
    same(served, model, X, other=3, gain=torch.tensor(5.0))


class Wrapped(Stem):
    """Its wrapper has another default than the signature says."""

    def forward(self, x, scale=1.0):
        return self.features(x) * scale

    def _with_default(forward):
        def wrapper(self, *args, **kwargs):
            return forward(self, *args, **{"scale": 2.0} | kwargs)

        wrapper.__wrapped__ = forward
        return wrapper

    forward = _with_default(forward)


class Mutable(Stem):
    def forward(self, x, gains=[1.0]):  # noqa: B006
        return self.features(x) * sum(gains)


def test_what_a_default_is():
    model, served = pair(Wrapped)
    for call in ({}, {"scale": 1.0}, {"scale": 2.0}):
        same(served, model, X, **call)
    model, served = pair(Mutable)
    same(served, model, X)
    try:
        Mutable.forward.__defaults__[0].append(4.0)
        same(served, model, X)
    finally:
        Mutable.forward.__defaults__[0].pop()


def test_containers_of_tensors():
    class Maps(Stem):
        def forward(self, maps, gain=1.0):
            maps.append(self.features(maps[0]) * gain)
            return maps[-1] + maps[1]

    model, served = pair(Maps, {"maps": [X, X[:1, :1]]})
    assert "an argument is neither a tensor nor a plain value" in str(served.report)
    for gain in (1.0, 2.0):
        given = [OTHER[0], torch.ones(1, 1, 12, 12)]
        same(served, model, maps=given, gain=gain)
        assert len(given) == 3, "the list is the caller's"


@pytest.mark.parametrize("freeze", [False, True])
def test_errors_are_the_models_own(freeze):
    model, served = pair(Optional, freeze=freeze)
    calls = [((), {}), ((X, X, 1.0, 1), {}), ((X,), {"none": 1}), ((X,), {"pixel_values": X})]
    calls += [((X[:, :2],), {}), ((X[0, 0],), {}), (("image",), {})]
    for args, kwargs in calls:
        with pytest.raises((TypeError, RuntimeError, AttributeError)) as theirs:
            model(*args, **kwargs)
        with pytest.raises(theirs.type) as ours:
            served(*args, **kwargs)
        assert str(ours.value).split("forward")[-1] == str(theirs.value).split("forward")[-1]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((X.double(),), {}, TypeError, r"inputs\[0\] must be torch.float32, .*got torch.float64"),
        ((), {"pixel_values": X.double()}, TypeError, "pixel_values must be torch.float32"),
        ((X.to("meta"),), {"scale": 2.0}, ValueError, r"inputs\[0\] must be on cpu, .*got meta"),
        ((), {"scale": 2.0, "pixel_values": X.half()}, TypeError, "pixel_values must be"),
    ],
)
def test_other_dtypes_and_devices(args, kwargs, error, words):
    _, served = pair(Optional)
    with pytest.raises(error, match=words):
        served(*args, **kwargs)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({}, "example must be .*got an empty one"),
        ({"scale": 2.0}, "example must be .*got one without tensors"),
        ((None,), "example must be .*got one without tensors"),
        ({0: X}, "example must have names as keys, got 0"),
        ((X, 2.0), r"example\[1\] must be a tensor or None .*got float"),
        ("image", "example must be a tensor or a tuple of tensors, or a dict.*got str"),
    ],
)
def test_examples_that_are_none(example, words):
    with pytest.raises(TypeError, match=words):
        optimize_for_inference(Optional(), example, tune=False)


def test_a_mapping_is_an_example():
    """As what transformers' processors return."""
    model, served = pair(Optional, collections.UserDict(pixel_values=X))
    same(served, model, **collections.UserDict(pixel_values=X))


@needs_kernels
def test_a_dict_is_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(fused_res.dispatch.user_timings, "write", lambda device, rows: tmp_path)
    model, served = pair(Optional, {"scale": 2.0, "pixel_values": X[:, :, :7]}, tune=True)
    same(served, model, pixel_values=X[:, :, :7], scale=2.0)
    report = fused_res.tune(model, {"pixel_values": X, "flip": True}, seconds=0)
    assert report.rows


# --- sizes


class Flat(Stem):
    def forward(self, x):
        y = self.features(x)
        return y.view(y.shape[0], y.size(1), -1).sum(-1) / (y.shape[2] * y.shape[-1])


class Pooled(Stem):
    def forward(self, x):
        y = self.features(x)
        return F.adaptive_avg_pool2d(y, (y.shape[2] // 2, y.shape[3] // 3)), x.shape[-1]


class Interpolated(Stem):
    def forward(self, x):
        y = F.max_pool2d(self.features(x), 3, 2)
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear") + x.mean(1, keepdim=True)


class Positions(Stem):
    """A grid of the input's size is computed in each call."""

    def forward(self, x):
        rows = torch.linspace(-1, 1, x.shape[2])
        return self.features(x) * rows.view(1, 1, -1, 1)


class OfItsType(Stem):
    """A size is a number, but to what traces it: its trace is the example's alone."""

    def forward(self, x):
        rows = x.shape[2] if isinstance(x.shape[2], int) else 12
        return self.features(x)[:, :, : rows - 1] / rows


class Branching(Stem):
    def forward(self, x):
        y = self.features(x)
        return y.mean((2, 3)) if x.shape[2] > 12 else y


class Fixed(Stem):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8 * 144, 3)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


@FREEZE
@pytest.mark.parametrize("make", [Flat, Pooled, Interpolated, Positions, OfItsType, Branching])
def test_other_heights_and_widths(make, freeze):
    model, served = pair(make, freeze=freeze)
    for _ in range(2):
        for other in OTHER:
            same(served, model, other)
            same(served, model, x=other.contiguous(memory_format=torch.channels_last))


def test_a_size_that_the_model_does_not_take():
    model, served = pair(Fixed)
    same(served, model, OTHER[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        served(OTHER[1])


def test_many_sizes_are_not_kept():
    model, served = pair(Flat)
    for rows in range(3, 40):
        same(served, model, X[:, :, :1].repeat(1, 1, rows, 1))
    assert len(served._serving.prepared._sizes) < 20


@FREEZE
def test_weights_are_new_for_every_kind_of_call(freeze):
    model, served = pair(Optional, freeze=freeze)
    other = randomise(Optional()).eval()
    calls = [{}, {"scale": 2.0}]
    for call in calls:
        for x in OTHER:
            same(served, model, x, **call)
    served.load_state_dict(other.state_dict())
    for call in calls:
        for x in OTHER:
            same(served, other, x, **call)


# --- outputs


class Pair(typing.NamedTuple):
    maps: torch.Tensor
    mean: torch.Tensor


@dataclasses.dataclass
class Answer:
    maps: torch.Tensor
    more: dict
    loss: torch.Tensor | None = None
    name: str = "answer"


class Outputs(Stem):
    def __init__(self, kind="tuple"):
        super().__init__()
        self.kind = kind

    def forward(self, x, labels=None):
        y = self.features(x)
        loss = None if labels is None else (y.mean() - labels).square()
        return KINDS[self.kind](y, y.mean((2, 3)), loss)


KINDS = {
    "tuple": lambda y, mean, loss: (y, mean),
    "list": lambda y, mean, loss: [y, [mean]],
    "dict": lambda y, mean, loss: {"maps": y, "mean": (mean, loss)},
    "ordered": lambda y, mean, loss: collections.OrderedDict(maps=y, mean=mean),
    "named": lambda y, mean, loss: Pair(y, mean),
    "dataclass": lambda y, mean, loss: Answer(y, {"mean": [mean]}, loss),
    "twice": lambda y, mean, loss: (y, y),
    "model output": lambda y, mean, loss: _model_output()(logits=mean, hidden_states=(y,)),
    "no tensor": lambda y, mean, loss: (y, 3, "words", None, y.shape[0]),
    "some": lambda y, mean, loss: {"maps": y} if loss is None else {"loss": loss, "maps": y},
}


def _model_output():
    from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

    return ImageClassifierOutputWithNoAttention


@FREEZE
@pytest.mark.parametrize("kind", KINDS)
def test_outputs(kind, freeze):
    if kind == "model output":
        pytest.importorskip("transformers.modeling_outputs")
    model, served = pair(lambda: Outputs(kind), freeze=freeze)
    if fused_res.dispatch.backends.STATUS["cpu"] is None:
        assert len(served.report.fused) == 2, served.report
    for _ in range(2):
        for x in OTHER:
            same(served, model, x)
            y = same(served, model, x=x, labels=torch.tensor(1.0))
    assert kind != "twice" or y[0] is y[1]
    model, served = pair(lambda: Outputs(kind), {"x": X, "labels": torch.tensor(1.0)})
    same(served, model, X, torch.tensor(2.0))
    same(served, model, X)


# --- the same tensor


class Two(Stem):
    def forward(self, a, b):
        y = self.features(a) + self.features(b)
        return y + 1 if a is b else y


class Writing(Stem):
    def forward(self, a, b):
        a.mul_(2)
        return self.features(a) - self.features(b)


@FREEZE
@pytest.mark.parametrize("make", [Two, Writing])
@pytest.mark.parametrize("example", [(X, X), (X, X + 1)], ids=["one", "two"])
def test_the_same_tensor_twice(make, example, freeze):
    model, served = pair(make, example, freeze=freeze)
    for _ in range(2):
        for x in OTHER:
            for layout in (torch.contiguous_format, torch.channels_last):
                one = x.contiguous(memory_format=layout)
                for args in ((one, one), (one, one + 1)):
                    args = copy.deepcopy(args)
                    theirs = copy.deepcopy(args)
                    same(served, model, *args)
                    model(*theirs)
                    torch.testing.assert_close(args, theirs)  # what it writes is seen
                    same(served, model, b=args[1], a=args[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_a_forward_writes_is_seen(mode):
    class InPlace(Stem):
        def forward(self, x, scale=1.0):
            return self.features(F.relu_(x)) * scale

    model, served = pair(InPlace)
    for scale in (1.0, 2.0):
        with mode():
            x, theirs = X + 0.1, X + 0.1
            served(x, scale=scale)
            model(theirs, scale)
            assert torch.equal(x, theirs) and x.min() == 0


# --- the rest of a model


def test_signature_attributes_and_methods():
    model, served = pair(Optional)
    assert inspect.signature(served.forward) == inspect.signature(model.forward)
    assert type(served).__name__ == "Optional" and repr(served).startswith("OptimizedOptional(")
    assert served.config == {"a": 1} and served.double(2) == 4
    with torch.no_grad():
        torch.testing.assert_close(served.features(X), model.features(X), rtol=1e-4, atol=1e-4)
    assert served.forward.__func__.__defaults__ is None
    _, block = pair(lambda: blocks.BasicBlock(3, 3))
    assert inspect.signature(block.forward) == inspect.signature(blocks.BasicBlock(3, 3).forward)


class Names(Stem):
    """Methods whose names are easily taken."""

    def _run(self, x):
        return self.features(x)

    def _call(self, x):
        return self._run(x) + 1

    def _fuse(self, a, b):
        return a * b

    def _forget(self, x):
        return self._fuse(self._call(x), 0.5)

    def forward(self, x):
        return self._function(self._forget(x))

    def _function(self, x):
        return x.relu()


@FREEZE
def test_the_models_own_methods_are_not_hidden(freeze):
    model, served = pair(Names, freeze=freeze)
    for x in OTHER:
        same(served, model, x)
    served.load_state_dict(model.state_dict())
    same(served, model, X)


def test_copies_and_pickles():
    model, served = pair(Optional, {"pixel_values": X, "scale": 2.0})
    file = io.BytesIO()
    torch.save(served, file)
    file.seek(0)
    copies = copy.deepcopy(served), pickle.loads(pickle.dumps(served))
    for other in (*copies, torch.load(file, weights_only=False)):
        for call in ({}, {"scale": 2.0}, {"scale": 3.0, "flip": True}):
            same(other, model, pixel_values=OTHER[1], **call)


def test_export_by_name():
    model, served = pair(Optional)
    rows, columns = torch.export.Dim("rows", min=4), torch.export.Dim("columns", min=4)
    shapes = {"pixel_values": {2: rows, 3: columns}}
    program = torch.export.export(served, (), {"pixel_values": X}, dynamic_shapes=shapes)
    with torch.no_grad():
        expected = model(OTHER[1])
    got = program.module()(pixel_values=OTHER[1])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(served, (X,), {"scale": 2.0})
    got = program.module()(X, scale=2.0)
    torch.testing.assert_close(got, 2 * model(X).detach(), rtol=1e-4, atol=1e-4)
    _, served = pair(lambda: Outputs("dict"))
    assert torch.export.export(served, (X,)).module()(X)["maps"].shape == (2, 8, 12, 12)


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_name():
    onnx = pytest.importorskip("onnx")
    _, served = pair(Outputs)
    file = io.BytesIO()
    torch.onnx.export(served, (), file, kwargs={"x": X}, dynamo=False, input_names=["x"])
    graph = onnx.load_from_string(file.getvalue()).graph
    assert [i.name for i in graph.input] == ["x"] and len(graph.output) == 2


def test_compiles():
    model, served = pair(Optional)
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    same(compiled, model, pixel_values=X)
    same(compiled, model, X, scale=2.0)
    model, served = pair(Two, (X, X + 1))
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    same(compiled, model, X, b=X + 1)
    same(compiled, model, X, X)


def test_a_cuda_graph_takes_the_example_alone():
    _, served = pair(Optional)
    served._serving.cuda_graph = True  # needs a GPU to be made
    for call, error, words in [
        ({"pixel_values": OTHER[1]}, ValueError, r"pixel_values must have shape \(2, 3, 12, 12\)"),
        ({"pixel_values": X, "scale": 2.0}, TypeError, r"got \(pixel_values=a tensor, scale=2.0\)"),
        ({"pixel_values": X.double()}, TypeError, "pixel_values must be torch.float32"),
    ]:
        with pytest.raises(error, match=words):
            served(**call)


# --- transformers


@pytest.fixture(scope="module")
def resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
    )
    model = randomise(transformers.ResNetForImageClassification(config)).eval()
    return model, optimize_for_inference(model, {"pixel_values": X}, tune=False)


def test_transformers_calls(resnet):
    model, served = resnet
    assert len(served.report.fused) >= 3, served.report
    for x in OTHER:
        same(served, model, pixel_values=x)
        y = same(served, model, x, output_hidden_states=True)
        assert len(y.hidden_states) == 3
        assert isinstance(same(served, model, x, return_dict=False), tuple)
    assert same(served, model, pixel_values=X, labels=torch.tensor([1, 3])).loss is not None
    assert inspect.signature(served.forward) == inspect.signature(model.forward)


def test_transformers_saves(resnet, tmp_path):
    model, served = resnet
    served.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.architectures == [type(model).__name__]
    assert list(again.state_dict()) == list(served.state_dict()) == list(model.state_dict())
    same(served, again.eval(), X)


def test_transformers_pipeline(resnet, caplog):
    transformers = pytest.importorskip("transformers")
    Image = pytest.importorskip("PIL.Image")
    model, served = resnet
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=1.0)
    images = [Image.new("RGB", size, (90, 160, 30)) for size in ((30, 40), (24, 24))]

    def run(net):
        return transformers.pipeline(
            "image-classification", model=net, image_processor=processor, device="cpu"
        )(images)

    got, expected = run(served), run(model)
    assert [[a["label"] for a in one] for one in got] == [
        [a["label"] for a in one] for one in expected
    ]
    for one, other in zip(got, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert abs(a["score"] - b["score"]) < 1e-4
