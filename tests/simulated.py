"""The backend `cuda` on the CPU: its kernels in the shim of simt/, and every call of them watched.

What a call may touch follows from the struct that it is given; whatever else it touches is an
error of that call.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import simt
import torch
from simt import Checker, Recording, Span

from dlb_fused import backends, cuda_backend, gpu_memory

_SIZES = (4, 8, 2, 2)  # bytes of an element, by DlbDtype


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class DlbArgs(ctypes.Structure):
    """csrc/args.h."""

    _fields_ = (
        _fields(ctypes.c_int64, "B C overlap fresh logits_stride last_stride dlogits_stride")
        + _fields(ctypes.c_int64, "ignore_index")
        + _fields(ctypes.c_uint64, "logits labels last_logits teacher_rows last_labels last_valid")
        + _fields(ctypes.c_uint64, "weight temperatures alphas ce_count kl_count grad_scale loss")
        + _fields(ctypes.c_uint64, "parts dlogits next_logits next_labels next_valid stats")
        + _fields(ctypes.c_uint64, "labels_b lams")
        + _fields(ctypes.c_double, "temperature alpha label_smoothing lam")
        + _fields(ctypes.c_int32, "dtype last_dtype temperature_step alpha_step threads lam_step")
        + _fields(ctypes.c_int32, "distill_ignored unused")
    )


class DlbCudaArgs(ctypes.Structure):
    """csrc/cuda/loss.h."""

    _fields_ = (
        ("loss", DlbArgs),
        ("dloss", ctypes.c_uint64),
        ("grad_scale", ctypes.c_double),
        ("parity", ctypes.c_uint64),
        ("slot_rows", ctypes.c_int64),
        *_fields(ctypes.c_uint64, "sums chunks counter stream"),
        *_fields(ctypes.c_int32, "device always"),
    )


def spans(packed: bytes, chunks: int) -> dict[str, Span]:
    """All memory that a call may touch, by name; a gradient over the logits counts as logits."""
    given = DlbCudaArgs.from_buffer_copy(packed)
    assert ctypes.sizeof(given) == len(packed)
    a = given.loss
    item, last_item, real = _SIZES[a.dtype], _SIZES[a.last_dtype], 8 if a.dtype == 1 else 4
    teachers, fresh = _rows_of_cache(given), 2 * given.slot_rows or a.fresh
    rows = {
        "logits": (a.logits, item * a.C, item * a.logits_stride, a.B),
        "last_logits": (a.last_logits, last_item * a.C, last_item * a.last_stride, teachers),
        "dlogits": (a.dlogits, item * a.C, item * a.dlogits_stride, a.B),
    }
    sizes = {
        "labels": (a.labels, 8 * a.B),
        "labels_b": (a.labels_b, 8 * a.B),
        "lams": (a.lams, real * (a.B if a.lam_step else 1)),
        "next_logits": (a.next_logits, item * a.C * fresh),
        "teacher_rows": (a.teacher_rows, 8 * a.overlap),
        "last_labels": (a.last_labels, 8 * teachers),
        "last_valid": (a.last_valid, teachers),
        "weight": (a.weight, real * a.C),
        "temperatures": (a.temperatures, real * (a.overlap if a.temperature_step else 1)),
        "alphas": (a.alphas, real * (a.overlap if a.alpha_step else 1)),
        "ce_count": (a.ce_count, real),
        "kl_count": (a.kl_count, real),
        "loss": (a.loss, real),
        "parts": (a.parts, 4 * real),
        "next_labels": (a.next_labels, 8 * fresh),
        "next_valid": (a.next_valid, fresh),
        "stats": (a.stats, 24),
        "dloss": (given.dloss, real),
        "loss_grad_scale": (a.grad_scale, real),
        "parity": (given.parity, 4),
        "sums": (given.sums, 3 * real * a.B),
        "chunks": (given.chunks, 3 * real * chunks),
        "counter": (given.counter, 4),
    }
    named = {name: Span.matrix(*where) for name, where in rows.items()}
    named |= {name: Span(at, n, n, 1) for name, (at, n) in sizes.items() if n}
    known: set[int] = {0}
    return {
        name: span
        for name, span in named.items()
        if span.start not in known and not known.add(span.start)  # type: ignore[func-returns-value]
    }


def _rows_of_cache(given: DlbCudaArgs) -> int:
    """Rows of last_logits: their number is not in the struct, but follows from it."""
    a = given.loss
    if given.slot_rows or not a.teacher_rows:
        return 2 * given.slot_rows or a.overlap
    rows = (ctypes.c_int64 * a.overlap).from_address(a.teacher_rows)
    return max(0, *rows) + 1 if a.overlap else 0


class Watched:
    """The extension module in the shim. Every call is checked; `calls` says what each has done."""

    def __init__(self, kernel: ModuleType | None = None) -> None:
        self.kernel = kernel or simt.module()
        self.seed = 0
        self.calls: list[Checker] = []
        self.recordings: list[Recording] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def loss(self, packed: bytes) -> int:
        return self._call("loss", packed)

    def rescale(self, packed: bytes) -> int:
        return self._call("rescale", packed)

    def _call(self, name: str, packed: bytes) -> int:
        touched = spans(packed, self.kernel.CHUNKS)
        if self.recordings is not None:
            self.recordings.append(Recording(touched))
            self.recordings[-1].add(f"dlb_cuda_{name}", packed)
        shared = [name for name in ("sums",) if name in touched]
        with Checker(self.kernel, touched, self.seed, shared) as checker:
            code: int = getattr(self.kernel, name)(packed)
        self.calls.append(checker)
        return code


def only_fp32() -> dict[str, list[tuple[str, str]]]:
    """Patches that leave out the kernels of the other types: a fault is then compiled once."""
    stub = """#include "loss.h"
#include "elements.h"
template <class T> cudaError_t launch_loss(const DlbCudaArgs&) { return 1; }
template <class T> cudaError_t launch_rescale(const DlbCudaArgs&) { return 1; }"""
    files = ("bfloat16", "float16", "float64")
    return {f"cuda/{name}.cu": [('#include "launch.h"', stub)] for name in files}


@contextlib.contextmanager
def backend(watched: Watched | None = None) -> Iterator[Watched]:
    """Inside, the backend `cuda` takes CPU tensors."""
    watched = watched or Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_backend, "_kernel", watched)
        patch.setattr(backends, "_chosen", {})
        patch.setattr(gpu_memory, "_workspaces", {})  # a call that fails may leave its counter
        yield watched


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN (or of a wrong integer), so that a skipped element shows."""
    empty = torch.empty

    def fill(*args: Any, **kw: Any) -> torch.Tensor:
        out = empty(*args, **kw)
        return out.fill_(torch.nan if out.is_floating_point() else 77)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", fill)
        yield
