"""The backend `cpu`: the compiled kernel of csrc/cpu, for CPU tensors.

Tensors cross the border as addresses and numbers in one struct (csrc/args.h), which
csrc/python_args.h fills; `LossArgs` and `LossOutputs` keep the memory alive during the call.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from dlb_fused.backends import LossArgs, LossOutputs
from dlb_fused.reference import label_out_of_range

_kernel: ModuleType | None = None
_missing = ""
try:
    _kernel = importlib.import_module("dlb_fused._cpu")
except ImportError as error:  # not built, or built for another Python or C++ library
    _missing = str(error)

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# loss and parts: empty_like is the cheapest way to a new tensor.
_LIKE = {
    dtype: LossOutputs(*(torch.empty(n, dtype=real, device="cpu") for n in ((), 4)), *[None] * 4)
    for dtype in DTYPES
    for real in [torch.float64 if dtype == torch.float64 else torch.float32]
}
_NOT_CACHED = (None, None, None)


def why_not(logits: Tensor) -> str | None:
    if _kernel is None:
        return f"the compiled module dlb_fused._cpu is missing ({_missing}); {_what_to_do()}"
    if logits.device.type != "cpu":
        return f"it takes CPU tensors, and logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"it has no kernel for {logits.dtype}"
    return None


def _what_to_do() -> str:
    source = Path(__file__).parents[1]
    if (source / "setup.py").exists():
        return (
            f"{source} holds the source, which hides the installed package: start Python in "
            "another folder, or install it here by `pip install -e .`, with a C++ compiler"
        )
    return "install a C++ compiler and then dlb_fused again"


def forward(args: LossArgs) -> LossOutputs:
    assert _kernel is not None
    like, cached = _LIKE[args.logits.dtype], _cached(args) if args.fresh else _NOT_CACHED
    out = _kernel.forward(args, like, cached, torch.get_num_threads())
    if type(out) is int:
        _fail(args, out)
    return out


def _cached(args: LossArgs) -> tuple[Tensor | None, Tensor, Tensor]:
    """next_logits, next_labels, next_valid."""
    logits, fresh = args.logits, args.fresh
    return (
        logits.new_empty((fresh, logits.shape[1])) if args.copy_logits else None,
        torch.empty(fresh, dtype=torch.int64, device="cpu"),
        torch.empty(fresh, dtype=torch.uint8, device="cpu"),
    )


def backward(args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None) -> Tensor:
    assert _kernel is not None
    if dlogits is None:
        dlogits = args.logits.new_empty(args.logits.shape)
    elif _same(dloss, args.grad_scale):
        return dlogits
    scalars = (parts[2], parts[3], dloss)
    result = _kernel.backward(args, scalars, dlogits, torch.get_num_threads())
    if result != _kernel.DONE:
        _fail(args, result)
    return dlogits


def rescale_(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> None:
    if not _same(dloss, grad_scale):
        dlogits.mul_((dloss / grad_scale).item())  # a Python number is not rounded to fp16 first


def _same(dloss: Tensor, grad_scale: float | Tensor) -> bool:
    """Compared as the kernel sees them, in the type of dloss."""
    return dloss.item() == grad_scale or bool(dloss == grad_scale)


def _fail(args: LossArgs, result: int) -> NoReturn:
    assert _kernel is not None
    if result == _kernel.NO_MEMORY:
        raise MemoryError("dlb_loss: no memory for the working buffers of the CPU kernel")
    raise IndexError(label_out_of_range(args, result))
