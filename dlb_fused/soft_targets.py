"""Soft targets: labels (B, C) of probabilities. Their cross-entropy is torch's own; the KL, the
cache and the guard are the kernel's, on the labels of the largest probability."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fused.autograd import compute
from dlb_fused.backends import LossArgs, LossOutputs
from dlb_fused.checks import check_device, check_tensor, real_dtype


def hard_labels(logits: Tensor, targets: Tensor, inplace: bool) -> Tensor:
    """(B,) int64, the argmax of checked targets."""
    if inplace:
        raise ValueError("inplace=True cannot be used with labels that are probabilities")
    check_tensor("logits", logits)
    check_tensor("labels", targets)
    if targets.shape != logits.shape or logits.dim() != 2:
        raise ValueError(
            "labels that are probabilities must have the shape (B, C) of logits, got "
            f"{tuple(targets.shape)} for logits {tuple(logits.shape)}"
        )
    check_device("labels", targets, logits)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (B, C) with C > 0, got {tuple(logits.shape)}")
    return targets.detach().argmax(1)


def compute_soft(args: LossArgs, targets: Tensor, backend: str) -> tuple[Tensor, LossOutputs]:
    """`autograd.compute` of args whose labels stand for these targets. ce_count, if it is not
    given, is B, as in torch; weight and smoothing act as in torch."""
    real = real_dtype(args.logits)
    ce_count = args.ce_count
    if ce_count is None:
        ce_count = args.logits.new_full((), len(targets), dtype=real)
    ce = F.cross_entropy(
        args.logits.to(real),
        targets.to(real),
        args.weight,
        label_smoothing=args.label_smoothing,
        reduction="sum",
    )
    ce = ce * torch.where(ce_count > 0, 1 / ce_count, 0)
    only_kl = args._replace(weight=None, label_smoothing=0.0, ce_count=torch.zeros_like(ce_count))
    loss, out = compute(only_kl, backend)
    parts = torch.stack((ce.detach(), out.parts[1], ce_count, out.parts[3]))
    return ce + loss, out._replace(parts=parts)
