"""Device-side geometry shared by the region kernels: which box a program works on, where its tokens lie.

`spans (B, 5)` int64 holds `[first, stride, height, width, key_offset]` per box; key j of a box is the token
`first + (j // width) * stride + j % width`. Key and token counts are below 2^31 (int32 arithmetic, cheap division);
element offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def box_of_slot(spans, num_boxes, slot, tile):
    """Box that owns program `slot` when box b owns the slots from `key_offset // tile + b`."""
    low = slot * 0
    high = low + num_boxes
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(spans + middle * 5 + 4).to(tl.int32) // tile + middle
        low = tl.where(start <= slot, middle, low)
        high = tl.where(start <= slot, high, middle)
    return low


@triton.jit
def load_span(spans, box):
    """first (int64), stride, height, width, key_offset of one box."""
    span = spans + box * 5
    first = tl.load(span)
    stride = tl.load(span + 1).to(tl.int32)
    height = tl.load(span + 2).to(tl.int32)
    width = tl.load(span + 3).to(tl.int32)
    offset = tl.load(span + 4).to(tl.int32)
    return first, stride, height, width, offset


@triton.jit
def tile_of_slot(spans, num_boxes, tile):
    """Box of this program, its first slot, and its first key's position inside the box."""
    slot = tl.program_id(0)
    box = box_of_slot(spans, num_boxes, slot, tile)
    first_slot = tl.load(spans + box * 5 + 4).to(tl.int32) // tile + box
    return slot, box, first_slot, (slot - first_slot) * tile


@triton.jit
def next_touching_box(spans, num_boxes, boxes, after, token_begin, token_end):
    """First box id in `boxes` above `after` whose token range meets [token_begin, token_end); `num_boxes` if none."""
    valid = boxes < num_boxes
    span = spans + boxes * 5
    first = tl.load(span, mask=valid, other=0)
    stride = tl.load(span + 1, mask=valid, other=0)
    height = tl.load(span + 2, mask=valid, other=0)
    width = tl.load(span + 3, mask=valid, other=0)
    touches = valid & (first < token_end) & (first + (height - 1) * stride + width > token_begin) & (boxes > after)
    return tl.min(tl.where(touches, boxes, num_boxes), axis=0)
