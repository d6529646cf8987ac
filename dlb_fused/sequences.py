"""Language models: logits (B, T, C) with labels (B, T), where a row of the loss is a token.

The overlap is whole sequences. The k-th valid token of a sequence (label not ignore_index) is
taught by the k-th valid token of the cached sequence, so T and the side of the padding may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlb_fused.checks import check_tensor


def flatten_sequences(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B·T, C) and (B·T,); of contiguous logits without a copy."""
    check_tensor("logits", logits)
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or logits.shape[1] == 0:
        raise ValueError(
            "logits must have shape (B, C) for labels (B,), or (B, T, C) with T > 0 for labels "
            f"(B, T); got {tuple(logits.shape)} and {tuple(labels.shape)}"
            + ("; probabilities must be floating point" if logits.shape == labels.shape else "")
        )
    return logits.flatten(0, 1), labels.flatten()


def flatten_arguments(
    logits: Tensor,
    labels: Tensor,
    last_logits: Tensor | None,
    temperature: float | Tensor,
    alpha: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor, float | Tensor]:
    """Those of `dlb_loss`, with last_logits (m, T, C) and settings of one value a sequence."""
    rows, row_labels = flatten_sequences(logits, labels)
    if last_logits is None:
        return rows, row_labels, None, temperature, alpha
    check_tensor("last_logits", last_logits)
    T = logits.shape[1]
    if last_logits.dim() != 3 or last_logits.shape[1] != T:
        raise ValueError(
            f"last_logits must have shape (m, {T}, C) for logits {tuple(logits.shape)}, got "
            f"{tuple(last_logits.shape)}; DLBLoss aligns sequences of another length"
        )
    m = len(last_logits)
    return (
        rows,
        row_labels,
        last_logits.flatten(0, 1),
        token_setting("temperature", temperature, m, T),
        token_setting("alpha", alpha, m, T),
    )


def token_setting(name: str, value: float | Tensor, m: int, T: int) -> float | Tensor:
    """temperature or alpha, of one value a sequence, as one value a token."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape != (m,):
        raise ValueError(
            f"{name} must be a float, a 0-dim tensor, or a tensor of shape ({m},), one for each "
            f"overlap sequence; got shape {tuple(value.shape)}"
        )
    return each_token(value, T)


def each_token(value: Tensor, T: int) -> Tensor:
    """(n·T,) of (n,): the value of each sequence for its tokens."""
    return value[:, None].expand(-1, T).reshape(-1)


def teacher_tokens(
    labels: Tensor,
    last_labels: Tensor,
    sequences: Tensor | None,
    ignore_index: int,
    distill: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which cached token teaches each token of the overlap. Asks the device nothing.

    labels (m, T) and last_labels (n, T') int64; sequences (m,) int64, which cached sequence each of
    the overlap repeats, -1 for none; None: i, and then one that differs drops the whole step.
    distill: (m,) bool.

    Returns:
        teacher_rows: (m·T,) int64 into the cache as n·T' rows; -1 for a token without a teacher.
        skipped: () int64, how many of those -1 are no sign of a broken chain: padding, gated, or of
            a right sequence in a dropped step.
    """
    m, (n, last_T) = len(labels), last_labels.shape
    valid, last_valid = labels != ignore_index, last_labels != ignore_index
    # place[s, k]: where the k-th valid token of the cached sequence s stands. What is not valid
    # goes to a last column that no taught token reads.
    rank = torch.where(last_valid, last_valid.cumsum(1) - 1, last_T)
    at = torch.arange(last_T, device=labels.device).expand(n, last_T)
    place = last_labels.new_zeros(n, last_T + 1).scatter_(1, rank, at)

    own = torch.arange(m, device=labels.device) if sequences is None else sequences.clamp(min=0)
    teacher = place[own].gather(1, (valid.cumsum(1) - 1).clamp(0, last_T))
    same = (last_labels[own].gather(1, teacher) == labels) | ~valid
    agrees = same.all(1) & (valid.sum(1) == last_valid.sum(1)[own])
    if sequences is not None:
        agrees &= sequences >= 0
    differs = ~agrees if distill is None else ~agrees & distill
    taught = valid & agrees[:, None]
    if distill is not None:
        taught &= distill[:, None]
    if sequences is None:
        taught &= ~differs.any()
    mismatched = (valid & differs[:, None]).sum()
    teacher_rows = torch.where(taught, own[:, None] * last_T + teacher, -1).flatten()
    return teacher_rows, (~taught).sum() - mismatched
