"""Random views of images, a whole batch at once.

    augment = make_augment("standard", data)
    loader = DataLoader(Views(data.train, augment), batch_sampler=batches, collate_fn=lambda b: b)

Each call draws a new view of each image from torch's global generator, which a DataLoader seeds
anew in each worker. DLB needs that: of equal views there is next to nothing to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from image_data import ImageData, Split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Augment = Callable[[Tensor], Tensor]


def make_augment(name: str, data: ImageData) -> Augment:
    """A function of images (B, C, H, W) uint8 to views (B, C, size, size) float32, normalised.

    none: the images themselves, for evaluation too. standard: random crop after padding with
    black, and a random flip where `data.flip`.
    """
    if name not in AUGMENTS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTS)}, but is {name!r}")
    return AUGMENTS[name](data)


def make_none(data: ImageData) -> Augment:
    return lambda images: normalised(images, data)


def make_standard(data: ImageData) -> Augment:
    return lambda images: normalised(shifted(images, data.padding, data.flip), data)


def normalised(images: Tensor, data: ImageData) -> Tensor:
    """(images / 255 - mean) / std."""
    mean, std = (
        moment.to(images.device, non_blocking=True)[:, None, None]
        for moment in (data.mean, data.std)
    )
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def shifted(images: Tensor, padding: int, flip: bool) -> Tensor:
    """A crop of the padded images at a random place of each, flipped or not, in their own size."""
    batch, channels, height, width = images.shape
    rows = crop(batch, height, padding, images.device)
    columns = crop(batch, width, padding, images.device)
    if flip:
        turned = torch.rand(batch, 1, device=images.device) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, [padding] * 4).flatten(2)
    # One gather takes a third of the time of padded[sample, :, rows, columns].
    places = places.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, places).view_as(images)


def crop(count: int, length: int, padding: int, device: torch.device) -> Tensor:
    """(count, length): the places, in a padded line, of a crop at a random place of each."""
    first = torch.randint(2 * padding + 1, (count, 1), device=device)
    return first + torch.arange(length, device=device)


AUGMENTS = {"none": make_none, "standard": make_standard}


class Views(Dataset):
    """Views of the images of a split: a batch is (views, labels, ids), with ids the numbers (B,)
    int64 of the samples in the split.

    A batch comes stacked: the DataLoader needs `collate_fn=lambda batch: batch`, or, where its
    workers are spawned, a function of a module that does the same.
    """

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
