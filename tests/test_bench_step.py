"""The benchmark of training steps trains, measures what it says, and refuses a wrong loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import simulated
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dlb_fused import DLBLoss, reference
from dlb_fused.backends import LossArgs, LossOutputs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
ARGUMENTS = ["--quick", "--threads", "1", "--modes"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    import bench_step

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench_step
    torch.set_num_threads(threads)


def tiny(bench: ModuleType, device: str = "cpu") -> list[Any]:
    """8 rows of 5 classes; the model is one layer."""

    def half() -> tuple[Tensor, Tensor]:
        return torch.randn(4, 3, 2, 2), torch.randint(5, (4,))

    def model() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    return [bench.Case("tiny", 8, 5, model, half, bench.sgd)]


def losses_with(bench: ModuleType, make: Callable[..., nn.Module]) -> dict[str, Any]:
    return {**bench.LOSSES, bench.FUSED: make}


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    (path,) = folder.glob("step-*.json")
    return {result["loss"]: result for result in json.loads(path.read_text())["results"]}


def training(bench: ModuleType, name: str, mode: str = "eager") -> Any:
    return bench.Training(tiny(bench)[0], bench.LOSSES[name], bench.MODES[mode], bench.Rehearsal())


# ---- the models and the steps ----


def test_resnet20_is_that_of_the_paper(bench: ModuleType) -> None:
    """0.27 million parameters for 10 classes; 20 layers with weights."""
    model = bench.make_resnet(10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_decoder_does_not_look_ahead(bench: ModuleType) -> None:
    model = bench.Decoder(50, 6, width=64)
    tokens = torch.randint(50, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50
    one, two = (model(x).view(2, 6, 50) for x in (tokens, changed))
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])
    inputs, labels = bench.sentences(3, 6, 50)
    assert torch.equal(inputs[:, 1:].flatten(), labels.view(3, 6)[:, :-1].flatten())


def test_a_step_is_a_step(bench: ModuleType) -> None:
    """The weights change, and each batch begins with the samples that ended the last one."""
    it = training(bench, bench.FUSED)
    seen, weights = [it.inputs.clone()], [it.model[1].weight.clone()]
    it.train()
    for _ in range(9):
        it.step()
        seen.append(it.inputs.clone())
        weights.append(it.model[1].weight.clone())
    for before, after in pairwise(seen):
        assert torch.equal(before[4:], after[:4]) and not torch.equal(before[:4], after[4:])
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert it.loss.stats() == (40, 0, 0)


@pytest.mark.parametrize("mode", ["eager", "autocast"])
def test_naive_and_fused_train_alike(bench: ModuleType, mode: str) -> None:
    names = bench.NAIVE, bench.FUSED, bench.CE
    naive, fused, ce = (training(bench, name, mode) for name in names)
    for it in (naive, fused, ce):
        it.train()
        for _ in range(6):
            it.step()
            it.alone_with_next_labels(torch.randn(8, 5, requires_grad=True))  # changes nothing
    weights = [it.model[1].weight.detach() for it in (naive, fused, ce)]
    tolerance = 1e-5 if mode == "eager" else 2e-2
    assert bench.relative_error([weights[1]], [weights[0]]) < tolerance
    assert bench.relative_error([weights[2]], [weights[0]]) > 2 * tolerance
    assert fused.loss.stats().mismatched == 0


# ---- what it says ----


def test_the_share_of_the_loss(bench: ModuleType) -> None:
    """Differences and ratios are taken within rounds: a slow one does not count."""
    results = {name: bench.Result("c", "eager", name, 8, 5) for name in (bench.FUSED, bench.NONE)}
    seconds = {
        ("step", bench.FUSED): [0.010, 0.100, 0.010],
        ("step", bench.NONE): [0.008, 0.080, 0.008],
        ("alone", bench.FUSED): [0.001, 0.001, 0.003],
    }
    bench.enter(seconds, results)
    fused, none = results[bench.FUSED], results[bench.NONE]
    assert (fused.step_ms, none.step_ms) == (pytest.approx(10), pytest.approx(8))
    assert (fused.loss_ms, fused.share) == (pytest.approx(2), pytest.approx(0.2))
    assert fused.share_q10_q90 == (pytest.approx(0.2), pytest.approx(0.2))
    assert (fused.alone_ms, fused.alone_share) == (pytest.approx(1), pytest.approx(0.1))
    assert none.share is None and none.rounds == 3


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `make gpu` calls it in a rehearsal."""
    monkeypatch.syspath_prepend(FOLDER)
    import gpu_parts

    part = gpu_parts.Part("step", ("step",), "", 300, gpu_parts.step)
    found = gpu_parts.step(gpu_parts.Context(True, tmp_path), part, 300)
    assert found["results"] == 4 * 2 and found["modes"] == "eager,autocast,graphs"
    path = tmp_path / found["file"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(path.read_text())
    assert data["absent"] == {"graphs": "CUDA graphs need a GPU"}
    assert {"cpu", "cores", "threads"} <= set(data["machine"])
    assert data["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "dirty", "settings"} <= set(data)
    for result in data["results"]:
        assert result["status"] == "ok", result
        assert result["memory_mb"] > 50 and result["rounds"] >= 2
        assert result["step_ms_q10_q90"][0] <= result["step_ms"] <= result["step_ms_q10_q90"][1]
        if result["loss"] != "no loss":
            assert 0 < result["alone_share"] < 0.2 and result["share"] is not None
        if result["loss"] in ("DLBLoss", "no loss"):
            assert result["gradient_error"] < (1e-5 if result["mode"] == "eager" else 3e-2)


def test_one_graph(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and loss together, without a break and compiled once; here without Inductor."""
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    out = ["--out", str(tmp_path)]
    assert bench.main([*ARGUMENTS, "compiled", *out], partial(tiny, bench)) == 0
    assert graphs.frame_count == 4  # one for each loss
    assert {r["status"] for r in results_in(tmp_path).values()} == {"ok"}


def test_graphs_rehearsed(bench: ModuleType) -> None:
    """What would be captured, run without a graph: static tensors, the cache decided on the
    device, by the CUDA source in its simulator."""
    losses = losses_with(bench, lambda captured: DLBLoss(capturable=captured, backend="cuda"))
    settings = bench.Settings(["tiny"], ["graphs"], "cpu", 1, True)
    with simulated.backend() as watched:
        results = bench.measure(tiny(bench)[0], "graphs", losses, settings, bench.Rehearsal())
        assert watched.calls
    assert [r.status for r in results] == ["ok"] * 4, results
    assert all(r.step_ms > 0 and r.memory_mb is None for r in results)
    assert results[1].gradient_error < 1e-4


def test_a_graph_that_replays_something_else_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = losses_with(bench, lambda captured: DLBLoss(backend="eager"))

    def capture(self: Any, step: Callable[[], Any]) -> Callable[[], Any]:
        training = step.__self__  # type: ignore[attr-defined]
        if isinstance(training.loss, DLBLoss):
            training.loss.alpha = 0.0
        return step

    monkeypatch.setattr(bench.Rehearsal, "capture", capture)
    settings = bench.Settings(["tiny"], ["graphs"], "cpu", 1, True)
    results = bench.measure(tiny(bench)[0], "graphs", losses, settings, bench.Rehearsal())
    assert [r.status for r in results] == ["ok", "WRONG", "ok", "ok"]
    assert "allowed 1e-02" in results[1].reason and results[1].step_ms is None


@pytest.mark.parametrize("name", ["naive DLB", "cross_entropy"])
def test_a_failure_shows_its_reason(
    bench: ModuleType, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the naive loss there is nothing to compare with; else the others go on."""

    class Broken(nn.Module):
        calls = 0

        def forward(self, logits: Tensor, labels: Tensor, commit: bool = True) -> Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no compiler here")
            return logits.sum()

    losses = {**bench.LOSSES, name: lambda captured: Broken()}
    out = ["--out", str(tmp_path)]
    assert bench.main([*ARGUMENTS, "eager", *out], partial(tiny, bench), losses) == 1
    assert f"failed: {name}, tiny, eager: RuntimeError: no compiler" in capsys.readouterr().out
    timed = {key for key, result in results_in(tmp_path).items() if result["step_ms"]}
    assert timed == (set() if name == bench.NAIVE else {bench.NAIVE, bench.FUSED, bench.NONE})


# ---- what it refuses ----


class Plant:
    """A kernel that is wrong in one way, in the place of the backend "eager"."""

    def __init__(self, fault: str) -> None:
        self.fault, self.right, self.calls = fault, reference.forward, 0

    def forward(self, args: LossArgs) -> LossOutputs:
        self.calls += 1
        out = self.right(args)
        if self.fault == "loss":
            return out._replace(loss=out.loss * 1.001)
        factor = float("nan") if self.fault == "NaN" else 1.001
        return out._replace(dlogits=None if out.dlogits is None else out.dlogits * factor)


@pytest.mark.parametrize("fault", ["gradient", "loss", "NaN"])
def test_a_wrong_kernel_is_refused(
    bench: ModuleType,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = losses_with(bench, lambda captured: DLBLoss(backend="eager"))
    out = ["--out", str(tmp_path)]
    assert bench.main([*ARGUMENTS, "eager", *out], partial(tiny, bench), losses) == 0
    plant = Plant(fault)
    monkeypatch.setattr(reference, "forward", plant.forward)
    assert bench.main([*ARGUMENTS, "eager", *out], partial(tiny, bench), losses) == 1
    assert plant.calls > 0
    results = results_in(tmp_path)
    wrong = results.pop(bench.FUSED)
    assert wrong["status"] == "WRONG" and wrong["step_ms"] is wrong["share"] is None
    assert "WRONG: DLBLoss, tiny, eager: relative error" in capsys.readouterr().out
    assert all(r["status"] == "ok" and r["step_ms"] for r in results.values())


def test_a_broken_chain_is_refused(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the first gradients were right: without their teacher steps would be cheaper."""
    right = bench.Training.next_batch

    def two_on(self: Any) -> Any:
        self.batch += 1
        return right(self)

    monkeypatch.setattr(bench.Training, "next_batch", two_on)
    out = ["--out", str(tmp_path)]
    with pytest.warns(RuntimeWarning, match="do not continue the last batch"):
        assert bench.main([*ARGUMENTS, "eager", *out], partial(tiny, bench)) == 1
    assert results_in(tmp_path)[bench.FUSED]["step_ms"] is None
    assert "WRONG: DLBLoss, tiny, eager: the chain of batches broke" in capsys.readouterr().out


def test_a_wrong_given_gradient_is_refused(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bench.Training.gradient_of_logits
    monkeypatch.setattr(bench.Training, "gradient_of_logits", lambda self: 2 * right(self))
    out = ["--out", str(tmp_path)]
    assert bench.main([*ARGUMENTS, "eager", *out], partial(tiny, bench)) == 1
    results = results_in(tmp_path)
    assert results[bench.NONE]["status"] == "WRONG"
    assert results[bench.FUSED]["step_ms"] and results[bench.FUSED]["share"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "eager,fast"], "'eager,fast': choose from eager, autocast, compiled, graphs"),
        (["--cases", "vgg"], "'vgg': choose from resnet20, decoder"),
    ],
)
def test_bad_arguments(
    bench: ModuleType, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err
