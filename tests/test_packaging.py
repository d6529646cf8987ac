"""What a user installs: an sdist that is complete, a wheel that works away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import dlb_fused, torch
z = torch.randn(8, 5, requires_grad=True)
labels = torch.zeros(8, dtype=torch.int64)
dlb_fused.dlb_loss(z, labels, torch.randn(4, 5), backend="cpu").backward()
print(dlb_fused.__file__, z.grad.isfinite().all().item())
"""

# `python -m dlb_fused` without the finder of an editable install, which would lend its _cpu.
MAIN = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
runpy.run_module("dlb_fused", run_name="__main__")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_repository(to: Path) -> None:
    """Its sources, and nothing that was built in it."""
    ignore = shutil.ignore_patterns(".*", "build", "demo", "*.so", "*.egg-info")
    shutil.copytree(ROOT, to, ignore=ignore)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, so that nothing of the repository can help."""
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (source,) = (out / "unpacked").iterdir()
    for needed in (
        "Makefile",
        "examples/train_digits.py",
        "benchmarks/bench_loss.py",
        "tests/cases.py",
    ):
        assert (source / needed).exists()
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"dlb_fused/{path.name}" for path in (ROOT / "dlb_fused").glob("*.py")}
    (compiled,) = names - modules - {"dlb_fused/py.typed"}
    assert compiled.startswith("dlb_fused/_cpu.") and modules <= names


def test_installed_package_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    run(
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path / "site",
        wheel,
        cwd=tmp_path,
    )
    out = run("-c", USE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.split() == [str(tmp_path / "site/dlb_fused/__init__.py"), "True"]


def test_without_a_compiler_the_package_installs_and_says_so(tmp_path: Path) -> None:
    environment = {"CXX": "no-such-compiler", "PYTHONPATH": str(tmp_path / "site")}
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target")
    source = tmp_path / "source"
    copy_of_the_repository(source)
    run(*pip, tmp_path / "site", source, cwd=tmp_path, **environment)
    assert not list((tmp_path / "site").rglob("_cpu*"))
    out = run("-c", MAIN, cwd=tmp_path, **environment)
    assert "cpu     no: " in out and "eager   available" in out


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path: Path) -> None:
    copy_of_the_repository(tmp_path / "source")
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target")
    run(*pip, tmp_path / "site", tmp_path / "source", cwd=tmp_path, CXX="false")
    assert (tmp_path / "site/dlb_fused/loss.py").exists()
    assert not list((tmp_path / "site").rglob("_cpu*"))


def test_imports_run_one_way() -> None:
    """Nothing native and no Triton is imported before a backend is asked for."""
    code = "import sys, dlb_fused; print([name for name in sys.modules if 'dlb_fused' in name])"
    loaded = run("-c", code, cwd=ROOT)
    for module in ("triton_backend", "triton_kernels", "native", "_cpu"):
        assert f"dlb_fused.{module}" not in loaded
