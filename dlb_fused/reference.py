"""The mathematics of the loss, twice: as anyone would write it, and in closed form.

`dlb_loss_naive` is the loss in stock PyTorch operations with autograd: the truth.
`forward` and `backward` are the closed form in the contract that every kernel obeys
(`backends.py`): the specification, and the backend `eager`. Kernels cite the equations by number.

With z = logits, z' = last_logits, y = labels, ε = label_smoothing, w = weight (or 1), rows i < B,
classes c < C, x = z - max z and u = z' - max z':

    (1) S_i = Σ_c exp(x_c)         other_i = Σ_{c≠y} exp(x_c)       nll_c = log S_i - x_c
    (2) t_c = (1-ε) w_y [c=y] + ε w_c / C                           A_i = Σ_c t_c
        ce_i = Σ_c t_c nll_c                                        ce = Σ_valid ce_i / ce_count
    (3) q = softmax(z'/τ) = exp(u/τ) / T_i                       s = softmax(z/τ) = exp(x/τ) / St_i
        kl_i = Σ_c q_c (u_c - x_c) / τ + log(St_i / T_i)            kl = Σ_taught kl_i / kl_count
    (4) loss = ce + Σ_taught α τ² kl_i / kl_count
    (5) dce_c = A p_c - t_c for c ≠ y,  (A - t_y) p_y - t_y other / S for c = y      p = softmax(z)
    (6) dz_c = dloss ( dce_c / ce_count + [i taught] α τ (s_c - q_c) / kl_count )

A row is valid if its label is not ignore_index. An overlap row i < m is taught if it is valid, has
a teacher row, that row is valid in the cache, and the guard found no difference. A class with z' =
-inf has weight 0 in (3), by selection. The inverse of a count of 0 is 0. In (5) the label's term
avoids p_y - 1, which has no digits left for a confident row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fused.backends import LossArgs, LossOutputs


def dlb_loss_naive(
    logits: Tensor,
    labels: Tensor,
    last_logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float = 3.0,
    alpha: float = 1.0,
) -> Tensor:
    """The loss of DLB in stock PyTorch operations: cross-entropy + α·τ²·KL to the last logits on
    rows [:m].

    logits (B, C), labels (B,) int64, last_logits (m, C). The KL is the mean over all m rows, as in
    the official script; `dlb_loss` leaves out rows with ignored labels.
    """
    ce = F.cross_entropy(
        logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if last_logits is None or len(last_logits) == 0:
        return ce
    overlap = logits[: len(last_logits)]
    kl = F.kl_div(
        F.log_softmax(overlap / temperature, dim=1),
        F.softmax(last_logits.detach() / temperature, dim=1),
        reduction="batchmean",
    )
    return ce + alpha * temperature**2 * kl


def why_not(logits: Tensor) -> str | None:
    """The reference runs wherever PyTorch does."""
    return None


@torch.no_grad()
def forward(args: LossArgs) -> LossOutputs:
    rows = _rows(args)
    sums = _sums(args, rows)
    counts = _counts(args, rows)
    ce_i, kl_i = _row_losses(args, rows, sums)
    distil_i = torch.where(rows.alpha == 0, 0, rows.alpha * rows.temperature**2 * kl_i)
    ce, kl, distil = (
        torch.where(count <= 0, 0, loss_i.sum() / count)
        for loss_i, count in ((ce_i, counts[0]), (kl_i, counts[1]), (distil_i, counts[1]))
    )
    dlogits = _gradient(args, rows, sums, counts, args.grad_scale) if args.need_grad else None
    next_logits, next_labels, next_valid = _next_cache(args)
    if args.stats is not None:
        args.stats.add_(torch.stack(rows.stats))
    if dlogits is not None and args.inplace:
        dlogits = args.logits.detach().copy_(dlogits)
    parts = torch.stack((ce, kl, *counts))
    return LossOutputs(ce + distil, parts, dlogits, next_logits, next_labels, next_valid)


@torch.no_grad()
def backward(args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None) -> Tensor:
    if dlogits is not None and dloss.device.type == "cpu" and dloss == args.grad_scale:
        return dlogits
    rows = _rows(args)
    rows = rows._replace(taught=rows.taught & ~(parts[3] <= 0))
    return _gradient(args, rows, _sums(args, rows), (parts[2], parts[3]), dloss)


@torch.no_grad()
def rescale_(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> None:
    dlogits.copy_(dlogits.to(dloss.dtype) * (dloss / grad_scale))


class _Rows(NamedTuple):
    """What is known of the rows before any class is summed; m = overlap."""

    z: Tensor  # (B, C) real
    labels: Tensor  # (B,) int64, 0 where not valid
    valid: Tensor  # (B,) bool
    bad: Tensor  # (B,) bool: label out of range (only on a GPU: the CPU raises)
    taught: Tensor  # (m,) bool
    teacher: Tensor  # (m, C) real, z' of row i; anything where not taught
    temperature: Tensor  # (m,) or (), real
    alpha: Tensor  # (m,) or (), real
    stats: tuple[Tensor, Tensor, Tensor]  # matched, mismatched, skipped


def _rows(args: LossArgs) -> _Rows:
    z = args.logits.detach()
    real = torch.float64 if z.dtype == torch.float64 else torch.float32
    m, C = args.overlap, z.shape[1]
    valid = args.labels != args.ignore_index
    bad = valid & ((args.labels < 0) | (args.labels >= C))
    if z.device.type == "cpu" and bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(label_out_of_range(i, int(args.labels[i]), C, args.ignore_index))
    labels = torch.where(valid & ~bad, args.labels, 0)
    taught, mismatched, teacher_rows = _taught(args, valid)
    teacher = z.new_empty(0, C) if args.last_logits is None else args.last_logits.detach()
    teacher = teacher[:m] if teacher_rows is None else teacher[teacher_rows]
    matched = taught.sum()
    return _Rows(
        z.to(real),
        labels,
        valid,
        bad,
        taught,
        teacher.to(real),
        _as_tensor(args.temperature, z, real),
        _as_tensor(args.alpha, z, real),
        (matched, mismatched, m - matched - mismatched),
    )


def _as_tensor(value: float | Tensor, z: Tensor, real: torch.dtype) -> Tensor:
    """A number is filled in on the device: to copy it there, the host would wait."""
    return value if isinstance(value, Tensor) else z.new_full((), value, dtype=real)


def label_out_of_range(row: int, label: int, C: int, ignore_index: int) -> str:
    """The sentence that every backend on the CPU raises as IndexError."""
    return (
        f"labels[{row}] is {label}, but logits have {C} classes "
        f"(valid: 0 to {C - 1}, or ignore_index={ignore_index})"
    )


def _taught(args: LossArgs, valid: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(m,) bool: which rows learn from the cache; the number of mismatched rows; (m,) int64: from
    which row, None: i."""
    m = args.overlap
    taught = torch.ones(m, dtype=torch.bool, device=valid.device)
    mismatched, teacher_rows = taught.new_zeros((), dtype=torch.int64), None
    if args.teacher_rows is not None:
        taught = args.teacher_rows >= 0
        teacher_rows = args.teacher_rows.clamp(min=0)
        mismatched = (~taught).sum()
    if args.last_valid is not None:
        last_valid = args.last_valid[:m] if teacher_rows is None else args.last_valid[teacher_rows]
        taught = taught & (last_valid != 0)
    if args.last_labels is not None:
        differs = taught & (args.last_labels[:m] != args.labels[:m])
        mismatched = differs.sum()
        taught = taught & ~differs.any()
    return taught & valid[:m], mismatched, teacher_rows


def _counts(args: LossArgs, rows: _Rows) -> tuple[Tensor, Tensor]:
    """ce_count and kl_count, real: the two denominators."""
    ce_count, kl_count = args.ce_count, args.kl_count
    if ce_count is None:
        w = 1 if args.weight is None else args.weight[rows.labels]
        ce_count = (w * rows.valid).sum(dtype=rows.z.dtype)
    taught = rows.taught.sum(dtype=rows.z.dtype)
    if kl_count is None:
        kl_count = taught
    elif args.last_labels is not None:
        kl_count = torch.where(rows.stats[1] > 0, 0, kl_count)  # dropped by the guard
    return ce_count, kl_count


def count_rows(args: LossArgs) -> tuple[Tensor, Tensor]:
    """The same for one batch by itself, with no look at its logits."""
    real = torch.float64 if args.logits.dtype == torch.float64 else torch.float32
    valid = args.labels != args.ignore_index
    taught, *_ = _taught(args, valid)
    weights = valid
    if args.weight is not None:
        in_range = valid & (args.labels >= 0) & (args.labels < args.logits.shape[1])
        weights = args.weight[torch.where(in_range, args.labels, 0)] * valid
    return weights.sum(dtype=real), taught.sum(dtype=real)


class _Sums(NamedTuple):
    """Exponentials and their sums, of (1) and (3)"""

    x: Tensor  # (B, C)
    e: Tensor  # (B, C) exp(x)
    S: Tensor  # (B, 1)
    other: Tensor  # (B, 1)
    u: Tensor  # (m, C)
    e_student: Tensor  # (m, C) exp(x/τ)
    St: Tensor  # (m, 1)
    e_teacher: Tensor  # (m, C) exp(u/τ)
    T: Tensor  # (m, 1)


def _sums(args: LossArgs, rows: _Rows) -> _Sums:
    x = rows.z - rows.z.amax(1, keepdim=True)
    e = x.exp()
    other = e.scatter(1, rows.labels[:, None], 0).sum(1, keepdim=True)
    tau = rows.temperature.expand(args.overlap)[:, None]
    u = rows.teacher - rows.teacher.amax(1, keepdim=True)
    e_student, e_teacher = (x[: args.overlap] / tau).exp(), (u / tau).exp()
    S, St, T = (v.sum(1, keepdim=True) for v in (e, e_student, e_teacher))
    return _Sums(x, e, S, other, u, e_student, St, e_teacher, T)


def _target(args: LossArgs, rows: _Rows) -> tuple[Tensor, Tensor, Tensor | float]:
    """(B,) t_y and A - t_y, and the smoothing part ε w_c / C of t_c for every class, of (2)."""
    C, eps = rows.z.shape[1], args.label_smoothing
    if args.weight is None:
        t_y = torch.full_like(rows.z[:, 0], 1 - eps + eps / C)
        return t_y, torch.full_like(t_y, eps * (C - 1) / C), eps / C
    w_y = args.weight[rows.labels]
    return (
        (1 - eps + eps / C) * w_y,
        eps / C * (args.weight.sum() - w_y),
        eps / C * args.weight,
    )


def _row_losses(args: LossArgs, rows: _Rows, sums: _Sums) -> tuple[Tensor, Tensor]:
    """(B,) ce_i of (2) and (m,) kl_i of (3); 0 where a row has none."""
    x, log_s = sums.x, sums.S[:, 0].log()
    t_y, rest, smooth = _target(args, rows)
    x_y = x.gather(1, rows.labels[:, None])[:, 0]
    ce = (t_y + rest) * log_s - torch.where(t_y == 0, 0, t_y * x_y)
    if args.label_smoothing > 0:
        others = torch.zeros_like(x) + smooth
        others.scatter_(1, rows.labels[:, None], 0)
        ce = ce - torch.where(others == 0, 0, others * x).sum(1)
    ce = torch.where(rows.bad, torch.nan, torch.where(rows.valid, ce, 0))

    m = args.overlap
    # A class that the student rules out and the teacher does not costs +inf, also where its weight
    # underflows to 0.
    gap = torch.where(x[:m] == -torch.inf, torch.inf, sums.u - x[:m])
    weighted = torch.where(gap == torch.inf, gap, sums.e_teacher * gap)
    dot = torch.where(sums.u == -torch.inf, 0, weighted).sum(1)
    T, St = sums.T[:, 0], sums.St[:, 0]
    kl = dot / T / rows.temperature.expand(m) + (St / T).log()
    kl = torch.where(_bad_settings(rows), torch.nan, kl)
    return ce, torch.where(rows.taught, kl, 0)


def _bad_settings(rows: _Rows) -> Tensor:
    """A temperature or alpha that a device tensor holds and that cannot be refused without a
    sync."""
    tau, alpha = rows.temperature, rows.alpha
    return ~((tau > 0) & (tau < torch.inf) & (alpha >= 0) & (alpha < torch.inf))


def _gradient(
    args: LossArgs,
    rows: _Rows,
    sums: _Sums,
    counts: tuple[Tensor, Tensor],
    scale: float | Tensor,
) -> Tensor:
    """(B, C) like logits: equation (6). A count of 0 leaves 0, whatever the row holds."""
    y = rows.labels[:, None]
    t_y, rest, smooth = _target(args, rows)
    t_y, rest = t_y[:, None], rest[:, None]
    label_term = rest * sums.e.gather(1, y) / sums.S - t_y * (sums.other / sums.S)
    dce = ((t_y + rest) / sums.S * sums.e - smooth).scatter(1, y, label_term) / counts[0]
    dce = torch.where(rows.bad[:, None], torch.nan, dce)
    dz = torch.where(rows.valid[:, None] & ~(counts[0] <= 0), dce, 0)

    drift = sums.e_student / sums.St - sums.e_teacher / sums.T
    weight = torch.where(_bad_settings(rows), torch.nan, rows.alpha * rows.temperature / counts[1])
    drift = weight.expand(args.overlap)[:, None] * drift
    dz[: args.overlap] += torch.where(rows.taught[:, None] & ~(counts[1] <= 0), drift, 0)
    return (dz * scale).to(args.logits.dtype)


def _next_cache(args: LossArgs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if args.fresh == 0:
        return None, None, None
    logits = args.logits.detach()[-args.fresh :]
    top = logits.amax(1)
    valid = (top < torch.inf) & (top > -torch.inf)  # NaN compares false
    return (
        logits.clone(memory_format=torch.contiguous_format) if args.copy_logits else None,
        args.labels[-args.fresh :].clone(),
        valid.to(torch.uint8),
    )
