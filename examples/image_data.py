"""Small image data sets from their published files, with wrong labels where they are wanted.

    data = load_data("fashion-mnist", noise=0.4, seed=3)
    data.train.images, data.train.labels  # what training sees; data.train.true_labels is right

| name | files | where they come from |
| --- | --- | --- |
| digits | none | scikit-learn |
| fashion-mnist | IDX, plain or .gz | Debian: `apt install dataset-fashion-mnist` |
| cifar10, cifar100 | Python or binary version | https://www.cs.toronto.edu/~kriz/cifar.html |
| tinyimagenet | JPEG | http://cs231n.stanford.edu/tiny-imagenet-200.zip |

How many images there are is for the files to say: a set with fewer of them is read as it is.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

NOISE_KINDS = ("symmetric", "asymmetric")
DIGITS_FOR_TRAINING = 1200  # of 1797; there is no published test set
FIXED_SEED = 0  # of what is the same in all runs
# Truck to automobile, bird to airplane, deer to horse, cat to dog and back.
CIFAR10_MISTAKES = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
TINY_SIDE = 64  # pixels, as published


class Split(NamedTuple):
    """Images (N, C, H, W) uint8, the labels (N,) int64 that training sees, and the right ones."""

    images: Tensor
    labels: Tensor
    true_labels: Tensor


class ImageData(NamedTuple):
    train: Split
    val: Split
    test: Split
    classes: int
    mean: Tensor  # (C,) float32, of the training images / 255
    std: Tensor
    name: str
    padding: int  # pixels on each side before the random crop; 0: random resized crop
    flip: bool
    size: int  # of the network's input, in pixels


class Published(NamedTuple):
    """What the files hold."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    superclasses: Tensor | None = None  # (N,) int64, of the training images


class Source(NamedTuple):
    read: Callable[[Path], Published]
    classes: int
    padding: int
    flip: bool
    size: int
    where: str = ""  # to get the files
    folder: Path | None = None  # where a package of the system puts them


def load_data(
    name: str,
    folder: str | Path | None = None,
    *,
    noise: float = 0.0,
    noise_kind: str = "symmetric",
    val: float = 0.1,
    train_images: int | None = None,
    seed: int = 0,
) -> ImageData:
    """A data set, split into training, validation and test images.

    `train_images` keeps so many of the published training images, the same ones for each seed;
    the share `val` of them is for validation. Which ones those are and which labels are wrong
    depends on `seed`; the test images and their labels never do. Training and validation labels
    are equally noisy, as nobody in practice has clean ones for validation.

    Symmetric noise: round(noise * N) labels of each split are any of the other classes.
    Asymmetric: round(noise * n) of the n samples of a class have the label of one similar class:
    the pairs of Patrini et al. (CVPR 2017) for CIFAR-10, where the other classes stay right; the
    next class of the same superclass for CIFAR-100; the next class (pair flip, Han et al.,
    NeurIPS 2018) for all others. With the same seed, less noise is a part of more noise.

    Raises ValueError for bad arguments and bad files, FileNotFoundError for missing ones.
    """
    if name not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, but is {name!r}")
    if noise_kind not in NOISE_KINDS:
        raise ValueError(f"noise_kind must be one of {', '.join(NOISE_KINDS)}, not {noise_kind!r}")
    for what, share in (("noise", noise), ("val", val)):
        if not 0 <= share < 1:
            raise ValueError(f"{what} must be in [0, 1), but is {share}")
    source = SOURCES[name]
    published = read(name, folder)
    kept = subset(len(published.labels), train_images)
    generator = torch.Generator().manual_seed(seed)
    order = kept[torch.randperm(len(kept), generator=generator)]
    held_out = round(val * len(kept))
    if held_out == len(kept):
        raise ValueError(f"val {val} of {len(kept)} images leaves none for training")
    flips = mistakes(name, published, source.classes) if noise_kind == "asymmetric" else None
    train, validation = (
        noisy_split(published, chosen, noise, flips, source.classes, generator)
        for chosen in (order[held_out:], order[:held_out])
    )
    test = Split(published.test_images, published.test_labels, published.test_labels)
    mean, std = moments(train.images)
    how = (name, source.padding, source.flip, source.size)
    return ImageData(train, validation, test, source.classes, mean, std, *how)


def read(name: str, folder: str | Path | None) -> Published:
    """The published images and labels, with the labels checked."""
    source = SOURCES[name]
    where = Path(folder) if folder else source.folder
    if name == "digits":
        if folder:
            raise ValueError(f"digits come with scikit-learn, not from a folder: {folder}")
        where = Path()
    if where is None:
        raise ValueError(f"{name} needs the folder of its files: {source.where}")
    if not where.is_dir():
        raise FileNotFoundError(f"there is no folder {where} with {name}: {source.where}")
    published = source.read(where)
    for images, labels in (published[:2], published[2:4]):
        if len(images) != len(labels) or not len(labels):
            raise ValueError(f"{where}: {len(images)} images, but {len(labels)} labels")
        wrong = labels[(labels < 0) | (labels >= source.classes)]
        if len(wrong):
            raise ValueError(
                f"{where}: labels of {name} are in [0, {source.classes}), but one is {wrong[0]}"
            )
    return published


def subset(published: int, train_images: int | None) -> Tensor:
    """The numbers of the training images that are used."""
    if train_images is None:
        return torch.arange(published)
    if not 1 <= train_images <= published:
        raise ValueError(f"train_images must be in [1, {published}], but is {train_images}")
    generator = torch.Generator().manual_seed(FIXED_SEED)
    return torch.randperm(published, generator=generator)[:train_images]


def noisy_split(
    published: Published,
    chosen: Tensor,
    noise: float,
    flips: Tensor | None,
    classes: int,
    generator: torch.Generator,
) -> Split:
    """The chosen samples; `flips` for asymmetric noise, None for symmetric."""
    right = published.labels[chosen]
    # All draws are made whatever the noise is: those of less noise are the first of more noise.
    order = torch.randperm(len(right), generator=generator)
    others = (right + torch.randint(1, classes, right.shape, generator=generator)) % classes
    if flips is None:
        wrong = order[: round(noise * len(right))]
    else:
        others = flips[right]
        of_classes = [order[right[order] == c] for c in range(classes) if flips[c] != c]
        wrong = torch.cat([members[: round(noise * len(members))] for members in of_classes])
    labels = right.clone()
    labels[wrong] = others[wrong]
    return Split(published.images[chosen], labels, right)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the channels / 255, exactly: from counts of values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    channels = (images[:, c].reshape(-1) for c in range(images.shape[1]))
    shares = torch.stack([c.bincount(minlength=256).double() / len(c) for c in channels])
    mean = shares @ values
    std = ((values - mean[:, None]).square() * shares).sum(1).sqrt()
    return mean.float(), std.float()


def mistakes(name: str, published: Published, classes: int) -> Tensor:
    """(classes,): what each class is taken for under asymmetric noise; itself where it never is."""
    flips = torch.arange(classes)
    if name == "cifar10":
        flips[list(CIFAR10_MISTAKES)] = torch.tensor(list(CIFAR10_MISTAKES.values()))
        return flips
    if published.superclasses is None:
        return (flips + 1) % classes
    pairs = torch.stack([published.superclasses, published.labels]).unique(dim=1)
    if len(pairs[1].unique()) < pairs.shape[1]:
        raise ValueError(f"a class of {name} is in two superclasses")
    for superclass in pairs[0].unique():
        members = pairs[1, pairs[0] == superclass]
        flips[members] = members.roll(-1)
    return flips


def read_digits(_: Path) -> Published:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(FIXED_SEED)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:DIGITS_FOR_TRAINING], order[DIGITS_FOR_TRAINING:]
    return Published(images[train], labels[train], images[test], labels[test])


def read_fashion_mnist(folder: Path) -> Published:
    parts = [
        part
        for split in ("train", "t10k")
        for part in (
            read_idx(folder, f"{split}-images-idx3-ubyte", 3).unsqueeze(1),
            read_idx(folder, f"{split}-labels-idx1-ubyte", 1).long(),
        )
    ]
    return Published(*parts)


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A file of bytes in the IDX format: 0, 0, 8 for bytes, the number of dimensions, the sizes as
    big-endian 32-bit integers, the values. uint8 in that shape."""
    path, packed = folder / name, folder / f"{name}.gz"
    if path.exists():
        content = path.read_bytes()
    elif packed.exists():
        path, content = packed, unpack(packed)
    else:
        raise FileNotFoundError(f"{path} is missing, and {packed.name} too")
    magic, header = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic:
        raise ValueError(f"{path} must begin with {magic.hex(' ')}, not {content[:4].hex(' ')}")
    shape = np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").tolist()
    if len(content) - header != np.prod(shape) or not np.prod(shape):
        expected = f"{np.prod(shape)} values of shape {tuple(shape)}"
        raise ValueError(f"{path} must hold {expected}, but holds {len(content) - header}")
    return to_tensor(content, header).reshape(shape)


def unpack(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file: {error}") from error


def read_file(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    return path.read_bytes()


def to_tensor(content: bytes, offset: int = 0) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=offset)


def read_cifar10(folder: Path) -> Published:
    folder = inside(folder, "cifar-10-batches-py", "cifar-10-batches-bin")
    batches = [read_cifar(folder, f"data_batch_{k}", "labels") for k in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Published(images, labels, *read_cifar(folder, "test_batch", "labels"))


def read_cifar100(folder: Path) -> Published:
    folder = inside(folder, "cifar-100-python", "cifar-100-binary")
    kinds = ("coarse_labels", "fine_labels")
    images, superclasses, labels = read_cifar(folder, "train", *kinds)
    test_images, _, test_labels = read_cifar(folder, "test", *kinds)
    return Published(images, labels, test_images, test_labels, superclasses)


def inside(folder: Path, *names: str) -> Path:
    """The folder itself, or the one in it that unpacking the published archive makes."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def read_cifar(folder: Path, name: str, *kinds: str) -> list[Tensor]:
    """Images (N, 3, 32, 32) uint8, and for each kind of labels (N,) int64. The binary version has
    records of a byte for each kind and then the image; the Python version a dictionary."""
    path = folder / f"{name}.bin"
    if path.exists():
        length, content = len(kinds) + 3072, read_file(path)
        if len(content) % length or not content:
            raise ValueError(
                f"{path} must hold records of {length} bytes, but is {len(content)} long"
            )
        records = to_tensor(content).view(-1, length)
        pixels = records[:, len(kinds) :].contiguous()
        labels = [records[:, k].long() for k in range(len(kinds))]
    else:
        path = folder / name
        content = unpickle(path)
        missing = [key for key in ("data", *kinds) if key.encode() not in content]
        if missing:
            raise ValueError(f"{path} must hold a dictionary with {missing[0]!r}, which is missing")
        pixels = torch.from_numpy(content[b"data"])
        labels = [torch.tensor(content[kind.encode()], dtype=torch.int64) for kind in kinds]
        expected = (len(labels[0]), 3072)
        if pixels.dtype != torch.uint8 or pixels.shape != expected:
            found = f"{pixels.dtype} of shape {tuple(pixels.shape)}"
            raise ValueError(f"{path} must hold uint8 images of shape {expected}, not {found}")
    return [pixels.view(-1, 3, 32, 32), *labels]


class ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries of lists and numpy arrays. A pickle may name any function to be called
    where it is loaded; a file from elsewhere may only name what rebuilds an array."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return self.ALLOWED[module, name]


def unpickle(path: Path) -> dict[bytes, Any]:
    """The dictionary in a file that Python 2 has written, with its strings as bytes."""
    try:
        return ArrayUnpickler(io.BytesIO(read_file(path)), encoding="bytes").load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is truncated or no CIFAR file: {error}") from error


def read_tinyimagenet(folder: Path) -> Published:
    """Classes are numbered in the order of wnids.txt; the published validation images are the
    test images here, as the labels of the published test images are not public."""
    folder = inside(folder, "tiny-imagenet-200")
    wnids = read_file(folder / "wnids.txt").decode().split()
    if len(wnids) != 200:
        raise ValueError(f"{folder / 'wnids.txt'} must name 200 classes, but names {len(wnids)}")
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    train = [(path, numbers[w]) for w in wnids for path in jpegs(folder / "train" / w / "images")]
    annotations = folder / "val" / "val_annotations.txt"
    test = []
    for line in read_file(annotations).decode().splitlines():
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in numbers:
            raise ValueError(f"{annotations}: {wnid!r} is no class of wnids.txt, in {line!r}")
        test.append((annotations.parent / "images" / name, numbers[wnid]))
    return Published(*decode(train), *decode(test))


def jpegs(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.JPEG"))
    if not paths:
        raise FileNotFoundError(f"there are no .JPEG files in {folder}")
    return paths


def decode(samples: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64) uint8 and labels (N,) int64."""
    from rich.console import Console
    from rich.progress import track

    images = torch.empty(len(samples), 3, TINY_SIDE, TINY_SIDE, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding Python's lock
        decoded = pool.map(decode_one, [path for path, _ in samples])
        console = Console(stderr=True)
        numbered = track(
            enumerate(decoded), "JPEG files", len(samples), console=console, transient=True
        )
        for number, image in numbered:
            images[number] = image
    return images, torch.tensor([label for _, label in samples])


def decode_one(path: Path) -> Tensor:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(read_file(path))).convert("RGB")  # some are grey
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} is truncated or no JPEG file: {error}") from error
    if image.size != (TINY_SIDE, TINY_SIDE):
        raise ValueError(f"{path} must have {TINY_SIDE} x {TINY_SIDE} pixels, not {image.size}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


CIFAR_PAGE = "unpack an archive of https://www.cs.toronto.edu/~kriz/cifar.html and name its folder"
SOURCES = {
    "digits": Source(read_digits, 10, padding=1, flip=False, size=8),
    "fashion-mnist": Source(
        read_fashion_mnist,
        classes=10,
        padding=2,
        flip=True,
        size=28,
        where="apt install dataset-fashion-mnist, or name the folder with its IDX files",
        folder=Path("/usr/share/datasets/fashion-mnist"),
    ),
    "cifar10": Source(read_cifar10, 10, padding=4, flip=True, size=32, where=CIFAR_PAGE),
    "cifar100": Source(read_cifar100, 100, padding=4, flip=True, size=32, where=CIFAR_PAGE),
    "tinyimagenet": Source(
        read_tinyimagenet,
        classes=200,
        padding=0,
        flip=True,
        size=32,
        where="unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and name its folder",
    ),
}
