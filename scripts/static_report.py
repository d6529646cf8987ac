"""What the machine code of the kernels says about their speed, without a GPU: `make static`.

Compiles the Triton kernels (as the run-time dispatch launches them) and the CUDA kernels for four
GPU architectures, reads their machine code, and writes benchmarks/results/static.{json,md}.
With --check it writes nothing, takes fewer cases, and fails on

- a spill: any byte of stack, any LDL or STL;
- a narrow access: less than 128 bits of a row at a time, where its bytes allow 128;
- growth over the table: more than TOLERANCE in registers, shared memory, or instructions or EX2 an
  element; fewer blocks a multiprocessor; a kernel that only one of the two has.

Growth is only looked for where the compiler is the one of the table.

The budget is what the memory system leaves: at the copy rate of an H200 (4.3 TB/s seen, 132
multiprocessors, 1.785 GHz assumed) 18.2 bytes a clock and multiprocessor, against the 128
instructions and 16 EX2 that it can do in that clock, for the bytes of an element that must move:
logits, gradient and, in KL rows, teacher.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import sass
from static_kernels import CAPABILITIES, ITEM, ROOT, Entry, compilers, measure, plans

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 0.05
BYTES_PER_CLOCK = 4.3e12 / 132 / 1.785e9


def budget(kind: str, dtype: str) -> tuple[float, float]:
    """Instructions and EX2 an element."""
    clocks = ITEM[dtype] * (2 if kind == "CE" else 3) / BYTES_PER_CLOCK
    return 128 * clocks, 16 * clocks


def wrong(entry: Entry) -> list[str]:
    """What no kernel may have."""
    found = []
    if entry.spills:
        found.append(f"{entry.key}: spills ({entry.spills} bytes of stack and instructions on it)")
    if entry.narrow:
        found.append(f"{entry.key}: {entry.narrow} accesses of rows have less than 128 bits")
    return found


def sizes(entry: Entry) -> dict[str, float]:
    """What must not grow."""
    found: dict[str, float] = {"registers": entry.registers, "shared memory": entry.shared}
    for kind in entry.work:
        instructions, ex2 = entry.total(kind)
        found[f"instructions an element of {kind} rows"] = round(instructions, 2)
        found[f"EX2 an element of {kind} rows"] = round(ex2, 2)
    return found


def passes(entry: Entry) -> dict[str, list[str]]:
    return {kind: sorted(work) for kind, work in sorted(entry.work.items())}


def grown(entry: Entry, old: Entry) -> list[str]:
    found = []
    before, now = sizes(old), sizes(entry)
    for name in before.keys() & now.keys():
        if now[name] > before[name] * (1 + TOLERANCE):
            found.append(f"{name} grew from {before[name]} to {now[name]}")
    if passes(entry) != passes(old):
        found.append(f"hot code is for {passes(entry)} instead of {passes(old)}")
    if entry.blocks < old.blocks:
        found.append(f"{entry.blocks} blocks a multiprocessor instead of {old.blocks}")
    if [*old.loads, *old.stores].count("128") > [*entry.loads, *entry.stores].count("128"):
        found.append("no more 16 bytes at a time")
    return [f"{entry.key}: {line}" for line in found]


def compare(entries: list[Entry], table: dict[str, Entry], complete: bool) -> list[str]:
    """entries of one backend; complete: they are all that there are."""
    found = []
    for entry in entries:
        if entry.key in table:
            found += grown(entry, table[entry.key])
        else:
            found.append(f"{entry.key}: is not in the table")
    keys = {entry.key for entry in entries}
    if complete:
        found += [f"{key}: is in the table, but no kernel any more" for key in table.keys() - keys]
    return found


def load_table() -> tuple[dict[str, str], list[Entry]]:
    """The compilers, and what they made."""
    table = json.loads((RESULTS / "static.json").read_text())
    return table["compilers"], [Entry(**entry) for entry in table["kernels"]]


def save(compilers: dict[str, str], entries: list[Entry], folder: Path) -> None:
    lines = ",\n".join("  " + json.dumps(entry._asdict()) for entry in entries)
    text = f'{{\n"compilers": {json.dumps(compilers)},\n"kernels": [\n{lines}\n]\n}}\n'
    (folder / "static.json").write_text(text)
    (folder / "static.md").write_text(page(compilers, entries))


def page(compilers: dict[str, str], entries: list[Entry]) -> str:
    spills = sum(e.spills > 0 for e in entries)
    return f"""# What the machine code of the kernels says

Made by `make static` with {" and ".join(compilers.values())}. Nothing here ran on a GPU.
`scripts/static_report.py` says how it is counted, and where the budget comes from.

## Instructions and EX2 an element, on sm_90

What a row costs an element of it, as far as it grows with the row, and what would fit into the time
that its bytes take on an H200: below 100 % of the budget, memory decides. Beside instructions and
EX2 stand their budgets; the percentage is of the scarcer one.

{work_table([e for e in entries if e.capability == CAPABILITIES[0] and e.work])}

## Registers, shared memory and occupancy

For each architecture: registers of a thread, and how many of the threads that a multiprocessor can
hold it does hold. Loads and stores of rows in bits at a time; bytes of static shared memory. CUDA
rows on chip lie in dynamic shared memory besides, see below.
{f"**Of all these, {spills} spill.**" if spills else "Nothing spills."}

{needs_table(entries)}

## CUDA: what runs for a row of C classes

For each architecture the kernel, blocks of a row × threads of a block, dynamic shared memory of a
block for a row with its teacher, and the occupancy with it.

{plan_table(entries)}
"""


def table_of(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def work_table(entries: list[Entry]) -> str:
    rows = []
    for e in entries:
        for kind in sorted(e.work):
            have, may = e.total(kind), budget(kind, e.dtype)
            cells = [e.backend, e.form, e.dtype, kind]
            cells += [f"{h:.1f} / {m:.1f}" for h, m in zip(have, may, strict=True)]
            cells.append(f"{max(have[0] / may[0], have[1] / may[1]):.0%}")
            cells.append(", ".join(f"{k} {i:.1f} / {x:.1f}" for k, (i, x) in e.work[kind].items()))
            rows.append(cells)
    head = "backend, kernel, type, rows, instructions, EX2, of budget, by pass".split(", ")
    return table_of(head, rows)


def needs_table(entries: list[Entry]) -> str:
    by_key = {entry.key: entry for entry in entries}
    rows = []
    for e in (entry for entry in entries if entry.capability == CAPABILITIES[0]):
        bits = ["/".join(which) or "–" for which in (e.loads, e.stores)]
        cells = [e.backend, e.form, e.dtype, str(e.threads), str(e.shared), *bits]
        for capability in sorted(CAPABILITIES):
            o = by_key[e._replace(capability=capability).key]
            spill = f", **spills {o.spills}**" if o.spills else ""
            cells.append(f"{o.registers}, {o.occupancy:.0%}{spill}")
        rows.append(cells)
    head = "backend, kernel, type, threads, shared, loads, stores".split(", ")
    return table_of([*head, *(f"sm_{c}" for c in sorted(CAPABILITIES))], rows)


def plan_table(entries: list[Entry]) -> str:
    by_key = {entry.key: entry for entry in entries}
    found = plans()
    rows = []
    for dtype, C in dict.fromkeys((dtype, C) for _, dtype, C in found):
        cells = [dtype, str(C)]
        for capability in sorted(CAPABILITIES):
            plan = found[capability, dtype, C]
            e = by_key[f"cuda, {plan.form}, {dtype}, sm_{capability}"]
            blocks = sass.resident(e.registers, plan.threads, e.shared + plan.shared, capability)
            occupancy = blocks * plan.threads / sass.LIMITS[capability].threads
            size = f"{plan.shared / 1024:.0f} KiB"
            cells.append(f"{plan.form}, {plan.cluster} × {plan.threads}, {size}, {occupancy:.0%}")
        rows.append(cells)
    return table_of(["type", "C", *(f"sm_{c}" for c in sorted(CAPABILITIES))], rows)


def check(few: bool) -> list[str]:
    """What is wrong now, and what grew."""
    made_with, table = load_table()
    here = compilers()
    found = []
    for backend in made_with:
        if backend not in here:
            print(f"static: the {backend} kernels were not checked: there is no nvcc")
            continue
        entries = measure(backend, few)
        found += [line for entry in entries for line in wrong(entry)]
        if here[backend] == made_with[backend]:
            own = {entry.key: entry for entry in table if entry.backend == backend}
            found += compare(entries, own, complete=not few)
        else:
            print(
                f"static: the {backend} kernels were not compared: the table is of "
                f"{made_with[backend]}, here is {here[backend]}"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="static evidence of the kernels' speed")
    parser.add_argument("--check", action="store_true", help="compare with the table; fewer cases")
    parser.add_argument("--all", action="store_true", help="with --check: all cases")
    options = parser.parse_args()
    if options.check:
        found = check(few=not options.all)
        print("\n".join(found) or "static: no spills, no narrow accesses, no growth")
        return bool(found)
    here = compilers()
    if "cuda" not in here:
        sys.exit(
            "static: CUDA kernels are in the table: put nvcc on PATH or pip install '.[static]'"
        )
    entries = [entry for backend in here for entry in measure(backend, few=False)]
    save(here, entries, RESULTS)
    found = [line for entry in entries for line in wrong(entry)]
    print("\n".join(found) or f"static: {len(entries)} kernels, no spills, no narrow accesses")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
