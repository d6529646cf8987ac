"""TwoViewCarry: chains of data that no sampler can order, and chains built in the wrong place."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dlb_fused import DLBLoss, OverlapBatchSampler, TwoViewCarry

CLASSES = 50


def label_of(i: int) -> int:
    return i * 7 % CLASSES


class Stream(IterableDataset):  # type: ignore[type-arg]
    """N samples in two views, every worker its share: what is said of a row in each view is its
    number and which view it is."""

    def __init__(self, N: int) -> None:
        self.N = N

    def share(self) -> range:
        worker = get_worker_info()
        return range(self.N) if worker is None else range(worker.id, self.N, worker.num_workers)

    def __iter__(self) -> Iterator[Any]:
        for i in self.share():
            yield torch.tensor([i, 0.0]), torch.tensor([i, 1.0]), label_of(i), i


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.N


def stream_loader(N: int = 23, n: int = 4, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Stream(N), batch_size=n, num_workers=workers)


def loop_of_the_script(loader: Any, epochs: int) -> Iterator[list[Tensor]]:
    """What the official loop puts together, written from its rules: the last batch is kept, and
    its second view is put before this one's first."""
    last = None
    for _ in range(epochs):
        for view_0, view_1, labels, ids in loader:
            now = [view_0, labels, ids]
            if last is not None:
                now = [torch.cat(pair) for pair in zip(last, now, strict=True)]
            yield now
            last = [view_1, labels, ids]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("N", [20, 23])
def test_it_yields_what_the_official_loop_trains_on(N: int, workers: int) -> None:
    batches = TwoViewCarry(stream_loader(N, workers=workers))
    wanted = loop_of_the_script(stream_loader(N, workers=workers), epochs=3)
    seen = 0
    for _ in range(3):
        for got in batches:
            for value, want in zip(got, next(wanted), strict=True):
                assert torch.equal(value, want)
            seen += 1
    assert seen >= 3 * N / 4 and next(wanted, None) is None


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loss_finds_an_unbroken_chain(workers: int, lag: int, carry_over: bool) -> None:
    """Partial chunks in mid-epoch too, since every worker has a last one."""
    batches = TwoViewCarry(stream_loader(workers=workers), carry_over=carry_over, lag=lag)
    criterion = DLBLoss(lag=lag, backend="eager")
    rows = fresh = 0
    for _ in range(3):
        if not carry_over:
            criterion.reset()
        for x, labels, ids in batches:
            assert torch.equal(x[:, 0].long(), ids)
            m = int(x[:, 1].sum())  # second views, which come first
            assert (x[:m, 1] == 1).all()
            rows, fresh = rows + len(x), fresh + len(x) - m
            criterion(torch.randn(len(x), CLASSES, requires_grad=True), labels, ids)
        if not carry_over:
            stats = criterion.stats()
            assert stats.matched > 10 and (stats.mismatched, stats.skipped) == (0, 0)
    assert fresh == 3 * 23
    if carry_over:
        assert criterion.stats() == (rows - fresh, 0, 0)


def test_leaving_early_breaks_nothing() -> None:
    batches = TwoViewCarry(stream_loader(workers=2))
    last = None
    for epoch in range(3):
        for step, (*_, ids) in enumerate(batches):
            m = 0 if last is None else len(last)
            assert m == 0 or torch.equal(ids[:m], last)
            last = ids[m:]
            if step == epoch:
                break


def test_length() -> None:
    assert len(TwoViewCarry(DataLoader(SizedStream(23), batch_size=4))) == 6
    with pytest.raises(TypeError, match="its loader, but generator has no length"):
        len(TwoViewCarry(batch for batch in ()))
    with pytest.raises(TypeError, match="has no len"):
        len(TwoViewCarry(stream_loader()))


Sample = namedtuple("Sample", "image mask")


def test_any_nesting() -> None:
    def sample(k: int) -> Any:
        view = Sample(torch.full((2, 3), k), {"mask": [torch.full((2,), k), torch.ones(2, 1)]})
        return (
            view,
            Sample(-view.image, view.mask),
            torch.tensor([k, k]),
            [f"a{k}", f"b{k}"],
            (b"",),
        )

    batches = TwoViewCarry([sample(1), sample(2)])
    first, second = batches
    assert type(first) is tuple and type(second[0]) is Sample
    assert second[0].image[:, 0].tolist() == [-1, -1, 2, 2]
    assert second[0].mask["mask"][0].tolist() == [1, 1, 2, 2]
    assert second[0].mask["mask"][1].shape == (4, 1)
    assert second[1:] == (
        pytest.approx(torch.tensor([1, 1, 2, 2])),
        ["a1", "b1", "a2", "b2"],
        (b"", b""),
    )


def test_views_of_another_form() -> None:
    def views(batch: dict[str, Tensor]) -> tuple[Any, Any]:
        return ({"x": batch["weak"], "id": batch["id"]}, {"x": batch["strong"], "id": batch["id"]})

    loader = [{"weak": torch.ones(2) * k, "strong": -torch.ones(2) * k, "id": torch.arange(2)}
              for k in (1, 2)]  # fmt: skip
    _, second = TwoViewCarry(loader, views=views)
    assert second["x"].tolist() == [-1, -1, 2, 2] and second["id"].tolist() == [0, 1, 0, 1]


def test_what_was_yielded_belongs_to_the_caller() -> None:
    loader = [(torch.ones(2), torch.ones(2), torch.tensor([3, 4])) for _ in range(2)]
    batches = iter(TwoViewCarry(loader))
    for value in next(batches):
        value.zero_()
    x, labels = next(batches)
    assert labels.tolist() == [3, 4, 3, 4] and (x == 1).all()


def test_device() -> None:
    loader = [(torch.ones(2), torch.ones(2), torch.zeros(2), ["a", "b"]) for _ in range(2)]
    for x, labels, names in TwoViewCarry(loader, device="meta"):
        assert x.device.type == labels.device.type == "meta"
        assert names[:2] == ["a", "b"]


def test_reset_begins_a_new_chain() -> None:
    batches = TwoViewCarry(stream_loader())
    list(batches)
    batches.reset()
    assert len(next(iter(batches))[0]) == 4


# State


@pytest.mark.parametrize("lag", [1, 2])
def test_resumed(lag: int) -> None:
    truth = [ids for batch in [TwoViewCarry(stream_loader(), lag=lag)] for _, _, ids in batch]
    batches = TwoViewCarry(stream_loader(), lag=lag)
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    file.seek(0)
    rest = list(stream_loader())[3:]  # the loader goes on at the fourth batch by its own means
    resumed = TwoViewCarry(rest, lag=lag)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [ids.tolist() for _, _, ids in resumed] == [ids.tolist() for ids in truth[3:]]


def good_state(**changes: Any) -> dict[str, Any]:
    batches = TwoViewCarry(stream_loader())
    next(iter(batches))
    return batches.state_dict() | changes


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "malformed TwoViewCarry state: expected a dict of"),
        (good_state(extra=1), "malformed TwoViewCarry state: expected a dict of"),
        (good_state(format=7), "has format 7, this version reads 1"),
        (good_state(config={"carry_over": True, "lag": 2}), "was written with {'carry_over': True"),
        (good_state(carried=None), "carried must be a list of at most lag=1"),
        (good_state(carried=[(), ()]), "carried must be a list of at most lag=1"),
    ],
)
def test_a_bad_state_changes_nothing(state: Any, message: str) -> None:
    batches = TwoViewCarry(stream_loader())
    batches.load_state_dict(good_state())
    before = copy.deepcopy(batches.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        batches.load_state_dict(state)
    assert str(batches.state_dict()) == str(before)


# Bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"loader": 3}, TypeError, "loader must yield batches, got int"),
        ({"views": 3}, TypeError, "views must be a function of a batch, got int"),
        ({"carry_over": 1}, ValueError, "carry_over must be True or False, got 1"),
        ({"lag": 0}, ValueError, "lag must be an int >= 1, got 0"),
        ({"lag": True}, ValueError, "lag must be an int >= 1, got True"),
    ],
)
def test_bad_option(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        TwoViewCarry(**{"loader": [], **options})


A, B = torch.ones(2, 3), torch.ones(2, 4)


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([(A, A)], TypeError, "a batch must be (view_0, view_1, labels, ...), got tuple of 2"),
        ([A], TypeError, "got tensor of shape (2, 3); for another form give views="),
        ([3], TypeError, "a batch must be (view_0, view_1, labels, ...), got int"),
        (
            [(A, A, 3)],
            TypeError,
            "made of tensors, lists of strings, tuples, lists and dicts, got int",
        ),
        ([(A, A, torch.tensor(1))], TypeError, "tensors with rows, got a 0-dim tensor"),
        (
            [(A, A, A), (B, B, A)],
            ValueError,
            "tensor of shape (2, 3), then tensor of shape (2, 4)",
        ),
        ([(A, A, A), (A, A, [A])], ValueError, "tensor of shape (2, 3), then list of 1"),
        ([(A, A, [A]), (A, A, A)], ValueError, "list of 1, then tensor of shape (2, 3)"),
        ([(A, A, {"a": A}), (A, A, {"b": A})], ValueError, "dict of ['a'], then dict of ['b']"),
        ([(A, A, A), (A, A, A, A)], ValueError, "tuple of 2, then tuple of 3"),
    ],
)
def test_bad_batches(batches: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        list(TwoViewCarry(batches))


# A chain built inside of loader workers: their batches interleave, so it overlaps at a distance


class ChainedInside(Stream):
    """The wrong place for the sampler: in every worker."""

    def __iter__(self) -> Iterator[Any]:
        for batch in OverlapBatchSampler(self.share(), 8):
            ids = torch.tensor(batch)
            yield torch.tensor([label_of(i) for i in batch]), ids


def train(criterion: DLBLoss, workers: int, with_ids: bool) -> list[float]:
    """The KL of each step."""
    loader = DataLoader(ChainedInside(64), batch_size=None, num_workers=workers)
    kl = []
    for labels, ids in loader:
        logits = torch.randn(len(ids), CLASSES, requires_grad=True)
        criterion(logits, labels, ids if with_ids else None)
        kl.append(float(criterion.parts.kl))
    return kl


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_chain_inside_of_workers_is_found_out(with_ids: bool) -> None:
    criterion = DLBLoss(backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kl = train(criterion, workers=2, with_ids=with_ids)
    assert sum("do not continue the last batch" in str(w.message) for w in caught) == 1
    assert len(kl) == 16 and not any(kl)
    stats = criterion.stats()
    assert stats.matched == 0 and stats.mismatched > 0


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_right_at_the_lag_of_the_workers(workers: int, with_ids: bool) -> None:
    """So the test above fails for its reason, and for no other."""
    criterion = DLBLoss(lag=workers or 1, backend="eager")
    kl = train(criterion, workers, with_ids)
    assert all(kl[workers or 1 :]) and criterion.stats()[1:] == (0, 0)
