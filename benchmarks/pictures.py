"""The two pictures of a run: time as a multiple of plain cross-entropy's, and bandwidth beside a
copy's. Forward + backward; the first dtype at all its shapes, the others at a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from report import BACKWARD, SOME_CLASSES, Result, Timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS = ("#0b6e4f", "#1f78b4", "#6bbf59")
FAMILIES = {"eager": "#d1495b", "compile": "#e09f3e", "cross_entropy": "#444444",
            "liger": "#7b5ea7", "copy": "#000000"}  # fmt: skip


class Plot(NamedTuple):
    title: str
    label: str
    value: Callable[[Timing], float | None]
    digits: str  # of the numbers beside ours
    less_is_better: bool
    leave_out: tuple[str, ...]


TIME = Plot(
    "DLB loss: time as a multiple of F.cross_entropy alone (less is faster)",
    "time / time of F.cross_entropy (log scale)",
    lambda t: t.over.get("cross_entropy"),
    "{:.2f}",
    True,
    ("copy",),
)
BANDWIDTH = Plot(
    "DLB loss: ideal bytes a second, in % of a plain copy's, whose GB/s stand on top",
    "% of the rate of the copy into reused memory",
    lambda t: t.of_copy and 100 * t.of_copy,
    "{:.0f}",
    False,
    ("copy[liger]", "eager[cat]"),
)


def draw(results: Sequence[Result], where: str, path: Path) -> None:
    """Beside `path`, a JSON file: its name with .png, and with -bandwidth.png."""
    for plot, suffix in ((TIME, ""), (BANDWIDTH, "-bandwidth")):
        leave_out = ("dlb_loss[eager]", *plot.leave_out)
        shown = [r for r in results if BACKWARD in r.times and not r.variant.startswith(leave_out)]
        if shown:
            draw_one(plot, shown, where, path.with_name(f"{path.stem}{suffix}.png"))


def draw_one(plot: Plot, results: Sequence[Result], where: str, path: Path) -> None:
    """A panel for each dtype, as wide as it has shapes."""
    shapes: dict[str, list[tuple[int, int]]] = {}
    for r in results:
        found = shapes.setdefault(r.dtype, [])
        classes = {C for _, C in found}
        few = r.dtype != next(iter(shapes))
        if (r.B, r.C) not in found and not (few and (r.C in classes or r.C not in SOME_CLASSES)):
            found.append((r.B, r.C))
    shapes = {dtype: found for dtype, found in shapes.items() if found}
    widths = [len(found) + 1.5 for found in shapes.values()]
    figure, axes = plt.subplots(
        1, len(shapes), squeeze=False, sharey=True, layout="constrained", figsize=(13, 6.4),
        width_ratios=widths,
    )  # fmt: skip
    ours = {r.variant: r.ours for r in results}
    families = list(dict.fromkeys(name.split("[")[0] for name in ours))
    names = sorted(ours, key=lambda name: (not ours[name], families.index(name.split("[")[0])))
    for axis, (dtype, found) in zip(axes.flat, shapes.items(), strict=True):
        draw_panel(
            axis, plot, [r for r in results if r.dtype == dtype], found, {n: ours[n] for n in names}
        )
        axis.set_title(dtype, fontsize=12)
    if not plot.less_is_better:
        axes[0, 0].set_ylim(0, max(125, 1.1 * axes[0, 0].get_ylim()[1]))  # all share it
    axes[0, 0].set_ylabel(plot.label, fontsize=12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=11, frameon=False)
    figure.suptitle(f"{plot.title}\n{where}; forward + backward, B×C of the logits", fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_panel(
    axis: Any,
    plot: Plot,
    results: Sequence[Result],
    shapes: Sequence[tuple[int, int]],
    names: dict[str, bool],
) -> None:
    """A line for each variant; the better of the kernels carries its number."""
    best = [math.nan] * len(shapes)
    count: dict[str, int] = {}
    for name, ours in names.items():
        row = values_of(name, plot, results, shapes)
        family = "ours" if ours else name.split("[")[0]
        k = count[family] = count.get(family, -1) + 1
        colour = OURS[k % len(OURS)] if ours else FAMILIES.get(family, "#8c564b")
        width, size, front = (3, 7, 3) if ours else (1.5, 5, 2)
        axis.plot(range(len(shapes)), row, "osD^v"[0 if ours else k % 5], ls="-" if ours else "--",
                  color=colour, lw=width, ms=size, zorder=front, label=name)  # fmt: skip
        if name.startswith("dlb_loss"):
            choose = min if plot.less_is_better else max
            best = [b if a != a else a if b != b else choose(a, b) for a, b in zip(best, row)]  # noqa: B905
        if name == "copy" and not plot.less_is_better:
            note_rates(axis, results, shapes)
    for k, y in enumerate(best):
        if math.isfinite(y):
            axis.annotate(
                plot.digits.format(y), (k, y), (0, -16 if plot.less_is_better else 9),
                textcoords="offset points", ha="center", color=OURS[0], fontsize=10,
                fontweight="bold", zorder=4, bbox={"fc": "white", "ec": "none", "alpha": 0.7,
                                                   "pad": 0.5},
            )  # fmt: skip
    if plot.less_is_better:
        axis.set_yscale("log", base=2)
        axis.margins(y=0.12)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(range(len(shapes)), [f"{B}×{C}" for B, C in shapes], fontsize=10, rotation=35,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.grid(axis="y", alpha=0.3)


def values_of(
    name: str, plot: Plot, results: Sequence[Result], shapes: Sequence[tuple[int, int]]
) -> list[float]:
    row = [math.nan] * len(shapes)
    for r in results:
        if r.variant == name and (r.B, r.C) in shapes:
            value = plot.value(r.times[BACKWARD])
            row[shapes.index((r.B, r.C))] = math.nan if value is None else value
    return row


def note_rates(axis: Any, results: Sequence[Result], shapes: Sequence[tuple[int, int]]) -> None:
    """What 100 % is, at the top."""
    for r in results:
        if r.variant == "copy" and (r.B, r.C) in shapes:
            at = shapes.index((r.B, r.C))
            axis.text(at, 0.985, f"{r.times[BACKWARD].gb_per_s:.0f}\nGB/s", fontsize=9, ha="center",
                      va="top", transform=axis.get_xaxis_transform())  # fmt: skip
