"""`python -m dlb_fused`: versions, devices, and for each backend whether it can run, or the reason
why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import dlb_fused
from dlb_fused import backends


def main() -> None:
    versions = {"dlb_fused": dlb_fused.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    print("   ".join(f"{name} {version}" for name, version in versions.items()))
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    print(f"triton {triton or 'not installed'}   CUDA of torch {torch.version.cuda or 'none'}")
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


if __name__ == "__main__":
    main()
