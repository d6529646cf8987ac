"""The counts of normalizer="global"."""

from __future__ import annotations

import torch

from dlb_fused.backends import LossArgs
from dlb_fused.cache import rank_and_world
from dlb_fused.reference import count_rows


def with_global_counts(args: LossArgs, soft: bool) -> LossArgs:
    """args with the counts summed over the ranks of the default process group, by its size: then
    the mean of the ranks' gradients is the gradient of the mean over all rows. One all_reduce of
    two numbers, in which every rank must take part; alone, args as they are.

    soft: labels stand for probabilities, whose weights do not count (as in torch).
    """
    _, world = rank_and_world()
    if world == 1:
        return args
    counts = torch.stack(count_rows(args._replace(weight=None) if soft else args))
    torch.distributed.all_reduce(counts)
    ce_count, kl_count = (counts / world).unbind()
    return args._replace(ce_count=ce_count, kl_count=kl_count)
