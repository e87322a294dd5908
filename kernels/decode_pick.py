"""The end of a decode step: vocabulary projection with the choice of a token fused, so logits are never written.

Suffixes: B rows, D width, V vocabulary. Rows are projected only if some row is `needed`: inside a CUDA graph that is
how latent steps skip a gigabyte of weights. Choices are arg-maxima; sampling adds Gumbel noise from a counter, so it
needs no state, no sort and no second pass over the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_tensors, on_device, wide_dtype
from .decode_launch import ProductConfig, product_programs
from .decode_linear import check_rows, check_shape, check_weights, default_config, rows_of_program, tile_products
from .decode_overlap import await_previous, overlap_options

_REDUCE_STEP = 1024
_REDUCE = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def mixed(x):
    """SplitMix64's finaliser on uint64."""
    x ^= x >> 30
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(key, v):
    """Standard Gumbel noise number v of a key (uint64): 23 random bits, centred, so both logarithms are finite."""
    x = mixed(key + (v.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
    u = ((x >> 41).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(u))


@triton.jit
def divided(a, b):
    """a / b rounded as the host rounds it; Triton's own division is an approximation in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit(do_not_specialize=["num_rows"])
def _lm_head_pick_kernel(
    x,
    weight,
    needed,
    seen,
    penalty,
    temperature,
    sample,
    key,
    value_out,
    index_out,
    num_rows,
    columns,
    depth,
    x_stride,
    seen_stride,
    PENALISE: tl.constexpr,
    SAMPLE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Best score of each row within a tile of the vocabulary, and its lowest index. Grid (tiles, row blocks).

    `value_out` and `index_out` are (B, tiles). NaN scores count as -inf.
    """
    await_previous(OVERLAP)
    row, in_rows = rows_of_program(num_rows, ROW_TILE)
    wanted = tl.load(needed + row, mask=in_rows, other=0).to(tl.int32)
    if tl.max(wanted, axis=0) == 0:
        return
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    in_columns = column < columns
    scores, _ = tile_products(
        x, x, weight, weight, row, in_rows, column, in_columns, depth, x_stride,
        0.0, False, False, COLUMN_TILE, DEPTH_TILE, ROW_TILE, STAGES,
    )  # fmt: skip
    if PENALISE:
        place = row.to(tl.int64)[None, :] * seen_stride + column[:, None]
        was_seen = tl.load(seen + place, mask=in_columns[:, None] & in_rows[None, :], other=0).to(tl.int32) != 0
        factor = tl.load(penalty + row, mask=in_rows, other=1.0).to(scores.dtype)[None, :]
        scores = tl.where(was_seen, tl.where(scores < 0, scores * factor, divided(scores, factor)), scores)
    if SAMPLE:
        drawn = tl.load(sample + row, mask=in_rows, other=0).to(tl.int32)
        # Temperatures of rows that do not sample may be anything, zero included.
        divisor = tl.load(temperature + row, mask=in_rows & (drawn != 0), other=1.0).to(scores.dtype)[None, :]
        row_key = tl.load(key + row, mask=in_rows, other=0).to(tl.uint64, bitcast=True)
        if tl.max(drawn, axis=0) != 0:
            noisy = divided(scores, divisor) + gumbel(row_key[None, :], column[:, None]).to(scores.dtype)
            scores = tl.where(drawn[None, :] != 0, noisy, scores)
    scores = tl.where((scores == scores) & in_columns[:, None], scores, float("-inf"))
    best = tl.max(scores, axis=0)
    index = tl.min(tl.where(scores == best[None, :], column[:, None], columns - 1), axis=0)
    place = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(value_out + place, best, mask=in_rows)
    tl.store(index_out + place, index, mask=in_rows)


@triton.jit(do_not_specialize=["tiles"])
def _pick_reduce_kernel(value, index, needed, token, tiles, STEP: tl.constexpr, OVERLAP: tl.constexpr):
    """token[b] = index of the best tile, the lowest on ties; rows not needed keep theirs. Grid (rows,)."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(needed + row).to(tl.int32) == 0:
        return
    slot = tl.arange(0, STEP)
    best = tl.load(value + row * tiles + slot, mask=slot < tiles, other=float("-inf"))
    best_index = tl.load(index + row * tiles + slot, mask=slot < tiles, other=2147483647)
    for start in range(STEP, tiles, STEP):
        mask = start + slot < tiles
        other = tl.load(value + row * tiles + start + slot, mask=mask, other=float("-inf"))
        other_index = tl.load(index + row * tiles + start + slot, mask=mask, other=2147483647)
        # Later tiles have higher indices: only a better value replaces.
        best_index = tl.where(other > best, other_index, best_index)
        best = tl.maximum(best, other)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), best_index, 2147483647), axis=0)
    tl.store(token + row, winner.to(tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _lm_head_logits_kernel(
    x,
    weight,
    needed,
    out,
    num_rows,
    columns,
    depth,
    x_stride,
    out_stride,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = x . weight^T unless no row of the block is needed. Grid (tiles, row blocks)."""
    await_previous(OVERLAP)
    row, in_rows = rows_of_program(num_rows, ROW_TILE)
    wanted = tl.load(needed + row, mask=in_rows, other=0).to(tl.int32)
    if tl.max(wanted, axis=0) == 0:
        return
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    in_columns = column < columns
    scores, _ = tile_products(
        x, x, weight, weight, row, in_rows, column, in_columns, depth, x_stride,
        0.0, False, False, COLUMN_TILE, DEPTH_TILE, ROW_TILE, STAGES,
    )  # fmt: skip
    place = row.to(tl.int64)[None, :] * out_stride + column[:, None]
    tl.store(out + place, scores, mask=in_columns[:, None] & in_rows[None, :])


def lm_head_pick(
    hidden_BD: torch.Tensor,
    weight_VD: torch.Tensor,
    needed_B: torch.Tensor,
    token_B: torch.Tensor,
    *,
    seen_BV: torch.Tensor | None = None,
    penalty_B: torch.Tensor | None = None,
    temperature_B: torch.Tensor | None = None,
    sample_B: torch.Tensor | None = None,
    key_B: torch.Tensor | None = None,
    config: ProductConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Choose the next token of each needed row, into `token_B`; two launches that return at once if no row is needed.

    Scores are float32 `hidden @ weight.T`; those of seen tokens are divided by the penalty (multiplied where negative);
    rows that sample are divided by their temperature and get Gumbel noise. The highest wins, on ties the lowest index.

    Args:
        hidden_BD: after the last norm, any row stride; weight_VD: contiguous, same dtype.
        needed_B: bool; token_B: int64, rows not needed keep their value.
        seen_BV: bool with contiguous rows, together with penalty_B, float32.
        temperature_B: float32, sample_B: bool, key_B: int64 bits of the draw's key; all three or none.
        config: default `ProductConfig.from_shape("vocabulary", ...)`; overlap: see `decode_overlap.py`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "lm_head_pick"
    sampling = {"temperature_B": temperature_B, "sample_B": sample_B, "key_B": key_B}
    penalising = {"seen_BV": seen_BV, "penalty_B": penalty_B}
    for together in (sampling, penalising):
        missing = [name for name, tensor in together.items() if tensor is None]
        if missing and len(missing) < len(together):
            raise ValueError(f"{op}: expected {', '.join(together)} together or none, got no {', '.join(missing)}")
    rows, columns, depth = _check(op, hidden_BD, weight_VD, needed_B)
    wide = wide_dtype(hidden_BD.dtype)
    vectors = {"token_B": (token_B, torch.int64), "penalty_B": (penalty_B, wide), "key_B": (key_B, torch.int64),
               "temperature_B": (temperature_B, wide), "sample_B": (sample_B, torch.bool)}  # fmt: skip
    for name, (tensor, dtype) in vectors.items():
        if tensor is not None:
            _check_vector(op, name, tensor, rows, dtype)
    if seen_BV is not None:
        check_rows(op, seen_BV=seen_BV)
        check_shape(op, "seen_BV", seen_BV, (rows, columns), torch.bool)
    check_tensors(op, hidden_BD=hidden_BD, token_B=token_B, **sampling, **penalising)
    config = config or default_config("vocabulary", hidden_BD, columns)
    grid = product_programs(config, rows, [columns])
    if rows == 0:
        return token_B
    with on_device(hidden_BD):
        value = torch.empty((rows, grid[0]), dtype=wide, device=hidden_BD.device)
        index = token_B.new_empty((rows, grid[0]), dtype=torch.int32)
        unused, pace = needed_B, overlap_options(op, overlap, hidden_BD)
        _lm_head_pick_kernel[grid](
            hidden_BD, weight_VD, needed_B, *(unused if t is None else t for t in penalising.values()),
            *(unused if t is None else t for t in sampling.values()), value, index,
            rows, columns, depth, hidden_BD.stride(0), 0 if seen_BV is None else seen_BV.stride(0),
            PENALISE=seen_BV is not None, SAMPLE=key_B is not None, **config.tiles, **config.options, **pace,
        )  # fmt: skip
        _pick_reduce_kernel[(rows,)](value, index, needed_B, token_B, grid[0], STEP=_REDUCE_STEP, **_REDUCE, **pace)
    return token_B


def lm_head_logits(
    hidden_BD: torch.Tensor,
    weight_VD: torch.Tensor,
    needed_B: torch.Tensor,
    logits_BV: torch.Tensor,
    *,
    config: ProductConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Write float32 `hidden @ weight.T` to `logits_BV` in one launch that returns at once if no row is needed.

    Args: as in `lm_head_pick`; rows of `logits_BV` that are not needed may be written or not.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "lm_head_logits"
    rows, columns, depth = _check(op, hidden_BD, weight_VD, needed_B)
    check_rows(op, logits_BV=logits_BV)
    check_shape(op, "logits_BV", logits_BV, (rows, columns), wide_dtype(hidden_BD.dtype))
    check_tensors(op, hidden_BD=hidden_BD, logits_BV=logits_BV)
    config = config or default_config("vocabulary", hidden_BD, columns)
    if rows:
        with on_device(hidden_BD):
            _lm_head_logits_kernel[product_programs(config, rows, [columns])](
                hidden_BD, weight_VD, needed_B, logits_BV, rows, columns, depth, hidden_BD.stride(0),
                logits_BV.stride(0), **config.tiles, **config.options, **overlap_options(op, overlap, hidden_BD),
            )  # fmt: skip
    return logits_BV


def _check(op, hidden, weight, needed):
    depth = check_rows(op, hidden_BD=hidden)[0]
    check_weights(op, hidden, depth, weight_VD=weight)
    check_shape(op, "weight_VD", weight, (weight.shape[0], depth), hidden.dtype)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: expected a vocabulary, got an empty weight; pass the output projection's weight")
    _check_vector(op, "needed_B", needed, hidden.shape[0], torch.bool)
    check_tensors(op, hidden_BD=hidden, weight_VD=weight, needed_B=needed)
    return hidden.shape[0], weight.shape[0], depth


def _check_vector(op, name, tensor, rows, dtype):
    check_shape(op, name, tensor, (rows,), dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: expected {name} contiguous, got stride {tensor.stride()}; call .contiguous()")
