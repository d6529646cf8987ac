"""DLB with Lightning: the loss in the module, the sampler in its loader, and one callback.

python examples/lightning_module.py [--epochs 5] [--devices 1] [--out FOLDER] [--resume FILE]
"""

import argparse

import torch
from digits import Digits, make_model
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler
from dlb_fused.integrations.lightning import DLBCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.criterion = make_model(), DLBLoss(temperature=3.0, alpha=1.0)

    def train_dataloader(self) -> DataLoader:
        data = Digits(train=True)  # for several devices, Lightning shards the RandomSampler
        return DataLoader(data, batch_sampler=OverlapBatchSampler(RandomSampler(data), 64))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Digits(train=False), batch_size=100)

    def training_step(self, batch: list[Tensor], step: int) -> Tensor:
        images, labels = batch
        return self.criterion(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], step: int) -> None:
        images, labels = batch
        accuracy = (self.model(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        (_, ce, kl, *_), matched = self.criterion.parts, self.criterion.stats().matched
        print(f"epoch {self.current_epoch}: {ce=:.3f}, {kl=:.5f}, {matched=}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", default="lightning_module")
    parser.add_argument("--resume", help="a checkpoint in --out")
    args = parser.parse_args()
    seed_everything(0)
    options = {"max_epochs": args.epochs, "devices": args.devices, "default_root_dir": args.out}
    trainer = Trainer(callbacks=[DLBCallback()], logger=False, **options)
    trainer.fit(Classifier(), ckpt_path=args.resume)
