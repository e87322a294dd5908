"""RoI-Align of the packed tokens' channels, and its transpose, for callers that want the cells themselves.

`region_attention` samples scores instead and never makes these. Suffixes: T tokens, B boxes, P cells per side,
C = P*P, K taps per axis, D width. Sums run in tap order and, in the backward pass, in box order: no atomics,
deterministic, no device value is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_taps, check_tensors, check_tokens, on_device, wide_dtype
from .launch import CELL_GRADIENT_TILE, CELL_TILE, ceil_div, next_power_of_2, token_grid
from .region_cells import axis_weight
from .spans import load_span, next_touching_box

_BOX_STEP = 128


@triton.jit(do_not_specialize=["num_boxes"])
def _roi_align_kernel(
    tokens,
    out,
    spans,
    tap_index,
    tap_weight,
    num_boxes,
    depth,
    token_stride,
    side,
    taps,
    SIDE_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
):
    """out[b, py*P + px, d] for one row of cells. Grid (boxes * P, channel tiles)."""
    wide = tap_weight.dtype.element_ty
    box = tl.program_id(0) // side
    cell_row = tl.program_id(0) % side
    first, stride, _, _, _ = load_span(spans, box)
    column = tl.arange(0, SIDE_TILE)
    in_side = column < side
    d = tl.program_id(1) * DEPTH_TILE + tl.arange(0, DEPTH_TILE)
    in_depth = d < depth
    size = side * taps
    y_tap = box.to(tl.int64) * size + cell_row * taps
    x_tap = (box + num_boxes).to(tl.int64) * size + column * taps
    acc = tl.zeros((SIDE_TILE, DEPTH_TILE), dtype=wide)
    for i in range(taps):
        y = tl.load(tap_index + y_tap + i)
        y_weight = tl.load(tap_weight + y_tap + i)
        for j in range(taps):
            x = tl.load(tap_index + x_tap + j, mask=in_side, other=0)
            weight = y_weight * tl.load(tap_weight + x_tap + j, mask=in_side, other=0.0)
            token = first + y * stride + x
            used = (weight != 0.0)[:, None] & in_depth[None, :]  # padding taps are not read
            value = tl.load(tokens + token[:, None] * token_stride + d[None, :], mask=used, other=0.0)
            acc += weight[:, None] * value.to(wide)
    cell = tl.program_id(0).to(tl.int64) * side + column
    mask = in_side[:, None] & in_depth[None, :]
    tl.store(out + cell[:, None] * depth + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_boxes", "num_tokens"])
def _roi_align_backward_kernel(
    grad,
    out,
    spans,
    tap_index,
    tap_weight,
    num_boxes,
    num_tokens,
    depth,
    side,
    taps,
    TOKEN_TILE: tl.constexpr,
    SIDE_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    BOX_STEP: tl.constexpr,
):
    """out[t, d] = sum over boxes and cells of (the cell's weight on t) * grad.

    Grid (token tiles * channel tiles,), channels fastest: only the first axis holds more than 65535 programs.
    """
    wide = tap_weight.dtype.element_ty
    depth_tiles = tl.cdiv(depth, DEPTH_TILE)
    token_begin = tl.program_id(0) // depth_tiles * TOKEN_TILE
    token = token_begin + tl.arange(0, TOKEN_TILE)
    d = tl.program_id(0) % depth_tiles * DEPTH_TILE + tl.arange(0, DEPTH_TILE)
    in_depth = d < depth
    column = tl.arange(0, SIDE_TILE)
    in_side = column < side
    size = side * taps
    acc = tl.zeros((TOKEN_TILE, DEPTH_TILE), dtype=wide)
    for box_begin in range(0, num_boxes, BOX_STEP):
        boxes = box_begin + tl.arange(0, BOX_STEP)
        box = next_touching_box(spans, num_boxes, boxes, -1, token_begin, token_begin + TOKEN_TILE)
        while box < num_boxes:
            first, stride, height, width, _ = load_span(spans, box)
            local = token - first.to(tl.int32)
            inside = (local >= 0) & (local // stride < height) & (local % stride < width) & (token < num_tokens)
            y = tl.where(inside, local // stride, -2)
            column_tap = (
                (box + num_boxes).to(tl.int64) * size
                + column[None, :] * taps
                + tl.zeros((TOKEN_TILE, 1), dtype=tl.int32)
            )
            x = (local % stride)[:, None] + tl.zeros((1, SIDE_TILE), dtype=tl.int32)
            x_weight = axis_weight(tap_index, tap_weight, column_tap, taps, in_side[None, :], x)  # [tokens, P]
            part = tl.zeros((TOKEN_TILE, DEPTH_TILE), dtype=wide)
            for cell_row in range(side):
                row_tap = box.to(tl.int64) * size + cell_row * taps
                y_weight = axis_weight(tap_index, tap_weight, row_tap, taps, row_tap >= 0, y)  # [tokens]
                if tl.max((y_weight != 0.0).to(tl.int32), axis=0) > 0:
                    cell = ((box.to(tl.int64) * side + cell_row) * side + column)[:, None]
                    g = tl.load(grad + cell * depth + d[None, :], mask=in_side[:, None] & in_depth[None, :], other=0.0)
                    # Tap weights in 16 bits would cost accuracy: the product stays in float32.
                    part = tl.dot(
                        x_weight * y_weight[:, None], g.to(wide), part, input_precision="ieee", out_dtype=wide
                    )
            acc += tl.where(inside[:, None], part, 0.0)
            box = next_touching_box(spans, num_boxes, boxes, box, token_begin, token_begin + TOKEN_TILE)
    mask = (token < num_tokens)[:, None] & in_depth[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * depth + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


def roi_align(tokens: torch.Tensor, spans: torch.Tensor, tap_index: torch.Tensor, tap_weight: torch.Tensor):
    """RoI-Align cells of each box.

    Args:
        tokens: `(T, D)`, channels contiguous. spans: `(B, 5)` int64.
        tap_index, tap_weight: `(2, B, P, K)` int64 and float32.

    Returns:
        `(B, P*P, D)` in the dtype of tokens, summed in float32.
    """
    check_tokens("roi_align", tokens)
    check_taps("roi_align", tap_index, tap_weight)
    check_tensors("roi_align", tokens=tokens, spans=spans, tap_index=tap_index, tap_weight=tap_weight)
    boxes, side, taps = spans.shape[0], tap_index.shape[2], tap_index.shape[3]
    depth, tile = tokens.shape[1], CELL_TILE
    out = tokens.new_empty((boxes, side * side, depth))
    if out.numel() == 0:
        return out
    weight = tap_weight.to(wide_dtype(tokens.dtype)).contiguous()
    with on_device(tokens):
        _roi_align_kernel[(boxes * side, ceil_div(depth, tile.depth))](
            tokens, out, spans, tap_index.contiguous(), weight, boxes, depth, tokens.stride(0), side, taps,
            SIDE_TILE=next_power_of_2(side), DEPTH_TILE=tile.depth,
            **tile.options,
        )  # fmt: skip
    return out


def roi_align_backward(
    grad: torch.Tensor, spans: torch.Tensor, tap_index: torch.Tensor, tap_weight: torch.Tensor, num_tokens: int
):
    """Transpose of `roi_align`: grad `(B, P*P, D)` to `(num_tokens, D)`, zero where no cell reads."""
    check_taps("roi_align_backward", tap_index, tap_weight)
    check_tensors("roi_align_backward", grad=grad, spans=spans, tap_index=tap_index, tap_weight=tap_weight)
    boxes, side, taps = spans.shape[0], tap_index.shape[2], tap_index.shape[3]
    depth, tile = grad.shape[2], CELL_GRADIENT_TILE
    out = grad.new_empty((num_tokens, depth))
    if out.numel() == 0 or boxes == 0:
        return out.zero_()
    weight = tap_weight.to(wide_dtype(grad.dtype)).contiguous()
    with on_device(grad):
        _roi_align_backward_kernel[token_grid(num_tokens, depth, tile)](
            grad.contiguous(), out, spans, tap_index.contiguous(), weight, boxes, num_tokens, depth, side, taps,
            TOKEN_TILE=tile.tokens, SIDE_TILE=max(next_power_of_2(side), 16), DEPTH_TILE=tile.depth,
            BOX_STEP=_BOX_STEP, **tile.options,
        )  # fmt: skip
    return out
