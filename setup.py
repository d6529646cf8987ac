"""Builds dlb_fused._cpu, the C++ kernel: once per instruction set, with ninja. No torch is needed.

Without a C++ compiler the package is installed without it, and says so in one line.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -g0"
# The row kernels are compiled once per level and chosen at run time, see csrc/cpu/loss.cpp.
LEVELS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS = {
        "baseline": "-march=x86-64",
        "v3": "-march=x86-64-v3 -ffp-contract=fast",
        "v4": "-march=x86-64-v4 -mprefer-vector-width=512 -ffp-contract=fast",
    }

NINJA = """\
cxx = {cxx}
flags = {flags}
rule compile
  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = {link} -o $out
  description = link $out
"""


def quoted(path: Path | str) -> str:
    """For a ninja file: as a path there, and as a word of the shell command."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def word(path: Path | str) -> str:
    return "'" + str(path).replace("$", "$$") + "'"


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx = cxx_command(self.compiler)
        if cxx is None:
            print(
                "dlb_fused: no C++ compiler found, so the CPU kernel is not built; plain PyTorch "
                "operations take its place",
                file=sys.stderr,
            )
            return
        # An editable install builds in a new temporary folder each time.
        temp = ROOT / f"build/{sys.implementation.cache_tag}" if self.editable_mode else None
        build = Path(temp or self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja_file(cxx, target))
        try:
            subprocess.run([ninja(), "-C", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            # The extension is optional: setuptools then installs the package without it.
            raise CompileError("the CPU kernel does not compile") from error

    def ninja_file(self, cxx: str, target: Path) -> str:
        import pybind11

        includes = [pybind11.get_include(), *self.include_dirs]
        steps = [("bind", "bind.cpp", " ".join(f"-isystem {word(p)}" for p in includes))]
        steps += [("loss", "loss.cpp", "")]
        steps += [
            (f"rows_{level}", "rows.cpp", f"-DDLB_ROWS=dlb_rows_{level} {march}")
            for level, march in LEVELS.items()
        ]
        lines = [NINJA.format(cxx=cxx, flags=FLAGS, link=link_command(cxx))]
        for name, source, extra in steps:
            lines.append(f"build {name}.o: compile {quoted(ROOT / 'csrc/cpu' / source)}")
            lines.append(f"  extra = {extra}")
        objects = " ".join(f"{name}.o" for name, *_ in steps)
        lines.append(f"build {quoted(target)}: link {objects}\n")
        return "\n".join(lines)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def cxx_command(compiler: Any) -> str | None:
    """The C++ compiler as a shell command: $CXX, Python's own, or any other on PATH."""
    if sys.platform == "win32":
        return None
    asked = os.environ.get("CXX")
    names = [asked] if asked else [*compiler.compiler_cxx[:1], "c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def link_command(cxx: str) -> str:
    if sys.platform == "darwin":
        return f"{cxx} -bundle -undefined dynamic_lookup $in"
    return f"{cxx} -shared -s $in -ldl"


def ninja() -> str:
    """The program: on PATH, or from the package of that name in the build environment."""
    found = shutil.which("ninja")
    if found is None:
        from ninja import BIN_DIR

        found = str(Path(BIN_DIR) / "ninja")
    return found


setup(
    ext_modules=[Extension("dlb_fused._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExt},
)
