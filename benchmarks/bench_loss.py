"""Micro-benchmark of the loss: time, bandwidth and memory of each variant, over shapes and dtypes.

    python benchmarks/bench_loss.py [--quick] [--shapes 256x100,...] [--dtype float32,bfloat16] ...

Each variant gets the same logits (B, C), labels (B,) and last_logits (m, C), m = B / 2.

Right before fast: its loss and gradient are held against the fp64 truth before it is timed, and
once more after. A wrong one is reported as WRONG, without times, and the exit status is 1.

Time: in rounds, each variant is sampled once, in rotating order; a sample is a batch of calls that
lasts some milliseconds. Medians over the rounds; a ratio is the median of the ratios within rounds,
so that a slow phase of the machine cancels. "forward" is the loss under no_grad; "forward_backward"
is the loss and `torch.autograd.grad(loss, logits)`: a new gradient each call, nothing accumulated.

Bytes: ideally each input is read once and each output written once. "copy" moves as many bytes with
as many threads into memory that is used again; "copy fresh" into new memory, as a gradient is.
"""

from __future__ import annotations

import os

# The profiler writes lines at each start, and a warning for each older tensor that is freed.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Else the compiler starts other processes, which would still be starting when times are taken.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from report import MODES, OPTIONS, ROOT, Report, Result, Settings, Timing, table_of, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dlb_fused import DLBLoss, backends, dlb_loss
from dlb_fused.reference import dlb_loss_naive

# 2 cores and 8 GiB suffice: beyond the logits, the fp64 truth needs some ten times their bytes.
CPU_SHAPES = [(8, 10), (128, 10), (256, 100), (1024, 100), (256, 200), (256, 1000), (1024, 1000),
              (512, 21841), (64, 32000), (64, 50257), (64, 128256), (16, 262144)]  # fmt: skip
CUDA_SHAPES = [(128, 10), (256, 100), (1024, 100), (256, 200), (256, 1000), (1024, 1000),
               (2048, 21841), (4096, 32000), (2048, 50257), (1024, 128256),
               (512, 262144)]  # fmt: skip
QUICK_SHAPES = [(8, 10), (256, 100), (256, 1000), (64, 32000)]

# Relative error allowed to a kernel of ours (L2 of the gradient), and, of gradient and loss, to
# stock PyTorch, which computes in the dtype of the logits.
KERNEL_TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-3, "float16": 3e-4}
STOCK_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 2e-2}


class Inputs(NamedTuple):
    """labels[m:] repeat labels[:m], and last_logits copy logits[m:]: so a `DLBLoss` that is called
    with this batch again and again finds these very last_logits in its cache."""

    logits: Tensor  # (B, C), a leaf that requires grad
    labels: Tensor  # (B,) int64
    last_logits: Tensor  # (m, C)


Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to the loss; `make(inputs)` prepares it and returns the call to be timed."""

    name: str
    make: Callable[[Inputs], Call]
    note: str = ""
    work: str = "dlb"  # what it computes and moves: "dlb", "dlb+cache", "ce" or "copy"
    ours: bool = False  # held to KERNEL_TOLERANCE, and a failure is an error


def ideal_bytes(
    B: int, C: int, m: int, itemsize: int, work: str = "dlb", mode: str = "forward_backward"
) -> int:
    """Bytes of all matrices of C columns: read logits and last_logits, write the gradient and the
    cache of the fresh rows. For n = m = B/2: 5·n·C·itemsize, with the cache 6."""
    rows = B if work == "ce" else B + m
    if mode == "forward_backward":
        rows += 2 * B - m if work == "dlb+cache" else B
    return rows * C * itemsize


def make_inputs(B: int, C: int, dtype: str, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(B * 1_000_003 + C)
    logits = (torch.randn(B, C, generator=generator) * 2).to(device, getattr(torch, dtype))
    labels = torch.randint(0, C, (B // 2,), generator=generator).repeat(2).to(device)
    return Inputs(logits.requires_grad_(), labels, logits.detach()[B // 2 :].clone())


def naive(x: Inputs) -> Call:
    return partial(dlb_loss_naive, *x, **OPTIONS)


def compiled(x: Inputs) -> Call:
    torch.compiler.reset()  # else all shapes but the first are compiled with dynamic sizes
    return partial(torch.compile(dlb_loss_naive), *x, **OPTIONS)


def cross_entropy(x: Inputs) -> Call:
    return partial(F.cross_entropy, x.logits, x.labels)


def fused(backend: str, x: Inputs) -> Call:
    return partial(dlb_loss, *x, backend=backend, **OPTIONS)  # type: ignore[return-value]


def module(x: Inputs) -> Call:
    criterion = DLBLoss(**OPTIONS)
    criterion(x.last_logits.clone().requires_grad_(), x.labels[: len(x.last_logits)])
    return partial(criterion, x.logits, x.labels)


def copy(fresh: bool, x: Inputs) -> Call:
    """Reads one half of the ideal bytes of dlb_loss and writes the other."""
    B, C = x.logits.shape
    size = ideal_bytes(B, C, len(x.last_logits), x.logits.element_size())
    source = torch.ones(max(size // 8, 1), device=x.logits.device)
    return source.clone if fresh else partial(torch.empty_like(source).copy_, source)


def all_variants(device: str, dtype: str) -> tuple[list[Variant], dict[str, str]]:
    """Those that can run, and the reason for each that cannot."""
    probe = torch.empty(1, 1, device=device, dtype=getattr(torch, dtype))
    reasons = {name: backends.why_not(name, probe) for name in backends.BACKENDS}
    auto = next(name for name, reason in reasons.items() if reason is None)
    variants = [
        Variant("eager", naive, "F.cross_entropy + F.kl_div"),
        Variant("compile", compiled, "the same under torch.compile, default mode"),
        Variant("cross_entropy", cross_entropy, "F.cross_entropy alone, no KL", "ce"),
        *(
            Variant(f"dlb_loss[{name}]", partial(fused, name), "", ours=True)
            for name, reason in reasons.items()
            if reason is None
        ),
        Variant("DLBLoss", module, f"the module with its cache copy, {auto}", "dlb+cache", True),
        Variant("copy", partial(copy, False), "dlb_loss's ideal bytes, memory reused", "copy"),
        Variant("copy fresh", partial(copy, True), "the same into new memory", "copy"),
    ]
    return variants, {f"dlb_loss[{k}]": reason for k, reason in reasons.items() if reason}


class Truth(NamedTuple):
    """In fp64 from the same values, and the errors allowed against it: of loss and gradient."""

    loss: Tensor
    gradient: Tensor  # (B, C)
    ours: tuple[float, float]
    stock: tuple[float, float]


def step(call: Call, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and its gradient (B, C)."""
    loss = call()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def find_truth(x: Inputs, work: str) -> Truth:
    """A kernel of ours may err by its tolerance, by twice what eager errs in fp32, or by 1.2 times
    the rounding of the gradient to its dtype, whichever is most."""

    def at(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = x.logits.detach().to(dtype).requires_grad_()
        make = cross_entropy if work == "ce" else naive
        return step(make(Inputs(logits, x.labels, x.last_logits.to(dtype))), logits)

    loss, gradient = at(torch.float64)
    loss_error, error = map(relative_error, at(torch.float32), (loss, gradient))
    rounding = relative_error(gradient.to(x.logits.dtype), gradient)
    name = str(x.logits.dtype).removeprefix("torch.")
    stock = STOCK_TOLERANCE[name]
    return Truth(
        loss,
        gradient,
        (max(1e-6, 2 * loss_error), max(KERNEL_TOLERANCE[name], 2 * error, 1.2 * rounding)),
        (stock, max(stock, 3 * rounding)),
    )


def check(variant: Variant, call: Call, x: Inputs, truth: Truth, result: Result) -> None:
    """Enters the errors of a variant into its result, which becomes WRONG if they are too large."""
    loss, gradient = step(call, x.logits)
    losses = [loss]
    if variant.work != "dlb+cache":  # without grad the module leaves its cache alone: no KL
        with torch.no_grad():
            losses.append(call())
    errors = torch.tensor([relative_error(loss, truth.loss) for loss in losses])
    result.loss_error = float(errors.max())  # NaN if one is
    result.gradient_error = relative_error(gradient, truth.gradient)
    allowed = truth.ours if variant.ours else truth.stock
    if result.loss_error <= allowed[0] and result.gradient_error <= allowed[1]:  # false for NaN
        return
    result.status = "WRONG"
    result.times.clear()
    result.reason = (
        f"relative error of the loss {result.loss_error:.1e} (allowed {allowed[0]:.1e}), "
        f"of the gradient {result.gradient_error:.1e} (allowed {allowed[1]:.1e})"
    )


def seconds_of(call: Callable[[], object], calls: int, device: str, flush: Tensor | None) -> float:
    """Wall time of `calls` calls on a CPU; on a GPU the time between events in its stream, and with
    `flush` that buffer, larger than the L2, is written before each call, outside the time."""
    if device == "cpu":
        start_ns = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start_ns) * 1e-9
    events = []
    for batch in [calls] if flush is None else [1] * calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
        start.record()
        for _ in range(batch):
            call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) * 1e-3


class Samples(NamedTuple):
    calls: int  # in each sample
    seconds: list[float]  # for one call, by round


def sample(calls: dict[str, Callable[[], object]], settings: Settings) -> dict[str, Samples]:
    """Samples all calls in the same rounds."""
    flush = None
    if settings.cold and settings.device != "cpu":
        l2 = torch.cuda.get_device_properties(settings.device).L2_cache_size
        flush = torch.empty(2 * l2, dtype=torch.int8, device=settings.device)
    samples, total = {}, 0.0
    for name, call in calls.items():
        once = max(min(seconds_of(call, 1, settings.device, flush) for _ in range(4)), 1e-7)
        samples[name] = Samples(math.ceil(settings.sample_ms * 1e-3 / once), [])
        total += samples[name].calls * once
    names = list(calls)
    for i in range(settings.rounds(total)):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            number, seconds = samples[name]
            seconds.append(seconds_of(calls[name], number, settings.device, flush) / number)
    return samples


def time_all(
    mode: str, ready: list[tuple[Variant, Call, Result]], x: Inputs, settings: Settings
) -> None:
    """Times side by side those variants that are right."""
    B, C = x.logits.shape
    backward = mode == "forward_backward"
    calls: dict[str, Callable[[], object]] = {}
    sizes = {}
    for variant, call, _ in ready:
        work = (variant.work, mode)
        calls[variant.name] = call
        if variant.work == "copy":
            work = ("dlb", "forward_backward")
        elif backward:
            calls[variant.name] = partial(step, call, x.logits)
        elif variant.work == "dlb+cache":
            del calls[variant.name]
        sizes[variant.name] = ideal_bytes(B, C, B // 2, x.logits.element_size(), *work)
    if not calls:
        return
    with torch.set_grad_enabled(backward):
        samples = sample(calls, settings)
    for variant, _, result in ready:
        if variant.name in samples:
            result.times[mode] = timing(variant.name, samples, sizes)


def timing(name: str, samples: dict[str, Samples], sizes: dict[str, int]) -> Timing:
    number, seconds = samples[name]

    def over(other: str) -> float | None:
        """The median ratio of the time of `other` to that of `name`."""
        if other not in samples:
            return None
        return statistics.median(map(float.__truediv__, samples[other].seconds, seconds))

    eager, ce, copy = over("eager"), over("cross_entropy"), over("copy")
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    median = statistics.median(seconds)
    return Timing(
        median_us=median * 1e6,
        min_us=min(seconds) * 1e6,
        q10_us=cuts[0] * 1e6,
        q90_us=cuts[-1] * 1e6,
        rounds=len(seconds),
        calls_per_sample=number,
        ideal_bytes=sizes[name],
        gb_per_s=sizes[name] / median * 1e-9,
        of_copy=copy and copy * sizes[name] / sizes["copy"],
        speedup_over_eager=eager,
        time_over_cross_entropy=ce and 1 / ce,
    )


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes allocated at the peak of a call beyond those before it: on a CPU, all that torch's
    allocator gave out, as its profiler records it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [e["args"] for e in events if e["name"] == "[memory]"]
    changes = [change for change in changes if change["Device Type"] == 0]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


def measure(
    shape: tuple[int, int], dtype: str, variants: Sequence[Variant], settings: Settings
) -> list[Result]:
    """Every variant on one shape: checked, timed, and checked again."""
    B, C = shape
    x = make_inputs(B, C, dtype, settings.device)
    truths = {"ce": find_truth(x, "ce"), "dlb": find_truth(x, "dlb")}
    truths["dlb+cache"] = truths["dlb"]
    ready, results = [], []
    for variant in variants:
        result = Result(dtype, B, C, B // 2, variant.name, variant.ours)
        results.append(result)
        try:
            call = variant.make(x)
            if variant.work != "copy":
                check(variant, call, x, truths[variant.work], result)
                peak = peak_memory(partial(step, call, x.logits), settings.device)
                result.extra_memory = peak / (x.logits.numel() * x.logits.element_size())
        except Exception as error:  # a compiler that is missing, say, must not end the run
            result.status, result.reason = "failed", f"{type(error).__name__}: {error}"
        if result.status == "ok":
            ready.append((variant, call, result))
    for mode in MODES:
        time_all(mode, ready, x, settings)
    for variant, call, result in ready:
        if variant.work != "copy":
            check(variant, call, x, truths[variant.work], result)
    return results


def run(settings: Settings, variants: Sequence[Variant] | None, console: Console) -> Report:
    """Measures `variants`, by default all; prints a table for each shape."""
    torch.set_num_threads(settings.threads)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.3:
        load = os.getloadavg()[0]
        console.print(f"other programs are running (load {load:.1f}): times will be noisy")
    report = Report(settings, absent=dict.fromkeys(settings.skip, "left out by --skip"))
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(settings.shapes) * len(settings.dtypes))
        for dtype in settings.dtypes:
            found, absent = all_variants(settings.device, dtype)
            chosen = [v for v in variants or found if v.name not in settings.skip]
            report.absent |= absent
            report.notes |= {v.name: v.note for v in chosen}
            for B, C in settings.shapes:
                progress.update(task, description=f"{dtype} {B}×{C}")
                results = measure((B, C), dtype, chosen, settings)
                report.results += results
                console.print(table_of(results))
                progress.advance(task)
    return report


def parse_shapes(text: str) -> list[tuple[int, int]]:
    shapes = [tuple(map(int, word.split("x"))) for word in text.split(",")]
    if any(len(shape) != 2 or shape[0] % 2 or min(shape) < 1 for shape in shapes):
        raise ValueError  # argparse says "invalid BxC,... value", and the text
    return [(B, C) for B, C in shapes]


parse_shapes.__name__ = "BxC,... (B even)"


def parse_dtypes(text: str) -> list[str]:
    dtypes = text.split(",")
    if not set(dtypes) <= set(KERNEL_TOLERANCE):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(KERNEL_TOLERANCE)}")
    return dtypes


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="few shapes and rounds: a look, not a measurement")
    add("--shapes", type=parse_shapes, help="as 256x100,8x10; B even")
    add("--dtype", type=parse_dtypes, default=["float32"], help="float32,bfloat16,float16")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cold", action="store_true", help="flush a GPU's L2 before each call")
    add("--skip", default="", help="variants to leave out, as compile,DLBLoss")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and PNG")
    o = parser.parse_args(argv)
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    default = QUICK_SHAPES if o.quick else CPU_SHAPES if o.device == "cpu" else CUDA_SHAPES
    skip = [name for name in o.skip.split(",") if name]
    shapes = o.shapes or default
    return Settings(shapes, o.dtype, o.device, o.threads, skip, o.quick, o.cold), o.out


def main(argv: Sequence[str] | None = None, variants: Sequence[Variant] | None = None) -> int:
    """Measures `variants`, by default all, prints and writes; 1 if one was refused, else 0."""
    settings, out = parse(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    report = run(settings, variants, console)
    for name, reason in report.absent.items():
        console.print(f"absent: {name}: {reason}", markup=False)
    for r in report.results:
        if r.status != "ok":
            line = f"{r.status}: {r.variant}, {r.dtype} ({r.B}, {r.C}): {r.reason}"
            console.print(line, style="red", markup=False)
    console.print(f"written: {write(report, out)} and the same as .png", soft_wrap=True)
    return int(report.refused())


if __name__ == "__main__":
    sys.exit(main())
