"""Accelerate, Lightning and the Hugging Face Trainer themselves, on two processes; and the
examples."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ddp_ranks import HALF
from ranks import findings, is_chain, start, torchrun

EXAMPLES = Path(__file__).parents[1] / "examples"
FRAMEWORKS = ("accelerate", "trainer", "lightning")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return findings(2, "framework_ranks.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_each_rank_has_its_own_chain(framework: str, two: list[dict[str, Any]]) -> None:
    """Two epochs with validation in between: one link missing, and rows would not match."""
    runs = [rank[framework]["whole"] for rank in two]
    for run in runs:
        assert len(run["batches"]) == 20 and is_chain(run["batches"], HALF, lag=2)
        assert run["kl"][:2] == [0, 0] and min(run["kl"][2:]) > 0
        matched, mismatched, _ = run["stats"]
        assert mismatched == 0 and matched >= 18 * HALF
    for steps in (slice(10), slice(10, 20)):
        fresh = [i for run in runs for batch in run["batches"][steps] for i in batch[-HALF:]]
        assert sorted(fresh) == list(range(80))  # distinct on each rank


@pytest.mark.parametrize("stop", [10, 14])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_resume_continues_the_chain(framework: str, stop: int, two: list[dict[str, Any]]) -> None:
    """From the end of an epoch and from the middle of the next; to the bit, on each rank."""
    first, second = (rank[framework][f"from {stop}"] for rank in two)
    for rank, resumed in zip(two, (first, second), strict=True):
        whole = rank[framework]["whole"]
        assert resumed["batches"] == whole["batches"][stop:]
        assert resumed["kl"] == whole["kl"][stop:] and min(resumed["kl"]) > 0
    assert first["kl"] != second["kl"]


@pytest.mark.parametrize("way", ["resharded", "split"])
def test_accelerate_prepare_leaves_no_overlap_and_the_guard_says_so(
    way: str, two: list[dict[str, Any]]
) -> None:
    for run in (rank["accelerate"][way] for rank in two):
        assert all(set(a).isdisjoint(b) for a, b in pairwise(run["batches"]))
        assert max(run["kl"]) == 0
        matched, mismatched, _ = run["stats"]
        assert matched == 0 and mismatched > 0
        (warning,) = (w for w in run["warnings"] if "DLBLoss" in w)
        assert warning.startswith("DLBLoss found rows that do not continue the last batch")


LAG = "with lag={} {}the teacher is one optimizer step old"
REFUSALS = {
    ("accelerate", "refusal"): "DLBLoss(lag=1) does not fit Accelerator("
    "gradient_accumulation_steps=2): " + LAG.format(2, ""),
    ("trainer", "refusal"): "DLBLoss(lag=1) does not fit TrainingArguments("
    "gradient_accumulation_steps=2): " + LAG.format(2, ""),
    ("trainer", "smoothing"): "label_smoothing_factor must be 0, got 0.1: use "
    "DLBLoss(label_smoothing=...)",
    ("trainer", "strategy"): "train_sampling_strategy must be 'random', got 'sequential': each "
    "process draws from its own shuffled share of the samples",
    ("trainer", "ids"): "a batch must have ['labels', 'number'], got ['input_ids', 'labels', "
    "'unused']",
    ("lightning", "lag"): "DLBLoss(lag=2) and OverlapBatchSampler(lag=2) do not fit Trainer("
    "accumulate_grad_batches=1): " + LAG.format(1, "in both, "),
    ("lightning", "schedule"): "DLBLoss(lag=2) and OverlapBatchSampler(lag=2) do not fit Trainer("
    "accumulate_grad_batches=1): " + LAG.format(1, "in both, "),
    ("lightning", "made elsewhere"): "DLBLoss(lag=2) and OverlapBatchSampler(lag=1) do not fit "
    "Trainer(accumulate_grad_batches=2): " + LAG.format(2, "in both, "),
    ("lightning", "unsharded"): "each of the 2 ranks needs its own share of the samples, but the "
    "OverlapBatchSampler has a RandomSampler: leave Trainer(use_distributed_sampler=True), or give "
    "it a DistributedSampler",
    ("lightning", "plain"): "DLBCallback needs a train_dataloader with "
    "batch_sampler=OverlapBatchSampler(...), got DataLoader with BatchSampler",
    ("lightning", "second"): "DLBCallback needs a module with one DLBLoss, but Module has 2; set "
    "it as an attribute, as in self.criterion = DLBLoss()",
}


@pytest.mark.parametrize("case", REFUSALS, ids=" ".join)
def test_refusals(case: tuple[str, str], two: list[dict[str, Any]]) -> None:
    framework, name = case
    for rank in two:
        assert rank[framework][name] == REFUSALS[case]


def test_lightning_keeps_the_overlap_when_it_injects_its_sampler(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["lightning"]["sampler"] == ("OverlapBatchSampler", "DistributedSampler", 2)


def test_trainer_keeps_the_ids_and_logs_the_parts(two: list[dict[str, Any]]) -> None:
    for found in (rank["trainer"] for rank in two):
        assert found["columns"] == ["input_ids", "labels", "number"]  # and not "unused"
        for entry in found["log"]:
            assert entry["kl"] > 0 and entry["matched"] > 0
            assert entry["loss"] == pytest.approx(entry["ce"] + 9 * entry["kl"], rel=0.1)
        assert len(found["eval_loss"]) == 4 and found["eval_loss"][-1] < found["eval_loss"][0]


def test_trainer_takes_a_model_without_labels_and_with_tuples(two: list[dict[str, Any]]) -> None:
    for found in (rank["trainer"] for rank in two):
        kl, (shape, loss) = found["bare"]
        assert len(kl) == 20 and min(kl[2:]) > 0
        assert shape == (80, 7, 30) and loss > 0


def test_import_is_lazy() -> None:
    """`import dlb_fused` brings none of the frameworks with it."""
    names = "accelerate", "lightning", "transformers"
    program = f"import dlb_fused, sys; print([n for n in {names} if n in sys.modules])"
    assert start("-c", program, cwd=Path.cwd()).split() == ["[]"]


PARTS = r"ce=(\d\.\d+), kl=(\d\.\d+), matched=(\d+)"


def test_plain_loop(tmp_path: Path) -> None:
    """Two epochs, and a third from the checkpoint: 20 of 24 steps into the second."""
    program = EXAMPLES / "plain_loop.py"
    once = start(program, "--epochs", "2", "--checkpoint", "run.pt", cwd=tmp_path)
    again = start(program, "--epochs", "2", "--checkpoint", "run.pt", cwd=tmp_path)
    assert [m for *_, m in re.findall(PARTS, once)] == ["704", "1472", "2204", "2972"]
    ((_, kl, matched),) = re.findall(PARTS, again)
    assert float(kl) > 0 and matched == "256"  # 4 steps
    accuracies = [float(a) for a in re.findall(r"accuracy (\S+)", once + again)]
    assert len(accuracies) == 3 and min(accuracies[1:]) > 0.6


def test_ddp(tmp_path: Path) -> None:
    out = torchrun(2, EXAMPLES / "ddp.py", "--epochs=1", "--checkpoint=run", cwd=tmp_path)
    ranks = re.findall(rf"epoch 0, rank (\d): {PARTS}", out)
    assert sorted(rank for rank, *_ in ranks) == ["0", "1"]
    assert all(float(kl) > 0 and matched == "736" for *_, kl, matched in ranks)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["rank0.pt", "rank1.pt"]


def test_accelerate_loop(tmp_path: Path) -> None:
    program = EXAMPLES / "accelerate_loop.py"
    out = start(program, "--epochs", "2", "--checkpoint", "run", cwd=tmp_path)
    assert [m for *_, m in re.findall(PARTS, out)] == ["1440", "2940"]
    assert (tmp_path / "run" / "dlb_fused_0.pt").exists()


def test_lightning_module(tmp_path: Path) -> None:
    out = start(EXAMPLES / "lightning_module.py", "--epochs", "2", cwd=tmp_path)
    assert [m for *_, m in re.findall(PARTS, out)] == ["1472", "2972"]


def test_hf_trainer(tmp_path: Path) -> None:
    out = start(EXAMPLES / "hf_trainer.py", "--epochs", "1", cwd=tmp_path)
    found = re.findall(r"'kl': '?([\d.e-]+)'?, 'matched': (\d+)", out)
    assert found and all(float(kl) > 0 and int(matched) > 0 for kl, matched in found)
    assert (tmp_path / "hf_trainer" / "checkpoint-8" / "dlb_fused_0.pt").exists()


# The demo, and the trainer of the study with its parts; all others show one thing each.
PROGRAMS = {
    "train_digits.py",
    "train.py",
    "methods.py",
    "networks.py",
    "image_data.py",
    "augment.py",
}
SHORT = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in PROGRAMS)


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_each_trap_is_shown_by_a_test_that_exists() -> None:
    """The table in examples/README.md."""
    _, _, table = (EXAMPLES / "README.md").read_text(encoding="utf-8").partition("## Traps")
    rows = table.strip().splitlines()[2:]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split(" | ")[-1])
        assert named, row
        for file, test in named:
            source = (EXAMPLES.parent / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {test}(" in source, (file, test)
