"""The views of the examples: each image gets its own, of exactly those that there may be."""

from __future__ import annotations

import pickle
import sys
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kornia.augmentation import auto
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from dlb_fused import OverlapBatchSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import augment
from augment import AUGMENTS, POLICIES, Views, as_it_is, make_augment
from image_data import ImageData, Split, load_data, moments


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_data(images: Tensor, padding: int = 2, flip: bool = True, size: int = 0) -> ImageData:
    """All splits are the images; sample k has the label k."""
    labels = torch.arange(len(images))
    split = Split(images, labels, labels)
    mean, std = moments(images)
    how = ("some", padding, flip, size or images.shape[-1])
    return ImageData(split, split, split, len(images), mean, std, *how)


def random_images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def values(views: Tensor, data: ImageData) -> Tensor:
    """0 to 255 again."""
    return (views * data.std[:, None, None] + data.mean[:, None, None]) * 255


def test_none_normalises() -> None:
    data = load_data("digits")
    views = make_augment("none", data)(data.train.images)
    assert views.dtype == torch.float32 and views.shape == data.train.images.shape
    assert views.mean().item() == pytest.approx(0, abs=1e-4)
    assert views.std().item() == pytest.approx(1, abs=1e-4)
    channels = make_data(random_images(50, 3, 8, 8) // torch.tensor([1, 2, 3]).view(3, 1, 1))
    views = make_augment("none", channels)(channels.train.images)
    assert torch.allclose(views.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("flip", [True, False])
def test_standard_draws_each_crop_for_each_image(flip: bool) -> None:
    data = make_data(random_images(3, 3, 8, 8), padding=1, flip=flip)
    padded = F.pad(data.train.images, [1] * 4)
    crops = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    crops += [crop.flip(3) for crop in crops] if flip else []
    possible = torch.stack(crops)  # (9 or 18, 3, 3, 8, 8)
    view = make_augment("standard", data)
    drawn = []
    for _ in range(300):
        views = values(view(data.train.images), data).round()
        number = (views == possible).flatten(2).all(2).nonzero()  # which crop of which image
        assert sorted(number[:, 1].tolist()) == [0, 1, 2]
        drawn.append(number[number[:, 1].argsort(), 0])
    for of_one_image in torch.stack(drawn).T:
        assert of_one_image.bincount(minlength=len(crops)).min() > 0
    apart = torch.stack(drawn)[:, 0] != torch.stack(drawn)[:, 1]
    assert apart.float().mean() > 0.8  # 8/9 or 17/18 where they are independent


def test_views_follow_the_global_generator() -> None:
    data = make_data(random_images(20, 1, 8, 8))
    view = make_augment("standard", data)
    torch.manual_seed(1)
    first, second = view(data.train.images), view(data.train.images)
    torch.manual_seed(1)
    assert torch.equal(view(data.train.images), first)
    assert not torch.equal(first, second)


def test_cutout_is_one_square_of_the_mean_color() -> None:
    white = torch.full((200, 1, 12, 12), 255, dtype=torch.uint8)
    data = make_data(white, padding=1)._replace(mean=torch.tensor([0.4]), std=torch.tensor([0.2]))
    views = make_augment("cutout", data)(white)
    sizes = set()
    for hole in (views == 0).squeeze(1):
        rows, columns = hole.any(1).sum().item(), hole.any(0).sum().item()
        assert hole.sum() == rows * columns  # a rectangle without gaps:
        assert hole.any(1).int().diff().abs().sum() <= 2 and 3 <= rows <= 6
        assert hole.any(0).int().diff().abs().sum() <= 2 and 3 <= columns <= 6
        sizes.add((rows, columns))
    assert (6, 6) in sizes and len(sizes) > 8


def test_random_resized_crop() -> None:
    """On ramps along both sides, a view tells the box that it is of."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(64, 64)
    images = torch.stack([ramp, ramp.T, ramp]).expand(500, 3, 64, 64)
    data = make_data(images, padding=0, size=32)
    views = values(make_augment("standard", data)(images), data)
    assert views.shape == (500, 3, 32, 32)
    # The borders of the box in the image, from the slope between pixels away from the edges.
    x, y = views[:, 0, 16], views[:, 1, :, 16]
    wide, high = ((line[:, 24] - line[:, 8]) * 2 for line in (x, y))
    turned = wide < 0
    assert 0.4 < turned.float().mean() < 0.6 and (high > 0).all()
    wide = wide.abs()
    for side in (wide, high):
        assert torch.allclose(side, side.round(), atol=1e-2) and side.max() <= 64.01
    area, ratio = wide * high / 64**2, wide / high
    assert 0.07 < area.min() < 0.15 and 0.85 < area.max() <= 1.001
    assert log(0.7) < ratio.log().min() < log(0.8) and log(1.25) < ratio.log().max() < log(1.4)
    assert views[:, :2].min() >= -1e-3 and views[:, :2].max() <= 63.001
    middles = x[:, 15:17].mean(1)
    assert middles.min() < 18 and middles.max() > 45  # boxes are all over the image


def test_the_whole_image_as_a_box_is_the_view_for_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = random_images(4, 3, 64, 64)
    data = make_data(images, padding=0, flip=False, size=32)
    full = [torch.full((4,), value) for value in (0.0, 0.0, 64.0, 64.0)]
    monkeypatch.setattr(augment, "random_boxes", lambda *_: full)
    views = make_augment("standard", data)(images)
    assert torch.allclose(views, make_augment("none", data)(images), atol=1e-4)
    means = images.float().unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    assert torch.allclose(values(views, data), means, atol=1e-2)


def test_a_policy_is_drawn_for_each_image_and_no_operation_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = [lambda x, k=k: x + 2**k / 255 for k in range(4)]
    monkeypatch.setattr(augment, "make_policy", lambda _: (choices, 2))
    data = make_data(torch.zeros(600, 3, 8, 8, dtype=torch.uint8))
    data = data._replace(std=torch.ones(3))
    done = values(make_augment("randaugment", data)(data.train.images), data).round().int()
    assert (done == done[:, :1, :1, :1]).all()
    counts = done[:, 0, 0, 0].bincount(minlength=16)
    pairs = [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]
    assert counts[pairs].min() > 60 and counts[pairs].sum() == 600


@pytest.mark.parametrize("name", POLICIES)
def test_policies_of_kornia(name: str) -> None:
    grey = random_images(1, 1, 16, 16).expand(64, -1, -1, -1).contiguous()
    data = make_data(grey, padding=1)
    view = make_augment(name, data)
    torch.manual_seed(1)
    views = view(grey)
    assert views.shape == grey.shape and not views.requires_grad
    assert len(views.unique(dim=0)) > 36  # the crops alone would be 18
    shown = values(views, data)
    assert shown.min() > -1e-3 and shown.max() < 255.001
    torch.manual_seed(1)
    assert torch.equal(view(grey), views)
    # A grey image is a coloured one with equal channels.
    coloured = make_data(grey.repeat(1, 3, 1, 1), padding=1)
    torch.manual_seed(1)
    repeated = make_augment(name, coloured)(coloured.train.images)
    assert torch.allclose(repeated, views.expand(-1, 3, -1, -1), atol=1e-4)


def test_shear_and_posterize_keep_the_ranges_of_the_papers() -> None:
    ranges = {name: [[(name, *limits)]] for name, *limits in augment.OPERATIONS}
    line = torch.zeros(50, 3, 41, 41)
    line[..., 20] = 1
    for strength in (1, 29):
        sheared = auto.RandAugment(1, strength, ranges["shear_x"])(line)[:, 0]
        slope = (sheared[:, 36].argmax(1) - sheared[:, 4].argmax(1)).abs() / 32
        assert slope.max() == pytest.approx(0.3 * strength / 30, abs=0.05)
    grades = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(50, 3, 16, 16)
    posterized = auto.TrivialAugment(ranges["posterize"])(grades)
    assert min(len(image.unique()) for image in posterized) >= 16


def test_kornia_is_asked_for_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ModuleNotFoundError, match="'randaugment' needs kornia: pip install kornia"):
        make_augment("randaugment", make_data(random_images(2, 1, 8, 8)))


def test_bad_input() -> None:
    data = make_data(random_images(2, 2, 8, 8))
    with pytest.raises(ValueError, match=r"augment must be one of none, standard, .* is 'mixup'"):
        make_augment("mixup", data)
    with pytest.raises(ValueError, match="for images of 1 or 3 channels, not 2"):
        make_augment("autoaugment", data)(data.train.images)


@pytest.mark.parametrize("name", AUGMENTS)
def test_spawned_workers_can_have_it(name: str) -> None:
    data = make_data(random_images(4, 1, 8, 8))
    copy = pickle.loads(pickle.dumps(make_augment(name, data)))
    assert copy(data.train.images).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_of_views(workers: int) -> None:
    data = make_data(random_images(40, 1, 8, 8))
    plain = Views(data.train, make_augment("none", data))
    views = Views(data.train, make_augment("standard", data))
    assert len(views) == 40
    batches = OverlapBatchSampler(SequentialSampler(views), 16)
    loader = DataLoader(views, batch_sampler=batches, num_workers=workers, collate_fn=as_it_is)
    seen: dict[int, list[Tensor]] = {}
    for images, labels, ids in loader:
        assert len(images) == len(labels) and labels.tolist() == ids.tolist()
        for number, image in zip(ids.tolist(), images, strict=True):
            seen.setdefault(number, []).append(image)
    twice = [pair for pair in seen.values() if len(pair) == 2]
    assert len(seen) == 40 and len(twice) >= 32
    equal = sum(torch.equal(*pair) for pair in twice)
    assert equal <= 6  # one of 50, were they independent
    image, label, number = plain[7]
    assert torch.equal(values(image, data).round(), data.train.images[7].float())
    assert (label, number) == (7, 7)
