"""Random views of images, a whole batch at once.

    augment = make_augment("standard", data)
    loader = DataLoader(Views(data.train, augment), batch_sampler=batches, collate_fn=as_it_is)

Each call draws a new view of each image from torch's global generator, which a DataLoader seeds
anew in each worker. DLB wants that: between equal views the KL is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from typing import NamedTuple, TypeVar

import torch
from image_data import ImageData, Split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Augment = Callable[[Tensor], Tensor]
T = TypeVar("T")

# Of the random resized crop: the usual values.
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
# RandAugment's number of operations for an image, and their strength in (0, 30).
RAND_OPERATIONS, RAND_STRENGTH = 2, 9
# What RandAugment and TrivialAugment draw from, with the range of the strength. Three ranges are
# not those that kornia has by default: its shear of 0.3 is one by 54 degrees and not a slope of
# 0.3, its brightness is added and not multiplied, and 0 of 8 bits make a black image.
OPERATIONS = (
    ("auto_contrast", 0, 1),
    ("equalize", 0, 1),
    ("rotate", -30.0, 30.0),
    ("posterize", 4.0, 8.0),
    ("solarize", 0.0, 1.0),
    ("color", 0.1, 1.9),
    ("contrast", 0.1, 1.9),
    ("brightness", 0.5, 1.5),
    ("sharpness", 0.1, 1.9),
    ("shear_x", -0.093, 0.093),
    ("shear_y", -0.093, 0.093),
    ("translate_x", -0.3, 0.3),
    ("translate_y", -0.3, 0.3),
)


class Look(NamedTuple):
    """What the views of a data set have in common; see ImageData."""

    mean: Tensor
    std: Tensor
    padding: int
    flip: bool
    size: int


def make_augment(name: str, data: ImageData) -> Augment:
    """A function of images (B, C, H, W) uint8 to views (B, C, size, size) float32, normalised by
    the data's mean and std. It can be pickled, and takes images on any device.

    - none: the whole image; the view for evaluation.
    - standard: a random crop after padding with black, or, where `data.padding` is 0, a random
      resized crop; flipped at random where `data.flip`.
    - cutout: standard, and a square hole at a random place, half the side long and partly outside
      of the image at times (DeVries & Taylor, 2017).
    - autoaugment (Cubuk et al., CVPR 2019; the CIFAR-10 policy), randaugment (Cubuk et al., 2020),
      trivialaugment (Müller & Hutter, ICCV 2021): standard, and the policy as kornia has it, drawn
      for each image by itself. Grey images are coloured ones with three equal channels to it.

    Raises ValueError for any other name, ModuleNotFoundError where kornia is missing.
    """
    look = Look(data.mean, data.std, data.padding, data.flip, data.size)
    if name in POLICIES:
        choices, rounds = make_policy(name)
        return partial(by_policy, look=look, choices=choices, rounds=rounds)
    if name in SIMPLE:
        return partial(SIMPLE[name], look=look)
    raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, but is {name!r}")


def whole(images: Tensor, look: Look) -> Tensor:
    if images.shape[-1] != look.size:
        images = F.adaptive_avg_pool2d(images.float(), look.size)
    return normalised(images, look)


def standard(images: Tensor, look: Look) -> Tensor:
    return normalised(random_view(images, look), look)


def cutout(images: Tensor, look: Look) -> Tensor:
    """The hole has the mean color: 0 after normalisation."""
    views = standard(images, look)
    rows, columns = (hole(len(views), look.size, views.device) for _ in range(2))
    return views.masked_fill_((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0)


def hole(count: int, length: int, device: torch.device) -> Tensor:
    """(count, length) bool: what is within a quarter of the length from a random place."""
    place = torch.randint(length, (count, 1), device=device)
    distance = torch.arange(length, device=device) - place
    return (distance >= -(length // 4)) & (distance < length // 4)


def normalised(images: Tensor, look: Look) -> Tensor:
    """(images / 255 - mean) / std, in new memory."""
    device = images.device
    mean, std = (m.to(device, non_blocking=True)[:, None, None] for m in (look.mean, look.std))
    return (images * (1 / (255 * std))).sub_(mean / std)


def random_view(images: Tensor, look: Look) -> Tensor:
    """(B, C, size, size) in 0 to 255: uint8, or float32 where it is resized."""
    if look.padding:
        return shifted(images, look.padding, look.flip)
    return random_resized_crop(images, look.size, look.flip)


def shifted(images: Tensor, padding: int, flip: bool) -> Tensor:
    """A crop of the padded images at a random place of each, flipped or not, in their own size."""
    batch, channels, height, width = images.shape
    rows = line(batch, height, padding, images.device)
    columns = line(batch, width, padding, images.device)
    if flip:
        turned = torch.rand(batch, 1, device=images.device) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, [padding] * 4).flatten(2)
    # One gather takes a third of the time of padded[sample, :, rows, columns].
    places = places.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, places).view_as(images)


def line(count: int, length: int, padding: int, device: torch.device) -> Tensor:
    """(count, length): the places, in a padded line, of a crop at a random place of each."""
    first = torch.randint(2 * padding + 1, (count, 1), device=device)
    return first + torch.arange(length, device=device)


def random_resized_crop(images: Tensor, size: int, flip: bool) -> Tensor:
    """(B, C, size, size) float32: a random box of each image, flipped or not."""
    batch, channels, height, width = images.shape
    left, top, wide, high = random_boxes(batch, height, width, images.device)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 0, 2] = wide / width, (2 * left + wide) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = high / height, (2 * top + high) / height - 1
    if flip:
        theta[:, 0, 0] *= 1 - 2 * torch.randint(2, (batch,), device=images.device)
    # Four samples for each pixel, as a box may be twice as large as its view.
    grid = F.affine_grid(theta, [batch, channels, 2 * size, 2 * size], align_corners=False)
    sampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, 2)


def random_boxes(
    batch: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, top, width, height (B,) in whole pixels: of random area and ratio of the sides. Of
    several tries for each image, the first that fits is taken."""
    shape = (TRIES, batch)
    area = height * width * torch.empty(shape, device=device).uniform_(*AREA)
    ratio = torch.empty(shape, device=device).uniform_(log(RATIO[0]), log(RATIO[1])).exp()
    wide, high = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide <= width) & (high <= height)
    first = fits.int().argmax(0, keepdim=True)
    wide = wide.gather(0, first)[0].clamp(1, width)  # where no try fits: as much as there is
    high = high.gather(0, first)[0].clamp(1, height)
    left = (torch.rand(batch, device=device) * (width - wide + 1)).floor()
    top = (torch.rand(batch, device=device) * (height - high + 1)).floor()
    return left, top, wide, high


def make_policy(name: str) -> tuple[Sequence[Augment], int]:
    """What can be done to an image (B, 3, H, W) in 0 to 1, and how often something is drawn.

    kornia draws one sub-policy for a batch: a policy with only one to draw from does that one, and
    which of them an image gets is drawn in `by_policy`.
    """
    try:
        from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment
        from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"augment {name!r} needs kornia: pip install kornia") from error

    if name == "autoaugment":
        return [AutoAugment([subpolicy]) for subpolicy in cifar10_policy], 1
    if name == "trivialaugment":
        return [TrivialAugment([[operation]]) for operation in OPERATIONS], 1
    choices = [RandAugment(1, RAND_STRENGTH, [[operation]]) for operation in OPERATIONS]
    return choices, RAND_OPERATIONS


@torch.no_grad()
def by_policy(images: Tensor, look: Look, choices: Sequence[Augment], rounds: int) -> Tensor:
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"policies are for images of 1 or 3 channels, not {channels}")
    views = random_view(images, look).float().div_(255).repeat(1, 3 // channels, 1, 1)
    # A different one in each round.
    draws = torch.rand(len(views), len(choices)).argsort(1)[:, :rounds]
    for draw in draws.T:
        for number in draw.unique().tolist():
            rows = (draw == number).nonzero().squeeze(1).to(views.device)
            views[rows] = choices[number](views[rows])
    return normalised(views[:, :channels].clamp(0, 1).mul_(255), look)


SIMPLE = {"none": whole, "standard": standard, "cutout": cutout}
POLICIES = ("autoaugment", "randaugment", "trivialaugment")
AUGMENTS = (*SIMPLE, *POLICIES)


class Views(Dataset):
    """Views of the images of a split. A batch comes stacked, as (views, labels, ids), with ids the
    numbers (B,) int64 of the samples in the split: the DataLoader needs `collate_fn=as_it_is`."""

    def __init__(self, split: Split, augment: Augment) -> None:
        self.split, self.augment = split, augment

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.tensor(indices, dtype=torch.int64)
        return self.augment(self.split.images[ids]), self.split.labels[ids], ids

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        views, labels, ids = self.__getitems__([index])
        return views[0], labels[0], ids[0]


def as_it_is(batch: T) -> T:
    return batch
