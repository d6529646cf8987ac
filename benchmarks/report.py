"""What a micro-benchmark found: its form, tables and JSON. The pictures: pictures.py."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

import dlb_fused

ROOT = Path(__file__).resolve().parent.parent

OPTIONS: dict[str, Any] = {"temperature": 3.0, "alpha": 1.0}
# A loss scale that stock PyTorch survives in float16: it rounds τ²·scale to that, and 65536 is inf.
SCALE = 2.0**12


class Mode(NamedTuple):
    """How a variant is called and timed."""

    backward: bool = True
    scaled: bool = False  # the gradient from above is SCALE, not 1
    cold: bool = False  # a GPU's L2 is flushed before each call
    host: bool = False  # the time that the host spends, which on a GPU is not that of the device


FORWARD, BACKWARD, SCALED = "forward", "forward_backward", "forward_backward_scaled"
COLD, HOST = "forward_backward_cold", "host"
MODES = {
    FORWARD: Mode(backward=False),
    BACKWARD: Mode(),
    SCALED: Mode(scaled=True),
    COLD: Mode(cold=True),
    HOST: Mode(host=True),
}
# Whose times the others are compared with, round by round.
REFERENCES = ("eager", "compile", "compile[max-autotune]", "cross_entropy", "liger", "copy",
              "copy[fresh]", "empty Function")  # fmt: skip

Case = tuple[str, int, int]  # dtype, B, C
SOME_CLASSES = (100, 1000, 21841, 50257)  # what is measured, or drawn, in every dtype


@dataclass(frozen=True)
class Timing:
    median_us: float
    min_us: float
    q10_us: float
    q90_us: float
    rounds: int
    calls_per_sample: int
    ideal_bytes: int
    gb_per_s: float  # of the ideal bytes
    of_copy: float | None  # that, over the rate of "copy"
    of_fresh_copy: float | None
    over: dict[str, float]  # time over that of a reference: medians of the ratios within rounds
    above: dict[str, float]  # µs above a reference, likewise


@dataclass
class Result:
    dtype: str
    B: int
    C: int
    m: int
    variant: str
    ours: bool
    status: str = "ok"  # "ok", "WRONG" or "failed"
    reason: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    scaled_gradient_error: float | None = None
    launches: int | None = None  # kernels on a GPU, aten operations on a CPU
    syncs: int | None = None  # waits on a GPU, values that the host reads on a CPU
    extra_bytes: int | None = None  # at the peak, beyond the inputs
    times: dict[str, Timing] = field(default_factory=dict)  # by mode

    def fail(self, error: Exception) -> None:
        self.status, self.reason = "failed", f"{type(error).__name__}: {error}"
        self.times.clear()

    @property
    def logits_bytes(self) -> int:
        return self.B * self.C * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Settings:
    cases: list[Case]
    device: str
    threads: int
    skip: list[str] = field(default_factory=list)
    quick: bool = False
    seconds: float | None = None  # for the whole run

    @property
    def sample_ms(self) -> float:
        return 20 if self.device == "cpu" and not self.quick else 1

    def rounds(self, seconds_per_round: float) -> int:
        low, high, seconds = (7, 40, 4.0) if self.device == "cpu" else (7, 30, 1.0)
        if self.quick:
            low, high, seconds = 3, 15, 0.5
        return min(max(low, int(seconds / seconds_per_round)), high)


@dataclass
class Report:
    settings: Settings
    notes: dict[str, str] = field(default_factory=dict)  # of each variant
    absent: dict[str, str] = field(default_factory=dict)  # the reason, for each variant
    host: list[Result] = field(default_factory=list)  # at one small shape: the host's time a step
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # cases for which there was no time

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(r.dtype for r in self.results))

    def not_ok(self) -> list[str]:
        return [f"{r.status}: {r.variant}, {r.dtype} ({r.B}, {r.C}): {r.reason}"
                for r in (*self.host, *self.results) if r.status != "ok"]  # fmt: skip

    def refused(self) -> bool:
        results = (*self.host, *self.results)
        return any(r.status == "WRONG" or (r.status == "failed" and r.ours) for r in results)


# ---- tables ------------------------------------------------------------------------------------


def form(value: float | None, spec: str) -> str:
    return "–" if value is None else spec.format(value)


def duration(t: Timing | None) -> str:
    if t is None:
        return "–"
    return f"{t.median_us:.1f} µs" if t.median_us < 1000 else f"{t.median_us / 1000:.2f} ms"


def new_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def table_of(results: Sequence[Result], device: str) -> Table:
    on_gpu = device != "cpu"
    columns = ["forward", "forward +\nbackward", "10 to\n90 %", "at a loss\nscale",
               *["L2\nflushed"] * on_gpu, "faster\nthan eager", "time / cross\nentropy",
               "ideal\nGB/s", "of the\ncopy", "of fresh\ncopy",
               *(["launches", "waits"] if on_gpu else ["aten\nops", "values\nread"]),
               "memory\n/ (B·C·b)", "gradient\nerror"]  # fmt: skip
    first = results[0]
    table = new_table(f"{first.dtype}, (B, C) = ({first.B}, {first.C}), m = {first.m}", columns)
    for r in results:
        t = r.times.get(BACKWARD)
        error = r.gradient_error if t or r.status != "ok" else r.scaled_gradient_error
        memory = r.extra_bytes and r.extra_bytes / r.logits_bytes
        cells = [
            duration(r.times.get(FORWARD)),
            duration(t) if r.status == "ok" else r.status,
            form(t and (t.q90_us - t.q10_us) / t.median_us, "±{:.0%}"),
            duration(r.times.get(SCALED)),
            *[duration(r.times.get(COLD))] * on_gpu,
            form(1 / t.over["eager"] if t and "eager" in t.over else None, "{:.2f}×"),
            form(t and t.over.get("cross_entropy"), "{:.2f}"),
            form(t and t.gb_per_s, "{:.1f}"),
            form(t and t.of_copy, "{:.0%}"),
            form(t and t.of_fresh_copy, "{:.0%}"),
            form(r.launches, "{}"),
            form(r.syncs, "{}"),
            form(memory, "{:.2f}"),
            form(error, "{:.0e}"),
        ]
        style = "red" if r.status != "ok" else "bold" if r.ours else None
        table.add_row(escape(r.variant), *cells, style=style)
    return table


def table_of_host(results: Sequence[Result]) -> Table:
    first = results[0]
    title = f"The host's time for a step, {first.dtype} ({first.B}, {first.C}), forward + backward"
    table = new_table(title, ["µs", "above an empty\nFunction", "above cross\nentropy"])
    for r in results:
        t = r.times.get(HOST)
        above = t.above if t else {}
        table.add_row(
            escape(r.variant),
            form(t and t.median_us, "{:.1f}") if r.status == "ok" else r.status,
            form(above.get("empty Function"), "{:.1f}"),
            form(above.get("cross_entropy"), "{:.1f}"),
            style="red" if r.status != "ok" else "bold" if r.ours else None,
        )
    return table


# ---- JSON --------------------------------------------------------------------------------------


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, no commit
        return None


def l2_bytes(device: str) -> int | None:
    if device == "cpu":
        return None
    return torch.cuda.get_device_properties(device).L2_cache_size


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str, threads: int) -> dict[str, Any]:
    """When, where and of what a result was taken."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": threads,
            "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
            "l2_bytes": l2_bytes(device),
            "system": platform.platform(),
            "malloc": malloc(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dlb_fused": dlb_fused.__version__,
            **{name: version_of(name) for name in PACKAGES},
        },
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def malloc(maps: Path = Path("/proc/self/maps")) -> str | None:
    """The malloc that this process has in place of libc's, if any: it decides whether a large
    gradient gets new pages at each step."""
    found = re.search(r"/lib((?:tc|je|mi)malloc)", maps.read_text() if maps.exists() else "")
    return found[1] if found else None


def as_json(report: Report) -> dict[str, Any]:
    return {
        "format": 2,
        **facts(report.settings.device, report.settings.threads),
        "settings": asdict(report.settings) | OPTIONS | {"loss_scale": SCALE},
        "variants": report.notes,
        "absent": report.absent,
        "left_out": report.left_out,
        "host": [asdict(r) for r in report.host],
        "results": [asdict(r) for r in report.results],
    }


PACKAGES = ("triton", "liger-kernel", "quack-kernels", "fla-core")


def rounded(value: Any) -> Any:
    """Floats to five digits; no time is known better."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def dump(data: dict[str, Any]) -> str:
    """A key a line, and an item a line of each list of objects."""
    lines = []
    for key, value in rounded(data).items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def model_of(settings: Settings) -> str:
    return cpu_model() if settings.device == "cpu" else torch.cuda.get_device_name()


def caption(settings: Settings) -> str:
    threads = f", {settings.threads} threads" * (settings.device == "cpu")
    versions = ", ".join(filter(None, [f"torch {torch.__version__}", malloc()]))
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{model_of(settings)}{threads}, {versions}, {today}"


def write(report: Report, folder: Path, bars: Sequence[dict[str, Any]]) -> Path:
    """Writes JSON, named after the device; returns its path."""
    settings = report.settings
    stem = "-".join([settings.device, model_of(settings), malloc() or ""])
    stem += "-quick" * settings.quick
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") + ".json")
    path.write_text(dump(as_json(report) | {"bars": list(bars)}))
    return path
