"""The report on the machine code finds what it says it finds, and the tracked table is of now.

Faults are planted in copies of the sources, of the launches and of the table.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlb_fused import triton_backend, triton_kernels

triton = pytest.importorskip("triton", reason="triton is not installed")
if not isinstance(triton_kernels.tile_kernel, triton.runtime.JITFunction):
    pytest.skip("the kernels are interpreted: TRITON_INTERPRET is set", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
import sass  # noqa: E402
import static_kernels as kernels  # noqa: E402
import static_report as report  # noqa: E402
from static_kernels import Entry  # noqa: E402

needs_nvcc = pytest.mark.skipif(kernels.nvcc() is None, reason="there is no nvcc")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing compiled before is taken for the kernels of now, nor left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def of_triton(own_cache: Any) -> list[Entry]:
    return kernels.measure("triton", few=False)


def same_compiler(backend: str) -> None:
    table, here = report.load_table()[0], kernels.compilers()
    if table[backend] != here[backend]:
        pytest.skip(f"the table is of {table[backend]}, here is {here[backend]}")


# ---- the kernels, and the table ----


def test_triton_kernels_spill_nothing_and_access_16_bytes(of_triton: list[Entry]) -> None:
    assert [line for entry in of_triton for line in report.wrong(entry)] == []


def test_two_triton_programs_a_multiprocessor(of_triton: list[Entry]) -> None:
    """While one of them waits for its rows, the other computes: up to 4096 columns, or looped."""
    few = [e for e in of_triton if e.blocks < 2]
    assert {e.form for e in few} <= {"tile, 8192 columns"}


def test_table_is_what_triton_compiles_now(of_triton: list[Entry]) -> None:
    same_compiler("triton")
    table = [e for e in report.load_table()[1] if e.backend == "triton"]
    assert [json.loads(json.dumps(e)) for e in of_triton] == [list(e) for e in table]


@needs_nvcc
def test_table_is_what_nvcc_compiles_now() -> None:
    same_compiler("cuda")
    table = {e.key: e for e in report.load_table()[1]}
    for entry in kernels.cuda_entries(kernels.SOURCES / "bfloat16.cu", 90):
        assert report.wrong(entry) == []
        assert entry == table[entry.key]


def test_page_shows_the_table() -> None:
    assert report.page(*report.load_table()) == (report.RESULTS / "static.md").read_text()


def test_hot_code_has_the_exponentials_of_the_equations() -> None:
    """1 an element without a teacher, 3 with one, 2 at temperature 3; for each pass and merge."""
    least = {"CE": 1, "KL": 3, "KL at temperature 3": 2}
    entries = [e for e in report.load_table()[1] if e.work]
    assert {e.backend for e in entries} == {"triton", "cuda"}
    for e in entries:
        kinds = {"CE", "KL"} if e.backend == "triton" or "smoothing" in e.form else least.keys()
        assert e.work.keys() == kinds, e.key
        for kind, passes in e.work.items():
            names = {"row"} if "tile" in e.form and e.backend == "triton" else {"sums", "gradient"}
            assert names <= passes.keys(), e.key
            for name in names:
                assert least[kind] <= passes[name][1] <= 1.5 * least[kind], e.key


# ---- planted in Triton launches ----


def entry_of(C: int, dtype: torch.dtype) -> Entry:
    (entry,) = kernels.triton_entries(kernels.Variant("forward", C, dtype, 90))
    return entry


def test_spill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    too_wide = triton_backend.Plan(False, 1, 16384, 1, 8, None)
    monkeypatch.setattr(triton_backend, "plan", lambda *_: too_wide)
    assert any("spills" in line for line in report.wrong(entry_of(16384, torch.float32)))


def test_narrow_access_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step in elements, the compiler sees no divisibility and loads 4 bytes at a time."""
    monkeypatch.setattr(triton_backend, "_unit", lambda steps: 1)
    assert any("128 bits" in line for line in report.wrong(entry_of(1000, torch.float32)))


# ---- planted in the table ----


def less(kind: str, step: str) -> Callable[[Entry], Entry]:
    """The table's entry had less work there."""

    def change(entry: Entry) -> Entry:
        passes = dict(entry.work[kind])
        passes[step] = [0.9 * n for n in passes[step]]
        return entry._replace(work={**entry.work, kind: passes})

    return change


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda e: e._replace(registers=int(0.9 * e.registers)), "registers grew"),
    (lambda e: e._replace(shared=e.shared - 1), "shared memory grew"),
    (lambda e: e._replace(blocks=e.blocks + 1), "blocks a multiprocessor"),
    (less("KL", "row"), "EX2 an element of KL rows grew"),
    (less("CE", "row"), "instructions an element of CE rows grew"),
    (lambda e: e._replace(work={"CE": e.work["CE"]}), "hot code is for"),
    (lambda e: e._replace(stores={"128": 9, "32": 1}, loads={"128": 1}), None),
    (lambda e: e._replace(registers=e.registers + 1), None),
])  # fmt: skip
def test_growth_over_the_table_is_found(
    change: Callable[[Entry], Entry], complaint: str | None
) -> None:
    now = next(e for e in report.load_table()[1] if e.form == "tile, 1000 columns")
    now = now._replace(shared=10)
    found = report.compare([now], {now.key: change(now)}, complete=True)
    assert (complaint is None) == (found == [])
    assert complaint is None or any(complaint in line for line in found)


def test_lost_vectors_new_and_gone_kernels_are_found() -> None:
    now = next(e for e in report.load_table()[1] if e.form == "tile, 1000 columns")
    narrow = now._replace(loads={"32": 8})
    assert "no more 16 bytes" in report.compare([narrow], {now.key: now}, complete=True)[0]
    assert "not in the table" in report.compare([now], {}, complete=True)[0]
    assert "no kernel any more" in report.compare([], {now.key: now}, complete=True)[0]
    assert report.compare([], {now.key: now}, complete=False) == []


def test_check_says_what_it_did_not_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_with, table = report.load_table()
    of = {name: [e for e in table if e.backend == name] for name in made_with}
    monkeypatch.setattr(report, "measure", lambda backend, few: of[backend])
    monkeypatch.setattr(report, "compilers", lambda: {"triton": "triton 9.9"})
    complaints = [line for e in of["triton"] for line in report.wrong(e)]
    assert report.check(few=False) == complaints
    assert capsys.readouterr().out.splitlines() == [
        "static: the triton kernels were not compared: "
        f"the table is of {made_with['triton']}, here is triton 9.9",
        "static: the cuda kernels were not checked: there is no nvcc",
    ]


# ---- planted in CUDA sources ----

ONE = """
#include "row.h"
template __global__ void row_kernel<BFloat16, Source::kGlobal, false>(const __grid_constant__
                                                                     KernelArgs k);
"""


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., Entry]:
    """The entry of one kernel, with texts replaced in its sources: (file, old, new)."""

    def compile(*patches: tuple[str, str, str]) -> Entry:
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        folder = tmp_path / "csrc" / "cuda"
        for file, old, new in patches:
            text = (folder / file).read_text()
            assert text.count(old) == 1, f"{file} has no such text, or has it twice: {old}"
            (folder / file).write_text(text.replace(old, new))
        (folder / "one.cu").write_text(ONE)
        (entry,) = kernels.cuda_entries(folder / "one.cu", 90)
        return entry

    return compile


@pytest.fixture(scope="module")
def sound() -> Entry:
    same_compiler("cuda")
    return {e.key: e for e in report.load_table()[1]}["cuda, row kGlobal, bfloat16, sm_90"]


@needs_nvcc
def test_nothing_is_found_without_a_fault(planted: Callable[..., Entry], sound: Entry) -> None:
    entry = planted()
    assert report.wrong(entry) == report.compare([entry], {sound.key: sound}, True) == []


@needs_nvcc
def test_spill_in_cuda_is_found(planted: Callable[..., Entry]) -> None:
    bound = "__launch_bounds__(kThreads, kBlocks<T, kSource, kSmooth>)"
    entry = planted(("row.h", bound, "__launch_bounds__(kThreads, 8)"))
    assert any("spills" in line for line in report.wrong(entry))


@needs_nvcc
def test_narrow_load_in_cuda_is_found(planted: Callable[..., Entry]) -> None:
    wide = "load(reinterpret_cast<const uint4*>(z + c))"
    half = "load(reinterpret_cast<const uint2*>(z + c) + {})"
    pieces = ", ".join(f"{half.format(i)}.{axis}" for i in (0, 1) for axis in "xy")
    entry = planted(("row.h", wide, f"uint4{{{pieces}}}"))
    assert any("128 bits" in line for line in report.wrong(entry))


@needs_nvcc
def test_loop_of_elements_in_cuda_is_found(planted: Callable[..., Entry], sound: Entry) -> None:
    wide = "load(reinterpret_cast<const uint4*>(z + c))"
    entry = planted(("row.h", wide, "load_edge(z, v, phase, C)"))
    assert report.compare([entry], {sound.key: sound}, True) != []


@needs_nvcc
@pytest.mark.parametrize(("more", "complaint"), [
    ("* fused(z[j], top, top) * fused(top, z[j], z[j])", "instructions an element of CE rows grew"),
    ("* exp2_of(z[j])", "hot code is for"),  # so many exponentials have rows with a teacher
])  # fmt: skip
def test_growth_in_cuda_is_found(
    more: str, complaint: str, planted: Callable[..., Entry], sound: Entry
) -> None:
    """In the gradient of rows without a teacher."""
    before = "out[j] = exp2_of(fused(z[j], scale.one, -top)) * g.factor"
    entry = planted(("row_sums.h", before, f"{before} {more}"))
    found = report.compare([entry], {sound.key: sound}, True)
    assert any(complaint in line for line in found)


# ---- the reader ----


def test_blocks_a_multiprocessor() -> None:
    """By threads, registers, shared memory, and number; as the vendor's calculator has them."""
    assert sass.resident(32, 256, 0, 90) == 8
    assert sass.resident(80, 256, 0, 90) == 3
    assert sass.resident(32, 256, 72 << 10, 90) == 3
    assert sass.resident(16, 32, 0, 90) == 32
    assert sass.resident(32, 256, 40 << 10, 120) == 2
