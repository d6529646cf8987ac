"""`OverlapBatchSampler`: batches of which one half repeats the fresh half of an earlier one."""

from __future__ import annotations

import operator
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

FORMAT = 1  # of the state_dict
KEYS = ("format", "config", "consumed", "chunks", "rest", "generator")


class OverlapBatchSampler(BatchSampler):
    """Batches of `batch_size` indices: an overlap, then as many fresh ones; the overlap of a batch
    is the fresh half of the batch `lag` earlier.

    For `DataLoader(dataset, batch_sampler=OverlapBatchSampler(...))` with `DLBLoss`. With half =
    batch_size // 2, each batch takes the next `half` indices of `sampler` as its fresh half, so
    each index of an epoch is fresh exactly once. The first `lag` batches of a chain have only their
    fresh half, and a last chunk of fewer than `half` fresh rows makes a smaller overlap later.

    Args:
        sampler: yields the indices (ints or 0-dim integer tensors) of one epoch each time it is
            iterated. For several ranks: one that gives each rank its own share, such as
            `DistributedSampler`, so that each rank has its own chain.
        batch_size: rows of a whole batch, even, at least 2.
        drop_last: drop a last chunk of fewer than `half` fresh rows.
        carry_over: the chain goes on over the border of epochs. False: each epoch begins a new
            chain; call `DLBLoss.reset()` with it.
        lag: 1, or the number of micro-batches under gradient accumulation (`DLBLoss(lag=...)`).
        with_appearance: yield pairs (index, appearance), which the dataset's `__getitem__` gets in
            place of an index: appearance 0 where the sample is fresh, 1 where it comes again. For
            an augmentation with a seed: by (epoch, index, appearance) the two views differ, and can
            be drawn again after a crash; by the index alone both would be the same picture.

    Raises:
        ValueError: a bad argument.
        TypeError: `sampler` is no iterable; `len()` or a state in mid-epoch is asked, and `sampler`
            has no length; an index is not an integer.

    Leaving an epoch early (`break`) and iterating again begins a new epoch, and its chain goes on
    from the last batch that was *drawn*. Loader workers draw ahead of the trainer, so with them
    `DLBLoss` sees a break of the chain there, and a lasting one if the partial last chunk was drawn
    (it then expects another number of overlap rows). Either begin a new chain, with `reset()` here
    and of the criterion; or go on from batch k, the last one used::

        batches.load_state_dict(batches.state_dict(consumed=k))

    which also yields the rest of the epoch that was left. One iteration at a time: once a newer one
    has begun, an older one raises RuntimeError.

    Example:
        >>> batches = OverlapBatchSampler(range(5), batch_size=4)
        >>> list(batches)
        [[0, 1], [0, 1, 2, 3], [2, 3, 4]]
        >>> list(batches)  # the next epoch
        [[4, 0, 1], [0, 1, 2, 3], [2, 3, 4]]

        A checkpoint after the first batch of the third epoch, and how training goes on from it:

        >>> next(iter(batches))
        [4, 0, 1]
        >>> state = batches.state_dict(consumed=1)
        >>> resumed = OverlapBatchSampler(range(5), batch_size=4)
        >>> resumed.load_state_dict(state)
        >>> list(resumed)
        [[0, 1, 2, 3], [2, 3, 4]]

        >>> list(OverlapBatchSampler(range(3), batch_size=4, with_appearance=True))
        [[(0, 0), (1, 0)], [(0, 1), (1, 1), (2, 0)]]
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        *,
        carry_over: bool = True,
        lag: int = 1,
        with_appearance: bool = False,
    ) -> None:
        if not isinstance(sampler, Iterable):
            raise TypeError(f"sampler must yield indices, got {type(sampler).__name__}")
        if type(batch_size) is not int or batch_size < 2 or batch_size % 2:
            raise ValueError(
                "batch_size must be an even int >= 2, since it counts the overlap and the fresh "
                f"half, got {batch_size!r}"
            )
        if type(lag) is not int or lag < 1:
            raise ValueError(f"lag must be an int >= 1, got {lag!r}")
        switches = {
            "drop_last": drop_last,
            "carry_over": carry_over,
            "with_appearance": with_appearance,
        }
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        super().__init__(sampler, batch_size, drop_last)
        self.carry_over, self.lag, self.with_appearance = carry_over, lag, with_appearance
        self._chunks: list[array[int]] = []  # fresh halves of the last `lag` batches, oldest first
        self._epoch: _Epoch | None = None  # the one begun last, or loaded and not yet begun

    @property
    def _half(self) -> int:
        return self.batch_size // 2

    def __len__(self) -> int:
        """Batches of an epoch; also while the rest of a loaded one is iterated."""
        indices = self._length()
        if indices is None:
            raise TypeError(
                "the length of OverlapBatchSampler is that of its sampler, "
                f"but {type(self.sampler).__name__} has no length"
            )
        return indices // self._half if self.drop_last else -(-indices // self._half)

    def _length(self) -> int | None:
        return len(self.sampler) if isinstance(self.sampler, Sized) else None

    def __iter__(self) -> Iterator[list[Any]]:
        itself: list[weakref.ref[Iterator[list[Any]]]] = []
        batches = self._draw(itself)
        itself.append(weakref.ref(batches))
        return batches

    def _draw(self, itself: list[weakref.ref[Iterator[list[Any]]]]) -> Iterator[list[Any]]:
        epoch = self._begin()
        epoch.iterator = itself[0]
        while fresh := _indices(islice(epoch.source, self._half)):
            if len(fresh) < self._half and self.drop_last:
                break
            overlap = self._chunks[0] if len(self._chunks) == self.lag else ()
            self._chunks = [*self._chunks, fresh][-self.lag :]
            epoch.drawn += 1
            if epoch.chunks is not None:
                epoch.chunks.append(fresh)
            yield self._rows(overlap, fresh)
            if self._epoch is not epoch:
                raise RuntimeError(
                    "this iteration of OverlapBatchSampler is over, since a newer one has begun or "
                    "a state was loaded: there is one chain, for one iteration at a time"
                )
        epoch.exhausted = True

    def _rows(self, overlap: Iterable[int], fresh: Iterable[int]) -> list[Any]:
        if self.with_appearance:
            return [*((index, 1) for index in overlap), *((index, 0) for index in fresh)]
        return [*overlap, *fresh]

    def _begin(self) -> _Epoch:
        epoch = self._epoch
        if epoch is None or epoch.iterator is not None:
            if not self.carry_over:
                self._chunks = []
            chunks: list[array[int]] | None = None if self._length() is None else []
            epoch = self._epoch = _Epoch(iter(self.sampler), self._chunks, chunks)
        elif epoch.generator is not None:
            # Set at loading too, but a DataLoader that shares the generator has drawn from it since
            # to seed its workers, and in the run that wrote the state did so before these indices.
            self.sampler.generator.set_state(epoch.generator)  # type: ignore[union-attr]
        return epoch

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to `sampler`, if that has `set_epoch`."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def reset(self) -> None:
        """Leaves the epoch under way and the chain: the next iteration begins anew with both. Call
        `DLBLoss.reset()` with it."""
        self._chunks, self._epoch = [], None

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """What is needed to go on after `consumed` batches of the current epoch.

        consumed: how many batches of the current epoch, counted from its start, the trainer has
            used. Loader workers draw ahead of the trainer, and a sampler cannot tell for whom it
            draws: so ValueError if it is left out while an epoch is iterated, or after it was left
            early. Between two epochs (the iterator ran out and is deleted, as after a `for` loop)
            it may be left out, or be 0 or all. Persistent workers keep the iterator: say
            `consumed=len(batches)` there, and the first iteration after loading has no batch.

        The state holds the indices that the epoch still has to give, not a recipe to draw them
        again: so it does not depend on what kind of sampler drew them, on its seed or on the global
        random state (8 bytes an index; the rest of the epoch is read from the sampler now). It
        also holds the pending fresh halves, and the state of `sampler.generator` after this epoch,
        if there is one, from which later epochs follow. A sampler that draws from the global
        random state instead gives other orders in later epochs; a `DistributedSampler` needs its
        `set_epoch` as ever.
        """
        epoch, chunks, rest = self._epoch, self._chunks, None
        at = self._position(consumed)
        if epoch is not None and at is not None:
            chunks, rest = epoch.after(at, self.lag)
        generator = _generator(self.sampler)
        return {
            "format": FORMAT,
            "config": self._config(),
            "consumed": at or 0,
            "chunks": [torch.tensor(chunk, dtype=torch.int64, device="cpu") for chunk in chunks],
            "rest": rest,
            "generator": None if generator is None else generator.get_state(),
        }

    def _position(self, consumed: int | None) -> int | None:
        """Batches used of the current epoch, None: between two epochs."""
        epoch = self._epoch
        first = 0 if epoch is None else epoch.start
        last = 0 if epoch is None else epoch.start + epoch.drawn
        if epoch is not None and epoch.is_over() and consumed in (None, 0, last):
            return None
        if consumed is not None and (type(consumed) is not int or not first <= consumed <= last):
            raise ValueError(
                f"consumed must be an int from {first} to {last}, the number of batches drawn so "
                f"far in this epoch, got {consumed!r}"
            )
        if epoch is None:
            return None
        if epoch.iterator is None:
            return epoch.start
        if consumed is None:
            raise ValueError(
                f"state_dict needs consumed=, the number of batches of this epoch that the trainer "
                f"has used: {last} were drawn, but loader workers draw ahead"
            )
        if epoch.chunks is None:
            raise TypeError(
                f"{type(self.sampler).__name__} has no length, so the rest of its epoch cannot be "
                "stored: take the state between two epochs"
            )
        return consumed

    def _config(self) -> dict[str, int | bool | None]:
        """What must be the same for a state to fit."""
        names = ("batch_size", "drop_last", "carry_over", "lag")
        return {name: getattr(self, name) for name in names} | {"length": self._length()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken: the next iteration yields the rest of that epoch (no
        batch, if all were used), later ones whole epochs. ValueError if the state is malformed or
        was written under another configuration; nothing is changed then."""
        generator = _generator(self.sampler)
        self._check_state(state, generator)
        self._chunks = [_indices(chunk) for chunk in state["chunks"]]
        self._epoch = None
        if state["rest"] is not None:
            rest = iter(state["rest"].tolist())
            self._epoch = _Epoch(rest, self._chunks, [], state["consumed"], state["generator"])
        if generator is not None:
            generator.set_state(state["generator"])

    def _check_state(self, state: Any, generator: torch.Generator | None) -> None:
        if not isinstance(state, dict) or set(state) != set(KEYS):
            raise malformed(f"expected a dict of {sorted(KEYS)}")
        if state["format"] != FORMAT:
            raise ValueError(
                f"OverlapBatchSampler state has format {state['format']!r}, this version reads "
                f"{FORMAT}"
            )
        if state["config"] != self._config():
            raise ValueError(
                f"OverlapBatchSampler state was written with {state['config']!r}, but this is "
                f"{self._config()!r}"
            )
        chunks, rest, consumed = state["chunks"], state["rest"], state["consumed"]
        if not isinstance(chunks, list) or len(chunks) > self.lag or not all(map(is_row, chunks)):
            raise malformed(f"chunks must be a list of at most lag={self.lag} int64 tensors (n,)")
        if any(not 0 < len(chunk) <= self._half for chunk in chunks):
            raise malformed(f"each chunk must have 1 to {self._half} indices")
        if rest is not None and not is_row(rest):
            raise malformed("rest must be None or an int64 tensor (n,)")
        if type(consumed) is not int or consumed < 0:
            raise malformed(f"consumed must be an int >= 0, got {consumed!r}")
        check_generator_state(state["generator"], generator)


class _Epoch:
    """One pass over the sampler."""

    def __init__(
        self,
        source: Iterator[int],
        before: list[array[int]],
        chunks: list[array[int]] | None,
        start: int = 0,
        generator: Tensor | None = None,
    ) -> None:
        self.source = source
        self.before = before  # pending fresh halves at the start
        self.chunks = chunks  # fresh halves drawn so far; None: not kept, for want of a length
        self.start = start  # batches of the epoch that were used before its state was loaded
        self.generator = generator  # loaded state of the sampler's generator
        self.drawn = 0
        self.exhausted = False
        # None: not begun. Weak, since an iterator that ran out and still lives may belong to a
        # loader whose workers drew the last batches long before the trainer sees them.
        self.iterator: weakref.ref[Iterator[list[Any]]] | None = None

    def is_over(self) -> bool:
        """Whether the iterator ran out and nobody holds it: every batch that a loader drew ahead
        was used, or will never be."""
        return self.exhausted and self.iterator is not None and self.iterator() is None

    def after(self, consumed: int, lag: int) -> tuple[list[array[int]], Tensor]:
        """The pending fresh halves after `consumed` batches, and the indices still to come."""
        unread = _indices(self.source)
        self.source = iter(unread)
        assert self.chunks is not None
        used = consumed - self.start
        rest = array("q")
        for chunk in (*self.chunks[used:], unread):
            rest.extend(chunk)
        after = torch.tensor(rest, dtype=torch.int64, device="cpu")
        return [*self.before, *self.chunks[:used]][-lag:], after


def _indices(source: Iterable[Any]) -> array[int]:
    """The indices as 64-bit ints: compact, since all of an epoch are kept."""
    indices = array("q")
    for index in source:
        try:
            indices.append(operator.index(index))
        except TypeError:
            raise TypeError(
                f"sampler must yield integers or 0-dim integer tensors, got {index!r}"
            ) from None
    return indices


def _generator(sampler: Any) -> torch.Generator | None:
    generator = getattr(sampler, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1


def malformed(what: str) -> ValueError:
    return ValueError(f"malformed OverlapBatchSampler state: {what}")


def check_generator_state(state: Any, generator: torch.Generator | None) -> None:
    if (state is None) != (generator is None):
        raise ValueError(
            f"OverlapBatchSampler state was written for a sampler "
            f"{'without' if state is None else 'with'} a generator, but this sampler has "
            f"{'none' if generator is None else 'one'}"
        )
    if generator is None:
        return
    try:
        torch.Generator(generator.device).set_state(state)
    except (TypeError, RuntimeError) as error:
        raise malformed(f"generator must be the state of a torch.Generator ({error})") from error
