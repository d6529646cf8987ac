"""What the two GPU backends allocate: the outputs of a step, and the workspace of their kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlb_fused.backends import LossArgs, LossOutputs

# Counts of chunks of rows that a launch may leave for the next one: (3, chunks).
CHUNK_ROWS = 128


class Workspace(NamedTuple):
    sums: Tensor  # (3 B,) real: sums of each program or block
    chunks: Tensor  # (3 max(256, B / CHUNK_ROWS),) real: counts of chunks of rows
    counter: Tensor  # (1,) int32: programs that have finished; 0 between launches


_workspaces: dict[tuple[str, torch.device, int, torch.dtype, int], Workspace] = {}


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The type that kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outputs(args: LossArgs) -> LossOutputs:
    """New tensors for what a forward launch writes; `dlogits` is `logits` itself if in place."""
    logits = args.logits
    real, device = real_of(logits.dtype), logits.device
    loss = torch.empty((), dtype=real, device=device)
    parts = torch.empty(4, dtype=real, device=device)
    dlogits = next_logits = next_labels = next_valid = None
    if args.need_grad:
        dlogits = logits if args.inplace else empty_like_rows(logits)
    if args.fresh and args.pair is None:
        if args.copy_logits:
            next_logits = torch.empty(
                (args.fresh, logits.shape[1]), dtype=logits.dtype, device=device
            )
        next_labels = torch.empty(args.fresh, dtype=torch.int64, device=device)
        next_valid = torch.empty(args.fresh, dtype=torch.uint8, device=device)
    return LossOutputs(loss, parts, dlogits, next_logits, next_labels, next_valid)


def empty_like_rows(logits: Tensor) -> Tensor:
    """(B, C) like logits, contiguous."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def workspace(backend: str, device: torch.device, real: torch.dtype, rows: int) -> Workspace:
    """The workspace of a device and stream, for up to 2^k rows. It is never freed: a CUDA graph may
    hold its address. While a graph is captured, a new one is made in the graph's own memory, with
    the fill of its counter as part of the graph: graphs that are replayed at the same time do not
    meet."""
    size = (rows - 1).bit_length()
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _new_workspace(device, real, 1 << size)
        stream = current_stream(device)
    key = (backend, device, stream, real, size)
    space = _workspaces.get(key)
    if space is None:
        space = _workspaces[key] = _new_workspace(device, real, 1 << size)
    return space


def _new_workspace(device: torch.device, real: torch.dtype, rows: int) -> Workspace:
    return Workspace(
        torch.empty(3 * rows, dtype=real, device=device),
        torch.empty(3 * max(256, -(-rows // CHUNK_ROWS)), dtype=real, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )


# The handle of torch's current stream: the private function that torch's own compiler uses, without
# the object that the public one makes.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a device; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    if _raw_stream is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


def on(device: torch.device) -> Any:
    """Makes a GPU the current one for a launch, unless it is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
