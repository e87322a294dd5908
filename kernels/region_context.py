"""Kernels from attention weights back to tokens: weighted sums over a region, and the tokens' gradient.

A weighted sum is cut into chunks of keys; boxes with more than one chunk go through a workspace whose slots are added
in key order. The tokens' gradient is gathered per token over the boxes in box order. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .spans import box_of_slot, load_span, next_touching_box


@triton.jit(do_not_specialize=["num_boxes", "num_keys"])
def _region_context_kernel(
    tokens,
    weights,
    spans,
    key_box,
    out,
    workspace,
    num_boxes,
    num_keys,
    num_rows,
    depth,
    token_stride,
    chunk,
    KEY_STEP: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out[b, r, d] = sum over keys of weights[s, r] * tokens[key s, d]. Grid (channel tiles, chunks, row blocks).

    PACKED sums over the keys of all boxes together into out[0]: the gradient of rows that all boxes share.
    """
    wide = workspace.dtype.element_ty
    slot = tl.program_id(1)
    if PACKED:
        box = slot * 0
        begin = slot * chunk
        offset = slot * 0
        count = num_keys
        first, stride, _, width, _ = load_span(spans, box)
    else:
        box = box_of_slot(spans, num_boxes, slot, chunk)
        first, stride, height, width, offset = load_span(spans, box)
        count = height * width
        begin = (slot - (offset // chunk + box)) * chunk
    if begin >= count:
        return
    end = tl.minimum(begin + chunk, count)
    r = tl.program_id(2) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    d = tl.program_id(0) * DEPTH_TILE + tl.arange(0, DEPTH_TILE)
    in_depth = d < depth
    acc = tl.zeros((DEPTH_TILE, ROW_TILE), dtype=wide)
    for start in range(begin, end, KEY_STEP):
        key = start + tl.arange(0, KEY_STEP)
        in_box = key < end
        if PACKED:
            owner = spans + tl.load(key_box + key, mask=in_box, other=0) * 5
            key_width = tl.load(owner + 3).to(tl.int32)
            local = tl.where(in_box, key - tl.load(owner + 4).to(tl.int32), 0)
            token = tl.load(owner) + (local // key_width).to(tl.int64) * tl.load(owner + 1) + local % key_width
        else:
            token = first + (key // width).to(tl.int64) * stride + key % width
        x = tl.load(
            tokens + token[:, None] * token_stride + d[None, :], mask=in_box[:, None] & in_depth[None, :], other=0.0
        )
        place = (offset + key).to(tl.int64)[:, None] * num_rows + r[None, :]
        w = tl.load(weights + place, mask=in_box[:, None] & in_rows[None, :], other=0.0)
        acc = tl.dot(tl.trans(x), w.to(x.dtype), acc, input_precision="ieee", out_dtype=wide)
    acc = tl.trans(acc)  # [R, D]: channels contiguous for the stores
    place = r.to(tl.int64)[:, None] * depth + d[None, :]
    mask = in_rows[:, None] & in_depth[None, :]
    size = num_rows * depth
    if count <= chunk:
        tl.store(out + box.to(tl.int64) * size + place, acc.to(out.dtype.element_ty), mask=mask)
    else:
        home = 2 * ((offset + begin) // chunk) + (begin == 0).to(tl.int32)
        tl.store(workspace + home.to(tl.int64) * size + place, acc, mask=mask)


@triton.jit(do_not_specialize=["num_keys"])
def _sum_chunks_kernel(
    workspace, spans, out, num_keys, size, chunk, BLOCK: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Add a box's chunks in key order; boxes with one chunk were written directly. Grid (element blocks, boxes)."""
    box = tl.program_id(1)
    if PACKED:
        offset = box * 0
        count = num_keys
    else:
        _, _, height, width, offset = load_span(spans, box)
        count = height * width
    if count <= chunk:
        return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    acc = tl.zeros((BLOCK,), dtype=workspace.dtype.element_ty)
    for begin in range(0, count, chunk):
        home = 2 * ((offset + begin) // chunk) + tl.where(begin == 0, 1, 0)
        acc += tl.load(workspace + home.to(tl.int64) * size + element, mask=mask, other=0.0)
    tl.store(out + box.to(tl.int64) * size + element, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_boxes", "num_tokens"])
def _token_gradient_kernel(
    weights,
    grad_context,
    grad_scores,
    rows,
    spans,
    out,
    num_boxes,
    num_tokens,
    num_rows,
    depth,
    row_stride,
    TOKEN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    BOX_STEP: tl.constexpr,
):
    """out[t, d] = sum over boxes of weights . grad_context + grad_scores . rows.

    Grid (token tiles * channel tiles,), channels fastest: only the first axis holds more than 65535 programs.
    """
    wide = weights.dtype.element_ty
    depth_tiles = tl.cdiv(depth, DEPTH_TILE)
    token_begin = tl.program_id(0) // depth_tiles * TOKEN_TILE
    token = token_begin + tl.arange(0, TOKEN_TILE)
    d = tl.program_id(0) % depth_tiles * DEPTH_TILE + tl.arange(0, DEPTH_TILE)
    in_depth = d < depth
    acc = tl.zeros((TOKEN_TILE, DEPTH_TILE), dtype=wide)
    for box_begin in range(0, num_boxes, BOX_STEP):
        boxes = box_begin + tl.arange(0, BOX_STEP)
        box = next_touching_box(spans, num_boxes, boxes, -1, token_begin, token_begin + TOKEN_TILE)
        while box < num_boxes:
            first, stride, height, width, offset = load_span(spans, box)
            local = token - first.to(tl.int32)
            y = local // stride
            x = local % stride
            inside = (local >= 0) & (y < height) & (x < width) & (token < num_tokens)
            key = tl.where(inside, offset + y * width + x, 0).to(tl.int64)
            part = tl.zeros((TOKEN_TILE, DEPTH_TILE), dtype=wide)
            for row_begin in range(0, num_rows, ROW_TILE):
                r = row_begin + tl.arange(0, ROW_TILE)
                in_rows = r < num_rows
                place = key[:, None] * num_rows + r[None, :]
                key_mask = inside[:, None] & in_rows[None, :]
                row_place = r.to(tl.int64)[:, None] * depth + d[None, :]
                row_mask = in_rows[:, None] & in_depth[None, :]
                g = tl.load(grad_context + box.to(tl.int64) * (num_rows * depth) + row_place, mask=row_mask, other=0.0)
                w = tl.load(weights + place, mask=key_mask, other=0.0).to(g.dtype)
                part = tl.dot(w, g, part, input_precision="ieee", out_dtype=wide)
                q = tl.load(rows + box.to(tl.int64) * row_stride + row_place, mask=row_mask, other=0.0)
                s = tl.load(grad_scores + place, mask=key_mask, other=0.0).to(q.dtype)
                part = tl.dot(s, q, part, input_precision="ieee", out_dtype=wide)
            # The product of a masked row is 0 * NaN when this box is broken: keep it out of its neighbours.
            acc += tl.where(inside[:, None], part, 0.0)
            box = next_touching_box(spans, num_boxes, boxes, box, token_begin, token_begin + TOKEN_TILE)
    place = token.to(tl.int64)[:, None] * depth + d[None, :]
    mask = (token < num_tokens)[:, None] & in_depth[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=mask)
