"""The machine code of a cubin: what each kernel needs, its loops, and the paths through them.

`cuobjdump` and `nvdisasm` are those of the Triton wheel; they read the cubins of nvcc 13 too.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Frame(NamedTuple):
    file: str
    line: int


class Instruction(NamedTuple):
    predicate: str  # "@!P0 ", or nothing
    op: str  # with its modifiers
    operands: str
    frames: tuple[Frame, ...]  # where it comes from: the innermost call first


class Block(NamedTuple):
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    code: list[Instruction]
    next: list[int]


class Kernel(NamedTuple):
    name: str  # mangled
    registers: int
    stack: int  # bytes of local memory a thread
    shared: int  # static bytes, the driver's own among them
    blocks: list[Block]

    @property
    def code(self) -> list[Instruction]:
        return [one for block in self.blocks for one in block.code]


def count(code: Iterable[Instruction], pattern: str) -> int:
    """How many instructions have an opcode that the pattern matches from its start."""
    return sum(re.match(pattern, one.op) is not None for one in code)


def spills(kernel: Kernel) -> int:
    """Bytes of stack, and instructions that use it."""
    return kernel.stack + count(kernel.code, "LDL|STL")


_SPACES = {
    "LDG": "global load",
    "STG": "global store",
    "LDGSTS": "copy to shared",  # cp.async
    "LDS": "shared load",
    "STS": "shared store",
}


def access(one: Instruction) -> tuple[str, int] | None:
    """Space and bits, if it reads or writes memory: not the idle loads that go with cp.async."""
    base, *modifiers = one.op.split(".")
    if base not in _SPACES or one.predicate.strip() == "@!PT":
        return None
    sizes = (re.fullmatch(r"[US]?(8|16|64|128|256)", m) for m in modifiers)
    return _SPACES[base], next((int(size[1]) for size in sizes if size), 32)


# ---- reading ----


def read(cubin: Path) -> list[Kernel]:
    usage = run(_BIN / "cuobjdump", "-res-usage", cubin)
    listing = run(_BIN / "nvdisasm", "-gi", "-c", cubin)
    needs = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+?):\n\s+(.*)", usage)
    }
    kernels = []
    for section in re.split(r"^\s*\.section\s+", listing, flags=re.MULTILINE)[1:]:
        named = re.match(r"\.text\.([^\s,]+)", section)
        if named:
            need = needs[named[1]]
            stack = need["STACK"] + need["LOCAL"]
            blocks = _blocks(section)
            kernels.append(Kernel(named[1], need["REG"], stack, need["SHARED"], blocks))
    return kernels


def run(*command: str | Path) -> str:
    """What it prints. If it fails, what it complains of."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        says = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError("\n".join([f"{Path(command[0]).name} failed", *says[:10]]))
    return done.stdout


_LABEL = re.compile(r"^(\.L_\w+|\$\S+):$")
_FRAME = re.compile(r'//## File "(.*?)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_ENDS = {"BRA", "BRX", "EXIT", "RET", "JMP", "BREAK"}


def _blocks(section: str) -> list[Block]:
    """A label begins a block, a branch ends one."""
    blocks: list[Block] = [Block([], [])]
    at: dict[str, int] = {}
    frames: list[Frame] = []
    more = False  # the frame before was inlined into the next one
    for line in section.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].code:
                blocks.append(Block([], []))
            at[label[1]] = len(blocks) - 1
        elif frame := _FRAME.search(line):
            frames = [*(frames if more else []), Frame(frame[1], int(frame[2]))]
            more = frame[3] is not None
        elif found := _INSTRUCTION.match(line):
            predicate, op, operands = found.groups()
            blocks[-1].code.append(Instruction(predicate or "", op, operands, tuple(frames)))
            if op.split(".")[0] in _ENDS:
                blocks.append(Block([], []))
    while not blocks[-1].code:
        blocks.pop()
    for number, block in enumerate(blocks):
        block.next.extend(n for n in _successors(number, block.code[-1], at) if n < len(blocks))
    return blocks


def _successors(number: int, last: Instruction, at: dict[str, int]) -> list[int]:
    """BRA.DIV leaves for code that only a warp with threads missing runs: not followed."""
    base = last.op.split(".")[0]
    target = re.search(r"`\((\S+?)\)", last.operands)
    taken = [at[target[1]]] if base in ("BRA", "JMP") and target and ".DIV" not in last.op else []
    if base == "BRX":  # a table of targets, which nvdisasm names in a comment
        taken = [at[label] for label in re.findall(r"\.L_x_\d+", last.operands)]
    always = not last.predicate and not re.match(r"!?U?P\d", last.operands)
    stays = base in _ENDS and always and ".DIV" not in last.op
    return taken if stays else [*taken, number + 1]


# ---- loops and paths ----


class Graph:
    """The blocks of a kernel, without the edges that close loops."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.order: list[int] = []  # every block after those that lead to it
        self._closing: list[tuple[int, int]] = []
        self._visit()
        self.ahead = {
            n: [to for to in blocks[n].next if (n, to) not in self._closing] for n in self.order
        }

    def _visit(self) -> None:
        state = {0: "open"}
        stack = [(0, iter(self.blocks[0].next))]
        while stack:
            number, following = stack[-1]
            for to in following:
                if state.get(to) == "open":
                    self._closing.append((number, to))
                elif to not in state:
                    state[to] = "open"
                    stack.append((to, iter(self.blocks[to].next)))
                    break
            else:
                state[number] = "done"
                self.order.insert(0, number)
                stack.pop()

    @functools.cached_property
    def loops(self) -> list[set[int]]:
        """The blocks of each loop that has no other inside, in the order of the code."""
        bodies: dict[int, set[int]] = {}
        before: dict[int, list[int]] = {n: [] for n in self.order}
        for number in self.order:
            for to in self.blocks[number].next:
                before[to].append(number)
        for latch, head in self._closing:
            body = bodies.setdefault(head, {head})
            todo = [latch]
            while todo:
                number = todo.pop()
                if number not in body:
                    body.add(number)
                    todo.extend(before[number])
        inner = [a for a in bodies.values() if not any(b < a for b in bodies.values())]
        return sorted(inner, key=min)

    def path(
        self, among: Iterable[int], weight: Callable[[list[Instruction]], tuple[int, ...]]
    ) -> list[int]:
        """The blocks of the path of greatest weight through these, from the first of them."""
        among = set(among)
        best: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        for number in reversed(self.order):
            if number in among:
                tails = [best[to] for to in self.ahead[number] if to in best]
                own = weight(self.blocks[number].code)
                total, tail = max(tails, default=((0,) * len(own), []))
                best[number] = tuple(map(int.__add__, own, total)), [number, *tail]
        return best[next(n for n in self.order if n in among)][1]

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for number in blocks for one in self.blocks[number].code]


# ---- occupancy ----


class Limits(NamedTuple):
    """What a multiprocessor has."""

    threads: int
    blocks: int
    shared: int


LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
_REGISTERS = 65536
_RESERVED = 1024  # bytes of shared memory that a block needs beside its own


def own_shared(kernel: Kernel, capability: int) -> int:
    """Static shared memory without the driver's, which cuobjdump counts from sm_90 on."""
    return kernel.shared - (_RESERVED if capability >= 90 and kernel.shared else 0)


def resident(registers: int, threads: int, shared: int, capability: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    limits = LIMITS[capability]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        limits.blocks,
        limits.threads // (32 * warps),
        _REGISTERS // per_warp // warps,
        limits.shared // (shared + _RESERVED),
    )
