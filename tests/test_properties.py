"""Property tests: any shape, dtype, stride, mask and setting, against the fp64 truth."""

from __future__ import annotations

import torch
from cases import GRADIENT_TOLERANCE, Inputs, fp64_truth, loss_tolerance, relative_error, widen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlb_fused import dlb_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    B = draw(st.integers(1, 6))
    C = draw(st.one_of(st.integers(1, 40), st.integers(41, 700)))
    m = draw(st.integers(0, B))
    dtype = draw(st.sampled_from(DTYPES))
    last_dtype = dtype if dtype == torch.float64 else draw(st.sampled_from(DTYPES[:3]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    z = torch.randn(B, C, generator=g, dtype=torch.float64) * scale
    drift = draw(st.sampled_from([0.0, 0.03, 1.0]))
    p = z[:m] + drift * scale * torch.randn(m, C, generator=g, dtype=torch.float64)
    labels = torch.randint(0, C, (B,), generator=g)
    masked = draw(st.integers(0, C - 1)) if draw(st.booleans()) else 0
    if masked:
        columns = torch.randperm(C, generator=g)
        z[:, columns[:masked]] = p[:, columns[:masked]] = -torch.inf
        labels = columns[masked + labels % (C - masked)]
    ignored = draw(st.lists(st.integers(0, B - 1), max_size=B, unique=True))
    labels[ignored] = -100
    real = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, object] = {
        "temperature": draw(st.sampled_from([0.7, 1.0, 2.0, 3.0, 4.0, 10.0])),
        "alpha": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }
    if not masked:  # a masked class under smoothing costs +inf, as in torch
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(C, generator=g).to(real) + 0.1
    if draw(st.booleans()):
        options["temperature"] = torch.rand(m, generator=g).to(real) * 3 + 0.5
    if draw(st.booleans()):
        second = torch.randint(0, C, (B,), generator=g)
        if masked:
            second = columns[masked + second % (C - masked)]
        second[draw(st.lists(st.integers(0, B - 1), max_size=1))] = -100
        lam = torch.rand(B, generator=g).to(real)
        options |= {"labels_b": second, "lam": draw(st.sampled_from([0.0, 0.3, 1.0, lam]))}
    options["distill_ignored"] = draw(st.booleans())
    stride, last_stride = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    z, p = widen(z.to(dtype), stride), widen(p.to(last_dtype), last_stride)
    return Inputs(z.requires_grad_(), labels, p, options)


def test_any_input(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(), st.sampled_from([1.0, 512.0]))
    def check(x: Inputs, dloss: float) -> None:
        x = Inputs(
            x.logits.detach().to(device).requires_grad_(),
            x.labels.to(device),
            x.last_logits.to(device),
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.options.items()},
        )
        loss = dlb_loss(x.logits, x.labels, x.last_logits, backend=backend, **x.options)  # type: ignore[arg-type]
        loss.backward(torch.full_like(loss, dloss))  # type: ignore[union-attr, arg-type]
        want_loss, want = fp64_truth(x, dloss)
        assert abs(loss - want_loss) <= loss_tolerance(x, loss.dtype, want_loss)  # type: ignore[operator, union-attr]
        assert x.logits.grad is not None
        # Entries that are tiny beside dloss, or below the range of fp16, have an absolute floor.
        dtype = x.logits.dtype
        floor = float((want.to(dtype).double() - want).norm())
        noise = 1e-7 if dtype != torch.float64 else 1e-15
        bound = GRADIENT_TOLERANCE[dtype] * float(want.norm()) + 1.05 * floor + noise * dloss
        assert float((x.logits.grad.double() - want).norm()) <= bound
        assert relative_error(x.logits.grad, want) < 1 or float(want.norm()) < 1e-3 * dloss

    check()
