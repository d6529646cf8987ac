"""From the criterion's call to the end of backward the host never waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fused import DLBLoss

# Each of them brings a value, or a size that depends on values, to the host.
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
}


class Ops(TorchDispatchMode):
    """Counts the operations that bring something to the host, and all others as "rest"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_read = name in WAITS or self.takes_a_mask(name, args)
        self.counts[name if is_read else "rest"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def takes_a_mask(name: str, args: Any) -> bool:
        """A mask as index is a hidden nonzero."""
        if name not in ("index", "index_put", "index_put_"):
            return False
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def rows(device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    z = torch.randn(8, 5, device=device, requires_grad=True)
    labels = torch.tensor([1, 2, 3, 4], device=device).repeat(2)
    return z, labels, {}


def probabilities(device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    z, _, _ = rows(device)
    targets = torch.eye(5, device=device)[:4].repeat(2, 1) * 0.8 + 0.04
    return z, targets, {}


def sequences(device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    z = torch.randn(8, 6, 5, device=device, requires_grad=True)
    labels = (torch.arange(24, device=device).view(4, 6) % 5).repeat(2, 1)
    labels[:, :2] = -100
    return z, labels, {}


def with_mask(make: Any) -> Any:
    def given(device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, labels, _ = make(device)
        mask = torch.tensor([True, False, True, True] * 2, device=device)
        ids = torch.arange(4, device=device).repeat(2)
        return z, labels, {"distill": mask, "ids": ids}

    return given


CASES = {
    "rows": (rows, {}),
    "rows, scheduled": (rows, {"temperature": lambda step: 1.0 + step, "alpha": lambda step: 0.5}),
    "rows, ids and mask": (with_mask(rows), {}),
    "rows, options": (rows, {"label_smoothing": 0.1, "normalizer": (8.0, 4.0), "lag": 2}),
    "view": (rows, {"keep": "view"}),
    "probabilities": (probabilities, {}),
    "sequences": (sequences, {}),
    "sequences, ids and mask": (with_mask(sequences), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_the_list_of_operations(case: str) -> None:
    """No value is read, but by an older torch the upstream gradient, which the host holds."""
    exchange = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    make, options = CASES[case]
    criterion = DLBLoss(**options)  # type: ignore[arg-type]
    given = [make() for _ in range(4)]
    z, labels, more = given[0]
    criterion(z, labels, overlap=4, **more)
    for z, labels, more in given[1:]:
        with Ops() as forward:
            loss = criterion(z, labels, overlap=4, **more)
        with Ops() as backward:
            loss.backward()
        assert set(forward.counts) <= {"rest"}
        assert set(backward.counts) <= ({"rest"} if exchange else {"rest", "_local_scalar_dense"})
    assert criterion.stats().matched > 0


def test_a_setting_on_the_device_costs_a_look_on_the_cpu_alone() -> None:
    """Where the host holds the tensor, a bad value is refused at once: one read a tensor."""
    tau = torch.tensor(2.0)
    criterion = DLBLoss(temperature=tau)
    z, labels, _ = rows()
    criterion(z, labels)
    with Ops() as ops:
        criterion(z, labels)
    assert {name for name in ops.counts if name != "rest"} == {"_local_scalar_dense"}


@pytest.mark.skipif("cuda" not in DEVICES, reason="the sync debug mode needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_under_sync_debug_mode(case: str) -> None:
    make, options = CASES[case]
    criterion = DLBLoss(**options)  # type: ignore[arg-type]
    given = [make("cuda") for _ in range(12)]
    upstream = torch.full((), 3.0, device="cuda")
    for z, labels, more in given[:2]:  # kernels are compiled, buffers made
        criterion(z, labels, overlap=4, **more).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for z, labels, more in given[2:]:
            criterion(z, labels, overlap=4, **more).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert criterion.stats().matched > 0
