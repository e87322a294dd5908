"""What this machine can run, and what would be chosen: the facts behind `vreflection info`."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

from ._version import __version__

PACKAGES = ("torch", "transformers", "triton", "accelerate", "flash-attn", "torchvision", "numpy", "safetensors")


def capabilities() -> dict[str, dict[str, str]]:
    """Groups of name → plain-text value: versions, devices, and choices with their reasons."""
    return {"versions": versions(), "devices": devices(), "choices": choices()}


def versions() -> dict[str, str]:
    found = {"vreflection": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {capability}"
    if not torch.cuda.is_available():
        found["cuda"] = "none: " + (
            "this torch is a CPU build" if torch.version.cuda is None else "no device or driver"
        )
    return found


def choices() -> dict[str, str]:
    """`auto` choices of each part; parts with one implementation say so."""
    import torch

    from .decoding.tiers import tier_report
    from .engine.choice import step_report
    from .ops import dispatch

    flash = importlib.util.find_spec("flash_attn") is not None
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return {
        **dispatch.explain(device, dtype),
        "C++ extension": dispatch.CPP_MISSING or "loaded",
        "CUDA extension": dispatch.CUDA_MISSING or "loaded",
        "decode step": step_report(torch.device(device), dtype),
        **tier_report(device),
        "host attention": "flash_attention_2 is installed; choose it with attn_implementation" if flash else "sdpa",
    }
