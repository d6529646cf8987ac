"""torch.compile, export and opcheck: one graph, no break, the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, Inputs, fp64_truth, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dlb_fused import DLBLoss, dlb_loss
from dlb_fused.autograd import _settings_of
from dlb_fused.backends import LossArgs


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def loss_of(backend: str, **options: Any) -> Any:
    def f(logits: Tensor, labels: Tensor, last_logits: Tensor) -> Tensor:
        loss = dlb_loss(logits * 1.5, labels, last_logits, backend=backend, **options)
        return loss * 2  # type: ignore[operator, return-value]

    return f


def compare(f: Any, compiled: Any, x: Inputs) -> None:
    want = f(x.logits, x.labels, x.last_logits)
    (want_gradient,) = torch.autograd.grad(want, x.logits)
    got = compiled(x.logits, x.labels, x.last_logits)
    (gradient,) = torch.autograd.grad(got, x.logits)
    torch.testing.assert_close(got, want)
    assert relative_error(gradient, want_gradient.double()) < 1e-6


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_fullgraph(engine: str, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    f = loss_of(backend, temperature=2.0, label_smoothing=0.1, weight=torch.rand(10, device=device))
    compiled = torch.compile(f, fullgraph=True, backend=engine)
    compare(f, compiled, Case("").make(device))


def test_two_labels_do_not_recompile(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device

    def f(z: Tensor, y: Tensor, p: Tensor, b: Tensor, lam: Tensor) -> Tensor:
        return dlb_loss(z, y, p, labels_b=b, lam=lam, distill_ignored=True, backend=backend)  # type: ignore[return-value]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for seed in range(3):
        x = Case("", lam=0.3, ignored=1, seed=seed).make(device)
        b = x.options["labels_b"]
        lam = torch.rand((), device=device)
        want, got = (g(x.logits, x.labels, x.last_logits, b, lam) for g in (f, compiled))
        torch.testing.assert_close(got, want)
        (want_gradient,) = torch.autograd.grad(want * 2, x.logits)
        (gradient,) = torch.autograd.grad(got * 2, x.logits)
        assert relative_error(gradient, want_gradient.double()) < 1e-6
    assert counter.frame_count == 1


def test_a_bad_lam_tensor_is_found_at_run_time() -> None:
    f = torch.compile(loss_of("auto", labels_b=torch.zeros(8, dtype=torch.int64),
                              lam=torch.tensor(1.5)), backend="aot_eager")  # fmt: skip
    x = Case("").make()
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1.5"):
        f(x.logits, x.labels, x.last_logits)


def test_dynamic_shapes_compile_once(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    f = loss_of(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    compare(f, compiled, Case("").make(device))
    graphs = counter.frame_count
    for B, m, C in ((12, 5, 33), (9, 3, 100)):
        compare(f, compiled, Case("", B=B, m=m, C=C).make(device))
    assert counter.frame_count == graphs


def test_temperature_tensor_does_not_recompile(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device

    def f(z: Tensor, y: Tensor, p: Tensor, tau: Tensor) -> Tensor:
        return dlb_loss(z, y, p, temperature=tau, backend=backend)  # type: ignore[return-value]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x = Case("").make(device)
    for tau in (1.0, 2.0, 3.5):
        value = torch.tensor(tau, device=device)
        got = compiled(x.logits, x.labels, x.last_logits, value)
        torch.testing.assert_close(got, f(x.logits, x.labels, x.last_logits, value))
    assert counter.frame_count == 1


def test_no_grad_and_half_precision(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    f = loss_of(backend)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x = Case("", dtype=torch.bfloat16).make(device)
    compare(f, compiled, x)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x.logits, x.labels, x.last_logits), f(x.logits, x.labels, x.last_logits)
        )


@pytest.mark.parametrize("how", [{"backend": "aot_eager"}, {"mode": "reduce-overhead"}], ids=str)
def test_training_step_with_the_module(
    how: dict[str, str], backend_device: tuple[str, str]
) -> None:
    """Model and criterion in one compiled step; the cache goes from call to call, also where the
    mode asks for CUDA graphs (which a CPU has none of)."""
    backend, device = backend_device
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=g), torch.randint(0, 5, (20,), generator=g)
    batches = [range(4), *(range(4 * k, 4 * k + 8) for k in range(4))]

    def run(compile_it: bool) -> tuple[list[float], tuple[int, ...]]:
        torch.manual_seed(0)
        model, criterion = nn.Linear(6, 5).to(device), DLBLoss(backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = criterion(model(x), y)
            return loss  # type: ignore[no-any-return]

        f: Any = torch.compile(step, fullgraph=True, **how) if compile_it else step
        losses = []
        for rows in batches:
            loss = f(x[list(rows)].to(device), y[list(rows)].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, criterion.stats()

    got, want = run(True), run(False)
    assert got[0] == pytest.approx(want[0], rel=1e-5) and got[1] == want[1] == (16, 0, 0)


def test_parts_are_detached_and_the_criterion_can_be_copied() -> None:
    criterion = DLBLoss()
    step = torch.compile(lambda z, y: criterion(z, y), fullgraph=True, backend="aot_eager")
    z, y = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    step(z, y).backward()
    assert not any(part.requires_grad for part in criterion.parts)
    copy.deepcopy(criterion)
    copy.deepcopy(criterion.state_dict())


def test_a_bad_temperature_tensor_is_found_at_run_time() -> None:
    f = torch.compile(loss_of("auto", temperature=torch.tensor(-3.0)), backend="aot_eager")
    x = Case("").make()
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0, got -3.0"):
        f(x.logits, x.labels, x.last_logits)


def test_a_view_as_teacher_is_refused() -> None:
    criterion = DLBLoss(keep="view")
    step = torch.compile(lambda z, y: criterion(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="keep='view' cannot be used under torch"):
        step(torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64))


def test_export_keeps_the_loss_as_one_node(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device

    class Loss(nn.Module):
        def forward(self, z: Tensor, y: Tensor, p: Tensor) -> Tensor:
            return dlb_loss(z, y, p, backend=backend)  # type: ignore[return-value]

    x = Case("").make(device)
    given = (x.logits.detach(), x.labels, x.last_logits)
    program = torch.export.export(Loss(), given)
    assert any("dlb_fused.loss" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given), dlb_loss(*given, backend=backend))


def test_a_training_criterion_is_not_exported() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = nn.Linear(4, 3), DLBLoss()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.criterion(self.net(x), y)  # type: ignore[no-any-return]

    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(Exception, match="DLBLoss in training mode cannot be exported"):
        torch.export.export(Step(), (x, y))
    torch.export.export(Step().eval(), (x, y))


def test_inplace_is_refused() -> None:
    f = torch.compile(loss_of("auto", inplace=True), fullgraph=True, backend="aot_eager")
    x = Case("").make()
    with pytest.raises(Exception, match="inplace=True cannot be used under"):
        f(x.logits, x.labels, x.last_logits)


@pytest.mark.parametrize("kind", ["plain", "module", "all", "two labels"])
def test_opcheck(kind: str, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", B=8, C=7, m=4).make(device)
    args = LossArgs(x.logits, x.labels, x.last_logits, 4)
    if kind == "module":
        valid = torch.ones(4, dtype=torch.uint8, device=device)
        args = args._replace(last_labels=x.labels[:4].clone(), last_valid=valid, fresh=4)
    if kind == "all":
        one = torch.ones((), device=device)
        args = args._replace(
            teacher_rows=torch.tensor([1, 0, -1, 3], device=device),
            weight=torch.rand(7, device=device),
            label_smoothing=0.1,
            temperature=torch.full((4,), 2.0, device=device),
            alpha=one,
            ce_count=one * 8,
            kl_count=one * 4,
        )
    if kind == "two labels":
        args = args._replace(
            labels_b=x.labels.flip(0), lam=torch.rand(8, device=device), distill_ignored=True
        )
    torch.library.opcheck(torch.ops.dlb_fused.loss.default, (*_settings_of(args), backend))
    parts = torch.tensor([0.0, 0.0, 8.0, 4.0], device=device)
    detached = args._replace(logits=x.logits.detach())
    torch.library.opcheck(
        torch.ops.dlb_fused.loss_gradient.default,
        (parts[0] + 2, parts, *_settings_of(detached), backend),
    )


def test_compiled_gradient_against_the_truth(backend_device: tuple[str, str]) -> None:
    """The compiled backward computes the gradient with the dloss that came, also in fp16."""
    backend, device = backend_device

    def f(z: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return dlb_loss(z, y, p, backend=backend)  # type: ignore[return-value]

    x = Case("", B=4, C=2000, m=2, dtype=torch.float16).make(device)
    loss = torch.compile(f, fullgraph=True, backend="aot_eager")(x.logits, x.labels, x.last_logits)
    (gradient,) = torch.autograd.grad(loss, x.logits, torch.full_like(loss, 65536.0))
    assert relative_error(gradient, fp64_truth(x, 65536.0)[1]) < 3e-4
