"""OverlapMixup and OverlapCutMix: one mixture for both appearances of a sample."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dlb_fused import DLBLoss, OverlapBatchSampler, OverlapCutMix, OverlapMixup
from dlb_fused.mixing import Mixed, OverlapMix

KINDS = [OverlapMixup, OverlapCutMix]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chunks(sizes: list[int], size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of each chunk. A row's label is its number, so that labels_b names its
    partner, and so is each pixel's whole part, so that a pixel tells where it is from."""
    every = torch.arange(sum(sizes))
    g = seeded(5)
    noise = torch.rand(len(every), 2, size, size, generator=g, dtype=torch.float64) * 0.9
    images = every.view(-1, 1, 1, 1) + noise
    return list(zip(images.split(sizes), every.split(sizes), strict=True))


def batches(sizes: list[int], lag: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, images, labels): each chunk behind that of `lag` batches earlier, in the same views."""
    parts = chunks(sizes)
    for k, (images, labels) in enumerate(parts):
        if k < lag:
            yield 0, images, labels
        else:
            again, labels_again = parts[k - lag]
            yield (
                len(again),
                torch.cat((again, images)),
                torch.cat((labels_again, labels)),
            )


def halves(mixed: Mixed, m: int) -> tuple[list[Tensor], list[Tensor]]:
    return [x[:m] for x in mixed], [x[m:] for x in mixed]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def partners(mixed: Mixed) -> Tensor:
    """(B,) the row of each row's partner, by its label."""
    same = mixed.labels_b[:, None] == mixed.labels
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("prob", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_both_appearances_show_the_same_mixture(
    kind: type[OverlapMix], prob: float, per_row: bool, lag: int
) -> None:
    mix = kind(prob=prob, per_row=per_row, lag=lag, generator=seeded())
    fresh: list[list[Tensor]] = []
    sizes = [6, 6, 6, 6, 5, 6, 6, 1, 6, 6, 6]  # with partial chunks, as at the end of an epoch
    for m, images, labels in batches(sizes, lag):
        mixed = mix(images, labels)
        first, second = halves(mixed, m)
        assert m == 0 or equal(first, fresh[-lag])
        fresh.append(second)
    shares = {tuple(lam.tolist()) for *_, lam, _ in fresh if (lam != 1).any()}
    assert len(shares) > 3  # each chunk was mixed in its own way


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("prob", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_partners_are_of_the_same_half(kind: type[OverlapMix], prob: float, per_row: bool) -> None:
    mix = kind(prob=prob, per_row=per_row, generator=seeded())
    for m, images, labels in batches([6] * 20):
        mixed = mix(images, labels)
        rows = torch.arange(len(labels))
        partner = partners(mixed)
        assert torch.equal(partner < m, rows < m)
        assert torch.equal(mixed.labels, labels) and mixed.distill.all()
        clean = partner == rows
        assert torch.equal(mixed.images[clean], images[clean])
        assert (mixed.lam[clean] == 1).all()
        if prob == 1.0:  # a permutation: every row is partner once in its half
            assert torch.equal(partner.sort().values, rows)


@pytest.mark.parametrize("per_row", [False, True])
def test_mixup_is_the_mean_with_lam(per_row: bool) -> None:
    mix = OverlapMixup(per_row=per_row, generator=seeded())
    for _, images, labels in batches([6] * 5):
        mixed = mix(images, labels)
        lam = mixed.lam.double().view(-1, 1, 1, 1)
        want = lam * images + (1 - lam) * images[partners(mixed)]
        torch.testing.assert_close(mixed.images, want, rtol=1e-14, atol=1e-14)


def boxes(mixed: Mixed, images: Tensor) -> Tensor:
    """(B, H, W) bool, where each image is its partner's; checks that all channels agree, and that
    every other pixel is its own."""
    inside = (mixed.images != images).any(1)
    box = inside[:, None].expand_as(images)
    assert torch.equal(mixed.images, torch.where(box, images[partners(mixed)], images))
    return inside


@pytest.mark.parametrize("per_row", [False, True])
def test_cutmix_pastes_a_box_and_corrects_lam(per_row: bool) -> None:
    mix = OverlapCutMix(per_row=per_row, generator=seeded())
    cut = 0
    for m, images, labels in batches([6] * 20):
        mixed = mix(images, labels)
        inside = boxes(mixed, images)
        area = inside.double().mean((1, 2))
        torch.testing.assert_close(mixed.lam, (1 - area).float())
        rows, columns = inside.any(2), inside.any(1)
        assert torch.equal(inside, rows[:, :, None] & columns[:, None, :])  # a box...
        for line in (*rows, *columns):
            (at,) = line.nonzero(as_tuple=True)
            assert len(at) == 0 or at[-1] - at[0] + 1 == len(at)  # ... in one piece
        cut += int((area[m:] > 0).sum())
    assert cut > 60


def test_the_box_is_the_same_in_another_view() -> None:
    mix = OverlapCutMix(generator=seeded())
    (images, labels), (more, more_labels) = chunks([6, 6], 32)
    first = boxes(mix(images, labels), images)
    view = torch.cat((images + 0.05, more))
    second = boxes(mix(view, torch.cat((labels, more_labels))), view)
    assert first.any() and torch.equal(first, second[:6])


def test_the_box_scales_with_the_picture() -> None:
    mix = OverlapCutMix(0.5, per_row=True, generator=seeded())
    images, labels = chunks([32], 64)[0]
    small = mix(images, labels)
    wide = images.repeat_interleave(2, 2).repeat_interleave(3, 3)
    large = mix(torch.cat((wide, wide)), torch.cat((labels, labels)), overlap=32)
    assert torch.equal(large.labels_b[:32], small.labels_b)
    torch.testing.assert_close(large.lam[:32], small.lam, rtol=0, atol=0.06)


def test_one_share_a_half_or_one_a_row() -> None:
    for kind, per_row in itertools.product(KINDS, (False, True)):
        mix = kind(per_row=per_row, generator=seeded())
        for m, images, labels in batches([12] * 4):
            first, second = halves(mix(images, labels), m)
            for half in (first, second):
                shares = {lam for lam in half[3].tolist() if lam != 1}
                assert len(half[3]) == 0 or (len(shares) > 2) == per_row


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lam_has_the_distribution_of_beta(alpha: float) -> None:
    mix = OverlapMixup(alpha, per_row=True, generator=seeded())
    n = 40000
    lam = mix(torch.zeros(n, 1), torch.arange(n)).lam.double()
    want = torch.distributions.Beta(alpha, alpha)
    assert abs(float(lam.mean()) - 0.5) < 4 * float(want.stddev) / n**0.5
    assert float(lam.var()) == pytest.approx(float(want.variance), rel=0.03)


def test_the_box_has_the_share_that_was_drawn() -> None:
    """With side r = √(1 - lam), lam uniform, and its center uniform in the picture, a box has
    r - r²/4 of each side inside: an area of 1/2 - 1/5 + 1/48 in the mean."""
    mix = OverlapCutMix(1.0, per_row=True, generator=seeded())
    n = 5000
    mixed = mix(torch.zeros(n, 1, 64, 64, dtype=torch.uint8), torch.arange(n))
    assert float((1 - mixed.lam).mean()) == pytest.approx(0.3208, abs=0.03)  # whole pixels


@pytest.mark.parametrize("per_row", [False, True])
def test_prob(per_row: bool) -> None:
    mix = OverlapMixup(prob=0.3, per_row=per_row, generator=seeded())
    n, calls = (20, 400) if per_row else (100, 400)
    lam = torch.stack(
        [mix(torch.zeros(n, 1), torch.arange(n), overlap=0).lam for _ in range(calls)]
    )
    share = float((lam != 1).double().mean())
    assert share == pytest.approx(0.3 * (1 - 1 / n), abs=0.07)
    whole = (lam != 1).double().mean(1)  # a half is mixed whole, but for fixed points
    assert per_row or ((whole == 0) | (whole > 0.9)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_without_mixing_all_is_as_it_was_but_new(kind: type[OverlapMix]) -> None:
    mix = kind(prob=0)
    for _, images, labels in batches([6] * 3):
        mixed = mix(images, labels)
        assert torch.equal(mixed.images, images) and torch.equal(mixed.labels_b, labels)
        assert (mixed.lam == 1).all() and mixed.lam.dtype == torch.float32
        assert mixed.images.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gate(kind: type[OverlapMix], per_row: bool) -> None:
    """Both appearances are drawn on their own, and only rows clean at both are distilled."""
    mix = kind(prob=0.5, per_row=per_row, mode="gate", generator=seeded())
    before = torch.empty(0, dtype=torch.bool)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for m, images, labels in batches([10] * 200):
        mixed = mix(images, labels)
        clean = partners(mixed) == torch.arange(len(labels))
        assert torch.equal(mixed.images[clean], images[clean])
        assert torch.equal(mixed.distill, torch.cat((clean[:m] & before, clean[m:])))
        for then, now in zip(before.tolist(), clean[:m].tolist(), strict=True):
            counts[int(then), int(now)] += 1
        before = clean[m:]
    # Independent: about a quarter each, a little more that are clean, by fixed points.
    shares = counts.double() / counts.sum()
    assert ((shares - torch.tensor([[0.2025, 0.2475], [0.2475, 0.3025]])).abs() < 0.1).all()


def test_prob_may_be_changed_between_calls() -> None:
    mix = OverlapMixup(generator=seeded())
    first, second, third = batches([6] * 3)
    mix(*first[1:])
    mix.prob = 0
    mixed = mix(*second[1:])
    assert (mixed.lam[:6] != 1).any() and (mixed.lam[6:] == 1).all()  # the overlap as it was
    assert (mix(*third[1:]).lam == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_type_and_layout_stay_and_inputs_are_untouched(
    kind: type[OverlapMix], dtype: torch.dtype
) -> None:
    images = chunks([6])[0][0].to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(6)
    copies = images.clone(), labels.clone()
    mixed = kind(generator=seeded())(images, labels)
    assert mixed.images.dtype == dtype
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(mixed.images, images)
    assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])


def test_mixup_of_any_shape_and_cutmix_of_any_type() -> None:
    labels = torch.arange(4)
    for shape in ((4,), (4, 3), (4, 2, 3, 4, 5)):
        assert OverlapMixup()(torch.rand(shape), labels).images.shape == shape
    pictures = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 9, 7)
    mixed = OverlapCutMix(per_row=True, generator=seeded())(pictures, labels)
    boxes(mixed, pictures)
    assert mixed.images.dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: type[OverlapMix], device: str) -> None:
    """On a CPU: the same values, without the check."""
    on_cpu = kind(generator=seeded())
    mix = kind(generator=seeded())
    for _, images, labels in batches([6] * 3):
        x, y = images.to(device), labels.to(device)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            mixed = mix(x, y)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert all(value.device == x.device for value in mixed)
        for got, want in zip(mixed, on_cpu(images, labels), strict=True):
            torch.testing.assert_close(got.cpu(), want)


def test_it_draws_from_its_own_generator() -> None:
    images, labels = chunks([6])[0]
    torch.manual_seed(3)
    one = OverlapMixup()
    state = torch.get_rng_state()
    first = one(images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(OverlapMixup()(images, labels).images, first.images)
    assert not torch.equal(OverlapMixup()(images, labels).images, first.images)


# The chain


class Pictures(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.rand(3, 8, 8) + i, i


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_data_loader(kind: type[OverlapMix]) -> None:
    """The two appearances of an index have one partner and one lam, over epoch borders."""
    sampler = OverlapBatchSampler(RandomSampler(range(23), generator=seeded()), 12)
    loader = DataLoader(Pictures(), batch_sampler=sampler, num_workers=2)
    mix = kind(generator=seeded())
    first: dict[int, tuple[int, float]] = {}
    again = 0
    for images, labels in itertools.chain.from_iterable(loader for _ in range(3)):
        mixed = mix(images, labels)
        rows = list(zip(labels.tolist(), mixed.labels_b.tolist(), mixed.lam.tolist(), strict=True))
        m = len(first)
        assert {i: (j, lam) for i, j, lam in rows[:m]} == first
        again += m
        first = {i: (j, lam) for i, j, lam in rows[m:]}
    assert again == 3 * 23 - len(first)


def test_reset_begins_a_new_chain() -> None:
    mix = OverlapMixup(generator=seeded())
    images, labels = chunks([6])[0]
    mix(images, labels)
    mix.reset()
    mixed = mix(images[:4], labels[:4])
    assert len(mixed.lam) == 4 and (mixed.lam != 1).any()


def test_a_batch_of_overlap_alone_keeps_its_mixture() -> None:
    mix = OverlapMixup(generator=seeded())
    images, labels = chunks([6])[0]
    first = mix(images, labels)
    for _ in range(2):
        assert torch.equal(mix(images, labels).images, first.images)


def test_overlap_is_told() -> None:
    mix = OverlapMixup(generator=seeded())
    parts = list(batches([6] * 4))
    _, images, labels = parts[1]
    mixed = mix(images, labels, overlap=6)  # nothing remembered: the halves are known all the same
    assert torch.equal(partners(mixed) < 6, torch.arange(12) < 6)
    again = mix(*parts[2][1:])
    assert torch.equal(again.lam[:6], mixed.lam[6:])
    anew = mix(images, labels, overlap=0)
    assert not torch.equal(partners(anew) < 6, torch.arange(12) < 6)
    for bad in (-1, 13, 1.0, True):
        with pytest.raises(ValueError, match="overlap must be an int from 0 to 12"):
            mix(images, labels, overlap=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"overlap must be 0 or the 12 rows remembered.*, got 6"):
        mix(images, labels, overlap=6)


def test_a_batch_smaller_than_its_overlap_changes_nothing() -> None:
    mix, truth = (OverlapMixup(generator=seeded()) for _ in range(2))
    first, second = batches([6, 6])
    for one in (mix, truth):
        one(*first[1:])
    with pytest.raises(ValueError, match="smaller than its overlap: it has 5 rows, but 6 rows"):
        mix(first[1][:5], first[2][:5])
    assert equal(list(mix(*second[1:])), list(truth(*second[1:])))


def kl_of_a_net_at_rest(mix: Any) -> list[float]:
    """The KL of each step with an overlap, where neither the net nor a picture's view changes: what
    is left comes from mixing."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 5))
    criterion, kl = DLBLoss(), []
    for m, images, labels in batches([6] * 5):
        classes = labels % 5
        criterion(net(mix(images, classes)), classes, labels)
        assert criterion.parts.kl_count == m
        kl += [float(criterion.parts.kl)] if m else []
    return kl


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_saw_the_same_mixture(kind: type[OverlapMix], per_row: bool) -> None:
    mix = kind(per_row=per_row, generator=seeded())
    kl = kl_of_a_net_at_rest(lambda x, y: mix(x.float(), y).images)
    assert max(kl) < 1e-6
    kl = kl_of_a_net_at_rest(lambda x, _: (0.7 * x + 0.3 * x.flip(0)).float())  # over both halves
    assert min(kl) > 1e-3


# State


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("mode", ["same", "gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed(kind: type[OverlapMix], mode: str, lag: int) -> None:
    options: dict[str, Any] = {"prob": 0.7, "mode": mode, "lag": lag}
    mix = kind(**options, generator=seeded(1))
    steps = list(batches([6, 6, 6, 3, 6, 6, 6], lag))
    for step in steps[:4]:
        mix(*step[1:])
    file = io.BytesIO()
    torch.save(mix.state_dict(), file)
    file.seek(0)
    other = kind(**options, generator=seeded(2))
    other.load_state_dict(torch.load(file, weights_only=True))
    for _, images, labels in steps[4:]:
        assert equal(list(other(images, labels)), list(mix(images, labels)))


def good_state(**changes: Any) -> dict[str, Any]:
    mix = OverlapMixup(generator=seeded())
    mix(*chunks([6])[0])
    return mix.state_dict() | changes


def recipe(**changes: Any) -> list[dict[str, Any]]:
    return [good_state()["recipes"][0] | changes]


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "malformed mixing state: expected a dict of"),
        (good_state(extra=1), "expected a dict of"),
        (good_state(format=9), "has format 9, this version reads 1"),
        (good_state(config={}), "was written with {}, but this is {'kind': 'OverlapMixup'"),
        (good_state(recipes=None), "recipes must be a list of at most lag=1"),
        (good_state(recipes=recipe() * 2), "recipes must be a list of at most lag=1"),
        (good_state(recipes=[{}]), "a recipe must be a dict of"),
        (good_state(recipes=recipe(lam=1.0)), "a recipe must hold tensors"),
        (good_state(recipes=recipe(lam=torch.ones(6))), "float64 (n,) and float64 (n, 2)"),
        (good_state(recipes=recipe(partner=torch.arange(5))), "must be int64 (n,), float64 (n,)"),
        (good_state(recipes=recipe(partner=torch.tensor(1))), "must be int64 (n,), float64 (n,)"),
        (good_state(recipes=recipe(partner=torch.arange(6) + 1)), "must be rows from 0 to 5"),
        (good_state(generator=None), "generator must be the state of a torch.Generator"),
        (good_state(generator=torch.zeros(3)), "generator must be the state of a torch.Generator"),
    ],
)
def test_a_bad_state_changes_nothing(state: Any, message: str) -> None:
    mix, truth = (OverlapMixup(generator=seeded(4)) for _ in range(2))
    first, second = batches([6, 6])
    for one in (mix, truth):
        one(*first[1:])
    with pytest.raises(ValueError, match=re.escape(message)):
        mix.load_state_dict(state)
    assert equal(list(mix(*second[1:])), list(truth(*second[1:])))


def test_a_state_of_another_kind() -> None:
    for other in (OverlapCutMix(), OverlapMixup(lag=2), OverlapMixup(mode="gate", prob=0.5)):
        with pytest.raises(ValueError, match="was written with"):
            other.load_state_dict(good_state())


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0.0}, "alpha must be a finite number > 0, got 0.0; prob=0 mixes none"),
        ({"alpha": float("inf")}, "alpha must be a finite number > 0, got inf"),
        ({"alpha": "1"}, "alpha must be a finite number > 0, got '1'"),
        ({"prob": 1.5}, "prob must be a number in [0, 1], got 1.5"),
        ({"prob": float("nan")}, "prob must be a number in [0, 1], got nan"),
        ({"per_row": 1}, "per_row must be True or False, got 1"),
        ({"mode": "elem"}, "mode must be 'same' or 'gate', got 'elem'"),
        ({"mode": "gate"}, "mode='gate' distils clean rows, but prob=1 leaves none: lower prob"),
        ({"lag": 0}, "lag must be an int >= 1, got 0"),
        ({"generator": 7}, "generator must be a torch.Generator on the CPU, got int"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_option(kind: type[OverlapMix], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**options)


@pytest.mark.parametrize(
    "images, labels, error, message",
    [
        ([1.0], torch.arange(1), TypeError, "images must be a tensor, got list"),
        (torch.ones(2), [0, 1], TypeError, "labels must be a tensor, got list"),
        (torch.ones(2), torch.arange(3), ValueError, "labels must be int64 class indices, one for"),
        (torch.ones(2), torch.ones(2), ValueError, "got float32 of shape (2,) for images of"),
        (torch.ones(2).long(), torch.arange(2), TypeError, "images must be floating point to be"),
    ],
)
def test_bad_batch(images: Any, labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        OverlapMixup()(images, labels)


def test_labels_elsewhere() -> None:
    with pytest.raises(ValueError, match="labels must be on cpu with images, got meta"):
        OverlapMixup()(torch.ones(2), torch.arange(2, device="meta"))


def test_cutmix_needs_pictures() -> None:
    with pytest.raises(
        ValueError, match=re.escape("images must have shape (B, C, H, W), got (2, 3")
    ):
        OverlapCutMix()(torch.ones(2, 3, 4), torch.arange(2))
