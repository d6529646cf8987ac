"""Starts a program of this folder on several processes, as torchrun does, and reads what each
found: a dict that it saved as rank0.pt, rank1.pt, ..."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dlb_fused

TESTS = Path(__file__).parent


def environment() -> dict[str, str]:
    """One thread each, and this dlb_fused."""
    package = str(Path(dlb_fused.__file__).parents[1])
    paths = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def start(*command: str | Path, cwd: Path) -> str:
    """What a Python program prints, errors too. If it hangs, it is ended."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    try:
        out, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # upon which torchrun ends its workers; killed, it would leave them
        out, _ = process.communicate()
        raise AssertionError(f"no end after 180 seconds:\n{out}") from None
    assert process.returncode == 0, out
    return out


def torchrun(ranks: int, *command: str | Path, cwd: Path) -> str:
    options = ("--standalone", f"--nproc-per-node={ranks}")
    return start("-m", "torch.distributed.run", *options, *command, cwd=cwd)


def findings(ranks: int, program: str, folder: Path) -> list[dict[str, Any]]:
    torchrun(ranks, TESTS / program, folder, cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def is_chain(batches: list[list[int]], half: int, lag: int = 1) -> bool:
    """Whether each batch begins with the last `half` samples of the one `lag` earlier."""
    first, later = batches[:lag], batches[lag:]
    return all(len(batch) == half for batch in first) and all(
        batch[:half] == before[-half:] and len(batch) == 2 * half
        for before, batch in zip(batches, later, strict=False)
    )
