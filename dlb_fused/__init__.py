"""Fused kernels for one loss: self-distillation from the last mini-batch (DLB, CVPR 2022)."""

from dlb_fused.backends import BACKENDS
from dlb_fused.loss import DLBLoss, DLBParts, dlb_loss
from dlb_fused.mixing import OverlapCutMix, OverlapMixup
from dlb_fused.sampler import OverlapBatchSampler
from dlb_fused.two_views import TwoViewCarry

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "DLBLoss",
    "DLBParts",
    "OverlapBatchSampler",
    "OverlapCutMix",
    "OverlapMixup",
    "TwoViewCarry",
    "dlb_loss",
]
