"""What the machine code of a Triton launch says, without a GPU.

`compiled` takes a launch through Triton's own run-time path (types, alignment, constants) up to the
cubin of a target; `facts` reads its registers, memory and instructions.
"""

from __future__ import annotations

import collections
import pathlib
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

_BIN = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Facts(NamedTuple):
    registers: int
    stack: int  # bytes of local memory
    shared: int  # bytes
    ops: collections.Counter[str]  # opcode with its modifiers -> how many in the listing
    ptx: str

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that the pattern matches from its start."""
        return sum(n for op, n in self.ops.items() if re.match(pattern, op))


def _bound(launch: Any, capability: int) -> Any:
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    return backend, *binder(*launch.args, **launch.constants, **launch.options)


def specialization(launch: Any) -> str:
    """What of the arguments is compiled in: two launches with equal ones share their code."""
    _, _, specialized, options = _bound(launch, 90)
    return repr((launch.kernel, specialized, options))


def compiled(launch: Any, capability: int) -> Any:
    """The kernel of a `triton_backend.Launch`, as a GPU of this capability would compile it."""
    backend, bound, specialized, options = _bound(launch, capability)
    options, signature, constants, attrs = launch.kernel._pack_args(
        backend, options, bound, specialized, options
    )
    source = ASTSource(launch.kernel, signature, constants, attrs)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options.__dict__)


def facts(launch: Any, capability: int) -> Facts:
    code = compiled(launch, capability).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        listing = _cuobjdump("-sass", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    # address, predicate, opcode
    line = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    ops = collections.Counter(line.findall(listing))
    stack = int(found["STACK"]) + int(found["LOCAL"])
    return Facts(int(found["REG"]), stack, int(found["SHARED"]), ops, code["ptx"])


def _cuobjdump(option: str, path: str) -> str:
    command = [_BIN / "cuobjdump", option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
