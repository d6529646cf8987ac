"""The CPU kernel: instruction sets, threads, short rows, strides, far offsets, refusals.

What every backend has in common is tested elsewhere.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dlb_fused import backends, dlb_loss, native, reference
from dlb_fused.backends import LossArgs

MISSING = native.why_not(torch.zeros(1, 1))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

LEVELS = (0, 1, 2)  # baseline, x86-64-v3, x86-64-v4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Relative L2 error of the gradient against fp64. The half types round each element once.
TOLERANCE = {
    torch.float32: 5e-7,
    torch.float64: 1e-13,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    if native._kernel.force_level(request.param) != request.param:
        native._kernel.force_level(-1)
        pytest.skip("this processor lacks the instruction set")
    yield request.param
    native._kernel.force_level(-1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(B: int, C: int, dtype: torch.dtype = torch.float32, **options: object) -> LossArgs:
    """The first half has a teacher, label 0 of the last row is ignored."""
    rng = torch.Generator().manual_seed(1000 * B + C)
    m = B // 2
    logits = 3 * torch.randn(B, C, generator=rng, dtype=torch.float64)
    teacher = 3 * torch.randn(m, C, generator=rng, dtype=torch.float64)
    labels = torch.randint(C, (B,), generator=rng)
    labels[-1] = -100
    teacher_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    args = LossArgs(
        logits.to(dtype), labels, teacher.to(teacher_dtype), m, need_grad=True, fresh=B - m
    )
    return args._replace(**options)


def truth(args: LossArgs) -> tuple[float, Tensor]:
    """Loss and gradient by the naive loss in fp64; the last row is left out, being ignored."""
    logits = args.logits.detach().double().requires_grad_()
    loss = reference.dlb_loss_naive(
        logits,
        args.labels,
        None if args.last_logits is None else args.last_logits.double(),
        temperature=args.temperature,
        alpha=args.alpha,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient * args.grad_scale


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("temperature", (1.0, 2.0, 3.0, 4.0, 2.5))
def test_each_level_is_accurate(level: int, dtype: torch.dtype, temperature: float) -> None:
    scale = 65536.0 if dtype == torch.float16 else 1.0
    for B, C in ((6, 10), (5, 257), (4, 2048), (4, 5003)):
        args = make(B, C, dtype, temperature=temperature, grad_scale=scale)
        loss, gradient = truth(args)
        out = native.forward(args)
        assert out.loss.item() == pytest.approx(loss, rel=1e-12 if dtype is torch.float64 else 1e-6)
        assert error(out.dlogits, gradient) < TOLERANCE[dtype]


def test_short_rows(level: int) -> None:
    """Each remainder of a row modulo the vector length, and each place of the label in it."""
    for C in range(2, 71):
        for dtype in DTYPES[C % 2 :: 2]:
            args = make(2 * C + 2, C, dtype)
            labels = torch.arange(2 * C + 2) % C
            args = args._replace(labels=labels, grad_scale=1.0 if C > 8 else 4.0)
            loss, gradient = truth(args)
            out = native.forward(args)
            assert out.loss.item() == pytest.approx(loss, rel=1e-6), C
            assert error(out.dlogits, gradient) < TOLERANCE[dtype], C


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("C", (263, 2077))
def test_label_at_the_seams_of_a_row(level: int, dtype: torch.dtype, C: int) -> None:
    """Rows begin at each place in a vector; the label is in the first, a middle or the last one, or
    where one block of a row ends and the next begins."""
    seams = (*range(17), *range(120, 137), *range(C - 40, C))
    labels = torch.tensor(seams).repeat(2)
    args = make(len(labels), C, dtype, labels=labels, grad_scale=16.0)
    loss, gradient = truth(args)
    out = native.forward(args)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert error(out.dlogits, gradient) < TOLERANCE[dtype]


def test_one_class(level: int) -> None:
    out = native.forward(make(4, 1))
    assert out.loss.item() == 0
    assert torch.equal(out.dlogits, torch.zeros(4, 1))


@pytest.mark.parametrize("margin", (10.0, 20.0))
@pytest.mark.parametrize("offset", (0.0, 1e4))
def test_confident_rows_keep_their_digits(level: int, margin: float, offset: float) -> None:
    args = make(8, 100, last_logits=None, overlap=0)
    labels = args.labels.clamp(min=0)
    logits = (args.logits / 8).round(decimals=1) + offset
    logits[torch.arange(8), labels] += margin
    args = args._replace(logits=logits, labels=labels)
    loss, gradient = truth(args)
    out = native.forward(args)
    assert out.loss.item() == pytest.approx(loss, rel=2e-6)
    assert error(out.dlogits, gradient) < TOLERANCE[torch.float32]


def test_rising_maximum_over_many_blocks(level: int) -> None:
    """Each block has a larger maximum than the one before, so each has its own reference."""
    args = make(4, 40_000)
    ramp = torch.linspace(0, 30, 40_000)
    logits, teacher = args.logits + ramp, args.last_logits + ramp.flip(0)
    args = args._replace(logits=logits, last_logits=teacher)
    loss, gradient = truth(args)
    out = native.forward(args)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert error(out.dlogits, gradient) < TOLERANCE[torch.float32]


def test_long_rows_of_equal_logits(level: int) -> None:
    """The sum of 262144 equal terms shows how errors of addition grow."""
    args = make(3, 262_144)
    args = args._replace(logits=torch.full_like(args.logits, 0.3))
    loss, gradient = truth(args)
    out = native.forward(args)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    assert error(out.dlogits, gradient) < 1e-6


@pytest.mark.parametrize("shape", ((64, 1000), (300, 17), (6, 30_000)))
def test_same_bits_for_any_number_of_threads(threads: None, shape: tuple[int, int]) -> None:
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(native.forward(make(*shape)))
    for out in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, results[0], strict=True))


NARROW = (1, 2, 127, 128, 129)  # at most 128 classes go through csrc/cpu/narrow_rows.h


def make_uneven(B: int, C: int, dtype: torch.dtype) -> LossArgs:
    """As `make`, with ignored rows between others, and rows of either half, or of the teacher, that
    are not finite. Without those, neither half fills its batches of 16 rows."""
    args = make(B, C, dtype)
    z, u, m = args.logits, args.last_logits, args.overlap
    assert u is not None
    args.labels[[2, m - 3, m + 1]] = -100
    for row in (1, m + 2):
        z[row, C // 2] = torch.nan
        z[row + 2, 0] = torch.inf
        z[row + 4] = -torch.inf
    z[7, C - 1] = u[7, C - 1] = -torch.inf  # a class that both rule out
    z[9, 0] = -torch.inf  # and one that the teacher does not
    u[11] = -torch.inf
    u[12, C // 2] = torch.nan
    z[m + 8, args.labels[m + 8]] = -torch.inf  # loss inf, gradient finite
    return args


@pytest.mark.parametrize("C", NARROW)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("temperature", (2.5, 3.0))
def test_rows_that_are_not_finite_among_others(
    level: int, dtype: torch.dtype, C: int, temperature: float
) -> None:
    """Each row has the loss and the gradient that the specification gives it in fp64."""
    args = make_uneven(45, C, dtype)._replace(temperature=temperature, grad_scale=64.0)
    wide = args._replace(logits=args.logits.double(), last_logits=args.last_logits.double())
    want, got = reference.forward(wide), native.forward(args)
    assert torch.equal(got.dlogits.isnan(), want.dlogits.isnan())
    finite = want.dlogits.isfinite().all(1)
    assert finite.sum() > 30
    wrong = got.dlogits[finite].double() - want.dlogits[finite]
    assert wrong.norm() <= TOLERANCE[dtype] * want.dlogits[finite].norm()
    assert torch.equal(got.parts[2:].double(), want.parts[2:])
    assert torch.equal(got.next_valid, want.next_valid)
    assert torch.equal(got.next_labels, want.next_labels)
    kept = args.logits[args.overlap :]
    assert torch.equal(bits_of(got.next_logits), bits_of(kept))

    losses = [loss_of_row(native, args, i) for i in range(45)]
    assert losses == pytest.approx(
        [loss_of_row(reference, wide, i) for i in range(45)], rel=1e-5, abs=1e-5, nan_ok=True
    )
    assert losses[9] == losses[args.overlap + 8] == math.inf or C == 1
    inplace = native.forward(args._replace(logits=args.logits.clone(), inplace=True))
    assert torch.equal(bits_of(inplace.dlogits), bits_of(got.dlogits))
    again = native.backward(args, got.parts, torch.tensor(64.0, dtype=got.loss.dtype), None)
    assert torch.equal(bits_of(again), bits_of(got.dlogits))


def loss_of_row(backend: ModuleType, args: LossArgs, i: int) -> float:
    overlap = int(i < args.overlap)
    row = args._replace(
        logits=args.logits[i : i + 1],
        labels=args.labels[i : i + 1],
        last_logits=args.last_logits[i : i + 1],
        overlap=overlap,
        fresh=1 - overlap,
        need_grad=False,
    )
    return backend.forward(row).loss.item()


def bits_of(value: Tensor) -> Tensor:
    """So that NaN equals NaN."""
    return value.flatten().view(torch.uint8)


@pytest.mark.parametrize("C", NARROW)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_row_has_the_same_bits_wherever_it_stands(level: int, dtype: torch.dtype, C: int) -> None:
    """Also in a batch of 16 with others, in a batch that is not full, and with rows of the teacher
    in another order."""
    args = make_uneven(45, C, dtype)
    m = args.overlap
    rng = torch.Generator().manual_seed(C)
    old, new, teacher = (torch.randperm(n, generator=rng) for n in (m, 45 - m, m))
    order = torch.cat((old, new + m))
    shuffled = args._replace(
        logits=args.logits[order],
        labels=args.labels[order],
        last_logits=args.last_logits[teacher],
        teacher_rows=teacher.argsort()[old],
    )
    want, got = native.forward(args), native.forward(shuffled)
    finite = args.logits.isfinite().all(1)  # others are done one by one, where their number counts
    finite[:m] &= args.last_logits.isfinite().all(1)
    assert finite.sum() > 30
    rows = finite[order]
    assert torch.equal(got.dlogits[rows], want.dlogits[order][rows])
    assert torch.equal(got.next_valid, want.next_valid[new])
    few = [int(finite[:m].nonzero()[0]), int(finite[m:].nonzero()[0]) + m]
    counts = [want.parts[2].clone(), want.parts[3].clone()]
    alone = native.forward(
        args._replace(
            logits=args.logits[few],
            labels=args.labels[few],
            last_logits=args.last_logits[few[:1]],
            overlap=1,
            fresh=1,
            ce_count=counts[0],
            kl_count=counts[1],
        )
    )
    assert torch.equal(alone.dlogits, want.dlogits[few])


@pytest.mark.parametrize("C", NARROW)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_rows_that_are_not_finite_with_any_number_of_threads(
    level: int, threads: None, dtype: torch.dtype, C: int
) -> None:
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(native.forward(make_uneven(407, C, dtype)))
    for out in results[1:]:
        for a, b in zip(out, results[0], strict=True):
            assert torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("bad", (10, -1, -(2**40)))
def test_label_out_of_range_raises_before_anything_is_written(bad: int) -> None:
    stats = torch.zeros(3, dtype=torch.int64)
    logits = make(8, 10).logits
    args = make(8, 10, logits=logits.clone(), stats=stats, inplace=True)
    args.labels[3] = bad
    message = rf"labels\[3\] is {bad}, but logits have 10 classes \(valid: 0 to 9, or ignore_index"
    with pytest.raises(IndexError, match=message):
        native.forward(args)
    assert torch.equal(args.logits, logits)
    assert not stats.any()


def test_row_strides() -> None:
    args = make(6, 33)
    want = native.forward(args)
    wide = torch.full((6, 50), torch.nan)
    wide[:, :33] = args.logits
    teacher = torch.full((3, 40), torch.nan)
    teacher[:, 7:] = args.last_logits
    got = native.forward(args._replace(logits=wide[:, :33], last_logits=teacher[:, 7:]))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_beyond_2_to_the_32_elements() -> None:
    """Only the touched pages of the storage exist."""
    stride = 2**31 + 8
    far = torch.empty(2 * stride + 20, dtype=torch.bfloat16).as_strided((3, 20), (stride, 1))
    args = make(3, 20, torch.bfloat16)
    far.copy_(args.logits)
    want = native.forward(args)
    got = native.forward(args._replace(logits=far))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("C", (10, 3000))
def test_inplace_writes_the_gradient_over_strided_logits(dtype: torch.dtype, C: int) -> None:
    args = make(6, C, dtype)
    wide = torch.zeros(6, C + 5, dtype=dtype)
    wide[:, :C] = args.logits
    want = native.forward(args._replace(logits=wide.clone()[:, :C]))
    got = native.forward(args._replace(logits=wide[:, :C], inplace=True))
    assert got.dlogits.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :C], want.dlogits)
    assert torch.equal(got.next_logits, args.logits[3:])
    assert not wide[:, C:].any()


PAST_THE_END = """
import ctypes, mmap, sys, torch
from dlb_fused import native
from dlb_fused.backends import LossArgs

def at_the_end(values):
    \"\"\"A copy that ends where the next page must not be touched.\"\"\"
    page, size = mmap.PAGESIZE, values.numel() * values.element_size()
    pages = -(-size // page) + 1
    memory = mmap.mmap(-1, pages * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(address + (pages - 1) * page)
    assert libc.mprotect(last, ctypes.c_size_t(page), 0) == 0
    start = (pages - 1) * page - size
    out = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=start)
    return out.view(values.shape).copy_(values)

native._kernel.force_level(int(sys.argv[1]))
for dtype in native.DTYPES:
    for C in (1, 7, 100, 127, 128, 129, 300, 2047, 3001):
        z, u = torch.randn(6, C).to(dtype), torch.randn(6, C).to(dtype)
        labels = torch.tensor([0, C - 1, C // 2] * 2)
        args = LossArgs(at_the_end(z), labels, at_the_end(u[:3]), 3, need_grad=True)
        want = native.forward(args._replace(logits=z, last_logits=u[:3].clone()))
        dlogits = at_the_end(torch.zeros_like(z))
        native.backward(args, want.parts, torch.full_like(want.loss, -1), dlogits)
        assert torch.allclose(dlogits, -want.dlogits)
        assert torch.allclose(native.forward(args._replace(inplace=True)).dlogits, want.dlogits)
print("read nothing past the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
def test_nothing_is_touched_past_the_end(level: int) -> None:
    command = [sys.executable, "-c", PAST_THE_END, str(level)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "read nothing past the end" in done.stdout, f"{done.returncode}: {done.stderr}"


@pytest.mark.parametrize("C", (10, 300, 3000))
def test_inplace_with_rows_that_are_not_finite(level: int, C: int) -> None:
    """Such a row of few classes is computed a second time, from logits that must still be there."""
    args = make(8, C, fresh=0)
    args.logits[0, 6] = -torch.inf  # and the teacher disagrees: loss inf, gradient finite
    args.logits[1, 3] = torch.nan
    args.logits[2, :] = -torch.inf
    args.logits[5, 4] = torch.inf
    want = native.forward(args._replace(logits=args.logits.clone()))
    got = native.forward(args._replace(inplace=True))
    assert want.dlogits is not None and got.dlogits is not None
    assert torch.equal(got.dlogits.view(torch.int32), want.dlogits.view(torch.int32))


def test_large_outputs_take_the_streaming_path(level: int) -> None:
    """16 MiB and more are written past the caches, unless they are new pages; the start of a row is
    then not aligned."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = make(6, 1_500_007, dtype)
        rows = [
            native.forward(
                args._replace(
                    logits=args.logits[i:j],
                    labels=args.labels[i:j],
                    last_logits=teacher,
                    overlap=j - i if teacher is not None else 0,
                    fresh=0,
                    ce_count=torch.tensor(5.0),
                    kl_count=torch.tensor(3.0),
                )
            ).dlogits
            for i, j, teacher in (
                (0, 2, args.last_logits[:2]),
                (2, 3, args.last_logits[2:]),
                (3, 5, None),
                (5, 6, None),
            )
        ]
        out = native.forward(args)
        # Where a row begins in its vectors, and so the order of its sums, hangs on its number.
        assert error(out.dlogits, torch.cat(rows)) < TOLERANCE[dtype]
        assert torch.equal(out.next_logits, args.logits[3:])
        in_old_pages = native.forward(args._replace(logits=args.logits.clone(), inplace=True))
        assert torch.equal(in_old_pages.dlogits, out.dlogits)
        assert torch.equal(in_old_pages.next_logits, out.next_logits)


def test_backward_reuses_or_recomputes() -> None:
    args = make(8, 50, grad_scale=3.0)
    out = native.forward(args)
    stored = out.dlogits.clone()
    assert native.backward(args, out.parts, torch.tensor(3.0), out.dlogits) is out.dlogits
    assert torch.equal(out.dlogits, stored)
    again = native.backward(args, out.parts, torch.tensor(3.0), None)
    assert torch.equal(again, stored)
    scaled = native.backward(args, out.parts, torch.tensor(-6.0), out.dlogits)
    assert scaled is out.dlogits
    assert torch.equal(scaled, -2 * stored)


def test_rescale_rounds_once() -> None:
    dlogits = torch.tensor([1.0, -3.0], dtype=torch.float16)
    native.rescale_(dlogits, torch.tensor(1.001), 1.0)
    assert torch.equal(dlogits, (torch.tensor([1.0, -3.0]) * 1.001).half())


def test_why_not_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "meta" in native.why_not(torch.zeros(1, 1, device="meta"))
    assert "int64" in native.why_not(torch.zeros(1, 1, dtype=torch.int64))
    monkeypatch.setattr(native, "_kernel", None)
    monkeypatch.setattr(native, "_missing", "No module named 'dlb_fused._cpu'")
    reason = native.why_not(torch.zeros(1, 1))
    assert "No module named" in reason and "holds the source" in reason
    monkeypatch.setattr(native, "__file__", "/somewhere/dlb_fused/native.py")
    assert "install a C++ compiler" in native.why_not(torch.zeros(1, 1))


def test_the_fallback_of_auto_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernel", None)
    monkeypatch.setattr(backends, "_chosen", {})
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.warns(RuntimeWarning, match="plain PyTorch operations on cpu .*_cpu is missing"):
        dlb_loss(logits, labels)


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU OpenMP on Linux")
def test_the_thread_pool_of_torch_is_found() -> None:
    """Without it all results would be right, and twice as slow."""
    assert native._kernel is not None and native._kernel.has_thread_pool()


def test_confident_rows_keep_their_digits_at_every_level(level: int) -> None:
    """exp(-40) to 2e-7: the exponent's constant needs more digits than a float has."""
    z = torch.zeros(4, 20)
    z[torch.arange(4), torch.arange(4)] = torch.tensor([5.0, 20.0, 40.0, 60.0])
    out = native.forward(LossArgs(z, torch.arange(4), need_grad=True))
    wide = z.double()
    others = wide.scatter(1, torch.arange(4)[:, None], -torch.inf).logsumexp(1)
    want = -(others - wide.logsumexp(1)).exp() / 4
    assert out.dlogits is not None
    assert (out.dlogits.diagonal() / want - 1).abs().max() < 3e-7
