"""Cases of bench_loss.py under pytest-benchmark: `pytest benchmarks`. Forward and backward; each
variant is held against the truth first."""

from __future__ import annotations

import pytest
import torch
from bench_loss import check, find_truth
from bench_loss import step as step_of
from pytest_benchmark.fixture import BenchmarkFixture
from report import BACKWARD, Result
from variants import PEERS, Call, Inputs, Variant, all_variants, make_inputs

from dlb_fused import BACKENDS

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAMES = ["eager", "eager[cat]", "compile", "compile[max-autotune]", "cross_entropy",
         "cross_entropy[compile]", *(f"dlb_loss[{b}]" for b in BACKENDS), "DLBLoss",
         *(v.name for of_peer in PEERS.values() for v in of_peer if v.is_loss)]  # fmt: skip
SHAPES = [(8, 10), (256, 100), (256, 1000), (64, 32000)]


def variant_named(name: str, device: str) -> Variant:
    variants, absent = all_variants(device, "float32")
    if name in absent:
        pytest.skip(f"{name}: {absent[name]}")
    return next(v for v in variants if v.name == name)


def checked_call(variant: Variant, x: Inputs) -> Call:
    B, C = x.logits.shape
    result = Result("float32", B, C, B // 2, variant.name, variant.ours)
    call = variant.make(x)
    check(variant, call, find_truth(x, variant.work), result)
    assert result.status == "ok", result.reason
    return call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("device", DEVICES)
def test_forward_backward(
    benchmark: BenchmarkFixture, device: str, shape: tuple[int, int], name: str
) -> None:
    variant = variant_named(name, device)
    x = make_inputs(*shape, "float32", device)
    call = checked_call(variant, x)

    def step() -> None:
        step_of(call)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{device} {shape[0]}x{shape[1]} {BACKWARD}"
    benchmark(step)
