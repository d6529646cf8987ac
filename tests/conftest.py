"""Which backends and devices the tests run on, and why one is skipped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import simulated
import torch

from dlb_fused import backends, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Triton reads this where it is imported: one process is either interpreted or compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_sessionstart() -> None:
    """No run is green for want of what it is about."""
    logits = torch.empty(1, 1)
    for backend in ["triton"] if INTERPRETED else ["cpu"]:
        reason = backends.why_not(backend, logits)
        if reason is not None:
            pytest.exit(f"the backend {backend!r} is needed for these tests: {reason}", 1)


@pytest.fixture(params=[f"{b}-{d}" for b in backends.BACKENDS for d in DEVICES])
def backend_device(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Each backend on each device that it can take; the skip reason is the backend's own.

    `cuda` takes CPU tensors here, with its kernels in the shim of simt/ and every access checked.
    """
    backend, device = request.param.split("-")
    with contextlib.ExitStack() as stack:
        if (backend, device) == ("cuda", "cpu") and not INTERPRETED:
            stack.enter_context(simulated.backend())
        reason = backends.why_not(backend, torch.empty(1, 1, device=device))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        yield backend, device


@pytest.fixture(autouse=True)
def no_silent_substitute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of a kernel fails if the reference computes in its place."""
    if "backend_device" not in request.fixturenames:
        return
    backend, _ = request.getfixturevalue("backend_device")
    if backend == "eager":
        return

    def refuse(*_: object) -> None:
        raise AssertionError(f"the reference ran in place of {backend}")

    for name in ("forward", "backward", "rescale_"):
        monkeypatch.setattr(reference, name, refuse)


@pytest.fixture(autouse=INTERPRETED)
def faithful_interpreter() -> Iterator[None]:
    from interpreter import faithful

    with faithful():
        yield
