"""The two pictures of a run: time as a multiple of plain cross-entropy's, and bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from report import BACKWARD, Result, Timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Value = Callable[[Timing], float | None]


class Look(NamedTuple):
    colour: str
    marker: str
    line: str = "-"
    width: float = 1.5


OURS = ("#0b6e4f", "#6bbf59", "#1f78b4")
# Families of variants: of each, the later ones are drawn with other markers.
COLOURS = {"eager": "#d1495b", "compile": "#edae49", "cross_entropy": "#555555", "liger": "#7b5ea7",
           "copy": "#000000"}  # fmt: skip
MARKERS = "osD^v"


def looks_of(names: Sequence[str], ours: set[str]) -> dict[str, Look]:
    looks: dict[str, Look] = {}
    count: dict[str, int] = {}
    for name in names:
        if name in ours:
            looks[name] = Look(OURS[len(looks.keys() & ours) % len(OURS)], "o", "-", 3)
            continue
        family = name.split("[")[0]
        k = count[family] = count.get(family, -1) + 1
        dashed = ":" if family == "copy" else "--"
        looks[name] = Look(COLOURS.get(family, "#8c564b"), MARKERS[k % 5], dashed)
    return looks


def draw(results: Sequence[Result], where: str, path: Path) -> None:
    """Beside `path`, a JSON file: its name with .png, and with -bandwidth.png."""
    timed = [r for r in results if BACKWARD in r.times and r.variant != "dlb_loss[eager]"]

    def pictured(*leave_out: str) -> list[Result]:
        return [r for r in timed if not any(word in r.variant for word in leave_out)]

    draw_one(
        pictured("copy"),
        lambda t: t.over.get("cross_entropy"),
        "time / time of F.cross_entropy",
        f"Forward + backward as a multiple of F.cross_entropy alone: less is faster\n{where}",
        path.with_suffix(".png"),
        "{:.2f}",
    )
    draw_one(
        pictured("liger]", "[cat]"),
        lambda t: t.gb_per_s,
        "GB/s of the ideal bytes",
        f"DLB loss, forward + backward: ideal bytes a second, beside a plain copy\n{where}",
        path.with_name(f"{path.stem}-bandwidth.png"),
        "{:.3g}",
    )


def draw_one(
    results: Sequence[Result], value: Value, label: str, title: str, path: Path, digits: str
) -> None:
    """A panel for each dtype, as wide as it has shapes, or one below the other if they are many."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    if not dtypes:
        return
    shapes = {d: list(dict.fromkeys((r.B, r.C) for r in results if r.dtype == d)) for d in dtypes}
    widths = [len(shapes[d]) + 1.5 for d in dtypes]
    stacked = sum(widths) > 26
    rows, columns = (len(dtypes), 1) if stacked else (1, len(dtypes))
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, sharey="row", layout="constrained",
        figsize=(13, 1.2 + 5.2 * rows), width_ratios=None if stacked else widths,
    )  # fmt: skip
    names = list(dict.fromkeys(r.variant for r in results))
    looks = looks_of(names, {r.variant for r in results if r.ours})
    for axis, dtype in zip(axes.flat, dtypes, strict=True):
        of_dtype = [r for r in results if r.dtype == dtype]
        draw_panel(axis, of_dtype, shapes[dtype], value, looks, digits)
        axis.set_title(dtype, fontsize=12)
        axis.set_xlabel("B×C of the logits")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"{label} (log scale)", fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=11, frameon=False)
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(
    axis: Any,
    results: Sequence[Result],
    shapes: list[tuple[int, int]],
    value: Value,
    looks: dict[str, Look],
    digits: str,
) -> None:
    """A line for each variant; those of ours carry their numbers."""
    for name, look in looks.items():
        row = [math.nan] * len(shapes)
        for r in results:
            if r.variant == name:
                found = value(r.times[BACKWARD])
                row[shapes.index((r.B, r.C))] = math.nan if found is None else found
        front = look.width > 2
        axis.plot(range(len(shapes)), row, look.marker, ls=look.line, color=look.colour, label=name,
                  lw=look.width, ms=7 if front else 5, zorder=3 if front else 2)  # fmt: skip
        for k, y in enumerate(row if name.startswith("dlb_loss") else []):
            if math.isfinite(y):
                axis.annotate(digits.format(y), (k, y), (0, -15), textcoords="offset points",
                              ha="center", color=look.colour, fontsize=9,
                              fontweight="bold")  # fmt: skip
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(y=0.12)
    axis.set_xticks(range(len(shapes)), [f"{B}×{C}" for B, C in shapes], fontsize=9, rotation=35,
                    ha="right", rotation_mode="anchor")  # fmt: skip
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.grid(axis="y", alpha=0.3)
