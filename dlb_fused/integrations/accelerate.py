"""Hugging Face Accelerate: a loader for each process whose overlap stays whole.

`Accelerator.prepare` deals the batches of a loader out to the processes, and none is left that
overlaps with the one before. Here each process has its own share of the samples, and builds its own
overlapping batches from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Dataset, DistributedSampler

from dlb_fused.integrations.state import load_rank_state, rank_state
from dlb_fused.loss import DLBLoss
from dlb_fused.sampler import OverlapBatchSampler


def overlap_loader(
    accelerator: Accelerator,
    dataset: Dataset[Any],
    criterion: DLBLoss,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    carry_over: bool = True,
    name: str = "dlb_fused",
    **loader_options: Any,
) -> OverlapLoader:
    """The loader of this process, with its cache and position in each of Accelerate's checkpoints.

    Args:
        criterion: its `lag` must be the accelerator's `gradient_accumulation_steps`.
        batch_size: rows of a whole batch on one process, as for `OverlapBatchSampler`.
        shuffle, seed: of the `DistributedSampler`. The loader tells it the epoch.
        drop_last, carry_over: as for `OverlapBatchSampler`.
        name: `save_state` writes `{name}_{process}.pt`; say another for a second loader.
        loader_options: for `DataLoader`, such as num_workers and pin_memory.

    Raises:
        TypeError: `criterion` is no `DLBLoss`, or `dataset` has no length.
        ValueError: `criterion.lag` does not fit, or `batch_size` is odd.

    Equivalent to, apart from device placement and checkpoints::

        shard = DistributedSampler(dataset, accelerator.num_processes, accelerator.process_index)
        DataLoader(dataset, batch_sampler=OverlapBatchSampler(shard, batch_size))

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(6))
        >>> loader = overlap_loader(Accelerator(cpu=True), data, DLBLoss(), 4, shuffle=False)
        >>> [x.tolist() for (x,) in loader]
        [[0, 1], [0, 1, 2, 3], [2, 3, 4, 5]]
    """
    check_lag(criterion, "Accelerator", accelerator.gradient_accumulation_steps)
    rank, world = accelerator.process_index, accelerator.num_processes
    shard: DistributedSampler[Any] = DistributedSampler(
        dataset, world, rank, shuffle=shuffle, seed=seed
    )
    batches = OverlapBatchSampler(
        shard, batch_size, drop_last, carry_over=carry_over, lag=criterion.lag
    )
    loader = OverlapLoader(accelerator, dataset, batches, **loader_options)

    def save(models: object, weights: object, folder: str) -> None:
        torch.save(loader.rank_state(criterion), Path(folder, f"{name}_{rank}.pt"))

    def load(models: object, folder: str) -> None:
        path = Path(folder, f"{name}_{rank}.pt")
        state = torch.load(path, "cpu", weights_only=True) if path.exists() else None
        loader.load_rank_state(state, criterion)

    # Registered objects are written by the main process alone, and read by all.
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return loader


def check_lag(criterion: DLBLoss, owner: str, steps: int) -> None:
    """owner: where gradient_accumulation_steps was set."""
    if not isinstance(criterion, DLBLoss):
        raise TypeError(f"criterion must be a DLBLoss, got {type(criterion).__name__}")
    if criterion.lag != steps:
        raise ValueError(
            f"DLBLoss(lag={criterion.lag}) does not fit {owner}(gradient_accumulation_steps="
            f"{steps}): with lag={steps} the teacher is one optimizer step old"
        )


class OverlapLoader(DataLoaderShard):
    """The batches of one process, on its device. `Accelerator.prepare` returns it as it is.

    `iteration` (Accelerate's name) is the epoch; it counts on after each. After a state was loaded,
    the first iteration yields the rest of that epoch::

        for epoch in range(loader.iteration, epochs):
            for batch in loader: ...
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: Dataset[Any],
        batches: OverlapBatchSampler,
        **loader_options: Any,
    ) -> None:
        device = accelerator.device if accelerator.device_placement else None
        super().__init__(dataset, device=device, batch_sampler=batches, **loader_options)
        self.batches = batches
        self.consumed = 0  # batches of this epoch that were handed out
        self._epoch = 0  # to which they belong
        self._begun = False
        self._is_accelerate_prepared = True  # `prepare` asks for it

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self.consumed = 0
        self._begun, self._epoch = True, self.iteration
        for batch in super().__iter__():
            self.consumed += 1
            yield batch

    def rank_state(self, criterion: DLBLoss) -> dict[str, Any]:
        over = self.consumed == len(self)
        state = rank_state(criterion, self.batches, self.consumed, over)
        return {**state, "epoch": self._epoch + over}

    def load_rank_state(self, state: dict[str, Any] | None, criterion: DLBLoss) -> None:
        if load_rank_state(state, criterion, self.batches):
            assert state is not None
            self.iteration, self.consumed = state["epoch"], state["batches"]["consumed"]
            self._epoch, self._begun = self.iteration, False
