"""Host side of the fused region attention: `attend` and `attend_backward`, from plain tensors to plain tensors.

Suffixes: T packed tokens, B boxes, S packed keys of all boxes, R = H*Q query rows, D width, P cells per side, K taps.
Grids and workspaces come from shapes alone, nothing here reads a device value, so calls can be captured in a CUDA
graph. Sums are taken in a fixed order without atomics: `torch.use_deterministic_algorithms` needs no other variant.

Per call: score products of key tiles, the softmax over each region (or over RoI cells and splatted back), then the
weighted sum of raw tokens. The backward pass runs the same kernels with the context's gradient as rows.
"""

from __future__ import annotations

import torch

from .checks import check_taps, check_tensors, check_tokens, multiprocessors, on_device, wide_dtype
from .launch import (
    ELEMENTWISE,
    MAX_BOXES,
    MAX_TOKENS,
    AttentionConfig,
    ceil_div,
    chunk_slots,
    next_power_of_2,
    row_tile,
    tile_slots,
    token_grid,
)
from .region_cells import _region_sample_kernel, _region_splat_kernel
from .region_context import _region_context_kernel, _sum_chunks_kernel, _token_gradient_kernel
from .region_scores import (
    _head_mean_kernel,
    _region_normalise_kernel,
    _region_scores_kernel,
    _region_statistics_kernel,
)

_SMALL = ELEMENTWISE.options
_STATISTICS_KEYS = 64
_STATISTICS_ROWS = 64
# 64 keys by 64 rows spill on sm_100 (ptxas, triton 3.7.1).
_SPLAT_KEYS = 32
_SLOT_STEP = 16
_BOX_STEP = 128
_SUM_BLOCK = 1024


def attend(rows, tokens, spans, key_box, tap_index, tap_weight, map_heads, *, config: AttentionConfig | None = None):
    """Attend from query rows to the raw tokens of each box's region.

    Args:
        rows: `(1, R, D)` shared or `(B, R, D)`, dtype of tokens, contiguous, softmax scale folded in.
        tokens: `(T, D)` bfloat16, float16 or float32, channels contiguous, any row stride.
        spans: `(B, 5)` int64; key_box: `(S,)` int32; see `spans.py`.
        tap_index, tap_weight: `(2, B, P, K)` int64 and float32 for RoI-Align, or None for windows.
        map_heads: heads to average the returned maps over, 0 for no maps.

    Returns:
        context `(B, R, D)` in the dtype of tokens; weights `(S, R)`; cells `(B, P*P, R)` or `(0,)`; maps
        `(S, R / map_heads)` or `(0,)`, the last three in float32.

    Raises:
        ValueError: mixed devices, a device without Triton, float64 on CUDA, bad shapes.
    """
    call = _Call("attend", rows, tokens, spans, key_box, tap_index, tap_weight, map_heads, config)
    with on_device(tokens):
        weights = call.wide_empty(call.keys, call.rows)
        cells = call.wide_empty(*call.cells_shape)
        context = tokens.new_empty((call.boxes, call.rows, call.depth))
        maps = call.wide_empty(*((call.keys, call.rows // map_heads) if map_heads else (0,)))
        if call.boxes == 0 or call.rows == 0:
            return context, weights, cells, maps
        if call.taps is None:
            peak, total = call.score(call.row_data, weights, "softmax")
            call.normalise(weights, weights, weights, peak, total, backward=False)
        else:
            scores = call.wide_empty(call.keys, call.rows)
            call.score(call.row_data, scores, "none")
            call.sample(scores, cells, cells, backward=False)
            call.splat(cells, weights)
        if map_heads:
            call.head_mean(weights, maps)
        call.weighted_sum(weights, context, packed=False)
    return context, weights, cells, maps


def attend_backward(
    grad_context, grad_maps, rows, tokens, weights, cells, spans, key_box, tap_index, tap_weight,
    map_heads, rows_grad, tokens_grad, *, config: AttentionConfig | None = None,
):  # fmt: skip
    """Gradients of `attend` from its saved weights and cells; scores are not needed again.

    Args:
        grad_context: `(B, R, D)`; grad_maps: `(S, R / map_heads)` or None; the others as in and out of `attend`.
        rows_grad, tokens_grad: which gradients are wanted.

    Returns:
        grad_rows in the shape of rows or `(0,)`; grad_tokens `(T, D)`, zero where no box is, or `(0,)`.
    """
    call = _Call("attend_backward", rows, tokens, spans, key_box, tap_index, tap_weight, map_heads, config)
    check_tensors("attend_backward", grad_context=grad_context, grad_maps=grad_maps, tokens=tokens, weights=weights)
    grad_context = grad_context.to(tokens.dtype).contiguous()
    weights, cells = weights.contiguous(), cells.contiguous()
    with on_device(tokens):
        grad_rows = rows.new_empty(rows.shape if rows_grad else (0,))
        grad_tokens = tokens.new_empty(tokens.shape if tokens_grad else (0,))
        if call.boxes == 0 or call.rows == 0:
            return grad_rows.zero_(), grad_tokens.zero_()
        grad_weights = call.wide_empty(call.keys, call.rows)
        grad_maps = None if grad_maps is None else grad_maps.contiguous()
        if call.taps is None:
            _, total = call.score(grad_context, grad_weights, "product", weights, grad_maps)
            grad_scores = grad_weights
            call.normalise(grad_weights, grad_scores, weights, total, total, backward=True)
        else:
            call.score(grad_context, grad_weights, "none", weights, grad_maps)
            grad_cells = torch.empty_like(cells)
            call.sample(grad_weights, cells, grad_cells, backward=True)
            grad_scores = call.wide_empty(call.keys, call.rows)
            call.splat(grad_cells, grad_scores)
        if rows_grad:
            call.weighted_sum(grad_scores, grad_rows, packed=rows.shape[0] == 1)
        if tokens_grad:
            call.token_gradient(weights, grad_context, grad_scores, grad_tokens)
    return grad_rows, grad_tokens


class _Call:
    """Shapes, checks and launches of one call; each method is one step on the device."""

    def __init__(self, op, rows, tokens, spans, key_box, tap_index, tap_weight, map_heads, config):
        check_tokens(op, tokens)
        check_taps(op, tap_index, tap_weight)
        check_tensors(
            op, rows=rows, tokens=tokens, spans=spans, key_box=key_box, tap_index=tap_index, tap_weight=tap_weight
        )
        self.boxes, self.keys = spans.shape[0], key_box.shape[0]
        self.rows, self.depth = rows.shape[1], tokens.shape[1]
        if rows.dtype != tokens.dtype or rows.shape[2] != self.depth or rows.shape[0] not in (1, self.boxes):
            raise ValueError(
                f"{op}: expected rows (1 or {self.boxes}, R, {self.depth}) of {tokens.dtype}, got {tuple(rows.shape)} "
                f"of {rows.dtype}; absorb the queries in the tokens' dtype"
            )
        if self.boxes > MAX_BOXES:
            raise ValueError(f"{op}: expected at most {MAX_BOXES} boxes in one call, got {self.boxes}; split the batch")
        if max(self.keys, tokens.shape[0]) > MAX_TOKENS:
            raise ValueError(
                f"{op}: expected at most {MAX_TOKENS} packed tokens and keys, got {tokens.shape[0]} and {self.keys}; "
                "split the pack"
            )
        if map_heads and self.rows % map_heads:
            raise ValueError(f"{op}: map_heads={map_heads} does not divide the {self.rows} query rows; pass the heads")
        self.row_data = rows.contiguous()
        self.tokens, self.spans, self.key_box = tokens, spans, key_box
        self.taps = None if tap_index is None else (tap_index.contiguous(), tap_weight.contiguous())
        self.side, self.tap_count = (0, 0) if tap_index is None else tap_index.shape[2:]
        self.cells_shape = (0,) if tap_index is None else (self.boxes, self.side**2, self.rows)
        self.map_heads = map_heads
        self.config = config or AttentionConfig.from_shape(
            self.keys, self.rows, self.depth, tokens.element_size(), multiprocessors(tokens.device)
        )

    def wide_empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=wide_dtype(self.tokens.dtype), device=self.tokens.device)

    def row_stride(self, rows: torch.Tensor) -> int:
        """Elements from one box's rows to the next: 0 when all boxes share them."""
        return self.rows * self.depth if rows.shape[0] == self.boxes else 0

    def score(self, rows, out, statistics, weights=None, grad_maps=None):
        """out (S, R) = tokens . rows (+ the maps' gradient); returns per-tile statistics for `normalise`."""
        tile, splits = self.config.scores, self.config.depth_splits
        row_block = row_tile(self.rows)
        finish = splits > 1 or statistics != "none" or grad_maps is not None
        partial = self.wide_empty(splits, self.keys, self.rows) if splits > 1 else out
        grid = (tile_slots(self.keys, self.boxes, tile.tokens), ceil_div(self.rows, row_block), splits)
        _region_scores_kernel[grid](
            self.tokens, rows, self.spans, partial, self.boxes, self.keys, self.rows, self.depth,
            self.tokens.stride(0), self.row_stride(rows), splits,
            KEY_TILE=tile.tokens, DEPTH_TILE=tile.depth, ROW_TILE=row_block,
            **tile.options,
        )  # fmt: skip
        if not finish:
            return None, None
        slots = tile_slots(self.keys, self.boxes, _STATISTICS_KEYS)
        total = self.wide_empty(slots, self.rows)
        peak = self.wide_empty(slots, self.rows) if statistics == "softmax" else total
        row_block = row_tile(self.rows, _STATISTICS_ROWS)
        _region_statistics_kernel[(slots, ceil_div(self.rows, row_block))](
            partial, out, out if weights is None else weights, out if grad_maps is None else grad_maps, peak, total,
            self.spans, self.boxes, self.keys, self.rows, splits, max(self.map_heads, 1),
            KEY_TILE=_STATISTICS_KEYS, ROW_TILE=row_block, STATISTICS=statistics, HAS_MAPS=grad_maps is not None,
            **_SMALL,
        )  # fmt: skip
        return peak, total

    def normalise(self, scores, out, weights, peak, total, *, backward: bool):
        row_block = row_tile(self.rows, _STATISTICS_ROWS)
        grid = (tile_slots(self.keys, self.boxes, _STATISTICS_KEYS), ceil_div(self.rows, row_block))
        _region_normalise_kernel[grid](
            scores, out, weights, peak, total, self.spans, self.boxes, self.rows,
            KEY_TILE=_STATISTICS_KEYS, ROW_TILE=row_block, SLOT_STEP=_SLOT_STEP, BACKWARD=backward, **_SMALL,
        )  # fmt: skip

    def sample(self, scores, cells, out, *, backward: bool):
        row_block = self.config.cell_rows
        cell_tile = next_power_of_2(self.side**2)
        row_block = max(min(row_block, 16384 // cell_tile), 1)
        _region_sample_kernel[(self.boxes, ceil_div(self.rows, row_block))](
            scores, cells, out, self.spans, *self.taps, self.boxes, self.rows, self.side, self.tap_count,
            CELL_TILE=cell_tile, ROW_TILE=row_block, BACKWARD=backward, **_SMALL,
        )  # fmt: skip

    def splat(self, cells, out):
        row_block = row_tile(self.rows, _STATISTICS_ROWS)
        grid = (tile_slots(self.keys, self.boxes, _SPLAT_KEYS), ceil_div(self.rows, row_block))
        _region_splat_kernel[grid](
            cells, out, self.spans, *self.taps, self.boxes, self.rows, self.side, self.tap_count,
            KEY_TILE=_SPLAT_KEYS, SIDE_TILE=max(next_power_of_2(self.side), 16), ROW_TILE=row_block, **_SMALL,
        )  # fmt: skip

    def head_mean(self, weights, maps):
        queries = self.rows // self.map_heads
        query_tile = min(next_power_of_2(queries), 64)
        key_tile = max(1024 // query_tile, 1)
        _head_mean_kernel[(ceil_div(self.keys, key_tile), ceil_div(queries, query_tile))](
            weights,
            maps,
            self.keys,
            queries,
            self.map_heads,
            KEY_TILE=key_tile,
            QUERY_TILE=query_tile,
            **_SMALL,
        )

    def weighted_sum(self, weights, out, *, packed: bool):
        """out[b] = weights^T tokens per box, or over all boxes together into out[0] when `packed`."""
        tile, chunk = self.config.context, self.config.chunk
        row_block = row_tile(self.rows)
        # A box holds at most all keys: one chunk of that size needs no workspace.
        split = chunk < self.keys
        workspace = self.wide_empty(chunk_slots(self.keys, chunk) if split else 0, self.rows, self.depth)
        slots = ceil_div(self.keys, chunk) if packed else tile_slots(self.keys, self.boxes, chunk)
        grid = (ceil_div(self.depth, tile.depth), slots, ceil_div(self.rows, row_block))
        _region_context_kernel[grid](
            self.tokens, weights, self.spans, self.key_box, out, workspace, self.boxes, self.keys, self.rows,
            self.depth, self.tokens.stride(0), chunk,
            KEY_STEP=tile.tokens, DEPTH_TILE=tile.depth, ROW_TILE=row_block, PACKED=packed,
            **tile.options,
        )  # fmt: skip
        if split:
            size = self.rows * self.depth
            _sum_chunks_kernel[(ceil_div(size, _SUM_BLOCK), 1 if packed else self.boxes)](
                workspace,
                self.spans,
                out,
                self.keys,
                size,
                chunk,
                BLOCK=_SUM_BLOCK,
                PACKED=packed,
                **_SMALL,
            )

    def token_gradient(self, weights, grad_context, grad_scores, out):
        tile = self.config.token_gradient
        rows = self.row_data
        _token_gradient_kernel[token_grid(self.tokens.shape[0], self.depth, tile)](
            weights, grad_context, grad_scores, rows, self.spans, out, self.boxes, self.tokens.shape[0], self.rows,
            self.depth, self.row_stride(rows),
            TOKEN_TILE=tile.tokens, DEPTH_TILE=tile.depth, ROW_TILE=row_tile(self.rows, 64), BOX_STEP=_BOX_STEP,
            **tile.options,
        )  # fmt: skip
