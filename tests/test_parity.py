"""The official algorithm, in plain PyTorch from its description, beside ours on the same seeds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler, TwoViewCarry, dlb_loss

N, HALF, CLASSES, EPOCHS = 44, 8, 5, 4  # 44 = 5 · 8 + 4: a partial last batch
STEPS = EPOCHS * 6
TAU, ALPHA = 3.0, 0.5
# Of the losses and, relative to its largest, of each weight tensor. Seen: 3e-15 and 2e-6.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}


class Pictures(Dataset):  # type: ignore[type-arg]
    """Each in two views, which do not change from epoch to epoch."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(N, 1, 3, 8, 8, generator=g, dtype=torch.float64)
        views = x + 0.3 * torch.randn(N, 2, 3, 8, 8, generator=g, dtype=torch.float64)
        self.views = views.to(dtype)
        self.labels = torch.randint(0, CLASSES, (N,), generator=g)

    def __len__(self) -> int:
        return N

    def __getitem__(self, at: int | tuple[int, int]) -> tuple[Tensor, ...]:
        """Both views for an index, one for an (index, appearance)."""
        if isinstance(at, tuple):
            index, appearance = at
            return self.views[index, appearance], self.labels[index]
        return *self.views[at], self.labels[at]


class Run(NamedTuple):
    """A network in training, as the official script trains it."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float]

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def new_run(norm: bool, dtype: torch.dtype) -> Run:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)]
    layers += [nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)]
    net = nn.Sequential(*(x for x in layers if norm or not isinstance(x, nn.BatchNorm2d))).to(dtype)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)
    return Run(net, optimizer, schedule, [])


def order() -> RandomSampler:
    return RandomSampler(range(N), generator=torch.Generator().manual_seed(3))


def two_view_loader(dtype: torch.dtype) -> DataLoader[Any]:
    return DataLoader(Pictures(dtype), batch_size=HALF, sampler=order())


def official(norm: bool, dtype: torch.dtype) -> Run:
    """Two forwards, the fresh rows first; cross-entropy of all rows; KL of the second views to the
    logits that the last iteration gave for the first views, by the mean over those rows and τ²; the
    last batch is kept, over epoch borders too."""
    run, loader = new_run(norm, dtype), two_view_loader(dtype)
    kept = None
    for _ in range(EPOCHS):
        for view_0, view_1, labels in loader:
            out = run.net(view_0)
            if kept is None:
                loss = F.cross_entropy(out, labels)
            else:
                last_view, last_labels, last_out = kept
                again = run.net(last_view)
                ce = F.cross_entropy(torch.cat((again, out)), torch.cat((last_labels, labels)))
                log_p = F.log_softmax(again / TAU, dim=1)
                q = F.softmax(last_out.detach() / TAU, dim=1)
                loss = ce + ALPHA * TAU**2 * F.kl_div(log_p, q, reduction="batchmean")
            run.step(loss)
            kept = view_1, labels, out
        run.schedule.step()
    return run


def two_forwards(net: nn.Module, images: Tensor, m: int) -> Tensor:
    """As in the script, which matters for BatchNorm: each half has its own statistics."""
    fresh = net(images[m:])
    return torch.cat((net(images[:m]), fresh)) if m else fresh


def with_the_module(norm: bool, dtype: torch.dtype, backend: str) -> Run:
    run, criterion = new_run(norm, dtype), DLBLoss(TAU, ALPHA, backend=backend)
    batches, m = TwoViewCarry(two_view_loader(dtype)), 0
    for _ in range(EPOCHS):
        for images, labels in batches:
            run.step(criterion(two_forwards(run.net, images, m), labels))
            m = len(images) - m
        run.schedule.step()
    assert criterion.stats() == ((EPOCHS * N) - 4, 0, 0)
    return run


def with_the_function(norm: bool, dtype: torch.dtype, backend: str) -> Run:
    run, last = new_run(norm, dtype), None
    batches = TwoViewCarry(two_view_loader(dtype))
    for _ in range(EPOCHS):
        for images, labels in batches:
            m = 0 if last is None else len(last)
            logits = two_forwards(run.net, images, m)
            run.step(
                dlb_loss(logits, labels, last, temperature=TAU, alpha=ALPHA, backend=backend)  # type: ignore[arg-type]
            )
            last = logits.detach()[m:]
        run.schedule.step()
    return run


def with_one_forward(batches: Iterable[Any], norm: bool, dtype: torch.dtype) -> Run:
    run, criterion = new_run(norm, dtype), DLBLoss(TAU, ALPHA)
    for _ in range(EPOCHS):
        for images, labels in batches:
            run.step(criterion(run.net(images), labels))
        run.schedule.step()
    assert criterion.stats() == ((EPOCHS * N) - 4, 0, 0)
    return run


def with_the_sampler(dtype: torch.dtype, workers: int = 0) -> DataLoader[Any]:
    sampler = OverlapBatchSampler(order(), 2 * HALF, with_appearance=True)
    return DataLoader(Pictures(dtype), batch_sampler=sampler, num_workers=workers)


def difference(run: Run, other: Run) -> float:
    """The largest of the losses' and of the weights', running statistics among them."""
    assert len(run.losses) == len(other.losses) == STEPS
    apart = [abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)]
    weights = other.net.state_dict()
    for name, value in run.net.state_dict().items():
        largest = float(value.abs().max())
        apart.append(float((value - weights[name]).abs().max()) / max(largest, 1e-3))
    return max(apart)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ours", [with_the_module, with_the_function])
def test_two_forwards_are_the_official_algorithm(ours: Any, dtype: torch.dtype) -> None:
    truth = official(True, dtype)
    assert truth.losses[-1] < 0.7 * max(truth.losses[1:])  # it learns
    for backend in ("cpu", "eager"):
        assert difference(ours(True, dtype, backend), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("workers", [0, 2])
def test_one_forward_is_the_same_without_batch_norm(workers: int, dtype: torch.dtype) -> None:
    truth = official(False, dtype)
    for batches in (with_the_sampler(dtype, workers), TwoViewCarry(two_view_loader(dtype))):
        assert difference(with_one_forward(batches, False, dtype), truth) < TOLERANCE[dtype]


def test_one_forward_is_another_algorithm_with_batch_norm() -> None:
    """So the two tests above can tell algorithms apart."""
    ours = with_one_forward(with_the_sampler(torch.float64), True, torch.float64)
    assert difference(ours, official(True, torch.float64)) > 0.1
