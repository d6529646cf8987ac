"""Builds the two compiled modules, with ninja and without torch.

    dlb_fused._cpu    csrc/cpu, the row kernels once per instruction set
    dlb_fused._cuda   csrc/cuda, where there is an nvcc

What cannot be built is left out, and the package is installed without it: one line says why. These
variables decide about `_cuda`:

    DLB_FUSED_CUDA=auto|0|1         0: leave it out; 1: stop where it cannot be built
    CUDA_HOME, CUDA_PATH            the toolkit; else that of the nvcc on PATH, else /usr/local/cuda
    DLB_FUSED_CUDA_ARCHITECTURES    "80;90+PTX" instead of those below
    DLB_FUSED_LOCAL_VERSION=1       version 0.1.0+cu130 instead of 0.1.0, or 0.1.0+cpu
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

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

NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas --warn-on-spills"
# Machine code for each, and PTX for what comes after the last. sm_80 also runs on 8.6 and 8.9,
# sm_100 on 10.3, sm_120 on 12.1. Those that an older nvcc does not know are left out.
ARCHITECTURES = (80, 90, 100, 120)
USUAL_ROOT = Path("/usr/local/cuda")
CUDA = os.environ.get("DLB_FUSED_CUDA", "auto")

NINJA = """\
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = {link}
  description = link $out
"""


class CannotBuildError(Exception):
    """The reason, in words for the user."""


class Step(NamedTuple):
    """One object file: its name, its source under csrc, the compiler with its flags."""

    name: str
    source: str
    compiler: str


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rpartition(".")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        why_not = target.with_name(f"{name}.txt")  # `python -m dlb_fused` shows it
        why_not.unlink(missing_ok=True)
        try:
            self.run_ninja(name, self.ninja_file(name, target))
        except CannotBuildError as reason:
            if name == "_cuda" and must_have_cuda():
                raise SystemExit(f"dlb_fused: the CUDA kernels cannot be built: {reason}") from None
            print(f"dlb_fused: installed without {ext.name}: {reason}", file=sys.stderr)
            why_not.write_text(f"{reason}\n")
            target.unlink(missing_ok=True)  # of an earlier build

    def ninja_file(self, name: str, target: Path) -> str:
        import pybind11

        cxx = cxx_command(self.compiler)
        includes = [pybind11.get_include(), *self.include_dirs]
        bind = " ".join([cxx, FLAGS, *(f"-isystem {word(path)}" for path in includes)])
        steps, libraries = cpu_steps(cxx, bind) if name == "_cpu" else cuda_steps(bind)
        lines = [NINJA.format(link=link_command(cxx, libraries))]
        for step in steps:
            lines.append(f"build {step.name}.o: compile {quoted(ROOT / 'csrc' / step.source)}")
            lines.append(f"  compiler = {step.compiler}")
        objects = " ".join(f"{step.name}.o" for step in steps)
        lines.append(f"build {quoted(target)}: link {objects}\n")
        return "\n".join(lines)

    def run_ninja(self, name: str, text: str) -> None:
        # An editable install builds in a new temporary folder each time.
        temp = ROOT / f"build/{sys.implementation.cache_tag}" if self.editable_mode else None
        build = Path(temp or self.build_temp).resolve() / name
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(text)
        try:
            subprocess.run([ninja(), "-C", str(build)], check=True)
        except subprocess.CalledProcessError:
            raise CannotBuildError("a compiler failed; `pip install -v` shows its errors") from None

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class EggInfo(egg_info):
    def finalize_options(self) -> None:
        self.tag_build = local_version()
        super().finalize_options()


def cpu_steps(cxx: str, bind: str) -> tuple[list[Step], str]:
    """The objects of `_cpu`, and the libraries that it needs."""
    rows = [
        Step(
            f"rows_{level}",
            "cpu/rows.cpp",
            f"{cxx} {FLAGS} -DDLB_ROWS=dlb_rows_{level} {march}",
        )
        for level, march in LEVELS.items()
    ]
    loss = Step("loss", "cpu/loss.cpp", f"{cxx} {FLAGS}")
    return [Step("bind", "cpu/bind.cpp", bind), loss, *rows], "-ldl"


def cuda_steps(bind: str) -> tuple[list[Step], str]:
    """The same for `_cuda`."""
    toolkit = find_toolkit()
    architectures = toolkit.architectures()
    print(f"dlb_fused: CUDA {toolkit.dotted} of {toolkit.root} for {architectures}")
    nvcc = f"{toolkit.command()} {gencode(architectures)}"
    kernels = [
        Step(path.stem, f"cuda/{path.name}", nvcc)
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]
    bind += f""" -DDLB_CUDA_ARCHITECTURES='"{architectures}"'"""
    folders = " ".join(f"-L{word(folder)}" for folder in toolkit.library_folders())
    # The runtime is linked statically: torch's own, of any version, is not touched.
    libraries = f"{folders} -lcudart_static -lrt -lpthread -ldl"
    return [*kernels, Step("bind", "cuda/bind.cpp", bind)], libraries


class Toolkit(NamedTuple):
    root: Path
    release: tuple[int, int]

    @property
    def nvcc(self) -> Path:
        return self.root / "bin/nvcc"

    @property
    def dotted(self) -> str:
        return ".".join(map(str, self.release))

    def command(self) -> str:
        if self.release >= (13, 0):
            compress = "--compress-mode=size"
        elif self.release >= (12, 8):
            # What packs better is read by drivers from 550.54 only, a CUDA 12 build runs from 525.
            compress = "--compress-mode=speed"
        else:
            compress = ""
        return f"{word(self.nvcc)} {NVCC_FLAGS} {compress}"

    def architectures(self) -> str:
        """Those asked for, or of the default those that this nvcc knows: "80;90;100;120+PTX"."""
        listed = run(self.nvcc, "--list-gpu-code")
        known = set(re.findall(r"sm_(\w+)", listed))
        asked = os.environ.get("DLB_FUSED_CUDA_ARCHITECTURES")
        if asked is None:
            return ";".join(str(a) for a in ARCHITECTURES if str(a) in known) + "+PTX"
        names = asked.split(";")
        wrong = [name for name in names if name.removesuffix("+PTX") not in known]
        if wrong:
            raise SystemExit(
                f"dlb_fused: DLB_FUSED_CUDA_ARCHITECTURES={asked!r}: nvcc {self.dotted} has no "
                f"{wrong[0]!r}. Write numbers with ';' between, such as '80;90+PTX', of these: "
                + " ".join(sorted(known, key=lambda name: (len(name), name)))
            )
        return asked

    def library_folders(self) -> list[Path]:
        """The layout differs between installers, packages and platforms."""
        folders = [self.root / "lib64", self.root / "lib", *self.root.glob("targets/*/lib")]
        return [folder for folder in folders if folder.is_dir()]


def gencode(architectures: str) -> str:
    """Flags for "80;90;120+PTX". The kernels have two faces, with clusters (from 9.0 on) and
    without. Each is translated to PTX once, for all that it serves: a third less time."""
    faces: dict[str, list[str]] = {}
    for name in architectures.split(";"):
        number = name.removesuffix("+PTX")
        virtual = "90" if int(number.rstrip("af")) >= 90 else number
        faces.setdefault(virtual, []).append(f"sm_{number}")
        if number != name:
            faces[virtual].append(f"compute_{virtual}")
    return " ".join(
        f"-gencode arch=compute_{virtual},code=[{','.join(codes)}]"
        for virtual, codes in faces.items()
    )


def must_have_cuda() -> bool:
    """A version that names a CUDA release is not given to a package without its kernels."""
    return CUDA == "1" or (CUDA == "auto" and "+cu" in local_version())


@cache
def find_toolkit() -> Toolkit:
    if CUDA == "0":
        raise CannotBuildError("DLB_FUSED_CUDA was 0")
    root = toolkit_root()
    release = re.search(r"release (\d+)\.(\d+)", run(root / "bin/nvcc", "--version"))
    if release is None:
        raise CannotBuildError(f"{root}/bin/nvcc --version does not say which release it is")
    return Toolkit(root, (int(release[1]), int(release[2])))


def toolkit_root() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            if not Path(value, "bin/nvcc").exists():
                raise CannotBuildError(f"{variable} is {value}, which has no bin/nvcc")
            return Path(value).resolve()
    if nvcc := shutil.which("nvcc"):
        # It may be a script that calls the real one, which alone knows where it is.
        says = run(nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull)
        if top := re.search(r"^#\$ TOP=(.+)$", says, re.MULTILINE):
            return Path(top[1].strip()).resolve()
        raise CannotBuildError(f"{nvcc} --dryrun does not say where its toolkit is; set CUDA_HOME")
    if (USUAL_ROOT / "bin/nvcc").exists():
        return USUAL_ROOT.resolve()
    raise CannotBuildError(
        "no nvcc was found; install the CUDA toolkit and put nvcc on PATH or set CUDA_HOME"
    )


def run(*command: str | Path) -> str:
    """What the command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CannotBuildError(f"{' '.join(map(str, command[:2]))} fails: {last}")
    return done.stdout + done.stderr


def local_version() -> str:
    """ "+cu130", "+cpu" or, unless asked for, ""."""
    if os.environ.get("DLB_FUSED_LOCAL_VERSION", "0") == "0":
        return ""
    try:
        return "+cu{}{}".format(*find_toolkit().release)
    except CannotBuildError:
        return "+cpu"


def cxx_command(compiler: Any) -> str:
    """The C++ compiler as a shell command: $CXX, Python's own, or any other on PATH."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else [*compiler.compiler_cxx[:1], "c++", "g++", "clang++"]
    found = next((name for name in names if shutil.which(name.split()[0])), None)
    if found is None or sys.platform == "win32":
        raise CannotBuildError("no C++ compiler was found")
    return found


def link_command(cxx: str, libraries: str) -> str:
    if sys.platform == "darwin":
        return f"{cxx} -bundle -undefined dynamic_lookup $in -o $out"
    return f"{cxx} -shared -s $in {libraries} -o $out"


def quoted(path: Path | str) -> str:
    """For a ninja file: as a path there, and as a word of the shell command."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def word(path: Path | str) -> str:
    return "'" + str(path).replace("$", "$$") + "'"


def ninja() -> str:
    """The program: on PATH, or from the package of that name in the build environment."""
    found = shutil.which("ninja")
    if found is None:
        from ninja import BIN_DIR

        found = str(Path(BIN_DIR) / "ninja")
    return found


if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"dlb_fused: DLB_FUSED_CUDA must be auto, 0 or 1, not {CUDA!r}")

setup(
    ext_modules=[Extension(f"dlb_fused.{m}", sources=[], optional=True) for m in ("_cpu", "_cuda")],
    cmdclass={"build_ext": BuildExt, "egg_info": EggInfo},
)
