"""What one of two ranks of test_frameworks.py does: Accelerate, the Trainer and Lightning, each
with gradient accumulation over two micro-batches, checkpoints at the end of an epoch and in the
middle of the next, and a resume from both."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from ddp_ranks import HALF, make_data, make_model
from lightning import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from dlb_fused import DLBLoss, OverlapBatchSampler
from dlb_fused.integrations.accelerate import overlap_loader
from dlb_fused.integrations.lightning import DLBCallback
from dlb_fused.integrations.transformers import DLBTrainer

EPOCHS, STOPS = 2, (10, 14)  # micro-batches before the checkpoints, 10 an epoch
Run = dict[str, Any]


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def new_run() -> Run:
    return {"batches": [], "kl": [], "stats": None}


def note(run: Run, criterion: DLBLoss, ids: Tensor) -> None:
    run["batches"].append(ids.tolist())
    run["kl"].append(criterion.parts.kl.item())
    run["stats"] = tuple(criterion.stats())


# Accelerate


def resharded(split_batches: bool) -> Run:
    """The trap: a loader with overlap through `prepare`."""
    options = DataLoaderConfiguration(split_batches=split_batches)
    accelerator, criterion = Accelerator(cpu=True, dataloader_config=options), DLBLoss()
    data, model, run = make_data(2), make_model(), new_run()
    order = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(data, batch_sampler=OverlapBatchSampler(order, 4 * HALF))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, labels, ids in accelerator.prepare(loader):
            criterion(model(x), labels)
            note(run, criterion, ids)
    return {**run, "warnings": [str(w.message) for w in caught]}


def with_accelerate(folder: Path) -> dict[str, Any]:
    found = {"resharded": resharded(False), "split": resharded(True)}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    found["whole"] = accelerate_run(accelerator, folder, None)
    for stop in STOPS:
        found[f"from {stop}"] = accelerate_run(accelerator, folder, stop)
    found["refusal"] = refusal(lambda: overlap_loader(accelerator, make_data(2), DLBLoss(), 8))
    return found


def accelerate_run(accelerator: Accelerator, folder: Path, resume: int | None) -> Run:
    accelerator.free_memory()
    criterion, run = DLBLoss(lag=2), new_run()
    loader = overlap_loader(accelerator, make_data(2), criterion, 2 * HALF, seed=3, num_workers=2)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    assert prepared is loader
    if resume is not None:
        accelerator.load_state(folder / f"accelerate {resume}")
    for _ in range(loader.iteration, EPOCHS):
        for x, labels, ids in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(x), labels, ids)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            note(run, criterion, ids)
            if resume is None and len(run["batches"]) in STOPS:
                accelerator.save_state(folder / f"accelerate {len(run['batches'])}")
    return run


# Hugging Face Trainer


class Sentences(Dataset):
    """80 sentences of 7 tokens; the last two of every third are padding."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 30, (80, 7), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.tokens[i].clone()
        if i % 3 == 0:
            labels[-2:] = -100
        return {
            "input_ids": self.tokens[i],
            "labels": labels,
            "number": torch.tensor(i),
            "unused": torch.zeros(1),
        }


class NotingTrainer(DLBTrainer):
    def __init__(self, *args: Any, **options: Any) -> None:
        self.run = new_run()
        super().__init__(*args, **options)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        result = super().compute_loss(model, inputs, *args, **more)
        if model.training:
            note(self.run, self.criterion, inputs["number"])
        self.columns = sorted(inputs)
        return result


class Bare(nn.Module):
    """It knows no labels and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 30)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.embedding(input_ids),)


def make_trainer(
    folder: Path, criterion: DLBLoss, model: nn.Module | None = None, **options: Any
) -> NotingTrainer:
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2 * HALF, "use_cpu": True,
        "num_train_epochs": EPOCHS, "gradient_accumulation_steps": 2, "learning_rate": 0.01,
        "save_strategy": "steps", "save_steps": 1, "logging_steps": 5, "disable_tqdm": True,
        "eval_strategy": "steps", "eval_steps": 3, "report_to": [], **options,
    }  # fmt: skip
    return NotingTrainer(
        model=GPT2LMHeadModel(config) if model is None else model,
        args=TrainingArguments(**settings),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        criterion=criterion,
        ids="number",
    )


def with_trainer(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder / "trainer", DLBLoss(lag=2))
    trainer.train()
    found = {"whole": trainer.run}
    for stop in STOPS:
        resumed = make_trainer(folder / "trainer resumed", DLBLoss(lag=2))
        resumed.train(resume_from_checkpoint=str(folder / f"trainer/checkpoint-{stop // 2}"))
        found[f"from {stop}"] = resumed.run
    smooth, sequential = {"label_smoothing_factor": 0.1}, {"train_sampling_strategy": "sequential"}
    batch = {name: column[None] for name, column in Sentences()[0].items()}
    batch.pop("number")
    bare = make_trainer(folder / "bare", DLBLoss(lag=2), Bare())
    bare.train()
    predicted = bare.predict(Sentences())
    return {
        **found,
        "columns": trainer.columns,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e],
        "bare": (
            bare.run["kl"],
            (predicted.predictions.shape, float(predicted.metrics["test_loss"])),
        ),
        "refusal": refusal(lambda: make_trainer(folder, DLBLoss())),
        "smoothing": refusal(lambda: make_trainer(folder, DLBLoss(lag=2), **smooth)),
        "strategy": refusal(lambda: make_trainer(folder, DLBLoss(lag=2), **sequential)),
        "ids": refusal(lambda: trainer.compute_loss(trainer.model.train(), batch)),
    }


# Lightning


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion, self.run = make_model(), DLBLoss(lag=2), new_run()

    def train_dataloader(self) -> DataLoader:
        data = make_data(2)
        batches = OverlapBatchSampler(RandomSampler(data), 2 * HALF, lag=2)
        return DataLoader(data, batch_sampler=batches, num_workers=2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(make_data(2), batch_size=8)

    def training_step(self, batch: list[Tensor], step: int) -> Tensor:
        x, labels, ids = batch
        loss = self.criterion(self.net(x), labels, ids)
        note(self.run, self.criterion, ids)
        return loss

    def validation_step(self, batch: list[Tensor], step: int) -> None:
        x, labels, ids = batch
        self.criterion(self.net(x), labels, ids)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.3)


def fit(module: LightningModule, *callbacks: Any, resume: Path | None = None, **more: Any) -> None:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": EPOCHS,
        "accumulate_grad_batches": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "val_check_interval": 5, **more,
    }  # fmt: skip
    settings.setdefault("enable_checkpointing", bool(callbacks))
    trainer = lightning.Trainer(callbacks=[*callbacks, DLBCallback()], **settings)
    trainer.fit(module, ckpt_path=resume)


def with_lightning(folder: Path) -> dict[str, Any]:
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = Module()
    fit(module, keep)
    sampler = module.trainer.train_dataloader.batch_sampler
    found: dict[str, Any] = {}
    found["sampler"] = (type(sampler).__name__, type(sampler.sampler).__name__, sampler.lag)
    found["whole"] = module.run
    for stop in STOPS:
        module = Module()
        fit(module, resume=folder / f"step={stop // 2}.ckpt")
        found[f"from {stop}"] = module.run

    scheduler = GradientAccumulationScheduler({0: 2, 1: 1})
    found["lag"] = refusal(lambda: fit(Module(), accumulate_grad_batches=1))
    found["schedule"] = refusal(
        lambda: fit(Module(), scheduler, enable_checkpointing=False, accumulate_grad_batches=1)
    )
    found["unsharded"] = refusal(lambda: fit(Module(), use_distributed_sampler=False))
    plain = DataLoader(make_data(2), batch_size=8)
    module = Module()
    module.train_dataloader = lambda: plain
    found["plain"] = refusal(lambda: fit(module))
    module = Module()
    module.second = DLBLoss()
    found["second"] = refusal(lambda: fit(module))
    shared = OverlapBatchSampler(RandomSampler(make_data(2)), 2 * HALF, lag=2)
    module = Module()
    loader = DataLoader(make_data(2), batch_sampler=shared)
    module.train_dataloader = lambda: loader
    found["made elsewhere"] = refusal(lambda: fit(module))
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {
        "accelerate": with_accelerate(folder),
        "trainer": with_trainer(folder),
        "lightning": with_lightning(folder),
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
