"""What torch.compile makes of the loss for a GPU, counted without one: `make compiled`.

    python benchmarks/compiled_traffic.py [--check] [--device cuda]

For forward and backward of the naive loss, and of `F.cross_entropy` alone: how many kernels
Inductor's code launches, and how many bytes of memory that code names. Written to
benchmarks/results/compiled.{json,md}. --check writes nothing and fails if the small cases have
changed. --device cuda compiles the same on a GPU and counts the kernels that a profiler sees there.

How, without a GPU: torch.compile traces and differentiates the loss with fake tensors on the CPU.
Each of its two graphs is moved to a fake GPU with the facts of an H200, and given to Inductor's own
code generation. Where that would load the Triton kernels, they are recorded; then the code that it
wrote runs once with fake tensors, which shows each launch with the sizes of its arguments.

Bytes: a load of a kernel counts as many elements as its index takes values, but at most the tensor.
"once" takes each tensor once a kernel, as if caches served every further load of it in the same
kernel; "in all" takes each load. What memory moves lies between the two, unless a whole tensor
stays in the L2 from kernel to kernel. So nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from report import ROOT
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dlb_fused.reference import dlb_loss_naive

RESULTS = ROOT / "benchmarks" / "results"
MARK = "check: "  # begins each line that gpu_report.py reads
WRITTEN_FOR = "2.13"  # of torch: the code below knows its inside

Shape = tuple[int, int, str]  # B, C, dtype
SHAPES: list[Shape] = [
    (256, 100, "float32"), (256, 1000, "float32"), (512, 21841, "float32"),
    (64, 128256, "float32"), (4096, 32000, "bfloat16"), (4096, 50257, "bfloat16"),
]  # fmt: skip
SMALL = SHAPES[:2]

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448,
)  # fmt: skip

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "naive DLB": dlb_loss_naive,
    "cross_entropy": lambda logits, labels, last_logits: F.cross_entropy(logits, labels),
}


def make_inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, C), labels (B,), last_logits (B/2, C); nobody looks at the values."""
    B, C, dtype = shape
    options: Any = {"dtype": getattr(torch, dtype), "device": device}
    logits, last_logits = torch.empty(B, C, **options), torch.empty(B // 2, C, **options)
    return logits.requires_grad_(), torch.zeros(B, dtype=torch.int64, device=device), last_logits


def ideal_bytes(shape: Shape, loss: str) -> int:
    """Each matrix of C columns read once, and the gradient written once."""
    B, C, dtype = shape
    rows = 2 * B if loss == "cross_entropy" else 2 * B + B // 2
    return rows * C * getattr(torch, dtype).itemsize


# ---- Inductor's code for a GPU that is not there ------------------------------------------------


class Launch(NamedTuple):
    name: str
    source: str
    args: tuple[Any, ...]


class Recorder:
    """In the place of a loaded kernel."""

    launches: list[Launch]

    def __init__(self, launches: list[Launch], name: str, source: str) -> None:
        self.launches, self.name, self.source = launches, name, source

    def run(self, *args: Any, stream: int) -> None:
        self.launches.append(Launch(self.name, self.source, args))


@contextmanager
def pretended_gpu(launches: list[Launch]) -> Iterator[None]:
    """torch and Triton find an H200; kernels that are loaded enter their launches."""
    import torch._dynamo.device_interface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    asked = {
        "get_device_properties": lambda device=None: H200,
        "current_device": lambda: 0,
    }
    of_torch = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (H200.major, H200.minor),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "set_device": lambda _: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * H200.major, H200.warp_size),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    patches = [
        mock.patch.multiple(torch.cuda, **asked, **of_torch),
        mock.patch.multiple(
            torch._dynamo.device_interface.CudaInterface,
            **{name: staticmethod(function) for name, function in asked.items()},
        ),
        mock.patch.object(driver, "_active", target),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
        mock.patch(
            "torch._inductor.async_compile.AsyncCompile.triton",
            lambda _, name, source, device_str="cuda": Recorder(launches, name, source),
        ),
        # It finds out the result's shape, that of `inp`, by a copy that needs a real device.
        mock.patch(
            "torch._inductor.fx_passes.reinplace._inplace_generalized_scatter",
            lambda inp, src, views: inp,
        ),
    ]
    has_triton.cache_clear()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
    has_triton.cache_clear()


def launches_of(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> list[Launch]:
    """What Inductor's code for one graph launches, if all that is on the CPU were on a GPU."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    graph, device = copy.deepcopy(graph), torch.device("cuda", 0)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
    graph.recompile()
    mode = next(x.fake_mode for x in inputs if isinstance(x, Tensor))  # type: ignore[attr-defined]

    def empty_strided(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    launches: list[Launch] = []
    modules = []
    load = GraphLowering.compile_to_module

    def load_and_keep(lowering: GraphLowering) -> Any:
        modules.append(load(lowering))
        return modules[-1]

    keep = mock.patch.object(GraphLowering, "compile_to_module", load_and_keep)
    with pretended_gpu(launches), keep:
        with mode:
            inputs = [
                empty_strided(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x
                for x in inputs
            ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        compile_fx_inner(graph, inputs, **options)
        (module,) = modules
        vars(module).update(empty_strided_cuda=empty_strided, copy_if_misaligned=lambda x: x)
        with mode:
            module.call(list(inputs))
    return launches


def compile_for_gpu(loss: Loss, shape: Shape) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward and backward."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_cache
    from torch._subclasses import FakeTensorMode

    graphs: list[list[Launch]] = []

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        graphs.append(launches_of(graph, inputs, **options))
        return make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    torch.compiler.reset()
    no_caches = config.patch(fx_graph_cache=False, fx_graph_remote_cache=False, compile_threads=1)
    with no_caches, fresh_cache(), FakeTensorMode():
        torch.compile(loss, backend=backend, fullgraph=True)(*make_inputs(shape, "cpu")).backward()
    forward, backward = graphs
    return forward, backward


# ---- what the kernels read and write ------------------------------------------------------------

ACCESS = re.compile(
    r"tl\.(load|store|atomic_\w+)\((\w+) \+ (.*)"
)  # pointer, and its index to the end
NUMEL = re.compile(r"^ +([xyz]|r\d_)numel = (\d+)$", re.M)
VARIABLE = re.compile(r"^ +(([xyz]|r\d_)\d+) = (.*index.*)$", re.M)


class Kernel(NamedTuple):
    """Bytes that one launch names."""

    name: str
    read_once: int
    read: int
    written: int


def ranges_of(source: str) -> dict[str, int]:
    """How many values each index variable of a kernel takes: x0 = (xindex // 3) % 128, say."""
    numels = {axis: int(numel) for axis, numel in NUMEL.findall(source)}
    ranges = {}
    for name, axis, formula in VARIABLE.findall(source):
        values = numels[axis]
        for operator, number in re.findall(r"(//|%) (\d+)", formula):
            values = -(-values // int(number)) if operator == "//" else min(values, int(number))
        ranges[name] = values
    return ranges


def traffic_of(launch: Launch) -> Kernel:
    """From the source of the kernel and the tensors that it was given."""
    (head,) = re.findall(rf"def {launch.name}\((.*?)\):", launch.source)
    tensors = dict(zip(head.split(", "), launch.args, strict=False))
    ranges = ranges_of(launch.source)
    loads: dict[str, list[int]] = {}
    stores: dict[str, int] = {}
    for kind, pointer, index in ACCESS.findall(launch.source):
        values = math.prod(ranges[name] for name in ranges if re.search(rf"\b{name}\b", index))
        size = min(values, tensors[pointer].numel()) * tensors[pointer].element_size()
        if kind == "load":
            loads.setdefault(pointer, []).append(size)
        elif kind == "store":
            stores[pointer] = max(size, stores.get(pointer, 0))
        else:
            raise NotImplementedError(f"{launch.name} has {kind}, which is not counted yet")
    # What a kernel wrote itself is no input: "out_ptr0", but not "in_out_ptr0".
    once = sum(max(sizes) for pointer, sizes in loads.items() if not pointer.startswith("out"))
    return Kernel(launch.name, once, sum(map(sum, loads.values())), sum(stores.values()))


# ---- the study ----------------------------------------------------------------------------------


def study(loss: str, shape: Shape) -> dict[str, Any]:
    """One line of the table, with its kernels."""
    B, C, dtype = shape
    found = compile_for_gpu(LOSSES[loss], shape)
    forward, backward = ([traffic_of(launch) for launch in launches] for launches in found)
    both = forward + backward
    read_once, read, written = (
        sum(getattr(kernel, what) for kernel in both) for what in ("read_once", "read", "written")
    )
    ideal = ideal_bytes(shape, loss)
    return {
        "loss": loss, "B": B, "C": C, "dtype": dtype,
        "kernels_forward": len(forward), "kernels_backward": len(backward),
        "read_once": read_once, "read": read, "written": written, "ideal": ideal,
        "ratio_once": round((read_once + written) / ideal, 2),
        "ratio": round((read + written) / ideal, 2),
        "forward": [kernel._asdict() for kernel in forward],
        "backward": [kernel._asdict() for kernel in backward],
    }  # fmt: skip


def our_launches(shape: Shape) -> list[int]:
    """Of `dlb_loss` with the backend triton, forward and backward, as it would make them."""
    from dlb_fused import gpu_memory, triton_backend
    from dlb_fused.backends import LossArgs

    logits, labels, last_logits = make_inputs(shape, "cpu")
    args = LossArgs(logits.detach(), labels, last_logits, len(last_logits), need_grad=True)
    forward = triton_backend.forward_launches(args, gpu_memory.outputs(args))
    return [len(forward), 1]  # `backward_launch` makes one


COLUMNS = ("loss", "dtype", "B×C", "kernels", "dlb_loss", "read MB", "written MB", "ideal MB",
           "moved / ideal")  # fmt: skip


def cells(row: dict[str, Any], ours: Sequence[int]) -> list[str]:
    def mb(size: float) -> str:
        return f"{size * 1e-6:.3g}" if size < 1e9 else f"{size * 1e-6:.0f}"

    def span(low: str, high: str) -> str:
        return low if low == high else f"{low} to {high}"

    return [
        row["loss"], row["dtype"], f"{row['B']}×{row['C']}",
        f"{row['kernels_forward']} + {row['kernels_backward']}",
        f"{ours[0]} + {ours[1]}" if row["loss"] != "cross_entropy" else "",
        span(mb(row["read_once"]), mb(row["read"])), mb(row["written"]), mb(row["ideal"]),
        span(f"{row['ratio_once']:.1f}", f"{row['ratio']:.1f}"),
    ]  # fmt: skip


def page(data: dict[str, Any]) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [cells(row, data["ours"][name_of(row)]) for row in data["results"]]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""# What torch.compile makes of the loss for a GPU

Made by `make compiled` with torch {data["torch"]} and triton {data["triton"]}, for {data["gpu"]}.
**Nothing here ran on a GPU, and nothing is a measurement**: kernels are those that Inductor's code
launches, bytes are those that its kernels name. `benchmarks/compiled_traffic.py` says how they are
counted, and `--device cuda` counts the kernels on a GPU. Other versions of torch may differ.

{table}

- *loss*: forward and backward of `dlb_loss_naive` (cross-entropy of B rows, KL of B/2), or of
  `F.cross_entropy` alone, each as one graph under `torch.compile`, default mode.
- *kernels*: launches, forward + backward. *dlb_loss*: those of `dlb_loss` itself, backend `triton`.
- *read*: each tensor once a kernel, as if caches served all else, to every load that is in the
  code. *moved / ideal* is with what is written.
- *ideal*: logits and last_logits read once and the gradient written once, 5·n·C·b for n = B/2 and b
  bytes an element; of `F.cross_entropy` 4·n·C·b. `dlb_loss` moves that, as its tests count.
- Small shapes stay in the L2 from kernel to kernel: there the number of kernels decides, not bytes.
"""


def table_of(data: dict[str, Any]) -> Table:
    table = Table(title=f"Inductor's kernels for {data['gpu']}: counted, not run")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("loss", "dtype") else "right")
    for row in data["results"]:
        table.add_row(*cells(row, data["ours"][name_of(row)]))
    return table


def name_of(shape: Shape | dict[str, Any]) -> str:
    B, C, dtype = (shape[key] for key in ("B", "C", "dtype")) if isinstance(shape, dict) else shape
    return f"{B}x{C} {dtype}"


def compute(shapes: Sequence[Shape], console: Console) -> dict[str, Any]:
    cases = [(loss, shape) for loss in LOSSES for shape in shapes]
    work = track(cases, "compiling", console=console, transient=True)
    return {
        **versions(),
        "gpu": H200.name,
        "ours": {name_of(shape): our_launches(shape) for shape in shapes},
        "results": [study(*case) for case in work],
    }


def load_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((RESULTS / "compiled.json").read_text())
    return table


def save(data: dict[str, Any], folder: Path) -> None:
    results = ",\n".join("  " + json.dumps(row) for row in data["results"])
    head = json.dumps({key: value for key, value in data.items() if key != "results"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compiled.json").write_text(f'{head[:-1]},\n"results": [\n{results}\n]}}\n')
    (folder / "compiled.md").write_text(page(data))


def differences(data: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """Of what was computed now from the tracked table."""
    found = []
    for row in data["results"]:
        old = next((r for r in table["results"] if is_same_case(r, row)), None)
        if old != row:
            found.append(f"{row['loss']} {name_of(row)}: {counts(row)}, in the table {counts(old)}")
        if data["ours"][name_of(row)] != table["ours"].get(name_of(row)):
            found.append(f"dlb_loss {name_of(row)}: other launches than in the table")
    return found


def is_same_case(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return all(one[key] == two[key] for key in ("loss", "B", "C", "dtype"))


def counts(row: dict[str, Any] | None) -> str:
    if row is None:
        return "nothing"
    return " ".join(f"{key} {value}" for key, value in row.items() if isinstance(value, int))


# ---- the same on a GPU --------------------------------------------------------------------------


def confirm(shapes: Sequence[Shape], rehearse: bool) -> Iterator[dict[str, Any]]:
    """For each case the kernels that a profiler sees, beside those of the table."""
    from gpu_machine import Gpu, Rehearsal

    table = load_table()["results"]
    for name, loss in LOSSES.items():
        for B, C, dtype in shapes:
            torch.compiler.reset()
            compiled = torch.compile(loss, backend="aot_eager" if rehearse else "inductor")
            row: dict[str, Any] = {"loss": name, "B": B, "C": C, "dtype": dtype, "predicted": None}
            old = next((r for r in table if is_same_case(r, row)), None)
            if old is not None:
                row["predicted"] = [old["kernels_forward"], old["kernels_backward"]]
            yield row | count(compiled, (B, C, dtype), Rehearsal() if rehearse else Gpu())


def count(loss: Loss, shape: Shape, at: Any) -> dict[str, Any]:
    inputs = make_inputs(shape, at.device)
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [loss(*inputs)]

    def backward() -> None:
        torch.autograd.grad(kept[0], inputs[0], upstream)

    forward()
    upstream = torch.ones_like(kept[0])
    backward()
    at.launched("", forward)  # the first record may lack something
    forward_seen, backward_seen = at.launched("", forward), at.launched("", backward)
    return {
        "counted": [len(forward_seen.kernels), len(backward_seen.kernels)],
        "others": [*forward_seen.others, *backward_seen.others],
        "us": [sum(k.us for k in seen.kernels) for seen in (forward_seen, backward_seen)],
    }


# ---- the command --------------------------------------------------------------------------------


def why_not_here(check: bool) -> str | None:
    """Why the code for a GPU cannot be had with this torch."""
    if ".".join(torch.__version__.split(".")[:2]) != WRITTEN_FOR:
        return f"this is written for the inside of torch {WRITTEN_FOR}, found {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    table, here = load_table() if check else {}, versions()
    if check and any(table[name] != here[name] for name in here):
        return f"the table is of {[table[name] for name in here]}, here is {list(here.values())}"
    return None


def versions() -> dict[str, str]:
    """Without what says how torch was built."""
    import triton

    return {"torch": torch.__version__.split("+")[0], "triton": triton.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--check", action="store_true", help="compute the small cases, and compare with the table")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: count on a GPU")
    add("--rehearse", action="store_true", help="with cuda: the same code on a CPU, counts nothing")
    add("--out", type=Path, default=RESULTS, help="folder for compiled.json and compiled.md")
    o = parser.parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    if o.device == "cuda":
        if not o.rehearse and not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device")
        for row in confirm([(8, 10, "float32")] if o.rehearse else SHAPES, o.rehearse):
            print(MARK + json.dumps(row), flush=True)
        return 0
    if reason := why_not_here(o.check):
        console.print(f"not here: {reason}", markup=False)
        return 2
    data = compute(SMALL if o.check else SHAPES, console)
    console.print(table_of(data))
    if o.check:
        found = differences(data, load_table())
        console.print("\n".join(found) or "as in the table", markup=False)
        return int(bool(found))
    save(data, o.out)
    console.print(f"written: {o.out / 'compiled.json'} and the same as .md", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
