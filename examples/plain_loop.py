"""DLB in a plain loop. The checkpoint is written in mid-epoch too; the next start goes on from it.

python examples/plain_loop.py [--epochs 5] [--checkpoint run.pt]
"""

import argparse
from pathlib import Path

import torch
from digits import Digits, make_model
from torch.utils.data import DataLoader, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()

torch.manual_seed(0)
train = Digits(train=True)
order = RandomSampler(train, generator=torch.Generator().manual_seed(0))
batches = OverlapBatchSampler(order, batch_size=128)  # 64 rows of the last batch, 64 fresh ones
loader = DataLoader(train, batch_sampler=batches)
test_images, test_labels = next(iter(DataLoader(Digits(train=False), batch_size=300)))

model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
criterion = DLBLoss(temperature=3.0, alpha=1.0)
saved = {"model": model, "optimizer": optimizer, "criterion": criterion}  # the cache is in the last

begin = consumed = 0
if args.checkpoint and args.checkpoint.exists():
    state = torch.load(args.checkpoint)
    for name, part in saved.items():
        part.load_state_dict(state[name])
    batches.load_state_dict(state["batches"])
    begin, consumed = state["epoch"], state["batches"]["consumed"]

for epoch in range(begin, args.epochs):
    for step, (images, labels) in enumerate(loader, start=1 + consumed):  # the rest, after a resume
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.checkpoint and step % 10 == 0:
            state = {name: part.state_dict() for name, part in saved.items()}
            state |= {"batches": batches.state_dict(consumed=step), "epoch": epoch}
            torch.save(state, args.checkpoint)
        if step % 12 == 0:
            _, ce, kl, *_ = criterion.parts
            matched = criterion.stats().matched
            print(f"epoch {epoch}, step {step}: {ce=:.3f}, {kl=:.5f}, {matched=}")
    consumed = 0
    with torch.no_grad():  # without gradients, or in eval(), the cache is not touched
        logits = model(test_images)
        loss, accuracy = criterion(logits, test_labels), (logits.argmax(1) == test_labels).float()
    print(f"epoch {epoch}: test loss {loss:.3f}, accuracy {accuracy.mean():.3f}")
