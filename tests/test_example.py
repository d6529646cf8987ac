"""The demo runs, prints and draws what it promises, and trains as a plain PyTorch loop does."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import RandomSampler

import dlb_fused

PROGRAM = Path(__file__).parents[1] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_digits", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(module.THREADS)
    yield module
    torch.set_num_threads(threads)


def start(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    package = Path(dlb_fused.__file__).parents[1]
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, PROGRAM, "--out", "pictures", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_the_program(tmp_path: Path) -> None:
    done = start(tmp_path, "--seeds", "2", "--steps", "25")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"│ (\S.*?) +│ +(\d+\.\d+ ± \d+\.\d+) │ +\d+ │", done.stdout))
    assert list(rows) == [
        "cross-entropy",
        "label smoothing",
        "overlapping batches, α = 0",
        "DLB, naive loss",
        "DLB, dlb_fused",
    ]
    naive, fused = (float(rows[f"DLB, {name}"].split()[0]) for name in ("naive loss", "dlb_fused"))
    assert abs(naive - fused) < 1
    (difference,) = re.findall(r"differ by at most (\S+),", done.stdout)
    assert float(difference) < 1e-3
    for case in ("10, in training", "1000, random logits", "21841, random logits"):
        assert re.search(rf"│ {case} +│ +\d+ │ +\d+ │ +\d+\.\d │", done.stdout)
    picture = tmp_path / "pictures" / "train_digits.png"
    assert f"Picture: {picture.resolve()}" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_too_few_seeds(tmp_path: Path) -> None:
    done = start(tmp_path, "--seeds", "1")
    assert done.returncode == 2 and "--seeds and --steps must be at least 2" in done.stderr


def test_wrong_labels(example: ModuleType) -> None:
    train, test = example.load_data()
    again, _ = example.load_data()
    assert len(train) == 1200 and len(test) == 597
    assert torch.equal(train.labels, again.labels) and torch.equal(train.images, again.images)
    truth = dict(zip(map(key, all_digits()[0]), all_digits()[1].tolist(), strict=True))
    wrong = [truth[key(x)] != y for x, y in zip(train.images, train.labels.tolist(), strict=True)]
    assert sum(wrong) == 480
    assert all(truth[key(x)] == y for x, y in zip(test.images, test.labels.tolist(), strict=True))


def all_digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)


def key(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


def test_each_appearance_is_another_view(example: ModuleType) -> None:
    train, _ = example.load_data()
    torch.manual_seed(0)
    views = {key(train[0][0].clone()) for _ in range(60)}
    assert len(views) == 9  # shifts by -1, 0 or 1 pixel each way
    assert key(train.images[0]) in views


@pytest.mark.parametrize("name", ["NAIVE", "FUSED"])
def test_it_trains_as_a_loop_written_out(example: ModuleType, name: str) -> None:
    """25 steps, over an epoch border (18 steps of 64 fresh rows)."""
    steps, data = 25, example.load_data()
    run = example.train(getattr(example, name), 3, steps, data, lambda: None)

    torch.manual_seed(3)
    model = example.make_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sampler = RandomSampler(data[0], generator=torch.Generator().manual_seed(3))
    losses: list[float] = []
    last: list[int] = []
    last_logits = None
    while len(losses) < steps:
        torch.empty((), dtype=torch.int64).random_()  # a loader seeds its workers at each epoch
        order = list(sampler)
        for k in range(0, 1200 - 63, 64):
            fresh = order[k : k + 64]
            images, labels = map(torch.stack, zip(*(data[0][i] for i in last + fresh), strict=True))
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if last_logits is not None:
                loss = loss + 9 * F.kl_div(
                    F.log_softmax(logits[:64] / 3, dim=1),
                    F.softmax(last_logits / 3, dim=1),
                    reduction="batchmean",
                )
            last, last_logits = fresh, logits[-64:].detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    torch.testing.assert_close(run.losses, losses[:steps], rtol=1e-3, atol=1e-3)
    assert run.losses[-1] < run.losses[0]
