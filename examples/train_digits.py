"""Self-distillation from the last mini-batch (DLB) on handwritten digits with wrong labels.

Start it with

    python examples/train_digits.py             # one to two minutes
    python examples/train_digits.py --quick     # seconds, to see that it runs

It needs dlb_fused, rich, matplotlib and scikit-learn (`pip install ".[demo]"` in the repository).

DLB asks for two changes to a training script. The sampler: half of each batch repeats the fresh
samples of the batch before, as another random view.

    batches = OverlapBatchSampler(RandomSampler(dataset), batch_size=128)
    loader = DataLoader(dataset, batch_sampler=batches)

The loss: on the repeated half, the network also matches what it said about these samples one step
ago. `DLBLoss` keeps those logits, and computes the loss and its gradient in one kernel.

    criterion = DLBLoss(temperature=3.0, alpha=1.0)
    loss = criterion(model(images), labels)

The program trains one small network in five ways, all with the same number of steps and of rows a
step, each with several seeds. The labels of 40 % of the training images are wrong, those of the
test images are right. It prints the test accuracies, how closely DLB in plain PyTorch and in
dlb_fused agree when they start from the same seed, and the time that both spend in the loss; and it
draws a picture of all that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler
from dlb_fused.reference import dlb_loss_naive

# Temperature, alpha and smoothing are the usual values, not tuned here. The learning rate is the
# best of 0.02, 0.05 and 0.1 for plain cross-entropy, on 300 of the training images kept apart.
TEMPERATURE, ALPHA, SMOOTHING = 3.0, 1.0, 0.1
ROWS = 128  # of each step and method; with overlap, 64 of them are fresh
STEPS, SEEDS, EVALUATE_EVERY = 600, 5, 30
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 5e-4
TRAINING_IMAGES, WRONG_LABELS, SPLIT_SEED = 1200, 0.4, 0
SHIFT = 1  # pixels, of 8
THREADS = 1  # such small layers gain nothing from more
FIRST_STEPS = 20  # over which naive and fused losses are compared
CLASSES, CALLS = (1000, 21841), 20  # more classes than the digits' 10: timed on random logits


class Digits(Dataset):
    """Images (n, 1, 8, 8) float32 with labels (n,) int64; a training image is shifted at random,
    anew at each appearance. (Without a new view the two appearances of a sample would differ by
    one optimizer step only, and the KL would be small.)"""

    def __init__(self, images: Tensor, labels: Tensor, shift: int = 0) -> None:
        self.images, self.labels, self.shift = images, labels, shift
        self.padded = nn.functional.pad(images, [shift] * 4)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
        return self.padded[i, :, down : down + 8, right : right + 8], self.labels[i]


def load_data() -> Data:
    """Training and test images: the same split and the same wrong labels in each run."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    given = labels[train]
    wrong = torch.randperm(len(given), generator=generator)[: int(WRONG_LABELS * len(given))]
    given[wrong] += torch.randint(1, 10, wrong.shape, generator=generator)  # any of the nine others
    return Digits(images[train], given % 10, SHIFT), Digits(images[test], labels[test])


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class NaiveDLB(nn.Module):
    """DLB in plain PyTorch: the last logits kept by hand, the loss from stock operations."""

    last_logits: Tensor | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = dlb_loss_naive(
            logits, labels, self.last_logits, temperature=TEMPERATURE, alpha=ALPHA
        )
        overlap = 0 if self.last_logits is None else len(self.last_logits)
        self.last_logits = logits[overlap:].detach()
        return loss


class Method(NamedTuple):
    name: str
    make_criterion: Callable[[], nn.Module]
    overlap: bool
    color: str


SMOOTHED = partial(nn.CrossEntropyLoss, label_smoothing=SMOOTHING)
NAIVE = Method("DLB, naive loss", NaiveDLB, True, "tab:green")
FUSED = Method("DLB, dlb_fused", lambda: DLBLoss(TEMPERATURE, ALPHA), True, "tab:red")
METHODS = (
    Method("cross-entropy", nn.CrossEntropyLoss, False, "tab:gray"),
    Method("label smoothing", SMOOTHED, False, "tab:olive"),
    # The control: how much comes from the sampler alone?
    Method("overlapping batches, α = 0", lambda: DLBLoss(alpha=0.0), True, "tab:blue"),
    NAIVE,
    FUSED,
)


class Run(NamedTuple):
    accuracies: dict[int, float]  # percent of the test images, by step
    losses: list[float]  # of each step
    seconds: list[float]  # in the loss call, of each step


Data = tuple[Digits, Digits]
Runs = dict[Method, list[Run]]
Times = dict[str, list[float]]  # seconds of a naive and of a fused loss call, by case


def endless(dataset: Digits, overlap: bool, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ROWS rows, epoch after epoch."""
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    if overlap:
        batches = OverlapBatchSampler(sampler, ROWS, drop_last=True)
        loader = DataLoader(dataset, batch_sampler=batches)
    else:
        loader = DataLoader(dataset, sampler=sampler, batch_size=ROWS, drop_last=True)
    while True:
        yield from loader


def timed(criterion: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """The loss, its gradient to the logits, and the seconds for both."""
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    loss = criterion(leaf, labels)
    (dlogits,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), dlogits, time.perf_counter() - start


def train(method: Method, seed: int, steps: int, data: Data, tick: Callable[[], None]) -> Run:
    torch.manual_seed(seed)
    model, criterion = make_model(), method.make_criterion()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = Run({}, [], [])
    batches = endless(data[0], method.overlap, seed)
    for step in range(1, steps + 1):
        images, labels = next(batches)
        logits = model(images)
        # Usually `criterion(logits, labels).backward()`: here in two parts, to time the loss alone.
        loss, dlogits, seconds = timed(criterion, logits, labels)
        optimizer.zero_grad()
        logits.backward(dlogits)
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        run.seconds.append(seconds)
        if step % EVALUATE_EVERY == 0 or step == steps:
            run.accuracies[step] = accuracy(model, data[1])
        tick()
    return run


@torch.no_grad()
def accuracy(model: nn.Module, test: Digits) -> float:
    """Percent of the test images."""
    model.eval()
    right = model(test.images).argmax(1) == test.labels
    model.train()
    return 100 * right.double().mean().item()


def train_all(seeds: int, steps: int, console: Console) -> Runs:
    """The methods take turns, so that a busy machine disturbs their times alike."""
    data = load_data()
    runs: Runs = {method: [] for method in METHODS}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=seeds * steps * len(METHODS))
        for seed in range(seeds):
            for method in METHODS:
                progress.update(task, description=f"seed {seed}, {method.name}")
                tick = partial(progress.advance, task)
                runs[method].append(train(method, seed, steps, data, tick))
    return runs


def seconds_on_random_logits(method: Method, classes: int) -> float:
    """Median of a loss call with its gradient for logits (ROWS, classes)."""
    criterion, seconds = method.make_criterion(), []
    halves = torch.randint(classes, (CALLS + 1, ROWS // 2))
    timed(criterion, torch.randn(ROWS // 2, classes), halves[0])
    for pair in pairwise(halves):
        seconds.append(timed(criterion, torch.randn(ROWS, classes), torch.cat(pair))[2])
    return median(seconds)


def seconds_in_training(runs: list[Run]) -> float:
    return median(s for run in runs for s in run.seconds)


def final_accuracies(runs: list[Run]) -> list[float]:
    return [run.accuracies[len(run.losses)] for run in runs]


def accuracy_table(runs: Runs) -> Table:
    seeds, steps = len(runs[FUSED]), len(runs[FUSED][0].losses)
    wrong = f"{WRONG_LABELS:.0%} of labels wrong"
    table = Table("method", title=f"{seeds} seeds, {steps} steps of {ROWS} rows, {wrong}")
    for name in ("test accuracy, %", "loss call, µs"):
        table.add_column(name, justify="right")
    for method, its_runs in runs.items():
        final = final_accuracies(its_runs)
        accuracy = f"{mean(final):.2f} ± {stdev(final):.2f}"
        table.add_row(method.name, accuracy, f"{1e6 * seconds_in_training(its_runs):.0f}")
    return table


def time_table(times: Times) -> Table:
    table = Table("classes", title=f"Loss call: forward and gradient, {ROWS} rows")
    for name in ("naive, µs", "fused, µs", "naive / fused"):
        table.add_column(name, justify="right")
    for case, (naive, fused) in times.items():
        table.add_row(case, f"{1e6 * naive:.0f}", f"{1e6 * fused:.0f}", f"{naive / fused:.1f}")
    return table


def agreement(naive: list[Run], fused: list[Run]) -> str:
    """Both compute the same loss but for the last digits of float32. Training lets that difference
    grow, until single test images fall on the other side."""
    first = [torch.tensor([run.losses[:FIRST_STEPS] for run in runs]) for runs in (naive, fused)]
    final = [torch.tensor(final_accuracies(runs)) for runs in (naive, fused)]
    losses, accuracies = ((x - y).abs().max() for x, y in (first, final))
    return (
        f"DLB naive and fused from the same seed: the losses of the first {FIRST_STEPS} steps\n"
        f"differ by at most {losses:.1e}, the final accuracies by {accuracies:.2f} points."
    )


def draw(runs: Runs, times: Times, path: Path) -> None:
    plt.switch_backend("Agg")
    figure, (curves, bars, clocks) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    draw_curves(curves, runs)
    draw_accuracies(bars, runs)
    draw_times(clocks, times)
    figure.savefig(path, dpi=120)


def draw_curves(axes: plt.Axes, runs: Runs) -> None:
    steps = list(runs[FUSED][0].accuracies)
    steps = steps[len(steps) // 5 :]  # the steep beginning would hide the rest
    for method, its_runs in runs.items():
        values = torch.tensor([[run.accuracies[step] for step in steps] for run in its_runs])
        middle, spread = values.mean(0), values.std(0)
        style = "--" if method is FUSED else "-"  # it lies on the naive one
        axes.plot(steps, middle, style, color=method.color, label=method.name)
        axes.fill_between(steps, middle - spread, middle + spread, color=method.color, alpha=0.12)
    axes.set(xlabel="optimizer step", ylabel="test accuracy (%)", title="Mean ± std over the seeds")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def draw_accuracies(axes: plt.Axes, runs: Runs) -> None:
    for at, (method, its_runs) in enumerate(runs.items()):
        final = final_accuracies(its_runs)
        axes.barh(at, mean(final), xerr=stdev(final), color=method.color, alpha=0.7, capsize=4)
        axes.plot(final, [at] * len(final), "k.", markersize=4)
    final = [value for its_runs in runs.values() for value in final_accuracies(its_runs)]
    axes.set_xlim(min(final) - 2, max(final) + 1)
    axes.set_yticks(range(len(runs)), [method.name.replace(", ", ",\n") for method in runs])
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy (%), axis cut", title="After the last step; a dot for each seed")


def draw_times(axes: plt.Axes, times: Times) -> None:
    for side, method in enumerate((NAIVE, FUSED)):
        at = [k + 0.4 * side - 0.2 for k in range(len(times))]
        values = [1e6 * pair[side] for pair in times.values()]
        bars = axes.bar(at, values, 0.38, color=method.color, alpha=0.7, label=method.name)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(times)), [case.replace(", ", " classes\n") for case in times])
    axes.set(yscale="log", ylabel="time (µs)", title=f"Loss call with gradient, {ROWS} rows")
    axes.set_ylim(1e5 * min(map(min, times.values())), 4e6 * max(map(max, times.values())))
    axes.legend(loc="upper left")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, help=f"trainings of each method (default {SEEDS})")
    parser.add_argument("--steps", type=int, help=f"steps of each training (default {STEPS})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the picture")
    parser.add_argument("--quick", action="store_true", help="2 seeds and 40 steps: does it run?")
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.quick else SEEDS)
    options.steps = options.steps or (40 if options.quick else STEPS)
    if options.seeds < 2 or options.steps < 2:
        parser.error("--seeds and --steps must be at least 2")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(THREADS)
    console, start = Console(), time.perf_counter()
    runs = train_all(options.seeds, options.steps, console)
    times = {"10, in training": [seconds_in_training(runs[method]) for method in (NAIVE, FUSED)]}
    for classes in CLASSES:
        pair = [seconds_on_random_logits(method, classes) for method in (NAIVE, FUSED)]
        times[f"{classes}, random logits"] = pair
    console.print(accuracy_table(runs), agreement(runs[NAIVE], runs[FUSED]), time_table(times))
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / "train_digits.png"
    draw(runs, times, picture)
    console.print(f"Picture: {picture.resolve()}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
