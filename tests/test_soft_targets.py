"""labels (B, C): probabilities."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error
from torch import Tensor

from dlb_fused import DLBLoss, dlb_loss
from dlb_fused.reference import dlb_loss_naive

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5])},
    {"label_smoothing": 0.3, "weight": torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5])},
    {"ignore_index": 2},  # does not apply
]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z, p, t = (torch.randn(n, 5, generator=g) * 2 for n in (8, 4, 8))
    return z.to(dtype).requires_grad_(), t.softmax(1).to(dtype), p.to(dtype)


def truth(z: Tensor, targets: Tensor, last: Tensor, **options: Any) -> Tensor:
    """In fp64."""
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    options.pop("ignore_index", None)
    labels = targets.argmax(1)
    kl = dlb_loss_naive(z, labels, last.double()) - F.cross_entropy(z, labels)
    return F.cross_entropy(z, targets.double(), **options) + kl


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 7.0])
def test_against_torch(
    options: dict[str, Any], upstream: float, backend_device: tuple[str, str]
) -> None:
    backend, device = backend_device
    z, targets, last = (x.detach().to(device) for x in inputs())
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    exact = z.double().requires_grad_()
    z.requires_grad_()
    want = truth(exact, targets, last, **options)
    out: Any = dlb_loss(z, targets, last, backend=backend, return_parts=True, **options)
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.loss, out.ce + 9 * out.kl)
    assert (out.ce_count, out.kl_count) == (8, 4)
    assert not out.ce.requires_grad
    (got,) = torch.autograd.grad(out.loss, z, torch.full_like(out.loss, upstream))
    (gradient,) = torch.autograd.grad(want * upstream, exact)
    assert relative_error(got, gradient) < 1e-6


def test_labels_as_probabilities_are_labels() -> None:
    z, _, last = inputs()
    labels = torch.arange(8) % 5
    torch.testing.assert_close(
        dlb_loss(z, F.one_hot(labels, 5).float(), last), dlb_loss(z, labels, last)
    )


def test_normalizer_and_grad_scale() -> None:
    z, targets, last = inputs()
    given: Any = {"normalizer": (16.0, torch.tensor(2.0)), "grad_scale": 4.0}
    exact = z.detach().double().requires_grad_()
    ce = F.cross_entropy(exact, targets.double(), reduction="sum") / 16
    kl = truth(exact, targets, last) - F.cross_entropy(exact, targets.double())
    loss = dlb_loss(z, targets, last, **given)
    torch.testing.assert_close(loss.double(), ce + 2 * kl, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]
    for upstream in (4.0, 3.0):
        (got,) = torch.autograd.grad(loss, z, torch.tensor(upstream), retain_graph=True)  # type: ignore[arg-type]
        (want,) = torch.autograd.grad(upstream * (ce + 2 * kl), exact, retain_graph=True)
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_compute_in_fp32(dtype: torch.dtype) -> None:
    z, targets, last = inputs(dtype)
    exact = z.detach().double().requires_grad_()
    loss = dlb_loss(z, targets, last)
    torch.testing.assert_close(
        loss.double(),  # type: ignore[union-attr]
        truth(exact, targets, last),
        rtol=1e-6,
        atol=1e-6,
    )
    (got,) = torch.autograd.grad(loss, z, torch.tensor(1024.0))  # type: ignore[arg-type]
    (want,) = torch.autograd.grad(1024 * truth(exact, targets, last), exact)
    assert relative_error(got, want) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_an_empty_batch_is_zero() -> None:
    z = torch.zeros(0, 5, requires_grad=True)
    loss: Any = dlb_loss(z, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    z, targets, _ = inputs()
    zero: Any = dlb_loss(z, targets, normalizer=(0.0, 0.0))
    assert zero == 0 and torch.autograd.grad(zero, z)[0].eq(0).all()


def test_the_module_guards_by_the_largest_probability() -> None:
    g = torch.Generator().manual_seed(3)
    targets = torch.rand(12, 5, generator=g).softmax(1)
    z = torch.randn(8, 5, generator=g, requires_grad=True)
    criterion = DLBLoss(ignore_index=2)
    first = torch.randn(4, 5, generator=g, requires_grad=True)
    torch.testing.assert_close(criterion(first, targets[:4]), F.cross_entropy(first, targets[:4]))
    sharper = targets[:8] ** 2  # another target of the same sample: the largest class stays
    loss = criterion(z, sharper)
    torch.testing.assert_close(loss, truth(z, sharper, first.detach()).float(), rtol=1e-5, atol=0)
    assert criterion.stats() == (4, 0, 0) and criterion.parts.ce_count == 8
    other = targets.flip(1)[4:12]  # other samples
    with pytest.warns(RuntimeWarning, match="do not continue"):
        torch.testing.assert_close(criterion(z, other), F.cross_entropy(z, other))
    criterion.eval()
    torch.testing.assert_close(criterion(z, other), F.cross_entropy(z, other))


def test_one_graph_under_compile() -> None:
    torch.compiler.reset()
    z, targets, last = inputs()
    f = torch.compile(lambda z: dlb_loss(z, targets, last), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(z), dlb_loss(z, targets, last))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(8, 4)}, "must have the shape (B, C) of logits, got (8, 4) for"),
        ({"labels": torch.ones(8, 5, device="meta")}, "labels must be on cpu like logits"),
        ({"inplace": True}, "inplace=True cannot be used with labels that are probabilities"),
    ],
)
def test_bad_targets(change: dict[str, Any], message: str) -> None:
    z, targets, last = inputs()
    with pytest.raises(ValueError, match=re.escape(message)):
        dlb_loss(**({"logits": z, "labels": targets, "last_logits": last} | change))
