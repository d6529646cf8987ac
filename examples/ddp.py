"""DLB with DistributedDataParallel: first the shard of each rank, then its own overlap.

torchrun --nproc-per-node 2 examples/ddp.py [--epochs 5] [--checkpoint FOLDER]
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from digits import Digits, make_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dlb_fused import DLBLoss, OverlapBatchSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()
cuda = torch.cuda.is_available()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank()
train = Digits(train=True)
shard = DistributedSampler(train, seed=0)  # as many samples on each rank: equal counts
batches = OverlapBatchSampler(shard, batch_size=64)
loader = DataLoader(train, batch_sampler=batches)
torch.manual_seed(rank)  # each rank draws its own views; DDP gives all the weights of rank 0
model = DistributedDataParallel(make_model().to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
criterion = DLBLoss(temperature=3.0, alpha=1.0)
saved = {"model": model, "optimizer": optimizer, "criterion": criterion, "batches": batches}
begin, path = 0, args.checkpoint and args.checkpoint / f"rank{rank}.pt"  # each rank has its cache
if path and path.exists():
    state = torch.load(path, "cpu")
    begin = state.pop("epoch")
    for name, part in saved.items():
        part.load_state_dict(state[name])

for epoch in range(begin, args.epochs):
    batches.set_epoch(epoch)
    for images, labels in loader:
        loss = criterion(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (_, ce, kl, *_), matched = criterion.parts, criterion.stats().matched
    print(f"epoch {epoch}, rank {rank}: {ce=:.3f}, {kl=:.5f}, {matched=}", flush=True)
    if path:
        path.parent.mkdir(exist_ok=True)
        torch.save({n: p.state_dict() for n, p in saved.items()} | {"epoch": epoch + 1}, path)
with torch.no_grad():  # without gradients, or in eval(), the cache is not touched
    images, labels = next(iter(DataLoader(Digits(train=False), batch_size=300)))
    hits = model.module(images.to(device)).argmax(1) == labels.to(device)
print(f"test accuracy {hits.float().mean():.3f}")
dist.destroy_process_group()
