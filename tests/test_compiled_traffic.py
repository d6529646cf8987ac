"""The study of what torch.compile makes of the loss: it counts right, and its table is of now."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compiled_traffic

    return compiled_traffic


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what pretends a GPU there leaves nothing behind here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def skip_elsewhere(traffic: ModuleType, check: bool) -> None:
    if reason := traffic.why_not_here(check):
        pytest.skip(reason)


# ---- what it counts ----


def test_the_table_is_what_torch_compiles_now(traffic: ModuleType) -> None:
    skip_elsewhere(traffic, True)
    done = run("benchmarks/compiled_traffic.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as in the table" in done.stdout


SQUARES = """
import json
from compiled_traffic import compile_for_gpu, traffic_of
squares = lambda logits, labels, last_logits: (logits * logits).sum()
for shape in (64, 1000, "float32"), (64, 1000, "bfloat16"):
    found = compile_for_gpu(squares, shape)
    print(json.dumps([[traffic_of(x)[1:] for x in launches] for launches in found]))
"""


def test_traffic_of_a_function_with_known_traffic(traffic: ModuleType) -> None:
    """Σz²: forward reads z; backward reads it and writes 2z."""
    skip_elsewhere(traffic, False)
    done = run("-c", SQUARES)
    assert done.returncode == 0, done.stderr
    for line, itemsize in zip(done.stdout.splitlines(), (4, 2), strict=True):
        forward, backward = json.loads(line)
        matrix = 64 * 1000 * itemsize
        assert sum(once for once, _, _ in forward) == pytest.approx(matrix, rel=0.02)
        assert sum(written for _, _, written in forward) < 0.02 * matrix
        assert backward == [[matrix + itemsize, matrix + itemsize, matrix]]


SOURCE = """
def split(in_ptr0, in_ptr1, in_out_ptr0, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xnumel = 24
    r0_numel = 7
    xindex = xoffset + tl.arange(0, XBLOCK)[:, None]
    x0 = (xindex % 3)
    x1 = xindex // 3
    x3 = xindex
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_2 = r0_index
        tmp0 = tl.load(in_ptr0 + (r0_2 + 7*x0 + 20*x1), r0_mask & tmp2 & xmask, other=0.0)
        tmp1 = tl.load(in_ptr1 + (tl.broadcast_to(x1, [XBLOCK, R0_BLOCK])), r0_mask & xmask)
        tl.store(out_ptr0 + (r0_2 + 7*x0 + 20*x1), tmp0, r0_mask & tmp2 & xmask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp3 = tl.load(out_ptr0 + (r0_2 + 7*x0 + 20*x1), r0_mask & tmp2 & xmask)
        tmp4 = tl.load(in_ptr0 + (r0_2 + 7*x0 + 20*x1), r0_mask & tmp2 & xmask, other=0.0)
        tmp5 = tl.load(in_ptr1 + (tmp3 + 9*x1), xmask)
    tmp6 = tl.load(in_out_ptr0 + (0))
    tl.store(in_out_ptr0 + (x3), tmp6, xmask)
"""


def test_bytes_of_a_kernel(traffic: ModuleType) -> None:
    """8 rows of 20 fp32 in 3 parts of 7, the last one short; a column, and a gather from a 8×9."""
    z, table = torch.empty(8, 20), torch.empty(8, 9, dtype=torch.float16)
    sums, out = torch.empty(24), torch.empty(8, 20, dtype=torch.bfloat16)
    args = (z, table, sums, out, 24, 7)
    assert traffic.ranges_of(SOURCE) == {"x0": 3, "x1": 8, "x3": 24, "r0_2": 7}
    matrix, gather, one = 8 * 20 * 4, 8 * 2, 4
    assert traffic.traffic_of(traffic.Launch("split", SOURCE, args)) == traffic.Kernel(
        "split",
        read_once=matrix + gather + one,
        read=2 * matrix + 2 * gather + 8 * 20 * 2 + one,
        written=8 * 20 * 2 + 24 * 4,
    )


def test_what_is_not_counted_is_refused(traffic: ModuleType) -> None:
    source = SOURCE.replace("tl.store(in_out_ptr0", "tl.atomic_add(in_out_ptr0")
    tensors = [torch.empty(8, 20)] * 4
    with pytest.raises(NotImplementedError, match="split has atomic_add"):
        traffic.traffic_of(traffic.Launch("split", source, (*tensors, 24, 7)))


def test_ideal_bytes(traffic: ModuleType) -> None:
    unit = 128 * 100 * 4  # n·C·b
    assert traffic.ideal_bytes((256, 100, "float32"), "naive DLB") == 5 * unit
    assert traffic.ideal_bytes((256, 100, "float32"), "cross_entropy") == 4 * unit


# ---- its table ----


def test_the_page_is_that_of_the_table(traffic: ModuleType) -> None:
    assert (traffic.RESULTS / "compiled.md").read_text() == traffic.page(traffic.load_table())


def test_the_table_is_whole(traffic: ModuleType) -> None:
    table = traffic.load_table()
    cases = {(row["loss"], row["B"], row["C"], row["dtype"]) for row in table["results"]}
    assert cases == {(loss, *shape) for loss in traffic.LOSSES for shape in traffic.SHAPES}
    for row in table["results"]:
        assert len(row["forward"]) == row["kernels_forward"] > 0
        assert row["ratio"] >= row["ratio_once"] > 1


def test_a_difference_is_found(traffic: ModuleType) -> None:
    table = traffic.load_table()
    assert traffic.differences(table, table) == []
    changed = copy.deepcopy(table)
    changed["results"][0]["kernels_backward"] += 1
    changed["ours"]["256x1000 float32"] = [1, 2]
    del changed["results"][-1]
    found = traffic.differences(table, changed)
    assert len(found) == 4 and "naive DLB 256x100 float32: " in found[0]
    assert "dlb_loss 256x1000 float32: other launches" in found[1]
    assert found[3].endswith("in the table nothing")


def test_another_version_is_refused(
    traffic: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(traffic, "WRITTEN_FOR", "1.0")
    assert traffic.main(["--check"]) == 2
    assert "written for the inside of torch 1.0, found" in capsys.readouterr().out


# ---- on a GPU ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(traffic: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_predicted_and_counted(traffic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--device cuda` says of a device that launches 3 kernels whatever it is asked."""
    import gpu_machine

    kernels = [gpu_machine.Kernel(name, 2.0) for name in "abc"]

    def launched(self: Any, backend: str, call: Any) -> Any:
        call()
        return gpu_machine.Launched(kernels, ["fill"], [])

    monkeypatch.setattr(gpu_machine.Rehearsal, "launched", launched)
    rows = list(traffic.confirm([traffic.SHAPES[0], (8, 10, "bfloat16")], rehearse=True))
    known = next(r for r in traffic.load_table()["results"] if r["loss"] == "naive DLB")
    assert rows[0] == {
        "loss": "naive DLB", "B": 256, "C": 100, "dtype": "float32",
        "predicted": [known["kernels_forward"], known["kernels_backward"]],
        "counted": [3, 3], "others": ["fill", "fill"], "us": [6.0, 6.0],
    }  # fmt: skip
    assert [row["loss"] for row in rows] == ["naive DLB"] * 2 + ["cross_entropy"] * 2
    assert rows[1]["predicted"] is None and rows[1]["counted"] == [3, 3]


def test_the_part_of_make_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_parts

    part = gpu_parts.Part("compiled", ("compiled",), "", 60, gpu_parts.compiled)
    found = gpu_parts.compiled(gpu_parts.Context(True, tmp_path), part, 60)
    assert [row["loss"] for row in found["rows"]] == ["naive DLB", "cross_entropy"]
    assert {row["predicted"] for row in found["rows"]} == {None}
