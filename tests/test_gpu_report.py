"""`make gpu`, as far as it goes without a GPU: what it refuses, how it ends, what it reads, and
that its checks find the faults that they are for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import simulated
import torch

from dlb_fused import backends, cuda_backend, reference
from dlb_fused.backends import LossArgs, LossOutputs

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
HIDDEN = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # so that these tests mean the same on a GPU


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def report() -> ModuleType:
    import gpu_report

    return gpu_report


@pytest.fixture
def parts() -> ModuleType:
    import gpu_parts

    return gpu_parts


@pytest.fixture
def checks() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    import gpu_checks

    yield gpu_checks
    torch.set_num_threads(threads)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=HIDDEN, cwd=ROOT, capture_output=True, text=True)


# ---- What it refuses ---------------------------------------------------------------------------


def test_without_a_gpu_it_says_so() -> None:
    done = run(sys.executable, "benchmarks/gpu_report.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "make gpu needs a GPU, and torch" in done.stderr and "REHEARSE=1" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_without_a_gpu() -> None:
    done = run("make", "gpu", f"PYTHON={sys.executable}")
    assert done.returncode == 2 and "make gpu needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_torch_it_says_so() -> None:
    done = run(sys.executable, "-S", "-E", "benchmarks/gpu_report.py")
    assert done.returncode == 2 and "has no torch" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["benchmarks/results", "tests/../benchmarks/results/new"])
def test_a_rehearsal_is_no_result(
    report: ModuleType, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(["--rehearse", "--out", str(ROOT / out)], [])
    assert "a rehearsal is no result" in capsys.readouterr().err
    assert not (BENCHMARKS / "results/new").exists()


def test_a_result_goes_to_the_results(report: ModuleType) -> None:
    assert report.parse([]).out == BENCHMARKS / "results"
    assert BENCHMARKS / "results" not in report.parse(["--rehearse"]).out.parents


# ---- How it ends -------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def fake_parts(parts: ModuleType, *runs: Callable[..., Any]) -> list[Any]:
    return [parts.Part("checks", (f.__name__,), "", 60, f) for f in runs]


def good(*_: object) -> dict[str, Any]:
    return {"number": 1, "summary": "as it should be"}


def test_a_failure_stops_nothing(
    report: ModuleType, parts: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object) -> None:
        raise parts.Fail("7 of 9 are wrong [/red]", {"wrong": 7})

    def broken(*_: object) -> None:
        raise KeyError("no such thing")

    def absent(*_: object) -> None:
        raise parts.Skip("no such tool")

    chosen = fake_parts(parts, wrong, broken, absent, good)
    assert report.main(["--rehearse", "--out", str(tmp_path)], chosen) == 1
    data = written(tmp_path)
    assert report.problems(data) == [] and data["rehearsal"] is True
    assert [(p["name"], p["status"], p["reason"]) for p in data["parts"]] == [
        ("wrong", "failed", "7 of 9 are wrong [/red]"),
        ("broken", "failed", "KeyError: 'no such thing'"),
        ("absent", "skipped", "no such tool"),
        ("good", "ok", ""),
    ]
    assert data["parts"][0]["data"] == {"wrong": 7} and data["parts"][3]["data"] == {"number": 1}
    table = capsys.readouterr().out.partition("what was found")[2]
    assert all(
        text in table for text in ("7 of 9 are wrong [/red]", "no such tool", "as it should be")
    )
    assert report.main(["--rehearse", "--out", str(tmp_path)], chosen[2:]) == 0


def test_only_some_parts(report: ModuleType, parts: ModuleType, tmp_path: Path) -> None:
    """They get all the time, and a file of their own."""
    groups = ("environment", "tests", "bench")
    chosen = [parts.Part(group, (group,), "", 60, good) for group in groups]
    arguments = ["--rehearse", "--only", "bench", "--commit", "abc", "--out", str(tmp_path)]
    assert report.main(arguments, chosen) == 0
    (path,) = tmp_path.glob("rehearsal-*-bench.json")
    data = json.loads(path.read_text())
    assert [part["name"] for part in data["parts"]] == ["environment", "bench"]
    assert data["commit"] == "abc" and report.problems(data) == []
    with pytest.raises(SystemExit, match="2"):
        report.main(["--only", "everything"])


def test_no_time_left(report: ModuleType, parts: ModuleType, tmp_path: Path) -> None:
    arguments = ["--rehearse", "--minutes", "0.01", "--out", str(tmp_path)]
    assert report.main(arguments, [*fake_parts(parts, good)]) == 0
    (part,) = written(tmp_path)["parts"]
    assert (part["status"], part["reason"]) == ("skipped", "no time was left")


def test_time_is_kept_for_the_benchmarks(report: ModuleType, parts: ModuleType) -> None:
    given = {}

    def run(context: Any, part: Any, seconds: float) -> dict[str, Any]:
        given[part.group] = seconds
        return {}

    chosen = [parts.Part(group, (group,), "", 9999, run) for group in ("checks", "bench")]
    report.run_all(chosen, parts.Context(True, Path()), 100.0, lambda results: None)
    assert given == {"checks": pytest.approx(80, abs=1), "bench": pytest.approx(100, abs=1)}


def test_a_process_is_stopped_at_its_limit(parts: ModuleType) -> None:
    talk = "import time; print('check: {}', flush=True); time.sleep(60)"
    (process,) = parts.run_together([parts.Process([sys.executable, "-c", talk])], 2)
    assert process.timed_out and process.child.returncode != 0 and process.lines == [{}]
    assert "stopped at its time limit" in process.how_it_ended()


WORKER = """
import json, os, sys
for name in sys.argv[1:]:
    if name == "dies":
        os.abort()
    status = "failed" if name == "fails" else "ok"
    result = dict(name=name, status=status, reason="as planned" * (status != "ok"), summary="",
                  seconds=0.1, data={})
    print("check: " + json.dumps(result), flush=True)
    if status == "failed":
        sys.exit(1)
sys.exit(3 * ("ends badly" in sys.argv))
"""


def test_a_check_that_dies_stops_no_other(
    parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "worker.py")]
    monkeypatch.setattr(parts.Context, "checks", lambda self, *words: [*command, *words[2:]])
    names = ("one", "dies", "two", "fails", "three", "ends badly")
    part = parts.Part("checks", names, "triton", 60, parts.checks)
    results = parts.checks(parts.Context(True, tmp_path), part, 60)
    assert [(r.name, r.status) for r in results] == [
        ("one", "ok"), ("dies", "failed"), ("two", "ok"), ("fails", "failed"), ("three", "ok"),
        ("ends badly", "failed"),
    ]  # fmt: skip
    assert "ended with status -6" in results[1].reason and results[3].reason == "as planned"
    assert {r.backend for r in results} == {"triton"}
    results = parts.checks(parts.Context(True, tmp_path), part, 3)
    assert {r.reason for r in results} == {"no time was left"}


def test_the_form_of_a_report(report: ModuleType, parts: ModuleType, tmp_path: Path) -> None:
    report.main(["--rehearse", "--out", str(tmp_path)], fake_parts(parts, good))
    data = written(tmp_path)
    assert report.problems(data) == []
    for key in ("rehearsal", "commit", "machine", "parts"):
        assert report.problems({k: v for k, v in data.items() if k != key})
    (part,) = data["parts"]
    for change in ({"status": "fine"}, {"reason": "why"}, {"data": None}, {"seconds": -1.0}):
        assert report.problems({**data, "parts": [{**part, **change}]})
    assert report.problems({**data, "parts": [part, part]})
    assert report.problems({**data, "parts": [{"name": "good"}]})


def test_rehearsal(report: ModuleType, parts: ModuleType, tmp_path: Path) -> None:
    """Real parts, those that take seconds."""
    real = {(part.group, part.backend): part for part in report.all_parts()}
    chosen = [
        real["environment", ""],
        real["tests", "eager"],
        real["checks", "triton"]._replace(names=("beyond", "second_device")),
        real["checks", "cuda"]._replace(names=("launches", "two_streams", "fp16", "fork")),
        real["bench", ""],
    ]
    assert report.main(["--rehearse", "--out", str(tmp_path)], chosen) == 0
    (path,) = tmp_path.glob("rehearsal-*.json")
    data = json.loads(path.read_text())
    assert report.problems(data) == [] and data["rehearsal"] is True
    for part in data["parts"]:
        expected = "skipped" if part["name"] == "second_device" else "ok"
        assert part["status"] == expected, part
    bench = next(p["data"] for p in data["parts"] if p["name"] == "bench")
    assert (tmp_path / bench["file"]).exists() and not bench["left_out"]
    assert (tmp_path / bench["file"]).with_suffix(".png").exists()


# ---- What it reads -----------------------------------------------------------------------------


def test_each_test_is_in_one_share(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Item:
        def __init__(self, k: int) -> None:
            self.nodeid = f"tests/test_x.py::test[{k}]"

    items = [Item(k) for k in range(100)]
    seen = []
    for k in range(3):
        monkeypatch.setenv(parts.SHARD, f"{k}/3")
        share = list(items)
        parts.pytest_collection_modifyitems(share)
        assert 15 < len(share) < 55
        seen += share
    assert sorted(map(id, seen)) == sorted(map(id, items))


def test_junit(parts: ModuleType, tmp_path: Path) -> None:
    case = '<testcase classname="tests.test_x" name="{}">{}</testcase>'
    marks = [
        ("a", ""),
        ("b", '<failure message="assert 1 == 2&#10;more">long</failure>'),
        ("c", '<error message="fixture">long</error>'),
        ("d", '<skipped message="triton: not here">x</skipped>'),
    ]
    cases = "".join(case.format(*mark) for mark in marks)
    (tmp_path / "0.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts, bad, skips = parts.read_junit([tmp_path / "0.xml"])
    assert counts == {"tests": 4, "passed": 1, "failed": 2, "skipped": 1}
    assert bad == ["tests.test_x::b: assert 1 == 2", "tests.test_x::c: fixture"]
    assert skips == ["triton: not here"]


def event(cat: str, name: str, ts: float, dur: float = 1.0) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_trace() -> None:
    from gpu_machine import Kernel, read_trace

    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name"},
        event("kernel", "second", 130.0, 3.0),
        event("kernel", "first", 120.0, 2.5),
        event("gpu_memset", "Memset (Device)", 110.0),
        event("user_annotation", "watched", 100.0, 20.0),
        event("gpu_user_annotation", "watched", 110.0, 30.0),
        event("cuda_runtime", "cudaLaunchKernel", 105.0),
        event("cuda_runtime", "cudaStreamSynchronize", 106.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 125.0),  # our own, after the call
        event("cpu_op", "aten::copy_", 103.0),
    ]
    seen = read_trace(events)
    assert seen.kernels == [Kernel("first", 2.5), Kernel("second", 3.0)]
    assert (seen.others, seen.waits) == (["Memset (Device)"], ["cudaStreamSynchronize"])


def test_ncu(parts: ModuleType) -> None:
    rows = [("0", "spin_kernel(long)", "dram__bytes_read.sum", "byte", "7"),
            ("1", "count", "dram__bytes_read.sum", "byte", "10"),
            ("1", "count", "gpu__time_duration.sum", "ns", "4"),
            ("2", "rows", "dram__bytes_read.sum", "byte", "1,000"),
            ("2", "rows", "dram__bytes_write.sum", "byte", "500"),
            ("3", "spin_kernel(long)", "dram__bytes_read.sum", "byte", "7"),
            ("3", "spin_kernel(long)", "gpu__time_duration.sum", "ns", "7"),
            ("4", "rows", "dram__bytes_read.sum", "byte", "30")]  # fmt: skip
    names = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    table = [",".join(f'"{word}"' for word in row) for row in [names, *rows]]
    text = "\n".join(["==PROF== Connected", 'check: {"shape": 1}', *table[:4], "noise", *table[4:]])
    assert parts.read_ncu(text) == [
        {"kernels": ["count", "rows"], "read": 1010.0, "written": 500.0, "ns": 4.0},
        {"kernels": ["rows"], "read": 30.0, "written": 0.0, "ns": 0.0},
    ]
    assert parts.read_ncu("==ERROR== no permission") == []


TOOL = """#!/bin/sh
case "$*" in *--planted*) echo "{planted}"; echo "========= ERROR SUMMARY: 1 error"; exit 9;; esac
case "$*" in *racecheck*) word="RACECHECK SUMMARY: {races} hazards displayed";; esac
echo 'check: {{"done": true}}'
echo "========= ${{word:-ERROR SUMMARY: 0 errors}}"
case "$*" in *racecheck*) exit {status};; esac
"""


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        ({"planted": "Invalid __global__ read of size 8", "races": 0, "status": 0}, "clean"),
        ({"planted": "Invalid __global__ read of size 8", "races": 3, "status": 9}, "racecheck: "),
        ({"planted": "nothing", "races": 0, "status": 0}, "did not find a planted fault"),
    ],
)
def test_sanitizer(
    parts: ModuleType,
    words: dict[str, Any],
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tool that says so is believed only if it also finds a planted fault."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(**words))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    part = parts.Part("sanitizer", ("sanitizer",), "cuda", 60, parts.sanitizer)
    context = parts.Context(False, tmp_path)
    if outcome == "clean":
        assert set(parts.sanitizer(context, part, 60)["says"].values()) == {"clean"}
        return
    with pytest.raises(parts.Fail, match=outcome):
        parts.sanitizer(context, part, 60)


@pytest.mark.parametrize("name", ["sanitizer", "traffic"])
def test_a_tool_that_is_not_there(
    parts: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    part = parts.Part(name, (name,), "triton", 60, getattr(parts, name))
    with pytest.raises(parts.Skip, match="is not on PATH"):
        part.run(parts.Context(False, tmp_path), part, 60)
    with pytest.raises(parts.Skip, match="no driver"):
        part.run(parts.Context(False, tmp_path, {"triton": "no driver"}), part, 60)


# ---- That the checks find what they are for ----------------------------------------------------


class Fault:
    """A backend with a fault, in place of a module's forward and backward."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.right, self.calls = module.forward, 0
        monkeypatch.setattr(module, "forward", self.forward)

    def forward(self, args: LossArgs) -> LossOutputs:
        self.calls += 1
        return self.wrong(args)

    def wrong(self, args: LossArgs) -> LossOutputs:
        raise NotImplementedError


class LaunchesTwice(Fault):
    def wrong(self, args: LossArgs) -> LossOutputs:
        if args.pair is None:
            self.right(args)
        return self.right(args)


class SometimesAnotherBit(Fault):
    def wrong(self, args: LossArgs) -> LossOutputs:
        out = self.right(args)
        return out._replace(loss=out.loss * (1 + 1e-6 * (self.calls % 5 == 0)))


class WrapsOffsets(Fault):
    """As if the last row began where 32 bits of its offset say."""

    def wrong(self, args: LossArgs) -> LossOutputs:
        if args.logits.stride(0) > 2**29:
            logits = args.logits.detach().clone()
            logits[-1] = logits[0]
            args = args._replace(logits=logits)
        return self.right(args)


class HoldsMore(Fault):
    def wrong(self, args: LossArgs) -> LossOutputs:
        more = torch.empty_like(args.logits)
        return self.right(args)._replace(parts=torch.zeros(4) + more.flatten()[0] * 0)


@pytest.mark.parametrize(
    ("name", "backend", "fault"),
    [
        ("launches", "cuda", LaunchesTwice),
        ("graph", "cuda", SometimesAnotherBit),
        ("side_stream", "cuda", SometimesAnotherBit),
        ("two_streams", "cuda", SometimesAnotherBit),
        ("repeatable", "eager", SometimesAnotherBit),
        ("far_apart", "eager", WrapsOffsets),
        ("memory", "cuda", HoldsMore),
    ],
)
def test_a_planted_fault_is_found(
    checks: ModuleType,
    name: str,
    backend: str,
    fault: type[Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks.Rehearsal, "cases", checks.Rehearsal.cases[:2])
    monkeypatch.setattr(checks.Rehearsal, "large", (8, 500, "bfloat16"))
    monkeypatch.setattr(backends, "_chosen", {})
    subject = checks.Subject(backend, checks.Rehearsal())
    with simulated.backend():
        checks.CHECKS[name](subject)
        planted = fault(cuda_backend if backend == "cuda" else reference, monkeypatch)
        with pytest.raises(AssertionError):
            checks.CHECKS[name](subject)
    assert planted.calls > 0


def test_a_gradient_that_was_scaled_in_fp16_is_found(
    checks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = checks.Subject("eager", checks.Rehearsal())
    checks.fp16(subject)

    def scaled(args: LossArgs, parts: object, dloss: torch.Tensor, stored: Any) -> torch.Tensor:
        return stored * dloss

    monkeypatch.setattr(reference, "backward", scaled)
    with pytest.raises(AssertionError, match="dloss alone"):
        checks.fp16(subject)
