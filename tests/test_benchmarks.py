"""The benchmark measures what it says, and refuses to time a loss that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dlb_fused
from dlb_fused import backends, reference
from dlb_fused.backends import LossArgs, LossOutputs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
# One thread: on a busy machine a second one is waited for, at each call.
ARGUMENTS = ["--quick", "--shapes", "4x10,6x33", "--threads", "1"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    import bench_loss

    threads = torch.get_num_threads()
    yield bench_loss
    torch.set_num_threads(threads)


def few_variants(bench: ModuleType) -> list[Any]:
    """Those that need neither a compiler nor a kernel."""
    names = ("eager", "cross_entropy", "dlb_loss[eager]", "copy")
    return [v for v in bench.all_variants("cpu", "float32")[0] if v.name in names]


def results_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    (path,) = folder.glob("*.json")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in json.loads(path.read_text())["results"]:
        by_name.setdefault(result["variant"], []).append(result)
    return by_name


def test_ideal_bytes(bench: ModuleType) -> None:
    unit = 128 * 100 * 4  # n·C·b of (256, 100) in fp32, where m = n
    for work, mode, units in [
        ("dlb", "forward_backward", 5),
        ("dlb+cache", "forward_backward", 6),
        ("ce", "forward_backward", 4),
        ("dlb", "forward", 3),
        ("ce", "forward", 2),
    ]:
        assert bench.ideal_bytes(256, 100, 128, 4, work, mode) == units * unit
    # 7 rows, 2 of them overlap, 3 columns, 2 bytes: 7 + 2 rows are read, 7 written, 5 cached.
    assert bench.ideal_bytes(7, 3, 2, 2) == (9 + 7) * 6
    assert bench.ideal_bytes(7, 3, 2, 2, "dlb+cache") == (9 + 7 + 5) * 6
    assert bench.ideal_bytes(7, 3, 0, 2) == bench.ideal_bytes(7, 3, 0, 2, "ce")


def test_command(tmp_path: Path) -> None:
    """All variants but the compiled one, as a user calls it, in two dtypes."""
    package = str(Path(dlb_fused.__file__).parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = package
    command = [sys.executable, str(FOLDER / "bench_loss.py"), *ARGUMENTS, "--skip", "compile",
               "--dtype", "float32,bfloat16", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(B, C) = (6, 33), m = 3" in done.stdout

    (path,) = tmp_path.glob("cpu-*-quick.json")
    data = json.loads(path.read_text())
    assert data["format"] == 1
    assert {"cpu", "cores", "threads"} <= set(data["machine"])
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["dlb_fused"] == dlb_fused.__version__
    assert {"date", "commit", "dirty", "settings", "variants"} <= set(data)
    assert data["absent"]["compile"] == "left out by --skip"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    results = data["results"]
    assert {(r["dtype"], r["B"], r["C"], r["m"]) for r in results} == {
        (dtype, *shape) for dtype in ("float32", "bfloat16") for shape in ((4, 10, 2), (6, 33, 3))
    }
    names = {r["variant"] for r in results}
    assert {"eager", "cross_entropy", "DLBLoss", "copy", "copy fresh"} < names
    for backend in dlb_fused.BACKENDS:
        name = f"dlb_loss[{backend}]"
        assert (name in names) != (name in data["absent"])
    for result in results:
        assert result["status"] == "ok", result
        timing = result["times"]["forward_backward"]
        assert 0 < timing["min_us"] <= timing["q10_us"] <= timing["median_us"] <= timing["q90_us"]
        for ratio in ("speedup_over_eager", "time_over_cross_entropy", "of_copy", "gb_per_s"):
            assert timing[ratio] > 0
        assert ("forward" in result["times"]) == (result["variant"] != "DLBLoss")


class Plant:
    """A kernel that is wrong in one way, in the place of the backend "eager"."""

    calls = 0

    def __init__(self, fault: str) -> None:
        self.fault, self.right = fault, reference.forward

    def forward(self, args: LossArgs) -> LossOutputs:
        Plant.calls += 1
        if self.fault == "τ² left out":
            return self.without_tau_squared(args)
        out = self.right(args)
        if self.fault == "wrong without gradient":
            return out if args.need_grad else out._replace(loss=out.loss * 1.001)
        if self.fault == "wrong in the long run" and Plant.calls < 5:  # while it is checked
            return out
        if out.dlogits is None:
            return out
        factor = float("nan") if self.fault == "NaN" else 1.01
        return out._replace(dlogits=out.dlogits * factor)

    def without_tau_squared(self, args: LossArgs) -> LossOutputs:
        out = self.right(args)
        return out._replace(loss=out.parts[0] + args.alpha * out.parts[1])


@pytest.mark.parametrize(
    "fault",
    ["gradient of 1.01", "τ² left out", "NaN", "wrong without gradient", "wrong in the long run"],
)
def test_a_wrong_kernel_is_refused(
    bench: ModuleType,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Plant, "calls", 0)
    monkeypatch.setattr(reference, "forward", Plant(fault).forward)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], few_variants(bench)) == 1
    assert Plant.calls > 0
    results = results_in(tmp_path)
    wrong = results.pop("dlb_loss[eager]")
    assert [r["status"] for r in wrong] == ["WRONG", "WRONG"]
    assert all(r["times"] == {} for r in wrong)
    assert "WRONG: dlb_loss[eager], float32 (4, 10): relative error" in capsys.readouterr().out
    for others in results.values():
        assert all(r["status"] == "ok" and len(r["times"]) == 2 for r in others)


def test_a_wrong_module_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    """Its cache is part of what is checked: one that forgets it computes no KL."""

    def forgetful(x: Any) -> Callable[[], torch.Tensor]:
        criterion = dlb_fused.DLBLoss(**bench.OPTIONS, backend="eager")
        return lambda: (criterion.reset(), criterion(x.logits, x.labels))[1]

    wrong = bench.Variant("DLBLoss", forgetful, "", "dlb+cache", True)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], [wrong]) == 1
    assert {r["status"] for r in results_in(tmp_path)["DLBLoss"]} == {"WRONG"}
    right = replace(wrong, make=bench.module)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], [right]) == 0


@pytest.mark.parametrize("ours", [False, True])
def test_a_failure_shows_its_reason(
    bench: ModuleType, ours: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that fails does not end the run; a kernel of ours does not fail unnoticed."""

    def broken(x: Any) -> Callable[[], torch.Tensor]:
        raise RuntimeError("no compiler here")

    variants = [bench.Variant("compile", broken, ours=ours), *few_variants(bench)]
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], variants) == int(ours)
    assert "failed: compile, float32 (4, 10): RuntimeError: no compiler" in capsys.readouterr().out
    results = results_in(tmp_path)
    assert {r["status"] for r in results["compile"]} == {"failed"}
    assert all(r["times"] for r in results["eager"])


@pytest.mark.parametrize("backend", ["cpu"])
def test_memory_is_gradient_and_cache(bench: ModuleType, backend: str) -> None:
    """Nothing else of the size of the logits; the measure itself sees eager's temporaries."""
    reason = backends.why_not(backend, torch.empty(1, 1))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    x = bench.make_inputs(64, 5000, "float32", "cpu")

    def peak(call: Callable[[], torch.Tensor]) -> float:
        bench.step(call, x.logits)
        return bench.peak_memory(lambda: bench.step(call, x.logits), "cpu") / (64 * 5000 * 4)

    assert 1.0 <= peak(bench.fused(backend, x)) < 1.02
    assert 1.5 <= peak(bench.module(x)) < 1.52
    assert peak(bench.naive(x)) > 2


@pytest.mark.parametrize("shapes", ["7x10", "8", "8x0", "axb"])
def test_bad_shapes(bench: ModuleType, shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--shapes", shapes])
    assert "(B even)" in capsys.readouterr().err
