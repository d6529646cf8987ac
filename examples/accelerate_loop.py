"""DLB with Hugging Face Accelerate, with gradient accumulation and checkpoints.

torchrun --nproc-per-node 2 examples/accelerate_loop.py [--epochs 5] [--checkpoint FOLDER]
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import Digits, make_model
from torch.utils.data import DataLoader

from dlb_fused import DLBLoss
from dlb_fused.integrations.accelerate import overlap_loader

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()

set_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
criterion = DLBLoss(temperature=3.0, alpha=1.0, lag=2)  # the teacher is one optimizer step old
# In place of a DataLoader that `prepare` would deal out batch by batch: no overlap would be left.
loader = overlap_loader(accelerator, Digits(train=True), criterion, batch_size=64)
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
test_loader = DataLoader(Digits(train=False), batch_size=100)
model, optimizer, test_loader = accelerator.prepare(model, optimizer, test_loader)
if args.checkpoint and args.checkpoint.exists():
    accelerator.load_state(args.checkpoint)  # the cache and sampler of each process among it

for epoch in range(loader.iteration, args.epochs):
    model.train()
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = criterion(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    (_, ce, kl, *_), matched = criterion.parts, criterion.stats().matched

    model.eval()
    right = []
    with torch.no_grad():
        for images, labels in test_loader:
            hits = model(images).argmax(1) == labels
            right.append(accelerator.gather_for_metrics(hits))
    accuracy = torch.cat(right).float().mean()
    print(
        f"epoch {epoch}, process {accelerator.process_index}: {ce=:.3f}, {kl=:.5f}, {matched=}, "
        f"test accuracy {accuracy:.3f}",
        flush=True,
    )
    if args.checkpoint:
        accelerator.save_state(args.checkpoint)
