"""What `DLBLoss` keeps between two calls: the last logits and what tells whose they are, and the
watch over the chain."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 2  # of the state_dict; 1 had no "calls" and no sequences


class Cache(NamedTuple):
    """The fresh rows of one call, n of them: the teacher of a later call."""

    logits: Tensor  # (n, C), detached; of sequences (n·T, C)
    labels: Tensor  # (n,) int64; of sequences (n, T)
    valid: Tensor  # (n,) or (n·T,) uint8: 0 for a row with NaN, +inf or only -inf, or gated
    ids: Tensor | None  # (n,) int64
    version: int | None  # of `logits`, where it is a view of the caller's tensor

    def check_version(self) -> None:
        if self.version is not None and self.logits._version != self.version:
            raise RuntimeError(
                "the logits that keep='view' holds as teacher were modified in place after the "
                "last call; use keep='copy'"
            )

    def on(self, logits: Tensor) -> Cache:
        """The same on the device of `logits`, in float64 if and only if `logits` are."""
        same_kind = (self.logits.dtype == torch.float64) == (logits.dtype == torch.float64)
        if self.logits.device == logits.device and same_kind:
            return self
        dtype = self.logits.dtype if same_kind else logits.dtype
        device = logits.device
        return Cache(
            self.logits.to(device, dtype),
            self.labels.to(device),
            self.valid.to(device),
            None if self.ids is None else self.ids.to(device),
            None,
        )

    def owned(self) -> Cache:
        """The same without a view of the caller's tensor."""
        return (
            self
            if self.version is None
            else self._replace(logits=self.logits.clone(), version=None)
        )

    def state(self) -> dict[str, Tensor | None]:
        return {name: getattr(self.owned(), name) for name in ("logits", "labels", "valid", "ids")}


def match_rows(ids: Tensor, last_ids: Tensor) -> Tensor:
    """(m,) int64: for each id its row in last_ids (rows,), or -1. Asks the device nothing."""
    ordered, order = last_ids.sort()
    at = torch.searchsorted(ordered, ids).clamp(max=len(last_ids) - 1)
    return torch.where(ordered.gather(0, at) == ids, order.gather(0, at), -1)


def caches_from_state(state: Any) -> list[Cache | None]:
    """The caches of a state_dict. Raises ValueError if it is malformed."""
    keys = {"format", "lag", "rank", "world", "calls", "caches"}
    if isinstance(state, dict) and state.get("format") == 1:
        keys.remove("calls")
    if not isinstance(state, dict) or set(state) != keys or not isinstance(state["caches"], list):
        raise ValueError(f"malformed DLBLoss state: expected a dict of {sorted(keys)}")
    if state["format"] not in (1, FORMAT):
        raise ValueError(
            f"DLBLoss state has format {state['format']!r}, this version reads 1 and {FORMAT}"
        )
    for name in sorted(keys - {"format", "caches"}):
        if type(state[name]) is not int:
            raise ValueError(f"malformed DLBLoss state: {name} must be an int, got {state[name]!r}")
    if state["lag"] < 1 or state.get("calls", 0) < 0:
        raise ValueError("malformed DLBLoss state: lag must be >= 1, and calls >= 0")
    if len(state["caches"]) > state["lag"]:
        raise ValueError(f"malformed DLBLoss state: more than lag={state['lag']} caches")
    return [cache_from_state(cache) for cache in state["caches"]]


def cache_from_state(state: Any) -> Cache | None:
    """A cache of its own memory. Raises ValueError for anything that `Cache.state` cannot have
    written."""
    if state is None:
        return None
    keys = {"logits", "labels", "valid", "ids"}
    if not isinstance(state, dict) or set(state) != keys:
        raise ValueError(
            f"malformed DLBLoss state: a cache must be None or a dict of {sorted(keys)}"
        )
    logits, labels, ids = state["logits"], state["labels"], state["ids"]
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError("malformed DLBLoss state: logits must be a floating point tensor (n, C)")
    rows = samples = len(logits)
    shape: tuple[int, ...] = (rows,)
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.numel() == rows > 0:
        samples = len(labels)
        shape = (samples, rows // samples)
    for name, dtype, expected in (
        ("labels", torch.int64, shape),
        ("valid", torch.uint8, (rows,)),
        ("ids", torch.int64, (samples,)),
    ):
        value = state[name]
        if name == "ids" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != expected:
            raise ValueError(
                f"malformed DLBLoss state: {name} must be a tensor {expected} of "
                f"{str(dtype).removeprefix('torch.')}"
            )
    return Cache(
        logits.detach().clone(),
        labels.clone(),
        state["valid"].clone(),
        None if ids is None else ids.clone(),
        None,
    )


def rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class ChainWatch:
    """Warns once if rows do not continue the last batch, without waiting for the device.

    On a GPU the counts travel by an asynchronous copy that is looked at in a later call, if it has
    arrived.
    """

    EVERY = 64  # calls between two copies from a GPU, after the first few (calls 2, 4, 8, ...)

    def __init__(self, warned: bool = False) -> None:
        self.warned = warned
        self._calls = 0
        self._seen = (0, 0)
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no CUDA event."""
        return {**self.__dict__, "_copy": None, "_event": None}

    def look(self, stats: Tensor, with_ids: bool) -> None:
        """stats: (3,) int64, matched, mismatched and skipped rows so far."""
        if self.warned:
            return
        self._calls += 1
        counts = self._arrived(stats) if stats.is_cuda else stats.tolist()
        if counts is not None and self._is_broken(counts, with_ids):
            self.warned = True
            warnings.warn(
                "DLBLoss found rows that do not continue the last batch, so they are not "
                "distilled: the first rows of each batch must be the fresh rows of the one before. "
                "Use DataLoader(batch_sampler=OverlapBatchSampler(...)), one DLBLoss for each head "
                "and one call a training step, eval() or no_grad() in validation, and reset() "
                "only together with the sampler's; stats() has the counts. (Shown once.)",
                RuntimeWarning,
                stacklevel=6,
            )

    def _arrived(self, stats: Tensor) -> list[int] | None:
        """The counts that a copy begun in an earlier call has brought, if one has."""
        if torch.cuda.is_current_stream_capturing():
            return None
        if self._event is not None and self._copy is not None:
            if self._event.query():
                self._event = None
                return self._copy.tolist()
        elif self._calls & (self._calls - 1) == 0 or self._calls % self.EVERY == 0:
            if self._copy is None:
                self._copy = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=True)
            self._copy.copy_(stats, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return None

    def _is_broken(self, counts: list[int], with_ids: bool) -> bool:
        matched, mismatched = counts[0] - self._seen[0], counts[1] - self._seen[1]
        self._seen = (counts[0], counts[1])
        # With ids a row may be missing; only a batch without one known row is no continuation.
        return mismatched > 0 and (matched == 0 or not with_ids)
