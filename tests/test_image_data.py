"""The data sets of the examples: tiny ones in the published formats are read as they were written,
exactly the wanted labels are wrong, and bad files and arguments are named."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from image_data import SOURCES, ImageData, load_data, unpickle

INSTALLED = SOURCES["fashion-mnist"].folder
Written = tuple[np.ndarray, np.ndarray]  # images and labels, in the order of the files


class Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """As Python 2 has pickled the CIFAR files: strings are bytes."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_string(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    # The name that the function had then.
    path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))


def random_samples(count: int, classes: int, *shape: int) -> Written:
    random = np.random.default_rng(count)
    labels = random.permutation(np.arange(count) % classes)
    return random.integers(256, size=(count, *shape), dtype=np.uint8), labels


def write_idx(folder: Path, name: str, values: np.ndarray, packed: bool = True) -> None:
    sizes = np.array(values.shape, ">u4").tobytes()
    content = bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)


def write_fashion_mnist(folder: Path, packed: bool = True) -> tuple[Written, Written]:
    folder.mkdir(exist_ok=True)
    splits = random_samples(50, 10, 28, 28), random_samples(20, 10, 28, 28)
    for name, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        write_idx(folder, f"{name}-images-idx3-ubyte", images, packed)
        write_idx(folder, f"{name}-labels-idx1-ubyte", labels, packed)
    return splits


def write_cifar10(folder: Path, binary: bool = False) -> tuple[Written, Written]:
    folder.mkdir(exist_ok=True)
    splits = random_samples(100, 10, 3, 32, 32), random_samples(20, 10, 3, 32, 32)
    (images, labels), test = splits
    batches = zip(np.split(images, 5), np.split(labels, 5), strict=True)
    for name, (pixels, numbers) in zip(
        [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], [*batches, test], strict=True
    ):
        rows = pixels.reshape(-1, 3072)
        if binary:
            records = np.concatenate([numbers[:, None].astype(np.uint8), rows], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {"batch_label": name, "labels": numbers.tolist(), "data": rows}
            write_pickle(folder / name, content)
    return splits


def write_cifar100(folder: Path, binary: bool = False) -> tuple[Written, Written]:
    """Class c is of the superclass c % 20."""
    folder.mkdir(exist_ok=True)
    splits = random_samples(1000, 100, 3, 32, 32), random_samples(100, 100, 3, 32, 32)
    for name, (images, labels) in zip(("train", "test"), splits, strict=True):
        coarse, rows = labels % 20, images.reshape(-1, 3072)
        if binary:
            bytes_ = np.stack([coarse, labels], 1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(np.concatenate([bytes_, rows], 1).tobytes())
        else:
            kinds = {"fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()}
            write_pickle(folder / name, {"data": rows, **kinds})
    return splits


def write_tinyimagenet(folder: Path) -> tuple[Written, Written]:
    """One training image a class, and ten to test, each of one color; every third is grey."""
    wnids = [f"n{90000000 - k}" for k in range(200)]
    splits = random_samples(200, 200, 3), random_samples(10, 200, 3)
    (colors, labels), test = splits
    colors, labels = colors[labels.argsort()], np.arange(200)  # read class by class
    paths = [folder / "train" / w / "images" / f"{w}_0.JPEG" for w in wnids]
    lines = []
    for number, label in enumerate(test[1]):
        paths.append(folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{wnids[label]}\t0\t32\t44\t62\n")
    for number, (path, color) in enumerate(zip(paths, [*colors, *test[0]], strict=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 3 == 0:
            color[:] = color[0]
        image = Image.new("RGB", (64, 64), tuple(color.tolist()))
        (image.convert("L") if number % 3 == 0 else image).save(path, "JPEG", quality=95)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return (colors, labels), test


def check_split(data: ImageData, written: tuple[Written, Written]) -> None:
    """Training and validation are all of the written training samples; the test ones in order."""
    (images, labels), (test_images, test_labels) = written
    held = [
        (image.numpy().tobytes(), label)
        for split in (data.train, data.val)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    ]
    assert sorted(held) == sorted(
        (image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)
    )
    assert np.array_equal(data.test.images.numpy().squeeze(), test_images)
    assert data.test.labels.tolist() == test_labels.tolist()
    assert len(data.val.labels) == round(0.1 * len(labels))
    for split in data[:3]:
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert torch.equal(split.labels, split.true_labels)
    pixels = data.train.images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)))
    assert torch.allclose(data.std.double(), pixels.std((0, 2, 3), correction=0))


def test_digits() -> None:
    data, other = load_data("digits"), load_data("digits", seed=1)
    assert [len(split.labels) for split in data[:3]] == [1080, 120, 597]
    assert data.train.images.shape[1:] == (1, 8, 8) and data.train.images.max() == 255
    assert (data.classes, data.size, data.padding, data.flip) == (10, 8, 1, False)
    assert not torch.equal(data.val.images, other.val.images)
    assert all(map(torch.equal, data.test, other.test))


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_fashion_mnist(tmp_path: Path, packed: bool) -> None:
    written = write_fashion_mnist(tmp_path, packed)
    data = load_data("fashion-mnist", tmp_path)
    check_split(data, written)
    assert data.train.images.shape[1:] == (1, 28, 28)


@pytest.mark.skipif(not INSTALLED.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_as_published() -> None:
    data = load_data("fashion-mnist", val=0)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.mean.item() == pytest.approx(0.2860, abs=5e-5)  # as it is often printed
    assert data.std.item() == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar10(tmp_path: Path, binary: bool) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    written = write_cifar10(folder, binary)
    for where in (folder, tmp_path):
        check_split(load_data("cifar10", where), written)


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_cifar100(tmp_path: Path, binary: bool) -> None:
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    written = write_cifar100(folder, binary)
    for where in (folder, tmp_path):
        check_split(load_data("cifar100", where), written)


def test_tinyimagenet(tmp_path: Path) -> None:
    (colors, _), (test_colors, test_labels) = write_tinyimagenet(tmp_path / "tiny-imagenet-200")
    data = load_data("tinyimagenet", tmp_path)
    assert (data.classes, data.size, data.padding) == (200, 32, 0)
    assert data.test.labels.tolist() == test_labels.tolist()
    images = torch.cat([data.train.images, data.val.images])
    labels = torch.cat([data.train.labels, data.val.labels])
    assert labels.sort().values.tolist() == list(range(200))  # in the order of wnids.txt
    for found, written in ((images, colors[labels]), (data.test.images, test_colors)):
        assert found.shape == (len(written), 3, 64, 64)
        wanted = torch.from_numpy(written)[:, :, None, None]
        assert (found.int() - wanted).abs().max() <= 3  # JPEG


def test_symmetric_noise_is_exact() -> None:
    data = load_data("digits", noise=0.4)
    for split, wrong in ((data.train, 432), (data.val, 48), (data.test, 0)):
        assert (split.labels != split.true_labels).sum() == wrong
    moves = (data.train.labels - data.train.true_labels) % 10
    assert moves.bincount(minlength=10)[1:].min() > 25  # to all others: 48 on average


def test_the_same_seed_has_the_same_noise_and_less_noise_is_a_part_of_more() -> None:
    a, b, other = (load_data("digits", noise=0.4, seed=seed).train for seed in (5, 5, 6))
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a.images, other.images)
    less = load_data("digits", noise=0.2, seed=5).train
    wrong = less.labels != less.true_labels
    assert torch.equal(less.images, a.images)
    assert wrong.sum() == 216 and torch.equal(a.labels[wrong], less.labels[wrong])


def check_asymmetric(data: ImageData, flips: Callable[[int], int]) -> None:
    """Exactly 30 % of each class of each split have the label flips(class)."""
    for split in (data.train, data.val):
        for c in range(data.classes):
            given = split.labels[split.true_labels == c]
            wrong = given[given != c]
            assert len(wrong) == (round(0.3 * len(given)) if flips(c) != c else 0)
            assert (wrong == flips(c)).all()
    assert torch.equal(data.test.labels, data.test.true_labels)


def test_asymmetric_noise(tmp_path: Path) -> None:
    def load(name: str, folder: Path | None = None) -> ImageData:
        return load_data(name, folder, noise=0.3, noise_kind="asymmetric", val=0.3)

    check_asymmetric(load("digits"), lambda c: (c + 1) % 10)
    write_cifar10(tmp_path / "10")
    pairs = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    check_asymmetric(load("cifar10", tmp_path / "10"), lambda c: pairs.get(c, c))
    write_cifar100(tmp_path / "100")
    check_asymmetric(load("cifar100", tmp_path / "100"), lambda c: (c + 20) % 100)


def test_train_images_are_the_same_for_each_seed() -> None:
    runs = [load_data("digits", train_images=300, seed=seed) for seed in (0, 1)]
    sets = []
    for data in runs:
        assert [len(split.labels) for split in data[:3]] == [270, 30, 597]
        images = torch.cat([data.train.images, data.val.images])
        sets.append({image.numpy().tobytes() for image in images})
    assert sets[0] == sets[1]
    assert not torch.equal(runs[0].train.images, runs[1].train.images)


class Opens:
    """Where it is unpickled, a file is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    trap, made = tmp_path / "data_batch_1", tmp_path / "made"
    trap.write_bytes(pickle.dumps({"data": Opens(made)}, protocol=2))
    with pytest.raises(ValueError, match=r"it names .*open, which no array needs"):
        load_data("cifar10", tmp_path)
    assert not made.exists()
    pickle.loads(trap.read_bytes())["data"].close()
    assert made.exists()  # the trap is one


def test_the_written_pickles_are_of_python_2(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a", {"data": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in (tmp_path / "a").read_bytes()
    assert unpickle(tmp_path / "a")[b"data"].tolist() == [[0, 1, 2], [3, 4, 5]]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def with_wrong_label(folder: Path) -> None:
    write_idx(folder, "t10k-labels-idx1-ubyte", np.full(20, 10))


def with_labels_for_images(folder: Path) -> None:
    shutil.copy(folder / "t10k-labels-idx1-ubyte.gz", folder / "train-images-idx3-ubyte.gz")


def with_too_few_labels(folder: Path) -> None:
    write_idx(folder, "train-labels-idx1-ubyte", np.zeros(49))


def with_too_few_pixels(folder: Path) -> None:
    name = "train-images-idx3-ubyte"
    (folder / f"{name}.gz").unlink()
    write_idx(folder, name, np.zeros((50, 28, 28)), packed=False)
    cut(folder / name)


def without_labels(folder: Path) -> None:
    write_pickle(folder / "data_batch_3", {"data": np.zeros((1, 3072), np.uint8)})


def with_short_rows(folder: Path) -> None:
    content = {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 0]}
    write_pickle(folder / "test_batch", content)


def with_a_class_in_two_superclasses(folder: Path) -> None:
    content = {"fine_labels": [7, 7], "coarse_labels": [1, 2]}
    write_pickle(folder / "train", {"data": np.zeros((2, 3072), np.uint8), **content})


def with_another_size(folder: Path) -> None:
    Image.new("RGB", (64, 63)).save(folder / "val" / "images" / "val_3.JPEG")


def with_an_unknown_class(folder: Path) -> None:
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\t0\t0\t9\t9\n")


def with_few_classes(folder: Path) -> None:
    (folder / "wnids.txt").write_text("n90000000\n")


WRITE = {
    "fashion-mnist": write_fashion_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "tinyimagenet": write_tinyimagenet,
}
BAD_FILES = [
    ("fashion-mnist", with_wrong_label, r"labels of fashion-mnist are in \[0, 10\), but one is 10"),
    ("fashion-mnist", with_labels_for_images, "must begin with 00 00 08 03, not 00 00 08 01"),
    ("fashion-mnist", with_too_few_labels, "50 images, but 49 labels"),
    (
        "fashion-mnist",
        with_too_few_pixels,
        r"39200 values of shape \(50, 28, 28\), but holds 39195",
    ),
    (
        "fashion-mnist",
        lambda folder: cut(folder / "train-images-idx3-ubyte.gz"),
        "ubyte.gz is truncated or no gzip file",
    ),
    (
        "fashion-mnist",
        lambda folder: (folder / "t10k-labels-idx1-ubyte.gz").unlink(),
        "t10k-labels-idx1-ubyte is missing, and t10k-labels-idx1-ubyte.gz too",
    ),
    ("cifar10", lambda folder: cut(folder / "data_batch_2"), "data_batch_2 is truncated or no"),
    ("cifar10", lambda folder: (folder / "test_batch").unlink(), "test_batch is missing"),
    ("cifar10", without_labels, "data_batch_3 must hold a dictionary with 'labels'"),
    ("cifar10", with_short_rows, r"shape \(2, 3072\), not torch.uint8 of shape \(2, 3071\)"),
    ("cifar100", with_a_class_in_two_superclasses, "class of cifar100 is in two superclasses"),
    ("tinyimagenet", with_another_size, r"val_3.JPEG must have 64 x 64 pixels, not \(64, 63\)"),
    ("tinyimagenet", with_an_unknown_class, "'n1' is no class of wnids.txt"),
    ("tinyimagenet", with_few_classes, "must name 200 classes, but names 1"),
    (
        "tinyimagenet",
        lambda folder: (folder / "val" / "images" / "val_0.JPEG").write_bytes(b"?"),
        "val_0.JPEG is truncated or no JPEG file",
    ),
    (
        "tinyimagenet",
        lambda folder: shutil.rmtree(folder / "train" / "n90000000"),
        "there are no .JPEG files in .*n90000000",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "text"), BAD_FILES, ids=[t[2] for t in BAD_FILES])
def test_bad_files(tmp_path: Path, name: str, spoil: Callable[[Path], None], text: str) -> None:
    WRITE[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        load_data(name, tmp_path, noise_kind="asymmetric")


def test_a_binary_file_that_is_cut(tmp_path: Path) -> None:
    write_cifar100(tmp_path, binary=True)
    cut(tmp_path / "test.bin")
    with pytest.raises(ValueError, match="records of 3074 bytes, but is 307395 long"):
        load_data("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("mnist", {}, "data must be one of digits, .*, but is 'mnist'"),
        ("digits", {"noise": 1.0}, r"noise must be in \[0, 1\), but is 1.0"),
        ("digits", {"val": -0.1}, r"val must be in \[0, 1\), but is -0.1"),
        ("digits", {"val": 0.9, "train_images": 3}, "val 0.9 of 3 images leaves none for training"),
        ("digits", {"noise_kind": "pair"}, "noise_kind must be one of .*, not 'pair'"),
        ("digits", {"train_images": 1201}, r"train_images must be in \[1, 1200\], but is 1201"),
        ("digits", {"folder": "here"}, "digits come with scikit-learn, not from a folder: here"),
        ("cifar10", {}, "cifar10 needs the folder of its files: unpack .*cifar.html"),
        ("tinyimagenet", {"folder": "nowhere"}, "no folder nowhere with tinyimagenet: unpack"),
        ("fashion-mnist", {"folder": "nowhere"}, "apt install dataset-fashion-mnist"),
    ],
)
def test_bad_arguments(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        load_data(name, **options)
