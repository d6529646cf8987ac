"""The list of backends, the choice between them, and the contract that each of them keeps.

A backend is one module with four functions:

    why_not(logits)                        -> None ("I can"), or why not, in words for the user
    forward(args)                          -> LossOutputs
    backward(args, parts, dloss, dlogits)  -> dlogits
    rescale_(dlogits, dloss, grad_scale)   -> None; dlogits *= dloss / grad_scale (`inplace` only)

`forward` computes equations (1) to (6) of `reference.py`; `backward` returns `dloss` times the
gradient. It may return the stored `dlogits` untouched only if `dloss == args.grad_scale`; otherwise
it computes the gradient again, in fp32 from the logits, into the storage of `dlogits` (a new tensor
if `dlogits` is None). Nothing else is ever written to.
To add a backend: write the module, add its name to `BACKENDS`; tests and benchmarks iterate over
that.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

#: Name and module of each backend, in the order in which `backend="auto"` asks them. That `cuda`
#: comes before `triton` is a guess until a GPU has measured them.
BACKENDS = {"cpu": "native", "cuda": "cuda_backend", "triton": "triton_backend",
            "eager": "reference"}  # fmt: skip

#: Those that know `LossArgs.pair`.
WITH_PAIR = ("cuda", "triton")


class LossArgs(NamedTuple):
    """What a backend is given: already checked, on one device.

    B, C = logits.shape; m = overlap. "real" is fp64 for fp64 logits, else fp32.
    Every tensor but the two logits is contiguous.
    """

    # (B, C) fp32, fp64, bf16 or fp16; any row stride, last stride 1
    logits: Tensor
    # (B,) int64
    labels: Tensor
    # (rows, C) fp32, bf16 or fp16 with any of those logits, fp64 with fp64; last stride 1
    last_logits: Tensor | None = None
    # m: rows [:m] have a teacher, unless the guard or last_valid says no; 0 without last_logits
    overlap: int = 0
    # (m,) int64: the row of last_logits that teaches row i, -1 for none; None: row i
    teacher_rows: Tensor | None = None
    # (rows,) int64, the guard: one valid row i < m with another label drops all kl of the step
    last_labels: Tensor | None = None
    # (rows,) uint8: 1 where the row may teach; None: all may
    last_valid: Tensor | None = None
    # (C,) real
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    # tensors are real, of shape () or (m,)
    temperature: float | Tensor = 3.0
    alpha: float | Tensor = 1.0
    # () real, in place of the number of valid rows (or their weight sum) and of taught rows
    ce_count: Tensor | None = None
    kl_count: Tensor | None = None
    # the dloss to expect; a tensor is real, of shape ()
    grad_scale: float | Tensor = 1.0
    # without it nothing but the loss (and the cache) is written
    need_grad: bool = False
    # dlogits is written over logits
    inplace: bool = False
    # rows [B - fresh:] go into the next cache; 0: no cache is written
    fresh: int = 0
    # False: only labels and validity of the fresh rows are written (keep="view")
    copy_logits: bool = True
    # (3,) int64, added to: matched, mismatched, skipped overlap rows
    stats: Tensor | None = None
    # graph-capturable cache, read and written in place of last_* and next_*
    pair: CachePair | None = None
    # (B,) int64: a second label of each row; ce_count then is the number of valid rows
    labels_b: Tensor | None = None
    # the share of the first label, in [0, 1]; a tensor is real, of shape () or (B,)
    lam: float | Tensor = 1.0
    # overlap rows with an ignored label keep their kl
    distill_ignored: bool = False


class CachePair(NamedTuple):
    """Two cache buffers, one read and one written, and which is which: decided on the device.

    Step: read slot `parity`, write slot `1 - parity`, then flip `parity`. "No teacher yet" is
    valid = 0 everywhere. `backward` of that step therefore finds its teacher in slot `1 - parity`.
    """

    logits: Tensor  # (2, rows, C)
    labels: Tensor  # (2, rows) int64
    valid: Tensor  # (2, rows) uint8
    parity: Tensor  # (1,) int32


class LossOutputs(NamedTuple):
    """What `forward` returns; all tensors new and contiguous, but for `dlogits` with `inplace`.

    next_* are None for fresh = 0 or with a pair; next_logits also without copy_logits.
    """

    loss: Tensor  # () real
    parts: Tensor  # (4,) real: ce, kl, ce_count, kl_count; kl_count is 0 where the guard dropped
    dlogits: Tensor | None  # (B, C) like logits, the gradient times grad_scale; with need_grad
    next_logits: Tensor | None  # (fresh, C) like logits: rows [B - fresh:]
    next_labels: Tensor | None  # (fresh,) int64
    next_valid: Tensor | None  # (fresh,) uint8: 0 for a row with NaN, +inf or only -inf


def load(name: str) -> ModuleType:
    """The module of a backend. Raises ValueError with the list of names for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    return importlib.import_module(f"dlb_fused.{BACKENDS[name]}")


def why_not(name: str, logits: Tensor) -> str | None:
    """None if the backend `name` can take these logits, else the reason in words."""
    return load(name).why_not(logits)


def has_pair(module: ModuleType) -> bool:
    return module.__name__ in {f"dlb_fused.{BACKENDS[name]}" for name in WITH_PAIR}


_chosen: dict[tuple[str, torch.device, torch.dtype], ModuleType] = {}


def choose(name: str, logits: Tensor) -> ModuleType:
    """The module that computes the loss: the one named (RuntimeError with its reason if it cannot),
    or with "auto" the first that can."""
    key = (name, logits.device, logits.dtype)
    module = _chosen.get(key)
    if module is None:
        module = _chosen[key] = _first_that_can(logits) if name == "auto" else _named(name, logits)
    return module


def _named(name: str, logits: Tensor) -> ModuleType:
    module = load(name)
    reason = module.why_not(logits)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    return module


def _first_that_can(logits: Tensor) -> ModuleType:
    reasons = []
    for name in BACKENDS:
        module = load(name)
        reason = module.why_not(logits)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if name == "eager" and logits.device.type in ("cpu", "cuda"):
        warnings.warn(
            f"dlb_fused computes the loss with plain PyTorch operations on {logits.device.type} ("
            + "; ".join(reasons)
            + ")",
            RuntimeWarning,
            stacklevel=4,
        )
    return module
