"""The public face: messages for bad input, autograd's corner cases, autocast, options."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, fp64_truth, relative_error
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import dlb_fused.loss as loss_module
from dlb_fused import DLBLoss, backends, checks, dlb_loss, native
from dlb_fused.autograd import compute
from dlb_fused.backends import LossArgs
from dlb_fused.checks import check_options, plain_args

with FakeTensorMode():
    FAKE = torch.zeros(4, dtype=torch.int64)
Z, Y, P = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.randn(2, 3)

BAD = {
    "logits of rank 1": (dict(logits=Z[0]), ValueError, "logits must have shape (B, C) with C > 0, got (3,)"),
    "logits of rank 3": (dict(logits=Z[None]), ValueError, "logits must have shape (B, C)"),
    "no class": (dict(logits=Z[:, :0]), ValueError, "logits must have shape (B, C) with C > 0, got (4, 0)"),
    "integer logits": (dict(logits=Z.long()), TypeError, "logits must be float32, bfloat16, float16 or float64, got int64"),
    "a list": (dict(logits=[[1.0]]), TypeError, "logits must be a tensor, got list"),
    "labels as a list": (dict(labels=[0, 1]), TypeError, "labels must be a tensor, got list"),
    "labels of float": (dict(labels=Y.float()), TypeError, "labels must be int64 class indices, got float32"),
    "labels of int32": (dict(labels=Y.int()), TypeError, "labels must be int64 class indices, got int32; call labels.long()"),
    "too few labels": (dict(labels=Y[:3]), ValueError, "labels must have shape (4,), one for each row of logits, got (3,)"),
    "labels on another device": (dict(labels=Y.to("meta")), ValueError, "labels must be on cpu like logits, got meta"),
    "label too large": (dict(labels=Y + 1), IndexError, "labels[2] is 3, but logits have 3 classes (valid: 0 to 2, or ignore_index=-100)"),
    "label negative": (dict(labels=Y - 1), IndexError, "labels[0] is -1, but logits have 3 classes"),
    "1-D third argument": (dict(last_logits=torch.ones(3)), ValueError, "last_logits must have shape (m, C), got (3,); did you mean weight=?"),
    "m above B": (dict(last_logits=torch.randn(5, 3)), ValueError, "last_logits has 5 rows, more than the 4 rows of logits"),
    "C mismatch": (dict(last_logits=torch.randn(2, 4)), ValueError, "last_logits must have the 3 classes of logits, got 4"),
    "last_logits of int": (dict(last_logits=P.long()), TypeError, "last_logits must be float32, bfloat16, float16 or float64, got int64"),
    "last_logits of fp64": (dict(last_logits=P.double()), TypeError, "last_logits and logits must both be float64 or neither, got float64 and float32"),
    "last_logits that learn": (dict(last_logits=P.clone().requires_grad_()), ValueError, "last_logits requires grad, but no gradient flows to it: pass it detached"),
    "last_logits elsewhere": (dict(last_logits=P.to("meta")), ValueError, "last_logits must be on cpu like logits, got meta"),
    "temperature 0": (dict(temperature=0.0), ValueError, "temperature must be finite and > 0, got 0.0"),
    "temperature negative": (dict(temperature=-1), ValueError, "temperature must be finite and > 0, got -1"),
    "temperature inf": (dict(temperature=float("inf")), ValueError, "temperature must be finite and > 0, got inf"),
    "temperature nan": (dict(temperature=float("nan")), ValueError, "temperature must be finite and > 0, got nan"),
    "temperature text": (dict(temperature="3"), TypeError, "temperature must be a float or a tensor, got str"),
    "temperature tensor of 0": (dict(temperature=torch.tensor([1.0, 0.0])), ValueError, "temperature must be finite and > 0, got 0.0"),
    "temperature of 3 rows": (dict(temperature=torch.ones(3)), ValueError, "tensor of shape (2,), one for each overlap row; got shape (3,); did you mean weight=?"),
    "temperature learnable": (dict(temperature=torch.tensor(3.0, requires_grad=True)), ValueError, "temperature requires grad, but it cannot be learned"),
    "temperature of int": (dict(temperature=torch.tensor(3)), TypeError, "temperature must be floating point, got int64"),
    "alpha negative": (dict(alpha=-0.5), ValueError, "alpha must be finite and >= 0, got -0.5"),
    "alpha nan": (dict(alpha=float("nan")), ValueError, "alpha must be finite and >= 0, got nan"),
    "alpha learnable": (dict(alpha=torch.ones(2, requires_grad=True)), ValueError, "alpha requires grad, but it cannot be learned"),
    "weight too long": (dict(weight=torch.ones(4)), ValueError, "weight must have shape (3,), one for each class, got (4,)"),
    "weight learnable": (dict(weight=torch.ones(3, requires_grad=True)), ValueError, "weight requires grad, but it cannot be learned"),
    "weight of int": (dict(weight=torch.ones(3).long()), TypeError, "weight must be floating point, got int64"),
    "weight below 0": (dict(weight=torch.tensor([1.0, -3.0, 1.0])), ValueError, "weight must be finite and >= 0, got -3.0"),
    "weight of inf": (dict(weight=torch.full((3,), torch.inf)), ValueError, "weight must be finite and >= 0, got inf"),
    "ignore_index of 71 bits": (dict(ignore_index=2**70), ValueError, "ignore_index must fit into int64, got 1180591620717411303424"),
    "temperature too small for its type": (dict(temperature=torch.tensor(1e-300, dtype=torch.float64)), ValueError, "temperature must be finite and > 0, got 0.0"),
    "zeros without memory": (dict(logits=torch._efficientzerotensor((4, 3))), ValueError, "a tensor without memory"),
    "weight as a list": (dict(weight=[1.0]), TypeError, "weight must be a tensor, got list"),
    "smoothing above 1": (dict(label_smoothing=1.5), ValueError, "label_smoothing must be in [0, 1], got 1.5"),
    "smoothing text": (dict(label_smoothing="a"), TypeError, "label_smoothing must be a float, got str"),
    "ignore_index float": (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float"),
    "normalizer one": (dict(normalizer=3.0), TypeError, "normalizer must be a pair (ce_count, kl_count), got float"),
    "normalizer global": (dict(normalizer="global"), TypeError, "got 'global'; only DLBLoss takes 'global'"),
    "normalizer rank": (dict(normalizer=(torch.ones(2), 1)), ValueError, "ce_count of normalizer must be a 0-dim tensor, got shape (2,)"),
    "normalizer negative": (dict(normalizer=(-1.0, 1.0)), ValueError, "ce_count of normalizer must be finite and >= 0, got -1.0"),
    "normalizer text": (dict(normalizer=(1.0, "a")), ValueError, "kl_count of normalizer must be finite and >= 0, got 'a'"),
    "normalizer learnable": (dict(normalizer=(torch.tensor(1.0, requires_grad=True), 1)), ValueError, "ce_count of normalizer requires grad"),
    "a FakeTensor": (dict(labels=FAKE), TypeError, "labels must be a plain tensor, got FakeTensor"),
    "grad_scale rank": (dict(grad_scale=torch.ones(2)), ValueError, "grad_scale must be a float or a 0-dim tensor, got shape (2,)"),
    "grad_scale inf": (dict(grad_scale=float("inf")), ValueError, "grad_scale must be finite, got inf"),
    "labels_b without lam": (dict(labels_b=Y), TypeError, "labels_b was given without lam: the target of a row is lam of its class in labels and 1 - lam of its class in labels_b"),
    "lam without labels_b": (dict(lam=0.5), TypeError, "lam was given without labels_b"),
    "labels_b as a list": (dict(labels_b=[0], lam=0.5), TypeError, "labels_b must be a tensor, got list"),
    "labels_b of float": (dict(labels_b=Y.float(), lam=0.5), TypeError, "labels_b must be int64 class indices, got float32"),
    "labels_b too short": (dict(labels_b=Y[:2], lam=0.5), ValueError, "labels_b must have shape (4,) like labels, got (2,)"),
    "labels_b elsewhere": (dict(labels_b=Y.to("meta"), lam=0.5), ValueError, "labels_b must be on cpu like logits, got meta"),
    "lam above 1": (dict(labels_b=Y, lam=1.5), ValueError, "lam must be in [0, 1], got 1.5"),
    "lam nan": (dict(labels_b=Y, lam=float("nan")), ValueError, "lam must be in [0, 1], got nan"),
    "lam negative in a tensor": (dict(labels_b=Y, lam=torch.tensor([0.5, -0.5, 1.0, 0.0])), ValueError, "lam must be in [0, 1], got -0.5"),
    "lam of the overlap": (dict(labels_b=Y, lam=torch.ones(2)), ValueError, "lam must be a float, a 0-dim tensor, or a tensor of shape (4,), one for each row of logits; got shape (2,)"),
    "lam learnable": (dict(labels_b=Y, lam=torch.tensor(0.5, requires_grad=True)), ValueError, "lam requires grad, but it cannot be learned: pass it detached"),
    "lam of int": (dict(labels_b=Y, lam=torch.tensor(1)), TypeError, "lam must be floating point, got int64"),
    "lam text": (dict(labels_b=Y, lam="a"), TypeError, "lam must be a float or a tensor, got str"),
    "distill_ignored text": (dict(distill_ignored="yes"), TypeError, "distill_ignored must be a bool, got str"),
    "unknown backend": (dict(backend="cudnn"), ValueError, "backend must be one of ('auto', 'cpu', 'cuda', 'triton', 'eager'), got 'cudnn'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    given: dict[str, Any] = {"logits": Z, "labels": Y, "last_logits": P, **change}
    kept = {k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=re.escape(message)):
        dlb_loss(**given)
    for key, value in kept.items():
        if type(value) is torch.Tensor and value.device.type == "cpu":
            assert torch.equal(given[key].detach(), value)


def test_a_named_backend_runs_or_says_why_not() -> None:
    for name in backends.BACKENDS:
        reason = backends.why_not(name, Z)
        if reason is None:
            continue
        with pytest.raises(RuntimeError, match=re.escape(f"backend={name!r} cannot run: {reason}")):
            dlb_loss(Z, Y, P, backend=name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda z: z, "inplace=True would overwrite a leaf that requires grad"),
        (lambda z: z[:4], "inplace=True would overwrite a leaf that requires grad"),
        (
            lambda z: (z * 1).t().contiguous().t(),
            "inplace=True needs logits whose last stride is 1",
        ),
        (lambda z: (z[:1] * 1).expand(4, 3), "inplace=True needs logits whose rows do not share"),
    ],
)
def test_inplace_is_refused_where_it_would_break(make: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dlb_loss(make(Z.clone().requires_grad_()), Y, P, inplace=True)


@pytest.mark.parametrize("scale", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_inplace_refuses_a_scale_of_0(scale: Any) -> None:
    logits = Z.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match="grad_scale=0 leaves no gradient"):
        dlb_loss(logits, Y, P, inplace=True, grad_scale=scale)


def test_inplace_does_not_overwrite_the_teacher() -> None:
    logits = Z.clone().requires_grad_() * 1
    with pytest.raises(RuntimeError, match="would overwrite last_logits, which share their memory"):
        dlb_loss(logits, Y, logits.detach()[1:3], inplace=True)


def test_inplace_makes_a_later_read_an_error() -> None:
    z = Z.clone().requires_grad_()
    logits = z.exp()  # its backward reads its output
    dlb_loss(logits, Y, P, inplace=True).backward  # noqa: B018
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_inplace_allows_one_backward() -> None:
    loss = dlb_loss(Z.clone().requires_grad_() * 1, Y, P, inplace=True)
    loss.backward(retain_graph=True)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"inplace=True\) allows one backward"):
        loss.backward()  # type: ignore[union-attr]


def test_inplace_needs_a_scale() -> None:
    with pytest.raises(ValueError, match="grad_scale=0 leaves no gradient"):
        dlb_loss(Z.clone().requires_grad_() * 1, Y, P, inplace=True, grad_scale=0.0)


def test_inplace_without_gradient_writes_nothing() -> None:
    logits = Z.clone()
    dlb_loss(logits, Y, P, inplace=True)
    assert torch.equal(logits, Z)


def test_double_backward_is_refused_in_words(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("").make(device)
    loss = dlb_loss(x.logits, x.labels, x.last_logits, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x.logits, create_graph=True)  # type: ignore[arg-type]
    assert relative_error(gradient.detach(), fp64_truth(x)[1]) < 1e-6
    with pytest.raises(RuntimeError, match="dlb_loss cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_logits_changed_before_backward_are_found() -> None:
    logits = Z.clone().requires_grad_() * 1
    loss = dlb_loss(logits, Y, P)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["labels", "temperature", "alpha", "weight", "grad_scale", "labels_b", "lam"]
)
def test_settings_changed_before_backward_are_found(name: str) -> None:
    """backward computes the gradient again, and would compute it with other settings."""
    given: dict[str, Any] = {
        "labels": Y.clone(),
        "temperature": torch.tensor(2.0),
        "alpha": torch.tensor(1.0),
        "weight": torch.ones(3),
        "grad_scale": torch.tensor(1.0),
        "labels_b": Y.clone(),
        "lam": torch.tensor(0.3),
    }
    changed = given[name]
    loss = dlb_loss(Z.clone().requires_grad_(), given.pop("labels"), P, **given)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()  # type: ignore[operator]


def test_functional_transforms_are_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="cannot be used inside torch"):
        torch.func.vmap(lambda z: dlb_loss(z, Y, P))(torch.randn(2, 4, 3))


def test_a_trace_is_refused_in_words() -> None:
    for z in (Z, Z.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=re.escape("inside torch.jit.trace")):
            torch.jit.trace(lambda z: dlb_loss(z, Y, P), (z,), check_trace=False)


def test_a_tangent_is_not_lost() -> None:
    with forward_ad.dual_level():
        dlb_loss(Z, Y, P)  # no tangent here
        with pytest.raises(RuntimeError, match="inside forward-mode differentiation"):
            dlb_loss(forward_ad.make_dual(Z, torch.ones_like(Z)), Y, P)


def test_a_count_that_is_nan_shows(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=5).make(device)
    counts = (torch.tensor(8.0, device=device), torch.tensor(torch.nan, device=device))
    loss = dlb_loss(x.logits, x.labels, x.last_logits, normalizer=counts, backend=backend)
    assert loss.isnan()  # type: ignore[union-attr]


def test_auto_warns_once_when_a_gpu_is_left_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlb_fused import triton_backend

    monkeypatch.setattr(triton_backend, "_MISSING", "triton is not installed (for this test)")
    monkeypatch.setattr(backends, "_chosen", {})
    logits: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch operations .*triton is not installed"):
        assert backends.choose("auto", logits).__name__ == "dlb_fused.reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("auto", logits)


def test_fields_follow_one_another() -> None:
    """`LossArgs` is filled by position from `Lesson` and `check_options`."""
    fields = backends.LossArgs._fields
    assert fields[2:7] == loss_module.Lesson._fields[:5]
    options = [name for name in inspect.signature(check_options).parameters][2:]
    options[options.index("normalizer") : options.index("normalizer") + 1] = [
        "ce_count",
        "kl_count",
    ]
    assert list(fields[7:15]) == options


def test_teacher_from_inference_mode(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", m=8).make(device)
    with torch.inference_mode():
        teacher = x.last_logits.clone() * 1
    loss = dlb_loss(x.logits, x.labels, teacher, backend=backend)
    loss.backward(torch.full_like(loss, 2.0))  # type: ignore[union-attr, arg-type]
    assert x.logits.grad is not None
    assert relative_error(x.logits.grad, fp64_truth(x, 2.0)[1]) < 1e-6


def test_autocast(backend_device: tuple[str, str]) -> None:
    """The model's bfloat16 logits are lifted to fp32 inside; autocast itself changes nothing."""
    backend, device = backend_device
    x = Case("", C=100, dtype=torch.bfloat16).make(device)
    with torch.autocast(device, torch.bfloat16):
        loss = dlb_loss(x.logits, x.labels, x.last_logits, backend=backend)
    assert loss.dtype == torch.float32  # type: ignore[union-attr]
    loss.backward()  # type: ignore[union-attr]
    want_loss, want = fp64_truth(x)
    assert abs(loss.item() - want_loss.item()) < 1e-5  # type: ignore[union-attr]
    assert x.logits.grad is not None and relative_error(x.logits.grad, want) < 2e-3


def test_memory_of_the_graph_is_freed_by_backward() -> None:
    """The gradient is handed on, not cloned; nothing keeps the logits alive but the caller."""
    logits = torch.randn(64, 1000, requires_grad=True)
    loss = dlb_loss(logits, torch.zeros(64, dtype=torch.int64))
    address = loss.grad_fn.dlogits.data_ptr()  # type: ignore[union-attr]
    loss.backward()  # type: ignore[union-attr]
    assert logits.grad is not None and logits.grad.data_ptr() == address


def test_main_prints_every_backend() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "dlb_fused"], capture_output=True, text=True, check=True
    ).stdout
    for name in backends.BACKENDS:
        assert re.search(rf"  {name} +(available|no: .+)", out)


def test_the_classes_are_exported() -> None:
    import dlb_fused

    classes = {"DLBLoss", "OverlapBatchSampler", "OverlapMixup", "OverlapCutMix", "TwoViewCarry"}
    assert classes | {"dlb_loss"} <= set(dlb_fused.__all__)
    assert dlb_fused.__version__ and DLBLoss().training


@pytest.mark.skipif(native._kernel is None, reason="dlb_fused._cpu is not built")
class TestPlainCalls:
    """`plain_args` lets the checks be skipped: only where they would pass and convert nothing."""

    logits, last_logits = torch.randn(6, 5), torch.randn(3, 5)
    labels = torch.zeros(6, dtype=torch.int64)

    def args(self, **changed: Any) -> LossArgs | None:
        call = {"logits": self.logits, "labels": self.labels, "last_logits": self.last_logits}
        options = {"ignore_index": -100, "label_smoothing": 0.0, "temperature": 3.0, "alpha": 1.0}
        return plain_args(*{**call, **options, **changed}.values())

    def overlap(self, **changed: Any) -> int:
        args = self.args(**changed)
        return -1 if args is None else args.overlap

    def test_plain(self) -> None:
        assert self.overlap() == 3
        assert self.overlap(last_logits=None) == 0
        assert self.overlap(last_logits=self.last_logits.bfloat16()) == 3
        wide = torch.randn(6, 9)
        assert self.overlap(logits=wide[:, :5].requires_grad_(), last_logits=wide[1:4, 2:7]) == 3

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("logits", [[1.0]]),
            ("logits", torch.nn.Parameter(torch.randn(6, 5))),
            ("logits", torch.randn(5, 6).T),
            ("logits", torch.randn(6)),
            ("logits", torch.randn(6, 0)),
            ("logits", torch.randn(6, 5, dtype=torch.complex64)),
            ("logits", torch.randn(6, 5).double()),
            ("logits", torch.randn(6, 5, device="meta")),
            ("logits", torch.eye(6, 5).to_sparse()),
            ("logits", torch._neg_view(torch.randn(6, 5))),
            ("labels", torch.zeros(6, dtype=torch.int32)),
            ("labels", torch.zeros(5, dtype=torch.int64)),
            ("labels", torch.zeros(6, 1, dtype=torch.int64)),
            ("labels", torch.zeros(12, dtype=torch.int64)[::2]),
            ("labels", None),
            ("last_logits", torch.randn(5)),
            ("last_logits", torch.randn(3, 4)),
            ("last_logits", torch.randn(7, 5)),
            ("last_logits", torch.randn(3, 5).double()),
            ("last_logits", torch.randn(3, 5).int()),
            ("last_logits", torch.randn(3, 5).requires_grad_()),
            ("last_logits", torch.randn(5, 3).T),
            ("last_logits", torch._neg_view(torch.randn(3, 5))),
            ("ignore_index", -100.0),
            ("ignore_index", True),
            ("label_smoothing", 0),
            ("label_smoothing", -0.1),
            ("label_smoothing", 1.1),
            ("temperature", 3),
            ("temperature", 0.0),
            ("temperature", math.inf),
            ("temperature", math.nan),
            ("temperature", np.float64(3.0)),
            ("temperature", torch.tensor(3.0)),
            ("alpha", -1.0),
            ("alpha", math.inf),
            ("alpha", math.nan),
        ],
    )
    def test_not_plain(self, name: str, value: Any) -> None:
        assert self.overlap(**{name: value}) == -1

    def test_not_in_a_transform(self) -> None:
        seen = []
        torch.vmap(lambda z: seen.append(self.overlap(logits=z, last_logits=None)) or z)(
            self.logits[None]
        )
        assert seen == [-1]

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("teacher", [True, False])
    def test_the_arguments_are_those_of_the_checks(
        self, grad: bool, teacher: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[LossArgs] = []

        def compute_and_keep(args: LossArgs, backend: str) -> Any:
            seen.append(args)
            return compute(args, backend)

        monkeypatch.setattr("dlb_fused.loss.compute", compute_and_keep)
        call = (self.logits.clone().requires_grad_(), self.labels)
        options: dict[str, Any] = {"ignore_index": 7, "label_smoothing": 0.2, "temperature": 2.0}
        options["last_logits"] = self.last_logits if teacher else None
        with torch.set_grad_enabled(grad):
            dlb_loss(*call, **options, alpha=0.5)
            monkeypatch.setattr("dlb_fused.loss.plain_args", lambda *_: None)
            dlb_loss(*call, **options, alpha=0.5)
        plain, checked = seen
        assert type(plain) is LossArgs and plain.need_grad is grad
        for name, x, y in zip(LossArgs._fields, plain, checked, strict=True):
            same = x is y or name == "logits" if isinstance(x, torch.Tensor) else x == y
            assert same and type(x) is type(y), name

    def test_nothing_is_kept(self) -> None:
        """The function in C++ counts its references right."""
        seven, tau = int("1000000007"), float("2.5")
        counted = [self.logits, self.labels, self.last_logits, seven, tau, checks._DEFAULTS]
        counted += [None, True, False, *checks._DEFAULTS]

        def counts() -> list[int]:
            return [sys.getrefcount(x) for x in counted]

        for options in ({}, {"temperature": tau, "ignore_index": seven}, {"alpha": -1.0}):
            before = counts()
            for _ in range(1000):
                self.args(**options)
            assert max(abs(x - y) for x, y in zip(before, counts(), strict=True)) < 500


@pytest.mark.skipif(native._kernel is None, reason="dlb_fused._cpu is not built")
@pytest.mark.parametrize(
    ("tensor", "number", "known"),
    [
        (torch.tensor(1.0), 1.0, True),
        (torch.tensor(0.1), 0.1, False),  # as floats they are the same, as numbers not
        (torch.tensor(0.1, dtype=torch.float64), 0.1, True),
        (torch.ones(3)[1], 1.0, True),
        (torch.tensor(2.0), 1.0, False),
        (torch.tensor(math.nan), math.nan, False),
        (torch.tensor(1), 1.0, False),
        (torch.tensor(1.0), 1, False),
        (torch.tensor(1.0), torch.tensor(1.0), False),
        (torch.ones(1), 1.0, False),
        (torch._neg_view(torch.tensor(1.0)), 1.0, False),
        (torch.empty((), device="meta"), 1.0, False),
        (torch.tensor(1.0, dtype=torch.float16), 1.0, False),
        (torch.nn.Parameter(torch.tensor(1.0)), 1.0, False),
    ],
)
def test_is_number(tensor: torch.Tensor, number: Any, known: bool) -> None:
    """True only for what is a plain tensor of the host; False is always safe."""
    assert checks.is_number(tensor, number) is known


def test_a_negative_view_is_resolved(backend_device: tuple[str, str]) -> None:
    """It says -x over the bytes of x, which is what a kernel would read."""
    backend, device = backend_device
    logits, last_logits = torch.randn(6, 5, device=device), torch.randn(3, 5, device=device)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    got = dlb_loss(torch._neg_view(logits), labels, torch._neg_view(last_logits), backend=backend)
    torch.testing.assert_close(got, dlb_loss(-logits, labels, -last_logits, backend=backend))


@pytest.mark.parametrize(
    "name", ["temperature", "alpha", "weight", "lam", "grad_scale", "normalizer"]
)
def test_a_negative_view_among_the_options(name: str, backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=5).make(device)
    # 0.5, kept as -0.5 and a note of its sign
    half = torch.complex(torch.zeros(5), torch.full((5,), -0.5)).to(device).conj().imag
    assert half.is_neg()
    value = {"weight": half, "normalizer": (half[0] * 4, half[0])}.get(name, half[0])
    plain = {"weight": half.clone(), "normalizer": (2.0, 0.5)}.get(name, 0.5)
    more = {"labels_b": x.labels.flip(0)} if name == "lam" else {}

    def gradient(value: Any) -> torch.Tensor:
        loss = dlb_loss(x.logits, x.labels, x.last_logits, backend=backend, **{name: value}, **more)
        return torch.autograd.grad(loss, x.logits, torch.full_like(loss, 0.5))[0]

    torch.testing.assert_close(gradient(value), gradient(plain))


def test_a_negative_view_from_above(backend_device: tuple[str, str]) -> None:
    backend, device = backend_device
    x = Case("", C=5).make(device)
    for flip in (lambda loss: loss, lambda loss: torch.complex(loss * 0, loss).conj().imag):
        x.logits.grad, before = None, x.logits.grad
        flip(dlb_loss(x.logits, x.labels, x.last_logits, backend=backend)).backward()
    torch.testing.assert_close(x.logits.grad, -before)  # type: ignore[operator]


WITHOUT_EXCHANGE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__  # as in torch before 2.10
from dlb_fused import DLBLoss, backends, dlb_loss
from dlb_fused.checks import plain_args

labels, temperature = torch.tensor([1, -100, 4, 2]), torch.tensor([2.0, 3.0])
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    logits, last_logits = torch.randn(4, 9).to(dtype)[:, 2:7], torch.randn(2, 5).to(dtype)
    assert plain_args(logits, labels, last_logits, -100, 0.0, 3.0, 1.0) is None
    loss = {}
    for backend in ("cpu", "eager"):
        options = {"temperature": temperature.to(torch.promote_types(dtype, torch.float32))}
        loss[backend] = dlb_loss(logits, labels, last_logits, backend=backend, **options)
    torch.testing.assert_close(loss["cpu"], loss["eager"])
criterion = DLBLoss(backend="cpu")
criterion(torch.randn(2, 5, requires_grad=True), labels[2:])
criterion(torch.randn(4, 5, requires_grad=True), torch.tensor([4, 2, 0, 1]))
assert criterion.stats() == (2, 0, 0)
print("equal")
"""


def test_without_the_exchange_api() -> None:
    if backends.why_not("cpu", torch.randn(1, 1)) is not None:
        pytest.skip(f"cpu: {backends.why_not('cpu', torch.randn(1, 1))}")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXCHANGE], capture_output=True, text=True, check=False
    )
    assert run.stdout == "equal\n", run.stderr
