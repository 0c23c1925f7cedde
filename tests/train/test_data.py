"""Where pictures come from, what is wrong with them, and how a batch of them is prepared."""

import contextlib
import itertools
import os
import pickle
import re
import socket
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_res.train.augment import Augment, prepare
from fused_res.train.data import DataError, load, statistics

pytestmark = pytest.mark.usefixtures("one_thread")


def fails(message, *args, **keywords):
    """``load`` raises one line that says so."""
    with pytest.raises(DataError) as error:
        load(*args, **keywords)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = load()
    assert data.name == "digits" and data.classes == tuple("0123456789")
    for images, labels, count in ((*data[2:4], 1437), (*data[4:6], 360)):
        assert images.dtype == torch.uint8 and images.shape == (count, 3, 32, 32)
        assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(10))
    digits = datasets.load_digits()
    # whatever its colours are, a picture is nearest to the digit it was made of
    grey = torch.from_numpy(digits.images).float()[:, None]
    known = F.interpolate(grey, size=32, mode="bilinear")
    found = torch.cat([data.train_images, data.val_images])[:, 0].flatten(1).float()
    scores = [(t - t.mean(1, True)) / t.std(1, keepdim=True) for t in (found, known.flatten(1))]
    nearest = (scores[0] @ scores[1].T).argmax(1)
    assert sorted(nearest.tolist()) == list(range(1797))
    labels = torch.from_numpy(digits.target)[nearest]
    assert torch.equal(labels, torch.cat([data.train_labels, data.val_labels]))
    ink, paper = data.train_images.amax((2, 3)), data.train_images.amin((2, 3))
    for color, low, high in ((ink, 153, 255), (paper, 0, 102)):  # 0.6 to 1, 0 to 0.4
        assert color.float().std(0).min() > 20 and color.float().std(1).mean() > 20
        assert color.max() <= high and color.float().mean() > low


def test_digits_by_seed_and_size():
    pytest.importorskip("sklearn")
    first, again, other, small = load(), load("digits"), load(seed=1), load(size=16)
    assert first.fingerprint == again.fingerprint and torch.equal(first[2], again[2])
    assert len({first.fingerprint, other.fingerprint, small.fingerprint}) == 3
    assert small.train_images.shape == (1437, 3, 16, 16)


NAMES = {"cifar10": ["airplane", "automobile", "bird", "cat"], "cifar100": ["apple", "bear", "cup"]}
FOLDERS = {
    "cifar-10-batches-bin": "cifar10",
    "cifar-100-binary": "cifar100",
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
}
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def python2_pickle(pixels, key, labels):
    """The stream that Python 2 and its NumPy made of a batch, as in CIFAR's files."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tb"
    )
    items = b"".join(b"K" + bytes([label]) for label in labels)
    return b"\x80\x02}(" + text(b"data") + array + text(key) + b"](" + items + b"eu."


def write_cifar(place, kind, count=6):
    """A small CIFAR of random pixels, and its (images, labels) for training and validation."""
    random = np.random.RandomState(0)
    place.mkdir(parents=True)
    names = NAMES[FOLDERS[kind]]
    ten, binary = FOLDERS[kind] == "cifar10", "bin" in kind
    train = BATCHES if ten else ["train"]
    test = "test_batch" if ten else "test"
    key = b"labels" if ten else b"fine_labels"
    parts = {}
    for name in (*train, test):
        pixels = random.randint(0, 256, (count, 3072)).astype(np.uint8)
        labels = [i % len(names) for i in range(count)]
        parts[name] = torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.tensor(labels)
        if binary:
            coarse = b"" if ten else b"\x13"
            records = [
                coarse + bytes([n]) + p.tobytes() for n, p in zip(labels, pixels, strict=True)
            ]
            (place / f"{name}.bin").write_bytes(b"".join(records))
        elif name == train[0]:
            (place / name).write_bytes(python2_pickle(pixels, key, labels))
        else:
            protocol = (2, 3, 4, 5)[len(parts) % 4]
            (place / name).write_bytes(pickle.dumps({b"data": pixels, key: labels}, protocol))
    if binary:
        file = "batches.meta.txt" if ten else "fine_label_names.txt"
        (place / file).write_text("\n".join(names) + "\n\n")
    else:
        key = b"label_names" if ten else b"fine_label_names"
        content = {key: [name.encode() for name in names]}
        (place / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(content))
    images, labels = zip(*(parts[name] for name in train), strict=True)
    return torch.cat(images), torch.cat(labels), *parts[test]


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", FOLDERS)
def test_cifar(tmp_path, kind, below):
    place = tmp_path / kind if below else tmp_path / "here"
    expected = write_cifar(place, kind)
    data = load(str(tmp_path) if below else place)
    assert data.name == FOLDERS[kind] and list(data.classes) == NAMES[data.name]
    for found, wanted in zip(data[2:6], expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_versions_of_cifar_are_the_same(tmp_path):
    for kind in FOLDERS:
        write_cifar(tmp_path / kind / kind, kind)
    prints = [load(tmp_path / kind).fingerprint for kind in FOLDERS]
    assert prints[0] == prints[2] and prints[1] == prints[3] and prints[0] != prints[1]


@pytest.fixture
def cifar10(tmp_path):
    write_cifar(tmp_path / "cifar", "cifar-10-batches-bin")
    return tmp_path / "cifar"


@pytest.fixture
def pickled(tmp_path):
    write_cifar(tmp_path / "cifar", "cifar-10-batches-py")
    return tmp_path / "cifar"


@pytest.mark.parametrize("file", ["data_batch_1.bin", "test_batch.bin"])
@pytest.mark.parametrize("byte", [0, 1, 3073 * 6 - 1])
def test_one_other_bit_is_another_fingerprint(cifar10, file, byte):
    before = load(cifar10).fingerprint
    content = bytearray((cifar10 / file).read_bytes())
    content[byte] ^= 1
    (cifar10 / file).write_bytes(content)
    assert load(cifar10).fingerprint != before
    content[byte] ^= 1
    (cifar10 / file).write_bytes(content)
    assert load(cifar10).fingerprint == before


def test_names_are_in_the_fingerprint(cifar10):
    before = load(cifar10)
    (cifar10 / "batches.meta.txt").write_text("airplane car bird cat")
    after = load(cifar10)
    assert after.classes[1] == "car" and after.fingerprint != before.fingerprint


@pytest.mark.parametrize("kind", FOLDERS)
def test_missing_files(tmp_path, kind):
    write_cifar(tmp_path / kind, kind)
    for path in sorted((tmp_path / kind).iterdir()):
        path.rename(tmp_path / "away")
        fails(f"^{re.escape(str(path))}: missing", tmp_path)
        (tmp_path / "away").rename(path)


@pytest.mark.parametrize("length", [0, 1, 3073 * 2 + 5, 3073 * 6 - 1])
def test_a_record_cut_short(cifar10, length):
    path = cifar10 / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:length])
    fails(
        f"^{path}: byte {length // 3073 * 3073}: .* {length % 3073} bytes instead of 3073", cifar10
    )


@pytest.mark.parametrize(("kind", "size"), [("cifar-10-batches-bin", 1), ("cifar-100-binary", 2)])
def test_a_label_out_of_range(tmp_path, kind, size):
    folder = tmp_path / "cifar"
    write_cifar(folder, kind)
    path = folder / ("test_batch.bin" if size == 1 else "test.bin")
    content = bytearray(path.read_bytes())
    byte = 2 * (size + 3072) + size - 1
    classes = len(NAMES[FOLDERS[kind]])
    for label in (classes, 255):
        content[byte] = label
        path.write_bytes(content)
        fails(f"^{path}: byte {byte}: label {label} must be 0 to {classes - 1}$", folder)


def test_names_that_are_no_text(cifar10):
    (cifar10 / "batches.meta.txt").write_bytes(b"airplane\n\xff\n")
    fails("batches.meta.txt: byte 9: not text", cifar10)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_foreign_pickle_is_not_executed(pickled, tmp_path, protocol):
    flag = tmp_path / "executed"
    for call in ((os.mkdir, (str(flag),)), (eval, (f"__import__('os').mkdir({str(flag)!r})",))):
        for content in (Evil(*call), {b"data": Evil(*call), b"labels": [0]}):
            (pickled / "test_batch").write_bytes(pickle.dumps(content, protocol))
            fails(f"^{pickled / 'test_batch'}: .*(mkdir|eval) is not", pickled)
    # also where NumPy would call it: for an element of an array of objects
    content = {b"data": np.array([Evil(os.mkdir, (str(flag),))]), b"labels": [0]}
    (pickled / "test_batch").write_bytes(pickle.dumps(content, protocol))
    fails("mkdir is not", pickled)
    assert not flag.exists()


def test_a_pickle_cut_short(pickled):
    path = pickled / "data_batch_1"
    content = path.read_bytes()
    for length in (0, 1, 30, 500, len(content) - 1):
        path.write_bytes(content[:length])
        fails(f"^{path}: unpickled up to byte \\d+: ", pickled)
    path.write_bytes(b"<html>not found</html>")
    fails(f"^{path}: unpickled up to byte ", pickled)


PIXELS = np.zeros((3, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a pickled list must be a dict"),
        ({b"labels": [0, 1, 2]}, "no key b'data'"),
        ({"data": PIXELS, "labels": [0, 1, 2]}, "no key b'data'"),
        ({b"data": PIXELS, b"fine_labels": [0, 1, 2]}, "no key b'labels'"),
        ({b"data": PIXELS.tolist(), b"labels": [0, 1, 2]}, "key b'data' must be a uint8 array"),
        ({b"data": PIXELS.astype(float), b"labels": [0, 1, 2]}, "key b'data' must be a uint8"),
        ({b"data": PIXELS[:, 1:], b"labels": [0, 1, 2]}, "key b'data' must be a uint8 array"),
        ({b"data": PIXELS[0], b"labels": [0, 1, 2]}, "key b'data' must be a uint8 array"),
        ({b"data": PIXELS, b"labels": [0, 1]}, "key b'labels' must be a list of 3"),
        ({b"data": PIXELS[:0], b"labels": []}, "key b'labels' must be a list"),
        ({b"data": PIXELS, b"labels": (0, 1, 2)}, "key b'labels' must be a list"),
        ({b"data": PIXELS, b"labels": [0, 4, 5]}, "key b'labels', entry 1: 4 must be 0 to 3"),
        ({b"data": PIXELS, b"labels": [0, 1, -1]}, "key b'labels', entry 2: -1 must be"),
        ({b"data": PIXELS, b"labels": [0, 1.5, 2]}, "key b'labels', entry 1: 1.5 must be"),
    ],
)
def test_what_a_pickled_batch_must_be(pickled, content, message):
    (pickled / "data_batch_4").write_bytes(pickle.dumps(content))
    fails(f"^{pickled / 'data_batch_4'}: {message}", pickled)


@pytest.mark.parametrize("names", [["airplane"], b"airplane", None])
def test_what_pickled_names_must_be(pickled, names):
    (pickled / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    fails(f"^{pickled / 'batches.meta'}: key b'label_names' must be a list of bytes", pickled)


def test_which_folder(tmp_path):
    fails(f"^{tmp_path / 'no'}: not a folder", tmp_path / "no")
    fails(
        f"^{tmp_path}: neither train/<class>/ .*: data_batch_1.bin .*, train.bin .*, data_batch_1 ",
        tmp_path,
    )
    write_cifar(tmp_path / "cifar-100-python", "cifar-100-python")
    assert load(tmp_path).name == "cifar100"
    write_cifar(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    fails("both CIFAR-10 and CIFAR-100: name one of .*cifar-10-batches-bin, ", tmp_path)
    fails("^size=64: CIFAR's pictures are 32", tmp_path / "cifar-100-python", size=64)


def test_two_classes(cifar10):
    every, two = load(cifar10), load(cifar10, classes=("bird", "airplane"))
    assert two.classes == ("bird", "airplane") and two.fingerprint != every.fingerprint
    for i in (2, 4):
        kept = [(n, {2: 0, 0: 1}[n.item()]) for n in every[i + 1] if n.item() in (0, 2)]
        assert two[i + 1].tolist() == [new for _, new in kept]
        where = [n.item() in (0, 2) for n in every[i + 1]]
        assert torch.equal(two[i], every[i][where])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["bird", "emu"], "^classes: no 'emu' in cifar10: airplane, automobile, bird, cat$"),
        (["bird"], "^classes: bird must be at least two"),
        ([], "^classes: .*must be at least two"),
        (["bird", "cat", "bird"], "^classes: bird, cat, bird must be .*each once"),
    ],
)
def test_classes_that_cannot_be(cifar10, classes, message):
    fails(message, cifar10, classes=classes)


def test_fewer_images(cifar10):
    every, some, again, other = (
        load(cifar10, **how) for how in ({}, *(dict(images=8, seed=s) for s in (0, 0, 1)))
    )
    assert len(some.train_labels) == len(some.train_images) == 8
    assert len(some.val_labels) == len(some.val_images) == 2
    assert some.fingerprint == again.fingerprint != other.fingerprint
    for i in (2, 4):
        # each is there with its label, and none is taken twice
        at = [(every[i] == image).flatten(1).all(1).nonzero().item() for image in some[i]]
        assert len(set(at)) == len(at) and torch.equal(every[i + 1][at], some[i + 1])
    assert len(load(cifar10, images=1).val_labels) == 1
    assert len(load(cifar10, images=30).val_labels) == 6
    fails("^images=31: there are 30 training images", cifar10, images=31)
    fails("^images=0 must be at least 1", cifar10, images=0)
    fails("^size=0 must be at least 1", cifar10, size=0)


@pytest.fixture
def image(tmp_path):
    """Saves an image of one colour, or of the array given."""
    Image = pytest.importorskip("PIL.Image")

    def save(name, pixels=(10, 20, 30), mode="RGB"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(pixels, tuple):
            pixels = np.full((40, 36, 3), pixels, np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        return path

    return save


@pytest.fixture
def folder(image, tmp_path):
    for name, color in (("cat", (200, 0, 0)), ("ant", (0, 200, 0)), ("bee", (0, 0, 200))):
        image(f"train/{name}/1.png", color)
        image(f"train/{name}/more/2.PNG", color)
    image("train/bee/3.png", (7, 7, 7))
    image("val/cat/1.png", (100, 0, 0))
    image("val/bee/x.png", (0, 0, 100))
    (tmp_path / "train/ant/notes.txt").write_text("none")
    (tmp_path / "train/ant/._1.png").write_text("none")
    (tmp_path / "train/.hidden").mkdir()
    return tmp_path


@pytest.mark.parametrize("val", ["val", "valid", "test"])
def test_folder(folder, val):
    (folder / "val").rename(folder / val)
    data = load(folder)
    assert data.name == "folder" and data.classes == ("ant", "bee", "cat")
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert data.val_labels.tolist() == [1, 2]
    colors = [[0, 200, 0]] * 2 + [[0, 0, 200], [7, 7, 7], [0, 0, 200]] + [[200, 0, 0]] * 2
    assert data.train_images.shape == (7, 3, 32, 32) and data.train_images.dtype == torch.uint8
    for images, expected in ((data[2], colors), (data[4], [[0, 0, 100], [100, 0, 0]])):
        assert torch.equal(images.amin((2, 3)), images.amax((2, 3)))
        assert images[:, :, 0, 0].tolist() == expected
    assert load(folder, size=9).val_images.shape == (2, 3, 9, 9)


def test_images_are_resized_and_cropped_in_the_middle(folder, image):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251
    image("val/cat/1.png", wide)
    image("val/bee/x.png", np.repeat(np.repeat(wide[:, 32:64], 4, 0), 4, 1))
    bee, cat = load(folder).val_images.permute(0, 2, 3, 1)
    assert torch.equal(cat, torch.from_numpy(wide[:, 32:64]))
    blocks = F.interpolate(
        torch.from_numpy(wide[:, 32:64]).repeat_interleave(4, 0).repeat_interleave(4, 1)
        .permute(2, 0, 1)[None].float(), size=32, mode="bilinear", antialias=True,
    )  # fmt: skip
    assert (bee.float() - blocks[0].permute(1, 2, 0)).abs().max() <= 1


@pytest.mark.parametrize("name", ["1.jpg", "1.JPEG", "1.bmp", "1.webp", "1.tiff"])
def test_formats(folder, image, name):
    (folder / "val/cat/1.png").unlink()
    image(f"val/cat/{name}", (90, 90, 90))
    assert (load(folder).val_images[1].int() - 90).abs().max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_modes(folder, image, mode):
    (folder / "val/cat/1.png").unlink()
    image(f"val/cat/1.{'jpg' if mode == 'CMYK' else 'png'}", (255, 255, 255), mode)
    assert load(folder).val_images[1].min() >= 253


def test_sixteen_bits_are_refused(folder, image):
    path = image("val/cat/1.png", np.full((8, 8), 3000, np.uint16), "I;16")
    fails(f"^{path}: not a readable image: .*must be of 8 bits", folder)


def test_images_that_cannot_be_read(folder):
    path = folder / "train/bee/3.png"
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        fails(f"^{path}: not a readable image: ", folder)
    # what is not asked for is not read
    assert len(load(folder, classes=["ant", "cat"], images=4).train_labels) == 4


def test_pipes_sockets_and_folders_are_no_images(folder):
    expected = load(folder).fingerprint
    os.mkfifo(folder / "train/cat/pipe.png")
    (folder / "val/bee/folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder / "train/bee"):
        server.bind("socket.png")  # a long path is none
    assert load(folder).fingerprint == expected
    (folder / "train/bee/link.png").symlink_to(folder / "nothing.png")
    fails(f"^{folder / 'train/bee/link.png'}: not a readable image: ", folder)


def test_only_a_pipe_is_a_class_without_images(folder):
    os.mkdir(folder / "train/emu")
    os.mkfifo(folder / "train/emu/1.png")
    fails(f"^{folder / 'train/emu'}: a class without images", folder)


def test_more_pixels_than_memory():
    with pytest.raises(DataError, match=r"^size=100000: 1797 images of it take \d+ GiB, this mach"):
        load(size=100_000)


def test_folders_that_cannot_be(folder):
    (folder / "train/emu").mkdir()
    fails(f"^{folder / 'train/emu'}: a class without images", folder)
    (folder / "train/emu").rmdir()
    (folder / "val/emu").mkdir()
    fails(f"^{folder / 'val/emu'}: a class without images", folder)
    (folder / "val/bee/x.png").rename(folder / "val/emu/x.png")
    (folder / "val/bee").rmdir()
    fails(f"^{folder / 'val/emu'}: no such class in {folder / 'train'}", folder)
    (folder / "val/emu/x.png").unlink()
    (folder / "val/emu").rmdir()
    fails("^folder: no validation images of ant, bee", folder, classes=["ant", "bee"])
    (folder / "val").rename(folder / "away")
    fails(f"^{folder}: beside train/ there must be val/, valid/ or test/", folder)


def test_one_class(image, tmp_path):
    image("train/cat/1.png")
    image("val/cat/1.png")
    fails("^classes: cat must be at least two", tmp_path)


def pictures(count, height=7, width=5):
    """None of their pixels is normalised to 0."""
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8)


MEAN, STD = torch.tensor([-0.1, -0.2, -0.3]), torch.tensor([0.5, 0.25, 2.0])


def test_statistics():
    images = pictures(50)
    exact = images.double() / 255
    mean, std = statistics(images)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (3,)
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)).float(), rtol=1e-7, atol=0)
    expected = exact.std((0, 2, 3), unbiased=False).float()
    torch.testing.assert_close(std, expected, rtol=1e-7, atol=0)
    images[:, 1] = 51
    mean, std = statistics(images)
    normal = prepare(images, mean, std, None, None)
    assert std[1] == 1 and normal[:, 1].abs().max() < 1e-6
    others = normal[:, ::2].double()
    assert others.mean((0, 2, 3)).abs().max() < 1e-6
    assert (others.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("augment", [None, Augment(0, False), Augment(2, True, 3)])
def test_prepared(augment, dtype):
    images = pictures(6)
    found = prepare(images, MEAN, STD, augment, torch.Generator().manual_seed(1), dtype)
    assert found.dtype == dtype and found.shape == images.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    if augment is None or augment.crop == 0:
        exact = (images.double() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
    elsewhere = torch.Generator().manual_seed(1)
    assert torch.equal(found, prepare(images, MEAN, STD, augment, elsewhere, dtype))
    if augment is not None and augment.crop:
        assert not torch.equal(found, prepare(images, MEAN, STD, augment, elsewhere, dtype))
    # the numbers are drawn on the CPU for a device that has none of its own
    meta = prepare(images.to("meta"), MEAN, STD, augment, elsewhere, dtype)
    assert meta.is_meta and meta.shape == images.shape


def candidates(image, augment):
    """Everything that may become of one normalised image, by how: plain loops."""
    _, height, width = image.shape
    crop, side = augment.crop, augment.cutout
    padded = F.pad(image, (crop,) * 4)
    for top, left in itertools.product(range(2 * crop + 1), repeat=2):
        part = padded[:, top : top + height, left : left + width]
        for flip in (False, True)[: 1 + augment.flip]:
            turned = part.flip(2) if flip else part
            for y, x in itertools.product(range(height), range(width)) if side else [(0, 0)]:
                cut = turned.clone()
                y0, x0 = y - side // 2, x - side // 2
                cut[:, max(y0, 0) : max(y0 + side, 0), max(x0, 0) : max(x0 + side, 0)] = 0
                yield (top, left, flip, y, x), cut


@pytest.mark.parametrize(
    ("augment", "count"),
    [
        (Augment(crop=2, flip=False), 400),
        (Augment(crop=0, flip=True), 100),
        (Augment(crop=0, flip=False, cutout=2), 500),
        (Augment(crop=0, flip=False, cutout=3), 500),
        (Augment(crop=1, flip=True, cutout=1), 30),
        (Augment(crop=9, flip=True), 30),
    ],
)
def test_augmented(augment, count):
    """Each image is one of those that may be; where it can be told, each of these comes up."""
    image = pictures(1)
    generator = torch.Generator().manual_seed(0)
    normal = prepare(image, MEAN, STD, None, None)[0]
    found = prepare(image.expand(count, -1, -1, -1), MEAN, STD, augment, generator)
    hows, every = zip(*candidates(normal, augment), strict=True)
    same = (found[:, None] == torch.stack(every)).flatten(2).all(2)
    assert same.any(1).all()
    if count >= 100:
        assert same.any(0).all()
    if augment == Augment(crop=0, flip=True):
        assert 35 <= same[:, hows.index((0, 0, True, 0, 0))].sum() <= 65


def test_images_keep_their_places():
    images = pictures(20)
    augment = Augment(crop=1, flip=True)
    found = prepare(images, MEAN, STD, augment, torch.Generator().manual_seed(0))
    normal = prepare(images, MEAN, STD, None, None)
    for image, other in zip(found, normal, strict=True):
        assert any(torch.equal(image, may) for _, may in candidates(other, augment))


def test_what_cannot_be_prepared():
    generator = torch.Generator()
    for images in (torch.rand(2, 3, 4, 4), pictures(2)[0]):
        with pytest.raises(ValueError, match="images: torch.* must be uint8"):
            prepare(images, MEAN, STD, None, None)
    for augment in (Augment(crop=-1), Augment(cutout=-1)):
        with pytest.raises(ValueError, match="augment: .*-1.* negative"):
            prepare(pictures(2), MEAN, STD, augment, generator)
