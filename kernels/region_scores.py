"""Kernels from tokens to attention weights: score products, the softmax over a region, the mean over heads.

Suffix legend: S packed keys, R query rows, D width, B boxes. Weights and scores are kept `(S, R)` in float32
(float64 in the interpreter, for float64 tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .spans import load_span, tile_of_slot


@triton.jit(do_not_specialize=["num_boxes", "num_keys", "depth_splits"])
def _region_scores_kernel(
    tokens,
    rows,
    spans,
    out,
    num_boxes,
    num_keys,
    num_rows,
    depth,
    token_stride,
    row_stride,
    depth_splits,
    KEY_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """out[split, s, r] = tokens[key s] . rows[box, r] over the split's channels. Grid (slots, row blocks, splits)."""
    wide = out.dtype.element_ty
    _, box, _, begin = tile_of_slot(spans, num_boxes, KEY_TILE)
    first, stride, height, width, offset = load_span(spans, box)
    count = height * width
    if begin >= count:
        return
    key = begin + tl.arange(0, KEY_TILE)
    in_box = key < count
    token = first + (key // width).to(tl.int64) * stride + key % width
    r = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    token_pointer = tokens + token[:, None] * token_stride
    row_pointer = rows + box.to(tl.int64) * row_stride + r.to(tl.int64)[:, None] * depth

    split = tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(depth, DEPTH_TILE), depth_splits)
    d_begin = split * steps * DEPTH_TILE
    d_end = tl.minimum(d_begin + steps * DEPTH_TILE, depth)
    acc = tl.zeros((KEY_TILE, ROW_TILE), dtype=wide)
    for d_start in range(d_begin, d_end, DEPTH_TILE):
        d = d_start + tl.arange(0, DEPTH_TILE)
        in_depth = d < depth
        x = tl.load(token_pointer + d[None, :], mask=in_box[:, None] & in_depth[None, :], other=0.0)
        q = tl.load(row_pointer + d[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(q), acc, input_precision="ieee", out_dtype=wide)
    packed = split.to(tl.int64) * num_keys + offset + key
    tl.store(out + packed[:, None] * num_rows + r[None, :], acc, mask=in_box[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["num_boxes", "num_keys", "depth_splits", "map_heads"])
def _region_statistics_kernel(
    partial,
    out,
    weights,
    grad_maps,
    peak,
    total,
    spans,
    num_boxes,
    num_keys,
    num_rows,
    depth_splits,
    map_heads,
    KEY_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_MAPS: tl.constexpr,
):
    """Finish a tile: sum the depth splits in order, add the maps' gradient, reduce the tile. Grid (slots, row blocks).

    STATISTICS "softmax" writes the tile's maximum to `peak` and its sum of exponentials to `total`, both (slots, R);
    "product" writes sum(weights * out) to `total`; "none" writes neither.
    """
    slot, box, _, begin = tile_of_slot(spans, num_boxes, KEY_TILE)
    _, _, height, width, offset = load_span(spans, box)
    count = height * width
    if begin >= count:
        return
    key = begin + tl.arange(0, KEY_TILE)
    r = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    mask = (key < count)[:, None] & in_rows[None, :]
    packed = (offset + key).to(tl.int64)
    place = packed[:, None] * num_rows + r[None, :]
    value = tl.zeros((KEY_TILE, ROW_TILE), dtype=out.dtype.element_ty)
    split_size = num_keys.to(tl.int64) * num_rows
    for split in range(depth_splits):
        value += tl.load(partial + split * split_size + place, mask=mask, other=0.0)
    if HAS_MAPS:
        queries = num_rows // map_heads
        map_place = packed[:, None] * queries + (r % queries)[None, :]
        value += tl.load(grad_maps + map_place, mask=mask, other=0.0) / map_heads
    tl.store(out + place, value, mask=mask)
    stat_place = slot.to(tl.int64) * num_rows + r
    if STATISTICS == "softmax":
        value = tl.where(mask, value, float("-inf"))
        top = tl.max(value, axis=0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        tl.store(peak + stat_place, top, mask=in_rows)
        tl.store(total + stat_place, tl.sum(tl.exp(value - safe[None, :]), axis=0), mask=in_rows)
    if STATISTICS == "product":
        weight = tl.load(weights + place, mask=mask, other=0.0)
        tl.store(total + stat_place, tl.sum(weight * value, axis=0), mask=in_rows)


@triton.jit(do_not_specialize=["num_boxes"])
def _region_normalise_kernel(
    scores,
    out,
    weights,
    peak,
    total,
    spans,
    num_boxes,
    num_rows,
    KEY_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    SLOT_STEP: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Softmax of a tile from its box's tile statistics, or its gradient `weights * (scores - sum)`.

    `out` may be `scores`: a program reads and writes only its own tile. Grid (slots, row blocks).
    """
    wide = out.dtype.element_ty
    _, box, first_slot, begin = tile_of_slot(spans, num_boxes, KEY_TILE)
    _, _, height, width, offset = load_span(spans, box)
    count = height * width
    if begin >= count:
        return
    r = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    in_rows = r < num_rows
    slots = tl.cdiv(count, KEY_TILE)
    top = tl.full((ROW_TILE,), float("-inf"), dtype=wide)
    safe = tl.zeros((ROW_TILE,), dtype=wide)
    norm = tl.zeros((ROW_TILE,), dtype=wide)
    for start in range(0, slots, SLOT_STEP):
        step = start + tl.arange(0, SLOT_STEP)
        step_mask = (step < slots)[:, None] & in_rows[None, :]
        place = (first_slot + step).to(tl.int64)[:, None] * num_rows + r[None, :]
        sums = tl.load(total + place, mask=step_mask, other=0.0)
        if BACKWARD:
            norm += tl.sum(sums, axis=0)
        else:
            tops = tl.load(peak + place, mask=step_mask, other=float("-inf"))
            higher = tl.maximum(top, tl.max(tops, axis=0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            norm = norm * tl.exp(top - safe) + tl.sum(sums * tl.exp(tops - safe[None, :]), axis=0)
            top = higher
    key = begin + tl.arange(0, KEY_TILE)
    mask = (key < count)[:, None] & in_rows[None, :]
    place = (offset + key).to(tl.int64)[:, None] * num_rows + r[None, :]
    value = tl.load(scores + place, mask=mask, other=0.0)
    if BACKWARD:
        value = tl.load(weights + place, mask=mask, other=0.0) * (value - norm[None, :])
    else:
        value = tl.exp(value - safe[None, :]) / norm[None, :]
    tl.store(out + place, value, mask=mask)


@triton.jit(do_not_specialize=["num_keys", "map_heads"])
def _head_mean_kernel(
    weights, maps, num_keys, queries, map_heads, KEY_TILE: tl.constexpr, QUERY_TILE: tl.constexpr
):  # fmt: skip
    """maps[s, q] = mean over h of weights[s, h * queries + q]. Grid (key tiles, query blocks)."""
    key = tl.program_id(0).to(tl.int64) * KEY_TILE + tl.arange(0, KEY_TILE)
    query = tl.program_id(1) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    mask = (key < num_keys)[:, None] & (query < queries)[None, :]
    acc = tl.zeros((KEY_TILE, QUERY_TILE), dtype=maps.dtype.element_ty)
    for head in range(map_heads):
        place = key[:, None] * (queries * map_heads) + head * queries + query[None, :]
        acc += tl.load(weights + place, mask=mask, other=0.0)
    tl.store(maps + key[:, None] * queries + query[None, :], acc / map_heads, mask=mask)
