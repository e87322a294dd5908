"""Programmatic dependent launch of the decode kernels: a kernel comes up while the one before it drains.

A step is some 150 launches of a few microseconds, so the gaps between them count. With `overlap` a kernel lets its
successor start as soon as all its own programs run, asks L2 for its first weights, which no kernel writes, and only
then waits for its predecessor's memory. Every kernel waits before its first read of an activation and before any write,
so the order of memory is that of plain launches. Needs compute capability 9.0; off unless asked for.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .checks import INTERPRETED

_LINE = tl.constexpr(128)  # bytes that one prefetch brings


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait until the previous one's writes are visible."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch_tiles(weight, column, columns, depth, LINES: tl.constexpr):
    """Ask L2 for the first LINES lines of each weight row of a program; nothing past the weight is touched."""
    width: tl.constexpr = _LINE // (weight.dtype.element_ty.primitive_bitwidth // 8)
    k = tl.minimum(tl.arange(0, LINES) * width, depth - 1)
    place = tl.minimum(column, columns - 1).to(tl.int64)[:, None] * depth + k[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [weight + place], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def await_with_weights(
    first, second, column, columns, depth, PAIR: tl.constexpr, DEPTH_TILE: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """`await_previous`, with the first two steps of each weight on their way meanwhile."""
    if OVERLAP:
        lines: tl.constexpr = 2 * DEPTH_TILE * (first.dtype.element_ty.primitive_bitwidth // 8) // _LINE
        gdc_launch_dependents()
        prefetch_tiles(first, column, columns, depth, lines)
        if PAIR:
            prefetch_tiles(second, column, columns, depth, lines)
        gdc_wait()


def overlap_options(op: str, overlap: bool, tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel with or without overlap; the interpreter has nothing to overlap."""
    if not overlap or INTERPRETED:
        return {"OVERLAP": False}
    if _capability(tensor.device) < (9, 0):
        raise ValueError(
            f"{op}: overlap needs compute capability 9.0, got {'.'.join(map(str, _capability(tensor.device)))}; "
            "pass overlap=False"
        )
    return {"OVERLAP": True, "launch_pdl": True}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
