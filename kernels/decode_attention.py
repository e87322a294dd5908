"""Attention of one decode step: rotary embedding, cache write and grouped attention over the cache.

Suffixes: B rows (one new token each), N = (H + 2K) * E packed channels, H query heads, K key heads, C cache columns, E
head width. The queries of one key head fill the N side of both products, keys and channels the M side. Keys are cut
into splits, whose sums are added in order by a second launch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .checks import check_tensors, multiprocessors, on_device, wide_dtype
from .decode_launch import DecodeAttentionConfig, head_tile
from .decode_linear import check_rows, check_shape
from .decode_overlap import await_previous, overlap_options
from .launch import next_power_of_2


@triton.jit
def rotated(pointer, e, in_head, cos, sin, mask, HEAD: tl.constexpr):
    """x * cos + rotate_half(x) * sin of heads that start at `pointer`; `sin` carries the sign of the lower half."""
    partner = tl.where(e < HEAD // 2, e + HEAD // 2, e - HEAD // 2)
    x = tl.load(pointer + e, mask=mask & in_head, other=0.0).to(cos.dtype)
    other = tl.load(pointer + partner, mask=mask & in_head, other=0.0).to(cos.dtype)
    return x * cos + other * sin


@triton.jit(do_not_specialize=["capacity", "split_keys"])
def _rope_attention_kernel(
    qkv,
    cos,
    sin,
    lengths,
    keys,
    values,
    out,
    partial,
    statistics,
    capacity,
    split_keys,
    qkv_stride,
    rope_stride,
    out_stride,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    SCALE_LOG2: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of one row and key head. Grid (splits, key heads, rows).

    The new key is at index `length`, held by the split of that index: it starts from registers what the others start
    from nothing, and no program reads what another writes. Writes `out`, or if SPLIT the unnormalised sum to `partial`
    (B, H, splits, E) and the maximum (base 2) and sum of exponentials to `statistics` (B, H, splits, 2).
    """
    await_previous(OVERLAP)
    dtype: tl.constexpr = qkv.dtype.element_ty
    wide: tl.constexpr = statistics.dtype.element_ty
    split, kv, splits, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(lengths + b), capacity - 1).to(tl.int32)
    begin = split * split_keys
    if begin > length:
        return
    owns = (length < begin + split_keys) | (split == splits - 1)
    end = tl.where(owns, length, begin + split_keys)

    e = tl.arange(0, HEAD_TILE)
    in_head = e < HEAD
    cos_E = tl.load(cos + b * rope_stride + e, mask=in_head, other=0.0).to(wide)
    sin_E = tl.load(sin + b * rope_stride + e, mask=in_head, other=0.0).to(wide)
    sin_E = tl.where(e < HEAD // 2, -sin_E, sin_E)
    g = tl.arange(0, GROUP_TILE)
    in_group = g < GROUP
    base = qkv + b * qkv_stride
    q_pointer = base + (kv * GROUP + g)[:, None] * HEAD
    q = rotated(q_pointer, e[None, :], in_head[None, :], cos_E[None, :], sin_E[None, :], in_group[:, None], HEAD)
    q = q.to(dtype)  # [G, E]

    key_pointer = keys + b * key_row + kv.to(tl.int64) * key_head
    value_pointer = values + b * value_row + kv.to(tl.int64) * value_head
    new_key = rotated(base + (kv_heads * GROUP + kv) * HEAD, e, in_head, cos_E, sin_E, in_head, HEAD).to(dtype)
    new_value = tl.load(base + (kv_heads * (GROUP + 1) + kv) * HEAD + e, mask=in_head & owns, other=0.0)
    tl.store(key_pointer + length.to(tl.int64) * key_column + e, new_key, mask=in_head & owns)
    tl.store(value_pointer + length.to(tl.int64) * value_column + e, new_value, mask=in_head & owns)
    top = tl.sum(q.to(wide) * new_key.to(wide)[None, :], axis=1) * SCALE_LOG2
    top = tl.where(owns, top, float("-inf"))
    total = tl.where(owns, 1.0, 0.0).to(wide) + tl.zeros((GROUP_TILE,), dtype=wide)
    acc = tl.zeros((HEAD_TILE, GROUP_TILE), dtype=wide) + new_value.to(wide)[:, None]

    for start in range(begin, end, KEY_TILE):
        column = start + tl.arange(0, KEY_TILE)
        in_keys = column < end
        mask = in_keys[:, None] & in_head[None, :]
        column = column.to(tl.int64)[:, None]
        k = tl.load(key_pointer + column * key_column + e[None, :], mask=mask, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=wide) * SCALE_LOG2  # [C, G]
        scores = tl.where(in_keys[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(scores - safe[None, :])
        total = total * shrink + tl.sum(weight, axis=0)
        top = higher
        v = tl.load(value_pointer + column * value_column + e[None, :], mask=mask, other=0.0)
        acc *= shrink[None, :]
        acc = tl.dot(tl.trans(v), weight.to(dtype), acc, input_precision="ieee", out_dtype=wide)

    mask = in_head[:, None] & in_group[None, :]
    head = kv * GROUP + g
    if SPLIT:
        home = (b * (kv_heads * GROUP) + head) * splits + split
        tl.store(partial + home[None, :] * HEAD + e[:, None], acc, mask=mask)
        tl.store(statistics + home * 2, top, mask=in_group)
        tl.store(statistics + home * 2 + 1, total, mask=in_group)
    else:
        place = b * out_stride + head[None, :] * HEAD + e[:, None]
        tl.store(out + place, (acc / total[None, :]).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["capacity", "split_keys", "splits"])
def _combine_splits_kernel(
    partial,
    statistics,
    lengths,
    out,
    capacity,
    split_keys,
    splits,
    out_stride,
    HEAD: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add the splits of one head in order; those beyond the row's length wrote nothing. Grid (heads, rows)."""
    await_previous(OVERLAP)
    head, heads = tl.program_id(0), tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    length = tl.minimum(tl.load(lengths + b), capacity - 1)
    split = tl.arange(0, SPLIT_TILE)
    used = (split < splits) & (split * split_keys <= length)
    home = (b * heads + head) * splits + split
    top = tl.load(statistics + home * 2, mask=used, other=float("-inf"))
    total = tl.load(statistics + home * 2 + 1, mask=used, other=0.0)
    highest = tl.max(top, axis=0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    e = tl.arange(0, HEAD_TILE)
    in_head = e < HEAD
    sums = tl.load(partial + home[:, None] * HEAD + e[None, :], mask=used[:, None] & in_head[None, :], other=0.0)
    value = tl.sum(sums * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out + b * out_stride + head * HEAD + e, value.to(out.dtype.element_ty), mask=in_head)


def rope_attention(
    qkv_BN: torch.Tensor,
    cos_BE: torch.Tensor,
    sin_BE: torch.Tensor,
    length_B: torch.Tensor,
    keys_BKCE: torch.Tensor,
    values_BKCE: torch.Tensor,
    out_BN: torch.Tensor,
    *,
    scale: float,
    extent: int,
    config: DecodeAttentionConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Rotate the new queries and keys, append key and value to the cache, attend over the row's whole cache.

    One launch where one program per row and key head is enough, else two. Columns beyond a row's length are never read.

    Args:
        qkv_BN: per row `[q (H*E) | k (K*E) | v (K*E)]`, any row stride.
        cos_BE, sin_BE: float32 or the dtype of qkv; `x * cos + rotate_half(x) * sin` with the halves of a head swapped.
        length_B: `(B,)` int64, keys already cached; the new one goes to column `min(length, C - 1)`.
        keys_BKCE, values_BKCE: the caches, views with contiguous E and any other stride, written at one column.
        out_BN: `(B, H*E)`.
        scale: factor of the scores, usually `E ** -0.5`.
        extent: columns the splits are sized for, at least `max(length) + 1` for an even share; a longer row is still
            right, its last split just takes the rest.
        config: default `DecodeAttentionConfig.from_shape(...)`; overlap: see `decode_overlap.py`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "rope_attention"
    rows, kv_heads, heads, head_size, capacity = _check(
        op, qkv_BN, cos_BE, sin_BE, length_B, keys_BKCE, values_BKCE, out_BN, extent
    )
    if rows == 0:
        return out_BN
    config = config or DecodeAttentionConfig.from_shape(
        rows, kv_heads, extent, qkv_BN.element_size(), multiprocessors(qkv_BN.device)
    )
    splits, group, tile = config.splits, heads // kv_heads, head_tile(head_size)
    split_keys = config.split_keys(extent)
    pace = overlap_options(op, overlap, qkv_BN)
    wide = {"dtype": wide_dtype(qkv_BN.dtype), "device": qkv_BN.device}
    with on_device(qkv_BN):
        count = rows * heads * splits if splits > 1 else 0
        partial, statistics = torch.empty((count, head_size), **wide), torch.empty((count, 2), **wide)
        _rope_attention_kernel[(splits, kv_heads, rows)](
            qkv_BN, cos_BE, sin_BE, length_B, keys_BKCE, values_BKCE, out_BN, partial, statistics,
            capacity, split_keys, qkv_BN.stride(0), cos_BE.stride(0), out_BN.stride(0),
            *keys_BKCE.stride()[:3], *values_BKCE.stride()[:3],
            SCALE_LOG2=scale * math.log2(math.e), HEAD=head_size, HEAD_TILE=tile, GROUP=group,
            GROUP_TILE=max(next_power_of_2(group), 16), KEY_TILE=config.keys, SPLIT=splits > 1,
            **config.options, **pace,
        )  # fmt: skip
        if splits > 1:
            _combine_splits_kernel[(heads, rows)](
                partial, statistics, length_B, out_BN, capacity, split_keys, splits, out_BN.stride(0),
                HEAD=head_size, HEAD_TILE=tile, SPLIT_TILE=next_power_of_2(splits),
                num_warps=4, enable_fp_fusion=True, **pace,
            )  # fmt: skip
    return out_BN


def _check(op, qkv, cos, sin, length, keys, values, out, extent):
    """Refuse what does not fit; returns rows, key heads, query heads, head width and cache columns."""
    check_rows(op, qkv=qkv, out=out, cos=cos, sin=sin)
    rows = qkv.shape[0]
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[0] != rows or keys.shape[2] == 0:
        raise ValueError(
            f"{op}: expected keys and values ({rows}, K, C, E), got {tuple(keys.shape)} and {tuple(values.shape)}; "
            "pass views of the cache's own rows"
        )
    _, kv_heads, capacity, head_size = keys.shape
    if keys.stride(3) != 1 or values.stride(3) != 1 or head_size % 2:
        raise ValueError(
            f"{op}: expected caches with contiguous heads of even width, got strides {keys.stride()}, "
            f"{values.stride()} and width {head_size}; copies would not be written back, so change the cache's layout"
        )
    heads = out.shape[1] // head_size
    if out.shape[1] % head_size or kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: expected out (B, H*{head_size}) with H a multiple of the {kv_heads} key heads, got "
            f"{tuple(out.shape)}; check the head width"
        )
    check_shape(op, "out_BN", out, (rows, heads * head_size), qkv.dtype)
    check_shape(op, "qkv_BN", qkv, (rows, (heads + 2 * kv_heads) * head_size), keys.dtype)
    check_shape(op, "values_BKCE", values, tuple(keys.shape), qkv.dtype)
    if cos.dtype not in (qkv.dtype, wide_dtype(qkv.dtype)) or cos.stride(0) != sin.stride(0):
        raise ValueError(
            f"{op}: expected cos and sin in {qkv.dtype} or {wide_dtype(qkv.dtype)} with one row stride, got "
            f"{cos.dtype} and strides {cos.stride()}, {sin.stride()}; convert both alike"
        )
    check_shape(op, "cos_BE", cos, (rows, head_size), cos.dtype)
    check_shape(op, "sin_BE", sin, (rows, head_size), cos.dtype)
    check_shape(op, "length_B", length, (rows,), torch.int64)
    if extent < 1 or not length.is_contiguous():
        raise ValueError(f"{op}: expected extent >= 1 and contiguous lengths, got {extent}; pass max(length) + 1")
    check_tensors(op, qkv_BN=qkv, cos_BE=cos, sin_BE=sin, keys_BKCE=keys, values_BKCE=values, out_BN=out)
    check_tensors(op, qkv_BN=qkv, length_B=length)
    return rows, kv_heads, heads, head_size, capacity
