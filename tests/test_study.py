"""The study runs what its grid says, goes on where it was interrupted, and its tables and pictures
follow from the rows; the committed page from the committed rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scipy.stats

import dlb_fused

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
METHODS = ["ce", "ce-overlap", "label-smoothing", "dlb"]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import study

    return study


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import study_report

    return study_report


# ---- the program --------------------------------------------------------------------------------

GRID = """
[common]
data = "digits"
steps = 6
evaluations = 2
threads = 1
device = "cpu"

[[grid]]
name = "main"
method = ["ce", "dlb"]
noise = 0.4
seed = [0, 1]

[[grid]]
name = "lr"
method = "ce"
noise = 0.4
lr = [0.05, 0.1]  # 0.05 is the default: that run is in the grid above, too

[[grid]]
name = "augmentation"
data = "cifar10"
folder = "nowhere"
method = "ce"
"""


def command(folder: Path, *options: str) -> subprocess.Popen[str]:
    package = Path(dlb_fused.__file__).parents[1]
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, BENCHMARKS / "study.py", "grid.toml", "--out", "out", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def test_it_goes_on_after_an_interruption(tmp_path: Path, report: ModuleType) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    first = command(tmp_path, "--workers", "1")
    while not (done := list(tmp_path.glob("out/runs/*/row.json"))) and first.poll() is None:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = first.communicate()
    assert first.returncode == 130 and "interrupted; the same command goes on" in errors, errors
    times = {path: path.stat().st_mtime_ns for path in done}
    rows = report.read_rows([tmp_path / "out" / "rows.jsonl"])
    assert 1 <= len(rows) < 5

    second = command(tmp_path)
    _, errors = second.communicate()
    assert second.returncode == 1, errors  # by the run that has no data
    assert f"6 runs, {len(rows)} of them done" in errors and "5 of 6 rows" in errors, errors
    assert "failed: python examples/train.py --data cifar10" in errors
    assert re.search(r"FileNotFoundError: .*nowhere", errors), errors
    assert times == {path: path.stat().st_mtime_ns for path in done}
    assert not list(tmp_path.glob("out/runs/*/last.pt"))

    rows = report.read_rows([tmp_path / "out" / "rows.jsonl"])
    found = {(row["method"], row["seed"], row["lr"]): row["grids"] for row in rows}
    shared = {("ce", 0, 0.05): ["main", "lr"], ("ce", 0, 0.1): ["lr"]}
    main = {(method, seed, 0.05): ["main"] for method in ("ce", "dlb") for seed in (0, 1)}
    assert found == main | shared
    assert all(len(row["curve"]) == 2 and row["command"] and row["versions"] for row in rows)

    page = tmp_path / "page.md"
    report.main([str(tmp_path / "out" / "rows.jsonl"), "--page", str(page)])
    assert set(report.blocks(page.read_text())) >= {"digits-small/accuracy", "digits-small/lr"}


# ---- grids --------------------------------------------------------------------------------------


def grid_file(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def test_order_and_ids(study: ModuleType, tmp_path: Path) -> None:
    """Seeds outermost, methods innermost; an option at its default makes no other run of it."""
    runs = study.read_grid(grid_file(tmp_path, GRID + "temperature = 3.0\n"))
    order = [(run.options.seed, run.options.method, run.options.lr) for run in runs]
    assert order == [(0, "ce", 0.05), (0, "dlb", 0.05), (0, "ce", 0.1), (0, "ce", 0.05),
                     (1, "ce", 0.05), (1, "dlb", 0.05)]  # fmt: skip
    assert [run.grids for run in runs[:3]] == [["main", "lr"], ["main"], ["lr"]]
    assert runs[0].id.startswith("digits-small-ce-symmetric0.4-seed0-")
    assert len({run.id for run in runs}) == len(runs)
    replaced = study.read_grid(grid_file(tmp_path, GRID), {"seed": "7", "steps": "2"})
    assert {(r.options.seed, r.options.steps) for r in replaced} == {(7, 2)} and len(replaced) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "lr"', 'name = "rate"', "name of a [[grid]]: expected one of ('main', "),
        (
            'method = "ce"',
            'method = "dlbb"',
            "grid 'lr': argument --method: invalid choice: 'dlbb'",
        ),
        ("lr = [", "learning_rate = [", "grid 'lr': unrecognized arguments: --learning-rate"),
        ("lr = [", "temp = [", "grid 'lr': expected options of train.py, not ['temp']"),
        ("lr = [0.05,", "lr = [[0.05],", "grid 'lr': lr: expected a text, number, true or false"),
        ("[common]", "[comon]", "expected [common] and [[grid]], not ['comon', 'grid']"),
        ("[common]", "[common", "(at line 2, column"),
    ],
)
def test_a_wrong_grid_file(
    study: ModuleType, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = grid_file(tmp_path, GRID.replace(old, new, 1 if old != 'method = "ce"' else 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        study.read_grid(path)


def test_all_grids_can_be_read(study: ModuleType) -> None:
    paths = sorted((BENCHMARKS / "study").glob("*.toml"))
    assert len(paths) == 6
    for path in paths:
        runs = study.read_grid(path)
        main = {run.options.method for run in runs if "main" in run.grids}
        assert main == set(study.train.METHODS), path
    quick = study.read_grid(BENCHMARKS / "study" / "quick.toml")
    assert {name for run in quick for name in run.grids} == set(study.GRIDS)


# ---- statistics ---------------------------------------------------------------------------------


def row(method: str, seed: int, test: float, **options: Any) -> dict[str, Any]:
    return {
        "data": "digits", "net": "small", "method": method, "seed": seed, "noise": 0.4,
        "noise_kind": "symmetric", "augment": "standard", "loss": "fused", "steps": 100,
        "batch_size": 128, "schedule": "steps", "warmup": 0.05, "ramp": 0.0, "val": 0.1,
        "mix_alpha": 1.0, "amp": None, "compile": False, "lr": 0.05,
        "temperature": 3.0, "alpha": 1.0, "smoothing": 0.1, "train_images": 1080, "threads": 1,
        "processes": 1, "command": "python examples/train.py",
        "test_accuracy": test, "val_accuracy": test / 2, "test_nll": 0.5, "ece": 3.0,
        "agreement": 99.0, "memorized": 10.0, "step_ms": 4.0, "loss_ms": 0.2, "seconds": 1.0,
        "peak_memory_mib": 400.0, "loss_memory_kib": 12.0, "device": "a CPU", "commit": "c0ffee",
        "grids": ["main"], "versions": {"python": "3.11", "torch": "2.13"},
        "curve": [{"step": step, "test_accuracy": test - 100 / step, "val_accuracy": test - step}
                  for step in (50, 100)],
        **options,
    }  # fmt: skip


def rows_of(method: str, tests: Iterable[float], **options: Any) -> list[dict[str, Any]]:
    return [row(method, seed, test, **options) for seed, test in enumerate(tests)]


def test_the_interval_is_that_of_the_paired_t_test(report: ModuleType) -> None:
    a, b = [80.1, 82.4, 79.9, 81.0, 83.3], [79.0, 82.0, 80.3, 79.5, 81.1]
    e = report.difference(rows_of("dlb", a), rows_of("ce", b)[::-1])
    low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (e.mean - e.half, e.mean + e.half) == pytest.approx((low, high), rel=1e-12)
    assert (e.n, e.alone, e.excludes_zero) == (5, 0, low > 0)


def test_a_seed_without_a_partner_is_left_out_and_counted(report: ModuleType) -> None:
    full, short = rows_of("dlb", [80.0, 82.0, 84.0, 99.0]), rows_of("ce", [79.0, 80.0, 81.0])
    short[2]["seed"] = 7
    e = report.difference(full, short)
    assert (e.mean, e.n, e.alone) == (1.5, 2, 3)
    assert "(n = 2, 3 without a partner)" in report.difference_table(full + short)
    alone = report.difference(full[:1], short[:1])
    assert alone.half is None and not alone.excludes_zero
    assert report.signed(alone, 1) == "+1.00"
    assert report.signed(report.difference(full[:1], short[2:]), 1) == "– (2 without a partner)"


def test_runs_of_two_settings_are_not_averaged(report: ModuleType) -> None:
    rows = rows_of("ce", [80.0, 81.0]) + rows_of("ce", [70.0, 71.0], steps=50)
    with pytest.raises(ValueError, match=r"digits, small, ce, 0.4: .* steps: \[50, 100\]"):
        report.tables(rows)


def test_validation_chooses(report: ModuleType) -> None:
    """By the seeds that all have, and not by the test images."""
    rows = [
        *rows_of("dlb", [80.0, 81.0, 95.0], alpha=0.5),
        *rows_of("dlb", [90.0, 91.0], alpha=1.0),
        *rows_of("dlb", [70.0, 71.0], alpha=2.0),
    ]
    for r in rows:
        r["val_accuracy"] = {0.5: 40.0, 1.0: 41.0, 2.0: 42.0}[r["alpha"]] + 50 * (r["seed"] == 2)
    found = {c.options["alpha"]: c for c in report.candidates(rows)}
    assert [alpha for alpha, c in found.items() if c.chosen] == [2.0]
    assert found[0.5].validation.n == 2 and found[0.5].validation.mean == 40.0
    table = report.tuned_table(rows + rows_of("ce", [60.0, 62.0]))
    assert "| 40 % | dlb | 3 | alpha 2 | 42.00 ± 0.00 (n = 2) | 70.50 ± 0.71 (n = 2) |" in table
    assert "| 40 % | ce | 1 | – |" in table and "+9.50 [+3.15, +15.85]" in table


# ---- tables, page and pictures ------------------------------------------------------------------


def full_rows() -> list[dict[str, Any]]:
    """Three seeds of all grids."""
    rows = []
    for i, method in enumerate(METHODS):
        for noise in (0.0, 0.4):
            base = 90 - 20 * noise + i
            memorized = 10.0 if noise else None
            grids = ["main"]
            if method == "dlb" and noise:
                grids += ["naive", "temperature", "lr"]
            rows += rows_of(method, [base, base + i, base + 2 * i], noise=noise,
                            memorized=memorized, grids=grids)  # fmt: skip
    dlb = [80.0, 81.0, 82.0]
    rows += rows_of("dlb", dlb, loss="naive", grids=["naive"], loss_ms=0.9)
    rows += rows_of("dlb", dlb, grids=["augmentation"], augment="none")
    rows += rows_of("dlb", dlb, grids=["train_images"], train_images=100)
    rows += rows_of("ce", dlb, grids=["train_images"], train_images=100)
    rows += rows_of("dlb", dlb, grids=["warmup", "ramp"], warmup=0.0)
    rows += rows_of("dlb", dlb, grids=["steps"], steps=300)
    rows += rows_of("dlb", dlb, grids=["asymmetric"], noise_kind="asymmetric")
    rows += rows_of("ce", dlb, grids=["asymmetric"], noise_kind="asymmetric")
    for option, values in (("temperature", (1.0, 2.0)), ("alpha", (0.5, 2.0)), ("lr", (0.02, 0.1)),
                           ("smoothing", (0.2, 0.4))):  # fmt: skip
        for value in values:
            rows += rows_of("dlb", dlb, grids=[option], **{option: value})
    return rows


def test_tables(report: ModuleType) -> None:
    rows = full_rows()
    tables = report.tables(rows)
    assert set(tables) == {f"digits-small/{name}" for name in report.TABLES}
    assert "| dlb | 96.00 ± 3.00 | 88.00 ± 3.00 |" in tables["digits-small/accuracy"]
    # Differences 3, 6, 9: mean 6, t(2) · 3 / √3 = 4.302653 · 1.732051.
    assert "| dlb − ce | +6.00 [-1.45, +13.45] |" in tables["digits-small/differences"]
    # 1, 2, 3: mean 2 ± 2.48.
    assert "| ce-overlap − ce | +2.00 [-0.48, +4.48] |" in tables["digits-small/differences"]
    # The validation images prefer the earlier evaluation, 2 points below the last.
    assert "| dlb | 94.00 ± 3.00 | 86.00 ± 3.00 |" in tables["digits-small/early stopping"]
    assert "| 4.5× |" in tables["digits-small/fused and naive"]
    assert (
        "| 0 % | ce | 3.0 ± 0.0 | 0.500 ± 0.000 | 99.00 ± 0.00 | – |"
        in (tables["digits-small/calibration"])
    )
    assert "n = 3" in tables["digits-small/differences"]


def test_a_run_that_is_there_twice_is_refused(report: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"a run is there twice: python examples/train\.py"):
        report.tables([*full_rows(), row("dlb", 0, 96.0)])


def test_the_memory_of_a_loss_is_that_of_a_step_with_overlap(study: ModuleType) -> None:
    argv = ["--data=digits", "--device=cpu", "--batch-size=128"]
    fused, naive = (study.LossMemory().of(study.train.parse([*argv, f"--loss={loss}"]))
                    for loss in ("fused", "naive"))  # fmt: skip
    gradient, cache = 128 * 10 * 4 / 1024, 64 * 10 * 4 / 1024
    assert gradient + cache < fused < gradient + cache + 1  # KiB: labels and numbers beside them
    assert naive > 2 * fused


def test_page(report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("ce", [80.0, 81.0]) + rows_of("dlb", [82.0, 85.0])
    path, page = tmp_path / "rows.jsonl", tmp_path / "docs" / "page.md"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    page.parent.mkdir()
    report.main([str(path), "--page", str(page)])
    assert report.blocks(page.read_text()) == report.tables(rows)
    pictures = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    assert len(pictures) == 3 and all((page.parent / name).exists() for name in pictures)

    name = "digits-small/accuracy"
    page.write_text(f"Mine.\n\n<!-- table: {name} -->\nold\n<!-- end -->\n\nMine, too.\n")
    report.main([str(path), "--page", str(page)])
    assert page.read_text().startswith("Mine.\n\n<!-- table") and "old" not in page.read_text()
    assert page.read_text().endswith("<!-- end -->\n\nMine, too.\n")
    assert report.blocks(page.read_text()) == {name: report.tables(rows)[name]}
    assert "not in " in capsys.readouterr().err

    for text, message in (
        ("<!-- table: digits-small/none -->\n<!-- end -->", "no rows: ['digits-small/none']"),
        (f"<!-- table: {name} -->\n", "an <!-- end --> after it"),
    ):
        page.write_text(text)
        with pytest.raises(SystemExit, match=re.escape(message)):
            report.main([str(path), "--page", str(page)])
        assert page.read_text() == text


def test_pictures(report: ModuleType, tmp_path: Path) -> None:
    import study_pictures

    paths = study_pictures.draw(report.studies(full_rows()), tmp_path)
    assert set(paths) == {f"digits-small/{name}" for name in study_pictures.PICTURES}
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 15_000


def test_the_committed_page_follows_from_the_committed_rows(report: ModuleType) -> None:
    paths = sorted((BENCHMARKS / "results").glob("study-*.jsonl"))
    page = BENCHMARKS / "RESULTS.md"
    if not paths and not page.exists():
        pytest.skip("no study has been committed")
    rows = report.read_rows(paths)
    tables, blocks = report.tables(rows), report.blocks(page.read_text())
    assert blocks and blocks == {name: tables[name] for name in blocks}
    for name in re.findall(r"!\[.*\]\((results/study-.*)\)", page.read_text()):
        assert (BENCHMARKS / name).exists(), name
    assert all(r["command"] and r["versions"]["dlb_fused"] for r in rows)
    assert not any(r["commit"].endswith("-dirty") for r in rows)
