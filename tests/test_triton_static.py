"""The Triton kernels compiled ahead of time, with no GPU: what their machine code says.

Every launch comes from the run-time dispatch (`forward_launches`, `backward_launch`,
`rescale_launch`), and goes through Triton's own specialisation of its arguments.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlb_fused import triton_backend, triton_kernels
from dlb_fused.backends import CachePair, LossArgs
from dlb_fused.triton_backend import Launch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not isinstance(triton_kernels.tile_kernel, triton.runtime.JITFunction):
    pytest.skip("the kernels are interpreted: TRITON_INTERPRET is set", allow_module_level=True)

import sass  # noqa: E402

B, M = 32, 16
# The widest row of each line of the dispatch table, short rows, odd rows, and a row of the loop.
WIDEST = [line[0] for line in triton_backend._WARPS]
COLUMNS = [10, 100, 1003, *WIDEST, 2 * WIDEST[-1]]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing compiled before is taken for the kernels of now, nor left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def make(C: int, dtype: torch.dtype, **options: Any) -> LossArgs:
    z = torch.empty(B, C, dtype=dtype)
    labels = torch.zeros(B, dtype=torch.int64)
    options = {"need_grad": True, "last_logits": torch.empty(M, C, dtype=dtype)} | options
    return LossArgs(z, labels, overlap=options.pop("overlap", M), **options)


def step_of_the_module(C: int, dtype: torch.dtype) -> LossArgs:
    """With guard, statistics and cache."""
    return make(
        C,
        dtype,
        last_labels=torch.zeros(M, dtype=torch.int64),
        last_valid=torch.zeros(M, dtype=torch.uint8),
        stats=torch.zeros(3, dtype=torch.int64),
        fresh=B - M,
    )


def forward(args: LossArgs) -> Launch:
    return triton_backend.forward_launches(args, triton_backend._outputs(args))[-1]


def backward(args: LossArgs, dlogits: Tensor | None = None) -> Launch:
    real = torch.float64 if args.logits.dtype == torch.float64 else torch.float32
    into = torch.empty_like(args.logits)
    parts, dloss = torch.empty(4, dtype=real), torch.empty((), dtype=real)
    return triton_backend.backward_launch(args, parts, dloss, into, False)


def nothing_spills(facts: sass.Facts) -> None:
    assert facts.stack == 0
    assert facts.count("LDL") == facts.count("STL") == 0


def check(launch: Launch, args: LossArgs, capability: int) -> None:
    """No spills, one EX2 an exponential, 128-bit accesses where rows allow them, two programs a
    multiprocessor."""
    facts = sass.facts(launch, capability)
    nothing_spills(facts)
    c = launch.constants
    held = c["ROWS"] * c["BLOCK"] // (32 * launch.options["num_warps"])  # elements of a thread
    exponentials(facts, launch, held)
    item = args.logits.element_size()
    loads = facts.count(r"LDG\.E\.E[FL]")
    vectors = max(1, held * item // 16)
    # Both kinds of rows (with and without teacher) are in the code of the loop.
    expected = (3 * 2 if launch.kernel is triton_kernels.loop_kernel else 2) * vectors
    if c["C"] * item % 16 == 0:
        assert facts.count(r"LDG\.E\.E[FL]\.128") == loads
        # ptxas may unroll a loop.
        assert loads == expected or launch.kernel is triton_kernels.loop_kernel
        assert facts.count(r"STG\.E(\.\w+)*\.128") >= vectors
    threads = 32 * launch.options["num_warps"]
    registers = -(-facts.registers // 8) * 8 * threads
    assert registers * (2 if c["BLOCK"] <= 4096 else 1) <= 65536


def exponentials(facts: sass.Facts, launch: Launch, held: int) -> None:
    """In PTX: ptxas doubles some code where it cannot prove that a condition is uniform."""
    found = facts.ptx.count("ex2.approx.ftz.f32")
    assert facts.ptx.count("ex2.approx") == found  # tl.exp has no ftz, and five instructions
    if launch.kernel is triton_kernels.tile_kernel:
        # 3 an element in rows with a teacher, 1 in others; and one a row in each.
        assert 4 * held <= found <= 4 * held + 2 * launch.constants["ROWS"]
    else:
        # 6 and 2 an element in two passes; 3 and 1 a vector in the first, and in its merge.
        rescales = 4 * held // launch.constants["VECTOR"]
        assert 8 * held + rescales <= found <= 8 * held + 2 * rescales + 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", COLUMNS)
def test_every_line_of_the_table(C: int, dtype: torch.dtype) -> None:
    args = step_of_the_module(C, dtype)
    check(forward(args), args, 90)
    check(backward(args), args, 90)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [100, *COLUMNS[-2:]])
@pytest.mark.parametrize("capability", [80, 100, 120])
def test_other_targets(C: int, dtype: torch.dtype, capability: int) -> None:
    args = step_of_the_module(C, dtype)
    check(forward(args), args, capability)


def test_the_table_is_covered() -> None:
    """Each line of the dispatch table and each kernel of the module has a case."""
    plans = {triton_backend.plan(C, 4, 4, False) for C in COLUMNS}
    tiles = {(False, *line[1:]) for line in triton_backend._WARPS}
    loop = True, triton_backend._LOOP_WARPS, triton_backend._LOOP_REGISTERS[0]
    assert {(p.looped, p.num_warps, p.registers) for p in plans} == {*tiles, loop}
    text = Path(triton_kernels.__file__).read_text()
    kernels = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    assert kernels == {"tile_kernel", "loop_kernel", "count_kernel", "rescale_kernel"}


OPTIONS: dict[str, dict[str, Any]] = {
    "no overlap": {"last_logits": None, "overlap": 0, "fresh": B},
    "no gradient": {"need_grad": False},
    "all": {
        "weight": torch.empty(8192),
        "label_smoothing": 0.1,
        "temperature": torch.empty(M),
        "alpha": torch.empty(M),
        "grad_scale": torch.empty(()),
        "ce_count": torch.empty(()),
        "kl_count": torch.empty(()),
        "teacher_rows": torch.zeros(M, dtype=torch.int64),
        "last_valid": torch.zeros(M, dtype=torch.uint8),
    },
    "pair": {
        "last_logits": None,
        "fresh": M,
        "pair": CachePair(
            torch.empty(2, M, 8192),
            torch.zeros(2, M, dtype=torch.int64),
            torch.zeros(2, M, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.int32),
        ),
    },
    "in place": {"inplace": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_not_spill(name: str) -> None:
    nothing_spills(sass.facts(forward(make(8192, torch.float32, **OPTIONS[name])), 90))


def test_options_of_a_long_row_do_not_spill() -> None:
    options = OPTIONS["all"] | {"weight": torch.empty(16384)}
    nothing_spills(sass.facts(forward(make(16384, torch.float32, **options)), 90))


@pytest.mark.parametrize("C", [100, 2048, 16384])
def test_fp64(C: int) -> None:
    nothing_spills(sass.facts(forward(step_of_the_module(C, torch.float64)), 90))


def test_small_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_COUNT_WORK", 0)
    args = step_of_the_module(100, torch.float32)
    both = triton_backend.forward_launches(args, triton_backend._outputs(args))
    assert [launch.kernel for launch in both] == [
        triton_kernels.count_kernel,
        triton_kernels.tile_kernel,
    ]
    dloss = torch.empty(())
    for launch in (*both, triton_backend.rescale_launch(args.logits, dloss, 1.0)):
        nothing_spills(sass.facts(launch, 90))


def test_planted_spill_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        triton_backend, "plan", lambda *_: triton_backend.Plan(False, 1, 16384, 1, 8, None)
    )
    args = step_of_the_module(16384, torch.float32)
    with pytest.raises(AssertionError):
        nothing_spills(sass.facts(forward(args), 90))


def test_planted_runtime_width_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step in elements, the compiler sees no divisibility and loads 4 bytes at a time."""
    monkeypatch.setattr(triton_backend, "_unit", lambda steps: 1)
    args = step_of_the_module(1000, torch.float32)
    with pytest.raises(AssertionError):
        check(forward(args), args, 90)


@pytest.mark.parametrize("changed", [
    {"temperature": 0.3}, {"temperature": 1.0}, {"alpha": 0.0}, {"grad_scale": 65536.0},
    {"ignore_index": 1}, {"ignore_index": 0}, {"label_smoothing": 0.2}, {"overlap": 1},
    {"fresh": 1},
], ids=str)  # fmt: skip
def test_no_value_compiles_again(changed: dict[str, Any]) -> None:
    args = make(1000, torch.float32, label_smoothing=0.1, fresh=16)
    base = sass.specialization(forward(args))
    assert sass.specialization(forward(args._replace(**changed))) == base
    more = make(1000, torch.float32, label_smoothing=0.1, fresh=16)
    for rows in (1, 33):
        more = more._replace(logits=torch.empty(rows, 1000), labels=torch.zeros(rows).long())
        assert sass.specialization(forward(more._replace(overlap=1, fresh=1))) == base
