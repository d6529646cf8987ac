"""What a checkpoint holds of one rank: its cache, and where its sampler stands.

Frameworks write the objects of rank 0 for all ranks. The cache and the chain are each rank's own.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from dlb_fused.cache import rank_and_world
from dlb_fused.loss import DLBLoss
from dlb_fused.sampler import OverlapBatchSampler


def rank_state(
    criterion: DLBLoss, batches: OverlapBatchSampler, consumed: int, epoch_is_over: bool
) -> dict[str, Any]:
    """Tensors on the CPU and plain values, fit for `torch.load(weights_only=True)`.

    consumed: how many batches of this epoch the trainer has used. epoch_is_over: the trainer begins
    a new epoch after them, also if the sampler has more.
    """
    position = batches.state_dict(consumed=consumed)
    if epoch_is_over:
        position |= {"rest": None, "consumed": 0}
    rank, world = rank_and_world()
    state = {"rank": rank, "world": world, "batches": position, "criterion": criterion.state_dict()}
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), state)


def load_rank_state(
    state: dict[str, Any] | None, criterion: DLBLoss, batches: OverlapBatchSampler
) -> bool:
    """False, with a warning, if `state` is not of this rank: then the chain begins anew."""
    rank, world = rank_and_world()
    if state is None or (state["rank"], state["world"]) != (rank, world):
        whose = "none" if state is None else f"that of rank {state['rank']} of {state['world']}"
        warnings.warn(
            f"the checkpoint has no DLB state for rank {rank} of {world} ({whose} was found): the "
            "chain and the epoch begin anew",
            RuntimeWarning,
            stacklevel=3,
        )
        criterion.reset()
        return False
    criterion.load_state_dict(state["criterion"])
    batches.load_state_dict(state["batches"])
    return True
