"""What a device must show for one backend. `gpu_report.py` runs this file; by hand:

    python benchmarks/gpu_checks.py check BACKEND [NAME ...]   some of the checks below, or all
    python benchmarks/gpu_checks.py probe BACKEND [--traffic] [--planted]   launches to be watched
    python benchmarks/gpu_checks.py fork BACKEND               import here, compute in a child

`check` prints a line of JSON for each check and ends at the first that fails: a fault on a GPU can
spoil all that the same process does later. With --rehearse the same code runs on a CPU.
"""

from __future__ import annotations

import os

import bench_loss  # first: it sets what must be set before torch is imported

# isort: split
import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_loss import find_truth, peak_memory, relative_error
from gpu_machine import Gpu, Launched, Rehearsal, Step, rehearsing
from report import HOST, OPTIONS, ROOT, Settings
from torch import Tensor
from torch.autograd import grad
from variants import EMPTY, Inputs, empty, fused, ideal_bytes, make_inputs

from dlb_fused import DLBLoss, backends, dlb_loss

MARK = "check: "  # begins each line that gpu_report.py reads


class NotHere(Exception):
    """The check cannot be done here; its text says why."""


@dataclass(frozen=True)
class Subject:
    """One backend on one machine."""

    backend: str
    at: Gpu

    def inputs(self, B: int, C: int, dtype: str) -> Inputs:
        return make_inputs(B, C, dtype, self.at.device)

    def loss(self, x: Inputs, **options: Any) -> Tensor:
        return dlb_loss(*x, backend=self.backend, **OPTIONS | options)  # type: ignore[return-value]

    def step(self, x: Inputs, dloss: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
        loss = self.loss(x, **options)
        return loss.detach(), grad(loss, x.logits, self.scalar(dloss))[0]

    def scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self.at.device)

    def criterion(self, **options: Any) -> DLBLoss:
        return DLBLoss(**OPTIONS, backend=self.backend, **options)

    def launched(self, call: Callable[[], object]) -> Launched:
        return self.at.launched(self.backend, call)


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def hold_to_truth(x: Inputs, loss: Tensor, gradient: Tensor) -> None:
    truth = find_truth(x, "dlb")
    errors = relative_error(loss, truth.loss), relative_error(gradient, truth.gradient)
    allowed = truth.allowed(True, str(gradient.dtype).removeprefix("torch."))
    assert errors[0] <= allowed[0] and errors[1] <= allowed[1], f"errors {errors}"


def warm_up(s: Subject, step: Callable[[], object]) -> None:
    """On a stream of its own, as a capture wants it."""
    s.at.wait()
    with s.at.on(s.at.stream()):
        for _ in range(3):
            step()
    s.at.wait()


# Each check returns its data, `summary` for the table among them, or raises.


def available(s: Subject) -> dict[str, Any]:
    """Whether the backend can run here, and how long its first call takes."""
    reason = backends.why_not(s.backend, torch.empty(1, 1, device=s.at.device))
    if reason is not None:
        raise NotHere(reason)
    x = s.inputs(256, 100, "float32")
    s.at.wait()
    start = time.perf_counter()
    got = s.step(x)
    s.at.wait()
    first = (time.perf_counter() - start) * 1e3
    hold_to_truth(x, *got)
    data: dict[str, Any] = {"first_call_ms": first, "summary": f"first call {first:.0f} ms"}
    if s.backend == "cuda":
        data["architectures"] = backends.load("cuda")._kernel.ARCHITECTURES
    return data


def launches(s: Subject) -> dict[str, Any]:
    """One kernel forward and one backward, nothing else on the device; of very many rows, one
    launch more forward."""
    kernels: dict[str, Any] = {}
    first_record(s, s.inputs(*s.at.cases[0]))
    for B, C, dtype in s.at.cases:
        for what, seen in watch(s, s.inputs(B, C, dtype)).items():
            counts = len(seen.kernels), len(seen.others), len(seen.waits)
            expected = s.at.backward_of_one if what == "backward" else 1
            assert counts == (expected, 0, 0), f"{what} of ({B}, {C}) {dtype}: {seen}"
            kernels[f"{what} {B}x{C} {dtype}"] = seen.kernels
    by_rows = {}
    for B in s.at.many_rows:
        x = s.inputs(B, 10, "float32")
        s.step(x)
        seen = s.launched(partial(s.loss, x))
        by_rows[B] = len(seen.kernels)
        assert 1 <= by_rows[B] <= 2 and not seen.others and not seen.waits, f"B = {B}: {seen}"
    most = max((B for B, count in by_rows.items() if count == 1), default=0)
    summary = f"1 forward, 1 backward; 1 up to {most} rows at least"
    return {"kernels": kernels, "by_rows": by_rows, "summary": summary}


def first_record(s: Subject, x: Inputs) -> None:
    """It may lack something; one without any kernel says that there is nothing to be had."""
    if not s.launched(lambda: (s.step(x), s.step(x, 2.0))).kernels:
        raise NotHere("torch's profiler records no kernels on this machine")


def watch(s: Subject, x: Inputs) -> dict[str, Launched]:
    """What each kind of call launches when all is warm."""
    one, two, m = s.scalar(1.0), s.scalar(2.0), len(x.last_logits)
    s.step(x, 1.0), s.step(x, 2.0)
    seen = {}
    with torch.no_grad():
        s.loss(x)
        seen["forward without gradient"] = s.launched(partial(s.loss, x))
    losses: list[Tensor] = []
    seen["forward"] = s.launched(lambda: losses.append(s.loss(x)))
    backward = partial(grad, losses[0], x.logits, retain_graph=True)
    seen["backward"] = s.launched(partial(backward, one))
    seen["backward again"] = s.launched(partial(backward, one))
    other = s.loss(x)
    seen["backward, dloss 2"] = s.launched(partial(grad, other, x.logits, two))
    for capturable in (False, True):
        criterion = s.criterion(capturable=capturable)
        call = partial(criterion, x.logits, x.labels, overlap=m)
        call(), call()
        # The third: the first, second and fourth also send their counts to the host.
        seen["DLBLoss" + " capturable" * capturable] = s.launched(call)
    return seen


def no_waits(s: Subject) -> dict[str, Any]:
    """From the call to the end of backward, under torch's guard, with settings on the device."""
    B, C, dtype = s.at.cases[1]
    x, m = s.inputs(B, C, dtype), B // 2
    each = torch.full((m,), 2.0, device=s.at.device)
    settings: list[dict[str, Any]] = [
        {},
        {"grad_scale": s.scalar(8.0)},
        {"temperature": s.scalar(2.0), "alpha": s.scalar(0.5)},
        {"temperature": each, "alpha": each},
        {"normalizer": (s.scalar(7.0), s.scalar(3.0)), "label_smoothing": 0.1},
        {"weight": torch.rand(C, device=s.at.device)},
    ]
    dloss = s.scalar(2.0)
    criteria = [s.criterion(), s.criterion(capturable=True)]

    def work() -> None:
        for options in settings:
            grad(s.loss(x, **options), x.logits, dloss)
        for criterion in criteria:
            for _ in range(s.at.repeats):
                grad(criterion(x.logits, x.labels, overlap=m), x.logits, dloss)

    work()
    with s.at.no_waits():
        work()
    steps = len(settings) + 2 * s.at.repeats
    note = "not rehearsed: the guard watches a GPU; " if s.at.rehearsal else ""
    return {"steps": steps, "summary": f"{note}{steps} steps"}


def graph(s: Subject) -> dict[str, Any]:
    """One captured step, replayed 20 times on new data and new dloss, equals 20 eager steps."""
    for n, C, dtype in s.at.chains:
        replay_chain(s, n, C, getattr(torch, dtype))
    return {"replays": 20, "summary": "20 replays have the bits of 20 eager steps"}


def replay_chain(s: Subject, n: int, C: int, dtype: torch.dtype) -> None:
    z = torch.zeros(2 * n, C, device=s.at.device, dtype=dtype).requires_grad_()
    y = torch.zeros(2 * n, dtype=torch.int64, device=s.at.device)
    dloss = s.scalar(1.0)

    def step(criterion: DLBLoss) -> tuple[Tensor, ...]:
        loss = criterion(z, y, overlap=n)
        return loss.detach(), *grad(loss, z, dloss)

    static, eager, plain = (s.criterion(capturable=c) for c in (True, True, False))
    warm_up(s, partial(step, static))
    static.reset()
    replay = s.at.capture(partial(step, static))
    for k, (logits, labels) in enumerate(chain(20, n, C)):
        with torch.no_grad():
            z.copy_(logits), y.copy_(labels), dloss.fill_(1 + k % 2)
        got, want = replay(), step(eager)
        assert same(got, want), f"step {k} in {dtype} has not the bits of an eager step"
        for a, b in zip(got, step(plain), strict=True):
            assert relative_error(a, b.double()) < 1e-5, f"step {k} in {dtype}"
    counts = static.stats()
    assert counts == eager.stats() == (19 * n, 0, n), str(counts)  # the first batch had no teacher


def chain(batches: int, n: int, C: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of batches of n rows of the last one and n fresh ones."""
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, C, (n * (batches + 1),), generator=generator)
    for k in range(batches):
        yield torch.randn(2 * n, C, generator=generator) * 2, labels[k * n : (k + 2) * n]


def side_stream(s: Subject) -> dict[str, Any]:
    """On a stream that is held up, the loss reads what that stream wrote before it."""
    for B, C, dtype in s.at.cases:
        x = s.inputs(B, C, dtype)
        want = *s.step(x), *s.step(x, 2.0)
        late = torch.full_like(x.logits, torch.nan).requires_grad_()
        s.at.wait()
        with s.at.on(s.at.stream()):
            s.at.delay()
            with torch.no_grad():
                late.copy_(x.logits)
            y = x._replace(logits=late)
            got = *s.step(y), *s.step(y, 2.0)
        s.at.wait()
        assert same(got, want), f"({B}, {C}) {dtype}"
    return {"summary": "in the order of the stream"}


def two_streams(s: Subject) -> dict[str, Any]:
    """Two streams at the same time, and a graph beside them, do not meet."""
    B, C, dtype = s.at.cases[1]
    inputs = [s.inputs(B - 2 * k, C, dtype) for k in range(3)]
    want = [s.step(x) for x in inputs]
    third = partial(s.step, inputs[2])
    warm_up(s, third)
    calls: list[Step] = [
        partial(s.step, inputs[0]),
        partial(s.step, inputs[1]),
        s.at.capture(third),
    ]
    streams = [s.at.stream() for _ in calls]
    s.at.wait()
    for stream in streams:
        with s.at.on(stream):
            s.at.delay()  # so that all have work waiting when they begin
    wrong = []
    for _ in range(s.at.repeats):
        for stream, call, right in zip(streams, calls, want, strict=True):
            with s.at.on(stream):
                pairs = zip(call(), right, strict=True)
                wrong.append(torch.stack([(a != b).any() for a, b in pairs]))
    s.at.wait()
    count = int(torch.stack(wrong).sum())
    assert count == 0, f"{count} results of {len(wrong)} steps have other bits"
    return {"steps": len(wrong), "summary": f"{len(wrong)} steps on 3 streams, same bits"}


def second_device(s: Subject) -> dict[str, Any]:
    """A launch on another device than the current one, which stays what it was."""
    if s.at.rehearsal:
        raise NotHere("not rehearsed: a CPU is one device")
    if torch.cuda.device_count() < 2:
        raise NotHere("there is one device")
    x = s.inputs(*s.at.cases[1])
    logits, labels, last_logits = (t.detach().to("cuda:1") for t in x)
    y = Inputs(logits.requires_grad_(), labels, last_logits)
    loss = s.loss(y)
    (gradient,) = grad(loss, y.logits)
    assert torch.cuda.current_device() == 0
    assert same([loss.cpu(), gradient.cpu()], [t.cpu() for t in s.step(x)])
    return {"summary": "the bits of the first device"}


def far_apart(s: Subject) -> dict[str, Any]:
    """Rows that begin beyond 2^31 and beyond 2^32 elements."""
    C, done = 1000, []
    for dtype, beyond in (("float32", 2**31), ("bfloat16", 2**32)):
        x = s.inputs(4, C, dtype)
        for name, rows in (("logits", 4), ("last_logits", 2)):
            step = beyond // (rows - 1) + 8
            wide = s.at.wide((rows - 1) * step + C, x.logits.dtype)
            if wide is None:
                continue
            far = wide.as_strided((rows, C), (step, 1)).copy_(getattr(x, name).detach())
            y = x._replace(**{name: far.requires_grad_(name == "logits")})
            for dloss in (1.0, 2.0):
                loss, gradient = s.step(y, dloss)
                hold_to_truth(x, loss, gradient / dloss)
            done.append(f"{name} {dtype} beyond 2^{beyond.bit_length() - 1}")
            del wide, far, y
    if len(done) < 4:
        raise NotHere(f"too little memory is free: done are {done or 'none'}")
    return {"done": done, "summary": "offsets beyond 2^31 and 2^32"}


def beyond(s: Subject) -> dict[str, Any]:
    """Contiguous logits and gradient of more than 2^32 elements, or 2^31 where memory is short."""
    C, chunk = 128256, 128
    for limit in (2**32, 2**31):
        B = 2 * chunk * (limit // C // (2 * chunk) + 1)
        if s.at.free_bytes() > 2.5 * B * C * 2 + 6e9:
            break
    else:
        if not s.at.rehearsal:
            raise NotHere(f"{2.5 * B * C * 2e-9 + 6:.0f} GB are not free")
        B, C = 2 * chunk, 10
    logits = torch.empty(B, C, dtype=torch.bfloat16, device=s.at.device).normal_(0, 2)
    labels = torch.randint(0, C, (B,), device=s.at.device)
    x = Inputs(logits.requires_grad_(), labels, torch.empty_like(logits[B // 2 :]).normal_(0, 2))
    loss, gradient = s.step(x)
    errors = compare_in_chunks(x, loss, gradient, chunk)
    assert errors[0] < 1e-5 and errors[1] < 2.5e-3, f"errors {errors}"
    note = "not rehearsed in size; " if s.at.rehearsal else ""
    summary = f"{note}{B * C:.3g} elements, error {errors[1]:.1e}"
    return {"B": B, "C": C, "errors": errors, "summary": summary}


def compare_in_chunks(x: Inputs, loss: Tensor, gradient: Tensor, chunk: int) -> tuple[float, float]:
    """Relative errors of loss and gradient against fp64, some rows at a time."""
    B, m, tau = len(x.logits), len(x.last_logits), OPTIONS["temperature"]
    total, off, size = (torch.zeros((), dtype=torch.float64, device=loss.device) for _ in range(3))
    for at in range(0, B, chunk):
        rows = slice(at, at + chunk)
        z = x.logits.detach()[rows].double().requires_grad_()
        part = F.cross_entropy(z, x.labels[rows], reduction="sum") / B
        if at < m:
            log_s, log_q = (F.log_softmax(v / tau, 1) for v in (z, x.last_logits[rows].double()))
            part = part + tau**2 / m * F.kl_div(log_s, log_q, reduction="sum", log_target=True)
        (want,) = grad(part, z)
        total += part.detach()
        off += (gradient[rows] - want).square().sum()
        size += want.square().sum()
    return relative_error(loss, total), float((off / size).sqrt())


def repeatable(s: Subject) -> dict[str, Any]:
    """The same bits in each run, also after other work and over memory that holds NaN."""
    for B, C, dtype in s.at.cases:
        x = s.inputs(B, C, dtype)
        want = *s.step(x), *s.step(x, 2.0)
        for k in range(3):
            other = s.at.cases[k % len(s.at.cases)]
            s.step(s.inputs(*other), 3.0)
            torch.full((4, B, C), torch.nan, device=s.at.device, dtype=x.logits.dtype)
            assert same((*s.step(x), *s.step(x, 2.0)), want), f"({B}, {C}) {dtype}, run {k}"
    return {"summary": f"same bits, {len(s.at.cases)} shapes"}


def at_once(s: Subject) -> dict[str, Any]:
    """Backward with dloss 1 returns at once; with another it computes anew."""
    x = s.inputs(*s.at.large)
    us = {}
    first_record(s, x)
    for dloss in (1.0, 2.0):
        runs = []
        for _ in range(3):
            backward = partial(grad, s.loss(x), x.logits, s.scalar(dloss))
            runs.append(sum(kernel.us for kernel in s.launched(backward).kernels))
        us[dloss] = sorted(runs)[1]
    assert (us[1.0] > 0 or s.at.rehearsal) and us[1.0] < us[2.0] / 3, f"kernel time {us} µs"
    summary = f"{us[1.0]:.1f} µs, anew {us[2.0]:.0f} µs"
    return {"us_dloss_1": us[1.0], "us_dloss_2": us[2.0], "shape": s.at.large, "summary": summary}


def memory(s: Subject) -> dict[str, Any]:
    """At the peak, beyond the inputs: the gradient, and with DLBLoss the cache of half the rows."""
    x = s.inputs(*s.at.large)
    unit = x.logits.numel() * x.logits.element_size()
    criterion = s.criterion()
    m = len(x.last_logits)

    def module() -> None:
        grad(criterion(x.logits, x.labels, overlap=m), x.logits)

    peaks = []
    for call in (partial(s.step, x), module):
        call(), call()
        peaks.append(peak_memory(call, s.at.device) / unit)
    slack = s.at.memory_slack
    assert peaks[0] < 1 + slack and peaks[1] < 1.5 + slack, f"{peaks} of the logits"
    return {"of_logits": peaks, "summary": "{:.3f} and {:.3f} of the logits".format(*peaks)}


def fp16(s: Subject) -> dict[str, Any]:
    """Under a loss scale, announced or not, nothing that fp16 can hold becomes zero."""
    scale = 65536.0
    x = s.inputs(*s.at.fp16)
    want = find_truth(x, "dlb").gradient * scale
    bound = max(3e-4, 1.01 * relative_error(want.half(), want))
    held = want.abs() >= 2.0**-24
    error = {}
    for how, options in (("grad_scale", {"grad_scale": scale}), ("dloss alone", {})):
        _, gradient = s.step(x, scale, **options)
        flushed = int(((gradient == 0) & held).sum())
        error[how] = relative_error(gradient, want)
        assert flushed == 0 and error[how] <= bound, f"{how}: {flushed} zeros, error {error[how]}"
    plain = s.step(x)[1]
    zeros = float(((plain == 0) & (want != 0)).double().mean())
    summary = f"none of them 0, error {max(error.values()):.0e}; unscaled {zeros:.0%} are 0"
    return {"errors": error, "zeros_unscaled": zeros, "summary": summary}


def host_cost(s: Subject) -> dict[str, Any]:
    """Host time of a step, forward and backward, above that of a Function that does nothing."""
    x = s.inputs(8, 10, "float32")
    settings = Settings([], s.at.device, torch.get_num_threads(), quick=s.at.rehearsal)
    ours, nothing = (bench_loss.timed_step(make(x)) for make in (partial(fused, s.backend), empty))
    calls = {"ours": ours, EMPTY.name: nothing}
    samples = bench_loss.sample(calls, settings, bench_loss.clock_of(HOST, s.at.device))
    found = bench_loss.timing("ours", samples, dict.fromkeys(calls, 0))
    above = found.above[EMPTY.name]
    note = "not rehearsed in size; " if s.at.rehearsal else ""
    return {"us": found.median_us, "us_above": above, "summary": f"{note}{above:.1f} µs (bar: 20)"}


def other_cuda(s: Subject) -> dict[str, Any]:
    """A module whose CUDA differs from torch's: then all other checks have proven that."""
    if s.backend != "cuda":
        raise NotHere("only the compiled module has a CUDA version of its own")
    from dlb_fused import cuda_backend

    runtime, driver = cuda_backend._kernel.versions()
    ours, theirs = f"{runtime // 1000}.{runtime % 1000 // 10}", torch.version.cuda
    if s.at.rehearsal:
        raise NotHere("not rehearsed: this torch has no CUDA")
    if ours == theirs:
        raise NotHere(f"both have CUDA {ours}: a build with another one remains to be tried")
    return {"module": ours, "torch": theirs, "driver": driver, "summary": f"{ours} in {theirs}"}


def fork(s: Subject) -> dict[str, Any]:
    """Importing the package and asking what can run touches no device: a child can still use it."""
    command = [sys.executable, __file__, "fork", s.backend, *["--rehearse"] * s.at.rehearsal]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    says = (done.stderr.strip() or "no message").splitlines()[-1]
    assert done.returncode == 0, f"the child ends with {done.returncode}: {says}"
    return {"summary": "a child of the importing process computes"}


CHECKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    check.__name__: check
    for check in (available, launches, no_waits, graph, side_stream, two_streams, second_device,
                  far_apart, beyond, repeatable, at_once, memory, fp16, host_cost, fork, other_cuda)
}  # fmt: skip


def run_checks(s: Subject, names: Sequence[str]) -> int:
    """Prints one line of JSON for each; 1 after the first that fails."""
    for name in names:
        start = time.perf_counter()
        result: dict[str, Any] = {"name": name, "status": "ok", "reason": ""}
        try:
            result["data"] = CHECKS[name](s)
            result["summary"] = result["data"].pop("summary")
        except NotHere as why:
            result |= {"status": "skipped", "reason": str(why)}
        except Exception as error:
            result |= {"status": "failed", "reason": in_a_line(error)}
        result["seconds"] = time.perf_counter() - start
        print(MARK + json.dumps(result), flush=True)
        if result["status"] == "failed":
            return 1
    return 0


def in_a_line(error: Exception) -> str:
    """With the last place of ours on its way."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [(Path(frame.filename), frame.lineno) for frame in frames]
    place, line = [at for at in names if ROOT in at[0].parents][-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:600]} ({place.name}:{line})"


def probe(s: Subject, traffic: bool, planted: bool) -> None:
    """Launches to be watched from outside: forward and backward of small shapes; with `traffic`
    one forward of each large one, marked; with `planted` one that reads beyond its labels."""
    if planted:
        B, C = 8, 100
        x = s.inputs(B, C, "float32")
        short = x.labels[: B - 1].clone()
        args = backends.LossArgs(x.logits.detach(), short)
        backends.load(s.backend).forward(args)
        s.at.wait()
        return
    for B, C, dtype in s.at.traffic if traffic else s.at.probes:
        x = s.inputs(B, C, dtype)
        s.loss(x)
        if traffic:
            with s.at.profiled():
                s.loss(x)
            print(MARK + json.dumps({"shape": (B, C, dtype), **ideal(x)}), flush=True)
            continue
        s.step(x), s.step(x, 2.0)
        for capturable in (False, True):
            criterion = s.criterion(capturable=capturable)
            for _ in range(2):
                grad(criterion(x.logits, x.labels, overlap=B // 2), x.logits)
        s.at.wait()
    print(MARK + json.dumps({"done": True}), flush=True)


def ideal(x: Inputs) -> dict[str, int]:
    """Bytes of a forward with gradient: each input once, each output once."""
    B, C = x.logits.shape
    read, all_of_it = (
        ideal_bytes(B, C, len(x.last_logits), x.logits.element_size(), backward=backward)
        for backward in (False, True)
    )
    return {"ideal_read": read, "ideal_written": all_of_it - read}


def compute_in_a_child(s: Subject) -> int:
    """Imports all, asks what can run, forks; the child computes and says so by its exit status."""
    backends.why_not(s.backend, torch.empty(1, 1))
    assert not torch.cuda.is_initialized(), "asking what can run began to use the device"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            x = s.inputs(4, 10, "float32")
            hold_to_truth(x, *s.step(x))
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("check", "probe", "fork"):
        add = modes.add_parser(mode).add_argument
        add("backend", choices=list(backends.BACKENDS))
        add("--rehearse", action="store_true")
        if mode == "check":
            add("names", nargs="*", metavar="NAME")
        if mode == "probe":
            add("--traffic", action="store_true")
            add("--planted", action="store_true")
    o = parser.parse_args(argv)
    s = Subject(o.backend, Rehearsal() if o.rehearse else Gpu())
    if o.rehearse and o.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which is later
    with rehearsing(o.backend if o.rehearse else ""):
        if o.mode == "check":
            return run_checks(s, o.names or list(CHECKS))
        if o.mode == "fork":
            return compute_in_a_child(s)
        probe(s, o.traffic, o.planted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
