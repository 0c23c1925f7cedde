"""Pictures to train on: scikit-learn's digits, CIFAR from its files, or a folder of images."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cli import CommandError
from .settings import Settings


class DataError(CommandError):
    """Data is missing or cannot be read; the message names the argument, or the file and the place
    in it."""


class Data(NamedTuple):
    """Pictures (N, 3, H, W), uint8, and their classes (N,), int64, on the CPU.

    fingerprint: SHA-256 of all other fields, in hexadecimal, to recognise the same data.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    fingerprint: str


class _Split(NamedTuple):
    """All labels of a part, and a function that reads the pictures at indices (N,)."""

    labels: Tensor
    read: Callable[[Tensor], Tensor]


class _Source(NamedTuple):
    name: str
    classes: tuple[str, ...]
    train: _Split
    val: _Split


def load(
    source: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    images: int | None = None,
    seed: int = 0,
) -> Data:
    """Reads pictures into memory.

    Args:
        source: ``None`` or ``"digits"``: scikit-learn's 1797 handwritten digits in colour, split
            4 : 1. Otherwise a folder with CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), the unpacked
            binary or Python version, directly or in the archive's folder; or a folder with images
            in ``train/<class>/`` and ``val/<class>/`` (or ``valid``, ``test``).
        classes: the classes to keep, at least two, numbered in this order; default: all.
        size: height and width in pixels. The digits are enlarged; images of a folder are resized
            and cropped in the middle. Default: 32. CIFAR's images are always 32.
        images: number of training images; validation takes a quarter as many, or all if there are
            fewer. Default: all.
        seed: for the digits' split and colours, and for the selection of ``images``.

    Raises:
        DataError: an argument does not fit, or a file is missing or damaged.
    """
    for name, value in (("size", size), ("images", images)):
        if value is not None and value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    if source is None or source == "digits":
        found = _digits(size or 32, seed)
    else:
        found = _folder(Path(source), size)
    names = found.classes if classes is None else tuple(classes)
    unknown = [name for name in names if name not in found.classes]
    if unknown:
        known, more = ", ".join(found.classes), " and more" if len(unknown) > 10 else ""
        some = ", ".join(map(repr, unknown[:10])) + more
        raise DataError(f"classes: no {some} in {found.name}: {known}")
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"classes: {', '.join(names)} must be at least two, each once")
    number = torch.full((len(found.classes),), -1)
    number[[found.classes.index(name) for name in names]] = torch.arange(len(names))
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for part, split in (("training", found.train), ("validation", found.val)):
        labels = number[split.labels]
        kept = (labels >= 0).nonzero().squeeze(1)
        if not len(kept):
            raise DataError(f"{found.name}: no {part} images of {', '.join(names)}")
        if images is not None:
            if part == "training" and images > len(kept):
                raise DataError(f"images={images}: there are {len(kept)} training images")
            count = images if part == "training" else max(images // 4, 1)
            kept = kept[torch.randperm(len(kept), generator=generator)[:count]]
        _check_memory(len(kept), size)
        pieces += [split.read(kept), labels[kept]]
    digest = hashlib.sha256(repr((found.name, names, [part.shape for part in pieces])).encode())
    for part in pieces:
        digest.update(part.numpy())
    return Data(found.name, names, *pieces, digest.hexdigest())


def load_named(settings: Settings, **changed: Any) -> Data:
    """The pictures that the settings of a run name; ``changed`` replaces arguments of ``load``."""
    named = {name: getattr(settings, name) for name in ("classes", "size", "images", "seed")}
    return load(settings.data, **{**named, **changed})


def _check_memory(count: int, size: int | None, of_pixel: int = 3) -> None:
    """Raises DataError if the images cannot fit into the machine's memory; ``of_pixel``: bytes."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return
    needed = count * (size or 32) ** 2 * of_pixel
    if needed > there:
        raise DataError(
            f"size={size}: {count} images of it take {needed / 2**30:.0f} GiB, this machine has "
            f"{there / 2**30:.0f} GiB of memory"
        )


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, for pixels from 0 to 1.

    Sums are exact, over the counts of each value, in float64. The deviation divides by the number
    of pixels. For a channel with a single value it is 1, so that the normalised channel is 0.

    Args:
        images: (N, 3, H, W), uint8.

    Returns:
        Two of (3,), float32, on the CPU.
    """
    counts = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])]
    share = torch.stack(counts).cpu().double() / (images.numel() // images.shape[1])
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where((share == 1).any(1), 1.0, std).float()


def _digits(size: int, seed: int) -> _Source:
    """The digits, each in random ink and paper colours, so that colour does not tell the class."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits are scikit-learn's: pip install scikit-learn") from None

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    _check_memory(len(order), size, 32)  # two of 3 channels in float32, and the images
    grey = torch.from_numpy(digits.images).float()[order, None] / 16
    labels = torch.from_numpy(digits.target).long()[order]
    grey = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    ink = 0.6 + 0.4 * torch.rand((len(order), 3, 1, 1), generator=generator)
    paper = 0.4 * torch.rand((len(order), 3, 1, 1), generator=generator)
    pictures = ((paper + (ink - paper) * grey) * 255).round().byte()
    split = len(order) * 4 // 5
    train, val = (
        _Split(labels[part], pictures[part].__getitem__)
        for part in (slice(split), slice(split, None))
    )
    return _Source("digits", tuple("0123456789"), train, val)


class _Cifar(NamedTuple):
    """A version of CIFAR. labels: how many bytes of labels are before a picture, of which the last
    is the class; or their key in a pickle."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    labels: int | bytes


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY = tuple(f"{name}.bin" for name in _BATCHES)
_CIFAR = (
    _Cifar("cifar10", "cifar-10-batches-bin", _BINARY, "test_batch.bin", "batches.meta.txt", 1),
    _Cifar("cifar100", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    _Cifar("cifar10", "cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", b"labels"),
    _Cifar("cifar100", "cifar-100-python", ("train",), "test", "meta", b"fine_labels"),
)


def _folder(folder: Path, size: int | None) -> _Source:
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder (an archive must be unpacked)")
    if (folder / "train").is_dir():
        return _image_folder(folder, size or 32)
    found = [
        (kind, place)
        for kind in _CIFAR
        for place in (folder, folder / kind.folder)
        if any((place / file).is_file() for file in (*kind.train, kind.test, kind.names))
    ]
    if not found:
        raise DataError(
            f"{folder}: neither train/<class>/ with images, nor CIFAR's files: "
            + ", ".join(f"{kind.train[0]} (of {kind.folder})" for kind in _CIFAR)
        )
    if len({kind.name for kind, _ in found}) > 1:
        places = ", ".join(str(place) for _, place in found)
        raise DataError(f"{folder}: both CIFAR-10 and CIFAR-100: name one of {places}")
    if size not in (None, 32):
        raise DataError(f"size={size}: CIFAR's pictures are 32")
    return _cifar(*found[0])


def _cifar(kind: _Cifar, place: Path) -> _Source:
    for file in (*kind.train, kind.test, kind.names):
        if not (place / file).is_file():
            raise DataError(f"{place / file}: missing: the rest of {kind.folder} is there")
    if isinstance(kind.labels, int):
        classes = _lines(place / kind.names)
        read = partial(_binary, prefix=kind.labels, classes=len(classes))
    else:
        classes = _pickled_names(place / kind.names, kind.labels.removesuffix(b"s") + b"_names")
        read = partial(_pickled, key=kind.labels, classes=len(classes))

    def split(files: Sequence[str]) -> _Split:
        images, labels = zip(*(read(place / file) for file in files), strict=True)
        return _Split(torch.cat(labels), torch.cat(images).__getitem__)

    return _Source(kind.name, classes, split(kind.train), split([kind.test]))


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: not text in UTF-8") from error


def _binary(path: Path, prefix: int, classes: int) -> tuple[Tensor, Tensor]:
    """Records of ``prefix`` bytes of labels and 3 x 32 x 32 of pixels."""
    size = prefix + 3 * 32 * 32
    content = bytearray(path.read_bytes())
    whole, rest = divmod(len(content), size)
    if rest or not whole:
        raise DataError(f"{path}: byte {whole * size}: a record has {rest} bytes instead of {size}")
    records = torch.frombuffer(content, dtype=torch.uint8).view(whole, size)
    labels = records[:, prefix - 1].long()
    for i in (labels >= classes).nonzero()[:1].flatten().tolist():
        raise DataError(
            f"{path}: byte {i * size + prefix - 1}: label {labels[i]} must be 0 to {classes - 1}"
        )
    return records[:, prefix:].reshape(whole, 3, 32, 32), labels


class _Unpickler(pickle.Unpickler):
    """Makes builtin containers and NumPy's arrays, and calls nothing else that a pickle names."""

    ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy._core.numeric", "_frombuffer"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not what CIFAR is made of")
        return super().find_class(module, name)


def _unpickle(path: Path, *keys: bytes) -> list:
    file = io.BytesIO(path.read_bytes())
    try:
        content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # broken bytes can raise anything
        raise DataError(f"{path}: unpickled up to byte {file.tell()}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a pickled {type(content).__name__} must be a dict")
    for key in keys:
        if key not in content:
            raise DataError(f"{path}: no key {key!r}")
    return [content[key] for key in keys]


def _pickled_names(path: Path, key: bytes) -> tuple[str, ...]:
    (names,) = _unpickle(path, key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path}: key {key!r} must be a list of bytes")
    return tuple(name.decode(errors="replace") for name in names)


def _pickled(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    data, labels = _unpickle(path, b"data", key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise DataError(f"{path}: key b'data' must be a uint8 array of (N, 3072)")
    if not isinstance(labels, list) or not 0 < len(labels) == len(data):
        raise DataError(f"{path}: key {key!r} must be a list of {len(data)}, as b'data' has rows")
    for i, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < classes:
            raise DataError(f"{path}: key {key!r}, entry {i}: {label!r} must be 0 to {classes - 1}")
    return torch.from_numpy(data).reshape(-1, 3, 32, 32), torch.tensor(labels)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def _image_folder(folder: Path, size: int) -> _Source:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError("images are read by Pillow: pip install pillow") from None

    places = [folder / name for name in ("val", "valid", "test") if (folder / name).is_dir()]
    if not places:
        raise DataError(f"{folder}: beside train/ there must be val/, valid/ or test/")
    train, val = _listing(folder / "train"), _listing(places[0])
    classes = tuple(train)
    for name in val:
        if name not in train:
            raise DataError(f"{places[0] / name}: no such class in {folder / 'train'}")

    def split(files: dict[str, list[Path]]) -> _Split:
        found = [(classes.index(name), path) for name in files for path in files[name]]
        labels, paths = zip(*found, strict=True)
        return _Split(torch.tensor(labels), partial(_pictures, paths, size))

    return _Source("folder", classes, split(train), split(val))


def _listing(place: Path) -> dict[str, list[Path]]:
    """The images of each class, without hidden files, pipes, sockets and folders."""
    out = {}
    for folder in sorted(place.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            out[folder.name] = sorted(
                path
                for path in folder.rglob("*")
                if path.suffix.lower() in _SUFFIXES
                and not path.name.startswith(".")
                and (path.is_file() or not path.exists())  # reading a broken link raises later
            )
            if not out[folder.name]:
                raise DataError(f"{folder}: a class without images ({', '.join(_SUFFIXES)})")
    return out


def _pictures(paths: Sequence[Path], size: int, indices: Tensor) -> Tensor:
    out = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
    chosen = [paths[i] for i in indices.tolist()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, picture in enumerate(pool.map(partial(_picture, size=size), chosen)):
            out[i] = picture
    return out


def _picture(path: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # conversion would clip values at 255
                raise ValueError(f"mode {image.mode} must be of 8 bits a channel")
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # broken bytes can raise anything
        raise DataError(f"{path}: not a readable image: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
