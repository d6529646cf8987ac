"""temperature and alpha that change: callables of the step, and 0-dim tensors."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from test_criterion import chain
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dlb_fused import DLBLoss, dlb_loss
from dlb_fused.reference import dlb_loss_naive


def test_callables_of_the_step() -> None:
    """Numbers and tensors; teacher and student take today's temperature."""
    asked: list[int] = []

    def temperature(step: int) -> float:
        asked.append(step)
        return 1.0 + step

    criterion = DLBLoss(temperature, lambda step: torch.tensor(0.1 * step))
    batches = chain(4, 4)
    for step, (z, y, _) in enumerate(batches):
        loss = criterion(z, y)
        if step:
            last = batches[step - 1][0].detach()[-4:]
            want = dlb_loss_naive(z, y, last, temperature=1.0 + step, alpha=0.1 * step)
            torch.testing.assert_close(loss, want)
    assert asked == [0, 1, 2, 3]


def test_the_step_is_that_of_the_optimizer() -> None:
    """Not that of micro-batches, of validation, nor of calls that were never committed."""
    asked: list[int] = []

    def alpha(step: int) -> float:
        asked.append(step)
        return 1.0

    z, y, _ = chain(4, 1)[0]
    accumulated = DLBLoss(alpha=alpha, lag=3)
    for _ in range(7):
        accumulated(z, y)
    assert asked == [0, 0, 0, 1, 1, 1, 2]

    asked.clear()
    two_pass = DLBLoss(alpha=alpha)
    for k in range(4):
        two_pass(z, y, commit=False)
        two_pass(z, y, commit=False)
        if k != 1:  # that step is skipped
            two_pass.commit()
            two_pass.commit()  # has nothing to do
        with torch.no_grad():
            two_pass(z, y)
    assert asked == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3]


def test_the_step_travels_in_the_state_and_outlives_a_reset() -> None:
    asked: list[int] = []

    def alpha(step: int) -> float:
        asked.append(step)
        return 1.0

    z, y, _ = chain(4, 1)[0]
    criterion = DLBLoss(alpha=alpha)
    for _ in range(5):
        criterion(z, y)
    criterion.reset()
    criterion(z, y)
    other = DLBLoss(alpha=alpha)
    other.load_state_dict(criterion.state_dict())
    other(z, y)
    assert asked[-2:] == [5, 6]
    with pytest.warns(RuntimeWarning, match="it was written with lag=1, this is lag=2"):
        accumulated = DLBLoss(alpha=alpha, lag=2)
        accumulated.load_state_dict(criterion.state_dict())
    accumulated(z, y)
    assert asked[-1] == 6


def test_a_state_of_format_1_still_loads() -> None:
    criterion = DLBLoss(alpha=lambda step: float(step))
    batches = chain(4, 2)
    criterion(*batches[0])
    old = copy.deepcopy(criterion.get_extra_state())
    del old["calls"]
    old["format"] = 1
    loaded = DLBLoss(alpha=lambda step: 1.0 + step)
    loaded.set_extra_state(old)
    assert torch.equal(loaded(*batches[1]), criterion(*batches[1]))
    assert loaded.parts.kl > 0


@pytest.mark.parametrize("name", ["temperature", "alpha"])
def test_what_a_callable_returns_is_checked(name: str) -> None:
    z, y, _ = chain(4, 1)[0]
    bad: Any = {"temperature": -1.0, "alpha": -1.0}[name]
    for value, error in ((bad, ValueError), ("3", TypeError)):
        with pytest.raises(error, match=f"{name} must be "):
            DLBLoss(**{name: lambda step, value=value: value})(z, y)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["function", "module", "in place"])
def test_a_callable_is_not_frozen_by_compilation(what: str) -> None:
    """The loss is left out of the graph, or, where that may not break, refused."""
    torch.compiler.reset()
    steps: list[int] = []

    def alpha(step: int) -> float:
        steps.append(step)
        return 0.25 * step

    criterion, eager = DLBLoss(alpha=alpha), DLBLoss(alpha=lambda step: 0.25 * step)
    step: Any = {
        "function": lambda: torch.compile(lambda z, y: 1 * criterion(z, y), backend="aot_eager"),
        "module": lambda: torch.compile(criterion, backend="aot_eager"),
        "in place": lambda: criterion.compile(backend="aot_eager") or criterion,
    }[what]()
    for z, y, _ in chain(4, 12):
        torch.testing.assert_close(step(z, y), eager(z, y), rtol=0, atol=0)
    assert steps == list(range(12)) and criterion.get_extra_state()["calls"] == 12
    assert criterion.parts.kl > 0

    fullgraph = torch.compile(lambda z, y: criterion(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=re.escape("torch.compiler.disable(self.forward)")):
        fullgraph(z, y)


def test_a_callable_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match=re.escape("a 0-dim tensor and fill_ it")):
        DLBLoss(alpha=lambda step: 1.0, capturable=True)


def test_a_tensor_that_is_filled_neither_recompiles_nor_breaks_the_graph(
    backend_device: tuple[str, str],
) -> None:
    backend, device = backend_device
    torch.compiler.reset()
    tau, alpha = torch.ones((), device=device), torch.ones((), device=device)
    criterion = DLBLoss(tau, alpha, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")

    def step(z: Tensor, y: Tensor) -> Tensor:
        return criterion(z, y)  # type: ignore[no-any-return]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    batches = chain(4, 8, device=device)
    graphs = []
    for k, (z, y, _) in enumerate(batches):
        tau.fill_(1.0 + k)
        alpha.fill_(0.1 * k)
        loss = compiled(z, y)
        loss.backward()
        graphs.append(counter.frame_count)
        if k:
            last = batches[k - 1][0].detach()[-4:]
            want = dlb_loss(z, y, last, temperature=1.0 + k, alpha=0.1 * k, backend=backend)
            torch.testing.assert_close(loss, want)
    assert len(set(graphs[2:])) == 1  # the chain's first batches have other shapes
