"""The cache end to end: what reads it, what writes it, what a state of another run does to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_criterion import chain
from torch import Tensor, nn
from torch.utils.data import SequentialSampler, TensorDataset

from dlb_fused import DLBLoss, OverlapBatchSampler, OverlapMixup
from dlb_fused.reference import dlb_loss_naive


class Sharp:
    """Sharpness-aware minimisation: the gradient is taken where a first gradient leads uphill."""

    def __init__(self, net: nn.Module, rho: float = 0.05) -> None:
        self.params, self.rho = list(net.parameters()), rho
        self.inner = torch.optim.SGD(self.params, lr=0.2)

    @torch.no_grad()
    def climb(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()  # type: ignore[union-attr]
        self.steps = [p.grad * self.rho / norm for p in self.params]  # type: ignore[operator]
        for p, step in zip(self.params, self.steps, strict=True):
            p.add_(step)

    @torch.no_grad()
    def descend(self) -> None:
        for p, step in zip(self.params, self.steps, strict=True):
            p.sub_(step)
        self.inner.step()


def test_a_two_pass_optimizer_has_one_teacher_for_both() -> None:
    """Both passes learn from the same rows. Those of the first pass are published after the update,
    those of the second, where the weights are perturbed, never."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(36, 6, generator=g), torch.randint(0, 5, (36,), generator=g)

    def train(ours: bool) -> list[float]:
        torch.manual_seed(0)
        net = nn.Linear(6, 5)
        sharp, criterion = Sharp(net), DLBLoss()
        last: Tensor | None = None
        losses = []
        for step in range(8):
            rows = slice(max(0, 4 * step - 4), 4 * step + 4)
            first: Tensor | None = None
            for commit, move in ((False, sharp.climb), (None, sharp.descend)):
                z = net(x[rows])
                first = z.detach() if first is None else first
                if ours:
                    loss = criterion(z, y[rows], commit=commit)
                else:
                    loss = dlb_loss_naive(z, y[rows], last)
                losses.append(loss.item())
                net.zero_grad()
                loss.backward()
                move()
            criterion.commit()
            assert first is not None
            last = first[-4:].clone()
        if ours:
            assert criterion.stats() == (28, 0, 0)  # each overlap once
        return losses

    assert train(True) == pytest.approx(train(False), rel=2e-5)


def test_a_call_without_trace() -> None:
    asked: list[int] = []
    criterion = DLBLoss(alpha=lambda step: asked.append(step) or 1.0)  # type: ignore[func-returns-value, arg-type, return-value]
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    before = copy.deepcopy(criterion.get_extra_state())
    want = dlb_loss_naive(z2, y2, z1.detach())
    torch.testing.assert_close(criterion(z2, y2, commit=None), want)
    criterion.commit()
    after = criterion.get_extra_state()
    assert torch.equal(before["caches"][0]["logits"], after["caches"][0]["logits"])
    assert before["calls"] == after["calls"] and criterion.stats() == (0, 0, 0)
    for options in ({"lag": 2}, {"capturable": True}):
        with pytest.raises(ValueError, match="commit=None needs lag=1 and capturable=False"):
            DLBLoss(**options)(z1, y1, commit=None)  # type: ignore[arg-type]


def test_a_step_that_is_not_committed_leaves_the_teacher() -> None:
    """The same samples come again: the skipped step's rows were never published."""
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    criterion(z2, y2, commit=False)
    retry = torch.randn(8, 5, requires_grad=True)
    torch.testing.assert_close(criterion(retry, y2), dlb_loss_naive(retry, y2, z1.detach()))
    criterion.commit()  # nothing is pending any more
    assert torch.equal(criterion._caches[0].logits, retry.detach()[4:])  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("pending", [False, True])
def test_copies_are_apart(how: str, pending: bool) -> None:
    """What is pending goes along; what one copy does, the other does not see."""
    criterion = DLBLoss(temperature=torch.tensor(2.0), weight=torch.ones(5))
    batches = chain(4, 3)
    criterion(*batches[0])
    criterion(*batches[1], commit=not pending)
    other = copy.deepcopy(criterion) if how == "deepcopy" else pickle.loads(pickle.dumps(criterion))
    for c in (criterion, other):
        c.commit()
    want = criterion(*batches[2])
    assert other.stats() == (4, 0, 0)
    assert torch.equal(other(*batches[2]), want) and other.parts.kl > 0
    assert other.stats() == criterion.stats() == (8, 0, 0)


def test_a_loss_computed_under_inference_mode_leaves_teachers_that_can_be_saved() -> None:
    """A whole validation epoch between two steps, with other shapes and labels."""
    criterion, plain = DLBLoss(), DLBLoss()
    batches = chain(4, 4)
    for step, (z, y, ids) in enumerate(batches):
        loss, want = criterion(z, y, ids), plain(z, y, ids)
        assert torch.equal(loss, want)
        loss.backward()
        criterion.train(step % 2 == 0)
        with torch.inference_mode():
            for rows in (3, 9):
                v, labels = torch.randn(rows, 7), torch.randint(0, 7, (rows,))
                torch.testing.assert_close(criterion(v, labels), F.cross_entropy(v, labels))
        criterion.train()
    assert criterion.stats() == plain.stats() == (12, 0, 0)


def state_after(batches: list[Any], **options: Any) -> dict[str, Any]:
    criterion = DLBLoss(**options)
    for z, y, ids in batches:
        criterion(z, y, ids)
    return copy.deepcopy(criterion.get_extra_state())


def test_a_state_is_kept_whatever_else_is_pending() -> None:
    """Of two caches only the older one must fit into the next batch, here a short one."""
    fit, later = chain(4, 2)[:1], chain(12, 2)[:1]
    criterion, resumed = DLBLoss(lag=2), DLBLoss(lag=2)
    for z, y, _ in (*fit, *later):
        criterion(z, y)
    resumed.set_extra_state(criterion.get_extra_state())
    z, y, _ = chain(4, 2)[1]
    assert len(z) < len(later[0][0])
    assert torch.equal(resumed(z, y), criterion(z, y)) and resumed.parts.kl_count > 0


@pytest.mark.parametrize("changes", [0, 3])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_own_a_view_that_is_pending(
    changes: int, copy_of: Callable[[DLBLoss], DLBLoss]
) -> None:
    (z, y, _), (z2, y2, _) = chain(4, 2)
    view = z * 1
    for _ in range(changes):
        view.mul_(1)
    criterion = DLBLoss(keep="view")
    criterion(view, y, commit=False)
    other = copy_of(criterion)
    with torch.no_grad():
        view.zero_()
    other.commit()
    plain = DLBLoss()
    plain(z, y)
    assert torch.equal(other(z2, y2), plain(z2, y2)) and other.parts.kl_count > 0


@pytest.mark.parametrize("other", ["C", "rank", "world"])
def test_a_state_of_another_run_is_dropped_and_the_chain_begins_anew(other: str) -> None:
    """With a warning; the step is cross-entropy, and the next one distils again."""
    state = state_after(chain(4, 2, C=6 if other == "C" else 5))
    if other in ("rank", "world"):
        state |= {"rank": 1, "world": 2} if other == "rank" else {"world": 4}
    criterion = DLBLoss()
    criterion.set_extra_state(state)
    batches = chain(4, 4)
    with pytest.warns(RuntimeWarning, match="DLBLoss drops its cache: it "):
        z, y, ids = batches[2]
        torch.testing.assert_close(criterion(z, y, ids, overlap=4), F.cross_entropy(z, y))
    assert criterion.stats() == (0, 0, 4)  # the dropped rows
    loss = criterion(*batches[3])
    want = dlb_loss_naive(batches[3][0], batches[3][1], batches[2][0].detach()[4:])
    torch.testing.assert_close(loss, want)


def test_a_state_of_larger_batches_is_dropped() -> None:
    criterion = DLBLoss()
    criterion.set_extra_state(state_after(chain(12, 2)))
    z, y, _ = chain(4, 3)[2]
    with pytest.warns(RuntimeWarning, match="it has more rows than the 8 of this batch"):
        torch.testing.assert_close(criterion(z, y), F.cross_entropy(z, y))
    assert criterion.stats() == (0, 0, 12)


@pytest.mark.parametrize(
    ("lag", "fresh", "overlaps"),
    [(2, (4, 2, 4, 4), (None,) * 4), (1, (4, 1, 3), (None, 2, None))],
    ids=["filling", "fewer than cached"],
)
def test_resume_of_unequal_batches_is_exact(
    lag: int, fresh: tuple[int, ...], overlaps: tuple[int | None, ...]
) -> None:
    """A batch may be smaller than a cache that is not yet due, or of which it takes a part."""
    g = torch.Generator().manual_seed(0)
    batches: list[tuple[Tensor, Tensor, int | None]] = []
    kept: list[Tensor] = []
    for n, overlap in zip(fresh, overlaps, strict=True):
        last = kept[-lag] if len(kept) >= lag else torch.empty(0, dtype=torch.int64)
        kept.append(torch.randint(0, 5, (n,), generator=g))
        labels = torch.cat([last[:overlap], kept[-1]])
        batches.append((torch.randn(len(labels), 5, generator=g).requires_grad_(), labels, overlap))

    def losses(resumed_after: int) -> list[Tensor]:
        criterion, found = DLBLoss(lag=lag), []
        for k, (z, y, overlap) in enumerate(batches):
            found.append(criterion(z, y, overlap=overlap))
            if k == resumed_after:
                state = criterion.state_dict()
                criterion = DLBLoss(lag=lag)
                criterion.load_state_dict(state)
        return found

    want = losses(-1)
    for k in range(len(fresh)):
        assert torch.equal(torch.stack(losses(k)), torch.stack(want))


def test_the_default_device_is_not_asked() -> None:
    """Tensors on a CPU stay there where new ones would be on a GPU ("meta" stands for it)."""
    z, y, _ = chain(4, 2)[1]
    images = torch.randn(8, 3, 4, 4)
    data = TensorDataset(images, y)
    with torch.device("meta"):
        criterion, mix = DLBLoss(), OverlapMixup(0.2)
        criterion(z, y).backward()
        mixed = mix(images, y)
        mix.state_dict()
        batches = OverlapBatchSampler(SequentialSampler(data), 4)
        next(iter(batches))
        state = batches.state_dict(consumed=1)
        batches.load_state_dict(state)
    assert z.grad is not None and z.grad.device.type == "cpu"
    assert all(x.device.type == "cpu" for x in mixed if isinstance(x, Tensor))
    assert state["rest"].device.type == "cpu"


def test_an_empty_batch_under_global_counts_ends_the_chain() -> None:
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion = DLBLoss(normalizer="global")
    criterion(z1, y1)
    none = torch.empty(0, 5, requires_grad=True)
    assert criterion(none, y1[:0]) == 0
    torch.testing.assert_close(criterion(z2, y2), F.cross_entropy(z2, y2))


def test_a_state_of_another_dtype_teaches_on() -> None:
    """Only float64 and the others do not mix in the kernel: then the cache is converted."""
    batches = chain(4, 2)
    (z1, y1, _), (z2, y2, _) = batches
    for dtype in (torch.bfloat16, torch.float64):
        criterion = DLBLoss()
        criterion.set_extra_state(state_after([(z1.detach().to(dtype).requires_grad_(), y1, None)]))
        want = dlb_loss_naive(z2, y2, z1.detach().to(dtype).float())
        torch.testing.assert_close(criterion(z2, y2), want)


def test_a_smaller_cache_than_the_overlap_teaches_its_rows() -> None:
    """Of a state with fewer rows only those are distilled, where the caller tells the overlap."""
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion = DLBLoss()
    criterion.set_extra_state(state_after([(z1[:2], y1[:2], None)]))
    loss = criterion(z2, y2, overlap=4)
    torch.testing.assert_close(loss, dlb_loss_naive(z2, y2, z1.detach()[:2]))
    assert criterion.stats() == (2, 0, 0)


def test_the_guard_under_lag_names_the_broken_step_alone() -> None:
    """Two chains side by side; one row of one of them is another sample."""
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion = DLBLoss(lag=2)
    for _ in range(2):
        criterion(z1, y1)
    wrong = y2.clone()
    wrong[0] = (wrong[0] + 1) % 5
    with pytest.warns(RuntimeWarning, match="do not continue the last batch"):
        torch.testing.assert_close(criterion(z2, wrong), F.cross_entropy(z2, wrong))
    torch.testing.assert_close(criterion(z2, y2), dlb_loss_naive(z2, y2, z1.detach()))
    assert criterion.stats() == (4, 1, 3)


def test_the_guard_counts_under_compile() -> None:
    """A compiled step cannot warn; stats() has the counts, and warns."""
    torch.compiler.reset()
    criterion = DLBLoss()
    step = torch.compile(lambda z, y: criterion(z, y), fullgraph=True, backend="aot_eager")
    (z1, y1, _), (z2, y2, _), (z3, y3, _) = chain(4, 3)
    step(z1, y1)
    wrong = y2.clone()
    wrong[0] = (wrong[0] + 1) % 5
    torch.testing.assert_close(step(z2, wrong), F.cross_entropy(z2, wrong))
    step(z3, y3)
    with pytest.warns(RuntimeWarning, match="do not continue the last batch"):
        assert criterion.stats() == (4, 1, 3)
