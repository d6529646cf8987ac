"""The SIMT shim itself, on a small kernel: what it runs, and that it finds what it should find.

The faults are text patches of simt/example.cu; one that does not apply fails the test.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import simt
import torch
from simt.build import SIMT
from torch import Tensor

FILE = "example.cu"
SIZES = {"rows": 5, "columns": 1000, "threads": 64, "cluster": 4}
SEEDS = range(4)


def build(*faults: tuple[str, str], sanitize: str | None = None) -> Path:
    patches = {FILE: list(faults)} if faults else None
    return simt.build("example", SIMT, [SIMT / FILE], patches=patches, sanitize=sanitize)


class Sums:
    """One call of the example: its tensors and its struct."""

    def __init__(self, rows: int, columns: int, threads: int, cluster: int) -> None:
        g = torch.Generator().manual_seed(0)
        step = columns + -columns % 4
        self.matrix = torch.full((rows, step), torch.nan)[:, :columns]
        self.matrix.copy_(torch.randn(rows, columns, generator=g))
        self.sums, self.total = torch.full((rows,), torch.nan), torch.full((1,), torch.nan)
        self.counter = torch.zeros(1, dtype=torch.int32)
        addresses = [tensor.data_ptr() for tensor in self.tensors().values()]
        self.packed = struct.pack("4Q2q4I", *addresses, columns, step, rows, threads, cluster, 0)

    def tensors(self) -> dict[str, Tensor]:
        names = ("matrix", "sums", "total", "counter")
        return {name: getattr(self, name) for name in names}

    def run(self, path: Path, seed: int = 0, shared: tuple[str, ...] = ("sums",)) -> simt.Checker:
        with simt.Checker(path, self.tensors(), seed, shared) as checker:
            code = ctypes.CDLL(str(path)).row_sums(self.packed)
            if code:
                raise RuntimeError(f"{code}: {checker.shim.simt_error().decode()}")
        return checker

    def right(self) -> bool:
        want = self.matrix.double().sum(1)
        return torch.allclose(self.sums.double(), want, rtol=0, atol=1e-4) and torch.allclose(
            self.total.double(), want.sum(), rtol=0, atol=1e-4
        )

    def replay(self, path: Path, seed: int = 1) -> None:
        recording = simt.Recording(self.tensors())
        recording.add("row_sums", self.packed)
        for name, data in simt.replay(path, [recording], seed)[0].items():
            getattr(self, name).copy_(self.read(name, data))

    def read(self, name: str, data: bytes) -> Tensor:
        like = self.tensors()[name]
        return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)


@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
@pytest.mark.parametrize("threads", [32, 64, 256])
def test_values_in_any_schedule(threads: int, cluster: int) -> None:
    path = build()
    x = Sums(3, 1000, threads, cluster)
    totals = []
    for seed in SEEDS:
        x.sums.fill_(torch.nan)
        x.run(path, seed)
        assert x.right() and x.counter == 0
        totals.append(float(x.total))
    assert len(set(totals)) == 1


def test_bytes_and_launches_are_counted() -> None:
    x = Sums(**SIZES)
    checker = x.run(build())
    assert checker.loads == {"matrix": 5 * 4000, "sums": 5 * 4, "total": 0, "counter": 0}
    assert checker.stores == {"matrix": 0, "sums": 5 * 4, "total": 4, "counter": 0}
    assert checker.launches == [simt.Launch(20, 64, 64 * 16 + 8, 4)]


def fails(path: Path, match: str, shared: tuple[str, ...] = ("sums",), **sizes: int) -> None:
    with pytest.raises(RuntimeError, match=match):
        Sums(**{**SIZES, **sizes}).run(path, shared=shared)


def test_out_of_bounds() -> None:
    """Of a row, though its neighbour is there: the text says where, the value is NaN."""
    fails(build(), r"load of 16 bytes out of bounds, byte 3984 from .* 'matrix'", columns=999)
    fault = ("store(args.total, x)", "store(args.total + 1, x)")
    fails(
        build(fault), r"store of 4 bytes out of bounds, byte 4 .* 'total' \(block \d+, thread 0\)"
    )


def test_not_aligned() -> None:
    fault = ("from + i);", "from + i + 1);")
    fails(build(fault), "load of 16 bytes at the address 0x.*, which is not aligned")


def test_two_blocks_write_one_element() -> None:
    path = build(("store(args.sums + row, sum)", "store(args.sums + row / 2, sum)"))
    fails(path, "blocks 0 and 4 both write byte 0 of 'sums'", shared=())
    fails(build(), "blocks 0 and 16 both access byte 0 of 'sums'", shared=())


DIVERGENT = ("__syncthreads();  // is_last", "if (threadIdx.x % 32) __syncthreads();  // is_last")


def test_deadlock_is_told() -> None:
    fails(
        build(DIVERGENT),
        r"deadlock: 2 threads wait at __shfl_xor_sync \(the first: block 0, thread 0\), "
        r"62 threads wait at __syncthreads \(the first: block 0, thread 1\)",
        rows=1,
        cluster=1,
    )
    fault = (", x, mask)", ", x, mask) + (threadIdx.x == 3 ? __syncwarp(), 0 : 0)")
    fails(build(fault), "a thread comes to __s.* where another waits at __s")
    Sums(**SIZES).run(build())  # and the next launch is as good as ever


NOT_SEEN_IN_ORDER = "no cluster ends early"
# What a value shows: shared memory is NaN where nobody has written, or whose block has ended.
FAULTS = {
    "barrier": ("__syncthreads();  // parts", "// parts"),
    "wait of a copy": ("copy_async_wait();", ""),
    "cluster's first barrier": ("cluster_arrive(), cluster_wait();  // all", "// all"),
    NOT_SEEN_IN_ORDER: ("cluster_arrive(), cluster_wait();  // no block", "// no block"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_gives_wrong_values(name: str) -> None:
    path, wrong = build(FAULTS[name]), []
    for seed in SEEDS:
        x = Sums(**SIZES)
        x.run(path, seed)
        wrong.append(not x.right())
    assert any(wrong) and (name == NOT_SEEN_IN_ORDER or wrong[0])


SMALL = {"rows": 2, "columns": 512, "threads": 64, "cluster": 2}


def test_address_sanitizer() -> None:
    x = Sums(**SMALL)
    x.replay(build(sanitize="address"))
    assert x.right()
    for fault in [
        ("parts[threadIdx.x / 32] = x", "parts[threadIdx.x / 16] = x"),
        ("block_part = x", "(&block_part)[1] = x"),
        FAULTS[NOT_SEEN_IN_ORDER],
    ]:
        path = build(fault, sanitize="address")
        with pytest.raises(RuntimeError, match=r"AddressSanitizer: use-after-poison(.|\n)*example"):
            for seed in SEEDS:
                Sums(**SMALL).replay(path, seed)


# What the thread sanitizer shows in any schedule.
RACES = {
    **FAULTS,
    "last block's barrier": ("__syncthreads();  // is_last", "// is_last"),
    "fence before": ("__threadfence();  // the sum", "// the sum"),
    "fence after": ("__threadfence();  // and", "// and"),
}
del RACES["wait of a copy"]


def test_thread_sanitizer() -> None:
    x = Sums(**SMALL)
    x.replay(build(sanitize="thread"))
    assert x.right()


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds_a_race(name: str) -> None:
    path = build(RACES[name], sanitize="thread")
    with pytest.raises(RuntimeError, match=r"ThreadSanitizer: data race(.|\n)*example.cu"):
        Sums(**SMALL).replay(path)


def test_device_refuses_what_hardware_refuses() -> None:
    path = build()
    code = ctypes.CDLL(str(path)).row_sums
    assert code(Sums(2, 8, 1056, 1).packed) == 9
    assert code(Sums(2, 8, 64, 17).packed) == 912
    with simt.device(path, 80, 1):
        assert code(Sums(2, 8, 64, 2).packed) == 912
        Sums(2, 8, 64, 1).run(path)


def test_patch_that_does_not_apply() -> None:
    with pytest.raises(ValueError, match="does not apply"):
        build(("no such text", ""))


def test_16_bit_floats() -> None:
    """Every half, and what lies at and around the middle between two neighbours."""
    shim = simt.library(build())
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves, bfloats = words.view(torch.float16).float(), words.view(torch.bfloat16).float()
    for values, name, dtype in [
        (halves, "simt_to_half", torch.float16),
        (bfloats, "simt_to_bfloat", torch.bfloat16),
    ]:
        steps = itertools.product([-1, 0, 1], [0, 1 << 11, 1 << 12, 1 << 15, 3 << 14])
        for step, middle in steps:
            x = (values.view(torch.int32) + middle + step).view(torch.float32).contiguous()
            got = torch.empty(x.numel(), dtype=torch.int16)
            convert(shim, name, x, got)
            same = got.view(dtype) == x.to(dtype)
            assert (same | (x.isnan() & got.view(dtype).isnan())).all()
    back = torch.empty(2**16)
    convert(shim, "simt_from_half", words, back)
    assert torch.equal(back.nan_to_num(7.0), halves.nan_to_num(7.0))


def convert(shim: Any, name: str, source: Tensor, target: Tensor) -> None:
    pointer = ctypes.c_void_p
    getattr(shim, name)(
        pointer(source.data_ptr()), pointer(target.data_ptr()), ctypes.c_size_t(source.numel())
    )


def test_readme(tmp_path: Path) -> None:
    """The kernel and the code of README.md run as they stand."""
    text = (SIMT / "README.md").read_text()
    (kernel,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    (tmp_path / "scale.cu").write_text(kernel)
    names: dict[str, Any] = {"simt": simt, "struct": struct, "ctypes": ctypes, "FOLDER": tmp_path}
    names |= {"x": torch.randn(1000), "y": torch.empty(1000)}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    assert torch.equal(names["y"], names["x"] * 2)
    assert names["after"]["to"] == names["y"].numpy().tobytes()
