"""Mixed precision: autocast and GradScaler, with steps that overflow and are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, relative_error
from test_criterion import chain
from torch import Tensor, nn

from dlb_fused import DLBLoss, dlb_loss

HALF = [torch.bfloat16, torch.float16]
SCALE = 65536.0


def eager(z: Tensor, y: Tensor, last: Tensor) -> Tensor:
    """What one writes under autocast, which on a CPU keeps the softmax in 16 bits."""
    m = len(last)
    kl = F.kl_div(F.log_softmax(z[:m] / 3.0, 1), F.softmax(last / 3.0, 1), reduction="batchmean")
    return F.cross_entropy(z, y) + 9.0 * kl


def scaled_gradients(
    z: Tensor, y: Tensor, last: Tensor, dtype: torch.dtype, scaler: torch.amp.GradScaler
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits, by `dlb_loss`, by eager operations and in fp64."""
    gradients = []
    for loss_of in (dlb_loss, eager):
        leaf = z.detach().requires_grad_()
        with torch.autocast("cpu", dtype):
            loss: Any = loss_of(leaf, y, last)
        scaler.scale(loss).backward()
        gradients.append(leaf.grad)
    exact = z.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(exact, y, last.double()) * scaler.get_scale(), exact)
    return *gradients, truth  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("C", [10, 1000])
def test_gradients_under_the_scaler_are_no_worse_than_eager(dtype: torch.dtype, C: int) -> None:
    x = Case("", B=64, C=C, m=32, dtype=dtype).make()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE / 64)
    ours, stock, truth = scaled_gradients(x.logits, x.labels, x.last_logits, dtype, scaler)
    assert ours.dtype == dtype and ours.isfinite().all()
    error = relative_error(ours, truth)
    assert error <= relative_error(stock, truth)
    assert error < (2e-3 if dtype == torch.bfloat16 else 3e-4)


def test_fp16_at_the_size_of_a_vocabulary() -> None:
    """8192 x 32000 at a scale of 65536: nothing flushes to zero. 10 s on 2 cores, and 2 GB: the
    truth is made of 128 rows at a time, in fp64."""
    B, C, m = 8192, 32000, 4096
    g = torch.Generator().manual_seed(0)
    z, last = torch.empty(B, C, dtype=torch.float16), torch.empty(m, C, dtype=torch.float16)
    for rows in (*z.split(128), *last.split(128)):
        rows.copy_(torch.randn(rows.shape, generator=g) * 2)
    y = torch.randint(0, C, (B,), generator=g)
    loss: Any = dlb_loss(z.requires_grad_(), y, last)
    (got,) = torch.autograd.grad(loss, z, torch.full_like(loss, SCALE))
    wrong = size = 0.0
    for k, rows in enumerate(z.detach().split(128)):
        exact, labels = rows.double(), y[128 * k : 128 * (k + 1)]
        want = exact.softmax(1)
        want[torch.arange(128), labels] -= 1
        want /= B
        if 128 * k < m:
            teacher = last[128 * k : 128 * (k + 1)].double()
            want += 3 / m * ((exact / 3).softmax(1) - (teacher / 3).softmax(1))
        want *= SCALE
        wrong += float((got[128 * k : 128 * (k + 1)].double() - want).square().sum())
        size += float(want.square().sum())
    assert (wrong / size) ** 0.5 < 3e-4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_nothing_of_the_loss(dtype: torch.dtype) -> None:
    """The kernel computes in fp32 whatever autocast says; only the logits are in 16 bits."""
    net = nn.Linear(6, 5)
    inside, outside = DLBLoss(), DLBLoss()
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(4 if step == 0 else 8, 6, generator=g), torch.zeros(8, dtype=torch.int64)
        with torch.autocast("cpu", dtype):
            z = net(x)
            a = inside(z, y[: len(x)])
        b = outside(z, y[: len(x)])
        assert z.dtype == dtype and a.dtype == torch.float32 and torch.equal(a, b)
    assert inside.parts.kl > 0


def test_a_step_that_overflows_is_skipped_and_the_chain_goes_on() -> None:
    """The scale is too large for fp16: the scaler skips the steps and backs off, until it fits.
    The logits were finite, so that each step distils, also the one after a skipped step."""
    torch.manual_seed(0)
    net = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    criterion = DLBLoss()
    x, y = torch.randn(40, 6), torch.randint(0, 5, (40,))
    skipped, kl_counts = [], []
    for step in range(12):
        rows = slice(max(0, 3 * step - 3), 3 * step + 3)
        with torch.autocast("cpu", torch.float16):
            loss = criterion(net(x[rows]), y[rows])
        before, scale = net.weight.detach().clone(), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
        assert torch.equal(net.weight, before) == skipped[-1]
        kl_counts.append(int(criterion.parts.kl_count))
    assert skipped[0] and not skipped[-1] and sorted(skipped, reverse=True) == skipped
    assert kl_counts == [0] + [3] * 11
    assert criterion.stats().skipped == 0


def test_logits_that_overflow_never_teach() -> None:
    """fp16 logits of inf: that step is skipped by the scaler, and its rows teach nobody."""
    torch.manual_seed(0)
    net = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    criterion = DLBLoss()
    x, y = torch.randn(12, 6), torch.randint(0, 5, (12,))
    kl_counts = []
    for step in range(3):
        rows = slice(max(0, 3 * step - 3), 3 * step + 3)
        inputs = x[rows].clone()
        if step == 1:
            inputs[-2:] *= 1e6  # two fresh rows
        before = net.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            logits = net(inputs)
            loss = criterion(logits, y[rows])
        assert logits.isfinite().all() == (step != 1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.weight, before) == (step == 1)
        kl_counts.append(int(criterion.parts.kl_count))
    assert kl_counts == [0, 3, 1]
    assert criterion.stats() == (4, 0, 2) and loss.isfinite()


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_a_scale_that_is_told_is_stored_with_the_gradient(scale: float) -> None:
    """grad_scale as a tensor, which the scaler's may fill."""
    told = torch.tensor(scale)
    plain, knowing = DLBLoss(), DLBLoss(grad_scale=told)
    for z, y, _ in chain(4, 3, C=100):
        z = z.detach().half().requires_grad_()
        (a,) = torch.autograd.grad(plain(z, y), z, torch.tensor(scale))
        (b,) = torch.autograd.grad(knowing(z, y), z, torch.tensor(scale))
        assert relative_error(b, a.double()) < 1e-3
