"""The bars that the loss is to meet, and where a run meets them. They do not decide a run's exit
status: another machine has other ratios."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from report import BACKWARD, HOST, Report, Result, Timing, l2_bytes, new_table
from rich.markup import escape
from rich.table import Table

Where = Callable[[Result, Timing, int], bool]  # the last: bytes of the L2
Value = Callable[[Result, Timing], float | None]


class Bar(NamedTuple):
    name: str
    subject: str  # "dlb_loss" or "DLBLoss"
    where: Where
    value: Value
    limit: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def over(name: str) -> Value:
    return lambda r, t: t.over.get(name)


def faster_than(name: str) -> Value:
    return lambda r, t: 1 / t.over[name] if name in t.over else None


def above(name: str) -> Value:
    return lambda r, t: t.above.get(name)


def of_copy(r: Result, t: Timing) -> float | None:
    return t.of_copy


def of_fresh_copy(r: Result, t: Timing) -> float | None:
    return t.of_fresh_copy


def memory(r: Result, t: Timing) -> float | None:
    """Of the gradient, the module's cache, and what labels and sums of rows take."""
    cache = r.logits_bytes * (r.B - r.m) / r.B if r.variant == "DLBLoss" else 0
    allowed = r.logits_bytes + cache + 32 * r.B + 1024
    return None if r.extra_bytes is None else r.extra_bytes / allowed


def always(r: Result, t: Timing, l2: int) -> bool:
    return True


def size(low: float, high: float = float("inf")) -> Where:
    return lambda r, t, l2: low <= r.B * r.C < high


def shape(B: int, C: int, dtype: str = "") -> Where:
    return lambda r, t, l2: (r.B, r.C) == (B, C) and dtype in ("", r.dtype)


def wide(r: Result, t: Timing, l2: int) -> bool:
    return r.C >= 20000 and r.dtype == "float32"


def large(r: Result, t: Timing, l2: int) -> bool:
    """Where traffic decides."""
    return r.C >= 4096 and t.ideal_bytes >= 4 * l2


HOST_BARS = [
    Bar("host µs above an empty Function", who, always, above("empty Function"), 20)
    for who in ("dlb_loss", "DLBLoss")
]
MEMORY_BARS = [
    Bar("memory / gradient", "dlb_loss", always, memory, 1),
    Bar("memory / (gradient + cache)", "DLBLoss", always, memory, 1),
]
MAX = "compile[max-autotune]"
CPU_BARS = [
    Bar("time / cross_entropy, B·C ≥ 1e5", "dlb_loss", size(1e5), over("cross_entropy"), 0.7),
    Bar("time / cross_entropy, B·C ≥ 1e6", "dlb_loss", size(1e6), over("cross_entropy"), 0.5),
    Bar("µs above cross_entropy, B·C < 1e4", "dlb_loss", size(0, 1e4), above("cross_entropy"), 10),
    Bar("faster than compile", "dlb_loss", always, faster_than("compile"), 3, False),
    Bar(f"faster than {MAX}", "dlb_loss", always, faster_than(MAX), 3, False),
    *(
        Bar("faster than eager", "dlb_loss", shape(B, C, "float32"), faster_than("eager"), x, False)
        for B, C, x in ((256, 100, 4), (256, 1000, 5), (512, 21841, 10), (64, 128256, 6))
    ),
    Bar("of copy, C ≥ 20000 fp32", "dlb_loss", wide, of_copy, 0.7, False),
    Bar("of copy[fresh], C ≥ 20000 fp32", "dlb_loss", wide, of_fresh_copy, 0.7, False),
    *MEMORY_BARS,
]
GPU_BARS = [
    Bar("faster than eager, large", "dlb_loss", large, faster_than("eager"), 8, False),
    Bar("faster than eager", "dlb_loss", shape(256, 100), faster_than("eager"), 10, False),
    Bar("faster than compile", "dlb_loss", always, faster_than("compile"), 2, False),
    Bar(f"faster than {MAX}", "dlb_loss", always, faster_than(MAX), 2, False),
    Bar("faster than liger", "dlb_loss", always, faster_than("liger"), 5, False),
    Bar("time / cross_entropy", "dlb_loss", always, over("cross_entropy"), 0.5),
    Bar("of copy, large", "dlb_loss", large, of_copy, 0.9, False),
    Bar("launches", "dlb_loss", always, lambda r, t: r.launches, 2),
    *(Bar("waits", who, always, lambda r, t: r.syncs, 0) for who in ("dlb_loss", "DLBLoss")),
    *MEMORY_BARS,
]


class Verdict(NamedTuple):
    bar: str
    limit: str
    variant: str
    dtype: str
    B: int
    C: int
    value: float
    met: bool


def is_subject(bar: Bar, variant: str) -> bool:
    """A kernel of ours: not the specification, and not one that was told the loss scale."""
    if bar.subject == "DLBLoss":
        return variant == "DLBLoss"
    return re.fullmatch(r"dlb_loss\[(?!eager)\w+\]", variant) is not None


def judge(report: Report) -> list[Verdict]:
    """Each bar at each result that it is about; a result that was refused has no times."""
    l2 = l2_bytes(report.settings.device) or 0
    bars = CPU_BARS if report.settings.device == "cpu" else GPU_BARS
    todo = [(bar, r, r.times.get(BACKWARD)) for bar in bars for r in report.results]
    todo += [(bar, r, r.times.get(HOST)) for bar in HOST_BARS for r in report.host]
    found = []
    for bar, r, t in todo:
        if t is None or not is_subject(bar, r.variant) or not bar.where(r, t, l2):
            continue
        value = bar.value(r, t)
        if value is not None:
            limit = f"{'≤' if bar.at_most else '≥'} {bar.limit:g}"
            place = (r.variant, r.dtype, r.B, r.C)
            found.append(Verdict(bar.name, limit, *place, value, bar.met(value)))
    return found


def table_of_bars(verdicts: Sequence[Verdict]) -> Table:
    """A line for each bar and variant, with the result that is furthest off."""
    table = new_table("Bars", ["bar", "limit", "met", "worst", "at"])
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault((v.variant, v.bar, v.limit), []).append(v)
    for (variant, bar, limit), group in groups.items():
        worst = (max if limit.startswith("≤") else min)(group, key=lambda v: v.value)
        count = sum(v.met for v in group)
        where = f"{worst.dtype} ({worst.B}, {worst.C})"
        table.add_row(
            escape(variant), escape(bar), limit, f"{count} of {len(group)}", f"{worst.value:.3g}",
            where, style="green" if count == len(group) else "yellow",
        )  # fmt: skip
    return table
