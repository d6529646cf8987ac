"""resume.py CHECKPOINT [EPOCHS [EVERY [WORKERS]]]: after kill -9, the same losses, bit for bit."""

import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler


class Pictures(Dataset):
    x, y, epoch = torch.arange(19200).view(100, 3, 8, 8).sin(), torch.arange(100) % 5, 0

    def __getitem__(self, at):
        index, appearance = at  # the augmentation has a known seed, so it can be drawn again
        seed = (self.epoch * len(self.x) + index) * 2 + appearance
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return self.x[index] + 0.3 * noise, self.y[index], index


def train(checkpoint, epochs=20, every=10, workers=2):
    torch.manual_seed(0)
    data = Pictures()
    indices = RandomSampler(data.x, generator=torch.Generator().manual_seed(1))
    sampler = OverlapBatchSampler(indices, batch_size=16, with_appearance=True)
    # The loader draws when it starts: from a generator of its own, and not from that of dropout.
    own = torch.Generator()
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=own)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.2), nn.Linear(192, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    criterion = DLBLoss()
    parts = {"model": model, "optimizer": optimizer, "criterion": criterion}
    first_epoch = used = 0
    if os.path.exists(checkpoint):
        state = torch.load(checkpoint)
        first_epoch, used = state["epoch"], state["sampler"]["consumed"]
        for name, part in (parts | {"sampler": sampler}).items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
    for epoch in range(first_epoch, epochs):
        data.epoch = epoch  # before the workers start
        for x, y, ids in loader:
            loss = criterion(model(x), y, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            used += 1  # of this epoch; the workers have drawn more
            print(epoch, used, loss.item(), flush=True)
            if used % every == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"sampler": sampler.state_dict(used), "epoch": epoch}
                torch.save(state | {"random": torch.get_rng_state()}, checkpoint + ".new")
                os.replace(checkpoint + ".new", checkpoint)  # a whole file, or the one before
        used = 0


if __name__ == "__main__":
    train(*sys.argv[1:2] or sys.exit(__doc__), *map(int, sys.argv[2:]))
