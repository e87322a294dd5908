"""The linear layers of one decode step: a few rows against weights that are read once, with what surrounds them fused.

Suffixes: B rows (one token each), D model width, K input width, N output columns, I intermediate width. A program owns
a tile of weight rows, puts it on the M side of the product and walks the whole input width, so nothing is summed across
programs and results do not vary from run to run. The root mean square is taken in the same pass, applied at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .checks import check_tensors, multiprocessors, on_device
from .decode_launch import ProductConfig, product_programs
from .decode_overlap import await_previous, await_with_weights, overlap_options
from .launch import ceil_div, next_power_of_2

MAX_NORM_WIDTH = 65536


@triton.jit
def add_product(a, b, acc):
    """acc + a . b; of float32 each step is summed by itself.

    One chain of 18,944 additions would lose digits that a library's split sums keep. A plain `+` becomes that chain:
    the compiler makes the sum the product's accumulator. A fused multiply by one stays what it is.
    """
    if a.dtype.primitive_bitwidth >= 32:
        part = tl.dot(a, b, input_precision="ieee", out_dtype=acc.dtype)
        acc = tl.fma(part, tl.full(part.shape, 1.0, dtype=acc.dtype), acc)
    else:
        acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def tile_products(
    x,
    norm_weight,
    first,
    second,
    row,
    in_rows,
    column,
    in_columns,
    depth,
    x_stride,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of weight rows `column` with the (normalised) rows of x, both [COLUMN_TILE, ROW_TILE].

    The second is that of `second` if PAIR, else the first again.
    """
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    x_pointer = x + row.to(tl.int64)[:, None] * x_stride
    # Loads take the shape of what is accumulated: then threads keep the eight neighbours that one load gives them.
    if ROW_TILE >= 16:
        place = column.to(tl.int64)[:, None] * depth
        in_columns = in_columns[:, None]
    else:
        place = column.to(tl.int64)[None, :, None] * depth
        in_columns = in_columns[None, :, None]
    squares = tl.zeros((ROW_TILE, DEPTH_TILE), dtype=wide)
    if ROW_TILE >= 16:
        acc = tl.zeros((COLUMN_TILE, ROW_TILE), dtype=wide)
    else:
        acc = tl.zeros((ROW_TILE, COLUMN_TILE, DEPTH_TILE), dtype=wide)
    acc2 = acc
    for start in tl.range(0, depth, DEPTH_TILE, num_stages=STAGES):
        k = start + tl.arange(0, DEPTH_TILE)
        in_depth = k < depth
        if ROW_TILE >= 16:
            here = place + k[None, :]
            mask = in_columns & in_depth[None, :]
        else:
            here = place + k[None, None, :]
            mask = in_columns & in_depth[None, None, :]
        w = tl.load(first + here, mask=mask, other=0.0)
        if PAIR:
            w2 = tl.load(second + here, mask=mask, other=0.0)
        y = tl.load(x_pointer + k[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        if NORM:
            y = y.to(wide)
            squares += y * y
            y *= tl.load(norm_weight + k, mask=in_depth, other=0.0).to(wide)[None, :]
        if ROW_TILE >= 16:
            y = tl.trans(y.to(w.dtype))
            acc = add_product(w, y, acc)
            if PAIR:
                acc2 = add_product(w2, y, acc2)
        else:
            y = y.to(wide)[:, None, :]
            acc += w.to(wide) * y
            if PAIR:
                acc2 += w2.to(wide) * y
    if ROW_TILE < 16:
        acc = tl.trans(tl.sum(acc, axis=2))
        if PAIR:
            acc2 = tl.trans(tl.sum(acc2, axis=2))
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / depth + EPS)
        acc *= scale[None, :]
        if PAIR:
            acc2 *= scale[None, :]
    if not PAIR:
        acc2 = acc
    return acc, acc2


@triton.jit
def rows_of_program(num_rows, ROW_TILE: tl.constexpr):
    row = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    return row, row < num_rows


@triton.jit(do_not_specialize=["num_rows"])
def _norm_linear_kernel(
    x,
    norm_weight,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out,
    num_rows,
    depth,
    x_stride,
    out_stride,
    columns_0,
    columns_1,
    columns_2,
    biases_0,
    biases_1,
    biases_2,
    EPS: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = rmsnorm(x) . cat(weights)^T + cat(biases). Grid (column tiles, row blocks); a tile lies in one weight.

    `biases_i` is the length of bias i, 0 for none.
    """
    tile = tl.program_id(0)
    weight = weight_0
    bias = bias_0
    columns = columns_0
    biases = biases_0
    home = columns * 0
    tiles_0 = tl.cdiv(columns_0, COLUMN_TILE)
    tiles_1 = tl.cdiv(columns_1, COLUMN_TILE)
    if tile >= tiles_0 + tiles_1:
        weight = weight_2
        bias = bias_2
        columns = columns_2
        biases = biases_2
        home = columns_0 + columns_1
        tile -= tiles_0 + tiles_1
    elif tile >= tiles_0:
        weight = weight_1
        bias = bias_1
        columns = columns_1
        biases = biases_1
        home = columns_0
        tile -= tiles_0
    row, in_rows = rows_of_program(num_rows, ROW_TILE)
    column = tile * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    in_columns = column < columns
    await_with_weights(weight, weight, column, columns, depth, False, DEPTH_TILE, OVERLAP)
    acc, _ = tile_products(
        x, norm_weight, weight, weight, row, in_rows, column, in_columns, depth, x_stride,
        EPS, True, False, COLUMN_TILE, DEPTH_TILE, ROW_TILE, STAGES,
    )  # fmt: skip
    acc += tl.load(bias + column, mask=column < biases, other=0.0).to(acc.dtype)[:, None]
    place = row.to(tl.int64)[None, :] * out_stride + (home + column)[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=in_columns[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _linear_add_kernel(
    x,
    weight,
    residual,
    num_rows,
    columns,
    depth,
    x_stride,
    residual_stride,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """residual += x . weight^T, added in float32 and rounded once. Grid (column tiles, row blocks)."""
    row, in_rows = rows_of_program(num_rows, ROW_TILE)
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    in_columns = column < columns
    await_with_weights(weight, weight, column, columns, depth, False, DEPTH_TILE, OVERLAP)
    acc, _ = tile_products(
        x, x, weight, weight, row, in_rows, column, in_columns, depth, x_stride,
        0.0, False, False, COLUMN_TILE, DEPTH_TILE, ROW_TILE, STAGES,
    )  # fmt: skip
    place = residual + row.to(tl.int64)[None, :] * residual_stride + column[:, None]
    mask = in_columns[:, None] & in_rows[None, :]
    acc += tl.load(place, mask=mask, other=0.0).to(acc.dtype)
    tl.store(place, acc.to(residual.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_gate_up_kernel(
    x,
    norm_weight,
    gate,
    up,
    out,
    num_rows,
    columns,
    depth,
    x_stride,
    out_stride,
    EPS: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = silu(rmsnorm(x) . gate^T) * (rmsnorm(x) . up^T). Grid (column tiles, row blocks)."""
    row, in_rows = rows_of_program(num_rows, ROW_TILE)
    column = tl.program_id(0) * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    in_columns = column < columns
    await_with_weights(gate, up, column, columns, depth, True, DEPTH_TILE, OVERLAP)
    opening, value = tile_products(
        x, norm_weight, gate, up, row, in_rows, column, in_columns, depth, x_stride,
        EPS, True, True, COLUMN_TILE, DEPTH_TILE, ROW_TILE, STAGES,
    )  # fmt: skip
    value *= opening / (1.0 + tl.exp(-opening))
    place = row.to(tl.int64)[None, :] * out_stride + column[:, None]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=in_columns[:, None] & in_rows[None, :])


@triton.jit
def _rms_norm_kernel(
    x,
    norm_weight,
    out,
    depth,
    x_stride,
    out_stride,
    EPS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = rmsnorm(x), one program per row."""
    await_previous(OVERLAP)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DEPTH_TILE)
    in_depth = d < depth
    value = tl.load(x + row * x_stride + d, mask=in_depth, other=0.0).to(wide)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / depth + EPS)
    value *= tl.load(norm_weight + d, mask=in_depth, other=0.0).to(wide)
    tl.store(out + row * out_stride + d, value.to(out.dtype.element_ty), mask=in_depth)


def norm_linear(
    x_BD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out_BN: torch.Tensor,
    *,
    config: ProductConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Write `rmsnorm(x) @ cat(weights).T + cat(biases)` to `out_BN`, in one launch; the weights stay where they are.

    Args:
        x_BD, out_BN: rows with contiguous elements, any row stride, not overlapping.
        norm_weight_D: `(D,)` in the dtype of x.
        weights: one to three `(N_i, D)`, contiguous, in the dtype of x.
        biases: as many, each `(N_i,)` or None.
        config: default `ProductConfig.from_shape("linear", ...)`; overlap: see `decode_overlap.py`.

    In float16, `x * norm_weight` must stay below 65504 with `tl.dot`: the root mean square divides the product, not x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "norm_linear"
    if not 1 <= len(weights) <= 3 or len(biases) != len(weights):
        raise ValueError(
            f"{op}: expected one to three weights and as many biases, got {len(weights)} and {len(biases)}; "
            "pass None for a missing bias"
        )
    depth = check_rows(op, x=x_BD, out=out_BN)[0]
    names = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    check_weights(op, x_BD, depth, norm_weight_D=norm_weight_D, **names)
    sizes = [weight.shape[0] for weight in weights]
    for i, (bias, size) in enumerate(zip(biases, sizes)):
        if bias is not None and (bias.shape != (size,) or bias.dtype != x_BD.dtype or not bias.is_contiguous()):
            raise ValueError(
                f"{op}: expected biases[{i}] ({size},) of {x_BD.dtype}, contiguous, got {tuple(bias.shape)} of "
                f"{bias.dtype}; pass the bias of weights[{i}]"
            )
    check_shape(op, "out_BN", out_BN, (x_BD.shape[0], sum(sizes)), x_BD.dtype)
    given = {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    check_tensors(op, x_BD=x_BD, norm_weight_D=norm_weight_D, out_BN=out_BN, **names, **given)
    config = config or default_config("linear", x_BD, sum(sizes))
    missing = [0] * (3 - len(sizes))
    grid = product_programs(config, x_BD.shape[0], sizes)
    if 0 not in grid:
        with on_device(x_BD):
            _norm_linear_kernel[grid](
                x_BD, norm_weight_D, *weights, *(weights[0] for _ in missing),
                *(weight if bias is None else bias for weight, bias in zip(weights, biases)),
                *(weights[0] for _ in missing),
                out_BN, x_BD.shape[0], depth, x_BD.stride(0), out_BN.stride(0), *sizes, *missing,
                *(0 if bias is None else size for bias, size in zip(biases, sizes)), *missing,
                EPS=eps, **config.tiles, **config.options, **overlap_options(op, overlap, x_BD),
            )  # fmt: skip
    return out_BN


def linear_add(
    x_BK: torch.Tensor,
    weight_NK: torch.Tensor,
    residual_BN: torch.Tensor,
    *,
    config: ProductConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Add `x @ weight.T` to `residual_BN` in place, in one launch; the sum is float32 and rounded once.

    Args:
        x_BK, residual_BN: rows with contiguous elements, any row stride, not overlapping; weight_NK: contiguous.
        config: default `ProductConfig.from_shape("linear", ...)`; overlap: see `decode_overlap.py`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "linear_add"
    depth = check_rows(op, x=x_BK, residual=residual_BN)[0]
    check_weights(op, x_BK, depth, weight_NK=weight_NK)
    columns = weight_NK.shape[0]
    check_shape(op, "residual_BN", residual_BN, (x_BK.shape[0], columns), x_BK.dtype)
    check_tensors(op, x_BK=x_BK, weight_NK=weight_NK, residual_BN=residual_BN)
    config = config or default_config("linear", x_BK, columns)
    grid = product_programs(config, x_BK.shape[0], [columns])
    if 0 not in grid:
        with on_device(x_BK):
            _linear_add_kernel[grid](
                x_BK, weight_NK, residual_BN, x_BK.shape[0], columns, depth, x_BK.stride(0), residual_BN.stride(0),
                **config.tiles, **config.options, **overlap_options(op, overlap, x_BK),
            )  # fmt: skip
    return residual_BN


def norm_gate_up(
    x_BD: torch.Tensor,
    norm_weight_D: torch.Tensor,
    eps: float,
    gate_ID: torch.Tensor,
    up_ID: torch.Tensor,
    out_BI: torch.Tensor,
    *,
    config: ProductConfig | None = None,
    overlap: bool = False,
) -> torch.Tensor:
    """Write `silu(y @ gate.T) * (y @ up.T)` with `y = rmsnorm(x)` to `out_BI`, in one launch.

    Args:
        x_BD, out_BI: rows with contiguous elements, any row stride, not overlapping.
        norm_weight_D: `(D,)`; gate_ID, up_ID: `(I, D)`, contiguous; all in the dtype of x.
        config: default `ProductConfig.from_shape("pair", ...)`; overlap: see `decode_overlap.py`.

    In float16, `x * norm_weight` must stay below 65504 with `tl.dot`, as in `norm_linear`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    op = "norm_gate_up"
    depth = check_rows(op, x=x_BD, out=out_BI)[0]
    check_weights(op, x_BD, depth, norm_weight_D=norm_weight_D, gate_ID=gate_ID, up_ID=up_ID)
    columns = gate_ID.shape[0]
    check_shape(op, "up_ID", up_ID, (columns, depth), x_BD.dtype)
    check_shape(op, "out_BI", out_BI, (x_BD.shape[0], columns), x_BD.dtype)
    check_tensors(op, x_BD=x_BD, norm_weight_D=norm_weight_D, gate_ID=gate_ID, up_ID=up_ID, out_BI=out_BI)
    config = config or default_config("pair", x_BD, columns)
    grid = product_programs(config, x_BD.shape[0], [columns])
    if 0 not in grid:
        with on_device(x_BD):
            _norm_gate_up_kernel[grid](
                x_BD, norm_weight_D, gate_ID, up_ID, out_BI, x_BD.shape[0], columns, depth, x_BD.stride(0),
                out_BI.stride(0), EPS=eps, **config.tiles, **config.options, **overlap_options(op, overlap, x_BD),
            )  # fmt: skip
    return out_BI


def rms_norm(
    x_BD: torch.Tensor, norm_weight_D: torch.Tensor, eps: float, out_BD: torch.Tensor, *, overlap: bool = False
) -> torch.Tensor:
    """Write `x * rsqrt(mean(x^2) + eps) * norm_weight`, computed in float32, to `out_BD`; it may be `x_BD` itself.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or D above 65536.
    """
    op = "rms_norm"
    depth = check_rows(op, x=x_BD, out=out_BD)[0]
    check_weights(op, x_BD, depth, norm_weight_D=norm_weight_D)
    check_shape(op, "out_BD", out_BD, tuple(x_BD.shape), x_BD.dtype)
    check_tensors(op, x_BD=x_BD, norm_weight_D=norm_weight_D, out_BD=out_BD)
    if depth > MAX_NORM_WIDTH:
        raise ValueError(f"{op}: expected at most {MAX_NORM_WIDTH} channels, got {depth}; use torch's rms_norm")
    if x_BD.shape[0]:
        with on_device(x_BD):
            _rms_norm_kernel[(x_BD.shape[0],)](
                x_BD, norm_weight_D, out_BD, depth, x_BD.stride(0), out_BD.stride(0),
                EPS=eps, DEPTH_TILE=next_power_of_2(depth), **norm_options(depth), **overlap_options(op, overlap, x_BD),
            )  # fmt: skip
    return out_BD


def norm_options(depth: int) -> dict[str, int | bool]:
    """Sixteen channels per thread, two loads of 16 bytes, within one to sixteen warps."""
    return {"num_warps": min(max(ceil_div(next_power_of_2(depth), 512), 1), 16), "enable_fp_fusion": True}


def default_config(family: str, x: torch.Tensor, columns: int) -> ProductConfig:
    return ProductConfig.from_shape(family, x.shape[0], columns, x.element_size(), multiprocessors(x.device))


def check_rows(op: str, **rows: torch.Tensor) -> list[int]:
    """Refuse anything but matrices with contiguous rows; returns their widths."""
    for name, tensor in rows.items():
        if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1) or tensor.shape[1] == 0:
            raise ValueError(
                f"{op}: expected {name} as rows with contiguous elements, got shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()}; call .contiguous()"
            )
    return [tensor.shape[1] for tensor in rows.values()]


def check_weights(op: str, x: torch.Tensor, depth: int, **weights: torch.Tensor) -> None:
    """Refuse weights that the kernels cannot read in place."""
    for name, weight in weights.items():
        if weight.dim() not in (1, 2) or weight.shape[-1] != depth or weight.dtype != x.dtype:
            raise ValueError(
                f"{op}: expected {name} with {depth} input channels in {x.dtype}, got {tuple(weight.shape)} in "
                f"{weight.dtype}; pass the layer's own parameter, in the dtype of the activations"
            )
        if not weight.is_contiguous():
            raise ValueError(
                f"{op}: expected {name} contiguous, got strides {weight.stride()}; copy it once, not per step"
            )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{op}: expected {name} {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}; "
            "allocate it with that shape and dtype"
        )
