"""`python -m dlb_fused`: versions, devices, what was compiled, and for each backend whether it can
run, or the reason why not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from pathlib import Path

import torch

import dlb_fused
from dlb_fused import backends


def main() -> None:
    versions = {"dlb_fused": dlb_fused.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    print("   ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"triton {installed('triton')}   CUDA of torch {torch.version.cuda or 'none'}")
    print(f"compiled for the CPU: {compiled('_cpu')}")
    print(f"compiled for CUDA: {compiled('_cuda')}")
    devices = ["cpu"]
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        devices.append(f"cuda:{i}")
        print(f"cuda:{i}: {torch.cuda.get_device_name(i)}")
    for device in devices:
        logits = torch.empty(1, 1, device=device)
        print(f"\nbackends for float32 logits on {device}, in the order of backend='auto':")
        for name in backends.BACKENDS:
            reason = backends.why_not(name, logits)
            print(f"  {name:8}{'available' if reason is None else 'no: ' + reason}")
    if "cuda" in backends.BACKENDS:
        print("\ncuda before triton is a guess: no GPU has measured which is faster.")


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiled(name: str) -> str:
    """What the module was built for, or why it was left out or does not load."""
    try:
        module = importlib.import_module(f"dlb_fused.{name}")
    except ImportError as error:
        left_out = Path(__file__).with_name(f"{name}.txt")  # written by setup.py
        return f"no: {left_out.read_text().strip() if left_out.exists() else error}"
    if name == "_cpu":
        return "yes"
    runtime, driver = module.versions()
    found = f"a driver for CUDA {dotted(driver)}" if driver else "no driver"
    return f"{module.ARCHITECTURES}, with CUDA {dotted(runtime)}; {found} found"


def dotted(version: int) -> str:
    """13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


if __name__ == "__main__":
    main()
