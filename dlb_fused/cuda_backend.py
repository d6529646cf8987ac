"""The backend `cuda`: the compiled kernels of csrc/cuda, one launch forward and one backward.

They know nothing of torch: one packed struct (`DlbCudaArgs` in csrc/cuda/loss.h) carries addresses,
numbers and torch's current stream. Which kernel runs is decided in csrc/cuda/plan.h.
"""

from __future__ import annotations

import importlib
import struct
from typing import Any

import torch
from torch import Tensor

from dlb_fused import gpu_memory, native
from dlb_fused.backends import LossArgs, LossOutputs

_kernel: Any = None
_missing = ""
try:
    _kernel = importlib.import_module("dlb_fused._cuda")
except ImportError as error:  # not built, or built for another Python or C++ library
    _missing = str(error)

_OLDEST = 80  # compute capability
_pack_rest = struct.Struct("@QdQq4Q2i").pack  # of DlbCudaArgs, what follows its DlbArgs


def why_not(logits: Tensor) -> str | None:
    """None if the kernels can take these logits, else the reason.

    CPU tensors are taken by kernels that a CPU simulates (in tests).
    """
    if _kernel is None:
        return (
            f"the compiled module dlb_fused._cuda is missing ({_missing}); install dlb_fused where "
            "nvcc is found, or a wheel that was built with it"
        )
    if logits.dtype not in native.DTYPES:
        return f"it has no kernel for {logits.dtype}"
    if _kernel.SIMULATED:
        return None if logits.device.type == "cpu" else "simulated kernels take CPU tensors"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this torch is built for ROCm"
    runtime, driver = _kernel.versions()
    if driver == 0:
        return "there is no NVIDIA driver on this machine"
    if driver // 1000 < runtime // 1000:  # within a major version, older drivers will do
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_release(driver)}, and "
            f"dlb_fused._cuda was built with {_release(runtime)}"
        )
    if not logits.is_cuda:
        return f"it takes CUDA tensors, and logits are on {logits.device}"
    capability = _kernel.capability(logits.device.index)
    if capability < _OLDEST:
        return f"it needs compute capability 8.0, and {logits.device} has {capability / 10:.1f}"
    return None


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def forward(args: LossArgs) -> LossOutputs:
    out = gpu_memory.outputs(args)
    if args.logits.shape[0] == 0:
        out.loss.zero_()
        out.parts.zero_()
        return out
    scale = args.grad_scale if isinstance(args.grad_scale, Tensor) else None
    written = (*out, args.stats)
    if args.pair is not None:
        copied = args.pair.logits if args.copy_logits else None
        written = (*out[:3], copied, *args.pair[1:3], args.stats)
    _launch(_kernel.loss, args, (args.ce_count, args.kl_count, scale), written, args.fresh)
    return out


def backward(args: LossArgs, parts: Tensor, dloss: Tensor, dlogits: Tensor | None) -> Tensor:
    always = dlogits is None
    if dlogits is None:
        dlogits = gpu_memory.empty_like_rows(args.logits)
    if dlogits.shape[0] == 0:
        return dlogits
    scale = args.grad_scale if isinstance(args.grad_scale, Tensor) else None
    written = (None, None, dlogits, None, None, None, None)
    _launch(_kernel.loss, args, (parts[2], parts[3], scale), written, 0, dloss, always)
    return dlogits


def rescale_(dlogits: Tensor, dloss: Tensor, grad_scale: float | Tensor) -> None:
    if dlogits.shape[0]:
        scale = grad_scale if isinstance(grad_scale, Tensor) else None
        args = LossArgs(dlogits, dlogits, grad_scale=grad_scale)
        written = (None, None, dlogits, None, None, None, None)
        _launch(_kernel.rescale, args, (None, None, scale), written, 0, dloss)


def _launch(
    function: Any,
    args: LossArgs,
    scalars: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
    fresh: int,
    dloss: Tensor | None = None,
    always: bool = False,
) -> None:
    pair, device = args.pair, args.logits.device
    if pair is not None and args.overlap:
        args = args._replace(
            last_logits=pair.logits, last_labels=pair.labels, last_valid=pair.valid
        )
    B = args.logits.shape[0]
    space = gpu_memory.workspace("cuda", device, gpu_memory.real_of(args.logits.dtype), B)
    error = function(
        _kernel.pack(args, scalars, outputs, fresh)
        + _pack_rest(
            0 if dloss is None else dloss.data_ptr(),
            0.0 if isinstance(args.grad_scale, Tensor) else args.grad_scale,
            0 if pair is None else pair.parity.data_ptr(),
            0 if pair is None else pair.logits.shape[1],
            *(x.data_ptr() for x in space),
            gpu_memory.current_stream(device),
            device.index or 0,
            always,
        )
    )
    if error:
        raise RuntimeError(
            f"a launch of dlb_fused's CUDA kernels failed: {_kernel.error_string(error)} "
            f"(cudaError {error})"
        )
