"""What a micro-benchmark found, and its table, JSON and picture."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.markup import escape
from rich.table import Table

import dlb_fused

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent

OPTIONS: dict[str, Any] = {"temperature": 3.0, "alpha": 1.0}

MODES = ("forward", "forward_backward")


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
    speedup_over_eager: float | None
    time_over_cross_entropy: float | None


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
    extra_memory: float | None = None  # peak of forward_backward beyond the inputs, / (B·C·b)
    times: dict[str, Timing] = field(default_factory=dict)  # by mode


@dataclass(frozen=True)
class Settings:
    shapes: list[tuple[int, int]]
    dtypes: list[str]
    device: str
    threads: int
    skip: list[str]
    quick: bool
    cold: bool

    @property
    def sample_ms(self) -> float:
        return 1 if self.quick else 4

    def rounds(self, seconds_per_round: float) -> int:
        low, high, seconds = (3, 15, 0.5) if self.quick else (7, 60, 6.0)
        return min(max(low, int(seconds / seconds_per_round)), high)


@dataclass
class Report:
    settings: Settings
    notes: dict[str, str] = field(default_factory=dict)  # of each variant
    absent: dict[str, str] = field(default_factory=dict)  # the reason, for each variant
    results: list[Result] = field(default_factory=list)

    def refused(self) -> bool:
        return any(r.status == "WRONG" or (r.status == "failed" and r.ours) for r in self.results)


COLUMNS = ("forward", "forward +\nbackward", "10 to 90 %", "speed-up\non eager",
           "time / cross\nentropy", "ideal\nGB/s", "of the\ncopy", "memory\n/ (B·C·b)",
           "gradient\nerror")  # fmt: skip


def table_of(results: list[Result]) -> Table:
    first = results[0]
    title = f"{first.dtype}, (B, C) = ({first.B}, {first.C}), m = {first.m}"
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)

    def form(value: float | None, spec: str) -> str:
        return "–" if value is None else spec.format(value)

    def duration(us: float) -> str:
        return f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.2f} ms"

    for r in results:
        name, error = escape(r.variant), form(r.gradient_error, "{:.0e}")
        t, forward = r.times.get(MODES[1]), r.times.get(MODES[0])
        if t is None:
            table.add_row(name, r.status, *["–"] * 7, error, style="red")
            continue
        table.add_row(
            name,
            duration(forward.median_us) if forward else "–",
            duration(t.median_us),
            f"{duration(t.q10_us)} to {duration(t.q90_us)}",
            form(t.speedup_over_eager, "{:.2f}×"),
            form(t.time_over_cross_entropy, "{:.2f}"),
            f"{t.gb_per_s:.1f}",
            form(t.of_copy, "{:.0%}"),
            form(r.extra_memory, "{:.2f}"),
            error,
            style="bold" if r.ours else None,
        )
    return table


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


def as_json(report: Report) -> dict[str, Any]:
    on_gpu = report.settings.device != "cpu"
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": report.settings.threads,
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "system": platform.platform(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if has_triton else None,
            "dlb_fused": dlb_fused.__version__,
        },
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "settings": asdict(report.settings) | OPTIONS,
        "variants": report.notes,
        "absent": report.absent,
        "results": [asdict(r) for r in report.results],
    }


OUR_COLOURS = ("#0b6e4f", "#6bbf59", "#f2a541", "#1f78b4")

STOCK_COLOURS = ("#c9c9c9", "#8f8f8f", "#5f5f5f")


def draw(report: Report, title: str, path: Path) -> None:
    """Speed-up over eager, forward + backward: a panel for each dtype, a group for each shape."""
    dtypes = report.settings.dtypes
    size = (13, 1 + 5 * len(dtypes))
    figure, axes = plt.subplots(len(dtypes), figsize=size, squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        draw_panel(axis, [r for r in report.results if r.dtype == dtype])
        axis.set_ylabel(f"{dtype}: times faster than eager\nforward + backward, log scale")
    axes[0, 0].set_title(title, fontsize=14)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_panel(axis: Any, results: list[Result]) -> None:
    shapes = list(dict.fromkeys((r.B, r.C) for r in results))
    speedups: dict[str, list[float]] = {}
    for r in results:
        t = r.times.get(MODES[1])
        if r.variant != "eager" and t is not None and t.speedup_over_eager is not None:
            row = speedups.setdefault(r.variant, [math.nan] * len(shapes))
            row[shapes.index((r.B, r.C))] = t.speedup_over_eager
    speedups = {name: row for name, row in speedups.items() if not name.startswith("copy")}
    ours = {r.variant for r in results if r.ours}
    colours = {True: iter(OUR_COLOURS * 9), False: iter(STOCK_COLOURS * 9)}
    width = 0.85 / max(len(speedups), 1)
    for i, (name, row) in enumerate(speedups.items()):
        at = [k + (i + 0.5) * width - 0.425 for k in range(len(shapes))]
        colour = next(colours[name in ours])
        bars = axis.bar(at, [v - 1 for v in row], width, bottom=1, label=name, color=colour)
        if name in ours:
            labels = [f"{v:.2g}" if v == v else "" for v in row]
            axis.bar_label(bars, labels, fontsize=8, padding=1)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}×")
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(shapes)), [f"{B}×{C}" for B, C in shapes], fontsize=9)
    axis.set_xlabel("B×C of the logits")
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.15)
    if speedups:
        axis.legend(ncols=len(speedups), loc="upper left")


def write(report: Report, folder: Path) -> Path:
    """Writes JSON and PNG, named after the device; returns the path of the JSON."""
    data = as_json(report)
    info = data["machine"]
    model = info["gpu"] or info["cpu"]
    stem = f"{report.settings.device}-{model}" + "-quick" * report.settings.quick
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") + ".json")
    path.write_text(json.dumps(data, indent=1) + "\n")
    threads = "" if info["gpu"] else f", {info['threads']} threads"
    title = f"DLB loss on {model}{threads}, torch {torch.__version__}, {data['date'][:10]}"
    draw(report, title, path.with_suffix(".png"))
    return path
