"""The data and the network of the examples beside it: scikit-learn's handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset


class Digits(Dataset):
    """Images (1, 8, 8) with their labels; a training image is shifted by up to one pixel."""

    def __init__(self, train: bool) -> None:
        images, labels = load_digits(return_X_y=True)
        rows = slice(1500) if train else slice(1500, None)
        self.images = torch.tensor(images[rows], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels, self.shift = torch.tensor(labels[rows]), int(train)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Another view at each access: of the same one, the two predictions hardly differ."""
        shifts = torch.randint(-self.shift, self.shift + 1, (2,)).tolist()
        return self.images[i].roll(shifts, (1, 2)), self.labels[i]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
