"""Lightning: a callback that checks the chain of each rank and puts it into the checkpoints."""

from __future__ import annotations

from typing import Any

import lightning
import torch.distributed as dist
from lightning import LightningModule, Trainer
from torch.utils.data import RandomSampler, SequentialSampler

from dlb_fused.integrations.state import load_rank_state, rank_state
from dlb_fused.loss import DLBLoss
from dlb_fused.sampler import OverlapBatchSampler

KEY = "dlb_fused"  # in Lightning's checkpoint: the states of all ranks


class DLBCallback(lightning.Callback):
    """For a module that has a `DLBLoss` and trains on a loader with an `OverlapBatchSampler`.

    The module needs no other change; validation and the sanity check do not touch the cache. For
    several ranks, Lightning puts a shuffling `DistributedSampler` in place of whatever sampler
    `OverlapBatchSampler` was given (a weighted one too), and makes each rank's batches from that.
    Make `OverlapBatchSampler` in the `train_dataloader` hook: of one made elsewhere, Lightning
    keeps batch_size and drop_last alone.

    Rank 0 writes a checkpoint for all. This callback gathers the caches and samplers of all ranks
    into it, and gives each rank its own back.

    Raises, in training:
        ValueError: the module has no `DLBLoss`, or several; the loader has no
            `OverlapBatchSampler`, or an unsharded one; the `lag` of loss and sampler is not
            `accumulate_grad_batches`.

    Example:
        >>> trainer = Trainer(callbacks=[DLBCallback()], logger=False, barebones=True)
    """

    def __init__(self) -> None:
        self._chain: tuple[DLBLoss, OverlapBatchSampler] | None = None  # while training
        self._consumed = 0  # batches of this epoch
        self._loaded: list[dict[str, Any]] | None = None  # states of all ranks, to be put to use

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        criterion, batches = self._chain = find_criterion(pl_module), find_batches(trainer)
        self._consumed = 0
        if self._loaded is None:
            return
        rank, states, self._loaded = trainer.global_rank, self._loaded, None
        state = states[rank] if rank < len(states) else None
        if load_rank_state(state, criterion, batches) and state is not None:
            self._consumed = state["batches"]["consumed"]
        # Lightning has begun an iteration before any hook, and workers have drawn batches of it: of
        # the old state, and of epoch 0.
        batches.set_epoch(trainer.current_epoch)
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Schedulers may change `accumulate_grad_batches` in training."""
        assert self._chain is not None
        steps = trainer.accumulate_grad_batches
        lags = tuple(part.lag for part in self._chain)
        if pl_module.automatic_optimization and lags != (steps, steps):
            raise ValueError(
                f"DLBLoss(lag={lags[0]}) and OverlapBatchSampler(lag={lags[1]}) do not fit "
                f"Trainer(accumulate_grad_batches={steps}): with lag={steps} in both, the teacher "
                "is one optimizer step old"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._consumed = batch_idx + 1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._chain is not None:
            over = self._consumed >= trainer.num_training_batches
            checkpoint[KEY] = gathered(rank_state(*self._chain, self._consumed, over))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get(KEY, [])


def gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all ranks on rank 0, which writes them; none on the others."""
    if not dist.is_initialized():
        return [state]
    first = dist.get_rank() == 0
    states: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(state, states if first else None)
    return states if first else []


def find_criterion(module: LightningModule) -> DLBLoss:
    found = [part for part in module.modules() if isinstance(part, DLBLoss)]
    if len(found) != 1:
        raise ValueError(
            f"DLBCallback needs a module with one DLBLoss, but {type(module).__name__} has "
            f"{len(found)}; set it as an attribute, as in self.criterion = DLBLoss()"
        )
    return found[0]


def find_batches(trainer: Trainer) -> OverlapBatchSampler:
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(batches, OverlapBatchSampler):
        raise ValueError(
            "DLBCallback needs a train_dataloader with batch_sampler=OverlapBatchSampler(...), got "
            f"{type(trainer.train_dataloader).__name__} with {type(batches).__name__}"
        )
    if trainer.world_size == 1:
        return batches
    if isinstance(batches.sampler, (RandomSampler, SequentialSampler)):
        raise ValueError(
            f"each of the {trainer.world_size} ranks needs its own share of the samples, but the "
            f"OverlapBatchSampler has a {type(batches.sampler).__name__}: leave "
            "Trainer(use_distributed_sampler=True), or give it a DistributedSampler"
        )
    return batches
