"""The Triton kernels compiled ahead of time, with no GPU: options, and what is compiled again.

Every launch comes from the run-time dispatch, and goes through Triton's own specialisation of its
arguments. What holds for the usual launches of each shape is in test_static.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dlb_fused import gpu_memory, triton_backend, triton_kernels
from dlb_fused.backends import CachePair
from dlb_fused.triton_backend import Launch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not isinstance(triton_kernels.tile_kernel, triton.runtime.JITFunction):
    pytest.skip("the kernels are interpreted: TRITON_INTERPRET is set", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import sass  # noqa: E402
from static_kernels import (  # noqa: E402
    COLUMNS,
    LAUNCHES,
    WIDEST,
    B,
    M,
    arguments,
    backward,
    compiled,
    forward,
    rescale,
    specialization,
    step_of_the_module,
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing compiled before is taken for the kernels of now, nor left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def nothing_spills(launch: Launch, capability: int = 90) -> None:
    assert sass.spills(compiled(launch, capability)[0]) == 0


@pytest.mark.parametrize("C", COLUMNS)
def test_exponentials(C: int) -> None:
    """One EX2 for each. In PTX: ptxas doubles code that a condition may not be uniform in."""
    launch = forward(step_of_the_module(C, torch.bfloat16))
    _, ptx = compiled(launch, 90)
    c = launch.constants
    held = c["ROWS"] * c["BLOCK"] // (32 * launch.options["num_warps"])  # elements of a thread
    found = ptx.count("ex2.approx.ftz.f32")
    assert ptx.count("ex2.approx") == found  # tl.exp has no ftz, and five instructions
    if launch.kernel is triton_kernels.tile_kernel:
        # 3 an element in rows with a teacher, 1 in others; and one a row in each.
        assert 4 * held <= found <= 4 * held + 2 * c["ROWS"]
    else:
        # 6 and 2 an element in two passes; 3 and 1 a vector in the first, and in its merge.
        rescales = 4 * held // c["VECTOR"]
        assert 8 * held + rescales <= found <= 8 * held + 2 * rescales + 4


def test_the_table_is_covered() -> None:
    """Each line of the dispatch table, and each kernel of the module, is in the static report."""
    plans = {triton_backend.plan(C, 4, 4, False) for C in COLUMNS}
    tiles = {(False, warps, None) for _, warps in triton_backend._WARPS}
    loop = True, triton_backend._LOOP_WARPS, triton_backend._LOOP_REGISTERS[0]
    assert {(p.looped, p.num_warps, p.registers) for p in plans} == {*tiles, loop}
    text = Path(triton_kernels.__file__).read_text()
    kernels = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    args = [step_of_the_module(C, torch.float32) for C in (1000, COLUMNS[-1])]
    launches = [launch(a) for launch in LAUNCHES.values() for a in args]
    assert {launch.kernel.__name__ for launch in launches} == kernels


OPTIONS: dict[str, dict[str, Any]] = {
    "no overlap": {"last_logits": None, "overlap": 0, "fresh": B},
    "no gradient": {"need_grad": False},
    "two labels": {
        "labels_b": torch.zeros(B, dtype=torch.int64),
        "lam": 0.3,
        "distill_ignored": True,
        "fresh": B - M,
    },
    "all": {
        "labels_b": torch.zeros(B, dtype=torch.int64),
        "lam": torch.empty(B),
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
    nothing_spills(forward(arguments(8192, torch.float32, **OPTIONS[name])))


def test_options_of_a_long_row_do_not_spill() -> None:
    options = OPTIONS["all"] | {"weight": torch.empty(16384)}
    nothing_spills(forward(arguments(16384, torch.float32, **options)))


@pytest.mark.parametrize("C", [100, WIDEST[1], 2 * WIDEST[-1]])
def test_fp64_does_not_spill(C: int) -> None:
    args = step_of_the_module(C, torch.float64)
    nothing_spills(forward(args))
    nothing_spills(backward(args))


def test_small_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_COUNT_WORK", 0)
    args = step_of_the_module(100, torch.float32)
    both = triton_backend.forward_launches(args, gpu_memory.outputs(args))
    assert [launch.kernel for launch in both] == [
        triton_kernels.count_kernel,
        triton_kernels.tile_kernel,
    ]
    for launch in (*both, rescale(args)):
        nothing_spills(launch)


@pytest.mark.parametrize("changed", [
    {"temperature": 0.3}, {"temperature": 1.0}, {"alpha": 0.0}, {"grad_scale": 65536.0},
    {"ignore_index": 1}, {"ignore_index": 0}, {"label_smoothing": 0.2}, {"overlap": 1},
    {"fresh": 1}, {"lam": 0.0}, {"lam": 1.0},
], ids=str)  # fmt: skip
def test_no_value_compiles_again(changed: dict[str, Any]) -> None:
    two = {"labels_b": torch.zeros(B, dtype=torch.int64), "lam": 0.3, "distill_ignored": True}
    args = arguments(1000, torch.float32, label_smoothing=0.1, fresh=16, **two)
    base = specialization(forward(args))
    assert specialization(forward(args._replace(**changed))) == base
    more = arguments(1000, torch.float32, label_smoothing=0.1, fresh=16, **two)
    for rows in (1, 33):
        more = more._replace(logits=torch.empty(rows, 1000), labels=torch.zeros(rows).long())
        assert specialization(forward(more._replace(overlap=1, fresh=1))) == base
