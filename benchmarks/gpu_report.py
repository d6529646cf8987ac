"""Everything that only a GPU can show, in one command that needs no network and installs nothing:

    make gpu                    or: python benchmarks/gpu_report.py [--out FOLDER] [--only tests,…]
    make gpu REHEARSE=1         the same code on a CPU: interpreter, simulator, small sizes

Builds the compiled modules in place; runs the tests on the device, the checks of gpu_checks.py,
compute-sanitizer, ncu's byte counters, builds for other targets, training steps, the kernels of the
compiled naive loss, and micro-benchmarks in what is left of the time. Each part runs in processes
of its own, has a time limit, and ends as ok, failed or skipped with a reason; none stops the
others. Writes one JSON file, after each part, and the benchmarks' JSON and pictures. The exit
status is 1 if a part failed, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_parts import FOLDER, ROOT, Context, Fail, Part, Result, Skip, all_parts, no_time

RESULTS = FOLDER / "results"
GROUPS = ("tests", "checks", "sanitizer", "traffic", "builds", "step", "compiled", "bench")
STATUSES = ("ok", "failed", "skipped")
MINUTES = 9.0


def run_part(context: Context, part: Part, left: float) -> list[Result]:
    if left < 5:
        return [no_time(name, part.backend) for name in part.names]
    start = time.monotonic()
    status, reason, data = "ok", "", {}
    try:
        out = part.run(context, part, min(part.seconds, left))
        if isinstance(out, list):
            return out
        data = out
    except Skip as why:
        status, reason = "skipped", str(why)
    except Fail as why:
        status, reason, data = "failed", str(why), why.data
    except Exception as error:  # a fault of this report must not end it
        status, reason = "failed", f"{type(error).__name__}: {error}"
    summary, seconds = data.pop("summary", ""), time.monotonic() - start
    return [Result(name, part.backend, status, reason, summary, seconds, data)
            for name in part.names]  # fmt: skip


def run_all(
    parts: Sequence[Part], context: Context, seconds: float, note: Callable[[list[Result]], None]
) -> list[Result]:
    end = time.monotonic() + seconds
    results: list[Result] = []
    for k, part in enumerate(parts):
        # A fifth of the time is kept for the benchmarks, which come last.
        kept = seconds / 5 if any(later.group == "bench" for later in parts[k + 1 :]) else 0
        results += run_part(context, part, end - kept - time.monotonic())
        note(results)
    return results


def as_json(context: Context, results: Sequence[Result], o: argparse.Namespace) -> dict[str, Any]:
    import report
    import torch

    facts = report.facts(context.device, torch.get_num_threads())
    return {
        "format": 1,
        "rehearsal": context.rehearse,
        **facts,
        "commit": o.commit or facts["commit"],
        "only": o.only,
        "seconds_allowed": o.minutes * 60,
        "parts": [asdict(result) for result in results],
    }


def problems(data: Any) -> list[str]:
    """What is wrong with the form of a report; nothing if it is right."""
    types: dict[str, Any] = {
        "format": int, "rehearsal": bool, "date": str, "machine": dict, "versions": dict,
        "dirty": bool, "only": list, "seconds_allowed": (int, float), "parts": list,
    }  # fmt: skip
    found = [
        f"{k}: {data.get(k)!r}" for k, kind in types.items() if not isinstance(data.get(k), kind)
    ]
    found += [] if "commit" in data else ["commit is missing"]
    seen = set()
    for part in data.get("parts") or []:
        where = f"{part.get('name')}[{part.get('backend')}]"
        if set(part) != set(Result.__dataclass_fields__):
            found.append(f"{where}: fields {sorted(part)}")
            continue
        if where in seen:
            found.append(f"{where} is there twice")
        seen.add(where)
        if part["status"] not in STATUSES or (part["status"] != "ok") != bool(part["reason"]):
            found.append(f"{where}: status {part['status']!r}, reason {part['reason']!r}")
        if not isinstance(part["data"], dict) or not part["seconds"] >= 0:
            found.append(f"{where}: data or seconds")
    return found


def file_name(data: dict[str, Any]) -> str:
    kind = "rehearsal" if data["rehearsal"] else "gpu-report"
    model = data["machine"]["gpu"] or data["machine"]["cpu"]
    stem = "-".join([kind, model, *data["only"]]).lower()
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") + ".json"


def table_of(results: Sequence[Result]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "status", "s", "what was found, or why not")
    colours = {"ok": "", "failed": "bold red", "skipped": "yellow"}
    for name in dict.fromkeys(result.name for result in results):
        for k, r in enumerate(result for result in results if result.name == name):
            says = ": ".join(filter(None, [r.backend, r.reason or r.summary]))
            says = escape(says if len(says) < 150 else says[:147] + "…")
            table.add_row(
                "" if k else name, r.status, f"{r.seconds:.0f}", says, style=colours[r.status]
            )
    return table


def why_not_here(rehearse: bool) -> str | None:
    """Why this Python on this machine cannot make the report."""
    need = [m for m in ("torch", "pytest", "rich", "matplotlib") if not importlib.util.find_spec(m)]
    if need:
        return (
            f"make gpu installs nothing, and {sys.executable} has no {', no '.join(need)}; "
            "PYTHON=... names another Python"
        )
    import torch

    if rehearse or torch.cuda.is_available():
        return None
    return (
        f"make gpu needs a GPU, and torch {torch.__version__} finds none on this machine; "
        "make gpu REHEARSE=1 runs the same code on the CPU"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--rehearse", action="store_true", help="the same code on a CPU")
    add("--out", type=Path, help="folder for JSON and PNG; benchmarks/results, or build/rehearsal")
    add("--only", default="", help=f"{','.join(GROUPS)}: some of these")
    add("--minutes", type=float, default=MINUTES, help="time limit of the whole")
    add("--commit", help="of this tree, where it has no history of its own")
    o = parser.parse_args(argv)
    o.out = (o.out or (ROOT / "build/rehearsal" if o.rehearse else RESULTS)).resolve()
    o.only = [word for word in o.only.split(",") if word]
    if wrong := set(o.only) - set(GROUPS):
        parser.error(f"--only {','.join(sorted(wrong))}: choose from {', '.join(GROUPS)}")
    if o.rehearse and (o.out == RESULTS or RESULTS in o.out.parents):
        parser.error("a rehearsal is no result: it cannot be written into benchmarks/results")
    return o


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] | None = None) -> int:
    o = parse(argv)
    if reason := why_not_here(o.rehearse):
        print(reason, file=sys.stderr)
        return 2
    sys.path[:0] = [str(ROOT), str(FOLDER)]
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 170
    context = Context(o.rehearse, o.out)
    always = ("build", "environment")
    chosen = list(parts or all_parts())
    if o.only:  # they may take all the time that there is; of several, one not that of the others
        most = 9999 if len(o.only) == 1 else 0.5 * o.minutes * 60
        chosen = [p._replace(seconds=max(p.seconds, most))
                  for p in chosen if p.group in (*always, *o.only)]  # fmt: skip
    o.out.mkdir(parents=True, exist_ok=True)
    shown: set[int] = set()

    def note(results: list[Result]) -> None:
        for r in (r for r in results if id(r) not in shown):
            shown.add(id(r))
            what = " ".join(filter(None, [r.name, r.backend]))
            line = f"{r.status:8}{r.seconds:5.0f} s  {what}: {r.reason or r.summary}"
            console.print(line, markup=False, soft_wrap=True)
        data = as_json(context, results, o)
        (o.out / file_name(data)).write_text(json.dumps(data, indent=1) + "\n")

    results = run_all(chosen, context, o.minutes * 60, note)
    data = as_json(context, results, o)
    console.print(table_of(results))
    console.print(f"written: {o.out / file_name(data)}", soft_wrap=True)
    for problem in problems(data):
        console.print(f"the report has a wrong form: {problem}", markup=False)
    return int(any(r.status == "failed" for r in results) or bool(problems(data)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so end what was started
    sys.exit(main())
