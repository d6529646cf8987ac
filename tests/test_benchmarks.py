"""The benchmark measures what it says, and refuses to time a loss that is wrong."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    import bench_loss

    threads = torch.get_num_threads()
    yield bench_loss
    torch.set_num_threads(threads)


@pytest.fixture
def variants(bench: ModuleType) -> ModuleType:
    import variants

    return variants


@pytest.fixture
def report(bench: ModuleType) -> ModuleType:
    import report

    return report


@pytest.fixture
def bars(bench: ModuleType) -> ModuleType:
    import bars

    return bars


def few_variants(bench: ModuleType) -> list[Any]:
    """Those that need neither a compiler nor a kernel."""
    names = ("eager", "cross_entropy", "dlb_loss[eager]", "copy")
    return [v for v in bench.all_variants("cpu", "float32")[0] if v.name in names]


def data_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def results_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in data_in(folder)["results"]:
        by_name.setdefault(result["variant"], []).append(result)
    return by_name


def test_ideal_bytes(bench: ModuleType) -> None:
    unit = 128 * 100 * 4  # n·C·b of (256, 100) in fp32, where m = n
    for work, backward, units in [
        ("dlb", True, 5),
        ("dlb+cache", True, 6),
        ("ce", True, 4),
        ("dlb", False, 3),
        ("ce", False, 2),
        ("copy", True, 5),
        ("copy", False, 5),
        ("clone", True, 4),
        ("nothing", True, 0),
    ]:
        assert bench.ideal_bytes(256, 100, 128, 4, work, backward) == units * unit
    # 7 rows, 2 of them overlap, 3 columns, 2 bytes: 7 + 2 rows are read, 7 written, 5 cached.
    assert bench.ideal_bytes(7, 3, 2, 2) == (9 + 7) * 6
    assert bench.ideal_bytes(7, 3, 2, 2, "dlb+cache") == (9 + 7 + 5) * 6
    assert bench.ideal_bytes(7, 3, 0, 2) == bench.ideal_bytes(7, 3, 0, 2, "ce")


# ---- The command and what it writes ------------------------------------------------------------


def assert_form(data: dict[str, Any], report: ModuleType, bars: ModuleType) -> None:
    assert data["format"] == 2
    assert {"cpu", "cores", "threads", "gpu", "l2_bytes"} <= set(data["machine"])
    assert {"torch", "dlb_fused", "liger-kernel", "quack-kernels"} <= set(data["versions"])
    assert {"date", "commit", "dirty", "settings", "variants", "left_out", "absent"} <= set(data)
    for result in (*data["host"], *data["results"]):
        assert set(result) == set(report.Result.__dataclass_fields__)
        assert set(result["times"]) <= set(report.MODES)
        for timing in result["times"].values():
            assert set(timing) == set(report.Timing.__dataclass_fields__)
            assert set(timing["over"]) <= set(report.REFERENCES)
    for bar in data["bars"]:
        assert set(bar) == set(bars.Verdict._fields) and isinstance(bar["met"], bool)


def test_command(tmp_path: Path, report: ModuleType, bars: ModuleType) -> None:
    """All variants but the compiled ones, as a user calls it, in two dtypes."""
    package = str(Path(dlb_fused.__file__).parent.parent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = package
    command = [sys.executable, str(FOLDER / "bench_loss.py"), *ARGUMENTS, "--skip", "compile",
               "--dtype", "float32,bfloat16", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(B, C) = (6, 33), m = 3" in done.stdout and "host µs above an empty" in done.stdout

    data = data_in(tmp_path)
    assert_form(data, report, bars)
    (path,) = tmp_path.glob("cpu-*-quick.json")
    for picture in (path.with_suffix(".png"), path.with_name(f"{path.stem}-bandwidth.png")):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["dlb_fused"] == dlb_fused.__version__
    for name in ("compile", "compile[max-autotune]", "cross_entropy[compile]"):
        assert data["absent"][name] == "left out by --skip"
    assert f"absent: liger: {data['absent']['liger']}" in done.stdout

    results = data["results"]
    assert {(r["dtype"], r["B"], r["C"], r["m"]) for r in results} == {
        (dtype, *shape) for dtype in ("float32", "bfloat16") for shape in ((4, 10, 2), (6, 33, 3))
    }
    names = {r["variant"] for r in results}
    ours = {"DLBLoss", "DLBLoss[ids]"}
    assert {"eager", "eager[cat]", "cross_entropy", "copy", "copy[fresh]"} | ours < names
    for backend in dlb_fused.BACKENDS:
        name = f"dlb_loss[{backend}]"
        assert (name in names) != (name in data["absent"])
    for result in results:
        assert result["status"] == "ok", result
        only_scaled = "grad_scale" in result["variant"]
        modes = {report.SCALED} if only_scaled else {report.FORWARD, report.BACKWARD, report.SCALED}
        if result["variant"].startswith("DLBLoss"):  # without gradient it has no KL
            modes.discard(report.FORWARD)
        assert set(result["times"]) == modes
        for t in result["times"].values():
            assert 0 < t["min_us"] <= t["q10_us"] <= t["median_us"] <= t["q90_us"]
            assert t["gb_per_s"] > 0 and t["of_copy"] > 0 and t["over"]["eager"] > 0
    host = {r["variant"]: r["times"]["host"] for r in data["host"]}
    assert host["empty Function"]["above"]["empty Function"] == 0
    assert host["DLBLoss"]["above"]["empty Function"] > 0 and not any("copy" in k for k in host)


def test_what_there_is_no_time_for_is_named(bench: ModuleType, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--seconds", "0", "--out", str(tmp_path)]
    assert bench.main(arguments, few_variants(bench)) == 0
    data = data_in(tmp_path)
    assert data["results"] == [] and data["left_out"] == ["float32 4x10", "float32 6x33"]


def test_default_cases(bench: ModuleType) -> None:
    """Every shape and every dtype, each somewhere; no case twice."""
    for device in ("cpu", "cuda"):
        cases = bench.default_cases(device)
        assert len(set(cases)) == len(cases)
        assert {dtype for dtype, _, _ in cases} == set(DTYPES)
        classes = {10, 100, 200, 1000, 21841, 32000, 50257, 128256, 262144}
        assert {C for dtype, _, C in cases if dtype == "float32"} == classes
        assert {C for dtype, _, C in cases if dtype == "float16"} == {100, 1000, 21841, 50257}


@pytest.mark.parametrize("shapes", ["7x10", "8", "8x0", "axb"])
def test_bad_shapes(bench: ModuleType, shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--shapes", shapes])
    assert "(B even)" in capsys.readouterr().err


# ---- The variants ------------------------------------------------------------------------------


def checked(bench: ModuleType, variant: Any, dtype: str, B: int = 6, C: int = 33) -> Any:
    """Its result after the check, which also holds the inputs to be what they were."""
    x = bench.make_inputs(B, C, dtype, "cpu")
    before = [t.detach().clone() for t in x]
    result = bench.Result(dtype, B, C, B // 2, variant.name, variant.ours)
    bench.check(variant, variant.make(x), bench.find_truth(x, variant.work[:3].strip("+")), result)
    assert all(torch.equal(a, b) for a, b in zip(before, x, strict=True)), variant.name
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_variant_is_right(bench: ModuleType, dtype: str) -> None:
    found, _ = bench.all_variants("cpu", dtype)
    losses = [v for v in found if v.is_loss and "compile" not in v.name]
    assert {"eager", "eager[cat]", "cross_entropy", "dlb_loss[eager]", "DLBLoss"} < {
        v.name for v in losses
    }
    for variant in losses:
        result = checked(bench, variant, dtype)
        assert result.status == "ok", (variant.name, result.reason)
        assert 0 < result.gradient_error < 0.05 and 0 < result.scaled_gradient_error < 0.05


def test_compiled_variants_are_right(bench: ModuleType) -> None:
    compiled = [v for v in bench.all_variants("cpu", "float32")[0] if "compile" in v.name]
    assert len(compiled) == 3
    for variant in compiled:
        assert checked(bench, variant, "float32").status == "ok"


def test_absent_peers_say_why(variants: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*names: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in names or None)

    installed()
    missing = "liger_kernel is not installed: pip install '.[peers]'"
    assert variants.why_no_peer("liger_kernel", "cuda").startswith(missing)
    assert variants.why_no_peer("liger_kernel", "cpu").startswith(
        f"its kernels need a CUDA device, got cpu; {missing}"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "released for Linux only, not darwin" in variants.why_no_peer("quack", "cuda")
    installed("quack")
    assert variants.why_no_peer("quack", "cuda") is None
    assert variants.why_no_peer("quack", "cpu") == "its kernels need a CUDA device, got cpu"


INTERPRETED = """
import sys
import torch
from bench_loss import Result, check, find_truth, make_inputs
from interpreter import faithful
from variants import PEERS

class Float(float):  # the interpreter hands a scalar to a kernel as it is
    def to(self, dtype):
        return self

if sys.argv[1] == "liger_kernel":
    from liger_kernel.transformers import LigerKLDIVLoss
    right = LigerKLDIVLoss.__init__
    LigerKLDIVLoss.__init__ = lambda self, **options: right(self, eps=Float(1e-10), **options)

(variant,) = (v for v in PEERS[sys.argv[1]] if v.is_loss)
for dtype in ("float32", "bfloat16", "float16"):
    x = make_inputs(6, 101, dtype, "cpu")
    before = [t.detach().clone() for t in x]
    result = Result(dtype, 6, 101, 3, variant.name, False)
    with faithful():
        check(variant, variant.make(x), find_truth(x, variant.work), result)
    if (variant.name, dtype) == ("liger", "bfloat16"):
        # The interpreter multiplies bfloat16 by bfloat16 as integers; a loss scale does that.
        assert max(result.loss_error, result.gradient_error) < 0.01, result.reason
    else:
        assert result.status == "ok", (dtype, result.reason)
    assert all(map(torch.equal, before, x)), dtype
    print("right:", dtype)
"""


@pytest.mark.parametrize("package", ["liger_kernel", "fla"])
def test_a_peer_in_the_interpreter(package: str) -> None:
    """Values and gradients against the truth, and inputs that are left as they were."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[peers]'")
    paths = [str(FOLDER), str(Path(__file__).parent), str(FOLDER.parent)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", INTERPRETED, package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("right:") == 3, done.stdout + done.stderr


def test_quack_takes_our_arguments(variants: ModuleType) -> None:
    """Its kernels run on a GPU only; here, that the function is there and takes what it gets."""
    if importlib.util.find_spec("quack") is None:
        pytest.skip("quack is not installed: pip install '.[peers]'")
    call = variants.quack(variants.make_inputs(4, 10, "float32", "cpu")).loss
    bound = inspect.signature(call.func).bind(*call.args)
    bound.apply_defaults()
    assert (bound.arguments["reduction"], bound.arguments["ignore_index"]) == ("mean", -100)


# ---- Wrong ones are refused --------------------------------------------------------------------


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
        if self.fault == "wrong in the long run" and Plant.calls < 8:  # while it is checked
            return out
        if out.dlogits is None:
            return out
        factor = float("nan") if self.fault == "NaN" else 1.01
        return out._replace(dlogits=out.dlogits * factor)

    def without_tau_squared(self, args: LossArgs) -> LossOutputs:
        out = self.right(args)
        return out._replace(loss=out.parts[0] + args.alpha * out.parts[1])


@pytest.mark.parametrize(
    ("loaded", "name"),
    [
        ("libtcmalloc_minimal.so.4", "tcmalloc"),
        ("libjemalloc.so.2", "jemalloc"),
        ("libc.so.6", None),
    ],
)
def test_a_preloaded_malloc_is_named(
    loaded: str, name: str | None, report: ModuleType, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r-xp 0 00:00 0 [heap]\n7f02-7f03 r-xp 0 fe:00 12  {tmp_path}/{loaded}\n"
    )
    assert report.malloc(maps) == name
    assert report.malloc(tmp_path / "none") is None


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
    data = data_in(tmp_path)
    wrong = [r for r in (*data["host"], *data["results"]) if r["variant"] == "dlb_loss[eager]"]
    assert [r["status"] for r in wrong] == ["WRONG"] * 3
    assert all(r["times"] == {} for r in wrong)
    assert "WRONG: dlb_loss[eager], float32 (4, 10): relative error" in capsys.readouterr().out
    for r in data["results"]:
        if r["variant"] != "dlb_loss[eager]":
            assert r["status"] == "ok" and len(r["times"]) == 3


def test_a_forgotten_loss_scale_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (variant,) = (v for v in few_variants(bench) if v.ours)
    assert checked(bench, variant, "float32").status == "ok"

    def forgets(args: LossArgs, parts: object, dloss: object, stored: Any) -> torch.Tensor:
        return stored

    monkeypatch.setattr(reference, "backward", forgets)
    result = checked(bench, variant, "float32")
    assert result.status == "WRONG" and result.gradient_error < 1e-6
    assert "of the scaled gradient 1.0e+00" in result.reason


def test_a_wrong_module_is_refused(bench: ModuleType, variants: ModuleType, tmp_path: Path) -> None:
    """Its cache is part of what is checked: one that forgets it computes no KL."""

    def forgetful(x: Any) -> Any:
        criterion = dlb_fused.DLBLoss(**variants.OPTIONS, backend="eager")
        return bench.Call(
            lambda: (criterion.reset(), criterion(x.logits, x.labels))[1], (x.logits,)
        )

    modes = ("forward_backward", "forward_backward_scaled")
    wrong = bench.Variant("DLBLoss", forgetful, "", "dlb+cache", True, modes)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], [wrong]) == 1
    assert {r["status"] for r in results_in(tmp_path)["DLBLoss"]} == {"WRONG"}
    right = replace(wrong, make=variants.module)
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], [right]) == 0


@pytest.mark.parametrize("ours", [False, True])
def test_a_failure_shows_its_reason(
    bench: ModuleType, ours: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that fails does not end the run; a kernel of ours does not fail unnoticed."""

    def broken(x: Any) -> Any:
        raise RuntimeError("no compiler here")

    variants = [bench.Variant("compile", broken, ours=ours), *few_variants(bench)]
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], variants) == int(ours)
    assert "failed: compile, float32 (4, 10): RuntimeError: no compiler" in capsys.readouterr().out
    results = results_in(tmp_path)
    assert {r["status"] for r in results["compile"]} == {"failed"}
    assert all(r["times"] for r in results["eager"])


def test_a_failure_in_one_mode_shows_its_reason(bench: ModuleType, tmp_path: Path) -> None:
    """When it is to be timed, after it was found right."""

    def tires(x: Any) -> Any:
        right, calls = bench.cross_entropy(x), []

        def loss() -> torch.Tensor:
            if not torch.is_grad_enabled():
                calls.append(1)
            if len(calls) > 3:  # those of the checks
                raise RuntimeError("out of memory")
            return right.loss()

        return bench.Call(loss, right.leaves)

    modes = ("forward", "forward_backward", "forward_backward_scaled")
    variants = [bench.Variant("tires", tires, "", "ce", modes=modes), *few_variants(bench)]
    assert bench.main([*ARGUMENTS, "--out", str(tmp_path)], variants) == 0
    results = results_in(tmp_path)
    assert {(r["status"], r["reason"]) for r in results["tires"]} == {
        ("failed", "RuntimeError: out of memory")
    }
    assert all(len(r["times"]) == 3 for r in results["eager"])


# ---- Memory and operations ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu"])
def test_memory_is_gradient_and_cache(
    bench: ModuleType, variants: ModuleType, backend: str
) -> None:
    """Nothing else of the size of the logits; the measure itself sees eager's temporaries."""
    reason = backends.why_not(backend, torch.empty(1, 1))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    x = bench.make_inputs(64, 5000, "float32", "cpu")

    def peak(call: Any) -> float:
        bench.step(call)
        return bench.peak_memory(lambda: bench.step(call), "cpu") / (64 * 5000 * 4)

    assert 1.0 <= peak(variants.fused(backend, x)) < 1.02
    assert 1.5 <= peak(variants.module(x)) < 1.52
    assert peak(variants.naive(x)) > 2


def test_operations_and_reads_are_counted(bench: ModuleType, variants: ModuleType) -> None:
    x = bench.make_inputs(4, 10, "float32", "cpu")
    call = variants.naive(x)
    names = bench.operations(lambda: bench.step(call))
    assert names.count("aten::_log_softmax") == 2 and "aten::_log_softmax_backward_data" in names
    assert "aten::cross_entropy_loss" not in names  # made of others
    plain = bench.count(lambda: bench.step(call), "cpu")
    assert plain == (len(names), 0)

    def planted() -> None:
        loss, _ = bench.step(call)
        loss.item()
        bool(loss > 0)

    operations, reads = bench.count(planted, "cpu")
    assert operations > plain[0] + 2 and reads == 2


def test_the_empty_function_is_empty(bench: ModuleType, variants: ModuleType) -> None:
    """It makes its two outputs, dispatches nothing else, and is of the form of ours."""
    x = bench.make_inputs(4, 10, "float32", "cpu")
    call = variants.empty(x)
    upstream = torch.ones(())
    dispatched = bench.operations(bench.timed_step(call, upstream))
    assert dispatched == ["aten::empty_strided"] * 2, dispatched
    loss, (gradient,) = bench.step(call)
    assert loss.shape == () and gradient.shape == (4, 10)
    ours = variants.fused("eager", x).loss().grad_fn
    nothing = call.loss().grad_fn
    assert len(nothing.saved_tensors) == len(ours.saved_tensors)
    assert [edge[0] is None for edge in nothing.next_functions] == [
        edge[0] is None for edge in ours.next_functions
    ]


# ---- The bars ----------------------------------------------------------------------------------


def made_up(report: ModuleType, variant: str, shape: tuple[int, int], **changes: Any) -> Any:
    """A result that meets every bar of a CPU, but for the changes."""
    dtype = changes.pop("dtype", "float32")
    over = {"cross_entropy": 0.4, "eager": 0.05, "compile": 0.3, "compile[max-autotune]": 0.3}
    times = {"ideal_bytes": 1, "of_copy": 0.8, "of_fresh_copy": 0.9, "over": over, "above": {}}
    times["above"] = {"cross_entropy": 8.0, "empty Function": 19.0}
    for key in set(changes) & set(times):
        new = changes.pop(key)
        times[key] = times[key] | new if isinstance(new, dict) else new
    fields = dict.fromkeys(report.Timing.__dataclass_fields__, 1.0) | times
    B, C = shape
    result = report.Result(dtype, B, C, B // 2, variant, True, extra_bytes=B * C * 4, **changes)
    result.times = {report.BACKWARD: report.Timing(**fields)}
    return result


@pytest.mark.parametrize(
    ("shape", "changes", "missed"),
    [
        ((8, 10), {}, []),
        ((8, 10), {"above": {"cross_entropy": 10.1}}, ["µs above cross_entropy, B·C < 1e4"]),
        ((1024, 10), {"above": {"cross_entropy": 10.1}}, []),
        ((8, 10), {"over": {"cross_entropy": 2.0}}, []),
        ((256, 1000), {"over": {"cross_entropy": 0.69}}, []),
        ((256, 1000), {"over": {"cross_entropy": 0.71}}, ["time / cross_entropy, B·C ≥ 1e5"]),
        ((1024, 1000), {"over": {"cross_entropy": 0.51}}, ["time / cross_entropy, B·C ≥ 1e6"]),
        ((256, 200), {"over": {"compile": 0.34}}, ["faster than compile"]),
        (
            (256, 200),
            {"over": {"compile[max-autotune]": 0.34}},
            ["faster than compile[max-autotune]"],
        ),
        ((256, 100), {"over": {"eager": 0.26}}, ["faster than eager"]),
        ((256, 200), {"over": {"eager": 0.26}}, []),
        ((512, 21841), {"of_copy": 0.69}, ["of copy, C ≥ 20000 fp32"]),
        ((512, 21841), {"of_fresh_copy": 0.69}, ["of copy[fresh], C ≥ 20000 fp32"]),
        ((512, 21841), {"of_copy": 0.69, "dtype": "bfloat16"}, ["memory / gradient"]),
        ((256, 1000), {"of_copy": 0.1}, []),
    ],
)
def test_bars(
    bars: ModuleType,
    report: ModuleType,
    shape: tuple[int, int],
    changes: dict[str, Any],
    missed: list[str],
) -> None:
    settings = report.Settings([], "cpu", 1)
    result = made_up(report, "dlb_loss[cpu]", shape, **changes)
    verdicts = bars.judge(report.Report(settings, results=[result]))
    assert len(verdicts) >= 3 and [v.bar for v in verdicts if not v.met] == missed
    for other in ("dlb_loss[eager]", "dlb_loss[cpu+grad_scale]", "eager", "copy"):
        assert bars.judge(report.Report(settings, results=[replace(result, variant=other)])) == []
    refused = replace(result, times={}, status="WRONG")
    assert bars.judge(report.Report(settings, results=[refused])) == []


def test_bars_of_memory_and_host(bars: ModuleType, report: ModuleType) -> None:
    settings, unit = report.Settings([], "cpu", 1), 256 * 1000 * 4

    def missed(variant: str, extra_bytes: float, host_us: float) -> list[str]:
        result = made_up(report, variant, (256, 1000), above={"empty Function": host_us})
        result.extra_bytes = int(extra_bytes)
        host = replace(result, times={report.HOST: result.times[report.BACKWARD]})
        found = bars.judge(report.Report(settings, results=[result], host=[host]))
        return [v.bar for v in found if not v.met]

    assert (
        missed("dlb_loss[cpu]", unit + 1000, 20) == missed("DLBLoss", 1.5 * unit + 1000, 20) == []
    )
    assert missed("dlb_loss[cpu]", 1.02 * unit, 20) == ["memory / gradient"]
    assert missed("DLBLoss", 1.52 * unit, 20) == ["memory / (gradient + cache)"]
    for variant in ("dlb_loss[cpu]", "DLBLoss"):
        assert missed(variant, unit, 20.1) == ["host µs above an empty Function"]


def test_bars_of_a_gpu(
    bars: ModuleType, report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 4 times the L2 traffic is to decide; launches and waits are held everywhere."""
    monkeypatch.setattr(bars, "l2_bytes", lambda device: 1000)
    settings = report.Settings([], "cuda", 1)

    def missed(**changes: Any) -> set[str]:
        over = {"cross_entropy": 0.4, "eager": 0.05, "liger": 0.1} | changes.pop("over", {})
        good = {"ideal_bytes": 5000, "of_copy": 0.95, "launches": 2, "syncs": 0, "over": over}
        shape = changes.pop("shape", (64, 8192))
        result = made_up(report, "dlb_loss[triton]", shape, **(good | changes))
        found = bars.judge(report.Report(settings, results=[result]))
        return {v.bar for v in found if not v.met}

    assert missed() == set()
    assert missed(of_copy=0.89) == {"of copy, large"}
    assert missed(of_copy=0.89, ideal_bytes=3000) == missed(of_copy=0.5, shape=(64, 100)) == set()
    assert missed(over={"eager": 0.13}) == {"faster than eager, large"}
    assert missed(over={"eager": 0.11}, shape=(256, 100)) == {"faster than eager"}
    assert missed(over={"liger": 0.21}) == {"faster than liger"}
    assert missed(over={"cross_entropy": 0.51}) == {"time / cross_entropy"}
    assert missed(launches=3, syncs=1) == {"launches", "waits"}
