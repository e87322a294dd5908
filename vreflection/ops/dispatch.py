"""Which implementation runs an operator. `"auto"` chooses by these rules; anything explicit runs or raises.

| implementation | what it is | runs on |
|---|---|---|
| `reference` | the readable definition (`reference.py`) | anything torch runs on |
| `torch` | the same algebra as the kernels, in plain PyTorch | anything torch runs on |
| `cpp` | `csrc/`, C++ for AVX-512, AVX2 or any CPU | CPU: float32, float64, bfloat16 |
| `triton` | `kernels/` | CUDA: float32, bfloat16, float16 |

Availability is found once, at import, and kept in plain values, so that `torch.compile` can trace the choice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

from .schemas import LIBRARY

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "torch", "cpp", "triton")
OPERATORS = {
    "roi_align": ("triton", "cpp", "torch", "reference"),
    "region_attention": ("triton", "cpp", "torch", "reference"),
    "probe_attention": ("triton", "cpp", "torch", "reference"),
    "resample": ("triton", "cpp", "torch", "reference"),
    "distillation_loss": ("triton", "torch", "reference"),
}
DEVICE_MODULES = {
    "attend": "region_attention",
    "attend_backward": "region_attention",
    "roi_align": "roi_align",
    "roi_align_backward": "roi_align",
    "distillation": "distillation_loss",
    "distillation_backward": "distillation_loss",
}
CPP_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_announced: set[tuple[str, str, str]] = set()


def _load_library(name: str) -> str:
    """Load a compiled library of operators; the reason why not, or an empty string."""
    path = Path(__file__).resolve().parent.parent / f"{name}.abi3.so"
    if not path.exists():
        return (
            "the C++ extension was not built; with torch and a compiler installed: "
            "pip install --no-build-isolation --force-reinstall --no-deps <vreflection>"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the C++ extension does not load here ({error}); build it again with this torch"
    return ""


def _find_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


CPP_MISSING = _load_library("_C")
# Needs torch's CUDA libraries in the process; a CPU build of torch has none.
CUDA_MISSING = _load_library("_C_cuda") if torch.version.cuda else "this torch is a CPU build"
TRITON_MISSING = _find_triton()


def why_not(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why `impl` cannot run `op` on tensors of this device type and dtype; an empty string when it can."""
    if impl not in OPERATORS[op]:
        return f"{op} has no {impl} implementation; it has {', '.join(OPERATORS[op])}"
    if impl == "cpp":
        if device != "cpu":
            return f"cpp runs on the CPU, got tensors on {device}"
        if dtype not in CPP_DTYPES:
            return f"cpp takes float32, float64 or bfloat16, got {short(dtype)}"
        return CPP_MISSING
    if impl == "triton":
        if TRITON_MISSING:
            return TRITON_MISSING
        if INTERPRETING:
            return "triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else ""
        if device != "cuda":
            return f"triton runs on CUDA (or interpreted, with TRITON_INTERPRET=1), got tensors on {device}"
        if dtype not in TRITON_DTYPES:
            return f"triton takes float32, bfloat16 or float16, got {short(dtype)}"
    return ""


def choose(op: str, impl: str, tensor: torch.Tensor) -> str:
    """The implementation to run: `impl` itself, or for `"auto"` the fastest that can.

    Raises:
        ValueError: `impl` is unknown, or explicit and cannot run on `tensor`.
        RuntimeError: under `torch.jit.trace`.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{op}: torch.jit.trace would keep the plan of this one call, with its number of boxes and tokens; use "
            "torch.compile, or undo() a fused attention before tracing"
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl != "auto":
        reason = why_not(op, impl, device, dtype)
        if reason:
            raise ValueError(f'impl="{impl}" cannot run {op} here: {reason}; impl="auto" takes what can')
        return impl
    chosen = fastest(op, device, dtype)
    if not torch.compiler.is_compiling() and (op, device, chosen) not in _announced:
        _announced.add((op, device, chosen))
        logger.info("%s on %s, %s: %s", op, device, short(dtype), chosen)
    return chosen


def fastest(op: str, device: str, dtype: torch.dtype) -> str:
    """What `"auto"` takes: the first of triton, cpp, torch that runs; never the interpreter."""
    if device == "cuda" and not INTERPRETING and not why_not(op, "triton", device, dtype):
        return "triton"
    if not why_not(op, "cpp", device, dtype):
        return "cpp"
    return "torch"


def operator(name: str, impl: str, device: str):
    """The callable behind a registered operator for a chosen implementation."""
    if impl == "torch":
        return getattr(torch.ops.vreflection, f"{name}_torch")
    if impl == "triton" and device == "cpu":  # interpreted: there is no dispatch key for it
        return device_function(name)
    return getattr(torch.ops.vreflection, name)


def device_function(name: str):
    """A launcher of `kernels/`; triton is imported here, on first use."""
    return getattr(importlib.import_module(f"vreflection.kernels.{DEVICE_MODULES[name]}"), name)


def explain(device: str, dtype: torch.dtype) -> dict[str, str]:
    """For every operator, what `"auto"` takes on this device and why not the others."""
    told = {}
    for op in OPERATORS:
        chosen = fastest(op, device, dtype)
        passed_over = OPERATORS[op][: OPERATORS[op].index(chosen)]
        reasons = [f"not {impl}: {why_not(op, impl, device, dtype) or 'only on request'}" for impl in passed_over]
        plainer = OPERATORS[op][OPERATORS[op].index(chosen) + 1 :]
        told[op] = "; ".join([chosen, *reasons, f"plainer, on request: {', '.join(plainer)}"])
    return told


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _register_device_functions() -> None:
    for name in DEVICE_MODULES:
        LIBRARY.impl(name, lambda *args, _name=name: device_function(_name)(*args), "CUDA")


_register_device_functions()
