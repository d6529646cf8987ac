"""DLBLoss: the cache, the guard, the chain in real training, the state."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from dlb_fused import DLBLoss, OverlapBatchSampler, dlb_loss
from dlb_fused.backends import WITH_PAIR
from dlb_fused.reference import dlb_loss_naive


def batch(rows: int, C: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, C, generator=g, requires_grad=True), torch.randint(
        0, C, (rows,), generator=g
    )


def chain(
    n: int, steps: int, C: int = 5, device: str = "cpu"
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(logits, labels, ids) of a right chain: the first batch has its n fresh rows alone."""
    g = torch.Generator().manual_seed(n)
    ids = torch.randperm(n * steps, generator=g)
    labels = torch.randint(0, C, (n * steps,), generator=g)
    batches = []
    for k in range(steps):
        rows = ids[max(0, k - 1) * n : (k + 1) * n]
        logits = torch.randn(len(rows), C, generator=g).to(device).requires_grad_()
        batches.append((logits, labels[rows].to(device), rows.to(device)))
    return batches


class Pictures(Dataset):  # type: ignore[type-arg]
    """A fixed set of samples; each access draws its noise anew, as an augmentation does."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(n, 12, generator=g), torch.randint(0, 4, (n,), generator=g)
        self.noise = torch.Generator().manual_seed(2)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(12, generator=self.noise), self.y[i]


def training_setup(N: int = 44) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = Pictures(N)
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    return model, optimizer, DataLoader(data, batch_sampler=OverlapBatchSampler(sampler, 16))


def test_twenty_steps_equal_a_plain_loop(backend_device: tuple[str, str]) -> None:
    """Over epoch borders, with a partial last chunk (44 = 5 · 8 + 4)."""
    backend, device = backend_device

    model, optimizer, loader = training_setup()
    model.to(device)
    criterion = DLBLoss(temperature=3.0, alpha=0.5, backend=backend)
    ours: list[float] = []
    while len(ours) < 20:
        for x, y in loader:
            loss = criterion(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ours.append(loss.item())

    model, optimizer, loader = training_setup()
    model.to(device)
    plain: list[float] = []
    last = None
    while len(plain) < 20:
        for x, y in loader:
            logits = model(x.to(device))
            loss = F.cross_entropy(logits, y.to(device))
            m = 0 if last is None else len(last)
            if last is not None:
                log_s = F.log_softmax(logits[:m] / 3.0, dim=1)
                q = F.softmax(last / 3.0, dim=1)
                loss = loss + 0.5 * 9.0 * F.kl_div(log_s, q, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = logits.detach()[m:].clone()
            plain.append(loss.item())

    assert ours == pytest.approx(plain, rel=2e-5)
    stats = criterion.stats()
    assert stats.matched > 100 and stats.mismatched == stats.skipped == 0


def test_the_forgotten_sampler_is_reported_and_never_distils(
    backend_device: tuple[str, str],
) -> None:
    backend, device = backend_device
    data = TensorDataset(torch.randn(96, 12), torch.randint(0, 4, (96,)))
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, criterion = nn.Linear(12, 4).to(device), DLBLoss(backend=backend)
    with pytest.warns(RuntimeWarning, match="rows that do not continue the last batch") as caught:
        for step, (x, y) in enumerate(loader):
            logits = model(x.to(device))
            loss = criterion(logits, y.to(device))
            torch.testing.assert_close(loss, F.cross_entropy(logits, y.to(device)))
            if step == 1 and device == "cpu":  # reported at the first wrong step
                assert [w for w in caught if "do not continue" in str(w.message)]
            if device == "cuda":
                torch.cuda.synchronize()
    (warning,) = (w for w in caught if "do not continue" in str(w.message))
    stats = criterion.stats()
    assert stats.matched == 0 and stats.mismatched > 0
    assert warning.filename == __file__


def test_first_call_is_cross_entropy_and_the_second_distils(
    backend_device: tuple[str, str],
) -> None:
    backend, device = backend_device
    criterion = DLBLoss(2.0, 0.5, backend=backend)
    (z1, y1, _), (z2, y2, _) = chain(4, 2, device=device)
    torch.testing.assert_close(criterion(z1, y1), F.cross_entropy(z1, y1))
    assert criterion.parts.kl == 0
    want = dlb_loss_naive(z2, y2, z1.detach(), temperature=2.0, alpha=0.5)
    torch.testing.assert_close(criterion(z2, y2), want)
    assert criterion.parts.kl > 0 and criterion.parts.kl_count == 4


def test_the_cache_is_a_copy(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    (z1, y1, _), (z2, y2, _) = chain(4, 2, device=device)
    criterion(z1, y1)
    want = dlb_loss_naive(z2, y2, z1.detach().clone())
    with torch.no_grad():
        z1.zero_()
        y1.zero_()
    torch.testing.assert_close(criterion(z2, y2), want)


def test_keep_view_finds_a_change() -> None:
    criterion = DLBLoss(keep="view")
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    want = dlb_loss_naive(z2, y2, z1.detach())
    torch.testing.assert_close(criterion(z2, y2), want)
    with torch.no_grad():
        z2.mul_(2)
    with pytest.raises(RuntimeError, match="keep='view' holds as teacher were modified in place"):
        criterion(z2, y2)


def test_two_forwards_then_both_backwards(backend_device: tuple[str, str]) -> None:
    """The second forward must not overwrite what the first one's backward reads."""
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    batches = chain(4, 4, device=device)
    losses = [criterion(z, y) for z, y, _ in batches]
    for k in (1, 2, 3):
        z, y, _ = batches[k]
        last = batches[k - 1][0].detach()[0 if k == 1 else 4 :]
        (got,) = torch.autograd.grad(losses[k], z, torch.full_like(losses[k], 2.0))
        (want,) = torch.autograd.grad(2 * dlb_loss_naive(z, y, last), z)  # type: ignore[operator]
        torch.testing.assert_close(got, want)


def test_validation_cannot_touch_the_cache() -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    other, labels = batch(7, seed=9)
    for mode in ("eval", "no_grad", "inference", "constant"):
        criterion.train(mode != "eval")
        contexts = {"no_grad": torch.no_grad(), "inference": torch.inference_mode()}
        with contexts.get(mode, torch.enable_grad()):
            logits = other.detach() if mode == "constant" else other
            torch.testing.assert_close(criterion(logits, labels), F.cross_entropy(logits, labels))
        criterion.train()
    criterion(z2, y2)
    assert criterion.stats() == (4, 0, 0)


def test_rows_that_are_not_finite_never_teach(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    (z1, y1, _), (z2, y2, _) = chain(4, 2, device=device)
    with torch.no_grad():
        z1[0, 1], z1[1, 1], z1[2] = torch.nan, torch.inf, -torch.inf
    criterion(z1, y1)
    loss = criterion(z2, y2)
    loss.backward()
    want = dlb_loss_naive(
        z2[[3, 0, 1, 2, 4, 5, 6, 7]], y2[[3, 0, 1, 2, 4, 5, 6, 7]], z1.detach()[3:]
    )
    torch.testing.assert_close(loss, want)
    assert criterion.stats() == (1, 0, 3)
    assert z2.grad is not None and z2.grad.isfinite().all()


def test_one_wrong_label_drops_the_step(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    criterion = DLBLoss(backend=backend, normalizer=(8.0, 4.0))
    (z1, y1, _), (z2, y2, _) = chain(4, 2, device=device)
    criterion(z1, y1)
    y2[2] = (y2[2] + 1) % 5
    with pytest.warns(RuntimeWarning, match="do not continue"):
        loss = criterion(z2, y2)
        assert criterion.stats() == (0, 1, 3)  # a GPU reports here
    torch.testing.assert_close(loss, F.cross_entropy(z2, y2, reduction="sum") / 8)
    (got,) = torch.autograd.grad(loss, z2, torch.full_like(loss, 2.0))
    (want,) = torch.autograd.grad(F.cross_entropy(z2, y2, reduction="sum") / 4, z2)
    torch.testing.assert_close(got, want)


def test_ids_permuted_and_missing(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    (z1, y1, i1), (z2, y2, i2) = chain(4, 2, device=device)
    criterion(z1, y1, i1)
    order = torch.tensor([2, 0, 3, 1])
    y2[:4], i2[:4] = y2[order.to(device)], i2[order.to(device)]
    i2[1] = 1000  # unknown
    loss = criterion(z2, y2, i2)
    keep = [0, 2, 3]
    rows = [*keep, 1, 4, 5, 6, 7]
    want = dlb_loss_naive(z2[rows], y2[rows], z1.detach()[order[keep].to(device)])
    torch.testing.assert_close(loss, want)
    assert criterion.stats() == (3, 1, 0)
    (got,) = torch.autograd.grad(loss, z2, torch.full_like(loss, 2.0))
    (gradient,) = torch.autograd.grad(want, z2)  # type: ignore[arg-type]
    torch.testing.assert_close(got, 2 * gradient)


def test_ids_of_other_samples_warn() -> None:
    criterion = DLBLoss()
    z, y = batch(8)
    criterion(z[:4], y[:4], torch.arange(4))
    with pytest.warns(RuntimeWarning, match="do not continue the last batch"):
        criterion(z, y, torch.arange(100, 108))


def test_overlap_is_told() -> None:
    criterion = DLBLoss()
    z, y = batch(8)
    criterion(z, y, overlap=4)  # nothing cached yet: rows [4:] are fresh all the same
    labels = torch.cat((y[4:6], y[:4]))
    want = dlb_loss_naive(z[:6], labels, z.detach()[4:6])
    torch.testing.assert_close(criterion(z[:6], labels, overlap=2), want)
    torch.testing.assert_close(criterion(z, y, overlap=0), F.cross_entropy(z, y))
    for bad in (-1, 9, 1.0, True):
        with pytest.raises(ValueError, match="overlap must be an int from 0 to 8"):
            criterion(z, y, overlap=bad)  # type: ignore[arg-type]


def test_a_batch_smaller_than_its_overlap_changes_nothing() -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    with pytest.raises(ValueError, match=r"smaller than its overlap: it has 3 rows, but 4 rows"):
        criterion(z2[:3], y2[:3])
    criterion(z2, y2)
    assert criterion.stats() == (4, 0, 0)


def test_ids_of_wrong_length() -> None:
    z, y = batch(4)
    with pytest.raises(ValueError, match=re.escape("ids must have shape (4,), one for each row")):
        DLBLoss()(z, y, torch.arange(3))
    with pytest.raises(TypeError, match="ids must be an int64 tensor, got float32"):
        DLBLoss()(z, y, torch.arange(4).float())


def test_commit_later() -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1, y1)
    first = criterion(z2, y2, commit=False)
    torch.testing.assert_close(criterion(z2, y2, commit=False), first)  # the same teacher again
    criterion.commit()
    assert torch.equal(criterion._caches[0].logits, z2.detach()[4:])  # type: ignore[union-attr]


def test_commit_later_is_refused_where_it_has_no_meaning() -> None:
    z, y = batch(4)
    for options in ({"lag": 2}, {"capturable": True}):
        with pytest.raises(ValueError, match="commit=False needs lag=1 and capturable=False"):
            DLBLoss(**options)(z, y, commit=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_backward_is_refused(reentrant: bool) -> None:
    """Activation checkpointing would call the criterion again, when its cache has moved on."""
    criterion, net = DLBLoss(), nn.Linear(3, 5)
    x, y = torch.randn(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = checkpoint(lambda x: criterion(net(x), y), x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="DLBLoss was called inside backward"):
            loss.backward()


def test_temperature_for_each_row() -> None:
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    tau, alpha = torch.rand(4) + 1, torch.rand(4)
    criterion = DLBLoss(temperature=tau)
    criterion(z1, y1)
    want = dlb_loss(z2, y2, z1.detach(), temperature=tau, alpha=alpha)
    torch.testing.assert_close(criterion(z2, y2, alpha=alpha), want)
    criterion.eval()
    torch.testing.assert_close(criterion(z2, y2), F.cross_entropy(z2, y2))
    criterion.train().reset()
    criterion(z2, y2, overlap=4, alpha=alpha)  # nothing cached yet
    with pytest.raises(ValueError, match=r"of shape \(4,\), one for each overlap row"):
        criterion(z2, torch.cat((y2[4:], y2[:4])), alpha=torch.ones(3))


def test_a_copy_of_keep_view_owns_its_cache() -> None:
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion = DLBLoss(keep="view")
    criterion(z1, y1)
    other, state = copy.deepcopy(criterion), criterion.state_dict()
    want = dlb_loss_naive(z2, y2, z1.detach().clone())
    with torch.no_grad():
        z1.zero_()
    torch.testing.assert_close(other(z2, y2), want)
    loaded = DLBLoss()
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded(z2, y2), want)


def test_lag_takes_the_teacher_of_several_calls_ago() -> None:
    criterion = DLBLoss(lag=2)
    batches = [batch(4, seed=s) for s in range(4)]
    fresh = [(z[:4], y[:4]) for z, y in batches]
    for z, y in fresh[:2]:
        torch.testing.assert_close(criterion(z, y), F.cross_entropy(z, y))
    for k in (2, 3):
        z = torch.cat((torch.randn(4, 5), fresh[k][0])).detach().requires_grad_()
        y = torch.cat((fresh[k - 2][1], fresh[k][1]))
        want = dlb_loss_naive(z, y, fresh[k - 2][0].detach())
        torch.testing.assert_close(criterion(z, y), want)
    assert criterion.stats() == (8, 0, 0)


def test_a_chain_that_begins_anew_without_reset_recovers() -> None:
    """carry_over=False, and criterion.reset() forgotten: one batch is lost, not the run."""
    criterion = DLBLoss()
    for z, y, _ in chain(4, 3):
        criterion(z, y)
    batches = chain(4, 3)
    z, y, _ = batches[0]
    with pytest.warns(RuntimeWarning, match="do not continue"):
        criterion(z, (y + 1) % 5)
    for z, y, _ in batches[1:]:
        criterion(z, (y + 1) % 5)
    assert criterion.stats()[0] == 8 + 8


def test_reset_begins_a_new_chain() -> None:
    criterion = DLBLoss()
    z, y = batch(4)
    criterion(z, y)
    criterion.reset()
    torch.testing.assert_close(criterion(z[:2], y[:2]), F.cross_entropy(z[:2], y[:2]))
    assert criterion.stats() == (0, 0, 0)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_the_chain_goes_on_in_a_copy(how: str) -> None:
    batches = chain(4, 3)
    criterion = DLBLoss()
    for z, y, ids in batches[:2]:
        criterion(z, y, ids)
    if how == "deepcopy":
        other = copy.deepcopy(criterion)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(criterion))
    else:
        other = DLBLoss()
        other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    z, y, ids = batches[2]
    assert torch.equal(other(z, y, ids), criterion(z, y, ids))
    assert other.parts.kl > 0


def test_state_survives_a_file(tmp_path: Any) -> None:
    criterion = DLBLoss()
    batches = chain(4, 2)
    criterion(*batches[0])
    torch.save(criterion.state_dict(), tmp_path / "state.pt")
    other = DLBLoss()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(*batches[1]), criterion(*batches[1]))


def damage(state: dict[str, Any], where: str) -> Any:
    if where == "not a dict":
        return 3
    if where == "key missing":
        del state["world"]
    elif where == "format":
        state["format"] = 99
    elif where == "rank":
        state["rank"] = "0"
    elif where == "too many":
        state["caches"] *= 2
    elif where == "cache":
        state["caches"] = [3]
    elif where == "rank of logits":
        state["caches"][0]["logits"] = torch.zeros(4)
    elif where == "labels":
        state["caches"][0]["labels"] = torch.zeros(3, dtype=torch.int64)
    elif where == "valid":
        state["caches"][0]["valid"] = torch.zeros(4)
    elif where == "no lag":
        state |= {"lag": 0, "caches": []}
    elif where == "calls":
        state["calls"] = -1
    elif where == "sequences":  # 4 tokens are not 3 of one length
        state["caches"][0]["labels"] = torch.zeros(3, 1, dtype=torch.int64)
    return state


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("not a dict", "malformed DLBLoss state: expected a dict of"),
        ("key missing", "malformed DLBLoss state: expected a dict of"),
        ("format", "DLBLoss state has format 99, this version reads 1"),
        ("rank", "malformed DLBLoss state: rank must be an int, got '0'"),
        ("too many", "malformed DLBLoss state: more than lag=1 caches"),
        ("cache", "malformed DLBLoss state: a cache must be None or a dict of"),
        ("rank of logits", "logits must be a floating point tensor (n, C)"),
        ("labels", "labels must be a tensor (4,) of int64"),
        ("valid", "valid must be a tensor (4,) of uint8"),
        ("no lag", "malformed DLBLoss state: lag must be >= 1, and calls >= 0"),
        ("calls", "malformed DLBLoss state: lag must be >= 1, and calls >= 0"),
        ("sequences", "labels must be a tensor (4,) of int64"),
    ],
)
def test_a_malformed_state_is_refused_and_changes_nothing(where: str, message: str) -> None:
    criterion = DLBLoss()
    batches = chain(4, 2)
    criterion(*batches[0])
    state = damage(copy.deepcopy(criterion.get_extra_state()), where)
    with pytest.raises(ValueError, match=re.escape(message)):
        criterion.set_extra_state(state)
    criterion(*batches[1])
    assert criterion.stats() == (4, 0, 0)


def test_a_state_of_another_run_is_dropped_with_a_warning() -> None:
    criterion = DLBLoss()
    batches = chain(4, 2)
    criterion(*batches[0])
    state = criterion.get_extra_state()
    other_rank = DLBLoss()
    other_rank.set_extra_state({**state, "rank": 1, "world": 2})
    with pytest.warns(RuntimeWarning, match="drops its cache: it was written by rank 1 of 2"):
        other_rank(*batches[0])
    smaller = DLBLoss()
    smaller.set_extra_state(state)
    with pytest.warns(RuntimeWarning, match="it has more rows than the 3 of this batch"):
        smaller(*(x[:3] for x in batches[0]))
    with pytest.warns(RuntimeWarning, match="it was written with lag=1, this is lag=2"):
        DLBLoss(lag=2).set_extra_state(state)
    with pytest.warns(RuntimeWarning, match="drops its cache: it has 5 classes, logits have 6"):
        z, y = batch(8, C=6)
        torch.testing.assert_close(criterion(z, y), F.cross_entropy(z, y))


def test_weight_moves_with_the_module_and_the_cache_is_no_buffer() -> None:
    criterion = DLBLoss(weight=torch.ones(5))
    criterion(*batch(4))
    assert [name for name, _ in criterion.named_buffers()] == ["weight"]
    assert criterion.double().weight.dtype == torch.float64  # type: ignore[union-attr]
    z, y = batch(8)
    criterion.reset()
    criterion(z[:4].double(), y[:4])


def test_the_precision_may_change_between_calls() -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    criterion(z1.bfloat16(), y1)
    want = dlb_loss_naive(z2.double(), y2, z1.detach().bfloat16().double())
    torch.testing.assert_close(criterion(z2.double(), y2), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "ref"}, "keep must be 'copy' or 'view', got 'ref'"),
        ({"lag": 0}, "lag must be an int >= 1, got 0"),
        ({"inplace": True, "keep": "view"}, "overwrites the logits that keep='view' would keep"),
        ({"capturable": True, "lag": 2}, "capturable=True needs keep='copy' and lag=1"),
        ({"backend": "x"}, "backend must be one of"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"alpha": -1}, "alpha must be finite and >= 0, got -1"),
        ({"label_smoothing": 9}, "label_smoothing must be in [0, 1], got 9"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DLBLoss(**options)


def test_parts_before_the_first_call() -> None:
    with pytest.raises(RuntimeError, match="there was no call yet"):
        DLBLoss().parts  # noqa: B018


def test_inplace_keeps_the_cache(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    plain, inplace = DLBLoss(backend=backend), DLBLoss(backend=backend, inplace=True)
    for z, y, _ in chain(4, 3, device=device):
        want = plain(z, y)
        (gradient,) = torch.autograd.grad(want, z)
        got = inplace(z * 1, y)
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, z)[0], gradient)


@pytest.mark.parametrize(
    "backend_device", [f"{b}-{d}" for b in WITH_PAIR for d in DEVICES], indirect=True
)
class TestCapturable:
    """The cache whose parity lives on the device; a captured graph replays just this."""

    @pytest.fixture
    def backend(self, backend_device: tuple[str, str]) -> tuple[str, str]:
        return backend_device

    def test_equals_the_ordinary_cache(self, backend: tuple[str, str]) -> None:
        name, device = backend
        static, plain = DLBLoss(capturable=True, backend=name), DLBLoss(backend=name)
        for z, y, _ in chain(4, 6, device=device):
            want = plain(z, y)
            got = static(z, y)
            assert torch.equal(got, want)
            upstream = torch.full_like(got, 2.0)
            (a,) = torch.autograd.grad(got, z, upstream)
            (b,) = torch.autograd.grad(want, z, upstream)
            assert torch.equal(a, b)
        assert static.stats() == plain.stats() == (20, 0, 0)

    def test_resumes(self, backend: tuple[str, str]) -> None:
        name, device = backend
        batches = chain(4, 4, device=device)
        static = DLBLoss(capturable=True, backend=name)
        for z, y, _ in batches[:3]:
            static(z, y)
        other = DLBLoss(capturable=True, backend=name)
        other.load_state_dict(static.state_dict())
        z, y, _ = batches[3]
        assert torch.equal(other(z, y), static(z, y)) and other.parts.kl > 0

    def test_two_forwards_are_refused_not_wrong(self, backend: tuple[str, str]) -> None:
        name, device = backend
        static = DLBLoss(capturable=True, backend=name)
        losses = [static(z, y) for z, y, _ in chain(4, 3, device=device)]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[1].backward()

    def test_reset_before_backward_is_refused_not_wrong(self, backend: tuple[str, str]) -> None:
        name, device = backend
        static = DLBLoss(capturable=True, backend=name)
        losses = [static(z, y) for z, y, _ in chain(4, 2, device=device)]
        static.reset()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (losses[1] * 2).backward()

    def test_another_size_is_refused(self, backend: tuple[str, str]) -> None:
        name, device = backend
        static = DLBLoss(capturable=True, backend=name)
        (z1, y1, ids), (z2, y2, _) = chain(4, 2, device=device)
        static(z1, y1)
        with pytest.raises(ValueError, match="needs 4 fresh rows of 5 classes"):
            static(z2[:7], y2[:7])
        with pytest.raises(ValueError, match="takes no ids"):
            static(z1, y1, ids)


def test_capturable_on_another_backend_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"capturable=True needs one of the backends \('cuda', 'triton'"
    ):
        DLBLoss(capturable=True, backend="eager")(*batch(4))
