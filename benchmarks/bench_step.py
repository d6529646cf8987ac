"""The share of the loss in a whole training step: `make step`.

    python benchmarks/bench_step.py [--quick] [--cases resnet20,decoder] [--modes eager,…] ...

A step is the model's forward, the loss, backward and the optimizer, over batches whose first half
repeats the second half of the batch before. Models: ResNet-20 on 32×32 images (He et al. 2016), and
a small decoder with a vocabulary of 32000, whose rows are tokens. Each trains with the naive DLB
loss, with `DLBLoss`, with plain cross-entropy, and without any loss: a fixed gradient is given to
the logits instead. What the loss costs is the time of a step beyond that one's.

Right before fast: from the same weights, loss and gradients of `DLBLoss` must agree with those of
the naive loss, and those of the given gradient too, before a step is timed (of a CUDA graph those
of its first replay besides); and after all steps the module's count must say that each overlap row
had its teacher. Else it is reported as WRONG, without times, and the exit status is 1.

Time: in rounds, one sample of each loss in rotating order; medians over the rounds, of differences
and ratios within rounds. "alone" is forward and backward of the loss by itself, for logits of the
same shape: it resolves what the difference of two steps cannot. Memory: the peak of a step beyond
parameters, optimizer state and cached logits.
"""

from __future__ import annotations

from bench_loss import peak_memory  # first: it sets what must be set before torch is imported

# isort: split
import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from gpu_machine import Gpu, Rehearsal
from report import ROOT, facts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dlb_fused import DLBLoss
from dlb_fused.reference import dlb_loss_naive

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# ---- models -------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters: strided, new channels 0."""

    def __init__(self, old: int, new: int) -> None:
        super().__init__()
        self.stride, self.pad = new // old, (new - old) // 2
        self.conv1 = nn.Conv2d(old, new, 3, self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(new, new, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(new), nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


def make_resnet(classes: int, blocks: int = 3) -> nn.Module:
    """For 3×32×32: 6 · blocks + 2 layers, so ResNet-20."""
    widths = [16] * (blocks + 1) + [32] * blocks + [64] * blocks
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *(Block(old, new) for old, new in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


class Decoder(nn.Module):
    """Tokens (n, length) to logits (n·length, vocabulary), the embedding used twice."""

    mask: Tensor

    def __init__(self, vocabulary: int, length: int, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, batch_first=True, norm_first=True, dropout=0.0)
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(
            layer(width, width // 64 or 1, 4 * width, activation=F.gelu) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return F.linear(self.norm(x), self.embedding.weight).flatten(0, 1)


Half = tuple[Tensor, Tensor]  # inputs (n, ...), labels (rows,)


def images(n: int, classes: int) -> Half:
    return torch.randn(n, 3, 32, 32), torch.randint(classes, (n,))


def sentences(n: int, length: int, vocabulary: int) -> Half:
    tokens = torch.randint(vocabulary, (n, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


@dataclass(frozen=True)
class Case:
    name: str
    rows: int  # B of the logits
    classes: int
    make_model: Callable[[], nn.Module]
    make_half: Callable[[], Half]  # half a batch of new samples
    make_optimizer: Callable[[Iterable[Tensor], bool], torch.optim.Optimizer]  # captured or not


def sgd(parameters: Iterable[Tensor], captured: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: Iterable[Tensor], captured: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-4, capturable=captured)


def resnet20(classes: int = 100, batch: int = 128) -> Case:
    half = partial(images, batch // 2, classes)
    return Case("resnet20", batch, classes, partial(make_resnet, classes), half, sgd)


def decoder(batch: int, length: int, vocabulary: int = 32000) -> Case:
    half = partial(sentences, batch // 2, length, vocabulary)
    model = partial(Decoder, vocabulary, length)
    return Case("decoder", batch * length, vocabulary, model, half, adamw)


def all_cases(device: str) -> list[Case]:
    return [resnet20(), decoder(8, 64) if device == "cpu" else decoder(16, 128)]


# ---- losses and modes ---------------------------------------------------------------------------


class NaiveDLB(nn.Module):
    """DLB in plain PyTorch, the last logits kept by hand: a reference to them, or for a CUDA graph
    a copy in one place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.last_logits: Tensor | None = None

    def forward(self, logits: Tensor, labels: Tensor, commit: bool = True) -> Tensor:
        last = self.last_logits
        loss = dlb_loss_naive(logits, labels, last)
        fresh = logits[0 if last is None else len(last) :].detach()
        if not commit:
            pass
        elif self.in_place and last is not None:
            last.copy_(fresh)
        else:
            self.last_logits = fresh.clone() if self.in_place else fresh
        return loss


class CrossEntropy(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, labels: Tensor, commit: bool = True) -> Tensor:
        return super().forward(logits, labels)


NAIVE, FUSED, CE, NONE = "naive DLB", "DLBLoss", "cross_entropy", "no loss"

MakeLoss = Callable[[bool], nn.Module]  # captured or not

LOSSES: dict[str, MakeLoss | None] = {
    NAIVE: NaiveDLB,
    FUSED: lambda captured: DLBLoss(capturable=captured),
    CE: lambda captured: CrossEntropy(),
    NONE: None,
}


class Mode(NamedTuple):
    compiled: bool = False
    autocast: bool = False
    captured: bool = False
    tolerance: float = 1e-5  # relative, of loss and gradients


MODES = {
    "eager": Mode(),
    "autocast": Mode(autocast=True, tolerance=3e-2),  # bfloat16 has three digits
    "compiled": Mode(compiled=True),
    "graphs": Mode(captured=True),
}


def absent_modes(device: str) -> dict[str, str]:
    return {} if device != "cpu" else {"graphs": "CUDA graphs need a GPU"}


# ---- training -----------------------------------------------------------------------------------


class Training:
    """A model with one loss, from the same weights and on the same batches as with any other."""

    def __init__(self, case: Case, make_loss: MakeLoss | None, mode: Mode, at: Gpu) -> None:
        torch.manual_seed(0)
        self.mode, self.at = mode, at
        self.model = case.make_model().to(at.device)
        self.loss = None if make_loss is None else make_loss(mode.captured)
        self.optimizer = case.make_optimizer(self.model.parameters(), mode.captured)
        self.batches = self.make_batches(case)
        self.inputs, self.labels = (x.clone() for x in self.batches[0])
        self.batch = 0
        self.given: Tensor | None = None  # the gradient of the logits, without a loss
        self.compute = (
            torch.compile(self.forward, fullgraph=True) if mode.compiled else self.forward
        )
        self.call: Callable[[], object] = self.train
        self.begin()

    def make_batches(self, case: Case) -> list[Half]:
        """A cycle: the first half of each batch is the second half of the one before."""
        halves = [case.make_half() for _ in range(4)]
        pairs = [(halves[k - 1], halves[k]) for k in range(4)]
        return [
            (torch.cat((old[0], new[0])).to(self.at.device),
             torch.cat((old[1], new[1])).to(self.at.device))
            for old, new in pairs
        ]  # fmt: skip

    def begin(self) -> None:
        """The first half of the first batch has been seen: its logits are what is learnt from."""
        inputs, labels = (x[: len(x) // 2] for x in self.batches[0])
        with self.autocast():
            logits = self.model(inputs)
            if self.loss is not None:
                self.loss(logits, labels)

    def autocast(self) -> Any:
        return torch.autocast(self.at.device, torch.bfloat16, enabled=self.mode.autocast)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss; without one the logits."""
        with self.autocast():
            logits: Tensor = self.model(inputs)
            return logits if self.loss is None else self.loss(logits, labels)

    def train(self) -> tuple[Tensor, ...]:
        self.backward()
        self.optimizer.step()
        return ()

    def backward(self) -> Tensor:
        """Leaves gradients; returns the loss, without one the logits."""
        self.optimizer.zero_grad()
        out = self.compute(self.inputs, self.labels)
        out.backward(self.given)
        return out.detach()

    def next_batch(self) -> Half:
        return self.batches[(self.batch + 1) % len(self.batches)]

    def step(self) -> None:
        for mine, its in zip((self.inputs, self.labels), self.next_batch(), strict=True):
            mine.copy_(its)
        self.batch += 1
        self.call()

    def capture(self) -> None:
        """From now on the step is one graph."""
        self.at.wait()
        with self.at.on(self.at.stream()):
            for _ in range(3):
                self.step()
        self.at.wait()
        self.optimizer.zero_grad()
        self.call = self.at.capture(self.train)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def gradient_of_logits(self) -> Tensor:
        """That of the loss, at the weights and the batch of now."""
        with self.autocast():
            logits = self.model(self.inputs).detach().requires_grad_()
        return self.alone(logits, self.labels)

    def alone(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward of the loss by itself; what it keeps for the next step stays."""
        assert self.loss is not None
        with self.autocast():
            loss = self.loss(logits, labels, commit=False)
        return torch.autograd.grad(loss, logits)[0]

    def alone_with_next_labels(self, logits: Tensor) -> None:
        self.alone(logits, self.next_batch()[1])


# ---- right before fast --------------------------------------------------------------------------


@dataclass
class Result:
    case: str
    mode: str
    loss: str
    rows: int
    classes: int
    status: str = "ok"  # "ok", "WRONG" or "failed"
    reason: str = ""
    loss_error: float | None = None  # relative, against the naive loss in the same mode
    gradient_error: float | None = None
    memory_mb: float | None = None  # peak of a step
    rounds: int = 0
    step_ms: float | None = None
    step_ms_q10_q90: tuple[float, float] | None = None
    loss_ms: float | None = None  # what the step takes beyond the one without a loss
    share: float | None = None  # that, of the step
    share_q10_q90: tuple[float, float] | None = None
    alone_ms: float | None = None
    alone_share: float | None = None


def relative_error(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """In the L2 norm over all tensors together."""
    off = norm = 0.0
    for a, b in zip(got, want, strict=True):
        off += float((a.double() - b.double()).square().sum())
        norm += float(b.double().square().sum())
    return math.sqrt(off / norm)


def compare(trainings: dict[str, Training], results: dict[str, Result], tolerance: float) -> None:
    """The first gradients of all that compute DLB, against those of the naive loss."""
    naive = trainings[NAIVE]
    given = naive.gradient_of_logits()
    want_loss, want = naive.backward(), naive.gradients()
    for name, training in trainings.items():
        if name in (NAIVE, CE):
            continue
        if training.loss is None:
            training.given = given
        result, loss = results[name], training.backward()
        result.gradient_error = relative_error(training.gradients(), want)
        result.loss_error = None if training.loss is None else relative_error([loss], [want_loss])
        judge(result, tolerance)


def compare_replayed(trainings: dict[str, Training], results: dict[str, Result]) -> None:
    """The gradients that a graph has left, after steps that let rounding grow."""
    if results[FUSED].status == results[NAIVE].status == "ok":
        found = (trainings[name].gradients() for name in (FUSED, NAIVE))
        results[FUSED].gradient_error = relative_error(*found)
        judge(results[FUSED], 1e-2)


def judge(result: Result, tolerance: float) -> None:
    errors = [result.loss_error or 0.0, result.gradient_error or 0.0]
    if not all(error <= tolerance for error in errors):  # also for NaN
        result.status = "WRONG"
        result.reason = (
            f"relative error of the loss {errors[0]:.1e}, of the gradients {errors[1]:.1e} "
            f"(allowed {tolerance:.0e})"
        )


def check_chain(training: Training, result: Result) -> None:
    """Every overlap row was taught, in all steps."""
    if not isinstance(training.loss, DLBLoss):
        return
    stats = training.loss.stats()
    if stats.mismatched or stats.skipped or not stats.matched:
        result.status, result.reason = "WRONG", f"the chain of batches broke: {stats}"


# ---- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    cases: list[str]
    modes: list[str]
    device: str
    threads: int
    quick: bool

    def rounds(self, seconds_per_round: float) -> int:
        low, high = (2, 3) if self.quick else (7, 60)
        seconds = 16.0 if self.device == "cpu" else 5.0
        return min(max(low, int(seconds / seconds_per_round)), high)


def seconds_of(call: Callable[[], object], calls: int, at: Gpu) -> float:
    at.wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    at.wait()
    return (time.perf_counter() - start) / calls


Key = tuple[str, str]  # "step" or "alone", and the loss
Seconds = dict[Key, list[float]]


def sample(calls: dict[Key, Callable[[], object]], settings: Settings, at: Gpu) -> Seconds:
    """Seconds of each call, by round."""
    counts, total = {}, 0.0
    for key, call in calls.items():
        once = min(seconds_of(call, 1, at) for _ in range(2))
        counts[key] = max(1, math.ceil((0.05 if key[0] == "step" else 0.005) / once))
        total += counts[key] * once
    keys, seconds = list(calls), {key: [] for key in calls}
    for k in range(settings.rounds(total)):
        shift = k % len(keys)
        for key in keys[shift:] + keys[:shift]:
            seconds[key].append(seconds_of(calls[key], counts[key], at))
    return seconds


def quantiles(values: Sequence[float], unit: float = 1.0) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0] * unit, cuts[-1] * unit


def enter(seconds: Seconds, results: dict[str, Result]) -> None:
    """Times into the results of those that are right."""
    free = seconds.get(("step", NONE))
    for (what, name), values in seconds.items():
        result = results[name]
        if what == "alone":
            step = statistics.median(seconds["step", name])
            result.alone_ms = statistics.median(values) * 1e3
            result.alone_share = statistics.median(values) / step
            continue
        result.rounds = len(values)
        result.step_ms = statistics.median(values) * 1e3
        result.step_ms_q10_q90 = quantiles(values, 1e3)
        if free and name != NONE:
            beyond = [step - without for step, without in zip(values, free, strict=True)]
            shares = [more / step for more, step in zip(beyond, values, strict=True)]
            result.loss_ms = statistics.median(beyond) * 1e3
            result.share = statistics.median(shares)
            result.share_q10_q90 = quantiles(shares)


def attempt(result: Result, call: Callable[[], object]) -> None:
    """A loss that cannot be compiled or captured must not end the run."""
    try:
        call()
    except Exception as error:
        result.status, result.reason = "failed", f"{type(error).__name__}: {error}"


def get_ready(training: Training, result: Result) -> None:
    """The first whole steps, with their memory, or as a graph with the first replay."""
    training.step()
    training.optimizer.zero_grad()
    if training.mode.captured:
        training.capture()
        training.step()
    else:
        result.memory_mb = peak_memory(training.step, training.at.device) * 1e-6


def measure(
    case: Case, mode: str, losses: dict[str, MakeLoss | None], settings: Settings, at: Gpu
) -> list[Result]:
    """Every loss with one model: checked, timed, and checked again."""
    torch.compiler.reset()
    how = MODES[mode]
    results = {name: Result(case.name, mode, name, case.rows, case.classes) for name in losses}
    trainings = {name: Training(case, make, how, at) for name, make in losses.items()}
    compare(trainings, results, how.tolerance)
    for name, training in trainings.items():
        if results[name].status == "ok":
            attempt(results[name], partial(get_ready, training, results[name]))
    if how.captured:
        compare_replayed(trainings, results)
    ready = {name: it for name, it in trainings.items() if results[name].status == "ok"}
    calls: dict[Key, Callable[[], object]] = {("step", name): it.step for name, it in ready.items()}
    for name, training in ready.items():
        if training.loss is not None and not (how.captured or how.compiled):
            logits = torch.randn(case.rows, case.classes, device=at.device)
            logits = logits.to(torch.bfloat16) if how.autocast else logits
            calls["alone", name] = partial(training.alone_with_next_labels, logits.requires_grad_())
    seconds = sample(calls, settings, at)
    for name, training in ready.items():
        check_chain(training, results[name])
    right = {key: values for key, values in seconds.items() if results[key[1]].status == "ok"}
    enter(right, results)
    return list(results.values())


# ---- what is shown ------------------------------------------------------------------------------

COLUMNS = ("step\nms", "10 to 90 %", "loss in\nstep, ms", "share of\nthe step", "10 to 90 %",
           "loss\nalone, ms", "of the\nstep", "peak\nmemory, MB", "gradient\nerror")  # fmt: skip


def table_of(results: Sequence[Result]) -> Table:
    first = results[0]
    title = f"{first.case}, {first.mode}: logits ({first.rows}, {first.classes})"
    table = Table("loss", title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)

    def form(value: Any, spec: str) -> str:
        if isinstance(value, tuple):
            return " to ".join(form(v, spec) for v in value)
        return "–" if value is None else spec.format(value)

    for r in results:
        cells = [
            form(r.step_ms, "{:.1f}") if r.status == "ok" else r.status,
            form(r.step_ms_q10_q90, "{:.1f}"), form(r.loss_ms, "{:.2f}"), form(r.share, "{:.1%}"),
            form(r.share_q10_q90, "{:.1%}"),
            form(r.alone_ms, "{:.3f}"), form(r.alone_share, "{:.2%}"),
            form(r.memory_mb, "{:.0f}"), form(r.gradient_error, "{:.0e}"),
        ]  # fmt: skip
        style = "red" if r.status != "ok" else "bold" if r.loss == FUSED else None
        table.add_row(r.loss, *cells, style=style)
    return table


MODEL_COLOUR = "#dbe7f3"
COLOURS = {NAIVE: "#8f8f8f", FUSED: "#0b6e4f", CE: "#f2a541"}


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Stacked bars, a panel for each model: the step without a loss, and what the loss adds."""
    note = "%: share of the loss, by difference to a step without loss (whisker: 10 to 90 %"
    note += " of rounds), in brackets the loss by itself"
    cases = list(dict.fromkeys(r.case for r in results))
    figure, panels = plt.subplots(
        1, len(cases), figsize=(1 + 6 * len(cases), 5), squeeze=False, layout="constrained"
    )
    for axis, case in zip(panels[0], cases, strict=True):
        draw_panel(axis, [r for r in results if r.case == case])
    figure.suptitle(f"{title}\n", fontsize=13)
    figure.text(0.5, 0.93, note, ha="center", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_panel(axis: Any, results: Sequence[Result]) -> None:
    modes = list(dict.fromkeys(r.mode for r in results))
    axis.bar([0], [0], color=MODEL_COLOUR, label="model, backward, optimizer")
    for i, (name, colour) in enumerate(COLOURS.items()):
        axis.bar([0], [0], color=colour, label=name)
        for r in results:
            if r.loss == name and r.share is not None:
                draw_bar(axis, modes.index(r.mode) + 0.28 * (i - 1), r, colour)
    axis.set_xticks(range(len(modes)), modes)
    axis.set_ylabel("one training step (ms)")
    axis.set_title(f"{results[0].case}: logits {results[0].rows}×{results[0].classes}")
    axis.margins(y=0.25)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(loc="upper right", fontsize=8)


def draw_bar(axis: Any, at: float, r: Result, colour: str) -> None:
    assert r.step_ms and r.loss_ms is not None and r.share is not None and r.share_q10_q90
    loss = max(r.loss_ms, 0.0)
    axis.bar(at, r.step_ms - loss, 0.25, color=MODEL_COLOUR)
    axis.bar(at, loss, 0.25, bottom=r.step_ms - loss, color=colour)
    low, high = (abs(share - r.share) * r.step_ms for share in r.share_q10_q90)
    axis.errorbar(at, r.step_ms, [[low], [high]], color="black", linewidth=0.7, capsize=2)
    alone = "" if r.alone_share is None else f"\n({100 * r.alone_share:.2g}%)"
    text = f"{r.share:.1%}{alone}"
    axis.text(at, r.step_ms + high, text, ha="center", va="bottom", fontsize=8)


def write(data: dict[str, Any], results: Sequence[Result], folder: Path) -> Path:
    """JSON and PNG, named after the device; returns the path of the JSON."""
    machine, settings = data["machine"], data["settings"]
    model = machine["gpu"] or machine["cpu"]
    stem = f"step-{settings['device']}-{model}" + "-quick" * settings["quick"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") + ".json")
    path.write_text(json.dumps(data, indent=1) + "\n")
    threads = "" if machine["gpu"] else f", {machine['threads']} threads"
    title = f"Training steps on {model}{threads}, torch {torch.__version__}, {data['date'][:10]}"
    if results:
        draw(results, title, path.with_suffix(".png"))
    return path


# ---- the command --------------------------------------------------------------------------------


def run(
    cases: Sequence[Case], losses: dict[str, MakeLoss | None], settings: Settings, console: Console
) -> list[Result]:
    torch.set_num_threads(settings.threads)
    at = Rehearsal() if settings.device == "cpu" else Gpu()
    work = [(case, mode) for mode in settings.modes for case in cases]  # the slowest mode last
    results: list[Result] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(work))
        for case, mode in work:
            progress.update(task, description=f"{case.name}, {mode}")
            try:
                found = measure(case, mode, losses, settings, at)
            except KeyboardInterrupt:  # out of time: what there is will be written
                console.print(f"interrupted: {case.name}, {mode}")
                break
            except Exception as error:  # a compiler that is missing, say
                why = f"{type(error).__name__}: {error}"
                found = [Result(case.name, mode, name, case.rows, case.classes, "failed", why)
                         for name in losses]  # fmt: skip
            results += found
            console.print(table_of(found))
            progress.advance(task)
    return results


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if not set(words) <= set(names):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(names)}")
        return words

    return parse


def parse(argv: Sequence[str] | None, cases: Sequence[str]) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="few rounds: a look, not a measurement")
    add("--cases", type=some_of(cases), default=list(cases), help=",".join(cases))
    add("--modes", type=some_of(MODES), default=list(MODES), help=",".join(MODES))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and PNG")
    o = parser.parse_args(argv)
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return Settings(o.cases, o.modes, o.device, o.threads, o.quick), o.out


def main(
    argv: Sequence[str] | None = None,
    cases: Callable[[str], list[Case]] = all_cases,
    losses: dict[str, MakeLoss | None] = LOSSES,
) -> int:
    """Measures, prints and writes; 1 if a loss was refused, else 0."""
    settings, out = parse(argv, [case.name for case in cases("cpu")])
    # Rounded to TF32, as convolutions on a GPU are by default, a last bit of the loss is 5e-4 of
    # the gradients.
    torch.backends.cudnn.allow_tf32 = False
    absent = {k: v for k, v in absent_modes(settings.device).items() if k in settings.modes}
    settings.modes[:] = [mode for mode in settings.modes if mode not in absent]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    chosen = [case for case in cases(settings.device) if case.name in settings.cases]
    results = run(chosen, losses, settings, console)
    for name, reason in absent.items():
        console.print(f"absent: {name}: {reason}", markup=False)
    for r in results:
        if r.status != "ok":
            line = f"{r.status}: {r.loss}, {r.case}, {r.mode}: {r.reason}"
            console.print(line, style="red", markup=False)
    data = {
        "format": 1,
        **facts(settings.device, settings.threads),
        "settings": asdict(settings),
        "absent": absent,
        "results": [asdict(r) for r in results],
    }
    console.print(f"written: {write(data, results, out)} and the same as .png", soft_wrap=True)
    return int(any(r.status != "ok" for r in results))


if __name__ == "__main__":
    sys.exit(main())
