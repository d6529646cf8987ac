"""Compiles kernels together with the shim: into a shared library, or a program that replays calls.

Everything is kept under build/simt, by the content of what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parents[1]
BUILD = ROOT / "build/simt"
JOBS = 2

#: {file: [(old, new), ...]}, files relative to `tree`: a fault to plant in a copy of the sources.
Patches = Mapping[str, Sequence[tuple[str, str]]]

# As nvcc: a * b + c may be one operation, and bytes may be read as another type.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-fno-strict-aliasing"]
FLAGS += ["-fno-gnu-unique", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = {
    None: ([], []),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fvisibility=default"],
        ["-DSIMT_ADDRESS"],
    ),
    "thread": (["-fsanitize=thread", "-fvisibility=default"], ["-DSIMT_THREAD"]),
}


def build(
    name: str,
    tree: Path,
    sources: Iterable[Path],
    *,
    flags: Sequence[str] = (),
    patches: Patches | None = None,
    sanitize: str | None = None,
) -> Path:
    """The library `name` of these sources, or with `sanitize` the program.

    `tree` is the folder whose content the sources are made from: a change in it compiles again what
    that changes.
    """
    checks, words = SANITIZERS[sanitize]
    flags = [*FLAGS, *_processor(), *flags, *checks]
    texts = _patched(tree, patches or {})
    own = {path: path.read_text() for path in sorted(SIMT.glob("*.[hc]*")) if path.is_file()}
    key = _digest(
        [name, sanitize or "", *map(str, sources), _compiler_version(), *flags, *words]
        + [f"{path}\n{text}" for path, text in {**own, **texts}.items()]
    )
    folder = BUILD / key
    target = folder / (name if sanitize else f"{name}.so")
    if target.exists():
        return target
    root = _copy(tree, texts, folder / "src") if patches else tree
    shim = [SIMT / "simt.cpp", *([SIMT / "replay.cpp"] if sanitize else [])]
    steps = [(root / source.relative_to(tree), flags) for source in sources]
    steps += [(source, [*FLAGS, *_processor(), *words]) for source in shim]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda step: _object(*step, str(root)), steps))
    _run([_compiler(), *checks, *(["-rdynamic"] if sanitize else ["-shared"])], objects, target)
    return target


def _patched(tree: Path, patches: Patches) -> dict[Path, str]:
    """The text of each file of `tree`, patched. A patch that does not apply is an error."""
    names = ("*.h", "*.cpp", "*.cu")
    files = sorted(path for pattern in names for path in tree.rglob(pattern))
    texts = {path: path.read_text() for path in files}
    for name, changes in patches.items():
        for old, new in changes:
            if old not in texts[tree / name]:
                raise ValueError(f"the patch does not apply to {name}: {old!r}")
            texts[tree / name] = texts[tree / name].replace(old, new)
    return texts


def _copy(tree: Path, texts: dict[Path, str], to: Path) -> Path:
    for path, text in texts.items():
        place = to / path.relative_to(tree)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return to


def _object(source: Path, flags: Sequence[str], root: str) -> Path:
    """Compiled, unless an object of the same preprocessed text is there."""
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    command = [_compiler(), *flags, f"-I{SIMT}", *language]
    text = subprocess.run(
        [*command, "-E", str(source)], check=True, capture_output=True, text=True
    ).stdout
    key = _digest([_compiler_version(), *flags, text.replace(root, "")])
    target = BUILD / "objects" / f"{key}.o"
    if not target.exists():
        _run([*command, "-c"], [source], target)
    return target


def _run(command: list[str], inputs: Sequence[Path], target: Path) -> None:
    """Makes `target` at once or not at all: another process may be at it too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    libraries = [] if "-c" in command else ["-ldl"]
    done = subprocess.run(
        [*command, *map(str, inputs), "-o", str(partial), *libraries],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{target.name} cannot be built:\n{done.stderr[-4000:]}")
    partial.replace(target)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found: the kernels cannot be simulated")


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


@cache
def _processor() -> list[str]:
    """Fused multiply-add as an instruction, where the machine has it."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    able = platform.machine() == "x86_64" and {"avx2", "fma", "bmi2", "f16c"} <= set(words)
    return ["-march=x86-64-v3"] if able else []
