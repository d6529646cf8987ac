"""Every backend against the fp64 truth: values and gradients, through the public function."""

from __future__ import annotations

import pytest
import torch
from cases import (
    CASES,
    Case,
    Inputs,
    eager_error,
    fp64_truth,
    gradient_tolerance,
    loss_tolerance,
    relative_error,
    truth,
)

from dlb_fused import backends, dlb_loss
from dlb_fused.backends import LossArgs, LossOutputs


def call(x: Inputs, backend: str, **more: object) -> torch.Tensor:
    return dlb_loss(x.logits, x.labels, x.last_logits, backend=backend, **x.options, **more)  # type: ignore[arg-type, return-value]


def upstream(case: Case) -> float:
    return case.options.get("grad_scale", 1.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient(case: Case, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = case.make(device)
    loss = call(x, backend)
    loss.backward(torch.full_like(loss, upstream(case)))
    want_loss, want = fp64_truth(x, upstream(case))
    assert float((loss - want_loss).abs()) <= loss_tolerance(x, loss.dtype, want_loss)
    gradient = x.logits.grad
    assert gradient is not None and gradient.dtype == case.dtype
    if want.norm() == 0:
        assert not gradient.any()
        return
    bound = gradient_tolerance(want, case.dtype)
    plain = not {"normalizer", "distill_ignored"} & set(case.options) and case.lam is None
    if case.dtype == torch.float32 and plain and not case.per_row:
        # Where the truth itself is small (a row that is nearly right), fp32 has fewer digits.
        bound = max(bound, 2 * eager_error(x))
    assert relative_error(gradient, want) <= bound


MASKS = {
    "teacher of few classes": (0, [], [(0, 4096)]),
    "both from the front": (-200, [(0, 2100)], [(0, 2100)]),
    "student from the front": (-200, [(0, 4096)], []),
    "teacher in the middle": (-300, [(0, 2048)], [(2048, 4096)]),
    "whole blocks in turn": (0, [(2048, 4096)], [(0, 2048), (4096, 4500)]),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_stretches_of_long_rows(
    masks: tuple[float, list[tuple[int, int]], list[tuple[int, int]]],
    dtype: torch.dtype,
    backend_device: tuple[str, str],
) -> None:
    """Kernels go over such a row in blocks, and a block may have no class with a weight at all."""
    backend, device = backend_device
    offset, student, teacher = masks
    generator = torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 3, 5000, generator=generator, dtype=torch.float64)
    z += offset + torch.linspace(0, 3, 5000)  # a maximum that rises from block to block
    for rows, stretches in ((z, student), (u, teacher)):
        for begin, end in stretches:
            rows[:, begin:end] = -torch.inf
    z, u, labels = z.to(device, dtype), u.to(device, dtype), torch.tensor([4990, 4500, 4501])
    logits = z.clone().requires_grad_()
    loss = dlb_loss(logits, labels.to(device), u, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact, last = z.double(), u.double()
    (want, _, _) = truth(Inputs(exact, labels.to(device), last, {}))
    assert want.isfinite() == (set(student) <= set(teacher))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    pull = (exact / 3).softmax(1) - (last / 3).softmax(1)
    want_gradient = exact.softmax(1) / 3 + pull
    want_gradient[range(3), labels] -= 1 / 3
    assert relative_error(gradient, want_gradient) < 2e-6


@pytest.mark.parametrize("lam", [None, 0.3])
@pytest.mark.parametrize("dloss", [1.0, 0.0, -3.7, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [10, 9001])
def test_upstream_gradient(
    dloss: float,
    dtype: torch.dtype,
    C: int,
    lam: float | None,
    backend_device: tuple[str, str],
) -> None:
    """Also in fp16, where scaling a stored gradient would lose what had flushed to zero."""
    backend, device = backend_device
    x = Case("", B=4, C=C, m=2, dtype=dtype, lam=lam).make(device)
    loss = call(x, backend)
    loss.backward(torch.full_like(loss, dloss))
    assert x.logits.grad is not None
    if dloss == 0:
        assert not x.logits.grad.any()
        return
    want = fp64_truth(x, dloss)[1]
    assert relative_error(x.logits.grad, want) <= gradient_tolerance(want, dtype)


@pytest.mark.parametrize("expected", [65536.0, torch.tensor(65536.0), 8.0])
def test_grad_scale_is_a_forecast(
    expected: float | torch.Tensor, backend_device: tuple[str, str]
) -> None:
    """The gradient is right for the expected dloss and for any other, without underflow in fp16."""
    backend, device = backend_device
    expected = expected.to(device) if isinstance(expected, torch.Tensor) else expected
    for dloss in (65536.0, 1024.0):
        x = Case("", B=4, C=2000, m=2, dtype=torch.float16).make(device)
        loss = call(x, backend, grad_scale=expected)
        loss.backward(torch.full_like(loss, dloss))
        assert x.logits.grad is not None
        want = fp64_truth(x, dloss)[1]
        assert relative_error(x.logits.grad, want) <= gradient_tolerance(want, torch.float16)


@pytest.mark.parametrize("dloss", [torch.inf, torch.nan, 3.0])
def test_upstream_gradient_is_left_alone(dloss: float, backend_device: tuple[str, str]) -> None:
    """And one that is not finite gives what it must: no finite gradient."""
    backend, device = backend_device
    x = Case("", C=33).make(device)
    loss = call(x, backend)
    upstream = torch.full_like(loss, dloss)
    (gradient,) = torch.autograd.grad(loss, x.logits, upstream)
    assert torch.equal(upstream, torch.full_like(loss, dloss)) or dloss != dloss
    assert upstream._version == 0 and gradient.isfinite().all() == (dloss == 3.0)


def test_gradient_twice_from_one_graph(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=33).make(device)
    loss = call(x, backend)
    for dloss in (1.0, -3.7, 1.0):
        (gradient,) = torch.autograd.grad(
            loss, x.logits, torch.full_like(loss, dloss), retain_graph=True
        )
        assert relative_error(gradient, fp64_truth(x, dloss)[1]) <= 1e-6
        gradient.fill_(torch.nan)  # the caller may do with it what they like


def test_two_forwards_then_both_backwards(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    inputs = [Case("", C=33, seed=s).make(device) for s in (1, 2)]
    losses = [call(x, backend) for x in inputs]
    for x, loss, dloss in zip(inputs, losses, (2.0, 1.0), strict=True):
        loss.backward(torch.full_like(loss, dloss))
        assert x.logits.grad is not None
        assert relative_error(x.logits.grad, fp64_truth(x, dloss)[1]) <= 1e-6


def test_parts(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=9, m=5, ignored=2).make(device)
    parts = call(x, backend, return_parts=True)
    loss, ce, kl = truth(x)
    torch.testing.assert_close(
        torch.stack(list(parts)).double(),
        torch.stack([loss, ce, kl, loss * 0 + 7, loss * 0 + 3]),
        rtol=1e-6,
        atol=1e-6,
    )
    assert parts.loss.requires_grad and not parts.ce.requires_grad


def test_without_gradient_nothing_but_the_loss_is_written(
    backend_device: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, device = backend_device
    x = Case("", C=33).make(device)
    module, outputs = backends.load(backend), []
    forward = module.forward

    def spy(args: LossArgs) -> LossOutputs:
        outputs.append(forward(args))
        return outputs[-1]

    monkeypatch.setattr(module, "forward", spy)
    with torch.no_grad():
        want = call(x, backend)
    (out,) = outputs
    assert not want.requires_grad and out[2:] == (None, None, None, None)
    torch.testing.assert_close(want, call(x, backend).detach())


def test_nothing_given_is_written_to(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=9, m=5, C=33, ignored=1, per_row=True, stride=2).make(device)
    given = [t.detach() for t in (x.logits, x.labels, x.last_logits)]
    before = [(t.clone(), t._version) for t in given]
    loss = call(x, backend)
    loss.backward(torch.full_like(loss, 2.0))
    for t, (values, version) in zip(given, before, strict=True):
        assert torch.equal(t, values) and t._version == version


def test_same_bits_every_time(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    for C in (10, 1000, 9001):
        runs = []
        for _ in range(3):
            x = Case("", B=16, C=C, m=8).make(device)
            loss = call(x, backend)
            loss.backward()
            runs.append((loss.detach(), x.logits.grad))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_empty_batch(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    logits = torch.empty(0, 5, device=device, requires_grad=True)
    loss = dlb_loss(logits, torch.empty(0, dtype=torch.int64, device=device), backend=backend)
    assert loss == 0
    loss.backward()  # type: ignore[union-attr]
    assert logits.grad is not None and logits.grad.shape == (0, 5)


@pytest.mark.parametrize("weight", [None, "zero"])
def test_no_valid_row_gives_zero(weight: str | None, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", ignored=0 if weight else 8, m=0).make(device)
    if weight:
        x.options["weight"] = torch.zeros(10, device=device)
    loss = call(x, backend)
    assert loss == 0
    loss.backward()
    assert x.logits.grad is not None and not x.logits.grad.any()


def test_ignored_rows_may_hold_anything(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=9, m=5, ignored=2).make(device)
    clean = call(x, backend).detach()
    with torch.no_grad():
        x.logits[:2] = torch.nan
    loss = call(x, backend)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert x.logits.grad is not None
    assert not x.logits.grad[:2].any() and x.logits.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_a_row_that_is_not_finite(bad: float | None, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=40).make(device)
    with torch.no_grad():
        if bad is None:
            x.logits[5] = -torch.inf
        else:
            x.logits[5, 17] = bad
    loss = call(x, backend)
    loss.backward()
    assert loss.isnan() and x.logits.grad is not None
    others = [i for i in range(8) if i != 5]
    assert x.logits.grad[5].isnan().any() and x.logits.grad[others].isfinite().all()


def test_class_masked_in_the_student_alone(backend_device: tuple[str, str]) -> None:
    """A finite z' against z = -inf: the loss is +inf, the gradient finite."""
    backend, device = backend_device
    for teacher in (0.0, -1e4):  # -1e4: its weight underflows, and the term must still be +inf
        x = Case("", C=40, margin=3.0).make(device)
        c = int((x.labels[0] + 1) % 40)
        with torch.no_grad():
            x.logits[0, c] = -torch.inf
            x.last_logits[0, c] = teacher
        loss = call(x, backend)
        loss.backward()
        assert loss == torch.inf
        assert x.logits.grad is not None and x.logits.grad.isfinite().all()


def test_label_on_a_masked_class(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=40, m=0).make(device)
    with torch.no_grad():
        x.logits[3, x.labels[3]] = -torch.inf
    loss = call(x, backend)
    loss.backward()
    assert loss == torch.inf and x.logits.grad is not None and x.logits.grad.isfinite().all()


def test_label_out_of_range(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("").make(device)
    for label in (10, -1, 2**40):
        x.labels[3] = label
        if device == "cpu" and backend in ("cpu", "eager"):
            with pytest.raises(IndexError, match=rf"labels\[3\] is {label}, but logits have 10"):
                call(x, backend)
            continue
        x.logits.grad = None
        loss = call(x, backend)
        loss.backward()
        assert loss.isnan() and x.logits.grad is not None
        assert x.logits.grad[3].isnan().all() and x.logits.grad[4:].isfinite().all()


def test_second_label_out_of_range(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", lam=0.3).make(device)
    for label in (10, -1, 2**40):
        x.options["labels_b"][3] = label
        if device == "cpu" and backend in ("cpu", "eager"):
            with pytest.raises(IndexError, match=rf"labels_b\[3\] is {label}, but logits have 10"):
                call(x, backend)
            continue
        x.logits.grad = None
        loss = call(x, backend)
        loss.backward()
        assert loss.isnan() and x.logits.grad is not None
        assert x.logits.grad[3].isnan().all() and x.logits.grad[4:].isfinite().all()
    x.labels[3] = -100  # an ignored row may have any other label
    assert call(x, backend).isfinite()


def test_a_label_of_share_0_has_no_part(backend_device: tuple[str, str]) -> None:
    """lam of 1 or 0, and two equal labels, are the form with one label, also where the logit of
    the other one is -inf."""
    backend, device = backend_device
    for masked in (False, True):
        x = Case("", C=40, lam=0.3, seed=2).make(device)
        b = x.options.pop("labels_b")
        del x.options["lam"]
        assert not (x.labels == b).any()
        with torch.no_grad():
            if masked:
                x.logits[torch.arange(8), b] = -torch.inf
                x.last_logits[torch.arange(4), b[:4]] = -torch.inf
        want = call(x, backend)
        (want_gradient,) = torch.autograd.grad(want, x.logits)
        assert want.isfinite()
        one, zero = torch.ones(8, device=device), torch.zeros((), device=device)
        for y, other, lam in (
            (x.labels, b, 1.0),
            (b, x.labels, 0.0),
            (x.labels, b, one),
            (b, x.labels, zero),
            (x.labels, x.labels, 0.3),
        ):
            loss = dlb_loss(x.logits, y, x.last_logits, labels_b=other, lam=lam, backend=backend)
            (gradient,) = torch.autograd.grad(loss, x.logits)  # type: ignore[arg-type]
            torch.testing.assert_close(loss, want, rtol=2e-7, atol=0)
            torch.testing.assert_close(gradient, want_gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("label", ["labels", "labels_b", "both"])
def test_two_labels_on_masked_classes(label: str, backend_device: tuple[str, str]) -> None:
    """The loss is +inf, the gradient finite, and right in the other rows."""
    backend, device = backend_device
    for smoothing in (0.0, 0.1):
        x = Case("", C=40, lam=0.3, m=0, seed=2).make(device)
        x.options["label_smoothing"] = smoothing
        want = fp64_truth(x)[1]
        hit = {"labels": [x.labels[3]], "labels_b": [x.options["labels_b"][3]]}
        hit["both"] = hit["labels"] + hit["labels_b"]
        with torch.no_grad():
            x.logits[3, torch.stack(hit[label])] = -torch.inf
        loss = call(x, backend)
        loss.backward()
        gradient = x.logits.grad
        assert loss == torch.inf and gradient is not None and gradient.isfinite().all()
        assert relative_error(gradient[4:], want[4:]) <= 1e-6
        where = torch.stack(hit[label])
        weight = {"labels": [0.3], "labels_b": [0.7], "both": [0.3, 0.7]}[label]
        share = torch.tensor(weight, device=device) * (1 - smoothing) + smoothing / 40
        torch.testing.assert_close(gradient[3, where], -share / 8)


@pytest.mark.parametrize("bad", [-0.1, 1.5, torch.nan])
def test_lam_out_of_range(bad: float, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", lam="rows").make(device)
    x.options["lam"][3] = bad
    if device != "cpu":  # to look at it would be a host sync
        assert call(x, backend).isnan()
        return
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got (-0.1|1.5|nan)"):
        call(x, backend)
    x.options["labels_b"][3] = -100
    with pytest.raises(ValueError, match="lam must be in"):
        call(x, backend)


@pytest.mark.parametrize("lam", [None, 0.3])
def test_an_ignored_row_that_is_distilled(
    lam: float | None, backend_device: tuple[str, str]
) -> None:
    """It has the KL and its gradient, counts in kl_count and no more; without a teacher it may
    hold anything."""
    backend, device = backend_device
    x = Case("", B=6, C=40, m=3, ignored=2, lam=lam).make(device)
    x.labels[5] = -100
    with torch.no_grad():
        x.logits[5] = torch.nan
        x.logits[0, 7] = x.last_logits[0, 7] = -torch.inf
        x.logits[1, 9] = 100.0  # a confident row
    x.options["distill_ignored"] = True
    parts = call(x, backend, return_parts=True)
    parts.loss.backward()
    assert (parts.ce_count, parts.kl_count) == (3, 3)
    gradient = x.logits.grad
    assert gradient is not None and not gradient[5].any() and parts.loss.isfinite()
    z = x.logits.detach()[:2].double().requires_grad_()
    log_s, log_q = ((v / 3).log_softmax(1) for v in (z, x.last_logits[:2].double()))
    kl = torch.where(log_q == -torch.inf, 0, log_q.exp() * (log_q - log_s)).sum()
    (want,) = torch.autograd.grad(3.0 * 3.0 * kl / 3, z)
    assert relative_error(gradient[:2], want.nan_to_num(0)) <= 1e-6


def test_confident_row_keeps_its_digits(backend_device: tuple[str, str]) -> None:
    """At margin 20 p_y - 1 has no digit left in fp32."""
    backend, device = backend_device
    for margin in (0.0, 10.0, 20.0, 40.0):
        x = Case("", C=20, m=0, margin=margin).make(device)
        call(x, backend).backward()
        z, y = x.logits.detach().double(), x.labels[:, None]
        want = -(z.scatter(1, y, -torch.inf).logsumexp(1) - z.logsumexp(1)).exp() / 8
        assert x.logits.grad is not None
        got = x.logits.grad.gather(1, y)[:, 0]
        assert ((got - want) / want).abs().max() <= 2e-6


def test_column_strided_logits(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=6, C=33, m=3).make(device)
    turned = x.logits.detach().t().contiguous().t().requires_grad_()
    loss = dlb_loss(turned, x.labels, x.last_logits.t().contiguous().t(), backend=backend)
    loss.backward()  # type: ignore[union-attr]
    assert turned.grad is not None
    assert relative_error(turned.grad, fp64_truth(x)[1]) <= 1e-6


def test_broadcast_teacher(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=6, C=33, m=3).make(device)
    x.last_logits = x.last_logits[:1].expand(3, -1)
    call(x, backend).backward()
    assert x.logits.grad is not None
    assert relative_error(x.logits.grad, fp64_truth(x)[1]) <= 1e-6


@pytest.mark.parametrize("lam", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace(dtype: torch.dtype, lam: float | None, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    for dloss in (1.0, -3.7, 0.0):
        x = Case("", C=33, dtype=dtype, lam=lam).make(device)
        logits = x.logits * 1
        want = fp64_truth(x, dloss)[1]
        address = logits.data_ptr()
        loss = dlb_loss(logits, x.labels, x.last_logits, inplace=True, backend=backend, **x.options)
        assert logits.data_ptr() == address and logits._version > 0
        loss.backward(torch.full_like(loss, dloss))  # type: ignore[union-attr, arg-type]
        assert x.logits.grad is not None
        bound = 2 * gradient_tolerance(want, dtype) if dloss else 0.0  # rounded twice
        assert relative_error(x.logits.grad, want) <= bound


def test_temperature_and_alpha_as_device_tensors(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=33, options={"temperature": 2.0, "alpha": 0.7}).make(device)
    want = call(x, backend)
    x.options = {k: torch.tensor(v, device=device) for k, v in x.options.items()}
    torch.testing.assert_close(call(x, backend), want)


@pytest.mark.parametrize("C", [7, 1000])
def test_gradcheck(C: int, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=3, C=C, m=2, dtype=torch.float64, options={"label_smoothing": 0.1}).make(device)

    def f(z: torch.Tensor) -> torch.Tensor:
        return dlb_loss(z, x.labels, x.last_logits, backend=backend, **x.options)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(f, x.logits, fast_mode=C > 100)


def test_views_that_begin_anywhere(backend_device: tuple[str, str]) -> None:
    """Neither rows nor labels begin at a multiple of 16 bytes."""
    backend, device = backend_device
    for C in (32, 33):
        x = Case("", B=6, C=C, m=3).make(device)
        wide = torch.full((6, C + 4), torch.nan, device=device)
        wide[:, 1 : C + 1] = x.logits.detach()
        long = torch.full((7,), 10**6, device=device)
        long[1:] = x.labels
        logits, last = wide[:, 1 : C + 1].requires_grad_(), wide.clone()[:3, 1 : C + 1]
        last.copy_(x.last_logits)
        loss = dlb_loss(logits, long[1:], last, backend=backend)
        (gradient,) = torch.autograd.grad(loss * 2, logits)  # type: ignore[operator]
        assert relative_error(gradient, fp64_truth(x, 2.0)[1]) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "beyond"), [(torch.float32, 2**31), (torch.bfloat16, 2**32)], ids=str
)
def test_rows_far_apart(dtype: torch.dtype, beyond: int, backend_device: tuple[str, str]) -> None:
    """A 32-bit offset wraps to another row; the untouched pages between the rows cost nothing."""
    backend, device = backend_device
    stride = beyond // 3 + 8  # row 3 begins beyond 2^31 or 2^32 elements
    x = Case("", B=4, C=5, m=4, dtype=dtype).make(device)
    for far in ("logits", "last_logits"):
        near = getattr(x, far).detach()
        wide = torch.empty(3 * stride + 5, dtype=dtype, device=device)
        rows = wide.as_strided((4, 5), (stride, 1)).copy_(near)
        given = {"logits": x.logits, "last_logits": x.last_logits, far: rows}
        logits = given["logits"].detach().requires_grad_()
        loss = dlb_loss(logits, x.labels, given["last_logits"], backend=backend)
        (gradient,) = torch.autograd.grad(loss * 2, logits)  # type: ignore[operator]
        want = fp64_truth(x, 2.0)[1]
        assert relative_error(gradient, want) <= gradient_tolerance(want, dtype)
        del wide, rows, given, logits, loss
