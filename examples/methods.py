"""What `train.py` compares: for each method, how it makes its batches and its loss.

Every batch has the same number of rows, whatever the method: `rows` different samples, or half as
many with a second view (or a partner of the same class) each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from image_data import Split
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from dlb_fused import DLBLoss, OverlapBatchSampler, dlb_loss


class Batch(NamedTuple):
    images: Tensor  # (B, channels, height, width) float32
    labels: Tensor  # (B,) int64
    ids: Tensor  # (B,) int64: which training image a row is
    labels_b: Tensor | None = None  # of the partners, with mixup and cutmix
    lam: Tensor | None = None  # and the share of the row itself


class Method:
    """Plain cross-entropy; the others differ in what they define anew.

    Args:
        options: of the command line.
        split: the training images.
        classes: of the data set.
        steps: of the whole training.
    """

    can_mix = False  # mixup and cutmix
    overlaps = False  # a batch begins with the fresh rows of the last one

    def __init__(self, options: argparse.Namespace, split: Split, classes: int, steps: int) -> None:
        self.options, self.split, self.classes, self.steps = options, split, classes, steps
        self.last_parts = torch.zeros(2).unbind()

    def batches(self, sampler: DistributedSampler, rows: int) -> Sampler[list[int]]:
        return BatchSampler(sampler, rows, drop_last=True)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each pass over `batches`."""

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The logits that have a loss, of the first rows or of all."""
        return model(images)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def parts(self) -> tuple[Tensor, Tensor]:
        """Of the last loss: the cross-entropy to the labels, and what else is matched, without its
        weight; 0-dim, detached."""
        return self.last_parts

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class CrossEntropy(Method):
    can_mix = True
    smoothing = 0.0

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.lam is None:
            loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.smoothing)
        else:
            loss = dlb_loss(
                logits,
                batch.labels,
                labels_b=batch.labels_b,
                lam=batch.lam,
                label_smoothing=self.smoothing,
            )
        self.last_parts = loss.detach(), torch.zeros_like(loss)
        return loss


class LabelSmoothing(CrossEntropy):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.smoothing = self.options.smoothing


class DLB(Method):
    """Self-distillation from the last mini-batch (Shen et al., CVPR 2022)."""

    can_mix, overlaps = True, True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.criterion = self.make_criterion()

    def make_criterion(self) -> nn.Module:
        return DLBLoss(self.options.temperature, self.alpha)

    def alpha(self, step: int) -> float:
        return self.options.alpha * ramp(step, self.options.ramp * self.steps)

    def batches(self, sampler: DistributedSampler, rows: int) -> Sampler[list[int]]:
        return OverlapBatchSampler(sampler, rows, drop_last=True)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        mixed = {} if batch.lam is None else {"labels_b": batch.labels_b, "lam": batch.lam}
        return self.criterion(logits, batch.labels, **mixed)

    def parts(self) -> tuple[Tensor, Tensor]:
        parts = self.criterion.parts
        return parts.ce, parts.kl

    def state_dict(self) -> dict[str, Any]:
        return self.criterion.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.criterion.load_state_dict(state)


class OverlapOnly(DLB):
    """The control: DLB's batches without its KL, which tells what the repeated rows do alone."""

    def make_criterion(self) -> nn.Module:
        return DLBLoss(self.options.temperature, alpha=0.0)


class NaiveDLB(DLB):
    """DLB in stock operations, as a training script would write it (`--loss naive`)."""

    can_mix = False
    last_logits: Tensor | None = None
    step = 0

    def make_criterion(self) -> nn.Module:
        return nn.Identity()  # the loss is written out below

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        logits = logits.float()
        ce = loss = F.cross_entropy(logits, batch.labels)
        kl, m = torch.zeros_like(ce), 0
        if self.last_logits is not None:
            m, tau = len(self.last_logits), self.options.temperature
            log_student = F.log_softmax(logits[:m] / tau, dim=1)
            # After a resume they are on the CPU.
            teacher = F.softmax(self.last_logits.to(logits.device) / tau, dim=1)
            kl = F.kl_div(log_student, teacher, reduction="batchmean")
            loss = ce + self.alpha(self.step) * tau**2 * kl
        self.step += 1
        self.last_logits = logits[m:].detach()
        self.last_parts = ce.detach(), kl.detach()
        return loss

    def parts(self) -> tuple[Tensor, Tensor]:
        return self.last_parts

    def state_dict(self) -> dict[str, Any]:
        return {"last_logits": self.last_logits, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_logits, self.step = state["last_logits"], state["step"]


class TwoViews(Method):
    """The control without a time lag: both views of a sample in one batch, and the first learns
    from the second as DLB's learns from the last iteration. (DDGSD, Xu and Liu 2019, has both
    learn from each other.)"""

    def batches(self, sampler: DistributedSampler, rows: int) -> Sampler[list[int]]:
        return Doubled(sampler, rows // 2)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        temperature, alpha = self.options.temperature, self.options.alpha
        teacher = logits[len(logits) // 2 :].detach()
        out = dlb_loss(
            logits, batch.labels, teacher, temperature=temperature, alpha=alpha, return_parts=True
        )
        self.last_parts = out.ce, out.kl
        return out.loss


class ClassWise(Method):
    """CS-KD: Yun et al., *Regularizing Class-wise Predictions via Self-knowledge Distillation*,
    CVPR 2020. The second half of the batch has a partner of the same class for each row of the
    first, goes forward without a gradient, and teaches the first; τ = 4, λ = 1. So only half of
    the rows have a cross-entropy, as in its own code: it is quicker, and learns from fewer labels,
    than the others here."""

    def batches(self, sampler: DistributedSampler, rows: int) -> Sampler[list[int]]:
        return ClassPairs(sampler, rows // 2, self.split.labels, self.options.seed)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        half = len(images) // 2
        with torch.no_grad():
            # Around DDP: it wants one forward for each backward.
            self.partners = getattr(model, "module", model)(images[half:]).detach()
        return model(images[:half])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch.labels[: len(logits)]
        out = dlb_loss(logits, labels, self.partners, temperature=4.0, return_parts=True)
        self.last_parts = out.ce, out.kl
        return out.loss


class Progressive(Method):
    """PS-KD: Kim et al., *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    ICCV 2021. The target is (1 - a) of the label and a of what the network said of this sample one
    epoch ago, where a grows to 0.8 in the last epoch. Keeps an (N, C) matrix."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("ps-kd keeps its predictions in one process: run it without torchrun")
        self.past = F.one_hot(self.split.labels, self.classes).float()
        self.share = 0.0

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.share = 0.8 * (epoch + 1) / epochs

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        self.past = self.past.to(logits.device)
        log_p = F.log_softmax(logits, dim=1, dtype=torch.float32)
        past = self.past[batch.ids]
        ce = F.nll_loss(log_p, batch.labels)
        soft = -(past * log_p).sum(1).mean()
        self.past[batch.ids] = log_p.detach().exp()
        self.last_parts = ce.detach(), soft.detach()
        return (1 - self.share) * ce + self.share * soft

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = state["past"]


class VirtualTeacher(Method):
    """Tf-KD-reg: Yuan et al., *Revisiting Knowledge Distillation via Label Smoothing
    Regularization*, CVPR 2020. The teacher is made up: 0.99 for the label, the rest alike, softened
    by softmax(p / 20); its weight is 0.1. (Its code takes the mean over all B·C elements and
    corrects that by a factor for each data set; here it is the mean over the rows.)"""

    CORRECT, TEMPERATURE, WEIGHT = 0.99, 20.0, 0.1

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        C = logits.shape[1]
        teacher = torch.full_like(logits, (1 - self.CORRECT) / (C - 1), dtype=torch.float32)
        teacher.scatter_(1, batch.labels[:, None], self.CORRECT)
        log_p = F.log_softmax(logits, dim=1, dtype=torch.float32)
        ce = F.nll_loss(log_p, batch.labels)
        soft = F.softmax(teacher / self.TEMPERATURE, dim=1)
        kl = F.kl_div(log_p, soft, reduction="batchmean")
        self.last_parts = ce.detach(), kl.detach()
        return (1 - self.WEIGHT) * ce + self.WEIGHT * kl


class Doubled(Sampler[list[int]]):
    """Batches of n samples, each twice: [n | the same n]."""

    def __init__(self, sampler: DistributedSampler, n: int) -> None:
        self.halves, self.sampler = BatchSampler(sampler, n, drop_last=True), sampler

    def __len__(self) -> int:
        return len(self.halves)

    def __iter__(self) -> Iterator[list[int]]:
        for half in self.halves:
            yield self.second(half)

    def second(self, half: list[int]) -> list[int]:
        return half + half


class ClassPairs(Doubled):
    """Batches of n samples, then for each another sample with the same label (itself, if it has
    none)."""

    def __init__(self, sampler: DistributedSampler, n: int, labels: Tensor, seed: int) -> None:
        super().__init__(sampler, n)
        self.labels, self.seed = labels.tolist(), seed
        self.members: dict[int, list[int]] = {}
        for i, label in enumerate(self.labels):
            self.members.setdefault(label, []).append(i)

    def __iter__(self) -> Iterator[list[int]]:
        # The epoch of the sampler seeds it, so that a resumed training draws the same partners.
        self.generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.sampler.epoch)
        return super().__iter__()

    def second(self, half: list[int]) -> list[int]:
        return half + [self.partner(i) for i in half]

    def partner(self, i: int) -> int:
        others = self.members[self.labels[i]]
        if len(others) == 1:
            return i
        other = others[int(torch.randint(len(others) - 1, (), generator=self.generator))]
        return other if other != i else others[-1]  # uniform over all but i


METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "ce-overlap": OverlapOnly,
    "label-smoothing": LabelSmoothing,
    "dlb": DLB,
    "dlb-two-view": TwoViews,
    "cs-kd": ClassWise,
    "ps-kd": Progressive,
    "tf-kd-reg": VirtualTeacher,
}


def ramp(step: int, steps: float) -> float:
    """Grows from almost 0 to 1 in so many steps."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def make_method(options: argparse.Namespace, split: Split, classes: int, steps: int) -> Method:
    kind = METHODS[options.method]
    if options.loss == "naive":
        if kind is not DLB:
            raise ValueError(f"--loss naive is of --method dlb, got {options.method!r}")
        kind = NaiveDLB
    if options.augment in ("mixup", "cutmix") and not kind.can_mix:
        able = ", ".join(name for name, method in METHODS.items() if method.can_mix)
        raise ValueError(f"--augment {options.augment} goes with {able} (and --loss fused)")
    return kind(options, split, classes, steps)
