"""The cases every backend is proven on, the truth they are held against, and the tolerances."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Relative L2 error of the gradient against fp64 from the same inputs. The floor of a 16-bit type is
# its rounding (2^-9 and 2^-12 at worst, a third of that in the mean).
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 2e-3,
    torch.float16: 3e-4,
}


@dataclass(frozen=True)
class Case:
    """One input of the loss. `why` says what would slip through without it."""

    why: str
    B: int = 8
    C: int = 10
    m: int = 4
    dtype: torch.dtype = torch.float32
    last_dtype: torch.dtype | None = None
    scale: float = 2.0  # of the logits
    offset: float = 0.0  # added to all logits and last_logits
    drift: float | None = None  # last_logits = logits + drift * noise; None: independent of them
    margin: float = 0.0  # added to the logit of the label
    lam: float | str | None = None  # rows have two labels; "rows": one value a row, 0 and 1 too
    margin_b: float = 0.0  # added to the logit of the second label
    same: int = 0  # number of rows, from row 0 on, whose second label is the first one
    ignored: int = 0  # number of ignored rows, from row 0 on
    ignored_b: int = 0  # number of rows, up to the last one, whose second label is ignored
    masked: int = 0  # classes with -inf in logits and last_logits
    stride: int = 0  # columns between the end of a row and the next
    options: dict[str, Any] = field(default_factory=dict)
    per_row: bool = False  # temperature and alpha as tensors (m,)
    seed: int = 0

    def __str__(self) -> str:
        return self.why.replace(" ", "-").replace(",", "")

    def make(self, device: str = "cpu") -> Inputs:
        g = torch.Generator().manual_seed(self.seed)
        z = torch.randn(self.B, self.C, generator=g, dtype=torch.float64) * self.scale + self.offset
        y = torch.randint(0, self.C, (self.B,), generator=g)
        b = torch.randint(0, self.C, (self.B,), generator=g) if self.lam is not None else y.clone()
        b[: self.same] = y[: self.same]
        if self.margin:
            z[torch.arange(self.B), y] += self.margin
        z[torch.arange(self.B), b] += self.margin_b
        p = torch.randn(self.m, self.C, generator=g, dtype=torch.float64)
        p = p * self.scale + self.offset if self.drift is None else z[: self.m] + self.drift * p
        if self.masked:
            z[:, -self.masked :] = p[:, -self.masked :] = -torch.inf
            y %= self.C - self.masked
            b %= self.C - self.masked
        y[: self.ignored] = self.options.get("ignore_index", -100)
        b[self.B - self.ignored_b :] = self.options.get("ignore_index", -100)
        z = widen(z.to(self.dtype), self.stride)
        p = widen(p.to(self.last_dtype or self.dtype), self.stride)
        options = {
            name: value(self, g) if callable(value) else value
            for name, value in self.options.items()
        }
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.lam is not None:
            lam = torch.arange(self.B).to(real) / max(1, self.B - 1)
            options |= {"labels_b": b, "lam": lam if self.lam == "rows" else self.lam}
        if self.per_row:
            options["temperature"] = torch.rand(self.m, generator=g).to(real) * 4 + 0.5
            options["alpha"] = torch.rand(self.m, generator=g).to(real) * 2
            options["alpha"][::3] = 0
        to = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        return Inputs(z.to(device).requires_grad_(), y.to(device), p.to(device), to)


@dataclass
class Inputs:
    logits: Tensor
    labels: Tensor
    last_logits: Tensor
    options: dict[str, Any]


def widen(value: Tensor, columns: int) -> Tensor:
    """The same values as rows of a wider matrix whose other columns are NaN."""
    if columns == 0:
        return value
    wide = value.new_full((value.shape[0], value.shape[1] + columns), torch.nan)
    wide[:, : value.shape[1]] = value
    return wide[:, : value.shape[1]]


def class_weight(case: Case, g: torch.Generator) -> Tensor:
    weight = torch.rand(case.C, generator=g) + 0.1
    return weight.double() if case.dtype == torch.float64 else weight


CASES = [
    Case("plain"),
    Case("one row", B=1, m=0),
    Case("one row that overlaps", B=1, m=1),
    Case("no overlap, the first step", m=0),
    Case("all rows overlap, a teacher's logits", m=8),
    Case("odd overlap", B=7, m=3),
    Case("one class", C=1),
    Case("two classes", C=2),
    Case("fewer classes than a vector", C=3),
    Case("C of CIFAR-100", B=6, C=100, m=3),
    Case("C of ImageNet", B=4, C=1000, m=2),
    Case("prime C, a tail after every vector", B=4, C=1009, m=2),
    Case("C of a power of two", B=2, C=4096, m=1),
    Case("C above one block", B=2, C=21841, m=1),
    Case("rows of a wider matrix", B=6, C=101, m=3, stride=7),
    Case("rows of a wider matrix, vectors fit", B=6, C=96, m=3, stride=32),
    Case("confident rows", C=100, margin=20.0),
    Case("very confident rows", C=100, margin=60.0),
    Case("common offset", C=100, offset=1e4),
    Case("negative offset", C=100, offset=-1e4),
    Case("teacher near the student", C=100, drift=0.03),
    Case("teacher equal to the student", C=100, drift=0.0),
    Case("large logits", C=100, scale=100.0),
    Case("masked classes", C=50, masked=20),
    Case("some ignored", B=9, m=5, ignored=3),
    Case("all overlap ignored", B=9, m=5, ignored=5),
    Case("ignore_index inside the classes", B=9, m=5, ignored=3, options={"ignore_index": 3}),
    Case("class weight", options={"weight": class_weight}),
    Case("class weight, ignored", B=9, m=5, ignored=3, options={"weight": class_weight}),
    Case("label smoothing", options={"label_smoothing": 0.1}),
    Case("smoothing of 1", options={"label_smoothing": 1.0}),
    Case("smoothing, long row", B=2, C=9001, m=1, options={"label_smoothing": 0.1}),
    Case(
        "smoothing and weight", C=100, options={"label_smoothing": 0.1, "weight": class_weight}
    ),
    Case("temperature 1", options={"temperature": 1.0}),
    Case("temperature 4 by powers", C=100, options={"temperature": 4.0}),
    Case("fractional temperature", options={"temperature": 2.5, "alpha": 0.5}),
    Case("low temperature", C=100, options={"temperature": 0.25}),
    Case("high temperature", C=100, options={"temperature": 20.0}),
    Case("alpha 0", options={"alpha": 0.0}),
    Case("temperature and alpha per row", B=9, m=5, C=33, per_row=True),
    Case("normalizer", options={"normalizer": (20.0, 7.0)}),
    Case("bfloat16", B=6, C=1000, m=3, dtype=torch.bfloat16),
    Case("bfloat16, odd C", B=6, C=101, m=3, dtype=torch.bfloat16),
    Case("bfloat16 near", B=6, C=500, m=3, drift=0.03, dtype=torch.bfloat16),
    Case("bfloat16, fp32 teacher", dtype=torch.bfloat16, last_dtype=torch.float32),
    Case("fp32, bfloat16 teacher", C=100, last_dtype=torch.bfloat16),
    Case("fp16, bfloat16 teacher", dtype=torch.float16, last_dtype=torch.bfloat16),
    Case("float16", B=6, C=1000, m=3, dtype=torch.float16, options={"grad_scale": 65536.0}),
    Case("float64", B=6, C=101, m=3, dtype=torch.float64),
    Case("float64 all options", B=9, m=5, C=33, dtype=torch.float64, ignored=2, per_row=True,
         options={"label_smoothing": 0.2, "weight": class_weight}),
    Case("two labels", C=33, lam=0.3),
    Case("two labels, lam per row", B=9, m=5, C=33, lam="rows", seed=1),
    Case("two labels, lam 1", C=33, lam=1.0),
    Case("two labels, lam 0", C=33, lam=0.0),
    Case("two labels, some equal", B=9, C=33, lam=0.3, same=4),
    Case("two labels of one class", C=1, lam=0.3),
    Case("two labels of two classes", C=2, lam="rows"),
    Case("two labels of three classes", C=3, lam="rows"),
    Case("two labels, C of ImageNet", B=4, C=1000, m=2, lam=0.7),
    Case("two labels, prime C", B=4, C=1009, m=2, lam="rows"),
    Case("two labels, C above one block", B=3, C=21841, m=1, lam=0.4),
    Case("two labels, rows of a wider matrix", B=6, C=101, m=3, stride=7, lam=0.6),
    Case("two labels, confident in the first", C=100, lam=0.3, margin=20.0),
    Case("two labels, confident in the second", C=100, lam=0.3, margin_b=20.0),
    Case("two labels, very confident in the second", C=100, lam=0.9, margin_b=60.0),
    Case("two labels, confident in the second of nearly all", C=100, lam=1e-6, margin_b=20.0, m=0),
    Case("two labels, confident in both", C=100, lam=0.3, margin=19.0, margin_b=20.0),
    Case("two labels, common offset", C=100, lam=0.3, offset=1e4),
    Case("two labels, confident at an offset", C=100, lam=0.3, offset=1e4, margin_b=400.0),
    Case("two labels, large logits", C=100, lam=0.3, scale=100.0),
    Case("two labels, teacher near the student", C=100, lam=0.3, drift=0.03),
    Case("two labels, masked classes", C=50, lam=0.3, masked=20),
    Case("two labels, some ignored", B=9, m=5, lam=0.3, ignored=2, ignored_b=3),
    Case("two labels, ignore_index inside the classes", B=9, m=5, lam=0.3, ignored=2, ignored_b=3,
         options={"ignore_index": 3}),
    Case("two labels, class weight", B=9, m=5, lam="rows", same=2, ignored_b=2,
         options={"weight": class_weight}),
    Case("two labels, smoothing", lam=0.3, same=2, options={"label_smoothing": 0.1}),
    Case("two labels, smoothing of 1", lam=0.3, options={"label_smoothing": 1.0}),
    Case("two labels, smoothing, long row", B=2, C=9001, m=1, lam=0.3,
         options={"label_smoothing": 0.1}),
    Case("two labels, smoothing and weight", C=100, lam="rows",
         options={"label_smoothing": 0.1, "weight": class_weight}),
    Case("two labels, fractional temperature", lam=0.3, options={"temperature": 2.5, "alpha": 0.5}),
    Case("two labels, no overlap", lam=0.3, m=0),
    Case("two labels, bfloat16", B=6, C=1000, m=3, lam=0.3, dtype=torch.bfloat16),
    Case("two labels, bfloat16, odd C", B=6, C=101, m=3, lam="rows", dtype=torch.bfloat16),
    Case("two labels, fp32 teacher", lam=0.3, dtype=torch.bfloat16, last_dtype=torch.float32),
    Case("two labels, float16", B=6, C=1000, m=3, lam=0.3, dtype=torch.float16,
         options={"grad_scale": 65536.0}),
    Case("two labels, float64", B=6, C=101, m=3, lam="rows", dtype=torch.float64),
    Case("ignored rows distilled", B=9, m=5, ignored=3, options={"distill_ignored": True}),
    Case("ignored rows distilled, ignore_index inside the classes", B=9, m=5, ignored=3,
         options={"ignore_index": 3, "distill_ignored": True}),
    Case("only ignored rows, distilled", B=5, m=5, ignored=5, options={"distill_ignored": True}),
    Case("ignored rows distilled, ImageNet", B=4, C=1000, m=3, ignored=2,
         options={"distill_ignored": True}),
    Case("ignored rows distilled, long row", B=3, C=9001, m=2, ignored=1,
         options={"distill_ignored": True}),
    Case("ignored rows distilled, smoothing and weight", B=9, m=5, C=33, ignored=3,
         options={"distill_ignored": True, "label_smoothing": 0.1, "weight": class_weight}),
    Case("ignored rows distilled, two labels, bfloat16", B=9, m=5, C=33, ignored=2, ignored_b=6,
         lam="rows", dtype=torch.bfloat16, options={"distill_ignored": True}),
    Case("float64 two labels, all options", B=9, m=5, C=33, dtype=torch.float64, ignored=2,
         ignored_b=1, per_row=True, lam="rows", same=3,
         options={"label_smoothing": 0.2, "weight": class_weight, "distill_ignored": True}),
    Case("all options, two labels", B=9, m=5, C=33, ignored=2, ignored_b=1, per_row=True, stride=3,
         lam="rows", same=3, options={"label_smoothing": 0.2, "weight": class_weight,
                                      "normalizer": (5.0, 2.0), "distill_ignored": True}),
    Case("all options", B=9, m=5, C=33, ignored=2, per_row=True, stride=3,
         options={"label_smoothing": 0.2, "weight": class_weight, "normalizer": (5.0, 2.0)}),
]  # fmt: skip


def truth(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 loss, ce and kl by stock operations and autograd; differentiable to x.logits."""
    z, p, y = x.logits.double(), x.last_logits.double(), x.labels
    o = dict(x.options)
    m, ignore = len(p), o.get("ignore_index", -100)
    weight = o["weight"].double() if o.get("weight") is not None else None
    real: Any = {"dtype": torch.float64, "device": z.device}
    tau = torch.as_tensor(o.get("temperature", 3.0), **real).expand(m)
    alpha = torch.as_tensor(o.get("alpha", 1.0), **real).expand(m)
    valid = y != ignore
    smoothing = o.get("label_smoothing", 0.0)
    if o.get("labels_b") is None:
        ce_sum = F.cross_entropy(
            z, y, weight, ignore_index=ignore, label_smoothing=smoothing, reduction="sum"
        )
        ce_count = (valid.double() if weight is None else weight[y * valid] * valid).sum()
    else:
        valid = valid & (o["labels_b"] != ignore)
        # torch takes 0 times infinity
        finite = z[valid].masked_fill(z[valid] == -torch.inf, -1e300)
        targets = soft_targets(x)[valid]
        ce_sum = F.cross_entropy(
            finite, targets, weight, label_smoothing=smoothing, reduction="sum"
        )
        ce_count = valid.double().sum()
    taught = valid[:m] | o.get("distill_ignored", False)
    kl_count = taught.double().sum()
    if o.get("normalizer") is not None:
        ce_count, kl_count = (torch.as_tensor(n, **real) for n in o["normalizer"])
    log_s, log_q = (F.log_softmax(v / tau[:, None], 1) for v in (z[:m], p))
    finite = p != -torch.inf
    kl = torch.where(finite, log_q.exp() * (log_q - log_s).where(finite, 0), 0).sum(1) * taught
    ce, kl_mean = ce_sum / ce_count, kl.sum() / kl_count
    ce = ce if ce_count > 0 else z.nan_to_num(0, 0, 0).sum() * 0
    if kl_count == 0:
        return ce, ce, torch.zeros((), **real)
    return ce + (alpha * tau**2 * kl).sum() / kl_count, ce, kl_mean


def soft_targets(x: Inputs) -> Tensor:
    """(B, C) fp64: what labels, labels_b and lam mean; of ignored rows anything."""
    C = x.logits.shape[1]
    one_hot = torch.eye(C, dtype=torch.float64, device=x.logits.device)
    a, b = (one_hot[y.clamp(0, C - 1)] for y in (x.labels, x.options["labels_b"]))
    lam = torch.as_tensor(x.options["lam"], dtype=torch.float64, device=a.device)
    lam = lam.expand(len(a))[:, None]
    return lam * a + (1 - lam) * b


def fp64_truth(x: Inputs, dloss: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64 of the very values that x holds."""
    y = replace_logits(x, x.logits.detach().double().requires_grad_())
    loss = truth(y)[0]
    (gradient,) = torch.autograd.grad(loss * dloss, y.logits)
    return loss.detach(), gradient


def gradient_tolerance(want: Tensor, dtype: torch.dtype) -> float:
    """Relative L2; where the values round badly, what rounding the truth itself costs."""
    return max(GRADIENT_TOLERANCE[dtype], 1.01 * relative_error(want.to(dtype), want))


def loss_tolerance(x: Inputs, real: torch.dtype, want: Tensor) -> float:
    """Of the loss: relative to its size, and to α τ², which multiplies the rounding of the KL."""
    tau, alpha = (
        torch.as_tensor(x.options.get(k, d)) for k, d in (("temperature", 3.0), ("alpha", 1.0))
    )
    unit = 1e-13 if real == torch.float64 else 1e-6
    tau_squared = float((alpha * tau**2).max()) if len(x.last_logits) else 0.0
    return unit * (1 + float(want.abs()) + 0.1 * tau_squared)


def replace_logits(x: Inputs, logits: Tensor) -> Inputs:
    return replace(x, logits=logits)


def relative_error(got: Tensor, want: Tensor) -> float:
    """L2, relative to the truth."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


def eager_error(x: Inputs, dloss: float = 1.0) -> float:
    """What stock PyTorch operations on the same inputs, in fp32, have for a gradient error."""
    y = replace_logits(x, x.logits.detach().float().requires_grad_())
    z, p = y.logits, y.last_logits.float()
    o = {k: v for k, v in y.options.items() if k not in ("normalizer", "grad_scale")}
    tau, alpha = o.pop("temperature", 3.0), o.pop("alpha", 1.0)
    loss = F.cross_entropy(z, y.labels, **o)
    if len(p):
        kl = F.kl_div(
            F.log_softmax(z[: len(p)] / tau, 1), F.softmax(p / tau, 1), reduction="batchmean"
        )
        loss = loss + alpha * tau**2 * kl
    (gradient,) = torch.autograd.grad(loss * dloss, z)
    return relative_error(gradient, fp64_truth(x, dloss)[1])
