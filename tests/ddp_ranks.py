"""What one rank of test_ddp.py does."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dlb_fused import DLBLoss, OverlapBatchSampler

HALF, SAMPLES, EPOCHS, RATE = 4, 40, 3, 0.3  # SAMPLES of each rank: 10 steps an epoch


def make_data(world: int) -> TensorDataset:
    """Samples (10,) with label and number."""
    generator = torch.Generator().manual_seed(1)
    n = world * SAMPLES
    labels = torch.randint(0, 7, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 10, generator=generator), labels, torch.arange(n))


def make_model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 7))


def make_loader(world: int, rank: int, lag: int = 1) -> DataLoader:
    data = make_data(world)
    shard = DistributedSampler(data, world, rank, seed=3)
    return DataLoader(data, batch_sampler=OverlapBatchSampler(shard, 2 * HALF, lag=lag))


def train(model: nn.Module, world: int, rank: int) -> dict[str, Any]:
    """30 steps; the samples of each, its loss and kl, and the weights at the end."""
    loader, criterion = make_loader(world, rank), DLBLoss()
    found: dict[str, Any] = {"batches": [], "losses": [], "kl": [], "matched": []}
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        for x, labels, ids in loader:
            loss = criterion(model(x), labels, ids)
            descend(model, loss)
            found["batches"].append(ids.tolist())
            found["losses"].append(loss.item())
            found["kl"].append(criterion.parts.kl.item())
            found["matched"].append(criterion.stats().matched)
    return {**found, "weights": [p.detach() for p in model.parameters()]}


def descend(model: nn.Module, loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()
    update(model)


def update(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= RATE * p.grad


class WithLoss(nn.Module):
    """A module that DDP wraps together with its criterion, and a buffer that DDP overwrites."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.net, self.criterion = make_model(), DLBLoss()
        self.register_buffer("witness", torch.tensor(rank))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.net(x), labels)


def train_with_loss_inside(world: int, rank: int) -> dict[str, Any]:
    """The kl of each step, beside that of teachers that were kept here."""
    model = DistributedDataParallel(WithLoss(rank), broadcast_buffers=True)
    found: dict[str, Any] = {"kl": [], "expected": []}
    teacher = None
    for x, labels, _ in make_loader(world, rank):
        logits = model.module.net(x).detach()
        found["expected"].append(0.0 if teacher is None else kl(teacher, logits[:HALF]))
        teacher = logits[-HALF:]
        descend(model, model(x, labels))
        found["kl"].append(model.module.criterion.parts.kl.item())
    found["witness"], found["stats"] = int(model.module.witness), model.module.criterion.stats()
    return {**found, "stats": tuple(found["stats"])}


def accumulate(world: int, rank: int, lag: int) -> dict[str, Any]:
    """Two micro-batches an optimizer step. The kl of each, beside that to the logits of the weights
    before the last update, on the same samples."""
    model = DistributedDataParallel(make_model())
    criterion, before = DLBLoss(lag=lag), None
    found: dict[str, Any] = {"kl": [], "expected": [], "batches": []}
    loader = make_loader(world, rank, lag)
    for k, (x, labels, ids) in enumerate(loader):
        if k % 2 == 0:
            model.zero_grad()
            with model.no_sync():
                logits = model(x)
                (criterion(logits, labels, ids) / 2).backward()
        else:
            logits = model(x)
            (criterion(logits, labels, ids) / 2).backward()
        teacher = None if before is None else before(x[:HALF]).detach()
        found["expected"].append(0.0 if teacher is None else kl(teacher, logits[:HALF].detach()))
        found["kl"].append(criterion.parts.kl.item())
        found["batches"].append(ids.tolist())
        if k % 2 == 1:
            before = copy.deepcopy(model.module)
            update(model)
    return found


def kl(teacher: Tensor, logits: Tensor) -> float:
    p, log_q = F.softmax(teacher / 3, 1), F.log_softmax(logits / 3, 1)
    return F.kl_div(log_q, p, reduction="batchmean").item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"train": train(DistributedDataParallel(make_model()), world, rank)}
    if world == 2:
        found["inside"] = train_with_loss_inside(world, rank)
        found["lag 2"] = accumulate(world, rank, lag=2)
        found["lag 1"] = accumulate(world, rank, lag=1)
    torch.save(found, Path(sys.argv[1], f"rank{rank}.pt"))
    dist.destroy_process_group()
