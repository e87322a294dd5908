"""Kernels that apply RoI-Align to score channels: sample to cells, softmax over cells, splat back to tokens.

`tap_index (2, B, P, K)` int64 and `tap_weight (2, B, P, K)` hold the rows (axis 0) and columns (axis 1) that each
of the P x P cells reads inside its box's rectangle. A tap of weight 0 is never read. Splatting gathers per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .spans import load_span, tile_of_slot


@triton.jit(do_not_specialize=["num_boxes"])
def _region_sample_kernel(
    scores,
    cells,
    out,
    spans,
    tap_index,
    tap_weight,
    num_boxes,
    num_rows,
    side,
    taps,
    CELL_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """out[b] (P*P, R) = softmax over cells of the sampled scores, or its gradient cells * (v - sum cells v).

    Grid (boxes, row blocks).
    """
    wide = out.dtype.element_ty
    box = tl.program_id(0)
    _, _, height, width, offset = load_span(spans, box)
    r = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    cell = tl.arange(0, CELL_TILE)
    in_cells = cell < side * side
    size = side * taps
    y_tap = box.to(tl.int64) * size + (cell // side) * taps
    x_tap = (box + num_boxes).to(tl.int64) * size + (cell % side) * taps
    value = tl.zeros((CELL_TILE, ROW_TILE), dtype=wide)
    for i in range(taps):
        y = tl.load(tap_index + y_tap + i, mask=in_cells, other=0).to(tl.int32)
        y_weight = tl.load(tap_weight + y_tap + i, mask=in_cells, other=0.0)
        for j in range(taps):
            x = tl.load(tap_index + x_tap + j, mask=in_cells, other=0).to(tl.int32)
            weight = y_weight * tl.load(tap_weight + x_tap + j, mask=in_cells, other=0.0)
            place = (offset + y * width + x).to(tl.int64)[:, None] * num_rows + r[None, :]
            used = (weight != 0.0)[:, None] & in_rows[None, :]
            value += weight[:, None] * tl.load(scores + place, mask=used, other=0.0)
    mask = in_cells[:, None] & in_rows[None, :]
    place = (box.to(tl.int64) * side * side + cell)[:, None] * num_rows + r[None, :]
    if BACKWARD:
        p = tl.load(cells + place, mask=mask, other=0.0)
        value = p * (value - tl.sum(p * value, axis=0)[None, :])
    else:
        value = tl.where(mask, value, float("-inf"))
        top = tl.max(value, axis=0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        value = tl.exp(value - safe[None, :])
        value = value / tl.sum(value, axis=0)[None, :]
    tl.store(out + place, value, mask=mask)


@triton.jit
def axis_weight(tap_index, tap_weight, first_tap, taps, valid, position):
    """Sum of the weights with which the taps starting at `first_tap` read `position`; shapes broadcast."""
    total = tl.zeros(position.shape, dtype=tap_weight.dtype.element_ty)
    for i in range(taps):
        index = tl.load(tap_index + first_tap + i, mask=valid, other=-1).to(tl.int32)
        weight = tl.load(tap_weight + first_tap + i, mask=valid, other=0.0)
        total += tl.where(index == position, weight, 0.0)
    return total


@triton.jit(do_not_specialize=["num_boxes"])
def _region_splat_kernel(
    cells,
    out,
    spans,
    tap_index,
    tap_weight,
    num_boxes,
    num_rows,
    side,
    taps,
    KEY_TILE: tl.constexpr,
    SIDE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """out[s, r] = sum over cells of (the cell's weight on key s) * cells[b, cell, r]. Grid (slots, row blocks)."""
    wide = out.dtype.element_ty
    _, box, _, begin = tile_of_slot(spans, num_boxes, KEY_TILE)
    _, _, height, width, offset = load_span(spans, box)
    count = height * width
    if begin >= count:
        return
    key = begin + tl.arange(0, KEY_TILE)
    in_box = key < count
    y = tl.where(in_box, key // width, -2)
    x = key % width
    r = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    column = tl.arange(0, SIDE_TILE)
    in_side = column < side
    size = side * taps
    column_tap = (
        (box + num_boxes).to(tl.int64) * size + column[None, :] * taps + tl.zeros((KEY_TILE, 1), dtype=tl.int32)
    )
    x_position = x[:, None] + tl.zeros((1, SIDE_TILE), dtype=tl.int32)
    x_weight = axis_weight(tap_index, tap_weight, column_tap, taps, in_side[None, :], x_position)  # [keys, P]
    acc = tl.zeros((KEY_TILE, ROW_TILE), dtype=wide)
    for cell_row in range(side):
        row_tap = box.to(tl.int64) * size + cell_row * taps
        y_weight = axis_weight(tap_index, tap_weight, row_tap, taps, row_tap >= 0, y)  # [keys]
        if tl.max((y_weight != 0.0).to(tl.int32), axis=0) > 0:
            cell = (box.to(tl.int64) * side + cell_row) * side + column
            p = tl.load(
                cells + cell[:, None] * num_rows + r[None, :], mask=in_side[:, None] & in_rows[None, :], other=0.0
            )
            acc = tl.dot(x_weight * y_weight[:, None], p, acc, input_precision="ieee", out_dtype=wide)
    place = (offset + key).to(tl.int64)[:, None] * num_rows + r[None, :]
    tl.store(out + place, acc, mask=in_box[:, None] & in_rows[None, :])
