"""Runs a grid of trainings, `examples/train.py` with many options, and gathers their rows.

    python benchmarks/study.py benchmarks/study/quick.toml --out study/quick
    python benchmarks/study.py benchmarks/study/quick.toml --dry-run       # what it would run

A grid file has a table [common], the options of train.py that all runs share, and tables [[grid]]
with a `name`, in which a list stands for each of its values. All values are multiplied with each
other. A run that is in two grids is done once and belongs to both. The name says what the report
makes of a grid: see GRIDS below.

Each run has a process of its own (so that its peak memory is its own), which runs `train.run`, and
a folder OUT/runs/ID. A run with a row.json there is done: after Ctrl-C, kill or a failure, the same
command goes on. The first seed of everything comes first, and within a seed the methods take turns,
so that a study can be cut short and a busy machine disturbs the methods alike. At the end,
OUT/rows.jsonl has a row for each run that is done; study_report.py makes tables and pictures of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train  # noqa: E402
from image_data import SOURCES, Split  # noqa: E402
from methods import Batch, make_method  # noqa: E402
from study_report import FACTORS, TUNED  # noqa: E402

# What study_report.py makes tables of: the comparison; the losses; others that stand beside it; and
# what becomes of it when one option takes other values.
GRIDS = ("main", "naive", "asymmetric", *FACTORS, *TUNED)
SECONDS = 0.2  # between two messages of a worker
PLACES = {"out", "resume", "folder", "workers"}  # options that do not change what a run finds


@dataclass
class Run:
    argv: list[str]
    options: Namespace
    grids: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Readable, and another one for any other options: so no row is taken for another's."""
        o, given = self.options, changed(self.options)
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
        return f"{o.data}-{o.net}-{o.method}-{o.noise_kind}{o.noise:g}-seed{o.seed}-{digest}"


def changed(options: Namespace) -> dict[str, Any]:
    """Options not at their default: a new option of train.py leaves the ids as they are."""
    return {k: v for k, v in vars(options).items() if k not in PLACES and v != defaults()[k]}


@functools.cache
def defaults() -> dict[str, Any]:
    return vars(train.parse([]))


# ---- the grid file ------------------------------------------------------------------------------


def read_grid(path: Path, overrides: dict[str, str] | None = None) -> list[Run]:
    """All runs, in the order to do them. `overrides` replace options of all grids.

    ValueError names what is wrong in the file.
    """
    with path.open("rb") as file:
        try:
            content = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
    if set(content) != {"common", "grid"}:
        raise ValueError(f"{path}: expected [common] and [[grid]], not {sorted(content)}")
    runs: dict[str, Run] = {}
    for grid in content["grid"]:
        name = grid.pop("name", None)
        if name not in GRIDS:
            raise ValueError(f"{path}: name of a [[grid]]: expected one of {GRIDS}, not {name!r}")
        for options in products({**content["common"], **grid, **(overrides or {})}):
            try:
                new = make_run(options)
            except ValueError as error:
                raise ValueError(f"{path}, grid {name!r}: {error}") from None
            run = runs.setdefault(new.id, new)
            run.grids += [name] * (name not in run.grids)
    return sorted(runs.values(), key=lambda run: run.options.seed)  # stable: else in file order


def products(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The methods vary fastest."""
    lists = {k: v if isinstance(v, list) else [v] for k, v in options.items()}
    keys = sorted(lists, key=lambda key: key == "method")
    for values in itertools.product(*(lists[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def make_run(options: dict[str, Any]) -> Run:
    argv = []
    for key, value in options.items():
        if not isinstance(value, (str, int, float)):
            raise ValueError(f"{key}: expected a text, number, true or false, not {value!r}")
        name = "--" + key.replace("_", "-")
        if value is not False:
            argv += [name] if value is True else [name, str(value)]
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            parsed = train.parse(argv)
    except SystemExit:
        raise ValueError(message.getvalue().strip().rpartition("error: ")[2]) from None
    unknown = sorted(set(options) - set(vars(parsed)))  # argparse takes the start of a name, too
    if unknown:
        raise ValueError(f"expected options of train.py, not {unknown}")
    return Run(argv, parsed)


# ---- workers ------------------------------------------------------------------------------------


class Worker(NamedTuple):
    run: Run
    process: Any
    slot: int


def work(argv: list[str], gpu: str | None, folder: Path, connection: Connection) -> None:
    """In a process of its own: sends the steps done, then what went wrong or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    last = 0.0

    def progress(step: int, _: str) -> None:
        """Fails where the parent is gone: nobody waits for this run then."""
        nonlocal last
        if time.monotonic() - last > SECONDS:
            connection.send(step)
            last = time.monotonic()

    try:
        train.run(train.parse(argv), progress)
        connection.send(None)
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")


class Pool:
    """Runs each in a process, `size` at a time, on one GPU each where there are GPUs."""

    def __init__(self, size: int, folder: Path, gpus: list[str]) -> None:
        # On Linux, copies of a process that has imported torch, seconds faster than to import it
        # for each run; elsewhere that is not safe.
        self.context = multiprocessing.get_context(
            "forkserver" if sys.platform == "linux" else "spawn"
        )
        self.context.set_forkserver_preload(
            ["torch", "dlb_fused", "rich.progress", "sklearn.datasets"]
        )
        self.folder, self.free = folder, list(range(size))
        self.workers: dict[Connection, Worker] = {}
        self.gpus = gpus

    def start(self, run: Run) -> None:
        folder = self.folder / run.id
        folder.mkdir(parents=True, exist_ok=True)
        slot = self.free.pop(0)
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        ours, theirs = self.context.Pipe(duplex=False)
        argv = [*run.argv, "--out", str(folder)]
        argv += ["--resume"] * (folder / "last.pt").exists()
        process = self.context.Process(target=work, args=(argv, gpu, folder, theirs))
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.workers[ours] = Worker(run, process, slot)

    def messages(self) -> Iterator[tuple[Run, int | str | None]]:
        """What came from the workers: steps done, or at a run's end an error or None."""
        for connection in wait(list(self.workers)):
            worker = self.workers[connection]
            try:
                message = connection.recv()
            except EOFError:
                worker.process.join()
                message = f"the process ended with exit code {worker.process.exitcode}"
            if not isinstance(message, int):
                worker.process.join()
                del self.workers[connection]
                self.free.append(worker.slot)
            yield worker.run, message

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.process.terminate()
        for worker in self.workers.values():
            worker.process.join()


def visible_gpus(runs: Sequence[Run]) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none for runs on a CPU."""
    if all(run.options.device == "cpu" for run in runs):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def run_all(runs: Sequence[Run], size: int, folder: Path, console: Console) -> dict[str, str]:
    """Does them; returns the errors, by id."""
    waiting, pool = list(runs), Pool(size, folder, visible_gpus(runs))
    ended: dict[str, str | None] = {}
    parts: dict[str, float] = {}  # of the runs that are going on
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
               TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(runs))
        try:
            while waiting or pool.workers:
                while waiting and pool.free:
                    pool.start(waiting.pop(0))
                for run, message in pool.messages():
                    if isinstance(message, int):
                        parts[run.id] = message / (run.options.steps or math.inf)
                        continue
                    parts.pop(run.id, None)
                    ended[run.id] = message
                    console.print(outcome(run, message, folder), highlight=False)
                text = f"{len(ended)} of {len(runs)} runs ended, {len(pool.workers)} going on"
                progress.update(task, description=text, completed=len(ended) + sum(parts.values()))
        finally:
            pool.stop()
    return {key: error for key, error in ended.items() if error is not None}


def outcome(run: Run, error: str | None, folder: Path) -> str:
    if error is not None:
        return f"{run.id}: failed"
    (folder / run.id / "last.pt").unlink(missing_ok=True)  # the row is all that is needed
    row = json.loads((folder / run.id / "row.json").read_text())
    return f"{run.id}: {row['test_accuracy']:.2f} % in {row['seconds']:.0f} s"


# ---- rows ---------------------------------------------------------------------------------------


def is_done(run: Run, folder: Path) -> bool:
    return (folder / run.id / "row.json").exists()


def write_rows(runs: Sequence[Run], folder: Path, path: Path) -> int:
    """One line for each run that is done, with its grids and the memory of its loss; returns how
    many."""
    rows, memory = {}, LossMemory()
    for run in runs:
        if is_done(run, folder):
            row = json.loads((folder / run.id / "row.json").read_text())
            rows[run.id] = row | {"grids": run.grids, "loss_memory_kib": memory.of(run.options)}
    lines = [json.dumps(rounded(rows[key])) + "\n" for key in sorted(rows)]
    new = path.with_suffix(".new")  # an interrupted write leaves the old rows
    new.write_text("".join(lines))
    new.replace(path)
    return len(rows)


class LossMemory:
    """What a loss and its gradient allocate at most at the shape of a run, beyond what was there
    before: for DLB in the midst of a chain, with its cache. It is the same in each run of a method,
    and far below what the memory of a whole process would show."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], float] = {}

    def of(self, options: Namespace) -> float:
        """KiB"""
        mixed = options.augment in train.MIXES
        key = (options.data, options.method, options.loss, options.batch_size, mixed)
        if key not in self.known:
            self.known[key] = self.measured(options, mixed) / 2**10
        return self.known[key]

    def measured(self, options: Namespace, mixed: bool) -> int:
        from bench_loss import peak_memory

        device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
        rows, classes = options.batch_size, SOURCES[options.data].classes
        ids = torch.arange(rows, device=device)
        # Both halves have the same labels: so each batch goes on with the one before.
        labels = (ids % (rows // 2)) % classes
        second = (labels, torch.full((rows,), 0.5, device=device)) if mixed else ()
        logits = torch.randn(rows, classes, device=device, requires_grad=True)
        method = make_method(options, Split(logits, labels.cpu(), labels.cpu()), classes, steps=10)

        batch = Batch(logits, labels, ids, *second)

        def step() -> None:
            logits.grad = None
            method.loss(method.forward(torch.nn.Identity(), logits), batch).backward()

        if method.overlaps:  # the chain begins with fresh rows alone
            n = rows // 2
            method.loss(logits[:n], Batch(*(part[:n] for part in batch if part is not None)))
        step()
        logits.grad = None
        return peak_memory(step, device)


def rounded(value: Any) -> Any:
    """Floats to six digits: more is noise, and rows.jsonl is read as a diff."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def command_of(run: Run) -> str:
    return " ".join(["python examples/train.py", *run.argv])


def default_workers(runs: Sequence[Run]) -> int:
    """The GPUs, or else the cores over the threads of a run."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max((run.options.threads or cores for run in runs), default=1)
    return len(visible_gpus(runs)) or max(1, cores // threads)


def override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, not {text!r}")
    return key, {"true": True, "false": False}.get(value, value)


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("grid", type=Path, help="a grid file, like benchmarks/study/quick.toml")
    parser.add_argument("--out", type=Path, help="folder for runs and rows.jsonl (study/NAME)")
    parser.add_argument("--workers", type=int, help="runs at a time (GPUs, or cores / threads)")
    parser.add_argument("--set", type=override, nargs="+", action="extend", default=[],
                        metavar="KEY=VALUE",
                        help="options of train.py that replace those of all grids")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(argv)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers: expected at least 1, not {options.workers}")
    options.out = options.out or Path("study") / options.grid.stem
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options, console = parse(argv), Console(stderr=True)
    try:
        runs = read_grid(options.grid, dict(options.set))
    except (OSError, ValueError) as error:
        sys.exit(f"study.py: {error}")
    folder = options.out / "runs"
    todo = [run for run in runs if not is_done(run, folder)]
    size = options.workers or default_workers(todo)
    console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done; {size} at a time")
    if options.dry_run:
        print(*map(command_of, todo), sep="\n")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    rows = options.out / "rows.jsonl"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    errors, interrupted = {}, False
    try:
        errors = run_all(todo, size, folder, console)
    except KeyboardInterrupt:
        interrupted = True
    console.print(
        f"{write_rows(runs, folder, rows)} of {len(runs)} rows: {rows}",
        highlight=False,
        soft_wrap=True,
    )
    for run in runs:
        if run.id in errors:
            output = folder / run.id / "output.txt"
            text = f"\nfailed: {command_of(run)}\n  {errors[run.id]}\n  its output: {output}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    if interrupted:
        console.print("interrupted; the same command goes on")
    return 130 if interrupted else 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
