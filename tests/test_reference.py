"""The chain of proof: numbers worked by hand, stock PyTorch operations, the closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Case, truth

from dlb_fused import dlb_loss
from dlb_fused.reference import dlb_loss_naive


def test_numbers_worked_by_hand() -> None:
    """Two rows of three classes whose softmaxes are simple fractions; row 0 overlaps; τ = 1, α = 2.

    softmax(z_0) = (1/2, 1/4, 1/4), softmax(z_1) = (1/8, 3/8, 1/2), softmax(z'_0) = (1/4, 1/4, 1/2).
    """
    z = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 4.0]]).log().requires_grad_()
    last = torch.tensor([[1.0, 1.0, 2.0]]).log()
    ce = (math.log(2) + math.log(8 / 3)) / 2
    kl = 0.25 * math.log(1 / 2) + 0.5 * math.log(2)
    want = torch.tensor([[-0.25, 0.125, 0.125], [0.0625, -0.3125, 0.25]])  # (p - onehot) / 2
    want[0] += 2 * torch.tensor([0.25, 0.0, -0.25])  # α τ (s - q)
    for f in (dlb_loss_naive, dlb_loss):
        options = {} if f is dlb_loss_naive else {"backend": "eager"}
        loss = f(z, torch.tensor([0, 1]), last, temperature=1.0, alpha=2.0, **options)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(ce + 2 * kl, abs=1e-6)
        torch.testing.assert_close(gradient, want, rtol=0, atol=1e-6)


def test_temperature_enters_the_gradient_once() -> None:
    """α τ² KL has the gradient α τ (s - q) / m: the two classic mistakes are τ² and 1."""
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    last, y = torch.randn(4, 7, dtype=torch.float64), torch.randint(0, 7, (4,))
    for tau in (1.0, 3.0, 10.0):
        loss = dlb_loss(z, y, last, temperature=tau, alpha=0.5, backend="eager")
        (got,) = torch.autograd.grad(loss, z)  # type: ignore[arg-type]
        ce = (z.softmax(1) - F.one_hot(y, 7)) / 4
        kl = 0.5 * tau / 4 * ((z / tau).softmax(1) - (last / tau).softmax(1))
        torch.testing.assert_close(got, (ce + kl).detach())


def test_naive_is_the_truth_of_the_cases() -> None:
    x = Case("", dtype=torch.float64, options={"label_smoothing": 0.1, "temperature": 2.0}).make()
    torch.testing.assert_close(
        dlb_loss_naive(x.logits, x.labels, x.last_logits, **x.options), truth(x)[0]
    )


def test_without_teacher_it_is_cross_entropy() -> None:
    x = Case("", B=9, m=0, ignored=2).make()
    weight = torch.rand(10)
    options = {"weight": weight, "label_smoothing": 0.1, "ignore_index": -100}
    got = dlb_loss(x.logits, x.labels, backend="eager", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, F.cross_entropy(x.logits, x.labels, **options))  # type: ignore[arg-type]


def test_official_script_agrees() -> None:
    """Two forwards of n, CE of the concatenation, KL by batchmean over the overlap, times τ²."""
    torch.manual_seed(0)
    n, C, tau, alpha = 6, 11, 3.0, 1.0
    fresh, overlap = (torch.randn(n, C, requires_grad=True) for _ in range(2))
    last, y = torch.randn(n, C), torch.randint(0, C, (2 * n,))
    # The script names them out, out_pre and pre_out, and puts the overlap first.
    script = F.cross_entropy(torch.cat((overlap, fresh)), y) + alpha * tau * tau * F.kl_div(
        F.log_softmax(overlap / tau, dim=1), F.softmax(last / tau, dim=1), reduction="batchmean"
    )
    ours = dlb_loss(torch.cat((overlap, fresh)), y, last, temperature=tau, alpha=alpha)
    torch.testing.assert_close(ours, script)
    for got, want in zip(
        torch.autograd.grad(ours, (overlap, fresh)),  # type: ignore[arg-type]
        torch.autograd.grad(script, (overlap, fresh)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
