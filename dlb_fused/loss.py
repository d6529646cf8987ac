"""The public loss: `dlb_loss`, a pure function, and `DLBLoss`, the module that owns the cache of
last logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from dlb_fused import backends
from dlb_fused.autograd import compute
from dlb_fused.backends import CachePair, LossArgs, LossOutputs
from dlb_fused.cache import (
    FORMAT,
    Cache,
    ChainWatch,
    caches_from_state,
    match_rows,
    rank_and_world,
)
from dlb_fused.checks import (
    check_distill,
    check_flag,
    check_ids,
    check_ignore_index,
    check_inplace,
    check_label_smoothing,
    check_labels_b,
    check_last_logits,
    check_logits,
    check_number,
    check_options,
    plain_args,
    rows_contiguous,
)
from dlb_fused.counts import with_global_counts
from dlb_fused.sequences import (
    each_token,
    flatten_arguments,
    flatten_sequences,
    teacher_tokens,
    token_setting,
)
from dlb_fused.soft_targets import compute_soft, hard_labels


class DLBParts(NamedTuple):
    """The loss and what it is made of, 0-dim tensors; all but `loss` are detached.

    loss = ce + α·τ²·kl for scalar α and τ. ce_count is the number of valid rows (with `weight`, but
    without `labels_b`, the sum of their weights), kl_count the number of rows that were distilled.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    ce_count: Tensor
    kl_count: Tensor


@overload
def dlb_loss(
    logits: Tensor,
    labels: Tensor,
    last_logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 3.0,
    alpha: float | Tensor = 1.0,
    normalizer: tuple[Tensor | float, Tensor | float] | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: Literal[False] = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    distill_ignored: bool = False,
) -> Tensor: ...
@overload
def dlb_loss(
    logits: Tensor,
    labels: Tensor,
    last_logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 3.0,
    alpha: float | Tensor = 1.0,
    normalizer: tuple[Tensor | float, Tensor | float] | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: Literal[True],
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    distill_ignored: bool = False,
) -> DLBParts: ...
def dlb_loss(
    logits: Tensor,
    labels: Tensor,
    last_logits: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 3.0,
    alpha: float | Tensor = 1.0,
    normalizer: tuple[Tensor | float, Tensor | float] | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    return_parts: bool = False,
    labels_b: Tensor | None = None,
    lam: float | Tensor | None = None,
    distill_ignored: bool = False,
) -> Tensor | DLBParts:
    r"""Cross-entropy of all rows + α·τ²·KL(last_logits || logits) at temperature τ on rows [:m].

    Shen et al., *Self-Distillation from the Last Mini-Batch for Consistency Regularization*, CVPR
    2022. Loss and gradient come from one kernel; each row of logits and last_logits is read once.

    Args:
        logits: (B, C) float32, bfloat16, float16 or float64; any row stride (a column stride costs
            a copy). Of a language model (B, T, C) with labels (B, T): each token is a row (logits
            that are not contiguous are copied: shift the labels, not the logits).
        labels: (B,) int64, each in [0, C) or ignore_index. (B, C) floating point: probabilities,
            as in torch; their cross-entropy is torch's own, in fp32, beside a kernel for the KL: it
            takes several times as long and several times the memory. ignore_index does not apply.
        last_logits: (m, C), m ≤ B: what the last iteration gave for rows [:m], or a teacher's
            logits; (m, T, C) for logits (B, T, C), token by token. Not differentiated. None or
            m = 0: plain cross-entropy. Its dtype may differ from that of logits, but float64 goes
            with float64.
        weight: (C,) class weights of the cross-entropy, as in torch, finite and ≥ 0; the KL is not
            weighted.
        ignore_index: rows with this label have no loss, no KL and a gradient of 0.
        label_smoothing: in [0, 1], of the cross-entropy, as in torch.
        temperature: τ > 0: a float, a 0-dim tensor, or a tensor (m,) with one value a row (or
            sequence).
        alpha: α ≥ 0, likewise.
        normalizer: (ce_count, kl_count), 0-dim tensors or numbers in place of the number of valid
            rows (or their weight sum) and of distilled rows: for data-parallel training and
            gradient accumulation.
        grad_scale: the upstream gradient to expect, e.g. `GradScaler`'s scale or 1/accumulation
            steps. The gradient is stored with it, in fp32 before the last cast, and is right for
            any other upstream gradient too, by computing it again (with `inplace`, by a factor).
        inplace: write the gradient over logits. They must not be a leaf; one backward only.
        backend: "auto", or a name from `dlb_fused.BACKENDS`; a name runs or raises.
        return_parts: return `DLBParts` in place of the loss.
        labels_b: (B,) int64, a second label of each row, for mixup and cutmix. The target of row i
            is then lam of class labels[i] and 1 - lam of class labels_b[i], and the cross-entropy
            is torch's for probabilities: with `weight`, its denominator is the number of valid
            rows. A row is ignored if one of its labels is ignore_index. Goes with lam.
        lam: in [0, 1]: a float, a 0-dim tensor, or a tensor (B,) with one value a row.
        distill_ignored: rows [:m] that are ignored keep their KL (unlabelled samples); they have no
            cross-entropy.

    Returns:
        0-dim float32 tensor (float64 for float64 logits). It is 0 with gradient 0 where torch gives
        NaN for want of rows: an empty batch, all labels ignored, a weight sum of 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
        IndexError: a label is out of range (CPU). On a GPU the loss and that row's gradient become
            NaN instead, and likewise for a bad value in a temperature, alpha or lam tensor: to
            ask would be a host sync.
        RuntimeError: the named backend cannot run here (with its reason), or `inplace` would break
            autograd.

    Equivalent to, with scalar α, τ and no ignored rows::

        F.cross_entropy(logits, labels, weight, label_smoothing=label_smoothing)
        + alpha * temperature**2 * F.kl_div(
            F.log_softmax(logits[:m] / temperature, dim=1),
            F.softmax(last_logits / temperature, dim=1), reduction="batchmean")

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> loss = dlb_loss(logits, torch.tensor([0, 1]), last_logits=torch.tensor([[1.0, 0.0]]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.3390
    """
    args, soft = None, None
    tensors = weight is normalizer is grad_scale is labels_b is lam is None
    if tensors and inplace is distill_ignored is False:
        args = plain_args(
            logits, labels, last_logits, ignore_index, label_smoothing, temperature, alpha
        )
    if args is None:
        if isinstance(labels, Tensor) and labels.dim() == 2:
            refuse_second_label(labels, labels_b, lam)
            if labels.is_floating_point():
                soft, labels, ignore_index = labels, hard_labels(logits, labels, inplace), -100
            else:
                logits, labels, last_logits, temperature, alpha = flatten_arguments(
                    logits, labels, last_logits, temperature, alpha
                )
        check_logits(logits, labels)
        rows, m = rows_contiguous(logits), 0
        if last_logits is not None:
            last_logits = check_last_logits(last_logits, logits)
            m = last_logits.shape[0]
        options = check_options(
            *(logits, m, weight, ignore_index, label_smoothing, temperature, alpha),
            *(normalizer, grad_scale),
        )
        need_grad = logits.requires_grad and torch.is_grad_enabled()
        if inplace and need_grad:
            check_inplace(logits, rows, last_logits, options[-1])
        check_flag("distill_ignored", distill_ignored)
        teacher = (last_logits, m, None, None, None)
        gradient = (need_grad, inplace and need_grad)
        args = LossArgs(*(rows, labels.contiguous(), *teacher, *options, *gradient))
        second = check_labels_b(logits, labels_b, lam)
        args = args._replace(**second, distill_ignored=distill_ignored)
    loss, out = compute(args, backend) if soft is None else compute_soft(args, soft, backend)
    return DLBParts(loss, *out.parts.unbind()) if return_parts else loss


#: temperature or alpha: a number, a tensor, or a callable of the number of optimizer steps.
Setting = float | Tensor | Callable[[int], float | Tensor]


class Batch(NamedTuple):
    """One batch as rows of the loss, and what is known of its samples (rows or sequences)."""

    logits: Tensor  # (rows, C)
    labels: Tensor  # (rows,) int64
    ids: Tensor | None  # (B,) int64
    distill: Tensor | None  # (B,) bool
    T: int | None  # tokens of a sequence: rows = B·T; None: rows = B
    soft: Tensor | None  # (B, C) probabilities, of which labels are the largest


class Lesson(NamedTuple):
    """What the cache says of one batch; the first five are fields of `LossArgs`."""

    last_logits: Tensor | None
    overlap: int
    teacher_rows: Tensor | None
    last_labels: Tensor | None
    last_valid: Tensor | None
    fresh: int
    pair: CachePair | None = None
    # () int64: rows that teacher_rows leaves out, and that are skipped and not mismatched
    skipped: Tensor | None = None


NO_LESSON = Lesson(None, 0, None, None, None, 0)


class ChainStats(NamedTuple):
    """Overlap rows (tokens, of sequences) since the start or the last `reset()`, as numbers."""

    matched: int  # distilled
    mismatched: int  # another sample than the cached row, found by the guard or by ids
    # teacher not finite or dropped with its cache, label ignored (padding among them), masked by
    # distill, or a right row in a step that was dropped
    skipped: int


class DLBLoss(nn.Module):
    """`dlb_loss` with its cache: for `nn.CrossEntropyLoss` in a loop over `OverlapBatchSampler`.

    Rows [:m] of a batch must be the fresh rows of the batch before (m = cached rows, known without
    asking the device); rows [m:] are fresh, and are kept for the next call. A guard compares the
    cached labels with labels[:m] on the device: if one differs, that step is computed without KL,
    and a warning comes once. The cache is read and written only in training mode, with grad mode
    on, for logits that require grad: validation cannot touch it under `torch.no_grad()`, or after
    `eval()` of this module (the model's does not reach it, unless it is part of the model).

    One module has one chain: make one for each head, and call it once a training step. `reset()`
    goes with that of the sampler; after either alone no row would continue the last batch again.

    Args:
        temperature, alpha, weight, ignore_index, label_smoothing, normalizer, grad_scale, inplace,
            backend: as for `dlb_loss`; temperature and alpha may be given anew for each call.
        temperature, alpha: also a callable of the number of optimizer steps so far (committed
            training calls // lag; it outlives `reset()` and travels in the state), called at each
            step. torch.compile leaves such a loss out of its graph, and counts no calls of others:
            in it, as in CUDA graphs, better use a 0-dim tensor, and `fill_` it.
        normalizer: also "global": the counts of all ranks of the default process group, divided by
            their number, so that the mean of gradients that DDP takes is the gradient of the mean
            over all rows, however unequal the ranks' shares. One all_reduce of two numbers in each
            training call, which every rank must make (with an empty batch if need be); none in
            other calls, where it is None, as it is without a process group. `parts` then have a
            rank's share, whose mean over the ranks is the value over all rows.
        keep: "copy" (the kernel copies the fresh rows) or "view" (a reference to the logits: no
            copy, but they must not be written to, and the whole batch of logits stays in memory for
            a step).
        lag: the overlap repeats the batch `lag` calls ago: micro-batches of an optimizer step under
            accumulation.
        distill_ignored: as for `dlb_loss`; such a row also teaches.
        capturable: static buffers whose roles are decided on the device, for CUDA graphs: every
            batch then has n fresh rows and an overlap of n (or none). Two forwards before the first
            backward are refused by autograd.

    The cache travels in `state_dict()`, not in buffers (data-parallel wrappers overwrite those).

    Language models: logits (B, T, C) with labels (B, T). The overlap is whole sequences; the k-th
    valid token (label not ignore_index) of a sequence is taught by the k-th valid token of the
    cached one, so padding may differ. A sequence with another number of valid tokens, or another
    label among them, is another sequence to the guard, also with ids (then it alone loses its KL).

    Labels that are probabilities: the guard compares their largest classes, so both appearances of
    a sample must have the same one. Mixed targets drawn anew have not: keep partner and ratio for
    the second appearance, or mask those rows with `distill`.

    Example:
        >>> criterion = DLBLoss(temperature=3.0, alpha=1.0)
        >>> first = torch.randn(2, 5, requires_grad=True)   # the first batch is all fresh
        >>> loss = criterion(first, torch.tensor([1, 4]))
        >>> second = torch.randn(4, 5, requires_grad=True)  # rows 0, 1: the same samples
        >>> loss = criterion(second, torch.tensor([1, 4, 0, 2]))
        >>> criterion.stats()
        ChainStats(matched=2, mismatched=0, skipped=0)
    """

    def __init__(
        self,
        temperature: Setting = 3.0,
        alpha: Setting = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalizer: tuple[Tensor | float, Tensor | float] | str | None = None,
        grad_scale: float | Tensor | None = None,
        inplace: bool = False,
        backend: str = "auto",
        keep: str = "copy",
        lag: int = 1,
        capturable: bool = False,
        distill_ignored: bool = False,
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
        self.temperature, self.alpha = temperature, alpha
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.normalizer, self.grad_scale = normalizer, grad_scale
        self.inplace, self.backend = inplace, backend
        self.keep, self.lag, self.capturable = keep, lag, capturable
        self.distill_ignored = distill_ignored
        self._check_settings()
        self._caches: list[Cache | None] = []  # oldest first, at most `lag` of them
        self._pending: list[Cache | None] = []  # of a call with commit=False
        self._pair: CachePair | None = None  # in place of _caches if capturable
        self._written_by: tuple[int, int] | None = None  # rank and world of a loaded state
        self._calls = [0]  # committed training calls; in a list: nn.Module sets attributes slowly
        self._last: list[Tensor] = []  # loss and parts of the last call
        self._stats: Tensor | None = None
        self._watch = ChainWatch()

    def _check_settings(self) -> None:
        if self.keep not in ("copy", "view"):
            raise ValueError(f"keep must be 'copy' or 'view', got {self.keep!r}")
        if type(self.lag) is not int or self.lag < 1:
            raise ValueError(f"lag must be an int >= 1, got {self.lag!r}")
        if self.inplace and self.keep == "view":
            raise ValueError("inplace=True overwrites the logits that keep='view' would keep")
        if isinstance(self.normalizer, str) and self.normalizer != "global":
            raise ValueError(
                f"normalizer must be None, 'global' or a pair (ce_count, kl_count), "
                f"got {self.normalizer!r}"
            )
        if self.capturable and (self.keep == "view" or self.lag > 1 or self.normalizer == "global"):
            raise ValueError(
                "capturable=True needs keep='copy' and lag=1, and cannot count for "
                "normalizer='global'"
            )
        if self.backend != "auto":
            backends.load(self.backend)
        for name, value in (("temperature", self.temperature), ("alpha", self.alpha)):
            if callable(value):
                if self.capturable:
                    raise ValueError(
                        f"capturable=True replays the {name} it has captured, not a callable: "
                        "use a 0-dim tensor and fill_ it"
                    )
            elif not isinstance(value, Tensor):
                check_number(name, value)
        check_ignore_index(self.ignore_index)
        check_label_smoothing(self.label_smoothing)
        check_flag("distill_ignored", self.distill_ignored)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        *,
        overlap: int | None = None,
        labels_b: Tensor | None = None,
        lam: float | Tensor | None = None,
        distill: Tensor | None = None,
        temperature: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
        commit: bool | None = True,
    ) -> Tensor:
        """The loss of one batch, a 0-dim tensor.

        Args:
            logits: (B, C), or (B, T, C) of a language model.
            labels: (B,) int64; (B, C) probabilities; (B, T) int64 for logits (B, T, C).
            ids: (B,) int64, which sample each row (or sequence) is. With them (in this call and the
                last) rows are matched inside [:m]: permuted or missing rows are fine, and only rows
                without a partner lose their KL.
            overlap: m, if it is not the number of cached rows. Without it, a batch that is no
                larger than the cache is taken whole into the next cache.
            labels_b, lam: as for `dlb_loss`. The guard compares `labels` alone.
            distill: (B,) bool. Rows that are False neither learn from the cache nor teach later
                (the gate for mixed rows); `stats()` counts them as skipped.
            temperature, alpha: in place of those of the constructor.
            commit: False keeps the fresh rows pending until `commit()`; None leaves no trace of the
                call. A two-pass optimizer (SAM) passes False in the first pass and None in the
                second, and calls `commit()` after its update.

        Raises:
            ValueError: the batch is smaller than its overlap, or a wrong shape; see `dlb_loss` for
                the others.
        """
        settings = (self.temperature, self.alpha, temperature, alpha)
        if torch.compiler.is_compiling() and any(map(callable, settings)):
            # A compiled call would keep the callable's first value. For fullgraph=True use a 0-dim
            # tensor and fill_ it before each step.
            not_compiled = torch.compiler.disable(self.forward)
            labelled = {"labels_b": labels_b, "lam": lam, "distill": distill}
            scheduled = {"temperature": temperature, "alpha": alpha, "commit": commit}
            return not_compiled(logits, labels, ids, overlap=overlap, **labelled, **scheduled)
        batch = self._as_rows(logits, labels, ids, distill, labels_b, lam)
        need_grad = logits.requires_grad and torch.is_grad_enabled()
        training = self.training and need_grad
        if self.training:
            refuse_export()
        lesson = NO_LESSON
        if training:
            refuse_recomputation()
            self._refuse_commit(commit)
            lesson = self._lesson(batch, overlap)
            if commit is None:
                lesson = lesson._replace(fresh=0)
        tau = self.temperature if temperature is None else temperature
        if type(tau) is not float:
            tau = self._setting("temperature", tau, batch, lesson, overlap)
        kl_weight = self.alpha if alpha is None else alpha
        if type(kl_weight) is not float:
            kl_weight = self._setting("alpha", kl_weight, batch, lesson, overlap)
        remember = training and commit is not None
        args = self._arguments(batch, lesson, tau, kl_weight, need_grad, remember)
        if not (labels_b is lam is None and self.distill_ignored is False):
            second = check_labels_b(batch.logits, labels_b, lam)
            args = args._replace(**second, distill_ignored=self.distill_ignored)
        soft = batch.soft
        if training and self.normalizer == "global":
            args = with_global_counts(args, soft is not None)
        loss, out = (
            compute(args, self.backend) if soft is None else compute_soft(args, soft, self.backend)
        )
        self._last[:] = loss.detach(), out.parts
        if remember:
            self._remember(out, batch, lesson, commit)
        return loss

    def _as_rows(
        self,
        logits: Tensor,
        labels: Tensor,
        ids: Tensor | None,
        distill: Tensor | None,
        labels_b: Tensor | None,
        lam: float | Tensor | None,
    ) -> Batch:
        """The batch, whatever its form; checked, but for labels_b and lam."""
        rows, soft, T = logits, None, None
        if isinstance(labels, Tensor) and labels.dim() == 2:
            refuse_second_label(labels, labels_b, lam)
            if labels.is_floating_point():
                soft, labels = labels, hard_labels(logits, labels, self.inplace)
            else:
                if self.distill_ignored:
                    raise ValueError("distill_ignored=True takes logits (B, C), got (B, T, C)")
                rows, labels = flatten_sequences(logits, labels)
                T = logits.shape[1]
        check_logits(rows, labels)
        if ids is not None:
            check_ids(ids, logits)
        if distill is not None:
            check_distill(distill, logits)
        return Batch(rows, labels, ids, distill, T, soft)

    def _arguments(
        self,
        batch: Batch,
        lesson: Lesson,
        temperature: float | Tensor,
        alpha: float | Tensor,
        need_grad: bool,
        count: bool,
    ) -> LossArgs:
        """What the kernel gets. count: it adds the overlap rows to the statistics."""
        logits = batch.logits
        options = check_options(
            logits,
            lesson.overlap,
            self.weight,
            self.ignore_index if batch.soft is None else -100,
            self.label_smoothing,
            temperature,
            alpha,
            None if self.normalizer == "global" else self.normalizer,  # type: ignore[arg-type]
            self.grad_scale,
        )
        rows = rows_contiguous(logits)
        inplace = self.inplace and need_grad
        if inplace:
            check_inplace(logits, rows, lesson.last_logits, options[-1])
        keep = (lesson.fresh, self.keep == "copy", self._stats if count else None, lesson.pair)
        labels = batch.labels.contiguous()
        return LossArgs(*(rows, labels, *lesson[:5], *options, need_grad, inplace, *keep))

    def _setting(
        self, name: str, value: Setting, batch: Batch, lesson: Lesson, overlap: int | None
    ) -> float | Tensor:
        """temperature or alpha of this step; of one value a row, those of the taught rows."""
        if callable(value):
            value = value(self._calls[0] // self.lag)
        if not isinstance(value, Tensor) or value.dim() != 1:
            return value
        if lesson.overlap == 0:
            return 1.0  # nobody reads it
        m = lesson.overlap if batch.T is None else lesson.overlap // batch.T
        value = value[:m] if value.shape[0] == overlap else value
        return value if batch.T is None else token_setting(name, value, m, batch.T)

    def _lesson(self, batch: Batch, overlap: int | None) -> Lesson:
        """Which rows are taught by which of the cache, and how many are fresh."""
        logits, _, ids, distill, T, _ = batch
        if self._stats is None or self._stats.device != logits.device:
            self._stats = torch.zeros(3, dtype=torch.int64, device=logits.device)
        B = logits.shape[0] if T is None else logits.shape[0] // T
        if overlap is not None and not (type(overlap) is int and 0 <= overlap <= B):
            raise ValueError(f"overlap must be an int from 0 to {B}, got {overlap!r}")
        if self.capturable:
            return self._static_lesson(batch, overlap)
        refuse_capture(logits)
        if B == 0 and self.normalizer == "global":
            overlap = 0  # a rank that has run out of samples still counts with the others
        cache = self._teacher(batch, B, overlap)
        if self.keep == "view" and torch.compiler.is_compiling():
            raise RuntimeError("keep='view' cannot be used under torch.compile: use keep='copy'")
        m = overlap if overlap is not None else (0 if cache is None else cache.labels.shape[0])
        if m > B:
            raise ValueError(
                f"the batch is smaller than its overlap: it has {B} rows, but {m} rows of the last "
                "batch are cached and must come first; use OverlapBatchSampler, pass overlap=, or "
                "call reset() when a new chain begins; if this is a batch of validation, call "
                "eval() on the loss, or compute it under no_grad()"
            )
        # A batch without fresh rows of its own begins a chain, or repeats the last one whole.
        fresh = B if overlap is None and m == B else B - m
        if T is not None:
            fresh *= T
        if cache is None or m == 0:
            return Lesson(None, 0, None, None, None, fresh)
        if T is not None:
            return self._token_lesson(batch, cache, m, fresh, T)
        if ids is not None and cache.ids is not None:
            teacher_rows, skipped = match_rows(ids[:m], cache.ids), None
            if distill is not None:
                teacher_rows = torch.where(distill[:m], teacher_rows, -1)
                skipped = (~distill[:m]).sum()
            return Lesson(cache.logits, m, teacher_rows, None, cache.valid, fresh, None, skipped)
        last_logits, rows, valid = cache.logits, cache.labels.shape[0], cache.valid
        if m < rows:
            last_logits = last_logits[:m]
        m = min(m, rows)
        if distill is not None:
            valid = valid[:m] * distill[:m]
        return Lesson(last_logits, m, None, cache.labels, valid, fresh)

    def _token_lesson(self, batch: Batch, cache: Cache, m: int, fresh: int, T: int) -> Lesson:
        """The same for the first m sequences."""
        sequences = None
        if batch.ids is not None and cache.ids is not None:
            sequences = match_rows(batch.ids[:m], cache.ids)
        else:
            m = min(m, cache.labels.shape[0])
        teacher_rows, skipped = teacher_tokens(
            batch.labels.view(-1, T)[:m],
            cache.labels,
            sequences,
            self.ignore_index,
            None if batch.distill is None else batch.distill[:m],
        )
        return Lesson(cache.logits, m * T, teacher_rows, None, cache.valid, fresh, None, skipped)

    def _teacher(self, batch: Batch, B: int, overlap: int | None) -> Cache | None:
        """The cache of `lag` calls ago, if it can teach this batch; else it is dropped with a
        warning."""
        if self._written_by is not None:
            rank, world = self._written_by
            if (rank, world) != rank_and_world():
                self._drop(f"it was written by rank {rank} of {world}")
            self._written_by = None
            due = self._caches[0] if len(self._caches) == self.lag else None
            if due is not None and overlap is None and due.labels.shape[0] > B:
                self._drop(f"it has more rows than the {B} of this batch")
        cache = self._caches[0] if len(self._caches) == self.lag else None
        if cache is None:
            return None
        logits = batch.logits
        if cache.logits.shape[1] != logits.shape[1]:
            self._drop(f"it has {cache.logits.shape[1]} classes, logits have {logits.shape[1]}")
            return None
        if (cache.labels.dim() == 1) != (batch.T is None):
            forms = "(B, C)", "(B, T, C)"
            was, now = forms if batch.T is not None else forms[::-1]
            self._drop(f"it is of logits {was}, these are {now}")
            return None
        cache.check_version()
        return cache.on(logits)

    def _drop(self, why: str) -> None:
        if self._stats is not None:
            self._stats[2] += sum(c.labels.numel() for c in self._caches if c is not None)
        self._caches.clear()
        if torch.compiler.is_compiling():  # which cannot trace a warning
            return
        warnings.warn(f"DLBLoss drops its cache: {why}", RuntimeWarning, stacklevel=7)

    def _static_lesson(self, batch: Batch, overlap: int | None) -> Lesson:
        refuse_pair(self.backend, batch)
        B, C = batch.logits.shape
        if self._pair is None:
            self._pair = self._new_pair(batch, B - (overlap or 0))
        _, rows, classes = self._pair.logits.shape
        m = overlap if overlap is not None else (rows if B == 2 * rows else 0)
        if classes != C or B - m != rows or m not in (0, rows):
            raise ValueError(
                f"capturable=True needs {rows} fresh rows of {classes} classes after an overlap of "
                f"{rows} rows or none, got {B} rows of {C} classes with an overlap of {m}"
            )
        return Lesson(None, m, None, None, None, rows, self._pair)

    def _new_pair(self, batch: Batch, rows: int) -> CachePair:
        """Two empty slots; slot 0 holds the cache of a loaded state, if there is one that fits."""
        logits = batch.logits
        cache = self._teacher(batch, len(logits), None)
        rows = rows if cache is None else len(cache.labels)
        new = logits.new_zeros
        pair = CachePair(
            new(2, rows, logits.shape[1]),
            new(2, rows, dtype=torch.int64),
            new(2, rows, dtype=torch.uint8),
            new(1, dtype=torch.int32),
        )
        if cache is not None:
            for slots, value in zip(pair[:3], cache[:3], strict=True):
                slots[0].copy_(value)
        return pair

    def _remember(
        self, out: LossOutputs, batch: Batch, lesson: Lesson, commit: bool | None
    ) -> None:
        if self.capturable:
            self._calls[0] += 1
        else:
            self._pending[:] = [self._new_cache(out, batch, lesson.fresh)]
            if commit:
                self.commit()
        if lesson.skipped is not None and self._stats is not None:
            self._stats[1:] += torch.stack((-lesson.skipped, lesson.skipped))
        if not torch.compiler.is_compiling() and self._stats is not None:
            by_ids = batch.ids is not None and lesson.teacher_rows is not None
            self._watch.look(self._stats, by_ids)

    def _new_cache(self, out: LossOutputs, batch: Batch, fresh: int) -> Cache | None:
        *_, kept, labels, valid = out
        if labels is None or valid is None:  # no fresh row
            return None
        _, _, ids, distill, T, _ = batch
        n = fresh if T is None else fresh // T
        if T is not None:
            labels = labels.view(n, T)
        if distill is not None:
            may_teach = distill[-n:]
            valid = valid * (may_teach if T is None else each_token(may_teach, T))
        ids = None if ids is None else ids[-n:].clone()
        if kept is not None:
            return Cache(kept, labels, valid, ids, None)
        view = rows_contiguous(batch.logits.detach())[-fresh:]
        version = None if torch.compiler.is_compiling() else view._version
        return Cache(view, labels, valid, ids, version)

    def commit(self) -> None:
        """Makes the fresh rows of the last call with commit=False the newest of the cache, and
        counts that call as a step of the schedules."""
        if not self._pending:
            return
        self._caches[:] = [*self._caches, *self._pending][-self.lag :]
        self._pending.clear()
        if not torch.compiler.is_compiling():  # it would compile anew for each number
            self._calls[0] += 1

    @property
    def parts(self) -> DLBParts:
        """The parts of the last call's loss, all detached. Raises RuntimeError before the first
        call."""
        if not self._last:
            raise RuntimeError("DLBLoss.parts: there was no call yet")
        loss, parts = self._last
        return DLBParts(loss, *parts.unbind())

    def stats(self) -> ChainStats:
        """Counts of overlap rows so far. Waits for the device."""
        if self._stats is not None:  # compiled steps leave the warning to this
            self._watch.look(self._stats.cpu(), False)
        return ChainStats(*(self._stats.tolist() if self._stats is not None else (0, 0, 0)))

    def reset(self) -> None:
        """Forgets the last logits and the counts: the next batch begins a new chain.

        It must be one without overlap, so reset the sampler too. (For the counts of an epoch, take
        the difference of two `stats()`.)"""
        self._caches.clear()
        self._pending.clear()
        self._written_by = None
        if self._stats is not None:
            self._stats.zero_()
        if self._pair is not None:
            self._pair.valid.zero_()
            # A backward still to come would find no teacher: now autograd says so.
            torch.autograd.graph.increment_version(self._pair.logits)
        self._watch = ChainWatch(self._watch.warned)

    def _refuse_commit(self, commit: bool | None) -> None:
        if not commit and (self.capturable or self.lag > 1):
            raise ValueError(f"commit={commit} needs lag=1 and capturable=False")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles own their cache."""
        caches = [cache and cache.owned() for cache in self._caches]
        pending = [cache and cache.owned() for cache in self._pending]
        return {**self.__dict__, "_caches": caches, "_pending": pending}

    def get_extra_state(self) -> dict[str, Any]:
        caches = self._caches
        if self._pair is not None:
            slot = int(self._pair.parity)
            logits, labels, valid = (x[slot].clone() for x in self._pair[:3])
            caches = [Cache(logits, labels, valid, None, None) if valid.any() else None]
        rank, world = rank_and_world()
        states = [None if cache is None else cache.state() for cache in caches]
        return {
            "format": FORMAT,
            "lag": self.lag,
            "rank": rank,
            "world": world,
            "calls": self._calls[0],
            "caches": states,
        }

    def set_extra_state(self, state: Any) -> None:
        caches = caches_from_state(state)
        self.reset()
        self._calls[0] = state.get("calls", 0) * self.lag // state["lag"]
        if state["lag"] != self.lag:
            self._drop(f"it was written with lag={state['lag']}, this is lag={self.lag}")
            return
        self._caches = caches
        self._written_by = (state["rank"], state["world"])
        self._pair = None  # filled from the cache at the next call

    def extra_repr(self) -> str:
        lag = f"lag={self.lag}, " if self.lag > 1 else ""
        return f"temperature={self.temperature}, alpha={self.alpha}, {lag}backend={self.backend!r}"


def refuse_export() -> None:
    # Not is_exporting(): Dynamo before torch 2.13 takes that for True in every compilation.
    if torch.compiler._is_exporting_flag:
        raise RuntimeError(
            "a DLBLoss in training mode cannot be exported: the graph would hold the first step's "
            "cache for ever; export dlb_loss, or call eval() first"
        )


def refuse_recomputation() -> None:
    """Activation checkpointing runs its region again in backward, when the cache has moved on."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "DLBLoss was called inside backward: keep it outside of the region that "
            "torch.utils.checkpoint computes again"
        )


def refuse_second_label(
    labels: Tensor, labels_b: Tensor | None, lam: float | Tensor | None
) -> None:
    if not labels_b is lam is None:
        raise ValueError(
            f"labels_b and lam go with labels of shape (B,), got labels {tuple(labels.shape)}"
        )


def refuse_capture(logits: Tensor) -> None:
    if torch.compiler.is_compiling() or not logits.is_cuda:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("to capture DLBLoss in a CUDA graph, make it with capturable=True")


def refuse_pair(backend: str, batch: Batch) -> None:
    logits = batch.logits
    if batch.ids is not None:
        raise ValueError("capturable=True compares labels and takes no ids")
    if batch.distill is not None:
        raise ValueError("capturable=True keeps the validity of rows by itself, without distill")
    if batch.T is not None:
        raise ValueError("capturable=True takes logits (B, C), got (B, T, C)")
    if torch.compiler.is_compiling():
        raise RuntimeError("capturable=True is for CUDA graphs in eager mode, not torch.compile")
    if not backends.has_pair(backends.choose(backend, logits)):
        raise RuntimeError(
            f"capturable=True needs one of the backends {backends.WITH_PAIR}, "
            f"but backend={backend!r} is another one on {logits.device}"
        )
