"""The Triton kernels in the interpreter: values, every access, every order of programs.

Runs with TRITON_INTERPRET=1; `test_triton_static.py` runs without it.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import contract
import pytest
import torch
from contract import INF, NAN, OPTIONS, STATS, close, in_fp64, make, make_option, near
from torch import Tensor

from dlb_fused import gpu_memory, reference, triton_backend, triton_kernels
from dlb_fused.backends import CachePair, LossArgs, LossOutputs

if triton_backend.why_not(torch.empty(1, 1)) is not None:
    reason = triton_backend.why_not(torch.empty(1, 1))
    pytest.skip(f"needs TRITON_INTERPRET=1: {reason}", allow_module_level=True)

from interpreter import Checker
from triton.runtime.errors import InterpreterError

# Columns of most tests: one tile, or two blocks of the loop of the fixture `form`.
C = 37


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of NaN (or of a wrong integer), so that a skipped element shows."""
    empty = torch.empty

    def fill(*args: Any, **kw: Any) -> Tensor:
        out = empty(*args, **kw)
        return out.fill_(NAN if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", fill)
    # A planted fault may leave a counter behind.
    monkeypatch.setattr(gpu_memory, "_workspaces", {})


@pytest.fixture(params=["tile", "loop"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel; that of long rows with blocks of 32 columns, since the interpreter is slow."""
    if request.param == "loop":
        small = triton_backend.Plan(True, 1, 32, 4, 4, None)
        monkeypatch.setattr(triton_backend, "plan", lambda *_: small)
    return request.param


def tensors(
    args: LossArgs, out: LossOutputs | None = None, **more: Tensor | None
) -> dict[str, Any]:
    """All tensors that a launch may touch, by name; an in-place gradient counts as logits."""
    named = {**args._asdict(), **(args.pair._asdict() if args.pair else {}), **more}
    if args.pair:
        named["logits"], named["labels"] = args.logits, args.labels
        named |= {f"pair_{k}": v for k, v in args.pair._asdict().items()}
    if out is not None:
        named |= out._asdict()
        real = out.loss.dtype
        device, B = args.logits.device, args.logits.shape[0]
        space = gpu_memory.workspace("triton", device, real, B)
        named |= space._asdict()
    named = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    if args.inplace:
        named.pop("dlogits", None)
    return named


def forward(
    args: LossArgs, order: int | None = None, module: ModuleType = triton_backend
) -> tuple[LossOutputs, Checker]:
    """`forward` of the backend, with every access checked."""
    out = gpu_memory.outputs(args)
    device, B = args.logits.device, args.logits.shape[0]
    space = gpu_memory.workspace("triton", device, out.loss.dtype, B)
    with Checker(tensors(args, out) | space._asdict(), order) as checker:
        for launch in module.forward_launches(args, out):
            module._run(launch)
    return out, checker


def backward(
    args: LossArgs, parts: Tensor, dloss: float, dlogits: Tensor | None
) -> tuple[Tensor, Checker]:
    d = torch.tensor(dloss, dtype=parts.dtype)
    fresh = dlogits is None
    into = torch.empty(args.logits.shape, dtype=args.logits.dtype) if fresh else dlogits
    assert into is not None
    with Checker(tensors(args, parts=parts, dloss=d, dlogits=into)) as checker:
        launch = triton_backend.backward_launch(args, parts, d, into, fresh)
        triton_backend._run(launch)
    return into, checker


class Checked:
    """The backend with every access checked, for `contract.check`."""

    def forward(self, args: LossArgs) -> LossOutputs:
        return forward(args)[0]

    def backward(
        self, args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None
    ) -> Tensor:
        return backward(args, parts, float(dloss), dlogits)[0]


checked = Checked()


def check(args: LossArgs, dlosses: tuple[float, ...] = (-3.7,)) -> LossOutputs:
    return contract.check(checked, args, dlosses)


@pytest.mark.parametrize("C", [1, 2, 10, 100, 1000, 1003, 8192, 8200, 20001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form(C: int, dtype: torch.dtype) -> None:
    check(make(2 if C > 2000 else 5, C, 1, dtype))


@pytest.mark.parametrize("dlosses", [(1.0, 0.0, -3.7, 65536.0)])
def test_upstream_gradient(form: str, dlosses: tuple[float, ...]) -> None:
    check(make(3, C, 1), dlosses)


@pytest.mark.parametrize(
    "dtypes",
    [
        *itertools.product([torch.float32, torch.bfloat16, torch.float16], repeat=2),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_types(form: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    scale = 65536.0 if dtypes[0] == torch.float16 else 1.0
    check(make(4, C, 2, *dtypes, grad_scale=scale, temperature=2.3, alpha=0.7), (65536.0,))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(form: str, name: str) -> None:
    out = check(make_option(name, C))
    if name == "all ignored":
        assert out.loss == 0 and not out.dlogits.any()
    if name == "no copy":
        assert out.next_logits is None


@pytest.mark.parametrize("change", ["none", "label", "invalid row", "ignored"])
def test_guard(form: str, change: str) -> None:
    contract.check_guard(check, make(5, C, 3, stats=STATS.clone()), change)


def test_guard_drops_a_teacher_of_nan(form: str) -> None:
    contract.check_guard_drops_a_teacher_of_nan(check, make(4, C, 2))


def test_rows_that_are_not_finite(form: str) -> None:
    contract.check_rows_that_are_not_finite(check, make(8, C, 4, fresh=8))


def test_masks_of_finfo_min(form: str) -> None:
    contract.check_masks_of_finfo_min(check, make(4, C, 2))


@pytest.mark.parametrize("label", [-1, 10**6, 2**32 + 1])
def test_label_out_of_range(form: str, label: int) -> None:
    contract.check_label_out_of_range(checked.forward, make(4, C, 2), label)


@pytest.mark.parametrize("label", [-1, 10**6, 2**32 + 1])
def test_bad_second_label(form: str, label: int) -> None:
    contract.check_bad_second_label(checked.forward, make(4, C, 2), label)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
def test_bad_values_in_tensors(form: str, bad: float) -> None:
    contract.check_bad_values(checked.forward, make(4, C, 2), bad)


@pytest.mark.parametrize("offsets", [(1e4, 1e4), (1e4, -1e4), (-1e4, 0.0)])
def test_offsets(form: str, offsets: tuple[float, float]) -> None:
    contract.check_offsets(check, make(4, C, 2), offsets)


def test_confident_rows(form: str) -> None:
    args = make(3, C, 1)
    args.logits[torch.arange(3), args.labels] += 20
    out, want = check(args), reference.forward(in_fp64(args))
    at = torch.arange(3), args.labels
    assert ((out.dlogits[at].double() / want.dlogits[at]) - 1).abs()[1:].max() < 3e-6


@pytest.mark.parametrize("two", [False, True])
def test_inplace_and_rescale(form: str, two: bool) -> None:
    second = {"labels_b": contract.second_labels(C), "lam": 0.3} if two else {}
    args = make(4, C, 2, inplace=True, **second)
    wide = torch.zeros(4, C + 3)
    wide[:, :C] = args.logits
    args = args._replace(logits=wide[:, :C])
    want = reference.forward(in_fp64(args))
    out, _ = forward(args)
    assert out.dlogits is args.logits and not wide[:, C:].any()
    close(out.dlogits, want.dlogits, 1e-6)
    assert torch.equal(out.next_logits.double(), want.next_logits)
    before = wide.clone()
    for dloss in (1.0, -3.7):
        d = torch.tensor(dloss)
        with Checker({"dlogits": args.logits, "dloss": d}) as checker:
            triton_backend.rescale_(args.logits, d, 1.0)
        assert (checker.loads["dlogits"] == 0) == (dloss == 1.0)
        close(wide, before.double() * dloss, 1e-7)


def test_empty_batch() -> None:
    out = triton_backend.forward(make(0, 5, 0))
    assert out.loss == 0 and not out.parts.any() and out.dlogits.shape == (0, 5)
    args = make(0, 5, 0)
    assert triton_backend.backward(args, out.parts, torch.tensor(2.0), None).shape == (0, 5)


def test_counts_in_a_launch_before(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a number of labels the counts come from chunks; the values stay the same."""
    options = {"weight": torch.rand(C), "stats": STATS.clone()}
    args = make(11, C, 7, **options)._replace(last_labels=torch.zeros(7, dtype=torch.int64))
    for guard in (args.labels[:7].clone(), args.last_labels):
        one = check(args._replace(last_labels=guard))
        with monkeypatch.context() as m:
            m.setattr(triton_backend, "_COUNT_WORK", 0)
            m.setattr(triton_backend, "_COUNT_WARP", 1)
            gpu_memory._workspaces.clear()
            both = triton_backend.forward_launches(args, gpu_memory.outputs(args))
            assert len(both) == 2 and (both[0].grid > 1)
            two = check(args._replace(last_labels=guard))
        gpu_memory._workspaces.clear()
        near(two.parts, one.parts.double(), 1e-6)
        close(two.dlogits, one.dlogits.double(), 3e-7)  # another order of the weights


def test_pair(form: str) -> None:
    """Five steps over two buffers whose roles are decided on the device equal five steps with
    copies; the first finds no teacher, the fourth another chain."""
    rows = 2
    pair = CachePair(
        torch.full((2, rows, C), NAN),
        torch.zeros(2, rows, dtype=torch.int64),
        torch.zeros(2, rows, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int32),
    )
    stats, want_stats = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    last = LossOutputs(*[torch.empty(0)] * 3, pair.logits[0], pair.labels[0], pair.valid[0])
    labels = torch.randint(0, C, (rows,), generator=torch.Generator().manual_seed(5))
    for step in range(5):
        args = make(2 * rows, C, rows, seed=step, fresh=rows)
        if step != 3:
            args.labels[:rows] = labels
        labels = args.labels[rows:].clone()
        plain = args._replace(
            last_logits=last.next_logits.clone(),
            last_valid=last.next_valid,
            last_labels=last.next_labels,
            stats=want_stats,
        )
        want, _ = forward(plain)
        args = args._replace(last_logits=None, pair=pair, stats=stats)
        got, _ = forward(args, order=step)
        assert int(pair.parity) == (step + 1) % 2
        assert torch.equal(got.loss, want.loss) and torch.equal(got.parts, want.parts)
        assert torch.equal(got.dlogits, want.dlogits)
        assert (got.parts[3] > 0) == (step in (1, 2, 4))
        new = int(pair.parity)
        assert torch.equal(pair.logits[new], want.next_logits)
        assert torch.equal(pair.labels[new], want.next_labels) and pair.valid[new].all()
        assert got.next_logits is None and torch.equal(stats, want_stats)
        again, _ = backward(args, got.parts, -3.7, None)
        assert torch.equal(again, backward(plain, want.parts, -3.7, None)[0])
        last = want


def test_pair_without_overlap() -> None:
    """A step without overlap rows still fills the cache and changes the slot."""
    pair = CachePair(
        torch.zeros(2, 4, 10), torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.uint8), torch.ones(1, dtype=torch.int32),
    )  # fmt: skip
    args = make(4, 10, 0, fresh=4, pair=pair)
    forward(args)
    assert int(pair.parity) == 0 and torch.equal(pair.logits[0], args.logits)
    assert pair.valid.tolist() == [[1] * 4, [0] * 4]


@pytest.mark.parametrize("shape", [(40, 10, 20), (9, 100, 5), (5, 1003, 3), (3, 8200, 1)], ids=str)
def test_any_order_of_programs_gives_the_same_bits(shape: tuple[int, int, int]) -> None:
    args = make(*shape, weight=torch.rand(shape[1]), last_labels=None)
    one, _ = forward(args)
    for order in range(2):
        two, _ = forward(args, order)
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [10, 100, 1000, 8192])
def test_each_byte_moves_once(C: int, dtype: torch.dtype) -> None:
    B, m = 4, 2
    args = make(B, C, m, dtype)
    traffic_is_ideal(forward(args)[1], args)
    out, _ = forward(args)
    _, checker = backward(args, out.parts, 1.0, out.dlogits)
    assert checker.stores["dlogits"] == checker.loads["logits"] == 0
    _, checker = backward(args, out.parts, 2.0, out.dlogits)
    row = C * dtype.itemsize
    assert (checker.loads["logits"], checker.loads["last_logits"]) == (B * row, m * row)
    assert checker.stores["dlogits"] == B * row


def traffic_is_ideal(checker: Checker, args: LossArgs) -> None:
    row = args.logits.shape[1] * args.logits.element_size()
    B, m = len(args.logits), args.overlap
    read = checker.loads["logits"], checker.loads["last_logits"]
    assert read == (B * row, m * row)
    assert checker.stores["dlogits"] == B * row
    assert checker.stores["next_logits"] == args.fresh * row
    for name in ("dlogits", "next_logits"):
        assert checker.loads[name] == 0


def test_a_long_row_is_read_twice() -> None:
    args = make(2, 8200, 1)
    _, checker = forward(args)
    assert checker.loads["logits"] == 2 * args.logits.nbytes
    assert checker.loads["last_logits"] == 2 * args.last_logits.nbytes
    assert checker.stores["dlogits"] == args.logits.nbytes


def test_rows_without_a_teacher_read_none(form: str) -> None:
    args = make(4, C, 2, last_valid=torch.tensor([1, 0], dtype=torch.uint8))
    _, checker = forward(args)
    assert checker.loads["last_logits"] == (1 if form == "tile" else 2) * C * 4


def patched(tmp_path: Path, old: str, new: str) -> ModuleType:
    """The shipped backend with a fault planted in the text of its kernels."""
    text = Path(triton_kernels.__file__).read_text()
    assert text.count(old) >= 1, f"the patch does not apply: {old!r}"
    path = tmp_path / "patched_kernels.py"
    path.write_text(text.replace(old, new))
    backend = module_from(Path(triton_backend.__file__))
    backend.kernels = module_from(path)  # type: ignore[attr-defined]
    return backend


def module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_planted_second_read_is_caught(tmp_path: Path) -> None:
    again = "z = tl.load(logits + (row64 * step * UNIT)[:, None] + cols[None, :], mask=inside)"
    module = patched(tmp_path, "z = raw.to(real)\n    n =", f"{again}.to(real)\n    n =")
    args = make(4, 100, 2)
    with pytest.raises(AssertionError):
        traffic_is_ideal(forward(args, module=module)[1], args)


def test_planted_access_out_of_bounds_is_caught(tmp_path: Path) -> None:
    module = patched(
        tmp_path, "inside = (rows < B)[:, None] & seen", "inside = (rows < B + 1)[:, None] & seen"
    )
    with pytest.raises(InterpreterError, match="out of bounds"):
        forward(make(5, 30, 2), module=module)


def test_planted_write_conflict_is_caught(tmp_path: Path) -> None:
    module = patched(tmp_path, "rows = tile * ROWS", "rows = tile // 2 * ROWS")
    with pytest.raises(InterpreterError, match="both write"):
        forward(make(8, 100, 2), module=module)


def test_planted_counter_that_stays_is_caught(tmp_path: Path) -> None:
    module = patched(tmp_path, 'tl.atomic_xchg(sums.counter, 0, sem="relaxed")', "pass")
    args = make(5, 100, 2)
    assert forward(args, module=module)[0].loss.isfinite()
    assert forward(args, module=module)[0].loss.isnan()
    gpu_memory._workspaces.clear()  # that counter has not gone back
    for _ in range(3):
        assert forward(args)[0].loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(dtype: torch.dtype) -> None:
    """Rows 2^32 elements apart, in memory that is never touched between them."""
    step, C = 2**32 + 16, 10
    wide = torch.UntypedStorage((step + C) * dtype.itemsize)
    z = torch.tensor([], dtype=dtype).set_(wide, 0, (2, C), (step, 1))
    narrow = make(2, C, 1, dtype)
    z.copy_(narrow.logits)
    out = check(narrow)
    got, _ = forward(narrow._replace(logits=z))
    for a, b in zip(out, got, strict=True):
        assert torch.equal(a, b)
