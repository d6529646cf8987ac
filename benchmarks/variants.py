"""The ways to the loss that bench_loss.py compares, and the inputs that all of them get.

Peers are what `pip install .[peers]` brings. Other libraries are not here, and why: flash-attn and
apex are built from source, against one torch (fla's cross-entropy is of the same descent as
flash-attn's); cut-cross-entropy, Liger's fused-linear losses and fla's KL begin at hidden states
and a weight matrix, not at logits; unsloth, TransformerEngine and NeMo come as whole training
stacks; llm.c, Fast-LLM, speculators and ejkernel are no packages of a loss for PyTorch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import MODES, OPTIONS, SCALE, SCALED
from torch import Tensor
from torch.autograd import Function

from dlb_fused import DLBLoss, backends, dlb_loss
from dlb_fused.reference import dlb_loss_naive

LOSSES = ("dlb", "dlb+cache", "ce")


class Inputs(NamedTuple):
    """labels[m:] repeat labels[:m], and last_logits copy logits[m:]: so a `DLBLoss` that is called
    with this batch again and again finds these very last_logits in its cache."""

    logits: Tensor  # (B, C), a leaf that requires grad
    labels: Tensor  # (B,) int64
    last_logits: Tensor  # (m, C)


class Call(NamedTuple):
    loss: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]  # what is differentiated: together the rows of the logits


@dataclass(frozen=True)
class Variant:
    """One way to the loss; `make(inputs)` prepares it and returns the call to be timed."""

    name: str
    make: Callable[[Inputs], Call]
    note: str = ""
    work: str = "dlb"  # what it computes and moves, a word that `ideal_bytes` knows
    ours: bool = False  # held to the tolerance of a kernel, and a failure is an error
    modes: tuple[str, ...] = tuple(MODES)

    @property
    def is_loss(self) -> bool:
        return self.work in LOSSES


def make_inputs(B: int, C: int, dtype: str, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(B * 1_000_003 + C)
    logits = (torch.randn(B, C, generator=generator) * 2).to(device, getattr(torch, dtype))
    labels = torch.randint(0, C, (B // 2,), generator=generator).repeat(2).to(device)
    return Inputs(logits.requires_grad_(), labels, logits.detach()[B // 2 :].clone())


def ideal_bytes(
    B: int, C: int, m: int, itemsize: int, work: str = "dlb", backward: bool = True
) -> int:
    """Bytes of all matrices of C columns: read logits and last_logits, write the gradient and the
    cache of the fresh rows. For n = m = B/2: 5·n·C·itemsize, with the cache 6."""
    rows = {"dlb": B + m, "dlb+cache": B + m, "ce": B, "copy": 2 * B + m, "clone": 2 * B}
    if backward and work in LOSSES:
        rows[work] += 2 * B - m if work == "dlb+cache" else B
    return rows.get(work, 0) * C * itemsize


# ---- stock PyTorch -----------------------------------------------------------------------------


def naive(x: Inputs) -> Call:
    return Call(partial(dlb_loss_naive, *x, **OPTIONS), (x.logits,))


def cat(x: Inputs) -> Call:
    """As the official script has it: the halves are outputs of two forward passes, and join for the
    cross-entropy alone."""
    m, tau = len(x.last_logits), OPTIONS["temperature"]
    halves = tuple(t.detach().clone().requires_grad_() for t in (x.logits[:m], x.logits[m:]))
    labels = x.labels[:m].clone(), x.labels[m:].clone()

    def loss() -> Tensor:
        ce = F.cross_entropy(torch.cat(halves), torch.cat(labels))
        log_student = F.log_softmax(halves[0] / tau, dim=1)
        teacher = F.softmax(x.last_logits.detach() / tau, dim=1)
        kl = F.kl_div(log_student, teacher, reduction="batchmean")
        return ce + OPTIONS["alpha"] * tau**2 * kl

    return Call(loss, halves)


def cross_entropy(x: Inputs) -> Call:
    return Call(partial(F.cross_entropy, x.logits, x.labels), (x.logits,))


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)  # Dynamo does not compile a function of torch's own


def copy_of(function: Any) -> Any:
    """With code of its own: Dynamo searches all that it compiled of the same code, at each call."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def compiled(function: Callable[..., Tensor], mode: str, x: Inputs) -> Call:
    run = torch.compile(copy_of(function), mode=mode)
    arguments, options = (x, OPTIONS) if function is dlb_loss_naive else (x[:2], {})

    def loss() -> Tensor:
        # Its CUDA graphs write each step's results over those of the last: here begins the next.
        torch.compiler.cudagraph_mark_step_begin()
        return run(*arguments, **options)

    plain: Any = partial(run, *arguments, **options)
    return Call(loss if mode == "max-autotune" else plain, (x.logits,))


# ---- peers -------------------------------------------------------------------------------------


def liger(x: Inputs) -> Call:
    """Its cross-entropy writes the gradient over its input wherever that requires one, under
    no_grad too. So the KL comes first, and the cross-entropy gets a copy; without gradient none is
    needed."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    ce = LigerCrossEntropyLoss()
    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    m, tau = len(x.last_logits), OPTIONS["temperature"]

    def loss() -> Tensor:
        log_student = F.log_softmax(x.logits[:m] / tau, dim=1)
        second = kl(log_student, F.log_softmax(x.last_logits / tau, dim=1))
        logits = x.logits.clone() if torch.is_grad_enabled() else x.logits.detach()
        return ce(logits, x.labels) + OPTIONS["alpha"] * tau**2 * second

    return Call(loss, (x.logits,))


def clone(x: Inputs) -> Call:
    return Call(x.logits.detach().clone, ())


def quack(x: Inputs) -> Call:
    from quack.cross_entropy import cross_entropy

    return Call(partial(cross_entropy, x.logits, x.labels), (x.logits,))


def fla(x: Inputs) -> Call:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    def loss() -> Tensor:
        return cross_entropy_loss(x.logits, x.labels)[0].mean()

    return Call(loss, (x.logits,))


PEERS = {
    "liger_kernel": [
        Variant("liger", liger, "Liger's CE + KLDiv; CE on a copy, since it overwrites its input"),
        Variant("copy[liger]", clone, "that copy alone: what it adds to liger", "clone"),
    ],
    "quack": [Variant("cross_entropy[quack]", quack, "quack's CE alone, no KL", "ce")],
    "fla": [Variant("cross_entropy[fla]", fla, "flash-linear-attention's CE, no KL", "ce")],
}


def why_no_peer(module: str, device: str) -> str | None:
    """Why a peer cannot run here, in words."""
    reasons = []
    if device == "cpu":
        reasons.append("its kernels need a CUDA device, got cpu")
    if importlib.util.find_spec(module) is None:
        reasons.append(f"{module} is not installed: pip install '.[peers]'")
        if sys.platform != "linux":
            reasons.append(f"and is released for Linux only, not {sys.platform}")
    return "; ".join(reasons) or None


# ---- ours, and what bounds it ------------------------------------------------------------------


def fused(backend: str, x: Inputs, **options: Any) -> Call:
    options = OPTIONS | options | {"backend": backend}

    def loss() -> Any:  # a `partial` with keywords would take 2 µs of its own
        return dlb_loss(logits, labels, last_logits, **options)

    logits, labels, last_logits = x
    return Call(loss, (logits,))


def module(x: Inputs, with_ids: bool = False) -> Call:
    criterion, m = DLBLoss(**OPTIONS), len(x.last_logits)
    more = ()
    if with_ids:  # rows [m:] are cached, and come again as rows [:m]
        more = (torch.arange(m, device=x.labels.device).repeat(2),)
    criterion(x.last_logits.clone().requires_grad_(), x.labels[:m], *(ids[:m] for ids in more))
    return Call(partial(criterion, x.logits, x.labels, *more), (x.logits,))


def copy(fresh: bool, x: Inputs) -> Call:
    """Reads one half of the ideal bytes of dlb_loss and writes the other. Fresh memory comes in the
    size of the gradient: for some sizes the allocator takes new pages, for some it has old ones."""
    B, C = x.logits.shape
    size = ideal_bytes(B, C, len(x.last_logits), x.logits.element_size())
    source = torch.ones(max(size // 8, 1), device=x.logits.device)
    if not fresh:
        return Call(partial(torch.empty_like(source).copy_, source), ())
    parts = source.split(max(x.logits.nbytes // 4, 1))
    clones: Any = lambda: [part.clone() for part in parts]  # noqa: E731
    return Call(clones, ())


class Empty(Function):
    """What autograd takes for a Function of the form of ours that computes nothing: as many
    arguments and saved tensors, a new tensor as output, and one for the gradient, which backward
    hands on."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: Any, module: Any, box: Any) -> Tensor:  # type: ignore[override]
        loss_like, saved = args
        loss, dlogits = torch.empty_like(loss_like), torch.empty_like(logits)
        ctx.save_for_backward(logits, *saved, dlogits)
        ctx.rest, ctx.used = args, False
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # type: ignore[override]
        *_, dlogits = ctx.saved_tensors
        ctx.used = True
        return dlogits, None, None, None


_apply_empty = super(Function, Empty).apply  # type: ignore[misc]  # called as ours is


def empty(x: Inputs) -> Call:
    loss, parts = torch.zeros((), device=x.logits.device), torch.zeros(4, device=x.logits.device)
    args = loss, (x.labels, x.last_logits, parts)
    return Call(partial(_apply_empty, x.logits, args, None, None), (x.logits,))


EMPTY = Variant("empty Function", empty, "an autograd Function that does nothing", "nothing")


def all_variants(device: str, dtype: str) -> tuple[list[Variant], dict[str, str]]:
    """Those that can run, and the reason for each that cannot."""
    probe = torch.empty(1, 1, device=device, dtype=getattr(torch, dtype))
    reasons = {name: backends.why_not(name, probe) for name in backends.BACKENDS}
    auto = next(name for name, reason in reasons.items() if reason is None)
    with_backward = tuple(mode for mode, how in MODES.items() if how.backward)
    variants = [
        Variant("eager", naive, "F.cross_entropy + F.kl_div"),
        Variant("eager[cat]", cat, "the same of two halves that are concatenated for the CE"),
        *(
            Variant(name, partial(compiled, dlb_loss_naive, mode), f"eager, torch.compile: {mode}")
            for name, mode in (("compile", "default"), ("compile[max-autotune]", "max-autotune"))
        ),
        Variant("cross_entropy", cross_entropy, "F.cross_entropy alone, no KL", "ce"),
        Variant(
            "cross_entropy[compile]",
            partial(compiled, plain_cross_entropy, "default"),
            "the same under torch.compile",
            "ce",
        ),
    ]
    absent: dict[str, str] = {}
    for package, of_peer in PEERS.items():
        reason = why_no_peer(package, device)
        if reason is None:
            variants += of_peer
        else:
            absent |= {variant.name: reason for variant in of_peer if variant.is_loss}
    for name, reason in reasons.items():
        if reason is not None:
            absent[f"dlb_loss[{name}]"] = reason
            continue
        variants.append(Variant(f"dlb_loss[{name}]", partial(fused, name), "", ours=True))
        if name != "eager":
            told = partial(fused, name, grad_scale=SCALE)
            note = "told the loss scale, so that the gradient is not computed anew"
            variants.append(
                Variant(f"dlb_loss[{name}+grad_scale]", told, note, "dlb", True, (SCALED,))
            )
    # Without gradient the module leaves its cache alone, and so has no KL.
    note = f"the module with its cache copy, {auto}"
    variants += [
        Variant("DLBLoss", module, note, "dlb+cache", True, with_backward),
        Variant(
            "DLBLoss[ids]",
            partial(module, with_ids=True),
            "the same with rows matched by ids",
            "dlb+cache",
            True,
            with_backward,
        ),
        Variant("copy", partial(copy, False), "dlb_loss's ideal bytes, memory reused", "copy"),
        Variant("copy[fresh]", partial(copy, True), "the same into new memory", "copy"),
    ]
    return variants, absent
