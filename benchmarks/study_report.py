"""Tables and pictures of a study, from the rows that study.py wrote.

    python benchmarks/study_report.py benchmarks/results/study-*.jsonl --page benchmarks/RESULTS.md

A page that is there keeps its text: what stands between `<!-- table: NAME -->` and `<!-- end -->`
is written anew. A page that is not there is made, with all tables and pictures. The pictures
(study_pictures.py) go beside the rows.

Runs with the same seed have the same split, the same wrong labels and the same first weights, so
methods are compared seed by seed: the mean of the differences, with Student's t interval at 95 %.
A seed that only one of the two has is left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

Row = dict[str, Any]
Rows = list[Row]

LEVEL = 0.95
# The order of tables and pictures.
METHODS = ("ce", "ce-overlap", "label-smoothing", "cs-kd", "ps-kd", "tf-kd-reg", "dlb-two-view",
           "dlb")  # fmt: skip
TUNED = ("lr", "temperature", "alpha", "smoothing")  # options that validation accuracy may choose
SETTING = ("noise_kind", "noise", "method", "augment", "loss", "steps", "batch_size", "schedule",
           "warmup", "ramp", "val", "mix_alpha", "amp", "compile", "train_images", "processes",
           "threads", "device", *TUNED)  # fmt: skip
# Grids that compare the methods again where another option has other values.
FACTORS = {"augmentation": "augment", "train_images": "train_images", "steps": "steps",
           "warmup": "warmup", "ramp": "ramp"}  # fmt: skip


# ---- rows and statistics ------------------------------------------------------------------------


def read_rows(paths: Iterable[Path]) -> Rows:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def pick(rows: Rows, grid: str | None = None, **wanted: Any) -> Rows:
    return [row for row in rows if (grid is None or grid in row["grids"])
            and all(row[key] == value for key, value in wanted.items())]  # fmt: skip


def values(rows: Rows, key: str) -> list[Any]:
    """What is there, in order; the methods in that of METHODS."""
    found = {row[key] for row in rows}
    if key == "method":
        return sorted(found, key=lambda m: (METHODS.index(m) if m in METHODS else 99, m))
    return sorted(found, key=lambda value: (value is None, value))


def studies(rows: Rows) -> dict[str, Rows]:
    """By data set and network."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(f"{row['data']}-{row['net']}", []).append(row)
    return dict(sorted(found.items()))


def by_seed(rows: Rows) -> dict[int, Row]:
    """ValueError where two runs differ in their setting, or are of the same seed: no mean may be
    taken then."""
    for key in SETTING:
        if len({row[key] for row in rows}) > 1:
            where = ", ".join(str(rows[0][k]) for k in ("data", "net", "method", "noise"))
            raise ValueError(f"{where}: runs to be averaged differ in {key}: {values(rows, key)}")
    found = {row["seed"]: row for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"a run is there twice: {rows[0]['command']}")
    return found


def stopped(rows: Rows) -> Rows:
    """The runs as they were at that evaluation which the validation images liked best."""
    known = [row for row in rows if row["val_accuracy"] is not None]
    best = [max(row["curve"], key=lambda point: point["val_accuracy"]) for row in known]
    return [row | {"test_accuracy": point["test_accuracy"]}
            for row, point in zip(known, best, strict=True)]  # fmt: skip


class Estimate(NamedTuple):
    """A mean with its t interval; None where there are too few values for it."""

    mean: float | None
    half: float | None  # of the width of the interval
    std: float | None
    n: int
    alone: int = 0  # seeds that only one of the two sides has

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and self.mean is not None and abs(self.mean) > self.half


def estimate(numbers: Sequence[float], alone: int = 0) -> Estimate:
    n = len(numbers)
    if n < 2:
        return Estimate(numbers[0] if n else None, None, None, n, alone)
    std = stdev(numbers)
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
    return Estimate(mean(numbers), half, std, n, alone)


def over_seeds(rows: Rows, key: str) -> Estimate:
    found = [row[key] for row in by_seed(rows).values()]
    return estimate([value for value in found if value is not None])


def difference(first: Rows, second: Rows, key: str = "test_accuracy") -> Estimate:
    """first - second, paired by seed."""
    a, b = by_seed(first), by_seed(second)
    pairs = [a[seed][key] - b[seed][key] for seed in sorted(set(a) & set(b))]
    return estimate(pairs, len(set(a) ^ set(b)))


def method_differences(rows: Rows) -> dict[tuple[str, str], Estimate]:
    """dlb - each other method, and what the sampler does by itself: ce-overlap - ce."""
    others = [method for method in values(rows, "method") if method != "dlb"]
    pairs = [("dlb", other) for other in others] + [("ce-overlap", "ce")]
    of = {method: pick(rows, method=method) for method in METHODS} | {
        method: pick(rows, method=method) for method in others
    }
    return {(a, b): difference(of[a], of[b]) for a, b in pairs if of[a] and of[b]}


class Candidate(NamedTuple):
    options: dict[str, float]
    rows: Rows
    validation: Estimate  # over the seeds that all candidates have
    chosen: bool


def candidates(rows: Rows) -> list[Candidate]:
    """The settings of TUNED in rows of one method; chosen is the best mean validation accuracy over
    the seeds that all of them have (of equal ones the first), none if there is no such seed."""
    groups: dict[tuple[float, ...], Rows] = {}
    for row in sorted(rows, key=lambda row: [row[key] for key in TUNED]):
        groups.setdefault(tuple(row[key] for key in TUNED), []).append(row)
    shared = set.intersection(*({row["seed"] for row in group} for group in groups.values()))
    means = {
        setting: over_seeds([row for row in group if row["seed"] in shared], "val_accuracy")
        for setting, group in groups.items()
    }
    known = {setting: m.mean for setting, m in means.items() if m.mean is not None}
    best = max(known, key=lambda setting: known[setting]) if known else None
    return [
        Candidate(dict(zip(TUNED, setting, strict=True)), group, means[setting], setting == best)
        for setting, group in groups.items()
    ]


# ---- text ---------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], note: str) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + f"\n\n{note}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def in_words(option: str, value: Any) -> str:
    if option == "noise":
        return percent(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(e: Estimate, seeds: int, digits: int = 2) -> str:
    """mean ± standard deviation, and the number of seeds where it is not that of the table."""
    if e.mean is None:
        return "–"
    text = f"{e.mean:.{digits}f}" + ("" if e.std is None else f" ± {e.std:.{digits}f}")
    return text + f" (n = {e.n})" * (e.n != seeds)


def signed(e: Estimate, seeds: int, digits: int = 2) -> str:
    """A difference with its interval, bold where that excludes 0."""
    if e.mean is None:
        return f"– ({e.alone} without a partner)" if e.alone else "–"
    text = f"{e.mean:+.{digits}f}"
    if e.half is not None:
        text += f" [{e.mean - e.half:+.{digits}f}, {e.mean + e.half:+.{digits}f}]"
    notes = [f"n = {e.n}"] * (e.n != seeds) + [f"{e.alone} without a partner"] * (e.alone > 0)
    return (f"**{text}**" if e.excludes_zero else text) + (
        f" ({', '.join(notes)})" if notes else ""
    )


def seeds_of(rows: Rows) -> int:
    return len({row["seed"] for row in rows})


def spread_note(rows: Rows) -> str:
    return f"Mean ± standard deviation over n = {seeds_of(rows)} seeds."


def interval_note(rows: Rows, count: int) -> str:
    return (
        f"Differences in points, paired by seed, n = {seeds_of(rows)} where nothing else is said; "
        f"in brackets the {percent(LEVEL)} t interval, bold where it excludes 0. One by one: of "
        f"{count} such intervals about {(1 - LEVEL) * count:.1g} would exclude 0 by chance. They "
        "are about other seeds, not about other test images."
    )


def varying(rows: Rows, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if len({row[key] for row in rows}) > 1]


# ---- tables -------------------------------------------------------------------------------------


def tables(rows: Rows) -> dict[str, str]:
    """Markdown, by "STUDY/TABLE"; a table of which there are no rows is not there."""
    return {
        f"{study}/{name}": text
        for study, some in studies(rows).items()
        for name, make in TABLES.items()
        if (text := make(some)) is not None
    }


def setup_table(rows: Rows) -> str:
    """What was run, on what."""

    def several(key: str) -> str:
        return ", ".join(str(value) for value in values(rows, key))

    versions = {f"{k} {v}" for row in rows for k, v in row["versions"].items()}
    per_commit = {c: len(pick(rows, commit=c)) for c in values(rows, "commit")}
    counted = [f"{c}" + f" ({n} runs)" * (len(per_commit) > 1) for c, n in per_commit.items()]
    lines = {
        "runs": str(len(rows)),
        "seeds": several("seed"),
        "training images": several("train_images"),
        "steps, rows a step": f"{several('steps')}; {several('batch_size')}",
        "time of a run": f"{median(row['seconds'] for row in rows):.0f} s (median), "
                         f"{sum(row['seconds'] for row in rows) / 3600:.1f} h in all",
        "device, threads": f"{several('device')}; {several('threads')}",
        "versions": ", ".join(sorted(versions)),
        "commit": ", ".join(counted),
    }  # fmt: skip
    return markdown(["", ""], lines.items(), "Each row of the JSON lines has its own command.")


LAST = "Test accuracy after the last step, in %."
STOPPED = (
    "Test accuracy in %, not after the last step but at that of the few evaluations where the "
    "accuracy on the validation images, whose labels are as wrong, was best."
)


def accuracy_table(rows: Rows, grid: str = "main", what: str = LAST) -> str | None:
    rows = pick(rows, grid)
    if not rows:
        return None
    n, noises = seeds_of(rows), values(rows, "noise")
    lines = [
        [method, *(spread(over_seeds(pick(rows, method=method, noise=noise), "test_accuracy"), n)
                   for noise in noises)]
        for method in values(rows, "method")
    ]  # fmt: skip
    header = ["method, wrong labels:", *map(percent, noises)]
    return markdown(header, lines, f"{what} {spread_note(rows)}")


def difference_table(rows: Rows, grid: str = "main") -> str | None:
    rows = pick(rows, grid)
    n, noises = seeds_of(rows), values(rows, "noise")
    columns = {noise: method_differences(pick(rows, noise=noise)) for noise in noises}
    pairs = list(dict.fromkeys(pair for column in columns.values() for pair in column))
    if not pairs:
        return None
    lines = [
        [f"{a} − {b}", *(signed(columns[noise][a, b], n) if (a, b) in columns[noise] else "–"
                         for noise in noises)]
        for a, b in pairs
    ]  # fmt: skip
    header = ["difference, wrong labels:", *map(percent, noises)]
    return markdown(header, lines, interval_note(rows, sum(map(len, columns.values()))))


def calibration_table(rows: Rows) -> str | None:
    rows = pick(rows, "main")
    if not rows:
        return None
    n, lines = seeds_of(rows), []
    for noise in values(rows, "noise"):
        for method in values(pick(rows, noise=noise), "method"):
            some = pick(rows, noise=noise, method=method)
            cells = [spread(over_seeds(some, key), n, digits) for key, digits in
                     (("ece", 1), ("test_nll", 3), ("agreement", 2))]  # fmt: skip
            memorized = spread(over_seeds(some, "memorized"), n, 1) if noise else "–"
            lines.append([percent(noise), method, *cells, memorized])
    header = ["wrong labels", "method", "ECE, %", "NLL", "agreement, %", "memorized, %"]
    note = (
        "On the test images: expected calibration error (15 bins) and negative log-likelihood. "
        "Agreement: how many of (at most 2000 of) them get the same class before and after one of "
        "the last five optimizer steps, where the learning rate is lowest. Memorized: the share of "
        "the wrongly labelled training images whose wrong label is predicted. "
    )
    return markdown(header, lines, note + spread_note(rows))


def cost_table(rows: Rows) -> str | None:
    rows = pick(rows, "main")
    if not rows:
        return None
    lines = []
    for method in values(rows, "method"):
        some = pick(rows, method=method)
        step, loss, memory = (
            [row[key] for row in some] for key in ("step_ms", "loss_ms", "peak_memory_mib")
        )
        plain = {(row["noise"], row["seed"]): row["step_ms"] for row in pick(rows, method="ce")}
        ratios = [row["step_ms"] / plain[row["noise"], row["seed"]] for row in some
                  if (row["noise"], row["seed"]) in plain]  # fmt: skip
        lines.append([method, str(len(some)), ranged(step, 2),
                      f"{median(ratios):.2f}" if ratios else "–", ranged(loss, 3),
                      f"{median(a / b for a, b in zip(loss, step, strict=True)):.1%}",
                      ranged(memory, 0)])  # fmt: skip
    header = ["method", "runs", "step, ms", "step / step of ce", "loss, ms", "loss / step",
              "peak memory, MiB"]  # fmt: skip
    note = (
        "Medians over the runs, and in brackets the lowest and highest of them; of a run, the "
        "median step. The ratio to the step of ce is the median over pairs of runs with the same "
        "labels and seed, made one soon after the other: a busy machine disturbs it less. Loss: "
        "forward and backward down to the logits. Memory: of a GPU what was allocated, of a CPU "
        "the whole process with its libraries."
    )
    return markdown(header, lines, note)


def ranged(numbers: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{f(numbers):.{digits}f}" for f in (min, median, max))
    return f"{middle} ({low} – {high})"


def naive_table(rows: Rows) -> str | None:
    rows = pick(rows, "naive")
    lines, n = [], seeds_of(rows)
    for noise in values(rows, "noise"):
        for method in values(pick(rows, noise=noise), "method"):
            fused, naive = (pick(rows, noise=noise, method=method, loss=loss)
                            for loss in ("fused", "naive"))  # fmt: skip
            if not (fused and naive):
                continue
            a, b = by_seed(fused), by_seed(naive)
            ratios = [b[seed]["loss_ms"] / a[seed]["loss_ms"] for seed in set(a) & set(b)]
            lines.append([
                percent(noise), method,
                *(spread(over_seeds(some, "test_accuracy"), n) for some in (fused, naive)),
                signed(difference(fused, naive), n),
                *(ranged([row["loss_ms"] for row in some], 3) for some in (fused, naive)),
                f"{median(ratios):.1f}×" if ratios else "–",
                *(ranged([row["loss_memory_kib"] for row in some], 1) for some in (fused, naive)),
                signed(difference(fused, naive, "peak_memory_mib"), n, 1),
            ])  # fmt: skip
    if not lines:
        return None
    header = ["wrong labels", "method", "accuracy, fused", "accuracy, naive", "fused − naive",
              "loss fused, ms", "loss naive, ms", "naive / fused",
              "loss fused, KiB", "loss naive, KiB", "process, fused − naive, MiB"]  # fmt: skip
    note = (
        "The same training with the loss of dlb_fused and with that of stock PyTorch operations. "
        "Accuracy: mean ± standard deviation; differences: paired by seed, with the "
        f"{percent(LEVEL)} t interval, bold where it excludes 0; times: median (lowest – highest), "
        "their ratio within the pairs. KiB: what the loss and its gradient allocate at most, "
        "measured after the runs, at their shape; MiB: "
        f"of the whole process. n = {n} seeds."
    )
    return markdown(header, lines, note)


def sensitivity_table(rows: Rows, option: str) -> str | None:
    rows = pick(rows, option)
    if not rows:
        return None
    lines, n = [], seeds_of(rows)
    keys, groups = sensitivity_groups(rows, option)
    for setting, group in groups.items():
        shown = [in_words(key, value) for key, value in zip(keys, setting, strict=True)]
        for c in candidates(group):
            test = spread(over_seeds(c.rows, "test_accuracy"), n)
            lines.append([*shown, f"{c.options[option]:g}", spread(c.validation, n), test,
                          "chosen" if c.chosen else ""])  # fmt: skip
    titles = ["wrong labels" if key == "noise" else key.replace("_", " ") for key in keys]
    header = [*titles, option, "validation, %", "test, %", ""]
    note = ("Validation images have wrong labels as the training images have; chosen: the best on "
            f"them. {spread_note(rows)}")  # fmt: skip
    return markdown(header, lines, note)


def sensitivity_groups(rows: Rows, option: str) -> tuple[list[str], dict[tuple[Any, ...], Rows]]:
    """Rows that differ in `option` and the seed only, by the options named first."""
    keys = ["noise", "method"]
    keys += [key for key in varying(rows, SETTING) if key not in (*keys, option)]
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    order = values(rows, "method")
    return keys, dict(sorted(groups.items(), key=lambda g: (g[0][0], order.index(g[0][1]), g[0])))


def tuned_table(rows: Rows) -> str | None:
    """Each method at what the validation images chose for it."""
    grids = {"main", *TUNED}
    rows = [row for row in rows if grids & set(row["grids"])]
    lines, n = [], seeds_of(rows)
    for noise in values(rows, "noise"):
        some = pick(rows, noise=noise)
        found = {m: candidates(pick(some, method=m)) for m in values(some, "method")}
        chosen = {m: c for m, cs in found.items() for c in cs if c.chosen}
        if max(map(len, found.values())) == 1 or "dlb" not in chosen:
            continue
        for method, c in chosen.items():
            shown = varying([row for d in found[method] for row in d.rows], TUNED)
            options = ", ".join(f"{key} {c.options[key]:g}" for key in shown)
            against = "" if method == "dlb" else signed(difference(chosen["dlb"].rows, c.rows), n)
            lines.append([percent(noise), method, str(len(found[method])), options or "–",
                          spread(c.validation, n), spread(over_seeds(c.rows, "test_accuracy"), n),
                          against])  # fmt: skip
    if not lines:
        return None
    header = ["wrong labels", "method", "settings tried", "chosen", "validation, %", "test, %",
              "dlb − it, on the test images"]  # fmt: skip
    note = (
        "Each method at the setting with the best mean validation accuracy (labels as wrong as "
        "those of the training images), over the seeds that all its settings have; a method of "
        "which fewer were tried had less to choose from. "
    )
    return markdown(
        header, lines, note + interval_note(rows, sum(bool(line[-1]) for line in lines))
    )


def factor_table(rows: Rows, grid: str) -> str | None:
    """The methods, and their differences, under each of several conditions."""
    rows, key = pick(rows, grid), FACTORS[grid]
    if not rows:
        return None
    n, methods, lines = seeds_of(rows), values(rows, "method"), []
    conditions = [(noise, value) for noise in values(rows, "noise")
                  for value in values(pick(rows, noise=noise), key)]  # fmt: skip
    found = {c: method_differences(pick(rows, noise=c[0], **{key: c[1]})) for c in conditions}
    pairs = list(dict.fromkeys(pair for differences in found.values() for pair in differences))
    for noise, value in conditions:
        of = {m: pick(rows, noise=noise, method=m, **{key: value}) for m in methods}
        accuracies = [spread(over_seeds(some, "test_accuracy"), n) for some in of.values()]
        known = found[noise, value]
        differences = [signed(known[pair], n) if pair in known else "–" for pair in pairs]
        lines.append([percent(noise), in_words(key, value), *accuracies, *differences])
    header = ["wrong labels", grid.replace("_", " "), *methods, *(f"{a} − {b}" for a, b in pairs)]
    note = f"Test accuracy, in %. {spread_note(rows)}"
    if pairs:
        note += f" {interval_note(rows, sum(map(len, found.values())))}"
    return markdown(header, lines, note)


TABLES: dict[str, Callable[[Rows], str | None]] = {
    "setup": setup_table,
    "accuracy": accuracy_table,
    "differences": difference_table,
    "early stopping": lambda rows: accuracy_table(stopped(rows), what=STOPPED),
    "early stopping differences": lambda rows: difference_table(stopped(rows)),
    "tuned": tuned_table,
    "calibration": calibration_table,
    "cost": cost_table,
    "fused and naive": naive_table,
    **{option: partial(sensitivity_table, option=option) for option in TUNED},
    **{grid: partial(factor_table, grid=grid) for grid in FACTORS},
    "asymmetric": lambda rows: accuracy_table(rows, "asymmetric"),
    "asymmetric differences": lambda rows: difference_table(rows, "asymmetric"),
}


# ---- the page -----------------------------------------------------------------------------------

BLOCK = re.compile(r"<!-- table: (?P<name>[^>]+?) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)


def block(name: str, text: str) -> str:
    return f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->"


def blocks(page: str) -> dict[str, str]:
    """The text of each generated block. ValueError for one without an end."""
    found = {match["name"]: match["text"].strip() for match in BLOCK.finditer(page)}
    if len(found) != page.count("<!-- table: ") or len(found) != page.count("<!-- end -->"):
        raise ValueError("expected each <!-- table: NAME --> once, and an <!-- end --> after it")
    return found


def update(page: str, new: dict[str, str]) -> str:
    """The page with its blocks written anew. ValueError for a block of which there are no rows."""
    missing = sorted(set(blocks(page)) - set(new))
    if missing:
        raise ValueError(f"the page has tables of which there are no rows: {missing}")
    return BLOCK.sub(lambda match: block(match["name"], new[match["name"]]), page)


def new_page(new: dict[str, str], pictures: dict[str, str]) -> str:
    """All tables, and the pictures, whose paths stand by "STUDY/PICTURE"."""
    parts = ["# Results"]
    for study in dict.fromkeys(name.partition("/")[0] for name in new):
        parts.append(f"## {study}")
        for name, text in new.items():
            if name.startswith(f"{study}/"):
                parts += [f"### {name.partition('/')[2].capitalize()}", block(name, text)]
        parts += [f"![{name}]({path})" for name, path in pictures.items()
                  if name.startswith(f"{study}/")]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines of study.py")
    parser.add_argument("--page", type=Path, help="the Markdown page; without it, to the terminal")
    options = parser.parse_args(argv)
    from study_pictures import draw

    rows = read_rows(options.rows)
    try:
        new = tables(rows)
        drawn = draw(studies(rows), options.rows[0].parent)
        if options.page is None:
            print("\n\n".join(f"{name}\n\n{text}" for name, text in new.items()))
        elif options.page.exists():
            page = options.page.read_text()
            options.page.write_text(update(page, new))
            left = sorted(set(new) - set(blocks(page)))
            if left:
                print(f"not in {options.page}: {', '.join(left)}", file=sys.stderr)
        else:
            folder = options.page.resolve().parent
            options.page.write_text(
                new_page(new, {k: relative(v, folder) for k, v in drawn.items()})
            )
    except ValueError as error:
        sys.exit(f"study_report.py: {error}")
    print(*drawn.values(), sep="\n", file=sys.stderr)


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder)).as_posix()


if __name__ == "__main__":
    main()
