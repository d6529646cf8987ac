"""distill=: rows that neither learn nor teach, such as mixed ones."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_criterion import chain
from torch import Tensor

from dlb_fused import DLBLoss
from dlb_fused.reference import dlb_loss_naive

MASK = [True, False, True, True, True, True, False, True]


def distilled(z: Tensor, y: Tensor, last: Tensor, rows: list[int]) -> Tensor:
    """Cross-entropy of all, KL of these rows of the overlap."""
    order = [*rows, *(i for i in range(len(z)) if i not in rows)]
    return dlb_loss_naive(z[order], y[order], last[rows])


def test_masked_rows_neither_learn_nor_teach(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    mask = torch.tensor(MASK, device=device)
    (z1, y1, _), (z2, y2, _), (z3, y3, _) = chain(4, 3, device=device)
    criterion = DLBLoss(backend=backend)
    criterion(z1, y1)
    second = criterion(z2, y2, distill=mask)
    want = distilled(z2, y2, z1.detach(), [0, 2, 3])
    torch.testing.assert_close(second, want)
    (got,) = torch.autograd.grad(second, z2, torch.full_like(second, 2.0))
    torch.testing.assert_close(got, 2 * torch.autograd.grad(want, z2)[0])
    assert criterion.stats() == (3, 0, 1)
    third = criterion(z3, y3)  # row 6 of the second batch was masked: row 2 has no teacher
    torch.testing.assert_close(third, distilled(z3, y3, z2.detach()[4:], [0, 1, 3]))
    assert criterion.stats() == (6, 0, 2)


def test_a_masked_row_of_another_label_does_not_break_the_chain(
    backend_device: tuple[str, str],
) -> None:
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    (z1, y1, _), (z2, y2, _) = chain(4, 2, device=device)
    criterion(z1, y1)
    y2[1] = (y2[1] + 1) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loss = criterion(z2, y2, distill=torch.tensor(MASK, device=device))
    torch.testing.assert_close(loss, distilled(z2, y2, z1.detach(), [0, 2, 3]))


def test_with_ids_permuted_twice_and_missing(backend_device: tuple[str, str]) -> None:
    """Of two rows that are one sample, only the masked one is left out."""
    backend, device = backend_device
    criterion = DLBLoss(backend=backend)
    (z1, y1, i1), (z2, y2, i2) = chain(4, 2, device=device)
    criterion(z1, y1, i1)
    order = torch.tensor([2, 2, 0, 3], device=device)
    y2[:4], i2[:4] = y1[order], i1[order]
    i2[3] = 1000  # nobody's
    mask = torch.tensor([False, True, True, True] * 2, device=device)
    loss = criterion(z2, y2, i2, distill=mask)
    rows = [1, 2]
    order_all = [*rows, 0, 3, 4, 5, 6, 7]
    want = dlb_loss_naive(z2[order_all], y2[order_all], z1.detach()[order[rows]])
    torch.testing.assert_close(loss, want)
    assert criterion.stats() == (2, 1, 1)


@pytest.mark.parametrize("options", [{"keep": "view"}, {"lag": 2}], ids=str)
def test_with_other_caches(options: dict[str, Any]) -> None:
    lag = options.get("lag", 1)
    batches = chain(4, 2)
    criterion = DLBLoss(**options)
    (z1, y1, _), (z2, y2, _) = batches
    mask = torch.tensor([True, True, False, True])
    for _ in range(lag):
        criterion(z1, y1, distill=mask)
    loss = criterion(z2, y2, distill=torch.tensor(MASK))
    torch.testing.assert_close(loss, distilled(z2, y2, z1.detach(), [0, 3]))
    assert criterion.stats() == (2, 0, 2)


def test_a_batch_that_is_masked_whole_is_cross_entropy() -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _), (z3, y3, _) = chain(4, 3)
    criterion(z1, y1)
    torch.testing.assert_close(
        criterion(z2, y2, distill=torch.zeros(8, dtype=torch.bool)), F.cross_entropy(z2, y2)
    )
    torch.testing.assert_close(criterion(z3, y3), F.cross_entropy(z3, y3))
    assert criterion.stats() == (0, 0, 8)


def test_a_mask_is_part_of_a_compiled_step() -> None:
    torch.compiler.reset()
    eager, compiled = DLBLoss(), DLBLoss()
    step = torch.compile(
        lambda z, y, ids, mask: compiled(z, y, ids, distill=mask), fullgraph=True, backend="eager"
    )
    for z, y, ids in chain(4, 4):
        mask = torch.tensor(MASK)[: len(z)]
        torch.testing.assert_close(step(z, y, ids, mask), eager(z, y, ids, distill=mask))
    assert compiled.stats() == eager.stats() and eager.stats().skipped > 0


@pytest.mark.parametrize(
    ("distill", "error", "message"),
    [
        ([True] * 4, TypeError, "distill must be a bool tensor, got list"),
        (torch.ones(4), TypeError, "distill must be a bool tensor, got float32"),
        (torch.ones(3).bool(), ValueError, "distill must have shape (4,), one for each row of"),
        (torch.ones(4, device="meta").bool(), ValueError, "distill must be on cpu like logits"),
    ],
)
def test_a_bad_mask(distill: Any, error: type[Exception], message: str) -> None:
    criterion = DLBLoss()
    (z1, y1, _), (z2, y2, _) = chain(4, 2)
    with pytest.raises(error, match=re.escape(message)):
        criterion(z1, y1, distill=distill)
    torch.testing.assert_close(criterion(z1, y1), F.cross_entropy(z1, y1))  # nothing was cached
    criterion(z2, y2)


def test_static_buffers_take_no_mask() -> None:
    z, y, _ = chain(4, 1)[0]
    criterion = DLBLoss(capturable=True, backend="cuda")
    with pytest.raises(ValueError, match="capturable=True keeps the validity of rows by itself"):
        criterion(z, y, distill=torch.ones(4, dtype=torch.bool))
