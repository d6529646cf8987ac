"""`OverlapMixup` and `OverlapCutMix`: a sample is mixed alike at both of its appearances."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 1  # of the state_dict
KEYS = ("format", "config", "generator", "recipes")


class Mixed(NamedTuple):
    """What `OverlapMixup` and `OverlapCutMix` return; all on the device of the images."""

    images: Tensor  # (B, ...), new
    labels: Tensor  # (B,) int64, as given
    labels_b: Tensor  # (B,) int64, of the partners
    lam: Tensor  # (B,) float32, the share of the row itself; 1 for a clean row
    distill: Tensor  # (B,) bool; mode="same": all True


class Recipe(NamedTuple):
    """How the rows of one half are mixed, n of them; on the CPU, where it is drawn."""

    partner: Tensor  # (n,) int64, a row of the same half; itself: the row stays clean
    lam: Tensor  # (n,) float64 as drawn, 1 for a clean row
    center: Tensor  # (n, 2) float64 in [0, 1): of CutMix's box, in heights and widths

    def clean(self) -> Tensor:
        """(n,) bool"""
        return self.partner == torch.arange(len(self.partner), device="cpu")


class OverlapMix:
    """What `OverlapMixup` and `OverlapCutMix` share; see there."""

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        prob: float = 1.0,
        per_row: bool = False,
        mode: str = "same",
        lag: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}; prob=0 mixes none")
        if not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
            raise ValueError(f"prob must be a number in [0, 1], got {prob!r}")
        if not isinstance(per_row, bool):
            raise ValueError(f"per_row must be True or False, got {per_row!r}")
        if mode not in ("same", "gate"):
            raise ValueError(f"mode must be 'same' or 'gate', got {mode!r}")
        if mode == "gate" and prob == 1:
            raise ValueError("mode='gate' distils clean rows, but prob=1 leaves none: lower prob")
        if type(lag) is not int or lag < 1:
            raise ValueError(f"lag must be an int >= 1, got {lag!r}")
        self.alpha, self.prob, self.per_row, self.mode, self.lag = alpha, prob, per_row, mode, lag
        self.generator = own_generator() if generator is None else check_generator(generator)
        self._recipes: list[Recipe] = []  # of the last `lag` fresh halves, oldest first

    def __call__(self, images: Tensor, labels: Tensor, *, overlap: int | None = None) -> Mixed:
        """Mixes one batch.

        Args:
            images: (B, ...), rows [:m] the fresh rows of the batch `lag` calls ago, in that order.
            labels: (B,) int64, on the same device.
            overlap: m, if it is not the number of rows remembered: 0 for a batch that begins a new
                chain, or the overlap of the first batch after `reset()` in mid-chain.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or dtype, or the batch is
                smaller than its overlap.
        """
        self._check_batch(images, labels)
        B = len(images)
        last = self._recipes[0] if len(self._recipes) == self.lag else None
        m = overlap_rows(B, 0 if last is None else len(last.partner), overlap)
        if m == 0:
            last = None
        again = last if last is not None and self.mode == "same" else self._draw(m)
        fresh = self._draw(B - m)
        # As in DLBLoss: a batch without fresh rows of its own is taken whole.
        newest = again if overlap is None and m == B else fresh
        self._recipes = [*self._recipes, newest][-self.lag :]
        recipe = Recipe(
            torch.cat((again.partner, fresh.partner + m)),
            torch.cat((again.lam, fresh.lam)),
            torch.cat((again.center, fresh.center)),
        )
        partner = send(recipe.partner, images)
        mixed, lam = self._mix(images, partner, recipe)
        distill = send(self._distill(recipe, last), images)
        return Mixed(mixed, labels, labels[partner], lam, distill)

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if images.dim() == 0 or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                "labels must be int64 class indices, one for each row of images, got "
                f"{dtype_name(labels)} of shape {tuple(labels.shape)} for images of shape "
                f"{tuple(images.shape)}"
            )
        if labels.device != images.device:
            raise ValueError(f"labels must be on {images.device} with images, got {labels.device}")

    def _draw(self, n: int) -> Recipe:
        rows, itself = n if self.per_row else 1, torch.arange(n, device="cpu")
        g: Any = {"generator": self.generator, "device": "cpu"}  # whatever the default device is
        mixed = torch.rand(rows, **g) < self.prob
        partner = torch.where(mixed, torch.randperm(n, **g), itself)
        lam = torch.where(partner == itself, 1.0, beta(self.alpha, rows, self.generator))
        center = torch.rand(rows, 2, dtype=torch.float64, **g).expand(n, 2)
        return Recipe(partner, lam, center)

    def _mix(self, images: Tensor, partner: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """The mixed images, and lam (B,) float32."""
        raise NotImplementedError

    def _distill(self, recipe: Recipe, last: Recipe | None) -> Tensor:
        """(B,) bool"""
        if self.mode == "same":
            return torch.ones(len(recipe.partner), dtype=torch.bool, device="cpu")
        distill = recipe.clean()
        if last is not None:
            distill[: len(last.partner)] &= last.clean()
        return distill

    def reset(self) -> None:
        """Forgets the last mixtures: the next batch begins a new chain. The generator goes on."""
        self._recipes = []

    def state_dict(self) -> dict[str, Any]:
        """The remembered mixtures and the state of the generator."""
        return {
            "format": FORMAT,
            "config": self._config(),
            "generator": self.generator.get_state(),
            "recipes": [{k: v.clone() for k, v in r._asdict().items()} for r in self._recipes],
        }

    def _config(self) -> dict[str, str | int]:
        """What must be the same for a state to fit."""
        return {"kind": type(self).__name__, "mode": self.mode, "lag": self.lag}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. ValueError if it is malformed or was written under
        another kind, mode or lag; nothing is changed then."""
        if not isinstance(state, dict) or set(state) != set(KEYS):
            raise malformed(f"expected a dict of {sorted(KEYS)}")
        if state["format"] != FORMAT:
            raise ValueError(
                f"mixing state has format {state['format']!r}, this version reads {FORMAT}"
            )
        if state["config"] != self._config():
            raise ValueError(
                f"mixing state was written with {state['config']!r}, but this is {self._config()!r}"
            )
        if not isinstance(state["recipes"], list) or len(state["recipes"]) > self.lag:
            raise malformed(f"recipes must be a list of at most lag={self.lag}")
        recipes = [recipe_from_state(recipe) for recipe in state["recipes"]]
        try:
            self.generator.set_state(state["generator"].cpu())
        except (AttributeError, TypeError, RuntimeError) as error:
            raise malformed(
                f"generator must be the state of a torch.Generator ({error})"
            ) from error
        self._recipes = recipes


class OverlapMixup(OverlapMix):
    """Mixup for batches that overlap: each half is mixed within itself, and the overlap as at its
    first appearance, with the same partner and share.

    Row i becomes lam_i images_i + (1 - lam_i) images_j with j in the same half. Mixup over the
    whole batch, as libraries have it, pairs overlap rows with fresh ones: then the last logits are
    those of another picture. For the training loop (not a collate function: loader workers would
    each have a memory of their own), with `OverlapBatchSampler` or `TwoViewCarry` and `DLBLoss`::

        mixed = mix(images, labels)
        loss = criterion(model(mixed.images), mixed.labels, labels_b=mixed.labels_b, lam=mixed.lam)

    Args:
        alpha: lam is drawn from Beta(alpha, alpha), > 0.
        prob: of mixing a half (with per_row: a row); else it stays clean, with lam 1. May be
            changed between calls, such as to 0 for the last epochs.
        per_row: one lam for each row instead of one for each half.
        mode: "same", or "gate": each appearance is mixed anew, and only rows that are clean at both
            are distilled: give `distill=mixed.distill` to the criterion. In the fresh half,
            `distill` is True for the rows that are clean so far.
        lag: as in `OverlapBatchSampler` and `DLBLoss`.
        generator: on the CPU; default: one of its own, seeded from torch's global one.

    As in `DLBLoss`, the overlap is as many rows as the batch `lag` calls ago had fresh ones, from
    the second batch of a chain on; call `reset()` where a chain begins anew. A CUDA device is not
    waited for. Validation does not call it.

    Raises:
        ValueError: a bad argument.

    Equivalent to, for a half of n rows, with its own draw of `permutation` and `lam`::

        lam * images + (1 - lam) * images[permutation]

    Example:
        >>> mix = OverlapMixup(0.2, generator=torch.Generator().manual_seed(0))
        >>> first = mix(torch.eye(4), torch.arange(4))
        >>> x, y = torch.cat((torch.eye(4), torch.zeros(4, 4))), torch.arange(8)
        >>> second = mix(x, y)  # rows [:4] again
        >>> torch.equal(second.images[:4], first.images)
        True
        >>> bool((second.labels_b[4:] >= 4).all())  # fresh rows among themselves
        True
    """

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        super()._check_batch(images, labels)
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point to be mixed, got {dtype_name(images)}")

    def _mix(self, images: Tensor, partner: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        lam = send(recipe.lam.float(), images)
        weight = lam.to(images.dtype).view(-1, *[1] * (images.dim() - 1))
        return torch.lerp(images[partner], images, weight), lam


class OverlapCutMix(OverlapMix):
    """CutMix for batches that overlap: each half is mixed within itself, and the overlap as at its
    first appearance, with the same partner and box.

    Row i gets a box from a row j of the same half; lam is the share of the area that stays. Images
    are (B, C, H, W) of any dtype. Arguments, modes, state and use are those of `OverlapMixup`; with
    per_row each row has a box of its own. If H and W change, the box scales with them.

    Equivalent to, for each row i of a half, with its own draw of j and of the box::

        images[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
        lam[i] = 1 - (bottom - top) * (right - left) / (H * W)

    Example:
        >>> mix = OverlapCutMix(generator=torch.Generator().manual_seed(0))
        >>> pictures = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)  # one grey each
        >>> first = mix(pictures, torch.arange(4))
        >>> grey = first.lam * first.labels + (1 - first.lam) * first.labels_b
        >>> torch.allclose(first.images.mean((1, 2, 3)), grey)
        True
    """

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        super()._check_batch(images, labels)
        if images.dim() != 4:
            raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")

    def _mix(self, images: Tensor, partner: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        H, W = images.shape[2:]
        edges = torch.stack((*box_edges(recipe, 0, H), *box_edges(recipe, 1, W)))
        top, bottom, left, right = edges
        lam = 1 - (bottom - top) * (right - left) / (H * W)
        top, bottom, left, right = send(edges, images)[..., None]
        y, x = (torch.arange(size, device=images.device) for size in (H, W))
        rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)  # (B, H), (B, W)
        box = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(box, images[partner], images), send(lam.float(), images)


def box_edges(recipe: Recipe, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of the box and the first behind it, each (n,) int64."""
    center = (recipe.center[:, axis] * size).long()
    half = (0.5 * size * (1 - recipe.lam).sqrt()).long()
    return (center - half).clamp(min=0), (center + half).clamp(max=size)


def overlap_rows(B: int, remembered: int, overlap: int | None) -> int:
    """m, checked."""
    if overlap is not None and not (type(overlap) is int and 0 <= overlap <= B):
        raise ValueError(f"overlap must be an int from 0 to {B}, got {overlap!r}")
    m = remembered if overlap is None else overlap
    if m > B:
        raise ValueError(
            f"the batch is smaller than its overlap: it has {B} rows, but {m} rows of the last "
            "batch are remembered and must come first; use OverlapBatchSampler, pass overlap=, or "
            "call reset() when a new chain begins"
        )
    if remembered and m not in (0, remembered):
        raise ValueError(
            f"overlap must be 0 or the {remembered} rows remembered from the last batch, since "
            f"each may have its partner in any of them, got {m}"
        )
    return m


def beta(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """(n,) float64 from Beta(alpha, alpha); torch.distributions knows the global generator only."""
    a, b = torch._standard_gamma(
        torch.full((2, n), alpha, dtype=torch.float64, device="cpu"), generator
    )
    return a / (a + b)


def send(value: Tensor, images: Tensor) -> Tensor:
    """To the device of the images; from pinned memory, since a copy from any other would wait."""
    value = value.pin_memory() if images.is_cuda else value
    return value.to(images.device, non_blocking=True)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), device="cpu")))


def check_generator(generator: torch.Generator) -> torch.Generator:
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        came = getattr(generator, "device", type(generator).__name__)
        raise ValueError(f"generator must be a torch.Generator on the CPU, got {came}")
    return generator


def recipe_from_state(state: Any) -> Recipe:
    if not isinstance(state, dict) or set(state) != set(Recipe._fields):
        raise malformed(f"a recipe must be a dict of {sorted(Recipe._fields)}")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise malformed("a recipe must hold tensors")
    recipe = Recipe(**{name: value.detach().cpu().clone() for name, value in state.items()})
    n = len(recipe.partner) if recipe.partner.dim() else -1
    shapes = [tuple(value.shape) for value in recipe]
    dtypes = [value.dtype for value in recipe]
    if shapes != [(n,), (n,), (n, 2)] or dtypes != [torch.int64, torch.float64, torch.float64]:
        raise malformed(
            "partner, lam and center must be int64 (n,), float64 (n,) and float64 (n, 2)"
        )
    if not ((recipe.partner >= 0) & (recipe.partner < n)).all():
        raise malformed(f"partner must be rows from 0 to {n - 1}")
    return recipe


def malformed(what: str) -> ValueError:
    return ValueError(f"malformed mixing state: {what}")


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
