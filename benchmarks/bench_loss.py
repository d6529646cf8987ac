"""The comparison suite of the loss: time, bandwidth, memory, operations and error of each variant,
over shapes and dtypes. The variants: variants.py; the bars that they are held to: bars.py.

    python benchmarks/bench_loss.py [--quick] [--shapes 256x100,...] [--dtype float32,bfloat16] ...

Each variant gets the same logits (B, C), labels (B,) and last_logits (m, C), m = B / 2.

Right before fast: its loss and gradient are held against the fp64 truth before it is timed, and
once more after. A wrong one is reported as WRONG, without times, and the exit status is 1.

Time: in rounds, each variant is sampled once, in rotating order; a sample is a batch of calls that
lasts some milliseconds. Medians over the rounds; a ratio or a difference is the median of those
within rounds, so that a slow phase of the machine cancels. "forward" is the loss under no_grad;
"forward_backward" is the loss and `torch.autograd.grad`: a new gradient each call, nothing
accumulated; "…_scaled" with a loss scale from above in place of 1; "…_cold", on a GPU, after a
flush of its L2. "host" is the host's time for a step of a small shape: on a GPU, to issue it.

Bytes: ideally each input is read once and each output written once. "copy" moves as many bytes with
as many threads into memory that is used again; "copy[fresh]" into new memory, as a gradient is.

Operations: on a GPU the kernels that a step launches and the calls in which the host waits; on a
CPU the aten operations that a step dispatches (not what runs inside a compiled or fused kernel) and
the values that the host reads by an operation, each of which would be a wait on a GPU. (On a CPU,
and only there, dlb_loss looks at its upstream gradient too, by its address.)
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bars import judge, table_of_bars
from gpu_machine import Gpu
from pictures import draw
from report import (
    BACKWARD,
    COLD,
    FORWARD,
    HOST,
    MODES,
    REFERENCES,
    ROOT,
    SCALE,
    SOME_CLASSES,
    Case,
    Report,
    Result,
    Settings,
    Timing,
    caption,
    table_of,
    table_of_host,
    write,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from variants import (
    EMPTY,
    Call,
    Inputs,
    Variant,
    all_variants,
    cross_entropy,
    ideal_bytes,
    make_inputs,
    naive,
)

# 2 cores and 8 GiB suffice: beyond the logits, the fp64 truth needs some ten times their bytes.
CPU_SHAPES = [(8, 10), (128, 10), (1024, 10), (256, 100), (1024, 100), (256, 200), (256, 1000),
              (1024, 1000), (512, 21841), (64, 32000), (64, 50257), (64, 128256),
              (16, 262144)]  # fmt: skip
CUDA_SHAPES = [(128, 10), (1024, 10), (256, 100), (1024, 100), (256, 200), (256, 1000),
               (1024, 1000), (2048, 21841), (4096, 32000), (2048, 50257), (1024, 128256),
               (512, 262144)]  # fmt: skip
QUICK_SHAPES = [(8, 10), (256, 100), (256, 1000), (64, 32000)]
HOST_CASE = ("float32", 8, 10)
# All shapes in these dtypes, in the others one for each of SOME_CLASSES.
ALL_SHAPES_IN = {"cpu": ["float32"], "cuda": ["bfloat16", "float32"]}

# Relative error allowed to a kernel of ours (L2 of the gradient), and, of gradient and loss, to
# other programs, which compute in the dtype of the logits.
KERNEL_TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-3, "float16": 3e-4}
STOCK_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 2e-2}


# ---- right before fast -------------------------------------------------------------------------


class Truth(NamedTuple):
    """In fp64 from the same values, and what a program in fp32 errs against it."""

    loss: Tensor
    gradient: Tensor  # (B, C)
    loss_error: float
    gradient_error: float

    def allowed(self, ours: bool, dtype: str, scale: float = 1.0) -> tuple[float, float]:
        """Errors of loss and gradient. A kernel of ours may err by its tolerance, by twice what
        eager errs in fp32, or by 1.2 times the rounding of the scaled gradient to its dtype,
        whichever is most."""
        scaled = self.gradient * scale
        rounding = relative_error(scaled.to(getattr(torch, dtype)), scaled)
        if ours:
            error = max(KERNEL_TOLERANCE[dtype], 2 * self.gradient_error, 1.2 * rounding)
            return max(1e-6, 2 * self.loss_error), error
        return STOCK_TOLERANCE[dtype], max(STOCK_TOLERANCE[dtype], 3 * rounding)


def step(call: Call, upstream: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and backward: the loss and the gradients of the leaves."""
    loss = call.loss()
    return loss.detach(), torch.autograd.grad(loss, call.leaves, upstream)


def timed_step(call: Call, upstream: Tensor | None = None) -> Callable[[], object]:
    """The same with nothing around it."""
    loss, leaves, grad = call.loss, call.leaves, torch.autograd.grad
    return lambda: grad(loss(), leaves, upstream)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def find_truth(x: Inputs, work: str) -> Truth:
    def at(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = x.logits.detach().to(dtype).requires_grad_()
        make = cross_entropy if work == "ce" else naive
        loss, (gradient,) = step(make(Inputs(logits, x.labels, x.last_logits.to(dtype))))
        return loss, gradient

    truth = at(torch.float64)
    return Truth(*truth, *map(relative_error, at(torch.float32), truth))


def upstream_of(call: Call, scale: float = SCALE) -> Tensor:
    """The gradient from above, in the dtype of the loss."""
    with torch.no_grad():
        return torch.full_like(call.loss(), scale)


def check(variant: Variant, call: Call, truth: Truth, result: Result) -> None:
    """Enters the errors of a variant into its result, which becomes WRONG if they are too large."""
    loss_errors = []

    def gradient_error(upstream: Tensor | None, scale: float) -> float:
        loss, gradients = step(call, upstream)
        loss_errors.append(relative_error(loss, truth.loss))
        return relative_error(torch.cat(gradients), truth.gradient * scale)

    found = []
    upstream = upstream_of(call)
    for what, scale in (("gradient", 1.0), ("scaled gradient", SCALE)):
        error = gradient_error(None if scale == 1 else upstream, scale)
        found.append((what, error, truth.allowed(variant.ours, result.dtype, scale)[1]))
    result.gradient_error, result.scaled_gradient_error = found[0][1], found[1][1]
    if FORWARD in variant.modes:
        with torch.no_grad():
            loss_errors.append(relative_error(call.loss(), truth.loss))
    result.loss_error = float(torch.tensor(loss_errors).max())  # NaN if one is
    found.insert(0, ("loss", result.loss_error, truth.allowed(variant.ours, result.dtype)[0]))
    if all(error <= allowed for _, error, allowed in found):  # false for NaN
        return
    result.status = "WRONG"
    result.times.clear()
    result.reason = "relative error " + ", ".join(
        f"of the {what} {error:.1e} (allowed {allowed:.1e})" for what, error, allowed in found
    )


# ---- time --------------------------------------------------------------------------------------

Clock = Callable[[Callable[[], object], int], float]  # the time that so many calls take


def by_wall(call: Callable[[], object], calls: int) -> float:
    start_ns = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start_ns) * 1e-9


def by_host(device: str, call: Callable[[], object], calls: int) -> float:
    """What the host spends, on a device that has nothing else to do."""
    if device != "cpu":
        torch.cuda.synchronize()
    return by_wall(call, calls)


def by_stream(flush: Tensor | None, call: Callable[[], object], calls: int) -> float:
    """The time between events in a GPU's stream; with `flush` that buffer, larger than the L2, is
    written before each call, outside the time."""
    events = []
    for batch in [calls] if flush is None else [1] * calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
            torch.cuda._sleep(HEAD_START)
        start.record()
        for _ in range(batch):
            call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) * 1e-3


def clock_of(mode: str, device: str) -> Clock:
    if MODES[mode].host:
        return partial(by_host, device)
    if device == "cpu":
        return by_wall
    if not MODES[mode].cold:
        return partial(by_stream, None)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return partial(by_stream, torch.empty(2 * l2, dtype=torch.int8, device=device))


# Clocks, some 150 µs, in which the host issues what is to be timed: else a short kernel's time
# would be the host's.
HEAD_START = 300_000


class Samples(NamedTuple):
    calls: int  # in each sample
    seconds: list[float]  # for one call, by round


def sample(
    calls: dict[str, Callable[[], object]], settings: Settings, clock: Clock
) -> dict[str, Samples]:
    """Samples all calls in the same rounds."""
    samples, total = {}, 0.0
    for name, call in calls.items():
        once = max(min(clock(call, 1) for _ in range(4)), 1e-7)
        samples[name] = Samples(math.ceil(settings.sample_ms * 1e-3 / once), [])
        total += samples[name].calls * once
    names = list(calls)
    for i in range(settings.rounds(total)):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            number, seconds = samples[name]
            seconds.append(clock(calls[name], number) / number)
    return samples


def time_all(mode: str, ready: list[tuple[Variant, Call, Result]], settings: Settings) -> None:
    """Times side by side those variants that are right."""
    how = MODES[mode]
    calls: dict[str, Callable[[], object]] = {}
    sizes = {}
    with torch.set_grad_enabled(how.backward):
        for variant, call, r in ready:
            if mode not in variant.modes or r.status != "ok":
                continue
            run: Callable[[], object] = call.loss
            try:
                if call.leaves and how.backward:
                    run = timed_step(call, upstream_of(call) if how.scaled else None)
                run()
            except Exception as error:  # one that fails in this mode alone
                r.fail(error)
                continue
            calls[variant.name] = run
            itemsize = getattr(torch, r.dtype).itemsize
            sizes[variant.name] = ideal_bytes(r.B, r.C, r.m, itemsize, variant.work, how.backward)
        samples = sample(calls, settings, clock_of(mode, settings.device)) if calls else {}
    for variant, _, result in ready:
        if variant.name in samples:
            result.times[mode] = timing(variant.name, samples, sizes)


def timing(name: str, samples: dict[str, Samples], sizes: dict[str, int]) -> Timing:
    number, seconds = samples[name]

    def against(other: str, compare: Callable[[float, float], float]) -> float:
        return statistics.median(map(compare, seconds, samples[other].seconds))

    present = [other for other in REFERENCES if other in samples]
    over = {other: against(other, float.__truediv__) for other in present}
    above = {k: against(k, float.__sub__) * 1e6 for k in present if k in ABOVE}
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    median = statistics.median(seconds)

    def share(copy: str) -> float | None:
        return sizes[name] / sizes[copy] / over[copy] if copy in over else None

    return Timing(
        median_us=median * 1e6,
        min_us=min(seconds) * 1e6,
        q10_us=cuts[0] * 1e6,
        q90_us=cuts[-1] * 1e6,
        rounds=len(seconds),
        calls_per_sample=number,
        ideal_bytes=sizes[name],
        gb_per_s=sizes[name] / median * 1e-9,
        of_copy=share("copy"),
        of_fresh_copy=share("copy[fresh]"),
        over=over,
        above=above,
    )


ABOVE = ("cross_entropy", EMPTY.name)


# ---- memory and operations ---------------------------------------------------------------------


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes allocated at the peak of a call beyond those before it: on a CPU, all that torch's
    allocator gave out, as its profiler records it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [e["args"] for e in events if e["name"] == "[memory]"]
    changes = [change for change in changes if change["Device Type"] == 0]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


# On a GPU the host waits in these; `item()`, `bool()` and `tolist()` end in the first.
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}


def operations(call: Callable[[], object]) -> list[str]:
    """The aten operations that a call dispatches on a CPU, without those made of others."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return [
        event.name
        for event in seen.events()
        if event.name.startswith("aten::")
        and not any(child.name.startswith("aten::") for child in event.cpu_children)
    ]


def count(call: Callable[[], object], device: str) -> tuple[int, int]:
    """Launches and waits; on a CPU aten operations and values that the host reads."""
    if device == "cpu":
        names = operations(call)
        return len(names), sum(name in READS for name in names)
    seen = Gpu().launched("", call)
    return len(seen.kernels) + len(seen.others), len(seen.waits)


# ---- the run -----------------------------------------------------------------------------------


def modes_of(device: str) -> list[str]:
    return [mode for mode in MODES if mode != HOST and (mode != COLD or device != "cpu")]


def measure(
    case: Case, variants: Sequence[Variant], settings: Settings, modes: Sequence[str]
) -> list[Result]:
    """Every variant on one shape: checked, timed, and checked again."""
    dtype, B, C = case
    torch.compiler.reset()  # else all shapes but the first are compiled with dynamic sizes
    x = make_inputs(B, C, dtype, settings.device)
    truths = {"ce": find_truth(x, "ce"), "dlb": find_truth(x, "dlb")}
    truths["dlb+cache"] = truths["dlb"]
    ready, results = [], []
    for variant in variants:
        result = Result(dtype, B, C, B // 2, variant.name, variant.ours)
        results.append(result)
        try:
            call = variant.make(x)
            if variant.is_loss:
                check(variant, call, truths[variant.work], result)
                # Given, so that what autograd does to make a 1 is not counted.
                scale = 1.0 if BACKWARD in variant.modes else SCALE
                once = partial(step, call, upstream_of(call, scale))
                result.extra_bytes = peak_memory(once, settings.device)
                result.launches, result.syncs = count(once, settings.device)
        except Exception as error:  # a compiler that is missing, say, must not end the run
            result.fail(error)
        if result.status == "ok":
            ready.append((variant, call, result))
    for mode in modes:
        time_all(mode, ready, settings)
    for variant, call, result in ready:
        if variant.is_loss and result.status == "ok":
            check(variant, call, truths[variant.work], result)
    return results


def choose(dtype: str, variants: Sequence[Variant] | None, report: Report) -> list[Variant]:
    """Of `variants`, by default all that can run in this dtype, those that are not to be skipped;
    enters notes and reasons into the report."""
    settings = report.settings
    found, absent = all_variants(settings.device, dtype)
    skipped = {v.name for v in found if any(word in v.name for word in settings.skip)}
    report.absent |= absent | dict.fromkeys(skipped, "left out by --skip")
    chosen = [v for v in variants or found if v.name not in skipped]
    report.notes |= {v.name: v.note for v in chosen}
    return chosen


def run(settings: Settings, variants: Sequence[Variant] | None, console: Console) -> Report:
    """Measures `variants`, by default all; prints a table for each shape. Cases for which there is
    no time, or that an interrupt leaves, are named in the report."""
    torch.set_num_threads(settings.threads)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.3:
        load = os.getloadavg()[0]
        console.print(f"other programs are running (load {load:.1f}): times will be noisy")
    if settings.device != "cpu":
        # A profiler's first record may lack something.
        count(partial(torch.ones, 1, device=settings.device), settings.device)
    report, todo = Report(settings), list(settings.cases)
    end = time.monotonic() + (math.inf if settings.seconds is None else settings.seconds)
    longest = 0.0
    if settings.seconds is not None:  # some from all over the list first
        todo = [case for k in range(3) for case in todo[k::3]]
    with Progress(console=console) as progress:
        task = progress.add_task("host time", total=len(todo) + 1)
        try:
            losses = [v for v in choose("float32", variants, report) if HOST in v.modes]
            host = [EMPTY, *(v for v in losses if v.is_loss)]
            report.host = measure(HOST_CASE, host, settings, [HOST])
            console.print(table_of_host(report.host))
            progress.advance(task)
            while todo and (start := time.monotonic()) + 1.3 * longest < end:
                dtype, B, C = todo[0]
                progress.update(task, description=f"{dtype} {B}×{C}")
                chosen = choose(dtype, variants, report)
                report.results += measure(todo[0], chosen, settings, modes_of(settings.device))
                console.print(table_of(report.results[-len(chosen) :], settings.device))
                del todo[0]
                progress.advance(task)
                longest = max(longest, time.monotonic() - start)
        except KeyboardInterrupt:
            console.print("interrupted")
    report.left_out = [f"{dtype} {B}x{C}" for dtype, B, C in todo]
    report.results.sort(key=lambda r: settings.cases.index((r.dtype, r.B, r.C)))
    return report


# ---- the command -------------------------------------------------------------------------------


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


def default_cases(device: str) -> list[Case]:
    """Every shape in some dtypes; in the others one shape of some classes."""
    shapes = CPU_SHAPES if device == "cpu" else CUDA_SHAPES
    first = {C: (B, C) for B, C in reversed(shapes)}
    few = [first[C] for C in SOME_CLASSES]
    full = ALL_SHAPES_IN[device]
    order = full + [dtype for dtype in KERNEL_TOLERANCE if dtype not in full]
    return [(dtype, B, C) for dtype in order for B, C in (shapes if dtype in full else few)]


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="few shapes and rounds: a look, not a measurement")
    add("--shapes", type=parse_shapes, help="as 256x100,8x10; B even")
    add("--dtype", type=parse_dtypes, help="float32,bfloat16,float16")
    add("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--skip", default="", help="leave out variants whose names hold one of these: compile,copy")
    add("--seconds", type=float, help="as many cases as there is time for")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for JSON and PNG")
    o = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if o.device == "cuda" and not has_gpu:
        parser.error("--device cuda: torch finds no CUDA device")
    device = ("cuda" if has_gpu else "cpu") if o.device == "auto" else o.device
    cases = default_cases(device)
    if o.quick or o.shapes or o.dtype:
        shapes = o.shapes or (QUICK_SHAPES if o.quick else [c[1:] for c in cases])
        cases = [(d, B, C) for d in o.dtype or ["float32"] for B, C in dict.fromkeys(shapes)]
    skip = [name for name in o.skip.split(",") if name]
    return Settings(cases, device, o.threads, skip, o.quick, o.seconds), o.out


def main(argv: Sequence[str] | None = None, variants: Sequence[Variant] | None = None) -> int:
    """Measures `variants`, by default all, prints and writes; 1 if one was refused, else 0."""
    settings, out = parse(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 190
    report = run(settings, variants, console)
    verdicts = judge(report)
    console.print(table_of_bars(verdicts))
    for name, reason in report.absent.items():
        console.print(f"absent: {name}: {reason}", markup=False, soft_wrap=True)
    if report.left_out:
        console.print(f"no time was left for: {', '.join(report.left_out)}", soft_wrap=True)
    for line in report.not_ok():
        console.print(line, style="red", markup=False)
    path = write(report, out, [v._asdict() for v in verdicts])
    draw(report.results, caption(settings), path)
    console.print(f"written: {path}", markup=False, soft_wrap=True)
    return int(report.refused())


if __name__ == "__main__":
    sys.exit(main())
