"""Runs Triton's interpreter as a strict GPU: for tests, in a process with TRITON_INTERPRET=1.

`faithful()` corrects the arithmetic that differs from a GPU. `Checker` watches every access too:
bounds, two programs writing one element, the order of programs, and the bytes read and written.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder


def _cast(original: Any) -> Any:
    """fp32 to bf16 rounds to nearest even, as on a GPU; the interpreter truncates."""

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            data = torch.from_numpy(np.array(src.data, copy=True)).bfloat16().view(torch.int16)
            bits = data.numpy().view(np.uint16).reshape(src.data.shape)
            return interpreter.TensorHandle(bits, dst_type.scalar)
        return original(self, src, dst_type)

    return cast_impl


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding instead of two (nearly: fp64 through the 64 bits of an x87 register)."""
    wide = np.longdouble if z.data.dtype == np.float64 else np.float64
    data = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return interpreter.TensorHandle(data.astype(z.data.dtype), z.dtype.scalar)


def _maxnum(self: Any, x: Any, y: Any) -> Any:
    """Of a NaN and a number the number; the interpreter gives NaN."""
    return self.binary_op(x, y, np.fmax)


@contextlib.contextmanager
def faithful() -> Iterator[None]:
    """Casts to bf16, fma and maxima as on a GPU; keeps numpy quiet about masked lanes."""
    builtin = _Builder.cast_impl, _Builder.create_fma, _Builder.create_maxnumf
    _Builder.cast_impl, _Builder.create_fma = _cast(_Builder.cast_impl), _fma
    _Builder.create_maxnumf = _maxnum
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")
            yield
    finally:
        _Builder.cast_impl, _Builder.create_fma, _Builder.create_maxnumf = builtin


class Checker(contextlib.ExitStack):
    """Watches every launch inside it. Every tensor that the kernels touch must be given, by name.

    loads, stores: bytes by name. order: seed of a shuffled order of programs, None: 0, 1, 2, …
    Raises out of the launch (as InterpreterError): IndexError in its text for an access outside of
    every tensor, "both write" if two programs store to one element (workspace excepted: `shared`
    names tensors that programs may share).
    """

    def __init__(
        self, tensors: dict[str, Tensor], order: int | None = None, shared: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.tensors, self.shared = tensors, set(shared)
        self.loads = dict.fromkeys(tensors, 0)
        self.stores = dict.fromkeys(tensors, 0)
        self._spans = {name: _span(tensor) for name, tensor in tensors.items()}
        self._owners: dict[str, np.ndarray] = {}
        self._rng = None if order is None else np.random.default_rng(order)
        self._order: np.ndarray | None = None
        self._program = -1

    def __enter__(self) -> Checker:
        super().__enter__()
        self.enter_context(faithful())
        self._patch("create_masked_load", self._load)
        self._patch("create_masked_store", self._store)
        self._patch("create_atomic_rmw", self._atomic)
        self._patch("set_grid_dim", self._grid)
        self._patch("set_grid_idx", self._index)
        return self

    def _patch(self, name: str, wrap: Any) -> None:
        original = getattr(_Builder, name)
        setattr(_Builder, name, lambda builder, *args, **kw: wrap(original, builder, *args, **kw))
        self.callback(setattr, _Builder, name, original)

    def _load(
        self, original: Any, builder: Any, ptrs: Any, mask: Any, *rest: Any, **kw: Any
    ) -> Any:
        name, at, size = self._locate("load", ptrs, mask)
        if name is not None:
            self.loads[name] += at.size * size
        return original(builder, ptrs, mask, *rest, **kw)

    def _store(
        self, original: Any, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        name, at, size = self._locate("store", ptrs, mask)
        if name is not None:
            self.stores[name] += at.size * size
            self._claim(name, at, size)
        return original(builder, ptrs, value, mask, *rest)

    def _atomic(
        self, original: Any, builder: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any
    ) -> Any:
        self._locate("atomic", ptr, mask)
        return original(builder, op, ptr, val, mask, *rest)

    def _locate(self, what: str, ptrs: Any, mask: Any) -> tuple[str | None, np.ndarray, int]:
        """The tensor that all unmasked addresses lie in, the addresses, the size of an element."""
        size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        active = np.asarray(mask.data, bool)
        at = np.broadcast_to(ptrs.data, active.shape)[active].astype(np.int64)
        if at.size == 0:
            return None, at, size
        low, high = int(at.min()), int(at.max()) + size
        for name, (start, end) in self._spans.items():
            if start <= low and high <= end:
                return name, at, size
        raise IndexError(
            f"{what} out of bounds by program {self._program}: {low:#x} to {high:#x} is inside of "
            f"none of {list(self._spans)}"
        )

    def _claim(self, name: str, at: np.ndarray, size: int) -> None:
        if np.unique(at).size != at.size:
            raise RuntimeError(f"one store of program {self._program} writes {name} twice")
        if name in self.shared:
            return
        start, end = self._spans[name]
        owner = self._owners.setdefault(name, np.full((end - start) // size, -1))
        index = (at - start) // size
        taken = (owner[index] >= 0) & (owner[index] != self._program)
        if taken.any():
            raise RuntimeError(
                f"programs {owner[index][taken][0]} and {self._program} both write element "
                f"{index[taken][0]} of {name}"
            )
        owner[index] = self._program

    def _grid(self, original: Any, builder: Any, x: int, y: int, z: int) -> Any:
        self._owners.clear()
        if self._rng is not None:
            self._order = self._rng.permutation(x)
        return original(builder, x, y, z)

    def _index(self, original: Any, builder: Any, x: int, y: int, z: int) -> Any:
        self._program = x if self._order is None else int(self._order[x])
        return original(builder, self._program, y, z)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address + 1 of the elements of a tensor, gaps between rows included."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
