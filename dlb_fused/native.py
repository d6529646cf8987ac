"""The backend `cpu`: the compiled kernel of csrc/cpu, for CPU tensors.

Tensors cross the border as addresses and numbers in one struct (csrc/args.h), which
csrc/python_args.h fills; `LossArgs` and `LossOutputs` keep the memory alive during the call.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
# loss and parts; empty_like is the cheapest way to a new tensor.
_SCALARS = {
    dtype: (torch.empty((), dtype=real), torch.empty(4, dtype=real))
    for dtype in DTYPES
    for real in [torch.float64 if dtype == torch.float64 else torch.float32]
}


def why_not(logits: Tensor) -> str | None:
    if _kernel is None:
        return (
            f"the compiled module dlb_fused._cpu is missing ({_missing}); install a C++ compiler "
            "and then dlb_fused again"
        )
    if logits.device.type != "cpu":
        return f"it takes CPU tensors, and logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"it has no kernel for {logits.dtype}"
    return None


def forward(args: LossArgs) -> LossOutputs:
    logits, fresh, stats = args.logits, args.fresh, args.stats
    loss_like, parts_like = _SCALARS[logits.dtype]
    loss, parts = torch.empty_like(loss_like), torch.empty_like(parts_like)
    dlogits = next_logits = next_labels = next_valid = None
    if args.need_grad:
        dlogits = logits.detach() if args.inplace else _empty_rows(logits)
    if fresh:
        next_labels = torch.empty(fresh, dtype=torch.int64)
        next_valid = torch.empty(fresh, dtype=torch.uint8)
        if args.copy_logits:
            next_logits = logits.new_empty((fresh, logits.shape[1]))
    out = LossOutputs(loss, parts, dlogits, next_logits, next_labels, next_valid)
    _call(args, (args.ce_count, args.kl_count, _scale(args, loss)), (*out, stats), fresh)
    return out


def _scale(args: LossArgs, loss: Tensor) -> Tensor | None:
    """grad_scale for the kernel, in the type of the loss; None is 1."""
    scale = args.grad_scale
    if isinstance(scale, float):
        return None if scale == 1 else loss.new_full((), scale)
    return scale


def backward(args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None) -> Tensor:
    if dlogits is None:
        dlogits = _empty_rows(args.logits)
    elif _same(dloss, args.grad_scale):
        return dlogits
    outputs = (None, None, dlogits, None, None, None, None)
    _call(args, (parts[2], parts[3], dloss), outputs, 0)
    return dlogits


def _empty_rows(logits: Tensor) -> Tensor:
    """(B, C) like logits, contiguous."""
    return torch.empty_like(logits) if logits.is_contiguous() else logits.new_empty(logits.shape)


def rescale_(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> None:
    if not _same(dloss, grad_scale):
        dlogits.mul_((dloss / grad_scale).item())  # a Python number is not rounded to fp16 first


def _same(dloss: Tensor, grad_scale: float | Tensor) -> bool:
    """Compared as the kernel sees them, in the type of dloss."""
    return dloss.item() == grad_scale or bool(dloss == grad_scale)


def _call(
    args: LossArgs,
    scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
    fresh: int,
) -> None:
    assert _kernel is not None
    bad_row = _kernel.loss(args, scalars, outputs, fresh, torch.get_num_threads())
    if bad_row == _kernel.DONE:
        return
    if bad_row == _kernel.NO_MEMORY:
        raise MemoryError("dlb_loss: no memory for the working buffers of the CPU kernel")
    raise IndexError(label_out_of_range(args, bad_row))
