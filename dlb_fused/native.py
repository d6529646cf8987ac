"""The backend `cpu`: the compiled kernel of csrc/cpu, for CPU tensors.

Everything crosses the border as addresses and numbers in one packed struct (`DlbArgs` in
csrc/args.h); the tensors named in `LossArgs` keep the memory alive during the call.
"""

from __future__ import annotations

import importlib
import struct
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
#: Of DlbArgs in csrc/args.h, for `struct`.
FORMAT = "@8q19Q3d6i"
_pack = struct.Struct(FORMAT).pack


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
    logits, fresh = args.logits, args.fresh
    loss_like, parts_like = _SCALARS[logits.dtype]
    loss, parts = torch.empty_like(loss_like), torch.empty_like(parts_like)
    dlogits = next_logits = next_labels = next_valid = None
    if args.need_grad:
        dlogits = logits.detach() if args.inplace else _empty_rows(logits)
    if fresh:
        next_labels = args.labels.new_empty(fresh)
        next_valid = torch.empty(fresh, dtype=torch.uint8)
        if args.copy_logits:
            next_logits = logits.new_empty((fresh, logits.shape[1]))
    scale: Tensor | None = None  # is 1
    if isinstance(args.grad_scale, Tensor):
        scale = args.grad_scale
    elif args.grad_scale != 1:
        scale = loss.new_full((), args.grad_scale)
    new = (loss, parts, dlogits, next_logits, next_labels, next_valid)
    _call(args, (args.ce_count, args.kl_count, scale), (*new, args.stats), fresh)
    return LossOutputs(*new)


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


def fields(
    args: LossArgs,
    scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
    fresh: int,
    threads: int,
) -> tuple[int | float, ...]:
    """The fields of `DlbArgs`, in its order; FORMAT packs them.

    scalars: ce_count, kl_count, grad_scale. outputs: loss, parts, dlogits, next_logits,
    next_labels, next_valid, stats.
    """
    logits, labels, last, overlap, *rows, weight, ignore_index, smoothing, tau, alpha = args[:12]
    taus = tau if isinstance(tau, Tensor) else None
    alphas = alpha if isinstance(alpha, Tensor) else None
    dlogits = outputs[2]
    tensors = (logits, labels, last, *rows, weight, taus, alphas, *scalars, *outputs)
    return (
        *logits.shape,
        overlap,
        fresh,
        logits.stride(0),
        0 if last is None else last.stride(-2),
        0 if dlogits is None else dlogits.stride(0),
        ignore_index,
        *[0 if x is None else x.data_ptr() for x in tensors],
        tau if taus is None else 0.0,
        alpha if alphas is None else 0.0,
        smoothing,
        DTYPES[logits.dtype],
        0 if last is None else DTYPES[last.dtype],
        0 if taus is None else taus.dim(),
        0 if alphas is None else alphas.dim(),
        threads,
        0,
    )


def _call(
    args: LossArgs,
    scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
    fresh: int,
) -> None:
    assert _kernel is not None
    bad_row = _kernel.loss(_pack(*fields(args, scalars, outputs, fresh, torch.get_num_threads())))
    if bad_row == _kernel.DONE:
        return
    if bad_row == _kernel.NO_MEMORY:
        raise MemoryError("dlb_loss: no memory for the working buffers of the CPU kernel")
    label, C = int(args.labels[bad_row]), args.logits.shape[1]
    raise IndexError(label_out_of_range(bad_row, label, C, args.ignore_index))
