"""Trains a network for image classification by DLB, or by what it is compared with.

    python examples/train.py --data digits --method dlb --noise 0.4
    python examples/train.py --data fashion-mnist --method ce --epochs 10 --out runs/ce
    python examples/train.py --data cifar100 --folder cifar-100-python --net resnet32 --out runs/c
    torchrun --nproc-per-node 2 examples/train.py --data cifar10 --folder cifar-10-batches-py ...

All methods take the same number of steps with the same number of rows (`methods.py`): `--epochs`
counts passes of rows as plain cross-entropy makes them, so DLB, which sees each sample twice in an
epoch, makes half as many of its own. The recipe is that of DLB's official script: SGD with Nesterov
momentum 0.9, weight decay 5e-4, learning rate 0.05, divided by 10 after 150, 180 and 210 of 240
parts of the training; its `--batch_size 64` is `--batch-size 128` here. (One thing differs: the
script makes two forwards, so that BatchNorm sees the halves apart; here there is one.)

Into the folder `--out` go `log.csv` (accuracies and both parts of the loss), `row.json` (what came
of it, with the command) and, after each epoch, `last.pt`, from which `--resume` goes on: on a CPU,
without loader workers and `--compile`, to the same bits.

It needs dlb_fused, rich and, by the data, scikit-learn or Pillow: `pip install '.[study]'` in the
repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from augment import AUGMENTS, Views, as_it_is, make_augment
from image_data import SOURCES, Split, load_data
from methods import METHODS, Batch, make_method, ramp
from networks import NETWORKS, make_network
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dlb_fused
from dlb_fused import OverlapCutMix, OverlapMixup

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
DROPS = (150 / 240, 180 / 240, 210 / 240)  # of the training; each divides the learning rate by 10
MIXES = {"mixup": OverlapMixup, "cutmix": OverlapCutMix}  # on the device, after the augmentation
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
TEST_ROWS = 500  # a forward of the evaluation
TIMED = 2000  # last steps whose times are kept
BINS = 15  # of the calibration error
PAIRS, PAIR_IMAGES = 5, 2000  # steps and test images over which two iterations are compared
APART = 1_000_003  # between the seeds of two ranks
RESULTS = ("last.pt", "row.json")
NOT_OF_THE_RUN = ("out", "resume", "folder", "device", "workers")  # may differ when it goes on
# Of a training, in its checkpoint.
PROGRESS = ("step", "epoch", "seconds", "sums", "curve", "last_said")
SETTINGS = (  # of the options, in the row
    *("data", "net", "method", "loss", "noise", "noise_kind", "augment", "seed", "batch_size"),
    *("lr", "warmup", "schedule", "temperature", "alpha", "ramp", "smoothing", "amp", "compile"),
    *("mix_alpha", "val", "threads"),
)

Tick = Callable[[int, str], None]  # steps done, and what to show beside them


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", choices=SOURCES, default="digits")
    add("--folder", help="where the data set is, in its published form")
    add("--train-images", type=int, help="only so many, of a fixed permutation")
    add("--val", type=float, default=0.1, help="share of them kept for validation")
    add("--noise", type=float, default=0.0, help="share of wrong labels, also in validation")
    add("--noise-kind", choices=("symmetric", "asymmetric"), default="symmetric")
    add("--net", choices=NETWORKS, default="small")
    add("--method", choices=METHODS, default="dlb")
    add("--loss", choices=("fused", "naive"), default="fused", help="of --method dlb")
    add("--temperature", type=float, default=3.0, help="of dlb and dlb-two-view")
    add("--alpha", type=float, default=1.0, help="weight of their KL")
    add("--ramp", type=float, default=0.0, help="share of the steps in which dlb's alpha grows")
    add("--smoothing", type=float, default=0.1, help="of label-smoothing")
    add("--augment", choices=(*AUGMENTS, *MIXES), default="standard")
    add("--mix-alpha", type=float, default=1.0, help="of mixup's and cutmix's Beta(a, a)")
    add(
        "--epochs",
        type=float,
        default=10.0,
        help="passes over the rows by plain cross-entropy",
    )
    add("--steps", type=int, help="optimizer steps, in place of --epochs")
    add("--batch-size", type=int, default=128, help="rows of a step, in each process")
    add("--lr", type=float, default=0.05)
    add("--warmup", type=float, default=0.0, help="share of the steps in which the rate grows")
    add("--schedule", choices=("steps", "cosine"), default="steps")
    add("--amp", choices=AMP, help="autocast to this type; fp16 with a GradScaler")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", help="default: the GPU, if there is one")
    add("--threads", type=int, help="of torch on a CPU")
    add("--workers", type=int, default=0, help="of the loader")
    add("--seed", type=int, default=0, help="of split, wrong labels, weights, order and views")
    add("--evaluations", type=int, default=10, help="in all, evenly spread")
    add("--out", type=Path, default=Path("runs/last"), help="folder of the results")
    add("--resume", action="store_true", help="go on with the training in --out")
    options = parser.parse_args(argv)
    for name in ("warmup", "ramp", "smoothing"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name} must be in [0, 1], got {getattr(options, name)}")
    for name in ("epochs", "steps", "batch_size", "lr", "temperature", "evaluations"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.batch_size % 2:
        parser.error(f"--batch-size must be even, got {options.batch_size}")
    return options


class Training:
    """One training: what it is made of, and where it stands."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options, self.folder = options, options.out
        if not options.resume and any((self.folder / name).exists() for name in RESULTS):
            raise FileExistsError(f"{self.folder} holds a training: --resume, or another --out")
        self.device = find_device(options.device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if ranks() else (0, 1)
        self.data = load_data(
            options.data,
            options.folder,
            noise=options.noise,
            noise_kind=options.noise_kind,
            val=options.val,
            train_images=options.train_images,
            seed=options.seed,
        )
        self.make_batches()
        self.make_model()
        self.step, self.epoch, self.seconds = 0, 0, 0.0
        self.sums = torch.zeros(4, device=self.device)  # since the last evaluation, see `evaluate`
        self.curve: list[dict[str, float]] = []
        self.last_said: list[Tensor] = []  # classes predicted around the last steps
        self.clock = Clock(self.device)
        if options.resume:
            self.load()

    def make_batches(self) -> None:
        options, split = self.options, self.data.train
        passes = options.epochs * len(split.labels) / (options.batch_size * self.world)
        self.steps: int = options.steps or max(1, round(passes))
        self.method = make_method(options, split, self.data.classes, self.steps)
        self.shard = DistributedSampler(
            split.labels, self.world, self.rank, seed=options.seed, drop_last=True
        )
        self.batches = self.method.batches(self.shard, options.batch_size)
        if len(self.batches) == 0:
            raise ValueError(
                f"{len(split.labels)} training images make no batch of {options.batch_size} rows"
                f" for each of {self.world} processes"
            )
        self.mix = None
        if options.augment in MIXES:
            generator = torch.Generator().manual_seed(options.seed + APART * self.rank)
            self.mix = MIXES[options.augment](options.mix_alpha, generator=generator)
        name = "standard" if self.mix else options.augment
        self.views = Views(split, make_augment(name, self.data))
        self.as_they_are = make_augment("none", self.data)

    def make_model(self) -> None:
        options = self.options
        torch.manual_seed(options.seed)
        channels = self.data.train.images.shape[1]
        self.network = make_network(options.net, self.data.classes, channels, self.data.size)
        self.network.to(self.device, memory_format=torch.channels_last)
        self.model: nn.Module = self.network
        if self.world > 1:
            self.model = DistributedDataParallel(self.model)
            torch.manual_seed(options.seed + APART * self.rank)  # each rank draws its own views
        if options.compile:
            self.model = torch.compile(self.model)
        recipe = {"momentum": MOMENTUM, "nesterov": True, "weight_decay": WEIGHT_DECAY}
        self.optimizer = torch.optim.SGD(self.network.parameters(), options.lr, **recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")

    # ---- training --------------------------------------------------------------------------------

    def train(self, tick: Tick) -> dict[str, Any]:
        loader = DataLoader(
            self.views,
            batch_sampler=self.batches,
            collate_fn=as_it_is,  # `Views` gives whole batches
            num_workers=self.options.workers,
            pin_memory=self.device.type == "cuda",
        )
        epochs = math.ceil(self.steps / len(self.batches))
        begin = time.perf_counter() - self.seconds
        self.model.train()
        while self.step < self.steps:
            self.shard.set_epoch(self.epoch)
            self.method.start_epoch(self.epoch, epochs)
            self.clock.step_begins()
            for images, labels, ids in loader:
                self.one_step(self.to_device(images, labels, ids))
                self.clock.step_ends()
                self.look(tick)
                if self.step == self.steps:
                    break
                self.clock.step_begins()
            else:
                self.epoch, self.seconds = self.epoch + 1, time.perf_counter() - begin
                self.save()
        self.seconds = time.perf_counter() - begin
        return self.row()

    def to_device(self, *parts: Tensor) -> Batch:
        images, labels, ids = (part.to(self.device, non_blocking=True) for part in parts)
        if self.mix is None:
            return Batch(images, labels, ids)
        mixed = self.mix(images, labels, overlap=None if self.method.overlaps else 0)
        return Batch(mixed.images, labels, ids, mixed.labels_b, mixed.lam)

    def one_step(self, batch: Batch) -> None:
        self.set_learning_rate()
        with self.autocast():
            logits = self.method.forward(self.model, batch.images)
        self.clock.loss_begins()
        loss = self.method.loss(logits, batch)
        self.clock.loss_pauses()
        # The gradient of the logits is where the loss ends and the network begins.
        logits.register_hook(self.clock.loss_ends)
        self.optimizer.zero_grad()
        scaled = self.scaler.scale(loss)
        self.clock.loss_goes_on()
        scaled.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.add_up(logits, batch.labels)

    def set_learning_rate(self) -> None:
        """For the step to come, from the number of steps made."""
        done = self.step / self.steps
        if self.options.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * done))
        else:
            factor = 0.1 ** sum(done >= drop for drop in DROPS)
        factor *= ramp(self.step, self.options.warmup * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.options.lr

    def autocast(self) -> torch.autocast:
        dtype = AMP.get(self.options.amp, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.options.amp is not None)

    def add_up(self, logits: Tensor, labels: Tensor) -> None:
        right = (logits.detach().argmax(1) == labels[: len(logits)]).float().mean()
        self.sums += torch.stack((*self.method.parts(), right, torch.ones_like(right)))

    # ---- measuring -------------------------------------------------------------------------------

    def look(self, tick: Tick) -> None:
        """What is measured between two steps; by rank 0."""
        if self.rank:
            return
        if self.step >= self.steps - PAIRS:
            said = self.predict(self.data.test.images[:PAIR_IMAGES]).argmax(1)
            self.last_said.append(said)
        parts = self.options.evaluations
        if self.step * parts // self.steps > (self.step - 1) * parts // self.steps:
            self.evaluate()
        tick(self.step, f"{self.options.method}: {in_words(self.curve)}")

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits (N, C) float32 on the CPU."""
        self.network.eval()
        with self.autocast():
            logits = [
                self.network(self.as_they_are(rows).to(self.device)).float().cpu()
                for rows in images.split(TEST_ROWS)
            ]
        self.network.train()
        return torch.cat(logits)

    def evaluate(self) -> None:
        """Adds a line to the curve: means over the steps since the last line, on this rank, and
        accuracies in percent."""
        ce, kl, right, steps = self.sums.double().tolist()
        self.sums.zero_()
        self.curve.append(
            {
                "step": self.step,
                "lr": self.optimizer.param_groups[0]["lr"],
                "ce": ce / steps,
                "kl": kl / steps,
                "train_accuracy": 100 * right / steps,
                "val_accuracy": self.accuracy(self.data.val),
                "test_accuracy": self.accuracy(self.data.test),
            }
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.curve[0]))
            writer.writeheader()
            writer.writerows(self.curve)

    def accuracy(self, split: Split) -> float | None:
        """Percent; None of no images (`--val 0`)."""
        if not len(split.labels):
            return None
        return percent(self.predict(split.images).argmax(1) == split.labels)

    def row(self) -> dict[str, Any]:
        """What came of the training; {} but for rank 0."""
        if self.rank:
            return {}
        options, test, last = self.options, self.data.test, self.curve[-1]
        logits = self.predict(test.images)
        row = {
            "command": command(options, self.world),
            **{name: getattr(options, name) for name in SETTINGS},
            "steps": self.steps,
            "train_images": len(self.data.train.labels),
            "processes": self.world,
            "test_accuracy": last["test_accuracy"],
            "val_accuracy": last["val_accuracy"],
            "test_nll": F.cross_entropy(logits, test.labels).item(),
            "ece": calibration_error(logits, test.labels),
            "agreement": self.agreement(),
            "memorized": self.memorized(),
            "step_ms": self.clock.step_ms(),
            "loss_ms": self.clock.loss_ms(),
            "peak_memory_mib": peak_memory_mib(self.device),
            "seconds": self.seconds,
            "curve": self.curve,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "dlb_fused": dlb_fused.__version__,
            },
            "device": device_name(self.device),
            "commit": commit(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / "row.new"  # there whole, or not at all
        new.write_text(json.dumps(row, indent=1) + "\n")
        new.replace(self.folder / "row.json")
        return row

    def agreement(self) -> float | None:
        """Percent of the test images that two neighboring of the last iterations call the same."""
        pairs = [percent(before == after) for before, after in pairwise(self.last_said)]
        return mean(pairs) if pairs else None

    def memorized(self) -> float | None:
        """Percent of the wrongly labelled training images whose wrong label is predicted."""
        images, labels, true_labels = self.data.train
        wrong = labels != true_labels
        if not wrong.any():
            return None
        return percent(self.predict(images[wrong]).argmax(1) == labels[wrong])

    # ---- going on --------------------------------------------------------------------------------

    def save(self) -> None:
        """Between two epochs; each rank for itself. The file is there whole, or as it was."""
        state = {
            "options": settings(self.options) | {"processes": self.world},
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.method.state_dict(),
            "batches": self.batches.state_dict() if self.method.overlaps else None,
            "mix": self.mix.state_dict() if self.mix else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.checkpoint_name()
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self) -> None:
        path = self.folder / self.checkpoint_name()
        if not path.exists():
            raise FileNotFoundError(f"--resume: there is no {path}")
        state = torch.load(path, map_location="cpu")
        theirs, ours = state["options"], settings(self.options) | {"processes": self.world}
        differ = [f"{name}: {theirs.get(name)} and now {ours[name]}"
                  for name in ours if theirs.get(name) != ours[name]]  # fmt: skip
        if differ:
            raise ValueError(f"--resume: {path} is of another training ({'; '.join(differ)})")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.method.load_state_dict(state["method"])
        if self.method.overlaps:
            self.batches.load_state_dict(state["batches"])
        if self.mix:
            self.mix.load_state_dict(state["mix"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.sums = self.sums.to(self.device)
        if self.world > 1:
            steps = [0] * self.world
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:  # it was killed while the ranks were writing
                raise ValueError(
                    f"--resume: the ranks' checkpoints are of different steps: {steps}"
                )

    def checkpoint_name(self) -> str:
        return "last.pt" if self.rank == 0 else f"last-rank{self.rank}.pt"


class Clock:
    """Times of the steps, and of the loss in them: its forward, and its backward down to the
    logits. On a GPU by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.steps: deque[tuple[Any, Any]] = deque(maxlen=TIMED)
        self.losses: deque[list[Any]] = deque(maxlen=TIMED)  # forward from, to; backward from, to

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_begins(self) -> None:
        self.begin = self.now()

    def step_ends(self) -> None:
        self.steps.append((self.begin, self.now()))

    def loss_begins(self) -> None:
        self.losses.append([self.now()])

    def loss_pauses(self) -> None:
        self.losses[-1].append(self.now())

    loss_goes_on = loss_pauses

    def loss_ends(self, _: Tensor) -> None:
        self.losses[-1].append(self.now())

    def ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)

    def step_ms(self) -> float:
        self.wait()
        return median(self.ms(*times) for times in self.steps)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def loss_ms(self) -> float:
        self.wait()
        return median(self.ms(a, b) + self.ms(c, d) for a, b, c, d in self.losses)


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent (Guo et al., ICML 2017): the gap between confidence and
    accuracy, averaged over bins of confidence by their share of the images."""
    confidence, said = logits.double().softmax(1).max(1)
    right = (said == labels).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - right)
    return 100 * gaps.abs().sum().item() / len(labels)


def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def in_words(curve: list[dict[str, float]]) -> str:
    if not curve:
        return "no evaluation yet"
    last = curve[-1]
    return "ce {ce:.3f}, kl {kl:.4f}, test {test_accuracy:.2f} %".format(**last)


def ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def find_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch sees no GPU here")
        if "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index is not None:
            torch.cuda.set_device(device)  # for the clock's events, too
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.machine()


def peak_memory_mib(device: torch.device) -> float:
    """On a GPU what torch has allocated at most; on a CPU the most that the process had resident,
    data and Python included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def commit() -> str | None:
    """Of this repository; "-dirty" if a tracked file differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that make a training what it is."""
    return {name: value for name, value in vars(options).items() if name not in NOT_OF_THE_RUN}


def command(options: argparse.Namespace, processes: int = 1) -> str:
    """To be typed in the repository; what is not named has its default. FOLDER is that of the data
    on the machine at hand."""
    defaults, words = vars(parse([])), ["python", "examples/train.py"]
    if processes > 1:
        words = ["torchrun", f"--nproc-per-node={processes}", "examples/train.py"]
    for name, value in (settings(options) | {"device": options.device}).items():
        if value != defaults[name]:
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words + (["--folder", "FOLDER"] if options.folder else []))


def run(options: argparse.Namespace, progress: Tick = lambda step, text: None) -> dict[str, Any]:
    """Trains as `parse` said; returns the row, which is also in `row.json`."""
    return Training(options).train(progress)


def main() -> None:
    options = parse()
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    try:
        if "WORLD_SIZE" in os.environ:
            on_gpu = find_device(options.device).type == "cuda"
            dist.init_process_group("nccl" if on_gpu else "gloo")
        training = Training(options)
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task("", total=training.steps)
            row = training.train(
                lambda step, text: progress.update(task, completed=step, description=text)
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    finally:
        if ranks():
            dist.destroy_process_group()
    if row:
        console.print(
            "test accuracy {test_accuracy:.2f} %, calibration error {ece:.1f} %; a step "
            "{step_ms:.1f} ms, of it the loss {loss_ms:.2f}".format(**row),
            f"-> {options.out}/row.json, log.csv",
            sep="\n",
        )


if __name__ == "__main__":
    main()
