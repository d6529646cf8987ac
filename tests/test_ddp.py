"""DistributedDataParallel with real processes: each rank has its own chain, and all together train
as one process does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ddp_ranks
import pytest
import torch
from ddp_ranks import EPOCHS, HALF, SAMPLES
from ranks import findings, is_chain
from torch.utils.data import DistributedSampler

from dlb_fused import DLBLoss

Findings = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return findings(2, "ddp_ranks.py", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return findings(4, "ddp_ranks.py", tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_each_rank_has_its_own_chain(ranks: str, request: pytest.FixtureRequest) -> None:
    found = [rank["train"] for rank in request.getfixturevalue(ranks)]
    for rank in found:
        assert len(rank["batches"]) == 30 and is_chain(rank["batches"], HALF)
        assert rank["kl"][0] == 0 and min(rank["kl"][1:]) > 0
        assert rank["matched"] == [HALF * step for step in range(30)]
    for epoch in range(EPOCHS):
        steps = slice(epoch * 10, epoch * 10 + 10)
        fresh = [i for rank in found for batch in rank["batches"][steps] for i in batch[-HALF:]]
        assert sorted(fresh) == list(range(SAMPLES * len(found)))  # distinct on each rank


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_all_ranks_train_as_one_process(ranks: str, request: pytest.FixtureRequest) -> None:
    """30 steps on the same samples: the fresh ones of all ranks after their overlaps."""
    found = [rank["train"] for rank in request.getfixturevalue(ranks)]
    world = len(found)
    x, labels, _ = ddp_ranks.make_data(world).tensors
    model, criterion, overlap = ddp_ranks.make_model(), DLBLoss(), []
    for step, fresh in enumerate(fresh_of_all_ranks(world)):
        rows = torch.tensor(overlap + fresh)
        loss = criterion(model(x[rows]), labels[rows])
        ddp_ranks.descend(model, loss)
        overlap = fresh
        for name, value in (("losses", loss), ("kl", criterion.parts.kl)):
            mean = sum(rank[name][step] for rank in found) / world
            torch.testing.assert_close(mean, value.item(), rtol=1e-5, atol=1e-7)
    weights = [p.detach() for p in model.parameters()]
    for rank in found:
        torch.testing.assert_close(rank["weights"], weights, rtol=1e-5, atol=1e-6)
    assert criterion.stats().matched == 29 * HALF * world


def fresh_of_all_ranks(world: int) -> list[list[int]]:
    steps = []
    data = ddp_ranks.make_data(world)
    for epoch in range(EPOCHS):
        shards = [DistributedSampler(data, world, rank, seed=3) for rank in range(world)]
        for shard in shards:
            shard.set_epoch(epoch)
        orders = [list(shard) for shard in shards]
        for k in range(0, SAMPLES, HALF):
            steps.append([i for order in orders for i in order[k : k + HALF]])
    return steps


def test_ddp_overwrites_buffers_and_not_the_cache(two: Findings) -> None:
    for rank in (rank["inside"] for rank in two):
        assert rank["witness"] == 0  # the buffer of rank 0, on rank 1 too
        torch.testing.assert_close(rank["kl"], rank["expected"], rtol=1e-3, atol=1e-7)
        assert rank["kl"][0] == 0 and min(rank["kl"][1:]) > 0
        assert rank["stats"] == (9 * HALF, 0, 0)
    assert two[0]["inside"]["kl"][1:] != two[1]["inside"]["kl"][1:]


def test_with_lag_the_teacher_is_one_optimizer_step_old(two: Findings) -> None:
    for rank in (rank["lag 2"] for rank in two):
        assert is_chain(rank["batches"], HALF, lag=2)
        torch.testing.assert_close(rank["kl"], rank["expected"], rtol=1e-3, atol=1e-7)
        assert rank["kl"][:2] == [0, 0] and min(rank["kl"][2:]) > 0


def test_without_lag_micro_batches_teach_themselves(two: Findings) -> None:
    """What `lag` is for: the second micro-batch of a step meets its own weights as teacher."""
    for rank in (rank["lag 1"] for rank in two):
        assert max(rank["kl"][1::2]) < 1e-6 < min(rank["kl"][2::2])
        assert all(a[-HALF:] == b[:HALF] for a, b in pairwise(rank["batches"]))
