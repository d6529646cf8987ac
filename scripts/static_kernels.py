"""The kernels of both GPU backends, compiled without a GPU, and what their machine code needs.

The Triton kernels are compiled as the run-time dispatch launches them, the CUDA kernels as setup.py
compiles them.

How instructions are counted. Hot is the code that computes exponentials (MUFU.EX2). Of a loop it is
the path through one iteration with the most 16-byte accesses, and of those the shortest: the
label's vector and the ragged ends of a row are left out, every optional copy is in. Of a row that
stays in registers it is the longest path through the side of the branch for its kind of row, with
the reductions over threads. Predicated instructions count whether they run or not. The count is
divided by the elements of one row that a thread works on there, and the passes over a row add up.
What else a row costs does not grow with it: labels, counts, the end of a row.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import sass
import torch
import triton
from sass import Frame, Graph, Instruction, Kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from dlb_fused import gpu_memory, triton_backend, triton_kernels
from dlb_fused.backends import LossArgs
from dlb_fused.triton_backend import Launch

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (90, 80, 100, 120)  # the first one is the H200's
ITEM = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
EX2 = r"MUFU\.EX2"

Work = dict[str, dict[str, list[float]]]  # kind of row -> pass -> instructions and EX2 an element


class Entry(NamedTuple):
    """A kernel for one architecture."""

    backend: str
    form: str
    dtype: str
    capability: int
    threads: int
    registers: int
    spills: int
    shared: int  # bytes
    blocks: int  # a multiprocessor
    loads: dict[str, int]  # of rows from global memory: bits -> how many in the code
    stores: dict[str, int]
    narrow: int  # of these, those that should be wider
    work: Work

    @property
    def key(self) -> str:
        return f"{self.backend}, {self.form}, {self.dtype}, sm_{self.capability}"

    @property
    def occupancy(self) -> float:
        return self.blocks * self.threads / sass.LIMITS[self.capability].threads

    def total(self, kind: str) -> tuple[float, float]:
        """Instructions and EX2 an element, of all passes."""
        passes = self.work[kind].values()
        return sum(i for i, _ in passes), sum(ex2 for _, ex2 in passes)


# ---- counting ----


def accesses(code: Iterable[Instruction], *spaces: str) -> Counter[int]:
    """Bits -> how many."""
    found = filter(None, map(sass.access, code))
    return Counter(bits for where, bits in found if where in spaces)


def moved(code: Iterable[Instruction], *spaces: str) -> int:
    """Bytes."""
    return sum(bits * n for bits, n in accesses(code, *spaces).items()) // 8


GLOBAL = ("global load", "copy to shared", "global store")


def narrow(found: Counter[int]) -> int:
    return sum(n for bits, n in found.items() if bits < 128)


def as_text(found: Counter[int]) -> dict[str, int]:
    return {str(bits): n for bits, n in sorted(found.items())}


def hot_loops(
    graph: Graph, ragged: Callable[[Instruction], bool] = lambda one: False
) -> list[list[Instruction]]:
    """The usual path through each loop that computes exponentials, or moves 16 bytes at a time.

    ragged: an access is of a single element, at an end of a row or at the label, as few vectors of
    it need.
    """

    def weight(code: list[Instruction]) -> tuple[int, ...]:
        found = [one for one in code if sass.access(one)]
        wide = sum(n for bits, n in accesses(found, *GLOBAL).items() if bits >= 128)
        ends = sum(map(ragged, found))
        return wide, -ends, len(found) - ends, -len(code)

    paths = (graph.code(graph.path(loop, weight)) for loop in graph.loops)
    wide = (*GLOBAL, "shared load")
    return [code for code in paths if sass.count(code, EX2) or accesses(code, *wide)[128]]


class Pass(NamedTuple):
    """A piece of hot code, for one kind of row, and how many elements of a row it works on."""

    kind: str
    step: str
    code: list[Instruction]
    elements: float

    @property
    def cost(self) -> list[float]:
        instructions = len(self.code) - sass.count(self.code, "NOP")
        return [round(n / self.elements, 2) for n in (instructions, sass.count(self.code, EX2))]


def work_of(passes: list[Pass]) -> Work:
    """Of loops that do the same, the one with most elements: another is the rest of unrolling."""
    work: Work = {}
    for one in sorted(passes, key=lambda one: one.elements):
        work.setdefault(one.kind, {})[one.step] = one.cost
    return work


# ---- Triton ----

B, M = 32, 16  # rows, and those with a teacher


def arguments(C: int, dtype: torch.dtype, **options: Any) -> LossArgs:
    z = torch.empty(B, C, dtype=dtype)
    labels = torch.zeros(B, dtype=torch.int64)
    given: dict[str, Any] = {"overlap": M, "need_grad": True}
    given["last_logits"] = torch.empty(M, C, dtype=dtype)
    return LossArgs(z, labels, **(given | options))


def step_of_the_module(C: int, dtype: torch.dtype) -> LossArgs:
    """With guard, statistics and cache."""
    return arguments(
        C,
        dtype,
        last_labels=torch.zeros(M, dtype=torch.int64),
        last_valid=torch.zeros(M, dtype=torch.uint8),
        stats=torch.zeros(3, dtype=torch.int64),
        fresh=B - M,
    )


def forward(args: LossArgs) -> Launch:
    return triton_backend.forward_launches(args, gpu_memory.outputs(args))[-1]


def backward(args: LossArgs) -> Launch:
    real = torch.float64 if args.logits.dtype == torch.float64 else torch.float32
    into = torch.empty_like(args.logits)
    parts, dloss = torch.empty(4, dtype=real), torch.empty((), dtype=real)
    return triton_backend.backward_launch(args, parts, dloss, into, False)


def rescale(args: LossArgs) -> Launch:
    return triton_backend.rescale_launch(args.logits, torch.empty(()), 1.0)


def count(args: LossArgs) -> Launch:
    """The small launch before that of a large batch."""
    rows = 1 << 14
    large = args._replace(
        logits=args.logits.new_empty(rows, args.logits.shape[1]), labels=args.labels.new_zeros(rows)
    )
    first, _ = triton_backend.forward_launches(large, gpu_memory.outputs(large))
    return first


def _bound(launch: Launch, capability: int) -> Any:
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    return backend, *binder(*launch.args, **launch.constants, **launch.options)


def specialization(launch: Launch) -> str:
    """What of the arguments is compiled in: two launches with equal ones share their code."""
    _, _, specialized, options = _bound(launch, 90)
    return repr((launch.kernel, specialized, options))


def compiled(launch: Launch, capability: int) -> tuple[Kernel, str]:
    """The kernel as a GPU of this capability would compile it for this launch, and its PTX."""
    backend, bound, specialized, options = _bound(launch, capability)
    options, signature, constants, attrs = launch.kernel._pack_args(
        backend, options, bound, specialized, options
    )
    source = ASTSource(launch.kernel, signature, constants, attrs)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options=options.__dict__).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        (kernel,) = sass.read(Path(file.name))
    return kernel, code["ptx"]


_KERNELS = Path(triton_kernels.__file__)


@functools.cache
def _functions() -> dict[int, str]:
    """Line of triton_kernels.py -> function."""
    functions = [f for f in ast.parse(_KERNELS.read_text()).body if isinstance(f, ast.FunctionDef)]
    return {line: f.name for f in functions for line in _lines(f)}


@functools.cache
def _row_lines() -> set[int]:
    """Lines of triton_kernels.py that load or store columns of rows."""
    rows = r"\b(logits|last_logits|dlogits|z_row|p_row|out_row|next_row|at)\b"
    calls = [c for c in ast.walk(ast.parse(_KERNELS.read_text())) if isinstance(c, ast.Call)]
    moves = [c for c in calls if ast.unparse(c.func) in ("tl.load", "tl.store")]
    return {n for c in moves if re.search(rows, ast.unparse(c.args[0])) for n in _lines(c)}


def _lines(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _lines_of(one: Instruction) -> set[int]:
    return {frame.line for frame in one.frames if Path(frame.file).name == _KERNELS.name}


def _of_rows(code: Iterable[Instruction]) -> list[Instruction]:
    return [one for one in code if _lines_of(one) & _row_lines()]


def triton_entry(launch: Launch, form: str, args: LossArgs, capability: int) -> Entry:
    kernel, _ = compiled(launch, capability)
    C, item = args.logits.shape[1], args.logits.element_size()
    rows = _of_rows(kernel.code)
    loads, stores = accesses(rows, "global load"), accesses(rows, "global store")
    threads = 32 * launch.options["num_warps"]
    shared = sass.own_shared(kernel, capability)
    return Entry(
        "triton",
        form,
        str(args.logits.dtype).removeprefix("torch."),
        capability,
        threads,
        kernel.registers,
        sass.spills(kernel),
        shared,
        sass.resident(kernel.registers, threads, shared, capability),
        as_text(loads),
        as_text(stores),
        narrow(loads + stores) if C * item % 16 == 0 else 0,
        {} if item == 8 else _triton_work(kernel, launch, item),  # fp64 has no EX2
    )


def _triton_work(kernel: Kernel, launch: Launch, item: int) -> Work:
    graph = Graph(kernel.blocks)
    passes = []
    if launch.kernel is triton_kernels.loop_kernel:
        for code in hot_loops(graph, _shared):
            loaded = moved(_of_rows(code), "global load") / item
            # With a teacher 3 exponentials for 2 loads, else 1 for 1, and a few more.
            taught = sass.count(code, EX2) / loaded > 1.4
            names = {_functions()[line] for one in code for line in _lines_of(one)}
            step = "gradient" if "_loop_gradient" in names else "sums"
            passes.append(Pass("KL" if taught else "CE", step, code, loaded / (1 + taught)))
    if launch.kernel is triton_kernels.tile_kernel:
        c = launch.constants
        held = c["ROWS"] * c["BLOCK"] / (32 * launch.options["num_warps"])
        for kind, sign in ("KL", 1), ("CE", -1):  # most exponentials, and fewest
            weight = functools.partial(_exponentials_first, sign)
            side = [n for n in graph.path(graph.order, weight) if weight(kernel.blocks[n].code)[0]]
            passes.append(Pass(kind, "row", graph.code(side), held))
    return work_of(passes)


def _shared(one: Instruction) -> bool:
    """In the loops of a row, threads meet for the logit of the label alone."""
    found = sass.access(one)
    return found is not None and found[0].startswith("shared")


def _exponentials_first(sign: int, code: list[Instruction]) -> tuple[int, ...]:
    return sign * sass.count(code, EX2), len(code)


class Variant(NamedTuple):
    """A launch of `triton_backend`."""

    launch: str
    columns: int
    dtype: torch.dtype
    capability: int


# The widest row of each line of the dispatch table, common widths, an odd one, and a long one.
WIDEST = [line[0] for line in triton_backend._WARPS]
LONG = 1 << 17
COLUMNS = sorted([10, 100, 1000, 1003, *WIDEST, LONG])
LAUNCHES = {"forward": forward, "backward": backward, "count": count, "rescale": rescale}


def variants(capability: int, few: bool) -> list[Variant]:
    real, half = torch.float32, torch.bfloat16
    columns = [*WIDEST, LONG] if few else COLUMNS
    shapes = [("forward", C, dtype) for C in columns for dtype in (real, half)]
    if not few:
        others = (torch.float16, torch.float64)
        shapes += [("forward", C, dtype) for C in (1000, LONG) for dtype in others]
        shapes += [("backward", C, dtype) for C in (1000, LONG) for dtype in (real, half)]
        shapes += [("count", 1000, real), ("rescale", 1000, half)]
    return [Variant(*shape, capability) for shape in shapes]


def triton_entries(case: Variant) -> list[Entry]:
    args = step_of_the_module(case.columns, case.dtype)
    launch = LAUNCHES[case.launch](args)
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    way = "" if case.launch in ("forward", kernel) else f" {case.launch}"
    return [triton_entry(launch, f"{kernel}{way}, {case.columns} columns", args, case.capability)]


# ---- CUDA ----

SOURCES = ROOT / "csrc" / "cuda"
DTYPES = {"float": "float32", "double": "float64", "BFloat16": "bfloat16", "Float16": "float16"}
THREADS = 256


def nvcc() -> str | None:
    """That of the `static` extra, else the one on PATH."""
    installed = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
    return str(installed) if installed.exists() else shutil.which("nvcc")


def cubin(source: Path, capability: int) -> list[Kernel]:
    """The kernels of a source, compiled as setup.py does; -lineinfo leaves the code as it is."""
    flags = ["-O3", "-std=c++17", "-lineinfo", f"-arch=sm_{capability}", "-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.cubin"
        sass.run(str(nvcc()), *flags, source, "-o", made)
        return sass.read(made)


def cuda_entries(source: Path, capability: int) -> list[Entry]:
    return [cuda_entry(kernel, capability) for kernel in cubin(source, capability)]


def cuda_entry(kernel: Kernel, capability: int) -> Entry:
    demangled = sass.run("c++filt", kernel.name).strip()
    found = re.search(r"(\w+)_kernel<(\w+)(?:, \(Source\)(\d))?(?:, (\w+))?>", demangled)
    if found is None:
        raise ValueError(f"not one of the kernels: {demangled}")
    name, dtype, source, smooth = found.groups()
    form = name if source is None else f"{name} {_sources()[int(source)]}"
    item = ITEM[DTYPES[dtype]]
    loops = [code for code in hot_loops(Graph(kernel.blocks), _ragged) if not _by_elements(code)]
    hot = [one for code in loops for one in code if not _ragged(one)]
    loads = accesses(hot, "global load", "copy to shared")
    stores = accesses(hot, "global store")
    if smooth == "true":
        form += ", smoothing"
        del loads[8 * max(item, 4)]  # the weight of a class, a real
    shared = sass.own_shared(kernel, capability)
    return Entry(
        "cuda",
        form,
        DTYPES[dtype],
        capability,
        THREADS,
        kernel.registers,
        sass.spills(kernel),
        shared,
        sass.resident(kernel.registers, THREADS, shared, capability),
        as_text(loads),
        as_text(stores),
        narrow(loads + stores),
        {} if item == 8 else _cuda_work(loops, item),
    )


def _ragged(one: Instruction) -> bool:
    """Elements one by one: at the ragged ends of a row, or where it allows no more."""
    return any(name.endswith("_edge") for name in _cpp_functions(one))


def _by_elements(code: list[Instruction]) -> bool:
    loads = accesses(code, "global load", "copy to shared", "shared load")
    return 128 not in loads and any(sass.access(one) and _ragged(one) for one in code)


def _kind(exponentials: float) -> str:
    """Of rows with so many an element, and up to 3 more for 4 elements where maxima meet."""
    return "CE" if exponentials < 2 else "KL at temperature 3" if exponentials < 3 else "KL"


# Functions without exponentials that work on whole rows, and their steps.
MOVES = {"fetch": "fetch", "maximum": "maxima", "leave": "leave"}


def _cuda_work(loops: list[list[Instruction]], item: int) -> Work:
    passes = []
    moves: dict[int, Pass] = {}  # by the line of the kernel: to or from the tile or chip
    for code in loops:
        names = {name for one in code for name in _cpp_functions(one)}
        # A vector of a row is stored in each pass, in the first one for the next step.
        elements = moved(code, "global store", "copy to shared") / item
        if exponentials := sass.count(code, EX2):
            # A tile stores its gradient in shared memory, and its sums nowhere: there the logits
            # are counted, and the teacher's if a divergence is computed.
            in_tile = moved(code, "shared store") or moved(code, "shared load") / (
                2 if "gap_of" in names else 1
            )
            elements = elements or in_tile / item
            step = "gradient" if "gradient" in names else "sums"
            if elements:  # else threads of a row meet there
                passes.append(Pass(_kind(exponentials / elements), step, code, elements))
        elif found := names & MOVES.keys():
            line = max(frames[-1].line for one in code if (frames := _own_frames(one)))
            one = Pass("", MOVES[found.pop()], code, elements or moved(code, "shared load") / item)
            moves[line] = max(moves.get(line, one), one, key=lambda one: one.elements)
    work = work_of(passes)
    for kind, steps in work.items():
        for step in MOVES.values():
            costs = [moves[line].cost for line in sorted(moves) if moves[line].step == step]
            # The logits are fetched first, then the teacher.
            used = costs[:1] if step != "leave" and kind == "CE" else costs
            if used:
                steps[step] = [round(sum(cost[i] for cost in used), 2) for i in (0, 1)]
    return work


@functools.cache
def _sources() -> list[str]:
    """The values of `enum class Source`."""
    (names,) = re.findall(r"enum class Source \{(.*?)\}", (SOURCES / "row.h").read_text())
    return re.findall(r"\w+", names)


_CPP_FUNCTION = re.compile(r"\s*(?:DLB_DEVICE|__global__)\b.*?\b(?!__launch_bounds__)(\w+)\(")


@functools.cache
def _cpp_lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


@functools.cache
def _cpp_function(frame: Frame) -> str:
    """The function that a line is in."""
    above = reversed(_cpp_lines(frame.file)[: frame.line])
    return next((found[1] for line in above if (found := _CPP_FUNCTION.match(line))), "")


def _own_frames(one: Instruction) -> list[Frame]:
    """In our sources; now and then nvcc names a line beyond the end of one."""
    own = (frame for frame in one.frames if "csrc/" in frame.file)
    return [frame for frame in own if frame.line <= len(_cpp_lines(frame.file))]


def _cpp_functions(one: Instruction) -> set[str]:
    return {_cpp_function(frame) for frame in _own_frames(one)}


# The plan is compiled for the CPU, by the shim of the tests.
PLAN = """
#include <cstdio>
#include "plan.h"
int main() {
  constexpr size_t kItem[] = {4, 8, 2, 2};
  const struct { int capability, kibibytes; unsigned cluster; } kDevices[] = {
      {80, 163, 1}, {90, 227, 16}, {100, 227, 16}, {120, 99, 8}};
  for (const auto& d : kDevices) {
    for (int dtype : {DLB_FLOAT32, DLB_BFLOAT16}) {
      for (int C : {10, 100, 1000, 4096, 8192, 32000, 50257, 131072, 262144}) {
        DlbArgs a{};
        a.B = 256, a.overlap = 128, a.C = C, a.dtype = a.last_dtype = dtype;
        const Device device{d.cluster > 1, size_t(d.kibibytes) * 1024 - 4096, d.cluster};
        const Plan p = make_plan(a, kItem[dtype], false, kItem[dtype] < 8, device);
        printf("%d %s %d %s %d %d %u %zu\\n", d.capability,
               dtype == DLB_FLOAT32 ? "float32" : "bfloat16", C,
               p.form == Form::kTile ? "tile" : "row", int(p.source), p.threads, p.cluster,
               p.shared);
      }
    }
  }
}
"""


class Planned(NamedTuple):
    """What runs for rows of C classes."""

    form: str
    threads: int
    cluster: int
    shared: int  # dynamic bytes a block


def plans() -> dict[tuple[int, str, int], Planned]:
    """(capability, type, C) -> plan."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "plan.cpp", Path(folder) / "plan"
        source.write_text(PLAN)
        includes = [f"-I{SOURCES}", f"-I{ROOT / 'tests' / 'simt'}"]
        sass.run("g++", "-std=c++17", *includes, source, "-o", program)
        lines = sass.run(program).splitlines()
    found = {}
    for line in lines:
        capability, dtype, C, form, source_, threads, cluster, shared = line.split()
        form += f" {_sources()[int(source_)]}" if form == "row" else ""
        planned = Planned(form, int(threads), int(cluster), int(shared))
        found[int(capability), dtype, int(C)] = planned
    return found


# ---- all of them ----


def measure(backend: str, few: bool) -> list[Entry]:
    """Compiles, two at a time. few: of the other architectures only the most usual cases."""
    with ProcessPoolExecutor(2) as pool:
        jobs: list[Future[list[Entry]]] = []
        for capability in CAPABILITIES:
            fewer = few and capability != CAPABILITIES[0]
            if backend == "triton":
                jobs += [pool.submit(triton_entries, v) for v in variants(capability, fewer)]
            else:
                names = ["bfloat16", "float32"] if fewer else ITEM
                jobs += [pool.submit(cuda_entries, SOURCES / f"{n}.cu", capability) for n in names]
        found = {entry.key: entry for job in jobs for entry in job.result()}
    if backend == "triton":
        return list(found.values())
    return sorted(found.values(), key=lambda e: ("smoothing" in e.form, e.form, e.dtype))


def compilers() -> dict[str, str]:
    """What compiles the kernels of each backend, where it is there."""
    found = {"triton": f"triton {triton.__version__}"}
    if command := nvcc():
        release = re.search(r"V([\d.]+)", sass.run(command, "--version"))
        found["cuda"] = f"nvcc {release[1] if release else 'of unknown release'}"
    return found
