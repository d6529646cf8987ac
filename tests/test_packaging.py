"""What a user installs: an sdist that is complete, a wheel that works away from the repository."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

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


# As on a machine without nvcc.
NO_NVCC = {"CUDA_HOME": "/no/such/folder", "CUDA_PATH": "", "DLB_FUSED_CUDA": "auto"}

BUILD = ("-m", "build", "--wheel", "--no-isolation", "--outdir")
INSTALL = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target")


def started(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = started(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_repository(to: Path) -> None:
    """Its sources, and nothing that was built in it."""
    ignore = shutil.ignore_patterns(".*", "build", "demo", "*.so", "*.egg-info")
    shutil.copytree(ROOT, to, ignore=ignore)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: nothing of the repository can help what is built from it."""
    out = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "unpacked")
    (source,) = (out / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is no nvcc."""
    out = tmp_path_factory.mktemp("dist")
    run(*BUILD, out, source, cwd=out, **NO_NVCC)
    (wheel,) = out.glob("*.whl")
    return wheel


def compiled_in(wheel: Path) -> set[str]:
    """What the wheel holds besides the package's Python files, up to the first dot."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dlb_fused").rglob("*.py")}
    assert modules <= names
    return {name.partition(".")[0] for name in names - modules - {"dlb_fused/py.typed"}}


def test_sdist_holds_what_is_needed(source: Path) -> None:
    needed = ["Makefile", "examples/train_digits.py", "benchmarks/bench_loss.py", "tests/cases.py"]
    needed += ["scripts/build_wheels.py", "scripts/WHEELS.md", "csrc/cuda/bind.cpp"]
    needed += [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]
    assert [name for name in needed if not (source / name).exists()] == []


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert compiled_in(wheel) == {"dlb_fused/_cpu", "dlb_fused/_cuda"}
    (left_out,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("dlb_fused/_cuda"))
    assert left_out == "dlb_fused/_cuda.txt"


def test_installed_package_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    run(*INSTALL, tmp_path / "site", wheel, cwd=tmp_path)
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    out = run("-c", USE, cwd=tmp_path, **environment)
    assert out.split() == [str(tmp_path / "site/dlb_fused/__init__.py"), "True"]
    page = run("-c", MAIN, cwd=tmp_path, **environment)
    assert "compiled for CUDA: no: CUDA_HOME is /no/such/folder, which has no bin/nvcc" in page
    assert "cpu     available" in page


def test_without_a_compiler_the_package_installs_and_says_so(tmp_path: Path) -> None:
    environment = {"CXX": "no-such-compiler", "PYTHONPATH": str(tmp_path / "site"), **NO_NVCC}
    source = tmp_path / "source"
    copy_of_the_repository(source)
    run(*INSTALL, tmp_path / "site", source, cwd=tmp_path, **environment)
    assert not list((tmp_path / "site").rglob("_cpu*.so"))
    out = run("-c", MAIN, cwd=tmp_path, **environment)
    assert "compiled for the CPU: no: no C++ compiler was found" in out
    assert "cpu     no: " in out and "eager   available" in out


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path: Path) -> None:
    copy_of_the_repository(tmp_path / "source")
    site = tmp_path / "site"
    run(*INSTALL, site, tmp_path / "source", cwd=tmp_path, CXX="false", **NO_NVCC)
    assert (site / "dlb_fused/loss.py").exists() and not list(site.rglob("*.so"))
    assert "a compiler failed" in (site / "dlb_fused/_cpu.txt").read_text()


def test_cuda_that_was_asked_for_and_cannot_be_built_stops(source: Path, tmp_path: Path) -> None:
    done = started(*BUILD, tmp_path, source, cwd=tmp_path, **{**NO_NVCC, "DLB_FUSED_CUDA": "1"})
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    expected = "the CUDA kernels cannot be built: CUDA_HOME is /no/such/folder, which has no bin/nv"
    assert expected in done.stdout + done.stderr


def test_wheel_with_cuda_imports_without_a_gpu(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one architecture, which takes a quarter of the time."""
    setup = setup_module()
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    if (packaged / "bin/nvcc").exists():  # that of the extra `static`
        monkeypatch.setenv("CUDA_HOME", str(packaged))
    try:
        release = setup.find_toolkit().release
    except setup.CannotBuildError as reason:
        pytest.skip(str(reason))
    asked = {"DLB_FUSED_CUDA": "1", "DLB_FUSED_CUDA_ARCHITECTURES": "90"}
    run(*BUILD, tmp_path, source, cwd=tmp_path, DLB_FUSED_LOCAL_VERSION="1", **asked)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"+cu{release[0]}{release[1]}-" in wheel.name
    run(*INSTALL, tmp_path / "site", wheel, cwd=tmp_path)
    code = "from dlb_fused import _cuda; print(_cuda.ARCHITECTURES, *_cuda.versions())"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
    architectures, runtime, driver = run("-c", code, cwd=tmp_path, **environment).split()
    assert architectures == "90" and int(runtime) == release[0] * 1000 + release[1] * 10
    if not Path("/dev/nvidiactl").exists():
        assert driver == "0"
    # What an earlier build has left in the folder is not put into a wheel without CUDA.
    run(*BUILD, tmp_path / "0", source, cwd=tmp_path, DLB_FUSED_CUDA="0")
    (without,) = (tmp_path / "0").glob("*.whl")
    assert "dlb_fused/_cuda.txt" in zipfile.ZipFile(without).namelist()


def setup_module() -> ModuleType:
    """setup.py, which calls setuptools.setup() where it is imported."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A nvcc of CUDA 12.4, which knows two architectures of ours and can only say so."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;\n'
        "  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n' ;;\n"
        f'  --dryrun) echo "#$ TOP={tmp_path}/bin/.." >&2 ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "DLB_FUSED_CUDA", "DLB_FUSED_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    return tmp_path


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH", None])
def test_toolkit_is_found(
    toolkit: Path, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_module()
    # On PATH is a script in another folder, as a package manager may put it there.
    elsewhere = toolkit / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "nvcc").write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    (elsewhere / "nvcc").chmod(0o755)
    if variable:
        monkeypatch.setenv(variable, str(elsewhere if variable == "PATH" else toolkit))
    else:
        monkeypatch.setattr(setup, "USUAL_ROOT", toolkit)
    assert setup.find_toolkit() == setup.Toolkit(toolkit, (12, 4))


def test_without_any_nvcc_the_reason_says_what_to_do(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_module()
    monkeypatch.setattr(setup, "USUAL_ROOT", toolkit / "elsewhere")
    with pytest.raises(setup.CannotBuildError, match="put nvcc on PATH or set CUDA_HOME"):
        setup.find_toolkit()


def test_architectures_are_those_that_nvcc_knows(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_module()
    found = setup.Toolkit(toolkit, (12, 4))
    assert found.architectures() == "80;90+PTX"
    monkeypatch.setenv("DLB_FUSED_CUDA_ARCHITECTURES", "75+PTX;90")
    assert found.architectures() == "75+PTX;90"
    assert setup.gencode("75+PTX;90;120+PTX") == (
        "-gencode arch=compute_75,code=[sm_75,compute_75] "
        "-gencode arch=compute_90,code=[sm_90,sm_120,compute_90]"
    )
    monkeypatch.setenv("DLB_FUSED_CUDA_ARCHITECTURES", "90;100")
    with pytest.raises(SystemExit, match=r"12\.4 has no '100'.* of these: 75 80 90"):
        found.architectures()


@pytest.mark.parametrize(
    ("release", "mode"), [((12, 4), None), ((12, 8), "speed"), ((13, 0), "size")]
)
def test_compression_is_one_that_the_oldest_driver_reads(
    release: tuple[int, int], mode: str | None
) -> None:
    command = setup_module().Toolkit(Path("/"), release).command()
    assert (f"--compress-mode={mode}" in command) if mode else ("compress" not in command)


def test_local_version_names_the_toolkit(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLB_FUSED_LOCAL_VERSION", "1")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_module().local_version() == "+cu124"
    monkeypatch.setenv("CUDA_HOME", "/no/such/folder")
    assert setup_module().local_version() == "+cpu"


def test_a_wrong_value_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLB_FUSED_CUDA", "yes")
    with pytest.raises(SystemExit, match="DLB_FUSED_CUDA must be auto, 0 or 1, not 'yes'"):
        setup_module()


def test_imports_run_one_way() -> None:
    """Nothing native and no Triton is imported before a backend is asked for."""
    code = "import sys, dlb_fused; print([name for name in sys.modules if 'dlb_fused' in name])"
    loaded = run("-c", code, cwd=ROOT)
    for module in ("triton_backend", "triton_kernels", "native", "_cpu"):
        assert f"dlb_fused.{module}" not in loaded
