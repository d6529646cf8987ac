"""Runs CUDA kernels on the CPU, with every access checked. README.md explains it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from .build import ROOT, Patches, build

__all__ = [
    "Checker",
    "Launch",
    "Recording",
    "Span",
    "build",
    "device",
    "library",
    "module",
    "program",
]

CSRC = ROOT / "csrc"
NAME = "_cuda_simt"
# The module is loaded once for each content; every copy has a shim of its own.
_modules: dict[Path, ModuleType] = {}


def _sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda/bind.cpp"]


def module(patches: Patches | None = None, copy: str = "") -> ModuleType:
    """The extension module of csrc/cuda, compiled for the shim; with faults if asked for.

    copy: one of its own, which knows nothing of the device that another one has asked.
    """
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    path = build(
        NAME,
        CSRC,
        _sources(),
        flags=[
            *(["-O0"] if patches else []),  # compiled in half the time, and run but once
            f"-DDLB_MODULE={NAME}",
            "-DDLB_SIMULATED=true",
            *(f"-isystem{path}" for path in includes),
        ],
        patches=patches,
    )
    if copy:
        original, path = path, path.with_name(f"{copy}.so")
        if path not in _modules:
            path.unlink(missing_ok=True)  # never written over: another process may run it
            shutil.copy(original, path)
    if path not in _modules:
        # By this name, pybind11 gives a module that it has given before.
        name = f"{path.parent.name}.{path.stem}.{NAME}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        _modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_modules[path])
    return _modules[path]


def program(sanitize: str, patches: Patches | None = None) -> Path:
    """A program that replays recorded calls of csrc/cuda under the sanitizer."""
    flags = ["-O0"]  # what -O1 finds, too
    return build("replay", CSRC, _sources()[:-1], flags=flags, patches=patches, sanitize=sanitize)


def library(of: ModuleType | Path) -> ctypes.CDLL:
    """The shim inside a built library."""
    shim = ctypes.CDLL(str(of if isinstance(of, Path) else of.__file__))
    shim.simt_exp2_calls.restype = ctypes.c_uint64
    shim.simt_launches.restype = ctypes.c_size_t
    shim.simt_error.restype = ctypes.c_char_p
    return shim


@contextlib.contextmanager
def device(of: ModuleType | Path, capability: int, max_cluster: int) -> Iterator[None]:
    """Another GPU than an H200: what it refuses to launch is refused."""
    shim = library(of)
    shim.simt_device(capability, max_cluster)
    try:
        yield
    finally:
        shim.simt_device(90, 16)


class Launch(NamedTuple):
    grid: int
    threads: int
    shared_bytes: int
    cluster: int


class Span(NamedTuple):
    """Where the elements of a tensor are: rows of bytes."""

    start: int
    row_bytes: int
    row_step: int
    rows: int

    @classmethod
    def of(cls, tensor: Tensor | Span) -> Span:
        if isinstance(tensor, Span):
            return tensor
        if tensor.numel() == 0:
            return cls(tensor.data_ptr(), 0, 1, 0)
        size = tensor.element_size()
        if tensor.is_contiguous():
            return cls(tensor.data_ptr(), tensor.numel() * size, tensor.numel() * size, 1)
        if tensor.dim() != 2 or tensor.stride(1) != 1:
            raise ValueError(f"neither contiguous nor a matrix of rows: {tensor.stride()}")
        rows, columns = tensor.shape
        return cls.matrix(tensor.data_ptr(), columns * size, tensor.stride(0) * size, rows)

    @classmethod
    def matrix(cls, start: int, row_bytes: int, row_step: int, rows: int) -> Span:
        if row_step in (0, row_bytes):  # one row for all, or one piece
            size = row_bytes * rows if row_step else row_bytes
            return cls(start, size, max(size, 1), 1)
        return cls(start, row_bytes, row_step, rows)

    def bytes(self) -> bytes:
        at = range(self.start, self.start + self.rows * self.row_step, self.row_step)
        return b"".join(ctypes.string_at(row, self.row_bytes) for row in at)


class Checker:
    """Watches every launch inside it. Every tensor that the kernels touch must be given, by name.

    loads, stores: bytes by name; exp2_calls; launches. seed: of a shuffled schedule, 0: in order.
    A launch returns an error (with a text) for an access outside of every tensor, and if a block
    writes an element that another one writes or reads; `shared` names tensors that blocks share.
    """

    def __init__(
        self,
        of: ModuleType | Path,
        tensors: Mapping[str, Tensor | Span],
        seed: int = 0,
        shared: Sequence[str] = (),
    ) -> None:
        self.shim, self.seed, self.shared = library(of), seed, set(shared)
        self.spans = {name: Span.of(tensor) for name, tensor in tensors.items()}
        unknown = self.shared - set(tensors)
        if unknown:
            raise ValueError(f"shared, but not given: {unknown}")
        self.loads: dict[str, int] = {}
        self.stores: dict[str, int] = {}
        self.exp2_calls = 0
        self.launches: list[Launch] = []

    def __enter__(self) -> Checker:
        self.shim.simt_unwatch()
        for name, span in self.spans.items():
            numbers = [ctypes.c_size_t(number) for number in span]
            self.shim.simt_watch(name.encode(), *numbers, int(name in self.shared))
        self.shim.simt_seed(self.seed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loads, stores = ctypes.c_uint64(), ctypes.c_uint64()
        for i, name in enumerate(self.spans):
            self.shim.simt_counts(ctypes.c_size_t(i), ctypes.byref(loads), ctypes.byref(stores))
            self.loads[name], self.stores[name] = loads.value, stores.value
        self.exp2_calls = self.shim.simt_exp2_calls()
        count = self.shim.simt_launches(None, ctypes.c_size_t(0))
        room = (ctypes.c_uint32 * 4 * count)()
        self.shim.simt_launches(room, ctypes.c_size_t(count))
        self.launches = [Launch(*row) for row in room]
        self.shim.simt_seed(0)
        self.shim.simt_unwatch()


class Recording:
    """Calls with the memory they need, to be made again by a program under a sanitizer."""

    def __init__(
        self, tensors: Mapping[str, Tensor | Span], capability: int = 90, max_cluster: int = 16
    ) -> None:
        self.device = capability, max_cluster
        self.spans = {name: Span.of(tensor) for name, tensor in tensors.items()}
        self.before = {name: span.bytes() for name, span in self.spans.items()}
        self.calls: list[tuple[bytes, bytes]] = []

    def add(self, function: str, packed: bytes) -> None:
        """A call of `extern "C" int function(const void* packed)`."""
        self.calls.append((function.encode(), packed))

    def packed(self) -> bytes:
        def numbers(*values: int) -> bytes:
            return struct.pack(f"{len(values)}Q", *values)

        parts = [numbers(*self.device, len(self.spans))]
        parts += [numbers(*span) + self.before[name] for name, span in self.spans.items()]
        parts += [numbers(len(self.calls))]
        for name, packed in self.calls:
            parts += [numbers(len(name)), name, numbers(len(packed)), packed]
        return b"".join(parts)

    def unpacked(self, data: bytes) -> dict[str, bytes]:
        """What the program has written behind: the memory of each tensor."""
        rest = memoryview(data)[len(self.packed()) :]
        after = {}
        for name, before in self.before.items():
            after[name], rest = bytes(rest[: len(before)]), rest[len(before) :]
        return after


def replay(program: Path, recordings: Sequence[Recording], seed: int = 0) -> list[dict[str, bytes]]:
    """What the memory of each tensor holds in the end. RuntimeError with the sanitizer's words."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(i) for i in range(len(recordings))]
        for file, recording in zip(files, recordings, strict=True):
            file.write_bytes(recording.packed())
        done = subprocess.run(
            [program, str(seed), *files],
            capture_output=True,
            text=True,
            env={**os.environ, **SANITIZER_OPTIONS},
        )
        if done.returncode:
            raise RuntimeError(f"replay ends with {done.returncode}:\n{done.stderr[:8000]}")
        return [
            recording.unpacked(file.read_bytes())
            for file, recording in zip(files, recordings, strict=True)
        ]


SANITIZER_OPTIONS: dict[str, Any] = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
