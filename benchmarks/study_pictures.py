"""The pictures of a study: accuracy against wrong labels, curves, paired differences, sensitivity,
and cost. The intervals of differences are those of study_report.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from study_report import (
    FACTORS,
    LEVEL,
    TUNED,
    Estimate,
    Rows,
    by_seed,
    candidates,
    difference,
    estimate,
    in_words,
    method_differences,
    over_seeds,
    percent,
    pick,
    seeds_of,
    sensitivity_groups,
    values,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Told apart with any colour vision, and by their markers.
STYLES = {
    "ce": ("#555555", "o"),
    "ce-overlap": ("#56b4e9", "v"),
    "label-smoothing": ("#009e73", "s"),
    "cs-kd": ("#cc79a7", "P"),
    "ps-kd": ("#e69f00", "X"),
    "tf-kd-reg": ("#8c6d1f", "^"),
    "dlb-two-view": ("#0072b2", "d"),
    "dlb": ("#d55e00", "D"),
}
OTHER = ("#000000", "*")
CURVES_AT = 0.4  # the share of wrong labels of the curves, or the nearest that there is
INTERVAL = f"{percent(LEVEL)} t interval"

LOOK = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3, "legend.frameon": False}  # fmt: skip


def draw(studies: dict[str, Rows], folder: Path) -> dict[str, Path]:
    """study-STUDY-PICTURE.png in `folder`; the paths by "STUDY/PICTURE"."""
    paths = {}
    for study, rows in studies.items():
        for name, make in PICTURES.items():
            with plt.rc_context(LOOK):
                figure = make(rows)
                if figure is not None:
                    path = folder / f"study-{study}-{name}.png"
                    figure.suptitle(f"{figure.get_suptitle()}\n{where(rows)}", fontsize=13)
                    figure.savefig(path, dpi=100)
                    plt.close(figure)
                    paths[f"{study}/{name}"] = path
    return paths


def where(rows: Rows) -> str:
    return ", ".join(str(v) for key in ("data", "net", "device") for v in values(rows, key))


def panels(count: int, title: str, **options: Any) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, squeeze=False, layout="constrained", **options)
    figure.suptitle(title)
    return figure, list(axes.flat)


def style(method: str) -> dict[str, Any]:
    color, marker = STYLES.get(method, OTHER)
    bold = method == "dlb"
    return {"color": color, "marker": marker, "lw": 3 if bold else 1.6, "ms": 8 if bold else 6,
            "zorder": 3 if bold else 2}  # fmt: skip


def draw_line(axis: Axes, x: Sequence[float], y: Sequence[Estimate], **look: Any) -> None:
    """Means, with a band of the standard deviation (an interval for one method by itself would
    invite comparing two, for which there are the paired differences)."""
    known = [(a, e.mean, e.std or 0.0) for a, e in zip(x, y, strict=True) if e.mean is not None]
    axis.plot([a for a, _, _ in known], [m for _, m, _ in known], **look)
    low, high = [m - std for _, m, std in known], [m + std for _, m, std in known]
    axis.fill_between([a for a, _, _ in known], low, high, color=look["color"], alpha=0.13, lw=0)


def draw_bars(
    axis: Axes, x: Sequence[float], y: Sequence[Estimate], place: float, **look: Any
) -> None:
    """Intervals, side by side by their `place`."""
    apart = 0.09 * min(b - a for a, b in pairwise(x))
    known = [(a + place * apart, e.mean, e.half) for a, e in zip(x, y, strict=True)
             if e.mean is not None and e.half is not None]  # fmt: skip
    if known:
        at, means, halves = zip(*known, strict=True)
        axis.errorbar(at, means, yerr=halves, capsize=3, ls="", **{**look, "lw": 2})


# ---- the pictures -------------------------------------------------------------------------------


def accuracy_against_noise(rows: Rows) -> Figure | None:
    rows = pick(rows, "main")
    noises, methods = values(rows, "noise"), values(rows, "method")
    if len(noises) < 2:
        return None
    title = f"Test accuracy and wrong labels, {seeds_of(rows)} seeds"
    figure, (left, right) = panels(2, title, figsize=(13, 6))
    x = [100 * noise for noise in noises]
    for method in methods:
        some = [pick(rows, method=method, noise=noise) for noise in noises]
        accuracies = [over_seeds(s, "test_accuracy") for s in some]
        draw_line(left, x, accuracies, label=method, **style(method))
        if method != "ce" and "ce" in methods:
            plain = [pick(rows, method="ce", noise=noise) for noise in noises]
            gains = [difference(s, p) for s, p in zip(some, plain, strict=True)]
            draw_bars(right, x, gains, methods.index(method) - len(methods) / 2, **style(method))
    right.axhline(0, color=STYLES["ce"][0], lw=2)
    left.set(xlabel="wrong training labels (%)", ylabel="test accuracy (%), mean ± std", xticks=x)
    right.set(
        xlabel="wrong training labels (%)", ylabel=f"points above ce, paired, {INTERVAL}", xticks=x
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.get_layout_engine().set(wspace=0.06)
    return figure


def curves(rows: Rows) -> Figure | None:
    rows = pick(rows, "main")
    if not rows:
        return None
    noise = min(values(rows, "noise"), key=lambda noise: abs(noise - CURVES_AT))
    rows = pick(rows, noise=noise)
    title = f"Training with {percent(noise)} wrong labels, {seeds_of(rows)} seeds"
    figure, (axis,) = panels(1, title, figsize=(9.5, 6))
    for method in values(rows, "method"):
        runs = [row["curve"] for row in by_seed(pick(rows, method=method)).values()]
        steps = sorted(set.intersection(*({point["step"] for point in run} for run in runs)))
        at = [{point["step"]: point["test_accuracy"] for point in run} for run in runs]
        means = [estimate([run[step] for run in at]) for step in steps]
        draw_line(axis, steps, means, label=method, **style(method))
    axis.set(xlabel="optimizer step", ylabel="test accuracy (%), mean ± std")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def differences(rows: Rows) -> Figure | None:
    """A panel for each share of wrong labels, an interval for each method."""
    rows = pick(rows, "main")
    noises = values(rows, "noise")
    found = {noise: method_differences(pick(rows, noise=noise)) for noise in noises}
    pairs = list(dict.fromkeys(pair for column in found.values() for pair in column))
    if not pairs:
        return None
    title = (
        f"Difference in test accuracy, paired by seed: mean and {INTERVAL}, n = {seeds_of(rows)}"
    )
    size = (3 + 2.7 * len(noises), 1.9 + 0.5 * len(pairs))
    figure, axes = panels(len(noises), title, figsize=size, sharey=True)
    for axis, noise in zip(axes, noises, strict=True):
        axis.axvline(0, color="black", lw=1)
        for y, pair in enumerate(pairs):
            e = found[noise].get(pair)
            if e is None or e.mean is None:
                continue
            color = STYLES["dlb" if pair[0] == "dlb" else "ce-overlap"][0]
            axis.errorbar(e.mean, y, xerr=e.half, fmt="o", ms=8, lw=2.5, capsize=4, color=color,
                          mfc=color if e.excludes_zero else "white", mew=2)  # fmt: skip
        axis.set_title(f"{percent(noise)} wrong labels", fontsize=13)
        axis.set_xlabel("points")
        axis.margins(y=0.08)
    axes[0].set_yticks(range(len(pairs)), [f"{a} − {b}" for a, b in pairs])
    axes[0].invert_yaxis()
    note = "filled: the interval excludes 0; each panel has its own scale"
    figure.supxlabel(note, fontsize=12)
    return figure


def factors(rows: Rows) -> Figure | None:
    """A panel for each grid of FACTORS: what DLB adds to others, under each condition."""
    grids = {
        grid: pick(rows, grid) for grid in FACTORS if len(values(pick(rows, grid), "method")) > 1
    }
    if not grids:
        return None
    most = max(len(conditions(some, FACTORS[grid])) for grid, some in grids.items())
    noises = values([row for some in grids.values() for row in some], "noise")
    title = (f"Under other conditions, {', '.join(map(percent, noises))} wrong labels, paired by "
             f"seed: mean and {INTERVAL}; filled: it excludes 0")  # fmt: skip
    figure, axes = panels(len(grids), title, figsize=(1 + 4.6 * len(grids), 2.2 + 0.85 * most))
    for axis, (grid, some) in zip(axes, grids.items(), strict=True):
        draw_factor(axis, some, FACTORS[grid])
        axis.set(title=grid.replace("_", " "), xlabel="points of test accuracy")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles.update(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return figure


def conditions(rows: Rows, key: str) -> list[tuple[float, Any]]:
    return [(noise, value) for noise in values(rows, "noise")
            for value in values(pick(rows, noise=noise), key)]  # fmt: skip


def draw_factor(axis: Axes, rows: Rows, key: str) -> None:
    axis.axvline(0, color="black", lw=1)
    found = conditions(rows, key)
    for y, (noise, value) in enumerate(found):
        pairs = method_differences(pick(rows, noise=noise, **{key: value})).items()
        known = [(pair, e) for pair, e in pairs if e.mean is not None]
        for i, ((a, b), e) in enumerate(known):
            # The colour of what DLB is compared with; ce-overlap − ce is the sampler's own effect.
            color, marker = STYLES.get(b if a == "dlb" else "", OTHER)
            place = y + 0.16 * (i - (len(known) - 1) / 2)
            face = color if e.excludes_zero else "white"
            axis.errorbar(e.mean, place, xerr=e.half, fmt=marker, ms=7, mew=2, mfc=face, lw=2,
                          capsize=3, color=color, label=f"{a} − {b}")  # fmt: skip
    several = len({noise for noise, _ in found}) > 1
    names = [in_words(key, value) + f", {percent(noise)} wrong" * several for noise, value in found]
    axis.set_yticks(range(len(found)), names)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def sensitivity(rows: Rows) -> Figure | None:
    """A column for each option, a row for each share of wrong labels."""
    options = [option for option in TUNED if len({r[option] for r in pick(rows, option)}) > 1]
    if not options:
        return None
    noises = values([row for option in options for row in pick(rows, option)], "noise")
    figure, axes = plt.subplots(
        len(noises), len(options), squeeze=False, layout="constrained",
        figsize=(1 + 4.2 * len(options), 1.6 + 3.4 * len(noises)),
    )  # fmt: skip
    figure.suptitle(
        "Sensitivity: mean ± standard deviation over seeds; ring: what validation would choose"
    )
    for line, noise in zip(axes, noises, strict=True):
        for axis, option in zip(line, options, strict=True):
            draw_sensitivity(axis, pick(rows, option, noise=noise), option)
            axis.set_title(f"{percent(noise)} wrong labels", fontsize=12)
            axis.set_xlabel("learning rate" if option == "lr" else option)
        line[0].set_ylabel("test accuracy (%)")
    return figure


def draw_sensitivity(axis: Axes, rows: Rows, option: str) -> None:
    keys, groups = sensitivity_groups(rows, option)
    dashes = {method: cycle(("-", "--", ":", "-.")) for method in values(rows, "method")}
    for setting, group in groups.items():
        named = dict(zip(keys, setting, strict=True))
        others = [f"{k} {in_words(k, v)}" for k, v in named.items() if k not in ("noise", "method")]
        label = ", ".join([named["method"], *others])
        tried = candidates(group)
        look = style(named["method"]) | {"ls": next(dashes[named["method"]])}
        x = [c.options[option] for c in tried]
        means = [over_seeds(c.rows, "test_accuracy") for c in tried]
        draw_line(axis, x, means, label=label, **look)
        for c, e in zip(tried, means, strict=True):
            if c.chosen and e.mean is not None:
                axis.plot(
                    c.options[option], e.mean, "o", ms=17, mfc="none", mec=look["color"], mew=2
                )
    ticks = values(rows, option)
    if len(ticks) > 2 and ticks[0] > 0:
        axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    if groups:
        axis.legend(fontsize=10)


def cost(rows: Rows) -> Figure | None:
    """Medians over the runs, and their whole range; of DLB also with the naive loss."""
    bars = {method: pick(rows, "main", method=method)
            for method in values(pick(rows, "main"), "method")}  # fmt: skip
    naive = pick(rows, "naive", loss="naive", method="dlb")
    bars |= {"dlb, naive loss": naive} if naive else {}
    if not bars:
        return None
    title, height = "What a step costs: median and range over the runs", 1.9 + 0.45 * len(bars)
    figure, axes = panels(3, title, sharey=True, figsize=(13, height))
    columns = (("step_ms", "training step (ms)", 2), ("loss_ms", "of which loss (ms)", 3),
               ("peak_memory_mib", "peak memory (MiB)", 0))  # fmt: skip
    for axis, (key, title, digits) in zip(axes, columns, strict=True):
        for y, (method, some) in enumerate(bars.items()):
            numbers = [row[key] for row in some]
            middle = median(numbers)
            ends = [[middle - min(numbers)], [max(numbers) - middle]]
            axis.barh(y, middle, 0.65, color=STYLES.get(method, OTHER)[0],
                      alpha=1 if method == "dlb" else 0.55)  # fmt: skip
            axis.errorbar(middle, y, xerr=ends, color="black", lw=1.3, capsize=3)
            axis.annotate(f"{middle:.{digits}f}", (max(numbers), y), (5, 0), fontsize=11,
                          va="center", textcoords="offset points")  # fmt: skip
        axis.set_xlabel(title)
        axis.margins(x=0.16)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(bars)), list(bars))
    axes[0].invert_yaxis()
    return figure


PICTURES: dict[str, Callable[[Rows], Figure | None]] = {
    "noise": accuracy_against_noise,
    "differences": differences,
    "curves": curves,
    "factors": factors,
    "sensitivity": sensitivity,
    "cost": cost,
}
