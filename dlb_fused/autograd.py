"""What autograd knows of the loss: what is saved, which gradient exists, the operator for compile.

In eager mode `DLBLossFunction` runs: the forward launch stores the gradient already, and backward
returns it (or computes it anew where dloss is not the expected one). Under torch.compile and
torch.export the same backends stand behind the operator `torch.ops.dlb_fused.loss`, since Dynamo
cannot look into them: it is functional, so its forward stores no gradient and its backward computes
it once, with the dloss that came.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from dlb_fused import backends
from dlb_fused.backends import LossArgs, LossOutputs
from dlb_fused.checks import check_values, is_number


def compute(args: LossArgs, backend: str) -> tuple[Tensor, LossOutputs]:
    """Runs the backend on checked arguments. The first tensor is the loss, differentiable with
    respect to the logits; of the second, `loss` and `dlogits` are autograd's."""
    if torch.compiler.is_compiling():
        return _compute_compiled(args, backend)
    if _transform() is not None or _trace() is not None or forward_ad._current_level >= 0:
        _refuse_transforms(args.logits)
    module = backends.choose(backend, args.logits)
    if not args.need_grad:
        out = module.forward(args)
        return out.loss, out
    box: list[LossOutputs] = []
    return _apply(args.logits, args, module, box), box[0]


_transform, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state


def _refuse_transforms(logits: Tensor) -> None:
    """They would look at the operations of the loss, and find none."""
    what = None
    if _transform() is not None:
        what = "torch.func transforms (vmap, grad, jvp, ...)"
    elif _trace() is not None:
        what = "torch.jit.trace"
    elif forward_ad.unpack_dual(logits).tangent is not None:
        what = "forward-mode differentiation"
    if what is not None:
        raise RuntimeError(
            f"dlb_loss cannot be used inside {what}: use dlb_fused.reference.dlb_loss_naive there"
        )


class DLBLossFunction(Function):
    """Classic `forward(ctx, ...)`: the `setup_context` form costs 14 µs more a call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, args: LossArgs, module: ModuleType, box: list[LossOutputs]
    ) -> Tensor:
        out = module.forward(args)
        box.append(out)
        teacher, pair = args.last_logits, args.pair
        # Kernels write behind autograd's back; now a later read of the old values is an error.
        if args.inplace:
            torch.autograd.graph.increment_version(logits)
        if pair is not None:
            teacher = pair.logits
            torch.autograd.graph.increment_version(teacher)
        ctx.inference_teacher = None
        if teacher is not None and teacher.is_inference():  # autograd refuses to save these
            ctx.inference_teacher, teacher = teacher, None
        # Saved are what a recomputation reads, so that a later write into them is found.
        ctx.save_for_backward(logits, args.labels, teacher, out.parts, *_options(args))
        ctx.dlogits, ctx.rest, ctx.module = out.dlogits, args[3:], module
        return out.loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return _backward(ctx, dloss), None, None, None
        with torch.no_grad():
            dlogits = _backward(ctx, dloss)
        dlogits = NotTwiceDifferentiable.apply(dlogits, dloss, *ctx.saved_tensors[:1])
        return dlogits, None, None, None


# Without the layer of `Function.apply` that is for functorch, which `compute` refuses: 2 µs a call.
_apply = super(Function, DLBLossFunction).apply  # type: ignore[misc]


def _options(args: LossArgs) -> list[Tensor]:
    """The tensors among weight ... grad_scale, labels_b and lam. (To ask of all ten whether they
    are takes twice as long as to see that none is.)"""
    weight, _, _, tau, alpha, ce, kl, scale = args[7:15]
    labels_b, lam = args[21:23]
    if weight is ce is kl is labels_b is None:
        if type(tau) is type(alpha) is type(scale) is type(lam) is float:
            return []
    options = (weight, tau, alpha, ce, kl, scale, labels_b, lam)
    return [x for x in options if isinstance(x, Tensor)]


def _backward(ctx: Any, dloss: Tensor) -> Tensor:
    logits, labels, teacher, parts = ctx.saved_tensors[:4]  # an error where one was written to
    # The first backward gives the stored buffer away: no other name for it stays behind, or
    # autograd would clone it.
    stored, ctx.dlogits = ctx.dlogits, None
    grad_scale = ctx.rest[_GRAD_SCALE]
    if stored is not None and is_number(dloss, grad_scale):
        return stored
    dloss = dloss.resolve_neg()  # kernels read its memory
    args = LossArgs(
        logits.detach(), labels, ctx.inference_teacher if teacher is None else teacher, *ctx.rest
    )
    if args.pair is not None:
        args = args._replace(last_logits=None)  # was saved for the check of its version only
    if args.inplace:
        if stored is None:
            raise RuntimeError(
                "dlb_loss(inplace=True) allows one backward: the logits were overwritten by the "
                "gradient of the first; use inplace=False with retain_graph=True"
            )
        ctx.module.rescale_(stored, dloss, grad_scale)
        return stored
    return ctx.module.backward(args, parts, dloss, stored)


_GRAD_SCALE = LossArgs._fields.index("grad_scale") - 3  # in ctx.rest


class NotTwiceDifferentiable(Function):
    """Passes the gradient on and refuses, in words, to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, dlogits: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return dlogits.view_as(dlogits)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "dlb_loss cannot be differentiated twice: its gradient is computed by a kernel. Use "
            "dlb_fused.reference.dlb_loss_naive for second derivatives"
        )


_SETTINGS = (
    "Tensor logits, Tensor labels, Tensor? last_logits, SymInt overlap, Tensor? teacher_rows, "
    "Tensor? last_labels, Tensor? last_valid, Tensor? weight, int ignore_index, "
    "float label_smoothing, float temperature, Tensor? temperatures, float alpha, Tensor? alphas, "
    "Tensor? ce_count, Tensor? kl_count, SymInt fresh, bool copy_logits, Tensor? labels_b, "
    "float lam, Tensor? lams, bool distill_ignored, str backend"
)

# A CUDA graph of the compiler's would take the cache and the workspace for its own memory, and free
# them: it runs this operator between its graphs. (The tag is not in older versions of torch.)
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
library = torch.library.Library("dlb_fused", "DEF")
library.define(
    f"loss({_SETTINGS}) -> (Tensor loss, Tensor parts, Tensor next_logits, Tensor next_labels, "
    "Tensor next_valid, Tensor stats)",
    tags=_TAGS,
)
library.define(f"loss_gradient(Tensor dloss, Tensor parts, {_SETTINGS}) -> Tensor", tags=_TAGS)


def _compute_compiled(args: LossArgs, backend: str) -> tuple[Tensor, LossOutputs]:
    loss, parts, next_logits, next_labels, next_valid, stats = torch.ops.dlb_fused.loss(
        *_settings_of(args), backend
    )
    if args.stats is not None:
        args.stats.add_(stats)
    return loss, LossOutputs(
        loss,
        parts,
        None,
        next_logits if args.copy_logits and args.fresh else None,
        next_labels if args.fresh else None,
        next_valid if args.fresh else None,
    )


def _settings_of(args: LossArgs) -> tuple[Any, ...]:
    """The arguments of the operator but the last: a union of float and tensor becomes two
    arguments."""

    def split(value: float | Tensor) -> tuple[float, Tensor | None]:
        return (0.0, value) if isinstance(value, Tensor) else (value, None)

    return (
        *args[:9],
        args.label_smoothing,
        *split(args.temperature),
        *split(args.alpha),
        args.ce_count,
        args.kl_count,
        args.fresh,
        args.copy_logits,
        args.labels_b,
        *split(args.lam),
        args.distill_ignored,
    )


def _args_of(*settings: Any) -> tuple[LossArgs, str]:
    *head, tau, taus, alpha, alphas, ce_count, kl_count = settings[:16]
    fresh, copy_logits, labels_b, lam, lams, distill_ignored, backend = settings[16:]
    args = LossArgs(
        *(
            *head,
            tau if taus is None else taus,
            alpha if alphas is None else alphas,
            ce_count,
            kl_count,
        )
    )
    lam = lam if lams is None else lams
    second = {"labels_b": labels_b, "lam": lam, "distill_ignored": distill_ignored}
    return args._replace(fresh=fresh, copy_logits=copy_logits, **second), backend


def _loss(*settings: Any) -> tuple[Tensor, ...]:
    args, backend = _args_of(*settings)
    for name in ("temperature", "alpha", "lam"):  # while tracing there was no value to look at
        check_values(name, getattr(args, name))
    stats = args.labels.new_zeros(3)
    out = backends.choose(backend, args.logits).forward(args._replace(stats=stats))
    absent = args.logits.new_empty(0)
    return (
        out.loss,
        out.parts,
        absent if out.next_logits is None else out.next_logits,
        args.labels.new_empty(0) if out.next_labels is None else out.next_labels,
        absent.to(torch.uint8) if out.next_valid is None else out.next_valid,
        stats,
    )


def _loss_meta(*settings: Any) -> tuple[Tensor, ...]:
    args, _ = _args_of(*settings)
    real = torch.float64 if args.logits.dtype == torch.float64 else torch.float32
    C = args.logits.shape[1]
    return (
        args.logits.new_empty((), dtype=real),
        args.logits.new_empty(4, dtype=real),
        args.logits.new_empty((args.fresh, C) if args.copy_logits and args.fresh else 0),
        args.labels.new_empty(args.fresh),
        args.labels.new_empty(args.fresh, dtype=torch.uint8),
        args.labels.new_empty(3),
    )


def _loss_gradient(dloss: Tensor, parts: Tensor, *settings: Any) -> Tensor:
    args, backend = _args_of(*settings)
    return backends.choose(backend, args.logits).backward(args, parts, dloss, None)


def _loss_gradient_meta(dloss: Tensor, parts: Tensor, *settings: Any) -> Tensor:
    return settings[0].new_empty(settings[0].shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], *(x for x in inputs if isinstance(x, Tensor)))
    ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _operator_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    parts, *tensors = ctx.saved_tensors
    settings = [tensors.pop(0) if x is None else x[0] for x in ctx.rest]
    dlogits = torch.ops.dlb_fused.loss_gradient(dloss, parts, *settings)
    return dlogits, *(None for _ in settings[1:])


for device in ("CPU", "CUDA"):
    library.impl("loss", _loss, device)
    library.impl("loss_gradient", _loss_gradient, device)
torch.library.register_fake("dlb_fused::loss", _loss_meta, lib=library)
torch.library.register_fake("dlb_fused::loss_gradient", _loss_gradient_meta, lib=library)
torch.library.register_autograd(
    "dlb_fused::loss", _operator_backward, setup_context=_setup_context, lib=library
)
