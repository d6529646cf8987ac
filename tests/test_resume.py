"""Kill -9 in training, and the losses after it: those of the run that was not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dlb_fused

PROGRAM = Path(__file__).parents[1] / "examples" / "resume.py"
EPOCHS, BATCHES = 6, 13  # ceil(100 / 8) an epoch

# The program killed from inside, so that it is the same step each time: behind a line that it has
# printed, or when a checkpoint is written but not yet in its place.
KILLED_BEHIND_LINE = """
import os, runpy, signal
def show(*words, lines=[], **options):
    print(*words, **options)
    lines.append(words)
    if len(lines) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path({program!r}, {{"print": show}}, "__main__")
"""
KILLED_IN_CHECKPOINT = """
import os, runpy, signal
def replace(*paths, move=os.replace, written=[]):
    written.append(paths)
    if len(written) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    move(*paths)
os.replace = replace
runpy.run_path({program!r}, run_name="__main__")
"""


def train(checkpoint: Path, every: int, workers: int, killed: str = "") -> list[str]:
    """The lines that the program prints, one a step."""
    package = Path(dlb_fused.__file__).parents[1]
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["PYTHONWARNINGS"] = "error::RuntimeWarning"  # a broken chain would end it
    program = ["-c", killed] if killed else [str(PROGRAM)]
    output = checkpoint.with_suffix(".out")
    with output.open("w") as stdout:  # a pipe would stay open until orphaned workers end
        result = subprocess.run(
            [sys.executable, *program, str(checkpoint), *map(str, (EPOCHS, every, workers))],
            stdout=stdout,
            env={**os.environ, **environment},
            timeout=300,
        )
    assert result.returncode == (-signal.SIGKILL if killed else 0)
    return output.read_text().splitlines()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Without workers, and without a checkpoint: writing one changes nothing."""
    checkpoint = tmp_path_factory.mktemp("truth") / "none.pt"
    lines = train(checkpoint, every=BATCHES + 1, workers=0)
    assert not checkpoint.exists() and len(lines) == EPOCHS * BATCHES
    return lines


@pytest.mark.parametrize(
    "killed, at, every, workers, last",
    [
        pytest.param(KILLED_BEHIND_LINE, 19, 5, 0, 18, id="in mid-epoch"),
        pytest.param(KILLED_BEHIND_LINE, 19, 5, 2, 18, id="in mid-epoch, with workers"),
        pytest.param(KILLED_BEHIND_LINE, 27, BATCHES, 2, 26, id="behind an epoch's last batch"),
        pytest.param(KILLED_IN_CHECKPOINT, 5, 4, 2, 17, id="while a checkpoint is written"),
    ],
)
def test_killed_and_resumed(
    killed: str, at: int, every: int, workers: int, last: int, truth: list[str], tmp_path: Path
) -> None:
    """last: batches before the last checkpoint."""
    checkpoint = tmp_path / "checkpoint.pt"
    before = train(checkpoint, every, workers, killed.format(at=at, program=str(PROGRAM)))
    assert before == truth[: len(before)] and len(before) > last
    after = train(checkpoint, every, workers)
    assert after == truth[last:] and len(after) >= 50
