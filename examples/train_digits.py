"""Self-distillation from the last mini-batch (DLB) on handwritten digits with wrong labels.

Start it with

    python examples/train_digits.py             # about two minutes on two cores
    python examples/train_digits.py --quick     # seconds, to see that it runs

It needs dlb_fused, rich, matplotlib and scikit-learn (`pip install ".[demo]"` in the repository).

DLB asks for two changes to a training script. The sampler: half of each batch repeats the fresh
samples of the batch before, as another random view.

    batches = OverlapBatchSampler(RandomSampler(dataset), batch_size=128)
    loader = DataLoader(dataset, batch_sampler=batches)

The loss: on the repeated half, the network also matches what it said about these samples one step
ago. `DLBLoss` keeps those logits, and computes the loss and its gradient in one kernel.

    criterion = DLBLoss(temperature=3.0, alpha=1.0)
    loss = criterion(model(images), labels)

The program trains one small network in five ways, all with the same number of steps and of rows a
step, each with several seeds. The labels of 40 % of the training images are wrong, those of the
test images are right. It prints a table of test accuracy and of the time spent in the loss, checks
that DLB written in plain PyTorch gives the same training as `dlb_fused`, and draws a picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler
from dlb_fused.reference import dlb_loss_naive

# Temperature and alpha are the usual ones of DLB, the smoothing is the usual 0.1: none was tuned.
# Learning rate and number of steps suit plain cross-entropy on a part of the training images.
TEMPERATURE, ALPHA, SMOOTHING = 3.0, 1.0, 0.1
ROWS = 128  # of each step and method; with overlap, 64 of them are fresh
STEPS, SEEDS, EVALUATIONS = 600, 5, 30
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
TRAINING_IMAGES, WRONG_LABELS, SPLIT_SEED = 1200, 0.4, 0
SHIFT = 1  # pixels, of 8
THREADS = 2


class Digits(Dataset):
    """Images (n, 1, 8, 8) float32 with labels (n,) int64; a training image is shifted at random,
    anew at each appearance. (Without a new view the two appearances of a sample would differ by
    one optimizer step only, and DLB would have next to nothing to match.)"""

    def __init__(self, images: Tensor, labels: Tensor, shift: int = 0) -> None:
        self.images, self.labels, self.shift = images, labels, shift
        self.padded = nn.functional.pad(images, [shift] * 4)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
        return self.padded[i, :, down : down + 8, right : right + 8], self.labels[i]


def load_data() -> tuple[Digits, Digits]:
    """The same split and the same wrong labels in each run."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    given = labels[train]
    wrong = torch.randperm(len(given), generator=generator)[: int(WRONG_LABELS * len(given))]
    given[wrong] += torch.randint(1, 10, wrong.shape, generator=generator)  # any of the nine others
    return Digits(images[train], given % 10, SHIFT), Digits(images[test], labels[test])


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class NaiveDLB(nn.Module):
    """DLB in plain PyTorch: the last logits kept by hand, the loss from stock operations."""

    last_logits: Tensor | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = dlb_loss_naive(
            logits, labels, self.last_logits, temperature=TEMPERATURE, alpha=ALPHA
        )
        overlap = 0 if self.last_logits is None else len(self.last_logits)
        self.last_logits = logits[overlap:].detach()
        return loss


class Method(NamedTuple):
    name: str
    make_criterion: Callable[[], nn.Module]
    overlap: bool


METHODS = (
    Method("cross-entropy", nn.CrossEntropyLoss, False),
    Method("label smoothing", lambda: nn.CrossEntropyLoss(label_smoothing=SMOOTHING), False),
    # The control: what of the difference comes from the sampler alone?
    Method("overlapping batches, α = 0", lambda: DLBLoss(TEMPERATURE, alpha=0.0), True),
    Method("DLB, naive loss", NaiveDLB, True),
    Method("DLB, dlb_fused", lambda: DLBLoss(TEMPERATURE, ALPHA), True),
)


class Run(NamedTuple):
    """One training."""

    accuracies: list[float]  # percent, at each evaluation
    losses: list[float]  # of each step
    seconds: list[float]  # in the loss call, of each step


def endless(dataset: Digits, overlap: bool, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ROWS rows, epoch after epoch."""
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    if overlap:
        batches = OverlapBatchSampler(sampler, ROWS, drop_last=True)
        loader = DataLoader(dataset, batch_sampler=batches)
    else:
        loader = DataLoader(dataset, sampler=sampler, batch_size=ROWS, drop_last=True)
    while True:
        yield from loader


def train(method: Method, seed: int, steps: int, data: tuple[Digits, Digits], tick: Callable) -> Run:
    torch.manual_seed(seed)
    model, criterion = make_model(), method.make_criterion()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    evaluations = evaluation_steps(steps)
    run = Run([], [], [])
    batches = endless(data[0], method.overlap, seed)
    for step in range(1, steps + 1):
        images, labels = next(batches)
        logits = model(images)
        # Usually: criterion(logits, labels).backward(). Here in two parts, to time the loss alone.
        start = time.perf_counter()
        leaf = logits.detach().requires_grad_()
        loss = criterion(leaf, labels)
        (dlogits,) = torch.autograd.grad(loss, leaf)
        run.seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
        logits.backward(dlogits)
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        if step in evaluations:
            run.accuracies.append(accuracy(model, data[1]))
        tick()
    return run


def evaluation_steps(steps: int) -> list[int]:
    n = min(EVALUATIONS, steps)
    return [steps * (k + 1) // n for k in range(n)]


@torch.no_grad()
def accuracy(model: nn.Module, test: Digits) -> float:
    """Percent of the test images."""
    model.eval()
    right = model(test.images).argmax(1) == test.labels
    model.train()
    return 100 * right.double().mean().item()
