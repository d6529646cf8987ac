"""normalizer="global" between real processes (gloo): the mean of the ranks' gradients is the
gradient of one process that has all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dlb_fused import DLBLoss, dlb_loss

C, FEATURES, STEPS = 5, 6, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight, smoothing": {"weight": WEIGHT, "label_smoothing": 0.1},
    "a broken chain on rank 1": {"weight": WEIGHT},
    "ids and mask": {},
    "probabilities": {"weight": WEIGHT},
    "sequences": {},
}


class Rows(NamedTuple):
    x: Tensor  # (B, FEATURES), of sequences (B, T, FEATURES)
    labels: Tensor
    ids: Tensor | None
    distill: Tensor | None
    taught: Tensor  # (B,) int64: which row of the last batch teaches, -1 for none


def rows_of(case: str, rank: int, step: int) -> Rows:
    """Other numbers of rows on each rank; rank 1 begins with an empty batch, and later has one
    without fresh rows."""

    def fresh(step: int) -> tuple[Tensor, Tensor]:
        n = 0 if step < 0 or (rank == 1 and step in (0, 2)) else 2 + (rank + 2 * step) % 4
        g = torch.Generator().manual_seed(100 * rank + step)
        T = (3,) if case == "sequences" else ()
        labels = torch.randint(0, C, (n, *T), generator=g)
        labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
        return torch.randn(n, *T, FEATURES, generator=g), labels

    (x1, y1), (x2, y2) = fresh(step - 1), fresh(step)
    g = torch.Generator().manual_seed(7 * rank + step)
    x = torch.cat((x1, x2))
    x = x + 0.3 * torch.randn(x.shape, generator=g)  # another view
    labels, m = torch.cat((y1, y2)), len(y1)
    last = len(fresh(step - 2)[1]) + torch.arange(m)
    taught = torch.cat((last, torch.full((len(y2),), -1)))
    ids = distill = None
    if case == "a broken chain on rank 1" and rank == 1 and step == 2:
        labels[:m] = (y1.clamp(min=0) + 1) % C
        taught[:] = -1
    if case == "ids and mask":
        ids = 1000 * step + torch.arange(len(x))
        ids[:m] = 1000 * (step - 1) + last
        if m:
            ids[0], taught[0] = -5, -1  # nobody's
        distill = torch.ones(len(x), dtype=torch.bool)
        distill[1:m:2], taught[1:m:2] = False, -1
    if case == "probabilities":
        labels = nn.functional.one_hot(labels.clamp(min=0), C) * 0.8 + 0.04
    return Rows(x, labels, ids, distill, taught)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, C)


def worker(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    results = {}
    for case, options in CASES.items():
        model = DistributedDataParallel(network())
        criterion = DLBLoss(normalizer="global", **options)
        for step in range(STEPS):
            x, labels, ids, distill, _ = rows_of(case, rank, step)
            model.zero_grad()
            loss = criterion(model(x), labels, ids, distill=distill)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            results[case, step] = (gradients, loss.detach(), criterion.parts.kl)
        if rank == 0:  # alone: it would wait for ever if it asked the others
            criterion.eval()
            criterion(model.module(x), labels)
            with torch.no_grad():
                criterion.train()(model.module(x), labels)
    dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def union(case: str, world: int, step: int, options: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Gradients and loss of the rows of all ranks in one call, in fp64."""
    model = network().double()
    overlap, rest, teacher = [], [], []
    for rank in range(world):
        x, labels, _, _, taught = rows_of(case, rank, step)
        logits = model(x.double())
        last = model(rows_of(case, rank, step - 1).x.double()).detach()
        is_taught = taught >= 0
        overlap.append((logits[is_taught], labels[is_taught]))
        rest.append((logits[~is_taught], labels[~is_taught]))
        teacher.append(last[taught[is_taught]])
    logits, labels = (torch.cat(parts) for parts in zip(*overlap, *rest, strict=True))
    last_logits = torch.cat(teacher)
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    loss: Any = dlb_loss(logits, labels, last_logits, **options)
    return list(torch.autograd.grad(loss, list(model.parameters()))), loss.detach()


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_of_gradients_is_that_of_all_rows(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (world, tmp_path), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for case, options in CASES.items():
        for step in range(STEPS):
            want, loss = union(case, world, step, options)
            for rank in range(world):
                got, *_ = results[rank][case, step]
                for a, b in zip(got, want, strict=True):
                    assert relative_error(a, b) < 2e-6, (case, step, rank)
            mean = torch.stack([results[rank][case, step][1] for rank in range(world)]).mean()
            torch.testing.assert_close(mean.double(), loss, rtol=1e-6, atol=1e-6)
        for rank in range(world):
            assert any(results[rank][case, step][2] > 0 for step in range(STEPS))


def test_alone_it_is_the_ordinary_mean() -> None:
    plain, alone = DLBLoss(), DLBLoss(normalizer="global")
    for step in range(3):
        x, labels, *_ = rows_of("plain", 0, step)
        z = network()(x)
        assert torch.equal(alone(z, labels), plain(z, labels))
    assert alone.parts.kl > 0


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="normalizer must be None, 'global' or a pair"):
        DLBLoss(normalizer="local")
    with pytest.raises(ValueError, match="cannot count for normalizer='global'"):
        DLBLoss(normalizer="global", capturable=True)
