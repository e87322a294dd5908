"""Refusals that every launcher shares, and where a launch runs."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton

from .launch import H200_MULTIPROCESSORS, MAX_CELLS_PER_SIDE

INTERPRETED = bool(triton.knobs.runtime.interpret)


def check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse what the kernels would compute wrongly or fail on with an obscure message."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in present.values()}
    if len(devices) != 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        raise ValueError(f"{op}: expected all tensors on one device, got {where}; move them with .to(device)")
    device = devices.pop()
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f'{op}: Triton kernels need CUDA tensors, got {device}; use impl="torch" or impl="cpp" here, '
            "or set TRITON_INTERPRET=1 before triton is imported to interpret them"
        )
    for name, tensor in present.items():
        if tensor.dtype == torch.float64 and not INTERPRETED:
            raise ValueError(f'{op}: {name} is float64, which the Triton kernels do not support; use impl="torch"')
        if tensor.dtype == torch.bfloat16 and INTERPRETED:
            raise ValueError(
                f"{op}: {name} is bfloat16, which Triton's interpreter computes wrongly; "
                "use float32 or float16 under TRITON_INTERPRET=1"
            )


def check_tokens(op: str, tokens: torch.Tensor) -> None:
    if tokens.dim() != 2 or (tokens.shape[1] > 1 and tokens.stride(1) != 1):
        raise ValueError(
            f"{op}: expected tokens (T, D) with contiguous channels, got shape {tuple(tokens.shape)} and strides "
            f"{tokens.stride()}; call .contiguous()"
        )


def check_taps(op: str, tap_index: torch.Tensor | None, tap_weight: torch.Tensor | None) -> None:
    if (tap_index is None) != (tap_weight is None):
        raise ValueError(f"{op}: expected both tap_index and tap_weight or neither, got one; pass the plan's pair")
    if tap_index is not None and tap_index.shape[2] > MAX_CELLS_PER_SIDE:
        raise ValueError(
            f"{op}: expected at most {MAX_CELLS_PER_SIDE} cells per side, got {tap_index.shape[2]}; "
            'use a smaller output_size or impl="torch"'
        )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a property read once, no synchronisation."""
    if device.type != "cuda":
        return H200_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor):
    """Make the tensor's device current: Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, weights and sums are kept in: float32, or float64 for float64 (interpreter only)."""
    return torch.promote_types(dtype, torch.float32)
