"""The machine of the checks: a GPU, or in a rehearsal a CPU that stands in for it.

How to watch what one call makes the device do, streams, graphs, memory, and the sizes to ask for.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from report import ROOT
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

Step = Callable[[], tuple[Tensor, ...]]
Case = tuple[int, int, str]  # B, C, dtype


class Kernel(NamedTuple):
    name: str
    us: float


class Launched(NamedTuple):
    """What one call made the device do."""

    kernels: list[Kernel]
    others: list[str]  # copies and fills
    waits: list[str]  # calls in which the host waits for the device


def read_trace(events: list[dict[str, Any]]) -> Launched:
    """From the events of a Chrome trace in which `watched` marks the call."""
    (call,) = (e for e in events if e.get("cat") == "user_annotation" and e["name"] == "watched")
    host = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    host = [e for e in host if 0 <= e["ts"] - call["ts"] <= call["dur"]]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device.sort(key=lambda e: e["ts"])
    return Launched(
        [Kernel(e["name"], e["dur"]) for e in device if e["cat"] == "kernel"],
        [e["name"] for e in device if e["cat"] != "kernel"],
        [e["name"] for e in host if "Synchronize" in e["name"] or e["name"] == "cudaMemcpy"],
    )


class Gpu:
    device = "cuda"
    rehearsal = False
    # From short rows to a row in many blocks. All have the same few C: Triton compiles for each.
    cases: tuple[Case, ...] = (
        (256, 100, "float32"), (256, 1000, "bfloat16"), (64, 8192, "bfloat16"),
        (64, 50257, "bfloat16"), (16, 262144, "bfloat16"),
    )  # fmt: skip
    probes: tuple[Case, ...] = (
        (8, 10, "float32"), (8, 100, "float32"), (6, 101, "bfloat16"), (4, 1000, "bfloat16"),
        (4, 8192, "bfloat16"), (2, 50257, "bfloat16"), (2, 262144, "bfloat16"),
    )  # fmt: skip
    traffic: tuple[Case, ...] = (
        (65536, 1000, "bfloat16"), (16384, 8192, "bfloat16"), (2048, 50257, "bfloat16"),
        (512, 262144, "bfloat16"),
    )  # fmt: skip
    many_rows: tuple[int, ...] = (1024, 8192, 65536, 262144)
    large: Case = (16384, 8192, "bfloat16")
    fp16: Case = (64, 32000, "float16")
    chains: tuple[Case, ...] = ((128, 1000, "float32"), (128, 1000, "bfloat16"))  # fresh rows, ...
    repeats = 50
    backward_of_one = 1  # launches
    memory_slack = 0.02

    def launched(self, backend: str, call: Callable[[], object]) -> Launched:
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with record_function("watched"):
                call()
            self.wait()
        with tempfile.TemporaryDirectory() as folder:
            seen.export_chrome_trace(f"{folder}/trace.json")
            return read_trace(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def wait(self) -> None:
        torch.cuda.synchronize()

    def stream(self) -> Any:
        return torch.cuda.Stream()

    def on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def delay(self) -> None:
        """Holds up the current stream for some ten milliseconds."""
        torch.cuda._sleep(20_000_000)

    def capture(self, step: Step) -> Step:
        """The step as a graph; each call replays it, into the same tensors."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return out

        return replay

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """What a profiler that was started with the program should look at."""
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)  # its kernel marks where one case ends and the next begins
        yield
        self.wait()
        torch.cuda.profiler.stop()

    def free_bytes(self) -> float:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def wide(self, elements: int, dtype: torch.dtype) -> Tensor | None:
        """So many elements, of which few are used; None if there is no room."""
        if self.free_bytes() < elements * dtype.itemsize + 2e9:
            return None
        return torch.empty(elements, dtype=dtype, device=self.device)


class Rehearsal(Gpu):
    """A CPU in its place, with small sizes; launches are counted where they are made."""

    device = "cpu"
    rehearsal = True
    cases = ((8, 10, "float32"), (6, 101, "bfloat16"), (2, 9001, "float32"))
    probes = cases
    traffic = cases
    many_rows = (64,)
    large = (8, 8192, "bfloat16")
    fp16 = (16, 2000, "float16")
    chains = ((4, 33, "bfloat16"),)
    repeats = 2
    backward_of_one = 0  # the host sees that dloss is 1 where it holds that number
    memory_slack = 0.2  # Triton's interpreter has tensors of its own

    def launched(self, backend: str, call: Callable[[], object]) -> Launched:
        kernels: list[Kernel] = []
        with counted(backend, kernels):
            call()
        return Launched(kernels, [], [])

    def no_waits(self) -> Any:
        return contextlib.nullcontext()

    def wait(self) -> None:
        pass

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def delay(self) -> None:
        pass

    def capture(self, step: Step) -> Step:
        return step

    def profiled(self) -> Any:
        return contextlib.nullcontext()

    def free_bytes(self) -> float:
        return 0

    def wide(self, elements: int, dtype: torch.dtype) -> Tensor | None:
        """Of pages that are never touched, but for those of the rows."""
        return torch.tensor([], dtype=dtype).set_(torch.UntypedStorage(elements * dtype.itemsize))


@contextlib.contextmanager
def counted(backend: str, kernels: list[Kernel]) -> Iterator[None]:
    """Notes the launches of a backend in a rehearsal, and the time of the call that made them."""
    if backend == "cuda":
        from dlb_fused import cuda_backend

        owner: Any = type(cuda_backend._kernel)
        name, last = "_call", lambda: len(cuda_backend._kernel.calls[-1].launches)
    else:
        from dlb_fused import triton_backend as owner

        name, last = "_run", lambda: 1
    launch = getattr(owner, name)

    def noted(*args: Any) -> Any:
        start = time.perf_counter()
        out = launch(*args)
        us = (time.perf_counter() - start) * 1e6
        kernels.extend([Kernel(backend, us / last())] * last())
        return out

    with mock.patch.object(owner, name, noted):
        yield


@contextlib.contextmanager
def rehearsing(backend: str) -> Iterator[None]:
    """The backend takes CPU tensors: Triton's interpreter, or the CUDA source in its simulator."""
    sys.path.insert(0, str(ROOT / "tests"))
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            from interpreter import faithful

            stack.enter_context(faithful())
        if backend == "cuda":
            import simulated

            stack.enter_context(simulated.backend())
        yield
