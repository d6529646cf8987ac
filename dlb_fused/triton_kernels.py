"""The Triton kernels. Which of them runs, and how, is decided in `triton_backend.py`.

Short rows are read once and stay in registers (`tile_kernel`, several rows a program); longer ones
are read twice (`loop_kernel`): maxima and sums, then the gradient. Both compute equations (1) to
(6) of `reference.py` in real: fp64 for fp64 logits, else fp32. Exponents are in base 2:
x = fma(z, k, -top) with top = round(max z · k), where k is log2(e) for the cross-entropy and
log2(e) / τ for the divergence. The rounding of top shifts all x of a row alike, by up to 1e-3 at an
offset of 1e4, and no equation changes under a common shift, as long as all of its terms use x; the
two scales meet in none. Nothing else needs correcting.

Every program leaves its sums in a workspace; the last one to finish adds them up in a fixed order,
so that the bits do not depend on the schedule. Each program counts the valid rows itself, from L2;
for large batches `count_kernel` does so in a small launch before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The arguments of the kernels, in groups. A field that is None is left out of the compiled code.


class Batch(NamedTuple):
    labels: Any
    teacher_rows: Any
    last_labels: Any
    last_valid: Any
    weight: Any
    parity: Any
    labels_b: Any
    distill_ignored: Any  # None: they are not


class Counts(NamedTuple):
    ce: Any  # () real, the user's
    kl: Any
    chunks: Any  # what `count_kernel` left
    parts: Any  # backward: those that forward used


class Cache(NamedTuple):
    logits: Any
    labels: Any
    valid: Any


class Sums(NamedTuple):
    loss: Any
    parts: Any
    stats: Any
    scratch: Any
    counter: Any


# The kernels pass many arguments; one a line would double their length.
# fmt: off

# ---- scalars ----


@triton.jit
def _value(x, real: tl.constexpr):
    """A scalar of the user: a device tensor, or the bits of a double."""
    if x.dtype.is_ptr():
        value = tl.load(x).to(real)
    else:
        value = x.to(tl.float64, bitcast=True).to(real)
    return value


@triton.jit
def _row_values(x, rows, taught, PER_ROW: tl.constexpr, real: tl.constexpr):
    """The value of each row; 1 where it is not taught."""
    if PER_ROW:
        values = tl.load(x + rows, mask=taught, other=1.0).to(real)
    else:
        values = tl.where(taught, _value(x, real), 1.0)
    return values


@triton.jit
def _inverse(count):
    return tl.where(count <= 0, 0.0, 1.0 / tl.where(count <= 0, 1.0, count))  # NaN stays NaN


@triton.jit
def _log2e(real: tl.constexpr):
    return tl.full((), 1.4426950408889634, real)


@triton.jit
def _ln2(real: tl.constexpr):
    return tl.full((), 0.6931471805599453, real)


@triton.jit
def _exponent(z, top, scale):
    """z scale - top with one rounding; top: the rounded maximum of z scale."""
    return tl.fma(z, scale, -top)


@triton.jit
def _first_row(parity, slot_rows, BACKWARD: tl.constexpr):
    """The first row of the cache's slot that teaches: `parity`, after forward the other one."""
    first = tl.full((), 0, tl.int64)
    if parity is not None:
        slot = tl.load(parity)
        if BACKWARD:
            slot = 1 - slot
        first = slot.to(tl.int64) * slot_rows
    return first


# ---- counts ----


@triton.jit
def _teacher(rows, batch, size):
    """The teacher's row for each row, and whether it has one that may teach."""
    _, m, first, _ = size
    may = rows < m
    row = rows.to(tl.int64)
    if batch.teacher_rows is not None:
        row = tl.load(batch.teacher_rows + rows, mask=may, other=-1)
        may = may & (row >= 0)
    row += first
    if batch.last_valid is not None:
        may = may & (tl.load(batch.last_valid + row, mask=may, other=0) != 0)
    return row, may


@triton.jit
def _valid(y, rows, batch, size):
    """Which rows, with the labels y, have a cross-entropy."""
    B, _, _, ignore_index = size
    valid = y != ignore_index
    if batch.labels_b is not None:
        b = tl.load(batch.labels_b + rows, mask=rows < B, other=ignore_index)
        valid = valid & (b != ignore_index)
    return valid


@triton.jit
def _learns(may, valid, batch):
    """Which rows learn from the teacher that they may have, the guard apart."""
    learns = may
    if batch.distill_ignored is None:
        learns = may & valid
    return learns


@triton.jit
def _tally(rows, batch, size, C: tl.constexpr, TEACHER: tl.constexpr, real: tl.constexpr):
    """For each row its part of ce_count, and as 0 or 1: is taught (guard apart), differs."""
    B, m, _, ignore_index = size
    y = tl.load(batch.labels + rows, mask=rows < B, other=ignore_index)
    valid = _valid(y, rows, batch, size)
    if batch.weight is None or batch.labels_b is not None:
        ce = valid.to(real)
    else:
        ce = tl.load(batch.weight + y, mask=valid & (y >= 0) & (y < C), other=0.0).to(real)
    taught = tl.zeros_like(rows)
    differs = tl.zeros_like(rows)
    if TEACHER:
        row, may = _teacher(rows, batch, size)
        taught = _learns(may, valid, batch).to(tl.int32)
        if batch.last_labels is not None:
            label = tl.load(batch.last_labels + row, mask=may, other=0)
            differs = (may & (label != y)).to(tl.int32)
        elif batch.teacher_rows is not None:
            row = tl.load(batch.teacher_rows + rows, mask=rows < m, other=0)
            differs = (row < 0).to(tl.int32)
    return ce, taught, differs


@triton.jit
def _count(
    batch, chunks, size, C: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr,
    real: tl.constexpr,
):
    """ce_count of the step, and its numbers of taught (guard apart) and of differing rows."""
    B = size[0]
    lane = tl.arange(0, BLOCK)
    ce = tl.zeros([BLOCK], real)
    taught = tl.zeros([BLOCK], tl.int32)
    differs = tl.zeros([BLOCK], tl.int32)
    if chunks is None:
        for start in range(0, B, BLOCK):
            one, two, three = _tally(start + lane, batch, size, C, TEACHER, real)
            ce += one
            taught += two
            differs += three
    else:
        n = tl.cdiv(B, BLOCK)
        for start in range(0, n, BLOCK):
            i = start + lane
            ce += tl.load(chunks + i, mask=i < n, other=0.0)
            taught += tl.load(chunks + n + i, mask=i < n, other=0.0).to(tl.int32)
            differs += tl.load(chunks + 2 * n + i, mask=i < n, other=0.0).to(tl.int32)
    return tl.sum(ce, 0), tl.sum(taught, 0), tl.sum(differs, 0)


@triton.jit(do_not_specialize=["B", "m", "slot_rows", "ignore_index"])
def count_kernel(
    batch, chunks, B: tl.int32, m: tl.int32, slot_rows: tl.int32, ignore_index: tl.int64,
    C: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):
    """Counts of BLOCK rows a program, for batches too long for every program to count."""
    real: tl.constexpr = chunks.dtype.element_ty
    pid = tl.program_id(0)
    n = tl.num_programs(0)
    size = (B, m, _first_row(batch.parity, slot_rows, False), ignore_index)
    rows = pid * BLOCK + tl.arange(0, BLOCK)
    ce, taught, differs = _tally(rows, batch, size, C, TEACHER, real)
    tl.store(chunks + pid, tl.sum(ce, 0))
    tl.store(chunks + n + pid, tl.sum(taught, 0).to(real))
    tl.store(chunks + 2 * n + pid, tl.sum(differs, 0).to(real))


@triton.jit
def _step_counts(
    batch, counts, size, C: tl.constexpr, TEACHER: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr, real: tl.constexpr,
):
    """ce_count, kl_count, and whether rows are taught; then taught and differing rows for stats."""
    ce = tl.full((), 0, real)
    kl = tl.full((), 0, real)
    taught = tl.full((), 0, tl.int32)
    differs = tl.full((), 0, tl.int32)
    keep = tl.full((), 1, tl.int32)
    if counts.parts is not None:
        ce = tl.load(counts.parts + 2)
        kl = tl.load(counts.parts + 3)
        keep = 1 - (kl <= 0).to(tl.int32)
    else:
        if COUNT:
            ce, taught, differs = _count(batch, counts.chunks, size, C, TEACHER, BLOCK, real)
            if batch.last_labels is not None:
                keep = (differs == 0).to(tl.int32)
                taught *= keep
            kl = taught.to(real)
        if counts.ce is not None:
            ce = tl.load(counts.ce).to(real)
        if counts.kl is not None:
            kl = tl.load(counts.kl).to(real) * keep
    return ce, kl, keep, taught, differs


# ---- equations, for a vector of rows or for one ----


@triton.jit
def _labels(
    y, rows, valid, z_rows, batch, lam, C: tl.constexpr, LAMS: tl.constexpr, real: tl.constexpr
):
    """The label of each row whose class is left out of the sums, and of the other one, b: its
    class, -1 if there is none, its logit, and its share. z_rows: where the rows begin.

    Of two labels the likelier one is left out; of something out of range the label is -1.
    """
    b = tl.full(y.shape, -1, tl.int64)
    z_b = tl.full(y.shape, 0, real)
    share = z_b
    if batch.labels_b is not None:
        b = tl.load(batch.labels_b + rows, mask=valid, other=-1)
        first = _row_values(lam, rows, valid, LAMS, real)
        known = (y >= 0) & (y < C) & (b >= 0) & (b < C) & (first >= 0) & (first <= 1)
        first = tl.where(y == b, 1.0, first)
        z_y = tl.load(z_rows + y, mask=known, other=0.0).to(real)
        z_b = tl.load(z_rows + b, mask=known, other=0.0).to(real)
        swap = (first == 0) | ((first < 1) & (z_b > z_y))
        share = tl.where(swap, first, 1.0 - first)
        z_b = tl.where(swap, z_y, z_b)
        label = tl.where(swap, b, y)
        b = tl.where(known & (share > 0), tl.where(swap, y, b), -1)
        y = tl.where(known, label, -1)
    return y, (b, z_b, share)


@triton.jit
def _label_ce(hard, nll):
    return tl.where(hard == 0, 0.0, hard * nll)  # nll may be +inf


@triton.jit
def _label_terms(sums, y, b, valid, share, batch, smoothing, C: tl.constexpr, real: tl.constexpr):
    """Equations (2) and (5): ce_i, the factor of e_c, the gradient at the label and at b, and
    ε share / C. b: class, x and share.

    A label out of range makes all of them NaN.
    """
    other, x_y, w_sum, wx_sum = sums
    if batch.distill_ignored is not None:
        share = tl.where(valid, share, 0.0)
    known = (y >= 0) & (y < C)
    e_y = tl.exp2(x_y)
    total = other + e_y
    log_total = tl.log2(total)
    # Exactly 0 where no other class has weight, C = 1 among them.
    nll = tl.where((other == 0) & (e_y > 0), 0.0, _ln2(real) * (log_total - x_y))
    w_y = tl.where(known | (valid == 0), 1.0, float("nan")).to(real)
    if batch.weight is not None:
        w_y *= tl.load(batch.weight + y, mask=known & valid, other=1.0).to(real)
    scale = share / total
    hard = w_y
    if smoothing is None:
        less = tl.zeros_like(nll)
    else:
        eps = _value(smoothing, real)
        each = eps / C
        hard = (1.0 - eps) * w_y
        less = tl.zeros_like(nll) + share * each
    at_b = less
    if batch.labels_b is None:
        ce = _label_ce(hard, nll)
        if smoothing is None:
            factor = scale * hard
            at_label = -factor * other
        else:
            factor = scale * (hard + each * w_sum)
            at_label = scale * (each * (w_sum - w_y) * e_y - (hard + each * w_y) * other)
    else:
        c, x_b, share_b = b
        w_b = tl.full(y.shape, 1, real)
        if batch.weight is not None:
            w_b = tl.load(batch.weight + c, mask=c >= 0, other=1.0).to(real)
        hard_b = tl.where(c >= 0, share_b, 0.0) * w_b
        hard *= 1.0 - share_b
        if smoothing is not None:
            hard_b *= 1.0 - eps
        target = hard
        rest = hard_b
        target_b = hard_b
        rest_b = hard
        factor = hard + hard_b
        if smoothing is not None:
            target += each * w_y
            rest += each * (w_sum - w_y)
            target_b += each * w_b
            rest_b += each * (w_sum - w_b)
            factor += each * w_sum
        ce = _label_ce(hard, nll) + _label_ce(hard_b, _ln2(real) * (log_total - x_b))
        e_b = tl.exp2(x_b)
        factor *= scale
        at_label = scale * (rest * e_y - target * other)
        at_b = scale * (rest_b * e_b - target_b * (other - e_b + e_y))
    if smoothing is not None:
        ce += each * _ln2(real) * (log_total * w_sum - wx_sum)
    return tl.where(valid, ce, 0.0), factor, at_label, at_b, less


@triton.jit
def _teaching(
    temperature, alpha, rows, taught, kl_share, TAUS: tl.constexpr, ALPHAS: tl.constexpr,
    real: tl.constexpr,
):
    """For each row τ, α, and the factor of equation (6), 0 where it is not taught.

    A bad value of a taught row is NaN, and makes its row NaN.
    """
    tau = _row_values(temperature, rows, taught, TAUS, real)
    tau = tl.where((tau > 0) & (tau < float("inf")), tau, float("nan"))
    a = _row_values(alpha, rows, taught, ALPHAS, real)
    a = tl.where(a >= 0, a, float("nan"))
    return tau, a, tl.where(taught, a * tau * kl_share, 0.0)


@triton.jit
def _distil_terms(dot, St, T, tau, alpha, taught, real: tl.constexpr):
    """Equation (3) and the row's part of (4): kl_i and α τ² kl_i."""
    kl = _ln2(real) * (dot / T + tl.log2(St / T))
    # 0 times infinity where q underflows.
    kl = tl.where((dot - dot == 0) | (St <= 0) | (St != St) | (T != T), kl, float("inf"))
    kl = tl.where(taught, kl, 0.0)
    return kl, tl.where(taught & (alpha != 0), alpha * tau * tau * kl, 0.0)


@triton.jit
def _gap(u, x):
    """u - x of equation (3), so that q times it is 0 for a class that the teacher excludes, and not
    finite for one that only the student excludes."""
    return tl.maximum(u - x, -1e30)


# ---- the end of a launch ----


@triton.jit
def _total(values, n, BLOCK: tl.constexpr, real: tl.constexpr):
    """The sum of n values that other programs left, always in the same order."""
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], real)
    for start in range(0, n, BLOCK):
        i = start + lane
        acc += tl.load(values + i, mask=i < n, other=0.0, cache_modifier=".cg")
    return tl.sum(acc, 0)


@triton.jit
def _finish(
    own, counts, m, batch, sums, TEACHER: tl.constexpr, BLOCK: tl.constexpr, real: tl.constexpr
):
    """Leaves the sums of this program; the last program writes loss, parts and stats.

    The barrier orders the stores and reads of all threads before the release of one of them. The
    counter goes back to 0 by an atomic: a plain store could be seen late by the next launch.
    """
    ce_count, kl_count, _, taught, differs = counts
    n = tl.num_programs(0)
    mine = sums.scratch + tl.program_id(0)
    tl.store(mine, own[0])
    if TEACHER:
        tl.store(mine + n, own[1])
        tl.store(mine + 2 * n, own[2])
    tl.debug_barrier()
    if tl.atomic_add(sums.counter, 1, sem="acq_rel") == n - 1:
        tl.atomic_xchg(sums.counter, 0, sem="relaxed")
        ce = _total(sums.scratch, n, BLOCK, real)
        ce = tl.where(ce_count <= 0, 0.0, ce * _inverse(ce_count))
        kl = tl.full((), 0, real)
        distil = tl.full((), 0, real)
        if TEACHER:
            kl = _total(sums.scratch + n, n, BLOCK, real)
            kl = tl.where(kl_count <= 0, 0.0, kl * _inverse(kl_count))
            distil = _total(sums.scratch + 2 * n, n, BLOCK, real)
            distil = tl.where(kl_count <= 0, 0.0, distil * _inverse(kl_count))
        tl.store(sums.loss, ce + distil)
        tl.store(sums.parts, ce)
        tl.store(sums.parts + 1, kl)
        tl.store(sums.parts + 2, ce_count)
        tl.store(sums.parts + 3, kl_count)
        if sums.stats is not None:
            tl.store(sums.stats, tl.load(sums.stats) + taught)
            tl.store(sums.stats + 1, tl.load(sums.stats + 1) + differs)
            tl.store(sums.stats + 2, tl.load(sums.stats + 2) + (m - taught - differs))
        if batch.parity is not None:
            tl.store(batch.parity, 1 - tl.load(batch.parity))


# ---- what both forms of a row begin and end with ----


@triton.jit
def _scales(grad_scale, dloss, real: tl.constexpr):
    """The factor of the gradient to write, and whether the stored one already carries it."""
    scale = _value(grad_scale, real)
    done = tl.full((), 0, tl.int1)
    if dloss is not None:
        upstream = tl.load(dloss).to(real)
        done = upstream == scale
        scale = upstream
    return scale, done


@triton.jit
def _in_turn(heavy):
    """What this program works on, of things of which the first `heavy` ones have a teacher: heavy
    and light ones side by side, so that they fill each other's gaps."""
    turn = tl.program_id(0)
    pairs = tl.minimum(heavy, tl.num_programs(0) - heavy)
    index = tl.where(turn % 2 == 0, turn // 2, heavy + turn // 2)
    rest = tl.where(heavy > pairs, turn - pairs, turn)
    return tl.where(turn < 2 * pairs, index, rest)


@triton.jit
def _cache_row(rows, B, fresh, first):
    """The row of the next cache for each row of the batch, and whether it has one."""
    return rows - (B - fresh) + first, (rows >= B - fresh) & (rows < B)


# ---- rows that stay in registers ----


@triton.jit
def _tile_rows(
    z, p, y, b, valid, taught, rows, cols, shares, batch, temperature, alpha, smoothing,
    C: tl.constexpr, TAUS: tl.constexpr, ALPHAS: tl.constexpr, GRAD: tl.constexpr,
    real: tl.constexpr,
):
    """Gradient of a tile; then for each row ce, kl, α τ² kl, and NaN if it must never teach."""
    hit = cols[None, :] == tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)[:, None]
    z_max = tl.max(z, 1)
    x = _exponent(z, (z_max * _log2e(real))[:, None], _log2e(real))
    e = tl.exp2(x)
    other = tl.sum(tl.where(hit, 0.0, e), 1)
    x_y = tl.sum(tl.where(hit, x, 0.0), 1)
    w_sum = tl.zeros_like(other)
    wx_sum = w_sum
    w = (cols < C).to(real)
    if smoothing is not None:
        if batch.weight is not None:
            w = tl.load(batch.weight + cols, mask=cols < C, other=0.0).to(real)
        w_sum += tl.sum(w, 0)
        wx_sum = tl.sum(tl.where(w[None, :] == 0, 0.0, w[None, :] * x), 1)
    x_b = _exponent(b[1], z_max * _log2e(real), _log2e(real))
    ce, factor, at_label, at_b, less = _label_terms(
        (other, x_y, w_sum, wx_sum), y, (b[0], x_b, b[2]), valid, shares[0], batch, smoothing, C,
        real
    )
    g = x
    if GRAD:
        g = e * factor[:, None]
        if smoothing is not None:
            g -= less[:, None] * w[None, :]
        g = tl.where(hit, at_label[:, None], g)
        if batch.labels_b is not None:
            g = tl.where(cols[None, :] == b[0].to(tl.int32)[:, None], at_b[:, None], g)
    kl = tl.zeros_like(ce)
    distil = kl
    if p is not None:
        tau, a, share = _teaching(temperature, alpha, rows, taught, shares[1], TAUS, ALPHAS, real)
        k = _log2e(real) / tau
        top = tl.where(taught, tl.max(p, 1) * k, 0.0)
        u = _exponent(p, top[:, None], k[:, None])
        x = _exponent(z, (z_max * k)[:, None], k[:, None])
        q = tl.exp2(u)
        s = tl.exp2(x)
        T = tl.where(taught, tl.sum(q, 1), 1.0)
        St = tl.sum(s, 1)
        dot = tl.sum(q * _gap(u, x), 1)
        kl, distil = _distil_terms(dot, St, T, tau, a, taught, real)
        if GRAD and C > 1:  # of one class both are the same, but for the rounding of the division
            g += s * (share / St)[:, None]
            g -= q * (share / T)[:, None]
    if GRAD:
        live = valid
        if batch.distill_ignored is not None and p is not None:
            live = valid | taught
        g = tl.where(live[:, None], g, 0.0)
    return g, ce, kl, distil, other + x_y


@triton.jit(
    do_not_specialize=["temperature", "alpha", "grad_scale", "smoothing", "lam", "B", "m", "fresh",
    "slot_rows", "step", "last_step", "out_step", "ignore_index"]
)
def tile_kernel(
    logits, last_logits, dlogits, dloss, batch, counts, cache, sums, temperature, alpha,
    grad_scale, smoothing, lam, B: tl.int32, m: tl.int32, fresh: tl.int32, slot_rows: tl.int32,
    step: tl.int64, last_step: tl.int64, out_step: tl.int64, ignore_index: tl.int64,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    UNIT: tl.constexpr, COUNT: tl.constexpr, TAUS: tl.constexpr, ALPHAS: tl.constexpr,
    LAMS: tl.constexpr, COUNT_BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr, real: tl.constexpr,
):
    """ROWS rows a program, each read once and written once.

    Steps between rows come in units of UNIT elements: the compiler then sees their divisibility,
    and with C known too, makes 128-bit accesses wherever the bytes of a row allow them.
    """
    TEACHER: tl.constexpr = last_logits is not None
    BACKWARD: tl.constexpr = dloss is not None
    scale, done = _scales(grad_scale, dloss, real)
    if BACKWARD:
        if done:
            return
    first = _first_row(batch.parity, slot_rows, BACKWARD)
    size = (B, m, first, ignore_index)
    tile = _in_turn(tl.cdiv(m, ROWS))
    rows = tile * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    seen = (cols < C)[None, :]
    inside = (rows < B)[:, None] & seen
    row64 = rows.to(tl.int64)
    raw = tl.load(
        logits + (row64 * step * UNIT)[:, None] + cols[None, :], mask=inside, other=float("-inf"),
        eviction_policy="evict_first"
    )
    y = tl.load(batch.labels + rows, mask=rows < B, other=ignore_index)
    valid = _valid(y, rows, batch, size)
    label, b = _labels(y, rows, valid, logits + row64 * step * UNIT, batch, lam, C, LAMS, real)
    taught = valid
    p = None
    if TEACHER:
        row, may = _teacher(rows, batch, size)
        taught = _learns(may, valid, batch)
        p = tl.load(
            last_logits + (row * last_step * UNIT)[:, None] + cols[None, :], mask=taught[:,
            None] & seen, other=float("-inf"), eviction_policy="evict_first"
        ).to(real)

    to, kept = _cache_row(rows, B, fresh, slot_rows - first)
    if cache.labels is not None:
        tl.store(cache.labels + to, y, mask=kept)
    if cache.logits is not None:
        tl.store(cache.logits + (to * C)[:, None] + cols[None, :], raw, mask=kept[:, None] & seen)
    z = raw.to(real)
    n = _step_counts(batch, counts, size, C, TEACHER, COUNT, COUNT_BLOCK, real)
    shares = (scale * _inverse(n[0]), scale * _inverse(n[1]))
    GRAD: tl.constexpr = dlogits is not None
    if TEACHER:
        taught = (taught.to(tl.int32) * n[2]) > 0
        # Of several rows some may not be taught. A condition that the compiler knows to be the same
        # for all threads: any other doubles the code around the shuffles.
        some = tile * ROWS < m
        if ROWS == 1:
            some = tl.max(taught.to(tl.int32), 0) > 0
        else:
            p = tl.where(taught[:, None], p, float("-inf"))
        if some:
            g, ce, kl, distil, fit = _tile_rows(
                z, p, label, b, valid, taught, rows, cols, shares, batch, temperature, alpha,
                smoothing, C, TAUS, ALPHAS, GRAD, real
            )
        else:
            g, ce, kl, distil, fit = _tile_rows(
                z, None, label, b, valid, taught, rows, cols, shares, batch, temperature, alpha,
                smoothing, C, TAUS, ALPHAS, GRAD, real
            )
    else:
        g, ce, kl, distil, fit = _tile_rows(
            z, None, label, b, valid, taught, rows, cols, shares, batch, temperature, alpha,
            smoothing, C, TAUS, ALPHAS, GRAD, real
        )
    if GRAD:
        tl.store(
            dlogits + (row64 * out_step * UNIT)[:, None] + cols[None, :],
            g.to(dlogits.dtype.element_ty),
            mask=inside,
        )
    if cache.valid is not None:
        tl.store(cache.valid + to, (fit == fit).to(tl.uint8), mask=kept)
    if not BACKWARD:
        own = (tl.sum(ce, 0), tl.sum(kl, 0), tl.sum(distil, 0))
        _finish(own, n, m, batch, sums, TEACHER, SUM_BLOCK, real)


# ---- long rows ----


@triton.jit
def _loop_sums(
    z_row, p_row, next_row, kept, y, k, weight, smoothing, C: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, real: tl.constexpr,
):
    """First pass: max z log2(e), Σ_{c≠y} e, z_y, max z k, St, max z' k, T, Σ w; k = log2(e) / τ.

    Every VECTOR neighbouring columns share a running maximum. It starts finite, so that no
    difference is NaN without cause.
    """
    LANES: tl.constexpr = BLOCK // VECTOR
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    lowest = -1.7976931348623157e308 if real == tl.float64 else -3.4028234663852886e38
    z_max = tl.full([LANES], lowest, real)
    zk_max = z_max
    p_max = z_max
    other = tl.zeros([LANES], real)
    St = other
    T = other
    z_y = tl.full((), 0, real)
    w_sum = other
    for start in range(0, C, BLOCK):
        col = start + lane
        raw = tl.load(z_row + col, mask=col < C, other=float("-inf"), eviction_policy="evict_last")
        if next_row is not None:
            if kept:
                tl.store(next_row + col, raw, mask=col < C)
        z = raw.to(real)
        largest = tl.max(z, 1)
        top = tl.maximum(z_max, largest * _log2e(real))
        e = tl.exp2(_exponent(z, top[:, None], _log2e(real)))
        if (y >= start) & (y < start + BLOCK):
            hit = col == y
            z_y = tl.sum(tl.where(hit, z, 0.0))
            e = tl.where(hit, 0.0, e)
        other = other * tl.exp2(z_max - top) + tl.sum(e, 1)
        if p_row is not None:
            p = tl.load(
                p_row + col, mask=col < C, other=float("-inf"), eviction_policy="evict_last"
            ).to(real)
            zk_top = tl.maximum(zk_max, largest * k)
            s = tl.exp2(_exponent(z, zk_top[:, None], k))
            St = St * tl.exp2(zk_max - zk_top) + tl.sum(s, 1)
            zk_max = zk_top
            p_top = tl.maximum(p_max, tl.max(p, 1) * k)
            q = tl.exp2(_exponent(p, p_top[:, None], k))
            T = T * tl.exp2(p_max - p_top) + tl.sum(q, 1)
            p_max = p_top
        if smoothing is not None:
            w = (col < C).to(real)
            if weight is not None:
                w = tl.load(weight + col, mask=col < C, other=0.0).to(real)
            w_sum += tl.sum(w, 1)
        z_max = top
    z_top = tl.max(z_max, 0)
    zk_top = tl.max(zk_max, 0)
    p_top = tl.max(p_max, 0)
    other = tl.sum(other * tl.exp2(z_max - z_top), 0)
    St = tl.sum(St * tl.exp2(zk_max - zk_top), 0)
    T = tl.sum(T * tl.exp2(p_max - p_top), 0)
    return z_top, other, z_y, zk_top, St, p_top, T, tl.sum(w_sum, 0)


@triton.jit
def _loop_gradient(
    z_row, p_row, out_row, y, b, live, z_top, zk_top, p_top, k, factors, batch, smoothing,
    C: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, real: tl.constexpr,
):
    """Second pass: writes the gradient, returns Σ q (u - x) (without 1/T) and Σ w x.

    From the end of the row to its start: what was read last is still in the caches. A row that is
    not live is not read, and all of its factors are 0.
    """
    factor, at_label, at_b, less, from_student, from_teacher = factors
    z_top = tl.where(live, z_top, 0.0)
    LANES: tl.constexpr = BLOCK // VECTOR
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    dot = tl.zeros([LANES], real)
    wx_sum = dot
    LAST: tl.constexpr = (C - 1) // BLOCK * BLOCK
    for back in range(0, C, BLOCK):
        col = LAST - back + lane
        z = tl.load(
            z_row + col, mask=(col < C) & live, other=float("-inf"), eviction_policy="evict_first"
        ).to(real)
        x = _exponent(z, z_top, _log2e(real))
        w = (col < C).to(real)
        if smoothing is not None:
            if batch.weight is not None:
                w = tl.load(batch.weight + col, mask=col < C, other=0.0).to(real)
            wx_sum += tl.sum(tl.where(w == 0, 0.0, w * x), 1)
        g = tl.exp2(x) * factor
        if smoothing is not None:
            g -= less * w
        if (y >= LAST - back) & (y < LAST - back + BLOCK):
            g = tl.where(col == y, at_label, g)
        if batch.labels_b is not None:
            if (b >= LAST - back) & (b < LAST - back + BLOCK):
                g = tl.where(col == b, at_b, g)
        if p_row is not None:
            p = tl.load(
                p_row + col, mask=col < C, other=float("-inf"), eviction_policy="evict_first"
            ).to(real)
            x = _exponent(z, zk_top, k)
            u = _exponent(p, p_top, k)
            q = tl.exp2(u)
            g += tl.exp2(x) * from_student
            g -= q * from_teacher
            dot += tl.sum(q * _gap(u, x), 1)
        if out_row is not None:
            tl.store(out_row + col, g.to(out_row.dtype.element_ty), mask=col < C)
    return tl.sum(dot, 0), tl.sum(wx_sum, 0)


@triton.jit
def _loop_row(
    z_row, p_row, out_row, next_row, kept, y, b, valid, taught, row, shares, batch, temperature,
    alpha, smoothing, C: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    TAUS: tl.constexpr, ALPHAS: tl.constexpr, real: tl.constexpr,
):
    """Writes the gradient of a row; returns ce, kl, α τ² kl, and NaN if it must never teach."""
    label = tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)
    k = tl.full((), 1, real)
    tau = k
    a = k
    share = k
    if p_row is not None:
        tau, a, share = _teaching(temperature, alpha, row, taught, shares[1], TAUS, ALPHAS, real)
        k = _log2e(real) / tau
    z_top, other, z_y, zk_top, St, p_top, T, w_sum = _loop_sums(
        z_row, p_row, next_row, kept, label, k, batch.weight, smoothing, C, BLOCK, VECTOR, real
    )
    x_y = tl.where(label >= 0, _exponent(z_y, z_top, _log2e(real)), 0.0)
    x_b = _exponent(b[1], z_top, _log2e(real))
    b_terms = (b[0], x_b, b[2])
    ce, factor, at_label, at_b, less = _label_terms(
        (other, x_y, w_sum, w_sum), y, b_terms, valid, shares[0], batch, smoothing, C, real
    )
    factor = tl.where(valid, factor, 0.0)
    at_label = tl.where(valid, at_label, 0.0)
    less = tl.where(valid, less, 0.0)
    live = valid
    if batch.distill_ignored is not None and p_row is not None:
        live = valid | taught
    kl = tl.full((), 0, real)
    distil = kl
    if out_row is not None or p_row is not None or smoothing is not None:
        from_student = kl
        from_teacher = kl
        if p_row is not None:
            from_student = share / St
            from_teacher = share / T
        dot, wx_sum = _loop_gradient(
            z_row, p_row, out_row, label, b[0].to(tl.int32), live, z_top, zk_top, p_top, k,
            (factor, at_label, at_b, less, from_student, from_teacher), batch, smoothing, C, BLOCK,
            VECTOR, real
        )
        if smoothing is not None:
            ce, _, _, _, _ = _label_terms(
                (other, x_y, w_sum, wx_sum), y, b_terms, valid, shares[0], batch, smoothing, C, real
            )
        if p_row is not None:
            kl, distil = _distil_terms(dot, St, T, tau, a, taught, real)
    e_y = tl.where(label >= 0, tl.exp2(x_y), 0.0)
    fit = tl.where(other + e_y > 0, 0.0, float("nan"))
    return ce, kl, distil, fit


@triton.jit(
    do_not_specialize=["temperature", "alpha", "grad_scale", "smoothing", "lam", "B", "m", "fresh",
    "slot_rows", "step", "last_step", "out_step", "ignore_index"]
)
def loop_kernel(
    logits, last_logits, dlogits, dloss, batch, counts, cache, sums, temperature, alpha,
    grad_scale, smoothing, lam, B: tl.int32, m: tl.int32, fresh: tl.int32, slot_rows: tl.int32,
    step: tl.int64, last_step: tl.int64, out_step: tl.int64, ignore_index: tl.int64,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    UNIT: tl.constexpr, COUNT: tl.constexpr, TAUS: tl.constexpr, ALPHAS: tl.constexpr,
    LAMS: tl.constexpr, COUNT_BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr, real: tl.constexpr,
):
    """One row a program, in two passes of BLOCK columns at a time."""
    TEACHER: tl.constexpr = last_logits is not None
    BACKWARD: tl.constexpr = dloss is not None
    scale, done = _scales(grad_scale, dloss, real)
    if BACKWARD:
        if done:
            return
    first = _first_row(batch.parity, slot_rows, BACKWARD)
    size = (B, m, first, ignore_index)
    row = _in_turn(m)
    row64 = row.to(tl.int64)
    y = tl.load(batch.labels + row)
    valid = _valid(y, row, batch, size)
    n = _step_counts(batch, counts, size, C, TEACHER, COUNT, COUNT_BLOCK, real)
    shares = (scale * _inverse(n[0]), scale * _inverse(n[1]))
    to, kept = _cache_row(row, B, fresh, slot_rows - first)
    if cache.labels is not None:
        tl.store(cache.labels + to, y, mask=kept)
    z_row = logits + row64 * step * UNIT
    label, b = _labels(y, row, valid, z_row, batch, lam, C, LAMS, real)
    out_row = None
    if dlogits is not None:
        out_row = dlogits + row64 * out_step * UNIT
    next_row = None
    if cache.logits is not None:
        next_row = cache.logits + to * C
    if TEACHER:
        teacher, may = _teacher(row, batch, size)
        taught = _learns(may, valid, batch) & (n[2] > 0)
        if taught:
            ce, kl, distil, fit = _loop_row(
                z_row, last_logits + teacher * last_step * UNIT, out_row, next_row, kept, label, b,
                valid, taught, row, shares, batch, temperature, alpha, smoothing, C, BLOCK, VECTOR,
                TAUS, ALPHAS, real
            )
        else:
            ce, kl, distil, fit = _loop_row(
                z_row, None, out_row, next_row, kept, label, b, valid, taught, row, shares, batch,
                temperature, alpha, smoothing, C, BLOCK, VECTOR, TAUS, ALPHAS, real
            )
    else:
        ce, kl, distil, fit = _loop_row(
            z_row, None, out_row, next_row, kept, label, b, valid, valid, row, shares, batch,
            temperature, alpha, smoothing, C, BLOCK, VECTOR, TAUS, ALPHAS, real
        )
    if cache.valid is not None:
        tl.store(cache.valid + to, (fit == fit).to(tl.uint8), mask=kept)
    if not BACKWARD:
        _finish((ce, kl, distil), n, m, batch, sums, TEACHER, SUM_BLOCK, real)


# ---- a gradient stored over the logits ----


@triton.jit(do_not_specialize=["grad_scale", "B", "step"])
def rescale_kernel(
    dlogits, dloss, grad_scale, B: tl.int32, step: tl.int64, C: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, real: tl.constexpr,
):
    """dlogits *= dloss / grad_scale, ROWS rows a program; nothing at all if the two are equal."""
    scale, done = _scales(grad_scale, dloss, real)
    if done:
        return
    factor = scale / _value(grad_scale, real)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = dlogits + (rows.to(tl.int64) * step * UNIT)[:, None]
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        inside = (rows < B)[:, None] & (cols < C)
        g = tl.load(at + cols, mask=inside).to(real) * factor
        tl.store(at + cols, g.to(dlogits.dtype.element_ty), mask=inside)


# fmt: on
