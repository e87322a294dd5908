"""Few query rows against the raw tokens of each box's region: scores, softmax, context. No key or value is made.

With the key projection folded into the rows beforehand (`resample.absorb_queries`), `rows @ tokens.T` are the stock
module's scores up to a constant per row, which cancels in the softmax; the context over raw tokens is projected through
`W_v` afterwards, exact because attention rows sum to one. With RoI cells the sampling map is linear, so the R score
channels are sampled instead of the D feature channels, and the cells' weights splatted back: RoI features never exist.

Shape suffixes: see `regions`. Weights are kept token-major, `(S, R)`, in float32 (float64 for float64 tokens).
"""

from __future__ import annotations

import torch

from .cells import rectangle, sample_cells, splat_cells, tap_matrices
from .dispatch import choose, operator
from .regions import RegionPlan, autocast_values, check_plan, check_tokens, row_strided, without_autocast
from .schemas import implement, wide_dtype


def attend_torch(rows, tokens, spans, key_box, tap_index, tap_weight, map_heads):
    """Plain form of the operator `attend`, box by box."""
    wide, host = wide_dtype(tokens.dtype), spans.tolist()
    boxes, count = len(host), rows.shape[1]
    context = tokens.new_empty(boxes, count, tokens.shape[1])
    weights = tokens.new_empty(key_box.shape[0], count, dtype=wide)
    cells = tokens.new_empty(0 if tap_index is None else (boxes, tap_index.shape[2] ** 2, count), dtype=wide)
    for box, span in enumerate(host):
        region_hwD = rectangle(tokens, span)
        region_ND = region_hwD.flatten(0, 1)
        scores_NR = (region_ND @ rows[box if rows.shape[0] > 1 else 0].T).to(wide)
        if tap_index is None:
            weights_NR = scores_NR.softmax(0)
        else:
            maps = tap_matrices(host, tap_index, tap_weight, box)
            cells[box] = sample_cells(scores_NR.unflatten(0, region_hwD.shape[:2]), *maps).softmax(0)
            weights_NR = splat_cells(cells[box], *maps).flatten(0, 1)
        weights[span[4] : span[4] + len(weights_NR)] = weights_NR
        context[box] = weights_NR.to(tokens.dtype).T @ region_ND
    maps_SQ = weights.unflatten(1, (map_heads, -1)).mean(1) if map_heads else weights.new_empty(0)
    return context, weights, cells, maps_SQ


def attend_backward_torch(
    grad_context, grad_maps, rows, tokens, weights, cells, spans, key_box, tap_index, tap_weight,
    map_heads, rows_grad, tokens_grad,
):  # fmt: skip
    """Plain form of the operator `attend_backward`: dS = A * (dP - rowsum(A * dP)), with dP = grad_context tokens^T."""
    wide, host, shared = weights.dtype, spans.tolist(), rows.shape[0] == 1
    grad_rows = rows.new_zeros(rows.shape if rows_grad else 0, dtype=wide)
    grad_tokens = tokens.new_zeros(tokens.shape if tokens_grad else 0, dtype=wide)
    for box, span in enumerate(host):
        region_hwD = rectangle(tokens, span)
        region_ND = region_hwD.flatten(0, 1)
        keys = slice(span[4], span[4] + len(region_ND))
        grad_weights_NR = (region_ND @ grad_context[box].T).to(wide)
        if grad_maps is not None:
            grad_weights_NR = grad_weights_NR + grad_maps[keys].to(wide).repeat(1, map_heads) / map_heads
        if tap_index is None:
            grad_scores_NR = softmax_backward(weights[keys], grad_weights_NR)
        else:
            maps = tap_matrices(host, tap_index, tap_weight, box)
            grad_cells = sample_cells(grad_weights_NR.unflatten(0, region_hwD.shape[:2]), *maps)
            grad_scores_NR = splat_cells(softmax_backward(cells[box], grad_cells), *maps).flatten(0, 1)
        low = grad_scores_NR.to(tokens.dtype)
        if rows_grad:
            grad_rows[0 if shared else box] += (low.T @ region_ND).to(wide)
        if tokens_grad:
            grad_region = weights[keys].to(tokens.dtype) @ grad_context[box] + low @ rows[0 if shared else box]
            rectangle(grad_tokens, span).add_(grad_region.unflatten(0, region_hwD.shape[:2]))
    return grad_rows.to(rows.dtype), grad_tokens.to(tokens.dtype)


def softmax_backward(weights: torch.Tensor, grad_weights: torch.Tensor) -> torch.Tensor:
    """Gradient before a softmax over dimension 0."""
    product = weights * grad_weights
    return product - weights * product.sum(0)


def in_given_dtypes(function):
    """Run an operator's body in the dtypes it is given, whatever surrounds the call or its backward."""

    def run(first, *args):
        with without_autocast(first.device.type):
            return function(first, *args)

    return run


for _name, _function in (("attend_torch", attend_torch), ("attend_backward_torch", attend_backward_torch)):
    implement(_name, in_given_dtypes(_function))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, tokens, spans, key_box, tap_index, tap_weight, map_heads, impl):
        attend = operator("attend", impl, tokens.device.type)
        geometry = (spans, key_box, tap_index, tap_weight)
        context, weights, cells, maps = attend(rows, tokens, *geometry, map_heads)
        ctx.save_for_backward(rows, tokens, weights, cells, *geometry)
        ctx.impl, ctx.map_heads = impl, map_heads
        if not map_heads:
            ctx.mark_non_differentiable(maps)
        return context, maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_context, grad_maps):
        rows, tokens, weights, cells, *geometry = ctx.saved_tensors
        attend_backward = operator("attend_backward", ctx.impl, tokens.device.type)
        rows_grad, tokens_grad = ctx.needs_input_grad[:2]
        grad_rows, grad_tokens = attend_backward(
            grad_context.contiguous(), grad_maps.contiguous() if ctx.map_heads else None, rows, tokens, weights, cells,
            *geometry, ctx.map_heads, rows_grad, tokens_grad,
        )  # fmt: skip
        return (grad_rows if rows_grad else None, grad_tokens if tokens_grad else None, *[None] * 6)


def region_attention(
    query_rows: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, map_heads: int = 0, impl: str = "auto"
):
    """Attend from absorbed query rows to each box's region.

    Args:
        query_rows: `(R, D)` shared by all boxes, or `(B, R, D)`, head-major (`r = head * Q + query`), softmax scale and
            key projection folded in: see `absorb_queries`. The dtype of `tokens`.
        tokens: `(T, D)` packed visual tokens, float32, bfloat16, float16 or float64.
        plan: keys per box, from `window_plan`, `image_plan` or `roi_plan`; made once, used as often as the boxes are.
        map_heads: H to also return attention averaged over H heads; 0 for none.
        impl: `"auto"`, `"reference"`, `"torch"`, `"cpp"` or `"triton"`; only `"auto"` chooses.

    Returns:
        context `(B, R, D)` over raw tokens, or `(context, maps)` with maps `(S, R / map_heads)` on the plan's keys
        (`plan.image_maps` lays them out per image). Differentiable in `query_rows` and `tokens`, maps included. Under
        autocast both are cast to the autocast dtype, as for a product.

    Raises:
        ValueError: shapes or dtypes disagree, or `impl` cannot run on these tensors.

    Source: V-Reflection's compression modules, with the projections absorbed (docs/kernels.md).
    """
    check_tokens(tokens)
    check_plan(plan, tokens)
    query_rows, tokens = autocast_values(query_rows, tokens)
    impl = choose("region_attention", impl, tokens)
    rows = check_rows(query_rows, tokens, plan, map_heads)
    if plan.num_boxes == 0:
        # Connected to everything, so that a rank without boxes still takes part in gradient reduction.
        context = tokens.new_zeros(0, rows.shape[1], rows.shape[2]) + tokens[:0].sum() + rows[:0].sum()
        return (context, context.new_zeros(0, rows.shape[1] // map_heads)) if map_heads else context
    if impl == "reference":
        from .reference import region_attention_reference

        context, maps = region_attention_reference(rows, tokens, plan, map_heads)
    else:
        context, maps = _Attend.apply(rows.contiguous(), row_strided(tokens), *plan.geometry, map_heads, impl)
    return (context, maps) if map_heads else context


def check_rows(query_rows: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, map_heads: int) -> torch.Tensor:
    """`query_rows` as `(1 or B, R, D)`."""
    rows = query_rows[None] if query_rows.dim() == 2 else query_rows
    if rows.dim() != 3 or rows.shape[2] != tokens.shape[1] or rows.shape[0] not in (1, plan.num_boxes):
        raise ValueError(
            f"query_rows: expected (R, {tokens.shape[1]}) or ({plan.num_boxes}, R, {tokens.shape[1]}), "
            f"got {tuple(query_rows.shape)}"
        )
    if map_heads and (map_heads < 0 or rows.shape[1] % map_heads):
        raise ValueError(f"map_heads: expected a divisor of {rows.shape[1]} rows, got {map_heads}")
    return rows
