"""The contract of `backends.py` as checks: inputs, the fp64 truth, and what must agree with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dlb_fused import reference
from dlb_fused.backends import LossArgs, LossOutputs

INF, NAN = float("inf"), float("nan")
# Of the gradient, relative L2; of the loss, absolute below 1.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


class Backend(Protocol):
    """What is checked: a backend's module, or what watches one."""

    def forward(self, args: LossArgs) -> LossOutputs: ...

    def backward(
        self, args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None
    ) -> Tensor: ...


def make(
    B: int = 5,
    C: int = 10,
    m: int = 3,
    dtype: torch.dtype = torch.float32,
    last_dtype: torch.dtype | None = None,
    seed: int = 0,
    scale: float = 3.0,
    **options: Any,
) -> LossArgs:
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(B, C, generator=g, dtype=torch.float64) * scale).to(dtype)
    p = (torch.randn(m, C, generator=g, dtype=torch.float64) * scale).to(last_dtype or dtype)
    y = torch.randint(0, C, (B,), generator=g)
    options.setdefault("need_grad", True)
    options.setdefault("fresh", B - m)
    args = LossArgs(z, y, p if m else None, m, **options)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    names = ("weight", "temperature", "alpha", "ce_count", "kl_count", "grad_scale", "lam")
    given = {k: getattr(args, k) for k in names}
    return args._replace(**{k: v.to(real) for k, v in given.items() if isinstance(v, Tensor)})


STATS = torch.tensor([3, 4, 5])
#: Of a call with B = 4, m = 2 and C classes; `ignored`: rows.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "no overlap": lambda C: {"m": 0},
    "all overlap": lambda C: {"m": 4},
    "float tau and alpha": lambda C: {"temperature": 0.3, "alpha": 0.1},
    "alpha 0": lambda C: {"alpha": 0.0},
    "tensor tau and alpha": lambda C: {
        "temperature": torch.tensor(1.7), "alpha": torch.tensor(0.3)},
    "rows of tau and alpha": lambda C: {
        "temperature": torch.tensor([1.7, 4.0]), "alpha": torch.tensor([0.3, 0.0])},
    "weight": lambda C: {"weight": torch.linspace(0.0, 2.0, C)},
    "smoothing": lambda C: {"label_smoothing": 0.1},
    "smoothing and weight": lambda C: {
        "label_smoothing": 0.3, "weight": torch.linspace(0.0, 2.0, C)},
    "ignored": lambda C: {"ignored": [0, 2], "stats": STATS.clone()},
    "all ignored": lambda C: {"ignored": [0, 1, 2, 3]},
    "teacher rows": lambda C: {"teacher_rows": torch.tensor([-1, 0]), "stats": STATS.clone()},
    "last valid": lambda C: {
        "last_valid": torch.tensor([1, 0], dtype=torch.uint8), "stats": STATS.clone()},
    "normalizer": lambda C: {"ce_count": torch.tensor(20.0), "kl_count": torch.tensor(7.0)},
    "normalizer 0": lambda C: {"ce_count": torch.tensor(0.0), "kl_count": torch.tensor(0.0)},
    "grad scale": lambda C: {"grad_scale": 1024.0},
    "grad scale tensor": lambda C: {"grad_scale": torch.tensor(0.125)},
    "two labels": lambda C: {"labels_b": second_labels(C), "lam": 0.3},
    "rows of lam": lambda C: {
        "labels_b": second_labels(C), "lam": torch.tensor([0.0, 0.3, 0.9, 1.0])},
    "two labels and weight": lambda C: {
        "labels_b": second_labels(C), "lam": torch.tensor(0.3), "ignored": [0],
        "weight": torch.linspace(0.0, 2.0, C)},
    "two labels, smoothing and weight": lambda C: {
        "labels_b": second_labels(C), "lam": 0.3, "label_smoothing": 0.3,
        "weight": torch.linspace(0.0, 2.0, C)},
    "second label ignored": lambda C: {
        "labels_b": second_labels(C).index_fill_(0, torch.tensor([1, 2]), -100), "lam": 0.3,
        "stats": STATS.clone()},
    "two labels, temperature 1.7": lambda C: {
        "labels_b": second_labels(C), "lam": 0.3, "temperature": 1.7},
    "ignored are distilled": lambda C: {
        "ignored": [0, 2, 3], "stats": STATS.clone(), "distill_ignored": True, "fresh": 4},
    "all ignored, distilled": lambda C: {"ignored": [0, 1, 2, 3], "distill_ignored": True},
    "all ignored, distilled and smoothed": lambda C: {
        "ignored": [0, 1, 2, 3], "distill_ignored": True, "label_smoothing": 0.3},
    "two labels, ignored are distilled": lambda C: {
        "labels_b": second_labels(C).index_fill_(0, torch.tensor([1, 2]), -100), "lam": 0.3,
        "ignored": [0], "stats": STATS.clone(), "distill_ignored": True},
    "no gradient": lambda C: {"need_grad": False},
    "no copy": lambda C: {"copy_logits": False},
    "all cached": lambda C: {"fresh": 4},
}  # fmt: skip


def second_labels(C: int) -> Tensor:
    """Of those that `make` draws for 4 rows, one is the same if C is large."""
    first = make(4, C, 2).labels
    return torch.stack((first[1], first[1], first[0], first[1] // 2))


def make_option(name: str, C: int, dtype: torch.dtype = torch.float32) -> LossArgs:
    options = OPTIONS[name](C)
    ignored = options.pop("ignored", [])
    args = make(**{"B": 4, "C": C, "m": 2, "dtype": dtype, **options})
    args.labels[ignored] = -100
    return args


def strided(value: Tensor, columns: int) -> Tensor:
    """The same rows in a wider matrix."""
    wide = value.new_full((value.shape[0], value.shape[1] + columns), NAN)
    wide[:, : value.shape[1]] = value
    return wide[:, : value.shape[1]]


def in_fp64(args: LossArgs) -> LossArgs:
    wide = {
        k: v.double()
        for k, v in args._asdict().items()
        if isinstance(v, Tensor) and v.is_floating_point()
    }
    return args._replace(**wide, inplace=False, stats=None)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.double().nan_to_num(0), want.double().nan_to_num(0)
    assert error(got, want) <= tolerance or not (got - want).any()


def near(got: Tensor, want: Tensor, unit: float) -> None:
    """Of a loss: absolute below 1, where the logarithm of a sum near 1 has no relative accuracy."""
    torch.testing.assert_close(got.double(), want.double(), rtol=unit, atol=unit, equal_nan=True)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def gradient_close(got: Tensor | None, want: Tensor | None, dtype: torch.dtype) -> None:
    assert got is not None and want is not None and got.dtype == dtype
    close(got, want, max(TOLERANCE[dtype], 1.01 * error(want.to(dtype), want)))


def check(backend: Backend, args: LossArgs, dlosses: tuple[float, ...] = (-3.7,)) -> LossOutputs:
    """Forward, cache, stats and backward against the reference in fp64."""
    truth_args, logits = in_fp64(args), args.logits.clone()
    want_stats = args.stats.clone() if args.stats is not None else None
    want = reference.forward(truth_args._replace(stats=want_stats))
    out = backend.forward(args)
    unit = 1e-13 if out.loss.dtype == torch.float64 else 1e-6
    near(out.loss, want.loss, unit)
    near(out.parts, want.parts, unit)
    if args.need_grad:
        gradient_close(out.dlogits, want.dlogits, args.logits.dtype)
    assert args.inplace or same_bits(logits, args.logits)
    assert want_stats is None or torch.equal(args.stats, want_stats)  # type: ignore[arg-type]
    first = args.logits.shape[0] - args.fresh
    if out.next_logits is not None:
        assert same_bits(out.next_logits, logits[first:])
    if args.fresh:
        assert torch.equal(out.next_labels, args.labels[first:])  # type: ignore[arg-type]
        assert torch.equal(out.next_valid, want.next_valid)  # type: ignore[arg-type]
    if args.need_grad and not args.inplace:
        for dloss in dlosses:
            check_backward(backend, args, out, want.parts, dloss)
    return out


def check_backward(
    backend: Backend, args: LossArgs, out: LossOutputs, parts: Tensor, dloss: float
) -> None:
    d = torch.tensor(dloss, dtype=out.loss.dtype)
    want = reference.backward(in_fp64(args), parts, d.double(), None)
    assert out.dlogits is not None
    for into in (out.dlogits.clone(), None):
        gradient_close(backend.backward(args, out.parts, d, into), want, args.logits.dtype)


# What more than one backend is asked. `check` is of one backend, and returns its outputs.
Check = Callable[[LossArgs], LossOutputs]


def check_guard(check: Check, args: LossArgs, change: str) -> None:
    """One valid row with another label drops the kl of the step as a whole. m = 3."""
    args = args._replace(last_valid=torch.ones(3, dtype=torch.uint8))
    last_labels = args.labels[:3].clone()
    if change != "none":
        last_labels[1] = (last_labels[1] + 1) % args.logits.shape[1]
    if change == "invalid row":
        args.last_valid[1] = 0  # type: ignore[index]
    if change == "ignored":
        args.labels[1] = -100
    kept = change in ("none", "invalid row")
    given = args._replace(last_labels=last_labels)
    assert (check(given).parts[3] > 0) == kept
    given = given._replace(kl_count=torch.tensor(5.0), stats=None)
    assert (check(given).parts[3] > 0) == kept


def check_guard_drops_a_teacher_of_nan(check: Check, args: LossArgs) -> None:
    assert args.last_logits is not None
    args.last_logits.fill_(NAN)
    assert check(args._replace(last_labels=torch.tensor([-5, -5]))).loss.isfinite()


def check_rows_that_are_not_finite(check: Check, args: LossArgs) -> None:
    """Row by row: which gives NaN, which +inf, which never teaches; ignored rows hold anything.
    B = 8, m = 4, all rows cached."""
    z, p, y = args.logits, args.last_logits, args.labels
    assert p is not None
    z[0, 3], z[4, 5], z[5] = NAN, INF, -INF
    y[:] = 7
    z[1, 9] = p[1, 9] = -INF  # both exclude a class
    p[2, 11] = -INF  # only the teacher
    check(args)
    y[[0, 4, 5]] = -100
    out = check(args)
    assert out.dlogits is not None and out.next_valid is not None
    assert out.loss.isfinite() and not out.dlogits[[0, 4, 5]].any()
    assert out.next_valid.tolist() == [0, 1, 1, 1, 0, 0, 1, 1]
    z[3, 2] = -INF  # only the student, where q underflows
    p[3, 2] = -1e4
    out = check(args)
    assert out.loss == INF and out.dlogits is not None and out.dlogits.isfinite().all()
    assert check(args._replace(alpha=0.0)).loss.isfinite()


def check_masks_of_finfo_min(check: Check, args: LossArgs) -> None:
    assert args.last_logits is not None
    for logits in (args.logits, args.last_logits):
        logits[:, 20:] = torch.finfo(logits.dtype).min
    args.labels.remainder_(20)
    check(args)


def check_label_out_of_range(forward: Check, args: LossArgs, label: int) -> None:
    """The loss and the gradient of that row are NaN, and nothing outside is read. B = 4."""
    args.labels[1] = label
    out = forward(args._replace(weight=torch.ones(args.logits.shape[1])))
    assert out.loss.isnan() and out.dlogits is not None
    assert out.dlogits.isnan().all(1).tolist() == [False, True, False, False]


def check_bad_second_label(forward: Check, args: LossArgs, label: int) -> None:
    """As `check_label_out_of_range`, of either label of two, and of a bad lam. B = 4."""
    b = second_labels(args.logits.shape[1])
    given = args._replace(weight=torch.ones(args.logits.shape[1]), labels_b=b, lam=0.3)
    first, second = args.labels.clone(), b.clone()
    first[1] = second[1] = label
    for bad in (
        given._replace(labels=first),
        given._replace(labels_b=second),
        given._replace(labels=first, lam=0.0),
        given._replace(labels_b=second, lam=1.0),
        *(given._replace(lam=torch.tensor([0.3, lam, 1.0, 0.0])) for lam in (-0.1, 1.5, NAN)),
    ):
        out = forward(bad)
        assert out.loss.isnan() and out.dlogits is not None
        assert out.dlogits.isnan().all(1).tolist() == [False, True, False, False]
        assert out.dlogits[[0, 2, 3]].isfinite().all()


def check_bad_values(forward: Check, args: LossArgs, bad: float) -> None:
    """Of temperature and alpha, in device memory. B = 4, m = 2."""
    values = torch.tensor([1.0, bad])
    out = forward(args._replace(temperature=values))
    assert out.loss.isnan() and out.dlogits is not None
    assert out.dlogits.isnan().any(1).tolist() == [False, True, False, False]
    if not bad >= 0:
        out = forward(args._replace(alpha=values))
        assert out.loss.isnan() and out.dlogits is not None
        assert out.dlogits[1].isnan().all() and out.dlogits[0].isfinite().all()


def check_offsets(check: Check, args: LossArgs, offsets: tuple[float, float]) -> None:
    assert args.last_logits is not None
    args.logits.add_(offsets[0])
    args.last_logits.add_(offsets[1])
    check(args)
