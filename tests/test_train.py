"""The trainer: each method has the batches and the loss that it says, a training goes on after
kill -9 as if nothing had been, and what it writes down is what came."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

import dlb_fused
from dlb_fused.reference import dlb_loss_naive

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import methods  # noqa: E402
import test_image_data  # noqa: E402
import train  # noqa: E402
from image_data import Split  # noqa: E402
from methods import METHODS, Batch, make_method  # noqa: E402

C, ROWS = 10, 16
TIMES = ("step_ms", "loss_ms", "seconds", "peak_memory_mib")  # differ from run to run


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(*argv: str, **others: Any) -> Namespace:
    return train.parse([*argv, *(f"--{name}={value}" for name, value in others.items())])


def run(out: Path, *argv: str) -> dict[str, Any]:
    return train.run(options("--noise=0.4", "--threads=1", *argv, out=out))


def split(N: int = 200) -> Split:
    labels = torch.arange(N) % C
    return Split(torch.zeros(N, 1, 8, 8, dtype=torch.uint8), labels, labels)


def method(name: str, *argv: str, steps: int = 100) -> methods.Method:
    return make_method(options(f"--method={name}", *argv), split(), C, steps)


# ---- batches ------------------------------------------------------------------------------------


def batches(name: str) -> list[list[int]]:
    shard = DistributedSampler(split().labels, 1, 0, drop_last=True)  # type: ignore[arg-type]
    return list(method(name).batches(shard, ROWS))


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_the_same_rows_a_step(name: str) -> None:
    lengths = [len(batch) for batch in batches(name)]
    first = ROWS // 2 if name in ("dlb", "ce-overlap") else ROWS  # the chain begins
    assert lengths == [first] + [ROWS] * (len(lengths) - 1)


def test_two_views_of_each_sample() -> None:
    for batch in batches("dlb-two-view"):
        assert batch[: ROWS // 2] == batch[ROWS // 2 :] and len(set(batch)) == ROWS // 2


def test_partners_are_others_of_the_same_class() -> None:
    labels, drawn = split().labels, batches("cs-kd")
    pairs = [pair for b in drawn for pair in zip(b[: ROWS // 2], b[ROWS // 2 :], strict=True)]
    assert all(labels[a] == labels[b] and a != b for a, b in pairs)
    assert len({b for _, b in pairs}) > 100  # not always the same ones
    assert [b for _, b in pairs] == [p for b in batches("cs-kd") for p in b[ROWS // 2 :]]


def test_a_class_of_one_is_its_own_partner() -> None:
    labels = torch.arange(C)
    shard = DistributedSampler(labels, 1, 0)  # type: ignore[arg-type]
    for batch in methods.ClassPairs(shard, 2, labels, seed=0):
        assert batch[:2] == batch[2:]


# ---- losses -------------------------------------------------------------------------------------


def batch_of(labels: Tensor, ids: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(len(labels), 1), labels, ids if ids is not None else labels)


def draw(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, C), torch.randint(C, (rows,))


def kl(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """Mean over the rows, from its definition, in fp64."""
    q, p = ((z.double() / tau).softmax(1) for z in (teacher, student))
    return (q * (q / p).log()).sum(1).mean()


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.double().log_softmax(1)[torch.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("argv", [(), ("--loss=naive",)])
def test_dlb_over_two_steps(argv: tuple[str, ...]) -> None:
    its = method("dlb", "--temperature=2", "--alpha=0.5", *argv)
    (first, a), (second, b) = draw(), draw()
    second = second.requires_grad_()
    m = ROWS // 2
    its.loss(first[:m].requires_grad_(), batch_of(a[:m]))
    labels = torch.cat((a[:m], b[m:]))
    loss = its.loss(second, batch_of(labels))
    want = dlb_loss_naive(second, labels, first[:m], temperature=2.0, alpha=0.5)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    got = [part.item() for part in its.parts()]
    assert got == pytest.approx([ce(second, labels).item(), kl(first[:m], second[:m], 2).item()])
    gradients = [torch.autograd.grad(value, second)[0] for value in (loss, want)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_ce_overlap_is_cross_entropy() -> None:
    logits, labels = draw()
    its = method("ce-overlap")
    for _ in range(2):
        loss = its.loss(logits.requires_grad_(), batch_of(labels))
    assert loss.item() == pytest.approx(ce(logits, labels).item())


def test_two_views_match_the_second() -> None:
    logits, labels = draw()
    logits.requires_grad_()
    its = method("dlb-two-view", "--temperature=2", "--alpha=0.5")
    loss = its.loss(logits, batch_of(labels))
    m = ROWS // 2
    want = ce(logits, labels) + 0.5 * 4 * kl(logits[m:].detach(), logits[:m], 2)
    assert loss.item() == pytest.approx(want.item())
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, want)]
    assert torch.allclose(*gradients, atol=1e-7)  # none to the second views but of their labels


def test_class_wise() -> None:
    torch.manual_seed(0)
    its, network = method("cs-kd"), nn.Linear(4, C)
    rows, labels = torch.randn(ROWS, 4), torch.randint(C, (ROWS,))
    logits = its.forward(network, rows)
    m = ROWS // 2
    loss = its.loss(logits, batch_of(labels))
    alone = network(rows)
    want = ce(alone[:m], labels[:m]) + 16 * kl(alone[m:].detach(), alone[:m], 4)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, network.weight)[0] for value in (loss, want)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_progressive_learns_from_the_last_epoch() -> None:
    its = method("ps-kd")
    (first, labels), (second, _) = draw(), draw()
    ids = torch.arange(ROWS)
    labels = split().labels[ids]
    its.start_epoch(0, 4)
    assert its.loss(first, batch_of(labels, ids)).item() == pytest.approx(ce(first, labels).item())
    its.start_epoch(3, 4)
    soft = -(first.double().softmax(1) * second.double().log_softmax(1)).sum(1).mean()
    want = 0.2 * ce(second, labels) + 0.8 * soft
    assert its.loss(second, batch_of(labels, ids)).item() == pytest.approx(want.item())


def test_virtual_teacher() -> None:
    logits, labels = draw()
    teacher = torch.full((ROWS, C), 0.01 / 9, dtype=torch.float64)
    teacher[torch.arange(ROWS), labels] = 0.99
    q, p = (teacher / 20).softmax(1), logits.double().softmax(1)
    want = 0.9 * ce(logits, labels) + 0.1 * (q * (q / p).log()).sum(1).mean()
    assert method("tf-kd-reg").loss(logits, batch_of(labels)).item() == pytest.approx(want.item())


def test_smoothing_and_mixing() -> None:
    logits, labels = draw()
    its = method("label-smoothing", "--smoothing=0.3")
    want = F.cross_entropy(logits.double(), labels, label_smoothing=0.3)
    assert its.loss(logits, batch_of(labels)).item() == pytest.approx(want.item())
    other, lam = torch.randint(C, (ROWS,)), torch.rand(ROWS)
    mixed = batch_of(labels)._replace(labels_b=other, lam=lam)
    log_p = -logits.double().log_softmax(1)
    rows = torch.arange(ROWS)
    want = (lam * log_p[rows, labels] + (1 - lam) * log_p[rows, other]).mean()
    assert method("ce").loss(logits, mixed).item() == pytest.approx(want.item())


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_each_method_learns_the_digits(name: str, tmp_path: Path) -> None:
    row = run(tmp_path, f"--method={name}", "--steps=60", "--evaluations=3", "--warmup=0.2")
    assert row["test_accuracy"] > 60  # of 10 classes, with 40 % of the labels wrong
    assert [point["step"] for point in row["curve"]] == [20, 40, 60]
    assert row == json.loads((tmp_path / "row.json").read_text())
    with (tmp_path / "log.csv").open() as file:
        assert [int(line["step"]) for line in csv.DictReader(file)] == [20, 40, 60]
    again = train.parse(shlex.split(row["command"])[2:])
    assert train.settings(again) == train.settings(options(
        "--noise=0.4", "--threads=1", f"--method={name}", "--steps=60", "--evaluations=3",
        "--warmup=0.2"))  # fmt: skip
    assert 0 < row["memorized"] < 40 and 0 < row["loss_ms"] < row["step_ms"]


def test_fused_and_naive_train_alike(tmp_path: Path) -> None:
    """The two differ in the last digits of float32, which grow from step to step."""
    argv = ("--steps=20", "--evaluations=20", "--lr=0.01")
    curves = [run(tmp_path / x, f"--loss={x}", *argv)["curve"] for x in ("fused", "naive")]
    for key in ("ce", "kl"):
        fused, naive = ([point[key] for point in curve] for curve in curves)
        assert fused == pytest.approx(naive, rel=1e-3, abs=1e-5)
    assert curves[0][-1]["kl"] > 1e-4


def test_the_chain_holds_over_epochs(tmp_path: Path) -> None:
    training = train.Training(options(steps=40, out=tmp_path))  # of 16 in an epoch
    training.train(lambda step, text: None)
    stats = training.method.criterion.stats()  # type: ignore[attr-defined]
    assert stats.matched == 39 * 64 and stats.mismatched == stats.skipped == 0


def test_learning_rate_and_alpha(tmp_path: Path) -> None:
    training = train.Training(options("--ramp=0.5", steps=240, warmup=0.05, lr=0.1, out=tmp_path))
    rates = []
    for training.step in range(240):
        training.set_learning_rate()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates[:12] == pytest.approx([0.1 * (k + 1) / 12 for k in range(12)])
    assert rates[12:150] == [0.1] * 138
    assert rates[150:] == pytest.approx([0.01] * 30 + [0.001] * 30 + [0.0001] * 30)
    alphas = [training.method.alpha(k) for k in (0, 59, 119, 200)]  # type: ignore[attr-defined]
    assert alphas == pytest.approx([1 / 120, 0.5, 1, 1])


@pytest.mark.parametrize("argv", [("--augment=mixup", "--amp=bf16"), ("--augment=cutmix",)])
def test_mixed_images(argv: tuple[str, ...], tmp_path: Path) -> None:
    row = run(tmp_path, "--steps=120", "--evaluations=1", "--workers=1", "--warmup=0.1", *argv)
    assert row["test_accuracy"] > 40


@pytest.mark.parametrize("argv", [("--amp=fp16",), ("--amp=fp16", "--loss=naive"), ("--amp=bf16",)])
def test_half_precision(argv: tuple[str, ...], tmp_path: Path) -> None:
    row = run(tmp_path, "--steps=40", "--evaluations=1", "--warmup=0.2", *argv)
    assert row["test_accuracy"] > 50


def test_compiled(tmp_path: Path) -> None:
    row = run(tmp_path, "--steps=6", "--evaluations=1", "--compile", "--schedule=cosine")
    assert row["compile"] and row["curve"][-1]["ce"] < 2.5


def test_calibration_error() -> None:
    # Three images in the bin (0.8, 0.867], one of them right; one at 0.6, right.
    p = torch.tensor([[0.85, 0.15], [0.85, 0.15], [0.85, 0.15], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 1, 0])
    want = 100 * (3 / 4 * (0.85 - 1 / 3) + 1 / 4 * (1 - 0.6))
    assert train.calibration_error(p.log(), labels) == pytest.approx(want)


WRITERS = {
    "cifar10": test_image_data.write_cifar10,
    "cifar100": test_image_data.write_cifar100,
    "tinyimagenet": test_image_data.write_tinyimagenet,
}


@pytest.mark.parametrize(
    ("data", "net"),
    [
        ("cifar10", "vgg16"),
        ("cifar10", "wrn20-8"),
        ("cifar100", "resnet32"),
        ("cifar100", "densenet40-12"),
        ("tinyimagenet", "vgg19"),
        ("tinyimagenet", "resnet110"),
    ],
)
def test_the_papers_settings_on_tiny_files(
    data: str, net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from study import read_grid

    WRITERS[data](tmp_path / "files")
    tiny = {"folder": str(tmp_path / "files"), "net": net, "steps": 2, "batch_size": 8, "seed": 0}
    runs = read_grid(ROOT / "benchmarks" / "study" / f"{data}.toml", tiny | {"threads": 1})
    (wanted,) = (r for r in runs if r.options.method == "dlb" and r.grids[0] == "main"
                 and r.options.noise == 0)  # fmt: skip
    assert (wanted.options.lr, wanted.options.epochs, wanted.options.temperature) == (0.05, 240, 3)
    row = train.run(train.parse([*wanted.argv, "--out", str(tmp_path / "run")]))
    assert row["curve"][-1]["step"] == 2 and 0 <= row["test_accuracy"] <= 100


# ---- going on -----------------------------------------------------------------------------------


def start(*command: str, **how: Any) -> subprocess.Popen[str]:
    package = Path(dlb_fused.__file__).parents[1]
    paths = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT, **how
    )


def finish(process: subprocess.Popen[str]) -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    return error


@pytest.mark.parametrize("argv", [("--method=dlb", "--augment=mixup"), ("--method=cs-kd",)])
def test_after_kill_it_goes_on_as_if_nothing_had_been(
    argv: tuple[str, ...], tmp_path: Path
) -> None:
    argv = (*argv, "--steps=100", "--evaluations=10", "--noise=0.4", "--threads=1")
    whole = train.run(options(*argv, out=tmp_path / "whole"))
    program = [sys.executable, "examples/train.py", *argv, "--out", str(tmp_path / "cut")]
    process = start(*program)
    while process.poll() is None and not (tmp_path / "cut" / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut" / "row.json").exists()
    assert "test accuracy" in finish(start(*program, "--resume"))
    row = json.loads((tmp_path / "cut" / "row.json").read_text())
    assert {k: v for k, v in row.items() if k not in TIMES} == {
        k: v for k, v in whole.items() if k not in TIMES
    }


def test_two_ranks(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2", "examples/train.py"]  # fmt: skip
    argv = ["--steps=20", "--evaluations=1", "--threads=1", "--warmup=0.2", "--out", str(tmp_path)]
    finish(start(*torchrun, *argv))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["processes"] == 2 and row["test_accuracy"] > 40
    assert row["command"].startswith("torchrun --nproc-per-node=2 examples/train.py --steps 20")
    states = [torch.load(tmp_path / name) for name in ("last.pt", "last-rank1.pt")]
    for one, other in zip(*(state["network"].items() for state in states), strict=True):
        if "running" not in one[0]:  # BatchNorm's statistics are each rank's own
            assert torch.equal(one[1], other[1]), one[0]
    assert not torch.equal(states[0]["random"], states[1]["random"])


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size=127"], "--batch-size must be even, got 127"),
        (["--steps=0"], "--steps must be positive, got 0"),
        (["--warmup=2"], "--warmup must be in [0, 1], got 2.0"),
        (["--temperature=0"], "--temperature must be positive, got 0.0"),
        (["--method=dino"], "argument --method: invalid choice: 'dino'"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method=ce", "--loss=naive"], "--loss naive is of --method dlb, got 'ce'"),
        (["--method=cs-kd", "--augment=mixup"], "--augment mixup goes with ce, ce-overlap, label-"),
        (["--loss=naive", "--augment=mixup"], r"dlb \(and --loss fused\)"),
        (["--batch-size=4096", "--method=ce"], "1080 training images make no batch of 4096 rows"),
        (["--data=cifar10"], "cifar10 needs the folder of its files"),
    ],
)
def test_what_does_not_fit(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "new", *argv)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU here"):
        run(tmp_path / "new", "--device=cuda")


def test_no_training_is_lost(tmp_path: Path) -> None:
    argv = ("--steps=20", "--evaluations=1", "--method=ce")
    run(tmp_path, *argv)
    before = (tmp_path / "row.json").read_text()
    with pytest.raises(FileExistsError, match="holds a training: --resume, or another --out"):
        run(tmp_path, *argv)
    with pytest.raises(ValueError, match=r"is of another training \(lr: 0.05 and now 0.1\)"):
        run(tmp_path, *argv, "--lr=0.1", "--resume")
    with pytest.raises(FileNotFoundError, match="--resume: there is no"):
        run(tmp_path / "none", *argv, "--resume")
    assert (tmp_path / "row.json").read_text() == before
