"""The CUDA kernels on the CPU, in the shim of simt/: values, every access, every schedule, races.

`test_backends.py` runs its cases on them too. Here are the rest of the contract, what the kernels
read and write, and planted faults: text patches of the shipped source, each of which must be found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import contract
import pytest
import simt
import simulated
import torch
from contract import INF, NAN, OPTIONS, STATS, close, in_fp64, make, make_option, same_bits
from simt import Checker, Launch
from simulated import Watched
from torch import Tensor

from dlb_fused import cuda_backend, reference
from dlb_fused.backends import CachePair, LossArgs, LossOutputs

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def cuda() -> Iterator[Watched]:
    with simulated.backend() as watched, simulated.poisoned():
        yield watched


class Form(NamedTuple):
    """A form of the kernels: fp32 rows with a teacher that it takes, and how that shows."""

    C: int
    taken: Callable[[Launch], bool]
    last_dtype: torch.dtype = torch.float32


# They follow the table in csrc/cuda/plan.h.
FORMS = {
    "tile": Form(37, lambda launch: launch.grid == 1),
    "chip": Form(1104, lambda launch: launch.grid == 4 and launch.shared_bytes > 8 * 1104),
    "singly": Form(150, lambda launch: launch.shared_bytes == 0, torch.bfloat16),
    "cluster": Form(9304, lambda launch: launch.cluster == 2),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


def of(form: Form, B: int = 4, m: int = 2, **options: Any) -> LossArgs:
    return make(B, form.C, m, last_dtype=form.last_dtype, **options)


def check(args: LossArgs, dlosses: tuple[float, ...] = (-3.7,)) -> LossOutputs:
    return contract.check(cuda_backend, args, dlosses)


def forward(args: LossArgs) -> LossOutputs:
    return cuda_backend.forward(args)


def gradient(out: LossOutputs) -> Tensor:
    assert out.dlogits is not None
    return out.dlogits


# ---- Values ----


def test_each_form_is_taken(form: Form, cuda: Watched) -> None:
    check(of(form))
    assert all(form.taken(call.launches[-1]) for call in cuda.calls)


@pytest.mark.parametrize("C", [1, 2, 3, 10, 100, 1000, 1023, 2048, 2049, 8200, 20001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width(C: int, dtype: torch.dtype, cuda: Watched) -> None:
    cuda.seed = C
    check(make(3 if C > 2000 else 5, C, 1, dtype))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(form: Form, name: str, cuda: Watched) -> None:
    args = make_option(name, form.C)
    if args.last_logits is not None:
        args = args._replace(last_logits=args.last_logits.to(form.last_dtype))
    out = check(args)
    if name == "all ignored":
        assert out.loss == 0 and not gradient(out).any()
    if name == "no copy":
        assert out.next_logits is None


@pytest.mark.parametrize(
    "dtypes",
    [*itertools.product(FLOATS[:3], repeat=2), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("C", [37, 2100])
def test_mixed_types(C: int, dtypes: tuple[torch.dtype, torch.dtype], cuda: Watched) -> None:
    scale = 65536.0 if dtypes[0] == torch.float16 else 1.0
    check(make(4, C, 2, *dtypes, grad_scale=scale, temperature=2.3, alpha=0.7), (65536.0,))


@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_strided_rows(form: Form, columns: int, dtype: torch.dtype, cuda: Watched) -> None:
    """Their rows begin at multiples of 16 bytes, or at others than the teacher's; what is between
    two rows is out of bounds."""
    last_dtype = dtype if form.last_dtype == torch.float32 else form.last_dtype
    args = make(4, form.C, 2, dtype, last_dtype)
    assert args.last_logits is not None
    wide, last = contract.strided(args.logits, columns), contract.strided(args.last_logits, 8)
    check(args._replace(logits=wide))
    check(args._replace(logits=wide, last_logits=last))


@pytest.mark.parametrize("dlosses", [(1.0, 0.0, -3.7, 65536.0)])
def test_upstream_gradient(form: Form, dlosses: tuple[float, ...], cuda: Watched) -> None:
    check(of(form), dlosses)


@pytest.mark.parametrize("change", ["none", "label", "invalid row", "ignored"])
def test_guard(form: Form, change: str, cuda: Watched) -> None:
    contract.check_guard(check, of(form, 5, 3, stats=STATS.clone()), change)


def test_guard_drops_a_teacher_of_nan(form: Form, cuda: Watched) -> None:
    contract.check_guard_drops_a_teacher_of_nan(check, of(form))


def test_rows_that_are_not_finite(form: Form, cuda: Watched) -> None:
    contract.check_rows_that_are_not_finite(check, of(form, 8, 4, fresh=8))


def test_masks_of_finfo_min(form: Form, cuda: Watched) -> None:
    contract.check_masks_of_finfo_min(check, of(form))


@pytest.mark.parametrize("label", [-1, 10**6, 2**32 + 1])
def test_label_out_of_range(form: Form, label: int, cuda: Watched) -> None:
    contract.check_label_out_of_range(forward, of(form), label)


@pytest.mark.parametrize("label", [-1, 10**6, 2**32 + 1])
def test_bad_second_label(form: Form, label: int, cuda: Watched) -> None:
    contract.check_bad_second_label(forward, of(form), label)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_bad_values_in_tensors(form: Form, bad: float, cuda: Watched) -> None:
    contract.check_bad_values(forward, of(form), bad)


@pytest.mark.parametrize("offsets", [(1e4, 1e4), (1e4, -1e4), (-1e4, 0.0)])
def test_offsets(form: Form, offsets: tuple[float, float], cuda: Watched) -> None:
    # A teacher in bf16 would round the offset.
    args = of(form)._replace(last_logits=make(4, form.C, 2).last_logits)
    contract.check_offsets(check, args, offsets)


@pytest.mark.parametrize("two", [False, True])
def test_inplace_and_rescale(form: Form, two: bool, cuda: Watched) -> None:
    second = {"labels_b": contract.second_labels(form.C), "lam": 0.3} if two else {}
    args = of(form, inplace=True, **second)
    wide = contract.strided(args.logits, 3)
    args = args._replace(logits=wide)
    want = reference.forward(in_fp64(args))
    out = forward(args)
    assert out.dlogits is wide and want.dlogits is not None
    close(wide, want.dlogits, 1e-6)
    assert out.next_logits is not None and torch.equal(out.next_logits.double(), want.next_logits)
    before = wide.clone()
    for dloss in (1.0, -3.7):
        cuda_backend.rescale_(wide, torch.tensor(dloss), 1.0)
        touched = 0 if dloss == 1.0 else wide.numel() * 4
        assert cuda.calls[-1].loads["logits"] == cuda.calls[-1].stores["logits"] == touched
        close(wide, before.double() * dloss, 1e-7)


def test_empty_batch(cuda: Watched) -> None:
    args = make(0, 5, 0)
    out = forward(args)
    assert out.loss == 0 and not out.parts.any() and gradient(out).shape == (0, 5)
    assert cuda_backend.backward(args, out.parts, torch.tensor(2.0), None).shape == (0, 5)
    assert not cuda.calls


def test_counts_in_a_launch_before(cuda: Watched) -> None:
    """Of more rows than each block would count for itself."""
    B = 17000
    weight, labels = torch.rand(2), torch.zeros(9, dtype=torch.int64)
    args = make(B, 2, 9, weight=weight, stats=STATS.clone(), fresh=0)
    assert len(check(args).parts) and len(cuda.calls[0].launches) == 2
    for last_labels in (args.labels[:9].clone(), labels):
        out = check(args._replace(last_labels=last_labels))
        assert (out.parts[3] == 9) == torch.equal(args.labels[:9], last_labels)


def test_rows_beyond_32_bits(form: Form, cuda: Watched) -> None:
    """Rows 2^32 elements apart, in memory that is never touched between them."""
    step, args = 2**32 + 16, of(form, 2, 1)
    want = check(args)
    storage = torch.UntypedStorage((step + form.C) * 4)
    far = torch.tensor([]).set_(storage, 0, (2, form.C), (step, 1))  # type: ignore[call-overload]
    far.copy_(args.logits)
    got = check(args._replace(logits=far))
    for a, b in zip(want, got, strict=True):
        assert same_bits(a, b)


# ---- The cache ----


def empty_pair(rows: int, C: int, dtype: torch.dtype = torch.float32) -> CachePair:
    return CachePair(
        torch.full((2, rows, C), NAN, dtype=dtype),
        torch.zeros(2, rows, dtype=torch.int64),
        torch.zeros(2, rows, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int32),
    )


@pytest.mark.parametrize("C", [37, 40, 1104, 9304])
def test_pair(C: int, cuda: Watched) -> None:
    """Five steps over two buffers whose roles are decided on the device equal five steps with
    copies; the first finds no teacher, the fourth another chain."""
    rows, stats, want_stats = 2, torch.zeros(3, dtype=torch.int64), torch.zeros(3).long()
    pair = empty_pair(rows, C)
    last = LossOutputs(*[torch.empty(0)] * 3, pair.logits[0], pair.labels[0], pair.valid[0])
    labels = torch.randint(0, C, (rows,), generator=torch.Generator().manual_seed(5))
    for step in range(5):
        args = make(2 * rows, C, rows, seed=step, fresh=rows)
        if step != 3:
            args.labels[:rows] = labels
        labels = args.labels[rows:].clone()
        assert last.next_logits is not None
        plain = args._replace(
            last_logits=last.next_logits.clone(),
            last_valid=last.next_valid,
            last_labels=last.next_labels,
            stats=want_stats,
        )
        want = forward(plain)
        cuda.seed = step
        args = args._replace(last_logits=None, pair=pair, stats=stats)
        got = forward(args)
        assert int(pair.parity) == (step + 1) % 2
        assert all(same_bits(a, b) for a, b in zip(got[:3], want[:3], strict=True))
        assert (got.parts[3] > 0) == (step in (1, 2, 4))
        new = int(pair.parity)
        assert torch.equal(pair.logits[new], want.next_logits)  # type: ignore[arg-type]
        assert torch.equal(pair.labels[new], want.next_labels)  # type: ignore[arg-type]
        assert pair.valid[new].all()
        assert got.next_logits is None and torch.equal(stats, want_stats)
        d = torch.tensor(-3.7)
        again = cuda_backend.backward(args, got.parts, d, None)
        assert same_bits(again, cuda_backend.backward(plain, want.parts, d, None))
        last = want


def test_pair_without_overlap(cuda: Watched) -> None:
    """A step without overlap rows still fills the cache and changes the slot."""
    pair = empty_pair(4, 10)
    pair.parity.fill_(1)
    args = make(4, 10, 0, fresh=4, pair=pair)
    forward(args)
    assert int(pair.parity) == 0 and torch.equal(pair.logits[0], args.logits)
    assert pair.valid.tolist() == [[1] * 4, [0] * 4]


# ---- Schedules, launches, traffic ----


@pytest.mark.parametrize("shape", [(600, 2, 300), (40, 10, 20), (9, 100, 5), (5, 1103, 3),
                                   (3, 20004, 2)], ids=str)  # fmt: skip
def test_any_schedule_gives_the_same_bits(shape: tuple[int, int, int], cuda: Watched) -> None:
    args, results = make(*shape, weight=torch.rand(shape[1])), []
    for cuda.seed in range(4):
        results.append(forward(args))
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_one_launch_forward_and_one_backward(form: Form, cuda: Watched) -> None:
    args = of(form)
    out = forward(args)
    cuda_backend.backward(args, out.parts, torch.tensor(1.0), out.dlogits)
    cuda_backend.backward(args, out.parts, torch.tensor(2.0), out.dlogits)
    assert [len(call.launches) for call in cuda.calls] == [1, 1, 1]
    idle = cuda.calls[1]
    assert not any(idle.stores.values()) and idle.loads["logits"] == 0


def traffic(call: Checker, args: LossArgs) -> tuple[float, float, float, float]:
    """Reads of logits and last_logits, writes of dlogits and next_logits: times a byte."""
    assert args.last_logits is not None
    row = args.logits.shape[1] * args.logits.element_size()
    assert call.loads["dlogits"] == call.loads.get("next_logits", 0) == 0
    return (
        call.loads["logits"] / args.logits.nbytes,
        call.loads["last_logits"] / args.last_logits.nbytes,
        call.stores["dlogits"] / args.logits.nbytes,
        call.stores["next_logits"] / (args.fresh * row) if args.fresh else 0,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [10, 37, 1000, 1101, 9304, 40001])
def test_each_byte_moves_once(C: int, dtype: torch.dtype, cuda: Watched) -> None:
    """In tiles, on chip and in clusters; forward, and backward where it computes again. With odd C,
    the first row of the next cache must begin like the row that goes there: here row 8."""
    args = make(9, C, 3, dtype, fresh=1)
    out = forward(args)
    assert traffic(cuda.calls[-1], args) == (1, 1, 1, 1)
    cuda_backend.backward(args, out.parts, torch.tensor(2.0, dtype=out.loss.dtype), out.dlogits)
    call = cuda.calls[-1]
    assert call.loads["logits"] == call.stores["dlogits"] == args.logits.nbytes
    assert args.last_logits is not None and call.loads["last_logits"] == args.last_logits.nbytes


@pytest.mark.parametrize(("C", "cluster"), [(20000, 2), (40001, 4), (80000, 8), (262144, 16)])
def test_long_rows_in_clusters_are_read_once(C: int, cluster: int, cuda: Watched) -> None:
    args = make(2, C, 1, torch.bfloat16, fresh=0 if C % 8 else 1)
    cuda.seed = 1
    check(args)
    assert [call.launches[0].cluster for call in cuda.calls] == [cluster] * 3
    assert traffic(cuda.calls[0], args) == (1, 1, 1, 0 if C % 8 else 1)


def test_a_row_that_fits_nowhere_is_read_twice(cuda: Watched) -> None:
    args = make(2, 500_000, 1)
    forward(args)
    assert traffic(cuda.calls[-1], args) == (2, 2, 1, 1)
    assert cuda.calls[-1].launches == [Launch(2, 256, 0, 1)]


def test_rows_without_a_teacher_read_none(cuda: Watched) -> None:
    args = make(4, 1104, 2, last_valid=torch.tensor([1, 0], dtype=torch.uint8))
    forward(args)
    assert cuda.calls[-1].loads["last_logits"] == 1104 * 4


@pytest.mark.parametrize(
    ("m", "temperature", "most"), [(0, 3.0, 3.5), (2, 3.0, 5.3), (2, 2.5, 7.5)]
)
def test_exponentials_an_element(m: int, temperature: float, most: float, cuda: Watched) -> None:
    """One in each of two passes; three with a teacher, but two at temperature 3; and what a vector
    and the merge of the threads need."""
    forward(make(2, 16384, m, torch.bfloat16, temperature=temperature, fresh=0))
    assert cuda.calls[-1].exp2_calls <= most * 2 * 16384


# ---- Other devices ----


@pytest.mark.parametrize(("capability", "clusters"), [(80, 1), (120, 8)])
def test_other_devices(capability: int, clusters: int) -> None:
    """Without clusters, or with less shared memory, long rows take other forms."""
    kernel = simt.module(copy=f"sm_{capability}")
    with simt.device(kernel, capability, clusters):
        watched = Watched(kernel)
        assert watched.capability(0) == capability
        with simulated.backend(watched), simulated.poisoned():
            for C, dtype in itertools.product([37, 1101, 9301, 30003], FLOATS[:2]):
                check(make(3, C, 2, dtype))
                launch = watched.calls[-1].launches[-1]
                assert launch.cluster <= clusters
    assert (launch.cluster > 1) == (capability == 120)
    if capability == 80:
        assert launch.shared_bytes == 0 and watched.calls[-1].launches[-1].threads == 256


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_rows_that_are_read_twice(dtype: torch.dtype) -> None:
    """The form for rows that fit on no chip: here, those of a device without clusters."""
    C = 24001 if dtype.itemsize == 4 else 48001  # odd: partial vectors at both ends

    kernel = simt.module(copy="sm_80")
    with simt.device(kernel, 80, 1):
        watched = Watched(kernel)
        with simulated.backend(watched), simulated.poisoned():
            for change in ("none", "label"):
                contract.check_guard(check, make(5, C, 3, dtype, stats=STATS.clone()), change)
            nan_teacher = make(4, C, 2, dtype)
            contract.check_guard_drops_a_teacher_of_nan(check, nan_teacher)
            contract.check_rows_that_are_not_finite(check, make(8, C, 4, dtype, fresh=8))
            contract.check_masks_of_finfo_min(check, make(4, C, 2, dtype))
            check(make(4, C, 2, dtype, temperature=2.5, inplace=True))
            check(make(4, C, 2, dtype, labels_b=contract.second_labels(C), lam=0.3))
            assert all(c.launches[-1].shared_bytes == 0 for c in watched.calls if c.launches)


# ---- Sanitizers ----


def some_calls(dtype: torch.dtype = torch.float32) -> Iterator[LossArgs]:
    """Every form on few threads; fp64 takes longer forms earlier."""
    weight = torch.linspace(0.0, 2.0, 37)
    yield make(4, 37, 2, dtype, label_smoothing=0.1, weight=weight, stats=STATS.clone())
    yield make(3, 40, 2, dtype, last_labels=torch.tensor([1, 2]), fresh=3)
    for C in (40, 8808 // dtype.itemsize, 37216 // dtype.itemsize):
        yield make(1, C, 1, dtype, labels_b=torch.tensor([7]), lam=0.3, inplace=True)
    yield make(2, 40, 1, dtype, pair=empty_pair(1, 40, dtype))._replace(last_logits=None)
    yield make(2, 1101 if dtype.itemsize > 2 else 2101, 1, dtype)
    yield make(2, 8808 // dtype.itemsize, 1, dtype, temperature=2.5)
    yield make(1, 37216 // dtype.itemsize, 1, dtype, last_valid=torch.ones(1, dtype=torch.uint8))


def recordings(calls: Iterator[LossArgs]) -> list[simt.Recording]:
    with simulated.backend() as watched, simulated.poisoned():
        watched.recordings = []
        for args in calls:
            out = forward(args)
            two = torch.tensor(2.0, dtype=out.loss.dtype)
            cuda_backend.backward(args, out.parts, two, out.dlogits)
        cuda_backend.rescale_(gradient(out), two, 1.0)
        return watched.recordings


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_address_sanitizer_is_silent(dtype: torch.dtype) -> None:
    simt.replay(simt.program("address"), recordings(some_calls(dtype)), seed=1)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_thread_sanitizer_is_silent(dtype: torch.dtype) -> None:
    simt.replay(simt.program("thread"), recordings(some_calls(dtype)), seed=1)


def test_counts_under_the_thread_sanitizer() -> None:
    """The count kernel, which else takes more rows than that has threads for."""
    early = {"cuda/plan.h": [("kCountWork = 1 << 20", "kCountWork = 0"),
                             ("kChunkRows = 1024", "kChunkRows = 1")]}  # fmt: skip
    patches = {**simulated.only_fp32(), **early}
    args = make(3, 40, 2, last_labels=torch.tensor([1, 2]))
    with simulated.backend(Watched(simt.module(patches))) as watched, simulated.poisoned():
        watched.recordings = []
        check(args)
        assert [call.grid for call in watched.calls[0].launches] == [3, 1]
    simt.replay(simt.program("thread", patches), watched.recordings)


# ---- Planted faults ----


class Fault(NamedTuple):
    """A text of a file of csrc, and what replaces it."""

    file: str
    old: str
    new: str

    def patches(self) -> dict[str, list[tuple[str, str]]]:
        return {**simulated.only_fp32(), f"cuda/{self.file}": [(self.old, self.new)]}


FAR = 2**31 + 16


def far_rows(args: LossArgs) -> LossArgs:
    C = args.logits.shape[1]
    storage = torch.UntypedStorage((FAR + C) * 4)
    far = torch.tensor([]).set_(storage, 0, (2, C), (FAR, 1))  # type: ignore[call-overload]
    return args._replace(logits=far.copy_(args.logits))


TILE, CHIP, CLUSTER = (
    (lambda: make(4, 40, 2)),
    (lambda: make(2, 1104, 1)),
    (lambda: make(1, 9304, 1)),
)
# With the call that shows the fault, and the words of the error ("": the values are wrong).
FAULTS: dict[str, tuple[Fault, Callable[[], LossArgs], str]] = {
    "barrier before the sums of the warps are read": (
        Fault("row.h", "__syncthreads();\n  const unsigned warp", "const unsigned warp"), CHIP, ""),
    "barrier before the gradient leaves the tile": (
        Fault("tile.h", "__syncthreads();\n    if (k.flat)", "if (k.flat)"), TILE, ""),
    "cluster's barrier before its sums are read": (
        Fault("row.h", "cluster_arrive();\n  cluster_wait();", ""), CLUSTER, ""),
    "wait for the row on chip": (
        Fault("row.h", "copy_async_wait();", ""), CHIP, ""),
    "wait for the tile": (Fault("tile.h", "copy_async_wait();", ""), TILE, ""),
    "read beyond the row": (
        Fault("elements.h", "unsigned(C)) element[j] = get", "unsigned(C) + 1) element[j] = get"),
        lambda: make(2, 1101, 1), "load of 4 bytes out of bounds"),
    "read beyond the tile": (
        Fault("tile.h", "const int all = count * C, whole = all / kVector<T>;\n    for (int v = "
              "threadIdx.x; v < whole; v += kThreads) {\n      copy", "const int all = count * C, "
              "whole = all / kVector<T> + 1;\n    for (int v = threadIdx.x; v < whole; v += "
              "kThreads) {\n      copy"), TILE, "load of 16 bytes out of bounds"),
    "offset of 32 bits": (
        Fault("row.h", "row * a.loss.logits_stride", "int(row * a.loss.logits_stride)"),
        lambda: far_rows(make(2, 1104, 1)), "out of bounds"),
    "two blocks on one row": (
        Fault("row.h", "in_turn(blockIdx.x / blocks, a.loss.overlap, a.loss.B)", "blockIdx.x / 2"),
        CHIP, "blocks 0 and 1 both write"),
    "counter that stays": (
        Fault("batch.h", "atomicInc(a.counter, blocks - 1)", "atomicInc(a.counter, ~0u)"), TILE,
        ""),
    "barrier that not all threads reach": (
        Fault("batch.h", "__syncthreads();\n  if (!meeting", "if (threadIdx.x) __syncthreads();\n"
              "  if (!meeting"), TILE, "deadlock|__syncthreads"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str) -> None:
    fault, make_args, words = FAULTS[name]
    check_alone(make_args(), simt.module())
    kernel = simt.module(fault.patches())
    with pytest.raises(RuntimeError if words else AssertionError, match=words or None):
        check_alone(make_args(), kernel)


def check_alone(args: LossArgs, kernel: Any) -> None:
    with simulated.backend(Watched(kernel)) as watched, simulated.poisoned():
        for watched.seed in range(4):
            check(args)


def test_planted_second_read_is_found() -> None:
    again = "store_vector(next, v, load(reinterpret_cast<const uint4*>(z + (v * kN - phase)))"
    fault = Fault("row.h", "store_vector(next, v, *slot_at(slot)", again)
    with simulated.backend(Watched(simt.module(fault.patches()))) as watched:
        args = CHIP()
        check(args)
        assert traffic(watched.calls[0], args) == (1.5, 1, 1, 1)  # of the row that is cached


# What the thread sanitizer finds, though the values are right in most schedules or in all.
RACES = {
    "fence before the count": Fault("batch.h", "__threadfence();\n    // Wraps", "// Wraps"),
    "fence after the count": Fault("batch.h", "__threadfence();\n  }\n  __sync", "}\n  __sync"),
    "barrier after the count": Fault("batch.h", "__syncthreads();\n  if (!meeting", "if (!meeting"),
    "cluster's barrier at the end": Fault("row.h", "if (blocks > 1) cluster_wait();", ""),
}


@pytest.mark.parametrize("name", RACES)
def test_planted_race_is_found(name: str) -> None:
    calls = recordings(iter([CLUSTER() if "cluster" in name else CHIP()]))
    program = simt.program("thread", RACES[name].patches())
    with pytest.raises(RuntimeError, match=r"ThreadSanitizer: data race(.|\n)*src/cuda/"):
        simt.replay(program, calls[:1], seed=1)


class FakeModule:
    """A compiled module as `why_not` sees it."""

    SIMULATED = False

    def __init__(self, runtime: int, driver: int) -> None:
        self.versions = lambda: (runtime, driver)


@pytest.mark.parametrize(
    ("runtime", "driver", "reason"),
    [
        (13000, 0, "there is no NVIDIA driver on this machine"),
        (13000, 12090, "the NVIDIA driver is too old: it supports CUDA 12.9, and dlb_fused._cuda"),
        # Within a major version an older driver will do.
        (12090, 12020, "it takes CUDA tensors, and logits are on cpu"),
        (12090, 13000, "it takes CUDA tensors, and logits are on cpu"),
    ],
)
def test_reasons(runtime: int, driver: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "_kernel", FakeModule(runtime, driver))
    assert (cuda_backend.why_not(torch.empty(1, 1)) or "").startswith(reason)


def test_no_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's devices are called cuda too."""
    monkeypatch.setattr(cuda_backend, "_kernel", FakeModule(13000, 13000))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in str(cuda_backend.why_not(torch.empty(1, 1)))
