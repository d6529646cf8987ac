"""The parts of gpu_report.py: each starts processes, reads what they say, and returns data, or
raises why it cannot be done here, or what is wrong."""

from __future__ import annotations

import atexit
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
MARK = "check: "  # as in gpu_checks.py
SHARD = "DLB_FUSED_TEST_SHARD"  # "1/4": the second of four processes that share the tests


@dataclass
class Result:
    """What one part found; `summary` is for the table."""

    name: str
    backend: str = ""
    status: str = "ok"
    reason: str = ""
    summary: str = ""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A part cannot be done here; the text says why."""


class Fail(Exception):
    """A part found a fault."""

    def __init__(self, reason: str, data: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.data = data or {}


@dataclass
class Context:
    rehearse: bool
    out: Path
    reasons: dict[str, str] = field(default_factory=dict)  # why a backend cannot run here
    shards: int = 1

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def checks(self, *words: str) -> list[str]:
        """The command of a process of gpu_checks.py."""
        command = [sys.executable, str(FOLDER / "gpu_checks.py"), *words]
        return command + ["--rehearse"] * self.rehearse


class Part(NamedTuple):
    """`run(context, part, seconds)` returns the results of all its names, or data of its one."""

    group: str
    names: tuple[str, ...]
    backend: str
    seconds: float
    run: Callable[[Context, Part, float], Any]


# ---- processes ---------------------------------------------------------------------------------


class Process:
    """A command in the repository, with its children, its output in a file."""

    def __init__(self, command: Sequence[str], **variables: str) -> None:
        self.file = tempfile.TemporaryFile("w+b")
        paths = [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
        self.child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.file,
                                      stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)  # fmt: skip
        self.timed_out = False
        atexit.register(self.stop)  # whatever ends this program

    def running(self) -> bool:
        return self.child.poll() is None

    def stop(self) -> None:
        """An interrupt first: pytest then still writes what it found."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if self.running():
                self.timed_out = True
                os.killpg(self.child.pid, number)
                try:
                    self.child.wait(10)
                except subprocess.TimeoutExpired:
                    continue

    def wait(self, end: float) -> None:
        while self.running() and time.monotonic() < end:
            time.sleep(0.05)
        self.stop()

    @property
    def text(self) -> str:
        """Read by position: the child's own place in the file stays where it is."""
        size = os.fstat(self.file.fileno()).st_size
        text = os.pread(self.file.fileno(), size, 0).decode(errors="replace")
        return text.replace(f"{ROOT}/", "")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of gpu_checks.py, those that have ended."""
        whole = self.text.rpartition("\n")[0].splitlines()
        return [json.loads(line[len(MARK) :]) for line in whole if line.startswith(MARK)]

    def how_it_ended(self) -> str:
        if self.timed_out:
            return "it was stopped at its time limit"
        last = [line for line in self.text.splitlines() if line.strip()][-3:]
        return f"it ended with status {self.child.returncode}: " + " | ".join(last)[-600:]


def run_together(processes: Iterable[Process], seconds: float) -> list[Process]:
    end = time.monotonic() + seconds
    processes = list(processes)
    for process in processes:
        process.wait(end)
    return processes


# ---- the parts ---------------------------------------------------------------------------------


def build(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """The compiled modules, in place; in a rehearsal into a folder that is then removed."""
    need = [m for m in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(m) is None]
    if need == ["ninja"] and shutil.which("ninja"):
        need = []
    if need:
        raise Skip(f"Python has no {' and no '.join(need)}; modules that are there are used")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext"]
        if context.rehearse:
            elsewhere = ["--build-lib", folder, "--build-temp", f"{folder}/temp"]
            (process,) = run_together(
                [Process([*command, *elsewhere], DLB_FUSED_CUDA="0")], seconds
            )
        else:
            (process,) = run_together([Process([*command, "--inplace"])], seconds)
        built = sorted((Path(folder) if context.rehearse else ROOT).glob("dlb_fused/_c*.so"))
    says = [line for line in process.text.splitlines() if line.startswith("dlb_fused: ")]
    names = [path.name.split(".")[0] for path in built]
    if process.child.returncode or "_cpu" not in names:
        raise Fail(process.how_it_ended(), {"built": names, "says": says})
    return {"built": names, "says": says, "summary": ", ".join(names)}


def environment(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """The machine, its versions and tools, and for each backend whether it can run."""
    import torch

    names = device_backends()
    processes = {name: Process(context.checks("check", name, "available")) for name in names}
    run_together(processes.values(), seconds)
    found = {name: next(iter(process.lines), None) for name, process in processes.items()}
    tools = {tool: shutil.which(tool) is not None for tool in ("nvcc", "compute-sanitizer", "ncu")}
    data: dict[str, Any] = {"backends": found, "tools": tools, "cuda_of_torch": torch.version.cuda}
    summary = "a CPU in place of a GPU"
    if not context.rehearse:
        data["devices"] = [describe_device(i) for i in range(torch.cuda.device_count())]
        first = data["devices"][0]
        context.shards = max(1, min((os.cpu_count() or 1) // 2, int(first["memory_gb"] / 10), 8))
        summary = f"{first['name']}, driver {first['driver']}, torch {torch.__version__}"
    context.reasons = {k: v["reason"] for k, v in found.items() if v and v["status"] == "skipped"}
    bad = [
        f"{name}: {line['reason'] if line else processes[name].how_it_ended()}"
        for name, line in found.items()
        if line is None or line["status"] == "failed"
    ]
    if bad:
        raise Fail("; ".join(bad), data)
    cannot = [f"no {name}: {reason}" for name, reason in context.reasons.items()]
    return {**data, "summary": "; ".join([summary, *cannot])}


def describe_device(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(index)]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory * 1e-9,
        "l2_mb": properties.L2_cache_size * 1e-6,
        "driver": driver or "unknown",
    }


def device_backends() -> list[str]:
    """All but the one that is for CPU tensors alone."""
    from dlb_fused import BACKENDS

    return [name for name in BACKENDS if name != "cpu"]


def refuse_if_absent(context: Context, backend: str) -> None:
    if backend in context.reasons:
        raise Skip(context.reasons[backend])


# Some 200 random shapes, for each of which Triton would compile anew, for minutes.
LEFT_OUT = {"triton": "test_any_input"}


def tests(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """The cases of this backend on this device, dealt to several processes."""
    refuse_if_absent(context, part.backend)
    files = [f for f in sorted(ROOT.glob("tests/test_*.py")) if "backend_device" in f.read_text()]
    cases = f"{part.backend}-{context.device}"
    left_out = LEFT_OUT.get(part.backend, "")
    if left_out:
        cases += f" and not {left_out}"
    if context.rehearse:
        files, cases = [ROOT / "tests/test_backends.py"], f"{cases} and test_loss_and_gradient"
    interpret = {"TRITON_INTERPRET": "1"} if context.rehearse and part.backend == "triton" else {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_parts", "-p",
                   "no:cacheprovider", "--continue-on-collection-errors", "-k", cases,
                   *map(str, files)]  # fmt: skip
        processes = run_together(
            (
                Process(
                    [*command, f"--junitxml={folder}/{k}.xml"],
                    **{SHARD: f"{k}/{context.shards}", **interpret},
                )
                for k in range(context.shards)
            ),
            seconds - 12,
        )
        counts, bad, skips = read_junit(sorted(Path(folder).glob("*.xml")))
    # pytest: 0 all passed, 1 some failed, 5 this process had none to run.
    ended = [
        p.how_it_ended() for p in processes if p.timed_out or p.child.returncode not in (0, 1, 5)
    ]
    data = {**counts, "left_out": left_out, "processes": len(processes), "bad": bad, "skips": skips}
    if bad or ended:
        raise Fail("; ".join([f"{len(bad)} of {counts['tests']} failed", *bad[:3], *ended]), data)
    if not counts["passed"]:
        raise Fail(f"no test ran: {skips or 'none was selected'}", data)
    note = f", {left_out} left out" if left_out else ""
    return {**data, "summary": f"{counts['passed']} passed, {counts['skipped']} skipped{note}"}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """This file is a plugin of the processes above: each keeps its share of the tests."""
    shard, shards = map(int, os.environ.get(SHARD, "0/1").split("/"))
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % shards == shard]


def read_junit(paths: Sequence[Path]) -> tuple[dict[str, int], list[str], list[str]]:
    """Counts, the failed cases with their messages, and the reasons of those skipped."""
    counts = dict.fromkeys(("tests", "passed", "failed", "skipped"), 0)
    bad, skips = [], set()
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        counts["tests"] += 1
        marks = {child.tag: child.get("message") or "" for child in case}
        if {"failure", "error"} & set(marks):
            counts["failed"] += 1
            message = (marks.get("failure") or marks.get("error") or "").splitlines()[:1]
            bad.append(f"{case.get('classname')}::{case.get('name')}: {' '.join(message)[:300]}")
        elif "skipped" in marks:
            counts["skipped"] += 1
            skips.add(marks["skipped"])
        else:
            counts["passed"] += 1
    return counts, bad, sorted(skips)


def checks(context: Context, part: Part, seconds: float) -> list[Result]:
    """The checks of gpu_checks.py in one process, and after one that fails in a new one."""
    refuse_if_absent(context, part.backend)
    end = time.monotonic() + seconds
    found: dict[str, Result] = {}
    while todo := [name for name in part.names if name not in found]:
        if time.monotonic() > end - 8:
            return [found.get(n) or no_time(n, part.backend) for n in part.names]
        process = Process(context.checks("check", part.backend, *todo))
        count, since = 0, time.monotonic()
        while process.running() and time.monotonic() < min(end, since + 100):
            time.sleep(0.05)
            if len(process.lines) > count:
                count, since = len(process.lines), time.monotonic()
        process.stop()
        found |= {line["name"]: Result(backend=part.backend, **line) for line in process.lines}
        if not ended_well(process):
            name = next((name for name in todo if name not in found), todo[-1])
            found[name] = Result(name, part.backend, "failed", process.how_it_ended())
    return [found[name] for name in part.names]


def ended_well(process: Process) -> bool:
    """At the end of the list, or at a check that failed in words."""
    statuses = [line["status"] for line in process.lines]
    return process.child.returncode == int("failed" in statuses)


def no_time(name: str, backend: str) -> Result:
    return Result(name, backend, "skipped", "no time was left")


def sanitizer(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over a few launches; and over a planted fault, which it must find."""
    refuse_if_absent(context, part.backend)
    probe = context.checks("probe", part.backend)
    refuse_tool("compute-sanitizer", context, probe, seconds)
    run = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "application-only"]
    memcheck = [*run, "--tool", "memcheck", "--report-api-errors", "no"]
    commands = {
        "memcheck": [*memcheck, *probe],
        "racecheck": [*run, "--tool", "racecheck", *probe],
        "synccheck": [*run, "--tool", "synccheck", *probe],
        "planted": [*memcheck, *probe, "--planted"],
    }
    # Each tensor then is an allocation of its own, with bounds that can be checked.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    processes = {tool: Process(command, **alone) for tool, command in commands.items()}
    run_together(processes.values(), seconds)
    planted = processes.pop("planted")
    says = {tool: verdict(process) for tool, process in processes.items()}
    data = {"says": says, "planted_found": "Invalid __global__ read" in planted.text}
    bad = [f"{tool}: {say}" for tool, say in says.items() if say != "clean"]
    works = data["planted_found"] or any(p.child.returncode == 9 for p in processes.values())
    if bad and (not works or len(bad) == sum(p.timed_out for p in processes.values())):
        raise Skip("; ".join(bad))
    if bad:
        raise Fail("; ".join(bad), data)
    if not data["planted_found"]:
        raise Fail(f"memcheck did not find a planted fault: {planted.how_it_ended()}", data)
    return {**data, "summary": f"{', '.join(says)}: clean; a planted fault found"}


def verdict(process: Process) -> str:
    """ "clean" only if the launches were made, the tool summed up, and it found nothing."""
    text = process.text
    summed = re.search(r"SUMMARY: 0 (errors|hazards displayed)", text) is not None
    if process.child.returncode == 0 and summed and process.lines:
        return "clean"
    found = [line for line in text.splitlines() if line.startswith("=========")]
    return " | ".join(line.strip("= ") for line in found[1:4])[:500] or process.how_it_ended()


def refuse_tool(tool: str, context: Context, probe: list[str], seconds: float) -> None:
    """In a rehearsal the program runs without the tool that would watch it."""
    if context.rehearse:
        (process,) = run_together([Process(probe)], seconds)
        if process.child.returncode or not process.lines:
            raise Fail(f"the program to be watched: {process.how_it_ended()}")
        raise Skip(f"not rehearsed: {tool} watches a GPU; the program for it ran")
    if shutil.which(tool) is None:
        raise Skip(f"{tool} is not on PATH")


METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "gpu__time_duration.sum": "ns",
}


def traffic(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """Bytes that one forward launch moves, by ncu's counters, against the ideal."""
    refuse_if_absent(context, part.backend)
    probe = context.checks("probe", part.backend, "--traffic")
    refuse_tool("ncu", context, probe, seconds)
    # The clocks stay as they are.
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--metrics",
               ",".join(METRICS), "--csv", "--print-units", "base", *probe]  # fmt: skip
    (process,) = run_together([Process(command)], seconds)
    cases = [line for line in process.lines if "shape" in line]
    launches = read_ncu(process.text)
    error = [line for line in process.text.splitlines() if line.startswith("==ERROR==")]
    if error:
        raise Skip(error[0])
    if process.child.returncode:
        raise Fail(process.how_it_ended())
    if len(launches) != len(cases) or not cases:
        raise Fail(f"{len(cases)} forwards, but counters of {len(launches)}")
    for case, counters in zip(cases, launches, strict=True):
        case |= {"counters": counters, "of_ideal": counters["read"] / case["ideal_read"]}
        case["written_of_ideal"] = counters["written"] / case["ideal_written"]
    ratios = [case["of_ideal"] for case in cases]
    summary = f"reads {min(ratios):.2f} to {max(ratios):.2f} of the ideal bytes"
    return {"cases": cases, "summary": summary}


def read_ncu(text: str) -> list[dict[str, Any]]:
    """Counters summed over the launches of each forward; a kernel that spins begins each."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    forwards: list[dict[str, Any]] = []
    marks = set()
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if "spin_kernel" in row["Kernel Name"]:
            if row["ID"] not in marks:
                forwards.append({"kernels": [], "read": 0.0, "written": 0.0, "ns": 0.0})
            marks.add(row["ID"])
            continue
        last = forwards[-1]
        last[METRICS[row["Metric Name"]]] += float(row["Metric Value"].replace(",", ""))
        if row["Kernel Name"] not in last["kernels"]:
            last["kernels"].append(row["Kernel Name"])
    return forwards


def other_builds(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """`_cuda` as PTX of sm_80 alone, compiled by the driver; and by another CUDA, if there is."""
    refuse_if_absent(context, part.backend)
    if context.rehearse:
        raise Skip("not rehearsed: PTX needs a driver")
    roots = {path.parents[1].resolve() for path in Path("/usr/local").glob("cuda-*/bin/nvcc")}
    variants = {"PTX of sm_80": {"DLB_FUSED_CUDA_ARCHITECTURES": "80+PTX"}}
    variants |= {r.name: {"CUDA_HOME": str(r)} for r in sorted(roots) if is_other_cuda(r)}
    end, found, bad = time.monotonic() + seconds, {}, []
    for k, (name, variables) in enumerate(variants.items()):
        left = (end - time.monotonic()) / (len(variants) - k)
        try:
            found[name] = try_build(context, variables, left)
        except Fail as why:
            found[name] = str(why)
            bad.append(f"{name}: {why}")
    if bad:
        raise Fail("; ".join(bad), found)
    note = "" if len(found) > 1 else "; no toolkit of another CUDA than torch's is there"
    return {**found, "summary": "; ".join(f"{k}: {say}" for k, say in found.items()) + note}


def is_other_cuda(root: Path) -> bool:
    import torch

    return root.name.removeprefix("cuda-").split(".")[0] != (torch.version.cuda or "").split(".")[0]


def try_build(context: Context, variables: dict[str, str], seconds: float) -> str:
    """Builds `_cuda` into a copy of the package, and lets that compute."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "dlb_fused", f"{folder}/dlb_fused", ignore=ignore)
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder]
        command += ["--build-temp", f"{folder}/temp"]
        process = Process(command, DLB_FUSED_CUDA="1", **variables)
        process.wait(end)
        if process.child.returncode:
            raise Fail(process.how_it_ended())
        names = ("available", "launches", "fp16")
        paths = os.pathsep.join([folder, str(FOLDER)])
        process = Process(context.checks("check", "cuda", *names), PYTHONPATH=paths)
        process.wait(end)
    failed = [line["reason"] for line in process.lines if line["status"] == "failed"]
    if failed or process.child.returncode:
        raise Fail(failed[0] if failed else process.how_it_ended())
    first = process.lines[0]
    if first["status"] == "skipped":
        return f"cannot run: {first['reason']}"
    asked, has = variables.get("DLB_FUSED_CUDA_ARCHITECTURES"), first["data"]["architectures"]
    if asked not in (None, has):
        raise Fail(f"built for {asked}, but what ran was built for {has}")
    return "computes"


def step(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """bench_step.py: the share of the loss in whole training steps; compiled, if there is time."""
    modes = "eager,autocast,graphs,compiled" if seconds > 400 else "eager,autocast,graphs"
    few = ["--quick", "--cases", "resnet20"] if context.rehearse else []
    command = [sys.executable, str(FOLDER / "bench_step.py"), "--device", context.device,
               "--modes", modes, "--out", str(context.out), *few]  # fmt: skip
    (process,) = run_together([Process(command)], seconds)
    written = re.search(r"^written: .*?([^/\s]+\.json)", process.text, re.M)
    if written is None:
        raise Fail(process.how_it_ended())
    wrong = re.findall(r"^(?:WRONG|failed): .*", process.text, re.M)
    results = json.loads((context.out / written[1]).read_text())["results"]
    if wrong or not results:
        raise Fail("; ".join(wrong[:3]) or process.how_it_ended(), {"file": written[1]})
    ours = [r for r in results if r["loss"] == "DLBLoss"]
    shares = ", ".join(f"{r['case']} {r['mode']} {r['share']:.1%}" for r in ours)
    data = {"file": written[1], "results": len(results), "modes": modes}
    summary = "times of a rehearsal say nothing" if context.rehearse else f"DLBLoss: {shares}"
    return {**data, "summary": summary}


def compiled(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """compiled_traffic.py: kernels of the compiled naive loss, predicted and counted."""
    command = [sys.executable, str(FOLDER / "compiled_traffic.py"), "--device", "cuda"]
    (process,) = run_together([Process(command + ["--rehearse"] * context.rehearse)], seconds)
    rows = process.lines
    if not rows or (process.child.returncode and not process.timed_out):
        raise Fail(process.how_it_ended())
    known = [row for row in rows if row["predicted"]]
    same = sum(row["predicted"] == row["counted"] for row in known)
    note = "; the rest was left out for want of time" if process.timed_out else ""
    summary = f"{same} of {len(known)} as predicted{note}"
    return {"rows": rows, "summary": "counts nothing" if context.rehearse else summary}


def bench(context: Context, part: Part, seconds: float) -> dict[str, Any]:
    """bench_loss.py's variants and shapes, as many as there is time for; JSON and pictures."""
    command = [sys.executable, str(FOLDER / "bench_loss.py"), "--device", context.device]
    command += ["--out", str(context.out), "--seconds", str(seconds - 15)]
    if context.rehearse:
        command += ["--quick", "--shapes", "4x10,6x33", "--skip", "compile"]
    end = time.monotonic() + seconds - 2
    process = Process(command)
    process.wait(end)
    path = re.search(r"^written: (.*)$", process.text, re.MULTILINE)
    if path is None:
        raise Fail(process.how_it_ended())
    file = context.out / Path(path[1]).name
    report = json.loads(file.read_text())
    bad = [r for r in (*report["host"], *report["results"]) if r["status"] != "ok"]
    data = {
        "file": file.name,
        "results": len(report["results"]),
        "bad": [f"{r['status']}: {r['variant']}, {r['dtype']} ({r['B']}, {r['C']}): {r['reason']}"
                for r in bad],
        "left_out": report["left_out"],
        "absent": report["absent"],
        "bars_missed": [bar for bar in report["bars"] if not bar["met"]],
    }  # fmt: skip
    if process.child.returncode and not process.timed_out:
        raise Fail("; ".join(data["bad"][:3]) or process.how_it_ended(), data)
    if not report["results"]:
        raise Skip("no time was left")
    left = f"; left out for want of time: {len(report['left_out'])}" * bool(report["left_out"])
    met = sum(bar["met"] for bar in report["bars"])
    bars = f"bars met at {met} of {len(report['bars'])} places"
    return {**data, "summary": f"{file.name}, {len(report['results'])} results, {bars}{left}"}


def all_parts() -> list[Part]:
    from gpu_checks import CHECKS

    kernels = [name for name in device_backends() if name != "eager"]
    names = tuple(name for name in CHECKS if name != "available")
    return [
        Part("build", ("build",), "", 180, build),
        Part("environment", ("environment",), "", 180, environment),
        *(Part("tests", ("tests",), name, 150, tests) for name in device_backends()),
        *(Part("checks", names, name, 150, checks) for name in kernels),
        *(Part("sanitizer", ("sanitizer",), name, 120, sanitizer) for name in kernels),
        *(Part("traffic", ("traffic",), name, 60, traffic) for name in kernels),
        *(Part("builds", ("other builds",), n, 120, other_builds) for n in kernels if n == "cuda"),
        Part("step", ("step",), "", 150, step),
        Part("compiled", ("compiled",), "", 60, compiled),
        Part("bench", ("bench",), "", 9999, bench),
    ]
