"""Hugging Face Trainer with DLB: the loader, the loss and the state of each process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint

from dlb_fused.integrations.accelerate import OverlapLoader, check_lag
from dlb_fused.integrations.state import load_rank_state, rank_state
from dlb_fused.loss import DLBLoss
from dlb_fused.sampler import OverlapBatchSampler


class DLBTrainer(Trainer):
    """`Trainer` with overlapping batches and `DLBLoss`.

    For a subclass of `Trainer`: `class MyTrainer(DLBTrainer, SFTTrainer): pass`.

    `per_device_train_batch_size` counts all rows of a step, as in `OverlapBatchSampler`. The model
    is called without labels and must return `logits`: (B, C), or (B, T, C) with labels (B, T),
    which for a causal language model are moved by one place, as its own loss does. The loss of each
    micro-batch is a mean over its own rows, of which the trainer takes the mean over a step;
    num_items_in_batch is not used, nor are auxiliary losses of the model. Each process writes its
    cache and sampler into the checkpoint folders, and reads its own when training resumes.

    Args, besides those of `Trainer`:
        criterion: its `lag` must be `gradient_accumulation_steps`.
        ids: the column with the number of each sample, (B,) int64, by which `DLBLoss` is to match
            rows. It is kept in spite of `remove_unused_columns`, and not given to the model.

    Raises:
        TypeError: `criterion` is no `DLBLoss`.
        ValueError: `criterion.lag` does not fit; `label_smoothing_factor` or another
            `train_sampling_strategy` than "random" is set; the train_dataset has no length; a batch
            has no labels, or in training no ids.
    """

    def __init__(self, *args: Any, criterion: DLBLoss, ids: str | None = None, **options: Any):
        self.ids = ids
        self._batches: OverlapBatchSampler | None = None
        self._resume: Path | None = None
        super().__init__(*args, **options)
        self._check_settings(criterion)
        # Models without such an argument are trained too; else their labels would be removed.
        self.label_names: list[str] = self.label_names or ["labels"]
        self.criterion = criterion.to(self.args.device)
        # So that the trainer divides by the number of micro-batches; which of the two attributes
        # it asks depends on its version.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        self.add_callback(SaveChain(self))

    def _check_settings(self, criterion: DLBLoss) -> None:
        check_lag(criterion, "TrainingArguments", self.args.gradient_accumulation_steps)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor must be 0, got "
                f"{self.args.label_smoothing_factor}: use DLBLoss(label_smoothing=...)"
            )
        if self.args.train_sampling_strategy != "random":
            raise ValueError(
                "train_sampling_strategy must be 'random', got "
                f"{self.args.train_sampling_strategy!r}: each process draws from its own shuffled "
                "share of the samples"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self.ids is not None and self.ids not in columns:
            columns.append(self.ids)

    def get_train_dataloader(self) -> OverlapLoader:
        """The batches of this process: not through `Accelerator.prepare`, which would deal them out
        anew."""
        dataset: Any = self.train_dataset
        if not hasattr(dataset, "__len__"):
            raise ValueError(f"train_dataset must have a length, got {type(dataset).__name__}")
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        shard: DistributedSampler[Any] = DistributedSampler(
            dataset, args.world_size, args.process_index, seed=seed
        )
        self._batches = OverlapBatchSampler(
            shard, self._train_batch_size, args.dataloader_drop_last, lag=self.criterion.lag
        )
        self.criterion.reset()
        if self._resume is not None:
            path = self._resume / self._state_name()
            state = torch.load(path, "cpu", weights_only=True) if path.exists() else None
            load_rank_state(state, self.criterion, self._batches)
        return OverlapLoader(
            self.accelerator,
            dataset,
            self._batches,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        needed = {"labels", self.ids} if model.training and self.ids is not None else {"labels"}
        if not needed <= inputs.keys():
            raise ValueError(f"a batch must have {sorted(needed)}, got {sorted(inputs)}")
        labels = inputs.pop("labels")
        ids = None if self.ids is None else inputs.pop(self.ids, None)
        outputs = model(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if self._is_causal():
            labels = F.pad(labels[:, 1:], (0, 1), value=self.criterion.ignore_index)
        self.criterion.train(model.training)
        loss = self.criterion(logits, labels, ids)
        if not isinstance(outputs, dict):  # of tuples, the trainer takes the first for the loss
            outputs = (loss, *outputs)
        return (loss, outputs) if return_outputs else loss

    def _is_causal(self) -> bool:
        model: Any = self.model
        if hasattr(model, "get_base_model"):  # of peft
            model = model.get_base_model()
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Adds ce and kl of the last micro-batch of this process, and its distilled rows so far."""
        if "loss" in logs:
            parts, matched = self.criterion.parts, self.criterion.stats().matched
            logs = {**logs, "ce": parts.ce.item(), "kl": parts.kl.item(), "matched": matched}
        super().log(logs, *args, **options)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any
    ) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self._resume = Path(folder) if folder else None
        try:
            return super().train(resume_from_checkpoint, *args, **options)
        finally:
            self._resume = None

    def save_chain(self, folder: Path) -> None:
        assert self._batches is not None
        steps = -(-len(self._batches) // self.criterion.lag)
        over = self.state.global_step % steps == 0
        # In mid-epoch, the state of its start: the trainer itself skips what was used.
        state = rank_state(self.criterion, self._batches, len(self._batches) if over else 0, over)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / self._state_name())

    def _state_name(self) -> str:
        return f"dlb_fused_{self.args.process_index}.pt"


class SaveChain(TrainerCallback):
    """Saves on each process, where `Trainer` saves most on the first alone."""

    def __init__(self, trainer: DLBTrainer) -> None:
        self.trainer = trainer

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not args.save_only_model:
            self.trainer.save_chain(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))
