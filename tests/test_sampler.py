"""OverlapBatchSampler: what it yields, how it resumes, and what it says to bad input."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from dlb_fused import DLBLoss, OverlapBatchSampler

FEW_CORES = "ignore:This DataLoader will create:UserWarning"


def random_sampler(n: int, seed: int = 0) -> RandomSampler:
    return RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))


def distributed_sampler(n: int, seed: int = 0) -> DistributedSampler:
    return DistributedSampler(range(2 * n), num_replicas=2, rank=1, seed=seed)


def sequential_sampler(n: int, seed: int = 0) -> SequentialSampler:
    return SequentialSampler(range(n))


def fresh_halves(
    epochs: list[list[list[int]]], lag: int, carry_over: bool
) -> list[list[list[int]]]:
    """The fresh half of each batch, found by the rule that the overlap is the fresh half of the
    batch `lag` earlier; fails if a batch does not begin with that."""
    fresh: list[list[list[int]]] = []
    earlier: list[list[int]] = []
    for batches in epochs:
        earlier = earlier if carry_over else []
        fresh.append([])
        for batch in batches:
            overlap = earlier[-lag] if len(earlier) >= lag else []
            assert batch[: len(overlap)] == overlap
            earlier.append(batch[len(overlap) :])
            fresh[-1].append(earlier[-1])
    return fresh


def check_epochs(n: int, half: int, epochs: int, **options: Any) -> None:
    sampler = OverlapBatchSampler(random_sampler(n), 2 * half, **options)
    drawn = [list(sampler) for _ in range(epochs)]
    drop_last = options.get("drop_last", False)
    length = n // half if drop_last else math.ceil(n / half)
    assert len(sampler) == length
    for fresh in fresh_halves(drawn, options.get("lag", 1), options.get("carry_over", True)):
        assert len(fresh) == length
        flat = list(itertools.chain.from_iterable(fresh))
        assert all(type(i) is int for i in flat)
        assert all(len(chunk) == half for chunk in fresh[: n // half])
        assert len(set(flat)) == len(flat) == (n - n % half if drop_last else n)


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("n", range(12, 19))  # every remainder of 6, and a whole chunk more
def test_epochs(n: int, lag: int, drop_last: bool, carry_over: bool) -> None:
    check_epochs(n, 6, 4, lag=lag, drop_last=drop_last, carry_over=carry_over)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    n=st.integers(1, 60),
    half=st.integers(1, 20),
    epochs=st.integers(1, 4),
    lag=st.integers(1, 6),
    drop_last=st.booleans(),
    carry_over=st.booleans(),
)
def test_epochs_of_any_size(n: int, half: int, epochs: int, **options: Any) -> None:
    check_epochs(n, half, epochs, **options)


def test_the_chain_crosses_the_epoch_border() -> None:
    sampler = OverlapBatchSampler(range(5), 4)
    assert list(sampler) == [[0, 1], [0, 1, 2, 3], [2, 3, 4]]
    assert list(sampler) == [[4, 0, 1], [0, 1, 2, 3], [2, 3, 4]]


def test_each_epoch_anew() -> None:
    sampler = OverlapBatchSampler(range(5), 4, carry_over=False)
    assert list(sampler) == list(sampler) == [[0, 1], [0, 1, 2, 3], [2, 3, 4]]


def test_drop_last_carries_a_whole_chunk() -> None:
    sampler = OverlapBatchSampler(range(5), 4, drop_last=True)
    assert list(sampler) == [[0, 1], [0, 1, 2, 3]]
    assert list(sampler) == [[2, 3, 0, 1], [0, 1, 2, 3]]


def test_lag_of_two() -> None:
    sampler = OverlapBatchSampler(range(4), 2, lag=2)
    assert list(sampler) == [[0], [1], [0, 2], [1, 3]]
    assert list(sampler) == [[2, 0], [3, 1], [0, 2], [1, 3]]


def test_it_is_a_batch_sampler() -> None:
    inner = sequential_sampler(4)
    sampler = OverlapBatchSampler(inner, 2, True, carry_over=False, lag=3)
    assert isinstance(sampler, BatchSampler)
    assert sampler.sampler is inner
    assert (sampler.batch_size, sampler.drop_last) == (2, True)
    assert (sampler.carry_over, sampler.lag) == (False, 3)


@pytest.mark.parametrize(
    "index", [torch.tensor(3), np.int64(3), torch.tensor(3, dtype=torch.int32)]
)
def test_indices_become_ints(index: Any) -> None:
    (batch,) = OverlapBatchSampler([index], 2)
    assert batch == [3] and type(batch[0]) is int


def test_a_yielded_list_belongs_to_the_caller() -> None:
    batches = []
    for batch in OverlapBatchSampler(range(4), 4):
        batches.append(list(batch))
        batch.clear()
    assert batches == [[0, 1], [0, 1, 2, 3]]


def test_set_epoch_reaches_the_sampler() -> None:
    inner = distributed_sampler(8)
    sampler = OverlapBatchSampler(inner, 4)
    sampler.set_epoch(3)
    assert inner.epoch == 3
    OverlapBatchSampler(range(4), 4).set_epoch(3)  # no set_epoch below: no error


# Resuming


def run(sampler: OverlapBatchSampler, epochs: range) -> Iterator[list[int]]:
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from sampler


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


INNER = [random_sampler, sequential_sampler, distributed_sampler]


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize(
    "lag, drop_last, carry_over", [(1, False, True), (3, True, True), (2, False, False)]
)
def test_resumed_order_is_that_of_the_uninterrupted_run(
    make: Callable[..., Any], lag: int, drop_last: bool, carry_over: bool
) -> None:
    def new(seed: int = 0) -> OverlapBatchSampler:
        options = {"carry_over": carry_over, "lag": lag}
        return OverlapBatchSampler(make(14, seed), 8, drop_last, **options)

    length = len(new())
    truth = list(run(new(), range(4)))
    for epoch, used, ahead in itertools.product(range(3), range(length + 1), range(3)):
        sampler = new()
        list(run(sampler, range(epoch)))
        sampler.set_epoch(epoch)
        batches = iter(sampler)
        drawn = min(max(used + ahead, 1), length)  # a loader draws ahead of the trainer
        list(itertools.islice(batches, drawn))
        state = through_a_file(sampler.state_dict(consumed=used))
        # Taking the state changes nothing for the run that goes on.
        first = epoch * length
        assert list(batches) == truth[first + drawn : first + length]

        # Another seed: the order comes from the state (of a DistributedSampler only the epoch under
        # way: later ones come from its seed and set_epoch).
        resumed = new(seed=0 if make is distributed_sampler else 1)
        resumed.load_state_dict(state)
        assert list(run(resumed, range(epoch, 4))) == truth[first + used :]


@pytest.mark.parametrize("make", INNER)
def test_state_between_epochs_needs_no_count(make: Callable[..., Any]) -> None:
    truth = list(run(OverlapBatchSampler(make(14), 8), range(3)))
    sampler = OverlapBatchSampler(make(14), 8)
    start = sampler.state_dict()
    list(run(sampler, range(2)))
    for state in (sampler.state_dict(), sampler.state_dict(0), sampler.state_dict(len(sampler))):
        resumed = OverlapBatchSampler(make(14), 8)
        resumed.load_state_dict(state)
        assert list(run(resumed, range(2, 3))) == truth[8:]
    sampler.load_state_dict(start)
    assert list(run(sampler, range(3))) == truth


def test_resumed_twice_counts_from_the_start_of_the_epoch() -> None:
    sampler = OverlapBatchSampler(random_sampler(10), 4)
    truth = list(OverlapBatchSampler(random_sampler(10), 4))
    for used in (1, 2, 4):
        list(itertools.islice(sampler, 2))
        state = sampler.state_dict(consumed=used)
        sampler = OverlapBatchSampler(random_sampler(10, seed=1), 4)
        sampler.load_state_dict(state)
        assert sampler.state_dict()["consumed"] == used  # loaded, not begun: the count is known
    assert list(sampler) == truth[4:]


def test_the_state_does_not_depend_on_how_indices_were_drawn() -> None:
    """Without a generator the order comes from the global random state: the epoch under way is
    resumed all the same."""
    sampler = OverlapBatchSampler(RandomSampler(range(20)), 4)
    batches = iter(sampler)
    next(batches)
    state = sampler.state_dict(consumed=1)
    resumed = OverlapBatchSampler(RandomSampler(range(20)), 4)
    resumed.load_state_dict(state)
    assert list(resumed) == list(batches)


def test_leaving_early() -> None:
    sampler = OverlapBatchSampler(range(8), 4)
    assert list(itertools.islice(sampler, 2)) == [[0, 1], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="needs consumed="):
        sampler.state_dict()
    assert next(iter(sampler)) == [2, 3, 0, 1]  # a new epoch; the chain goes on

    sampler = OverlapBatchSampler(range(8), 4)
    list(itertools.islice(sampler, 3))
    sampler.load_state_dict(sampler.state_dict(consumed=2))  # the third was drawn, not used
    assert next(iter(sampler)) == [2, 3, 4, 5]


def test_reset_leaves_the_epoch_and_the_chain() -> None:
    sampler = OverlapBatchSampler(range(8), 4)
    batches = iter(sampler)
    next(batches), next(batches)
    sampler.reset()
    with pytest.raises(RuntimeError, match="this iteration of OverlapBatchSampler is over"):
        next(batches)
    assert list(sampler)[:2] == [[0, 1], [0, 1, 2, 3]]
    sampler.load_state_dict(sampler.state_dict(consumed=0))
    sampler.reset()
    assert next(iter(sampler)) == [0, 1]


def test_an_older_iteration_is_over() -> None:
    sampler = OverlapBatchSampler(range(8), 4)
    older = iter(sampler)
    next(older)
    iter(sampler)  # not begun: no harm
    next(older)
    next(iter(sampler))
    with pytest.raises(RuntimeError, match="a newer one has begun"):
        next(older)


# In a DataLoader


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> int:
        return i


def loader_of(sampler: OverlapBatchSampler, workers: int, **options: Any) -> DataLoader:
    return DataLoader(Numbers(), batch_sampler=sampler, num_workers=workers, **options)


def as_lists(loader: DataLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("workers", [0, 4])
def test_data_loader(workers: int) -> None:
    truth = OverlapBatchSampler(random_sampler(23), 8)
    loader = loader_of(OverlapBatchSampler(random_sampler(23), 8), workers)
    assert len(loader) == 6
    for _ in range(2):
        assert as_lists(loader) == list(truth)
    assert loader.batch_sampler.state_dict()["rest"] is None  # the loader let go of the iterator


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_data_loader_resumed(workers: int, shared: bool) -> None:
    """shared: the loader seeds its workers from the generator of the sampler."""

    def new(seed: int) -> tuple[OverlapBatchSampler, DataLoader]:
        inner = random_sampler(23, seed)
        sampler = OverlapBatchSampler(inner, 4)
        return sampler, loader_of(sampler, workers, generator=inner.generator if shared else None)

    sampler, loader = new(seed=0)
    batches = iter(loader)
    used = [next(batches).tolist() for _ in range(3)]
    with pytest.raises(ValueError, match=r"needs consumed=.*loader workers draw ahead"):
        sampler.state_dict()
    state = sampler.state_dict(consumed=3)
    rest = [batch.tolist() for batch in batches]
    del batches
    later = as_lists(loader)

    sampler, loader = new(seed=1)
    sampler.load_state_dict(state)
    assert as_lists(loader) == rest
    assert as_lists(loader) == later
    assert len(used) + len(rest) == len(loader) == 12


@pytest.mark.filterwarnings(FEW_CORES)
def test_drawn_to_the_end_by_workers_is_not_used_to_the_end() -> None:
    sampler = OverlapBatchSampler(range(23), 8)
    batches = iter(loader_of(sampler, 4))
    next(batches)  # 8 are fetched ahead, there are 6
    with pytest.raises(ValueError, match="6 were drawn"):
        sampler.state_dict()
    state = sampler.state_dict(consumed=1)
    resumed = OverlapBatchSampler(range(23), 8)
    resumed.load_state_dict(state)
    assert list(resumed) == [batch.tolist() for batch in batches]


@pytest.mark.filterwarnings(FEW_CORES)
def test_persistent_workers_keep_the_iterator() -> None:
    sampler = OverlapBatchSampler(range(23), 8)
    loader = loader_of(sampler, 2, persistent_workers=True)
    as_lists(loader)
    with pytest.raises(ValueError, match="needs consumed="):
        sampler.state_dict()
    state = sampler.state_dict(consumed=len(sampler))
    second = as_lists(loader)
    resumed = OverlapBatchSampler(range(23), 8)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert list(resumed) == second


@pytest.mark.parametrize("lag", [1, 3])
def test_the_loss_finds_an_unbroken_chain(lag: int) -> None:
    """All overlap rows of three epochs are distilled, over epoch borders and partial chunks."""
    sampler = OverlapBatchSampler(random_sampler(23), 8, lag=lag)
    criterion = DLBLoss(lag=lag, backend="eager")
    overlaps = 0
    for batch in itertools.chain.from_iterable(sampler for _ in range(3)):
        labels = torch.tensor(batch)
        criterion(torch.randn(len(batch), 23, requires_grad=True), labels, labels)
        overlaps += len(batch)
    assert criterion.stats() == (overlaps - 3 * 23, 0, 0)


class Appearances(Numbers):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, int]:  # type: ignore[override]
        return at


def check_training(
    n: int, half: int, epochs: int, stop: tuple[int, int], workers: int, **options: bool
) -> None:
    """Batches as the trainer sees them, by the ids and appearances that come with the rows; after
    `stop`, an epoch and a number of batches, from a new sampler with the state of the first."""

    def new(seed: int) -> tuple[OverlapBatchSampler, DataLoader]:
        inner = random_sampler(n, seed)
        sampler = OverlapBatchSampler(inner, 2 * half, with_appearance=True, **options)
        data = Appearances(n)
        return sampler, DataLoader(data, batch_sampler=sampler, num_workers=workers)

    sampler, loader = new(seed=0)
    criterion = DLBLoss(backend="eager")
    length = n // half if options["drop_last"] else math.ceil(n / half)
    stop_epoch, stop_batch = stop[0], stop[1] % (length + 1)
    last: list[int] = []
    for epoch in range(epochs):
        if not options["carry_over"]:
            last = []
            criterion.reset()
        fresh: list[int] = []
        batches = iter(loader)
        for k in range(length):
            if (epoch, k) == (stop_epoch, stop_batch) and k > 0:
                state = sampler.state_dict(consumed=k)
                sampler, loader = new(seed=1)
                sampler.load_state_dict(state)
                batches = iter(loader)
            ids, appearances = next(batches)
            m = len(last)
            assert ids[:m].tolist() == last
            assert appearances.tolist() == [1] * m + [0] * (len(ids) - m)
            criterion(torch.randn(len(ids), n, requires_grad=True), ids, ids)
            assert criterion.parts.kl_count == m
            last = ids[m:].tolist()
            assert len(last) == half or (k == length - 1 and len(last) == n % half)
            fresh += last
        assert next(batches, None) is None
        assert len(set(fresh)) == len(fresh) == (n - n % half if options["drop_last"] else n)
    assert criterion.stats()[1:] == (0, 0)


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("workers, examples", [(0, 100), (2, 15)])
def test_the_trainer_sees_a_right_chain(workers: int, examples: int) -> None:
    """Also at the end of epochs: partial chunks, workers that draw ahead, a resumed run."""

    @settings(max_examples=examples, derandomize=True, deadline=None)
    @given(
        n=st.integers(1, 30),
        half=st.integers(1, 9),
        epochs=st.integers(2, 3),
        stop=st.tuples(st.integers(0, 2), st.integers(0, 30)),
        drop_last=st.booleans(),
        carry_over=st.booleans(),
    )
    def check(**case: Any) -> None:
        check_training(workers=workers, **case)

    check()


@pytest.mark.filterwarnings(FEW_CORES)
@pytest.mark.parametrize("n", [22, 23, 24])  # a partial last chunk of 2, of 3, none
@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_end_of_an_epoch_with_workers(n: int, drop_last: bool, carry_over: bool) -> None:
    for stop in (0, 5, 6):
        check_training(n, 4, 3, (1, stop), workers=2, drop_last=drop_last, carry_over=carry_over)


@pytest.mark.filterwarnings(FEW_CORES, "ignore:DLBLoss found rows:RuntimeWarning")
@pytest.mark.parametrize("remedy", ["reset", "state", "overlap", None])
def test_leaving_early_with_workers(remedy: str | None) -> None:
    """The workers have drawn the partial last chunk, which the trainer never sees."""
    sampler = OverlapBatchSampler(random_sampler(23), 8, with_appearance=True)
    loader = DataLoader(Appearances(23), batch_sampler=sampler, num_workers=2)
    criterion = DLBLoss(backend="eager")
    distilled: list[list[int]] = []
    for epoch in range(4):
        distilled.append([])
        for k, (ids, appearances) in enumerate(loader):
            overlap = int(appearances.sum()) if remedy == "overlap" else None
            criterion(torch.randn(len(ids), 23, requires_grad=True), ids, overlap=overlap)
            distilled[-1].append(int(criterion.parts.kl_count))
            if epoch == 1 and k == 2:
                break
        if epoch == 1 and remedy == "reset":
            sampler.reset()
            criterion.reset()
        elif epoch == 1 and remedy == "state":
            sampler.load_state_dict(sampler.state_dict(consumed=3))
    assert distilled[:2] == [[0, 4, 4, 4, 4, 4], [3, 4, 4]]
    assert (
        distilled[2:]
        == {
            "reset": [[0, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4]],
            "state": [[4, 4, 4], [3, 4, 4, 4, 4, 4]],
            "overlap": [[0, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4]],
            None: [[0] * 6, [0] * 6],
        }[remedy]
    )
    assert remedy is not None or criterion.stats().mismatched > 0


def test_appearances() -> None:
    sampler = OverlapBatchSampler(range(5), 4, lag=2, with_appearance=True)
    assert list(sampler) == [[(0, 0), (1, 0)], [(2, 0), (3, 0)], [(0, 1), (1, 1), (4, 0)]]
    plain = OverlapBatchSampler(range(5), 4, lag=2)
    plain.load_state_dict(sampler.state_dict())  # what is yielded is no part of the state
    assert list(plain) == [[i for i, _ in batch] for batch in sampler]


# Bad input


@pytest.mark.parametrize("batch_size", [7, 1, 0, -2, 4.0, True, "4", None])
def test_bad_batch_size(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be an even int >= 2.*got "):
        OverlapBatchSampler(range(8), batch_size)


def test_bad_sampler() -> None:
    with pytest.raises(TypeError, match="sampler must yield indices, got int"):
        OverlapBatchSampler(5, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("lag", [0, -1, 1.5, True])
def test_bad_lag(lag: Any) -> None:
    with pytest.raises(ValueError, match="lag must be an int >= 1, got "):
        OverlapBatchSampler(range(8), 4, lag=lag)


@pytest.mark.parametrize("name", ["drop_last", "carry_over", "with_appearance"])
def test_bad_switch(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 1"):
        OverlapBatchSampler(range(8), 4, **{name: 1})


class Endless(Sampler):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def test_a_sampler_without_length() -> None:
    sampler = OverlapBatchSampler(Endless(), 4)
    assert list(itertools.islice(sampler, 2)) == [[0, 1], [0, 1, 2, 3]]
    with pytest.raises(TypeError, match="Endless has no length"):
        len(sampler)
    with pytest.raises(TypeError, match="the rest of its epoch cannot be stored"):
        sampler.state_dict(consumed=1)


@pytest.mark.parametrize("index", [1.0, "a", torch.tensor(1.0), (1, 2)])
def test_an_index_that_is_no_integer(index: Any) -> None:
    with pytest.raises(TypeError, match="sampler must yield integers"):
        list(OverlapBatchSampler([index], 4))


@pytest.mark.parametrize("consumed", [-1, 3, 1.0, True, "1"])
def test_bad_consumed(consumed: Any) -> None:
    sampler = OverlapBatchSampler(range(8), 4)
    batches = iter(sampler)
    next(batches), next(batches)
    with pytest.raises(ValueError, match="consumed must be an int from 0 to 2"):
        sampler.state_dict(consumed=consumed)


def good_state(**changes: Any) -> dict[str, Any]:
    sampler = OverlapBatchSampler(random_sampler(8), 4)
    batches = iter(sampler)
    next(batches)
    return sampler.state_dict(consumed=1) | changes


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "malformed OverlapBatchSampler state: expected a dict of"),
        ({}, "malformed OverlapBatchSampler state: expected a dict of"),
        (good_state(extra=1), "expected a dict of"),
        (good_state(format=99), "has format 99, this version reads 1"),
        (good_state(config={"batch_size": 8}), "was written with .*but this is"),
        (good_state(chunks=None), "chunks must be a list of at most lag=1 int64 tensors"),
        (good_state(chunks=[torch.ones(2)]), "chunks must be a list of at most lag=1 int64"),
        (good_state(chunks=[torch.arange(2)] * 2), "chunks must be a list of at most lag=1 int64"),
        (good_state(chunks=[torch.arange(3)]), "each chunk must have 1 to 2 indices"),
        (good_state(rest=[1, 2]), "rest must be None or an int64 tensor"),
        (good_state(consumed=-1), "consumed must be an int >= 0, got -1"),
        (good_state(consumed=None), "consumed must be an int >= 0, got None"),
        (good_state(generator=None), "without a generator, but this sampler has one"),
        (good_state(generator=7), "generator must be the state of a torch.Generator"),
        (good_state(generator=torch.zeros(3, dtype=torch.uint8)), "generator must be the state"),
    ],
)
def test_a_bad_state_changes_nothing(state: Any, message: str) -> None:
    sampler, truth = (OverlapBatchSampler(random_sampler(8, seed=5), 4) for _ in range(2))
    batches, expected = iter(sampler), iter(truth)
    assert next(batches) == next(expected)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert list(batches) == list(expected)
    assert list(sampler) == list(truth)


def test_a_state_of_another_configuration() -> None:
    state = good_state()
    for other in (
        OverlapBatchSampler(random_sampler(8), 6),
        OverlapBatchSampler(random_sampler(8), 4, lag=2),
        OverlapBatchSampler(random_sampler(9), 4),
    ):
        with pytest.raises(ValueError, match="was written with"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="with a generator, but this sampler has none"):
        OverlapBatchSampler(range(8), 4).load_state_dict(state)
