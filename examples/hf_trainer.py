"""DLB with the Hugging Face Trainer: a tiny GPT-2 from scratch learns the bytes of the README.

python examples/hf_trainer.py [--epochs 2] [--out FOLDER] [--resume]; also under torchrun
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from dlb_fused import DLBLoss
from dlb_fused.integrations.transformers import DLBTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--out", default="hf_trainer")
parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
args = parser.parse_args()


class Text(Dataset):
    """Pieces of 64 bytes, with the number of each, by which the loss finds its teacher."""

    def __init__(self, text: bytes) -> None:
        self.pieces = torch.tensor(list(text)[: len(text) // 64 * 64]).view(-1, 64)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[i], "labels": self.pieces[i], "number": torch.tensor(i)}


set_seed(0)
text = Path(__file__).parents[1].joinpath("README.md").read_bytes()
shape = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
config = GPT2Config(vocab_size=256, bos_token_id=None, eos_token_id=None, **shape)
trainer = DLBTrainer(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        output_dir=args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,  # 8 pieces of the last micro-batch but one, 8 fresh ones
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=4,
        report_to=[],
    ),
    train_dataset=Text(text[:8192]),
    eval_dataset=Text(text[8192:]),
    criterion=DLBLoss(temperature=3.0, alpha=1.0, lag=2),  # dropout makes the two views differ
    ids="number",
)
trainer.train(resume_from_checkpoint=args.resume)  # the log has ce, kl and matched rows
