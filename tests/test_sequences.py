"""Language models: logits (B, T, C), labels (B, T), against a plain loop over sequences."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor

from dlb_fused import DLBLoss, dlb_loss

C = 11
MASKED = 3  # of the vocabulary, with -inf


class Step(NamedTuple):
    logits: Tensor  # (B, T, C)
    labels: Tensor  # (B, T), -100 where padded
    ids: Tensor  # (B,)


def steps(count: int, n: int = 3, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A right chain of sequences of 1 to 6 valid tokens. Each batch is padded to a length of its
    own, now left, now right, and some sequences have holes (a prompt between two answers)."""
    g = torch.Generator().manual_seed(count)
    tokens = [
        torch.randint(0, C - MASKED, (int(k),), generator=g)
        for k in torch.randint(1, 7, (n * count,), generator=g)
    ]
    made = []
    for k in range(count):
        T = 7 + k % 3
        rows = range(max(0, k - 1) * n, (k + 1) * n)
        labels = torch.full((len(rows), T), -100)
        for i, row in enumerate(rows):
            own = tokens[row]
            at = torch.randperm(T, generator=g)[: len(own)].sort().values  # the holes
            if (row + k) % 3:
                at = torch.arange(len(own)) + (T - len(own) if k % 2 else 0)
            labels[i, at] = own
        logits = torch.randn(len(rows), T, C, generator=g) * 2
        logits[..., -MASKED:] = -torch.inf
        made.append(
            Step(
                logits.to(device, dtype).requires_grad_(),
                labels.to(device),
                torch.tensor(list(rows), device=device),
            )
        )
    return made


def plain_loop(step: Step, last: Step | None, taught: dict[int, int]) -> Tensor:
    """In fp64; taught: which sequence of `last` teaches which of this step."""
    z = step.logits.double().flatten(0, 1)
    loss = F.cross_entropy(z, step.labels.flatten())
    kl, count = z.new_zeros(()), 0
    for i, j in taught.items():
        assert last is not None
        own = step.logits[i][step.labels[i] != -100].double()[:, :-MASKED]
        teacher = last.logits[j][last.labels[j] != -100].detach().double()[:, :-MASKED]
        q = F.softmax(teacher / 3, 1)
        kl = kl + F.kl_div(F.log_softmax(own / 3, 1), q, reduction="sum")
        count += len(own)
    return loss + 9 * kl / count if count else loss


def check(loss: Tensor, step: Step, want: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    (got,) = torch.autograd.grad(loss, step.logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(want, step.logits)
    assert relative_error(got, gradient.double()) < tolerance


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("keep", ["copy", "view"])
def test_teachers_are_found_by_valid_token(
    with_ids: bool, keep: str, backend_device: tuple[str, str]
) -> None:
    backend, device = backend_device
    chain = steps(5, device=device)
    criterion = DLBLoss(backend=backend, keep=keep)
    last, valid = None, 0
    for step in chain:
        ids = step.ids if with_ids else None
        loss = criterion(step.logits, step.labels, ids)
        first = 0 if last is None else len(last.labels) - 3
        check(loss, step, plain_loop(step, last, {i: first + i for i in range(3) if last}))
        valid += 0 if last is None else int((step.labels[:3] != -100).sum())
        last = step
    padding = sum(int((step.labels[:3] == -100).sum()) for step in chain[1:])
    assert criterion.stats() == (valid, 0, padding)


def test_permuted_missing_and_gated_sequences() -> None:
    first, second = steps(2)
    order = [2, 0, 1, 3, 4, 5]
    second = Step(second.logits.detach()[order].requires_grad_(), second.labels[order], second.ids)
    ids = torch.tensor([2, 100, 1, 3, 4, 5])
    gate = torch.tensor([True, True, False, True, False, True])
    criterion = DLBLoss()
    criterion(first.logits, first.labels, first.ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing sequence is no broken chain
        loss = criterion(second.logits, second.labels, ids, distill=gate)
    check(loss, second, plain_loop(second, first, {0: 2}))
    valid = (second.labels != -100).sum(1)
    rest = second.labels[:3].numel() - int(valid[0]) - int(valid[1])
    assert criterion.stats() == (int(valid[0]), int(valid[1]), rest)
    # The gated sequence 4 does not teach the next step either.
    labels = F.pad(second.labels[3:], (2, 0), value=-100)
    criterion(torch.randn(*labels.shape, C, requires_grad=True), labels, ids[3:])
    assert criterion.parts.kl_count == valid[3] + valid[5]


@pytest.mark.parametrize("fault", ["another token", "truncated", "longer"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_sequence_that_is_another_one_is_found(fault: str, with_ids: bool) -> None:
    """Without ids the chain is broken, and the step has no KL; with them only that sequence."""
    first, second = steps(2)
    labels = second.labels.clone()
    at = int((labels[1] != -100).nonzero()[-1])
    free = int((labels[1] == -100).nonzero()[-1])
    if fault == "longer":
        labels[1, free] = 0
    else:
        labels[1, at] = -100 if fault == "truncated" else (labels[1, at] + 1) % (C - MASKED)
    second = second._replace(labels=labels)
    criterion = DLBLoss()
    criterion(first.logits, first.labels, first.ids if with_ids else None)
    given = (second.logits, labels, second.ids if with_ids else None)
    if with_ids:
        loss = criterion(*given)
    else:
        with pytest.warns(RuntimeWarning, match="do not continue the last batch"):
            loss = criterion(*given)
    check(loss, second, plain_loop(second, first, {0: 0, 2: 2} if with_ids else {}))
    valid = (labels[:3] != -100).sum(1).tolist()
    matched = valid[0] + valid[2] if with_ids else 0
    assert criterion.stats()[:2] == (matched, valid[1])
    assert sum(criterion.stats()) == labels[:3].numel()


def test_rows_that_are_not_finite_never_teach() -> None:
    first, second = steps(2)
    with torch.no_grad():
        first.logits[1] = torch.nan
    criterion = DLBLoss()
    criterion(first.logits, first.labels)
    loss = criterion(second.logits, second.labels)
    check(loss, second, plain_loop(second, first, {0: 0, 2: 2}))


def test_lag_and_commit() -> None:
    a, b = steps(2)
    c = steps(3)[0]
    delayed = DLBLoss(lag=2)
    delayed(a.logits, a.labels)
    delayed(c.logits, c.labels)
    check(delayed(b.logits, b.labels), b, plain_loop(b, a, {i: i for i in range(3)}))
    two_pass = DLBLoss()
    two_pass(a.logits, a.labels)
    for _ in range(2):
        loss = two_pass(b.logits, b.labels, commit=False)
        check(loss, b, plain_loop(b, a, {i: i for i in range(3)}))
    two_pass.commit()
    assert two_pass._caches[0].labels.shape == (3, b.labels.shape[1])  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_the_chain_goes_on_in_a_copy(how: str) -> None:
    chain = steps(3)
    criterion, other = DLBLoss(), DLBLoss()
    for step in chain[:2]:
        criterion(*step)
    if how == "deepcopy":
        other = copy.deepcopy(criterion)
    else:
        other.load_state_dict(copy.deepcopy(criterion.state_dict()))
    assert torch.equal(other(*chain[2]), criterion(*chain[2])) and other.parts.kl > 0


@pytest.mark.parametrize("name", ["labels", "ids"])
def test_a_malformed_state(name: str) -> None:
    criterion = DLBLoss()
    criterion(*steps(1)[0])
    state = criterion.get_extra_state()
    state["caches"][0][name] = state["caches"][0][name][..., :-1]
    with pytest.raises(ValueError, match=f"malformed DLBLoss state: {name} must be a tensor"):
        criterion.set_extra_state(state)


def test_rows_after_sequences_begin_a_new_chain() -> None:
    criterion = DLBLoss()
    criterion(*steps(1)[0])
    z, y = torch.randn(8, C, requires_grad=True), torch.zeros(8, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match=r"it is of logits \(B, T, C\), these are \(B, C\)"):
        torch.testing.assert_close(criterion(z, y), F.cross_entropy(z, y))


def test_one_temperature_a_sequence() -> None:
    first, second = steps(2)
    tau = torch.tensor([1.0, 2.0, 4.0])
    criterion = DLBLoss(temperature=tau)
    criterion(first.logits, first.labels)
    got = criterion(second.logits, second.labels)
    want = F.cross_entropy(second.logits.flatten(0, 1), second.labels.flatten()).double()
    count = (second.labels[:3] != -100).sum()
    for i in range(3):
        own = second.logits[i][second.labels[i] != -100].double()[:, :-MASKED] / tau[i]
        teacher = first.logits[i][first.labels[i] != -100].double()[:, :-MASKED] / tau[i]
        kl = F.kl_div(F.log_softmax(own, 1), teacher.softmax(1), reduction="sum")
        want = want + tau[i] ** 2 * kl / count
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"of shape \(3,\), one for each overlap sequence; got"):
        criterion(second.logits, second.labels, overlap=3, alpha=torch.ones(2))


def test_flattening_copies_nothing() -> None:
    z = torch.randn(3, 4, C)
    criterion = DLBLoss(keep="view")
    criterion(z.requires_grad_(), torch.zeros(3, 4, dtype=torch.int64))
    assert criterion._caches[0].logits.data_ptr() == z.data_ptr()  # type: ignore[union-attr]


def test_one_graph_under_compile() -> None:
    torch.compiler.reset()
    eager, compiled = DLBLoss(), DLBLoss()
    step = torch.compile(lambda z, y, ids: compiled(z, y, ids), fullgraph=True, backend="aot_eager")
    for given in steps(4):
        torch.testing.assert_close(step(*given), eager(*given))
    assert compiled.stats() == eager.stats() and eager.stats().matched > 0


def test_the_function_takes_a_teacher_of_the_same_length(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    g = torch.Generator().manual_seed(0)
    z, p = (torch.randn(n, 5, C, generator=g).to(device) for n in (4, 2))
    labels = torch.randint(0, C, (4, 5), generator=g).to(device)
    labels[:, :2] = -100
    z.requires_grad_()
    got = dlb_loss(z, labels, p, backend=backend)
    own = (z[:2, 2:].double() / 3).log_softmax(-1).flatten(0, 1)
    teacher = (p[:, 2:].double() / 3).softmax(-1).flatten(0, 1)
    want = F.cross_entropy(z.double().flatten(0, 1), labels.flatten())
    want = want + 9 * F.kl_div(own, teacher, reduction="batchmean")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


Z, Y = torch.randn(4, 5, C), torch.zeros(4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((Z, Y[:, :4]), "(B, T, C) with T > 0 for labels (B, T); got (4, 5, 11) and (4, 4)"),
        ((Z[:, :0], Y[:, :0]), "(B, T, C) with T > 0 for labels (B, T); got (4, 0, 11)"),
        ((Z[0], Y), "(B, T, C) with T > 0 for labels (B, T); got (5, 11) and (4, 5)"),
        ((Z[0], Z[0].long()), "got (5, 11) and (5, 11); probabilities must be floating point"),
        ((Z, Y, Z[:2, :3]), "last_logits must have shape (m, 5, C) for logits (4, 5, 11), got"),
        ((Z, Y, Z[0]), "last_logits must have shape (m, 5, C) for logits (4, 5, 11), got (5, 11)"),
    ],
)
def test_bad_shapes(given: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dlb_loss(*given)
    if len(given) == 2:
        with pytest.raises(ValueError, match=re.escape(message)):
            DLBLoss()(*given)


def test_ids_of_wrong_length_and_static_buffers() -> None:
    z = Z.clone().requires_grad_()
    with pytest.raises(ValueError, match=re.escape("ids must have shape (4,), one for each row")):
        DLBLoss()(z, Y, torch.arange(20))
    with pytest.raises(ValueError, match=re.escape("takes logits (B, C), got (B, T, C)")):
        DLBLoss(capturable=True, backend="cuda")(z, Y)


def test_what_has_no_meaning_for_sequences() -> None:
    z = Z.clone().requires_grad_()
    with pytest.raises(
        ValueError, match=re.escape("labels_b and lam go with labels of shape (B,)")
    ):
        DLBLoss()(z, Y, labels_b=Y, lam=0.5)
    with pytest.raises(ValueError, match=re.escape("distill_ignored=True takes logits (B, C)")):
        DLBLoss(distill_ignored=True)(z, Y)
