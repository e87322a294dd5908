"""The whole few-query resampler: projections, attention over each box's region, output projection; own backward.

`resample` is `nn.MultiheadAttention` over ragged regions with the key and value projections absorbed (see
`region_attention`), which reads four D x D weights and the tokens, and keeps neither keys nor values:

    rows_h = (W_q,h x + b_q,h) W_k,h / sqrt(D / H)        context_h = softmax(rows_h tokens^T) tokens
    out    = W_o concat_h(W_v,h context_h) + b_v W_o^T + b_o

Backward, with g the gradient of `values_h = W_v,h context_h`: grad context = g W_v,h; `attend_backward` gives grad
rows; dW_k,h = q_h^T grad rows_h, dq_h = grad rows_h W_k,h^T, dW_v,h = g^T context_h. Each weight gradient is a product
of few rows, written once into the parameter's own layout.

Shape suffixes: M query vectors (Q, or B*Q), N = B*Q outputs, A = D/H head width, others as in `regions`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import cost_model
from .dispatch import choose, operator
from .regions import RegionPlan, autocast_values, check_plan, check_tokens, row_strided, without_autocast
from .schemas import wide_dtype
from .skinny import matmul, matmul_transposed, outer


class AttentionWeights(NamedTuple):
    """Parameters of a biased multi-head attention, as in `torch.nn.MultiheadAttention`.

    `in_proj_weight (3D, D)`, `in_proj_bias (3D,)`, `out_proj_weight (D, D)`, `out_proj_bias (D,)`.
    """

    in_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor
    out_proj_weight: torch.Tensor
    out_proj_bias: torch.Tensor


def absorb_queries(queries: torch.Tensor, in_proj_weight: torch.Tensor, in_proj_bias: torch.Tensor, heads: int):
    """Fold `W_q`, the key projection and the softmax scale into query rows; differentiable.

    Args:
        queries: `(..., Q, D)`.
        in_proj_weight: `(3D, D)`, in_proj_bias: `(3D,)`, as in `torch.nn.MultiheadAttention`.

    Returns:
        `(..., H*Q, D)`, head-major: what `region_attention` and `probe_attention` take.
    """
    width = queries.shape[-1]
    projected = F.linear(queries, in_proj_weight[:width], in_proj_bias[:width])
    per_head = projected.unflatten(-1, (heads, width // heads)).transpose(-3, -2)  # [..., H, Q, A]
    key_weight = in_proj_weight[width : 2 * width].view(heads, width // heads, width)
    return torch.matmul(per_head * (width // heads) ** -0.5, key_weight).flatten(-3, -2)


def project_context(context_BRD: torch.Tensor, in_proj_weight: torch.Tensor, in_proj_bias: torch.Tensor, heads: int):
    """Apply the value projection per head: `(B, H*Q, D)` to `(B, Q, D)`; differentiable."""
    width = context_BRD.shape[-1]
    value_weight = in_proj_weight[2 * width :].view(heads, width // heads, width)
    values = torch.matmul(context_BRD.unflatten(1, (heads, -1)), value_weight.transpose(-1, -2))
    return merge_box_heads(values) + in_proj_bias[2 * width :]


def merge_box_heads(values_BHQA: torch.Tensor) -> torch.Tensor:
    """`(B, H, Q, A)` to `(B, Q, D)`."""
    return values_BHQA.transpose(1, 2).flatten(-2)


def split_heads(values_ND: torch.Tensor, heads: int) -> torch.Tensor:
    """`(N, D)` to `(H, N, A)`, a view."""
    return values_ND.unflatten(1, (heads, -1)).transpose(0, 1)


def merge_heads(values_HNA: torch.Tensor) -> torch.Tensor:
    return values_HNA.transpose(0, 1).flatten(1)


def to_rows(values_HMD: torch.Tensor, boxes: int) -> torch.Tensor:
    """`(H, M, D)` to head-major rows `(boxes, H*Q, D)`, M = boxes * Q."""
    return values_HMD.unflatten(1, (boxes, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def from_rows(rows_BRD: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of `to_rows`: `(boxes, H*Q, D)` to `(H, M, D)`."""
    return rows_BRD.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def is_expanded(queries_BQD: torch.Tensor) -> bool:
    """Whether all boxes have the same queries: one entry, or one in the memory."""
    return queries_BQD.shape[0] == 1 or queries_BQD.stride(0) == 0


class _CastEach(torch.autograd.Function):
    """Expanded queries in another dtype: still one entry in the memory, still a gradient for each."""

    @staticmethod
    def forward(ctx, queries, dtype):
        ctx.dtype = queries.dtype
        return queries[:1].to(dtype).expand_as(queries)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, queries, tokens, in_weight, in_bias, out_weight, out_bias, spans, key_box, tap_index, tap_weight,
        heads, map_heads, impl,
    ):  # fmt: skip
        width, boxes = tokens.shape[1], spans.shape[0]
        # Expanded queries share their rows here, and get a gradient each in the backward pass.
        ctx.expanded = queries.shape[0] > 1 and is_expanded(queries)
        queries = (queries[:1] if ctx.expanded else queries).contiguous()
        query_MD = queries.reshape(-1, width)
        weight_q, weight_k, weight_v = in_weight.unflatten(0, (3, width)).unbind(0)
        bias_q, _, bias_v = in_bias.unflatten(0, (3, width)).unbind(0)
        projected_MD = matmul_transposed(query_MD[None], weight_q[None], impl)[0] + bias_q
        q_HMA = split_heads(projected_MD * (width // heads) ** -0.5, heads)
        rows = to_rows(matmul(q_HMA, weight_k.unflatten(0, (heads, -1)), impl), queries.shape[0])
        attend = operator("attend", impl, tokens.device.type)
        context, weights, cells, maps = attend(rows, tokens, spans, key_box, tap_index, tap_weight, map_heads)
        context_HND = from_rows(context, heads)
        values_ND = merge_heads(matmul_transposed(context_HND, weight_v.unflatten(0, (heads, -1)), impl)) + bias_v
        out_ND = matmul_transposed(values_ND[None], out_weight[None], impl)[0] + out_bias
        ctx.save_for_backward(
            queries, tokens, in_weight, out_weight, q_HMA, rows, context_HND, values_ND, weights, cells,
            spans, key_box, tap_index, tap_weight,
        )  # fmt: skip
        ctx.heads, ctx.map_heads, ctx.impl = heads, map_heads, impl
        if not map_heads:
            ctx.mark_non_differentiable(maps)
        return out_ND.unflatten(0, (boxes, -1)), maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_maps):
        with without_autocast(grad_out.device.type):  # a backward may run inside autocast, or not
            return _Resample.gradients(ctx, grad_out, grad_maps)

    @staticmethod
    def gradients(ctx, grad_out, grad_maps):
        (
            queries, tokens, in_weight, out_weight, q_HMA, rows, context_HND, values_ND, weights, cells,
            spans, key_box, tap_index, tap_weight,
        ) = ctx.saved_tensors  # fmt: skip
        heads, impl, width = ctx.heads, ctx.impl, tokens.shape[1]
        queries_grad, tokens_grad, weight_grad, bias_grad, out_weight_grad, out_bias_grad = ctx.needs_input_grad[:6]
        weight_q, weight_k, weight_v = in_weight.unflatten(0, (3, width)).unbind(0)
        grad_ND = grad_out.reshape(-1, width)
        grad_in_weight = torch.empty_like(in_weight if weight_grad else in_weight[:0])
        grad_out_weight = torch.empty_like(out_weight if out_weight_grad else out_weight[:0])
        if out_weight_grad:
            outer(grad_out_weight[None], grad_ND[None], values_ND[None], impl)
        grad_values_ND = matmul(grad_ND[None], out_weight[None], impl)[0]
        grad_values_HNA = split_heads(grad_values_ND, heads)
        if weight_grad:
            outer(grad_in_weight[2 * width :].unflatten(0, (heads, -1)), grad_values_HNA, context_HND, impl)
        grad_context_HND = matmul(grad_values_HNA, weight_v.unflatten(0, (heads, -1)), impl)
        query_side = queries_grad or weight_grad or bias_grad
        boxes, each = spans.shape[0], ctx.expanded and queries_grad
        if each:
            rows = rows.expand(boxes, -1, -1).contiguous()
        grad_rows, grad_tokens = operator("attend_backward", impl, tokens.device.type)(
            to_rows(grad_context_HND, boxes), grad_maps.contiguous() if ctx.map_heads else None, rows, tokens,
            weights, cells, spans, key_box, tap_index, tap_weight, ctx.map_heads, query_side, tokens_grad,
        )  # fmt: skip
        grad_queries = grad_in_bias = None
        if query_side:
            grad_rows_HMD = from_rows(grad_rows, heads)
            grad_q_HMA = matmul_transposed(grad_rows_HMD, weight_k.unflatten(0, (heads, -1)), impl)
            grad_projected_MD = merge_heads(grad_q_HMA) * (width // heads) ** -0.5
            if queries_grad:
                shape = (boxes, *queries.shape[1:]) if each else queries.shape
                grad_queries = matmul(grad_projected_MD[None], weight_q[None], impl)[0].view(shape)
            if each:  # the weights' gradients are of the rows that were shared
                grad_projected_MD = grad_projected_MD.unflatten(0, (boxes, -1)).sum(0)
                grad_rows_HMD = grad_rows_HMD.unflatten(1, (boxes, -1)).sum(1)
            if weight_grad:
                outer(grad_in_weight[width : 2 * width].unflatten(0, (heads, -1)), q_HMA, grad_rows_HMD, impl)
                outer(grad_in_weight[None, :width], grad_projected_MD[None], queries.reshape(1, -1, width), impl)
            if bias_grad:
                bias_q, bias_v = grad_projected_MD.sum(0), grad_values_ND.sum(0)
                grad_in_bias = torch.cat([bias_q, torch.zeros_like(bias_q), bias_v])
        return (
            grad_queries,
            grad_tokens if tokens_grad else None,
            grad_in_weight if weight_grad else None,
            grad_in_bias,
            grad_out_weight if out_weight_grad else None,
            grad_ND.sum(0) if out_bias_grad else None,
            *[None] * 7,
        )


def resample(
    queries: torch.Tensor,
    tokens: torch.Tensor,
    plan: RegionPlan,
    weights: AttentionWeights,
    heads: int,
    return_maps: bool = False,
    impl: str = "auto",
):
    """Multi-head attention from few queries to the tokens of each box's region; keys = values = tokens.

    Args:
        queries: `(Q, D)` shared by all boxes, or `(B, Q, D)`.
        tokens: `(T, D)` packed visual tokens. plan: keys per box (`window_plan`, `image_plan`, `roi_plan`).
        weights: the attention's parameters. heads: H, a divisor of D.
        return_maps: also return attention averaged over heads.
        impl: `"auto"`, `"reference"`, `"torch"`, `"cpp"` or `"triton"`. `"auto"` takes the fastest that runs and, where
            the regions hold few tokens, the projected form (keys and values made, as in the stock module): see
            `cost_model`.

    Returns:
        `(B, Q, D)` after the output projection, or `(out, maps)` with maps `(S, Q)` on the plan's keys. Under autocast
        everything is cast to the autocast dtype, as the stock module's projections are.

    Raises:
        ValueError: shapes or dtypes disagree, or `impl` cannot run on these tensors.
    """
    check_weights(weights)
    check_tokens(tokens, weights.out_proj_weight.shape[0])
    check_plan(plan, tokens)
    queries = check_queries(queries, tokens, plan, heads)
    first, tokens, *cast = autocast_values(queries[:1], tokens, *weights)
    if first.dtype != queries.dtype:
        queries = _CastEach.apply(queries, first.dtype) if is_expanded(queries) else queries.to(first.dtype)
    weights = AttentionWeights(*cast)
    chosen = choose("resample", impl, tokens)
    if plan.num_boxes == 0:
        # Connected to everything, so that a rank without boxes still takes part in gradient reduction.
        zero = sum(value.reshape(-1)[:0].sum() for value in (queries, tokens, *weights))
        out = tokens.new_zeros(0, *queries.shape[1:]) + zero
        return (out, out.new_zeros(0, queries.shape[1], dtype=wide_dtype(out.dtype))) if return_maps else out
    if chosen == "reference":
        from .reference import resample_reference

        out, maps = resample_reference(queries, tokens, plan, weights, heads)
    elif impl == "auto" and plan.spans_host is not None and cost_model.prefers_projected(plan, queries, heads, chosen):
        from .projected import resample_projected

        out, maps = resample_projected(queries, tokens, plan, weights, heads)
    else:
        with without_autocast(tokens.device.type):
            out, maps = _Resample.apply(
                queries, row_strided(tokens), *(w.contiguous() for w in weights), *plan.geometry, heads,
                heads if return_maps else 0, chosen,
            )  # fmt: skip
    return (out, maps) if return_maps else out


def check_weights(weights: AttentionWeights) -> None:
    if not isinstance(weights, AttentionWeights):
        raise ValueError(f"weights: expected AttentionWeights, got {type(weights).__name__}")
    if any(not isinstance(weight, torch.Tensor) for weight in weights):
        missing = [name for name, weight in weights._asdict().items() if not isinstance(weight, torch.Tensor)]
        raise ValueError(f"weights: expected four tensors, got none for {missing}; take zeros where there is no bias")
    width = weights.out_proj_weight.shape[-1]
    expected = ((3 * width, width), (3 * width,), (width, width), (width,))
    for (name, weight), shape in zip(weights._asdict().items(), expected):
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(weight.shape)}")


def check_queries(queries: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, heads: int) -> torch.Tensor:
    """`queries` as `(1 or B, Q, D)`."""
    width = tokens.shape[1]
    given, queries = tuple(queries.shape), queries[None] if queries.dim() == 2 else queries
    if queries.dim() != 3 or queries.shape[2] != width or queries.shape[0] not in (1, plan.num_boxes):
        raise ValueError(f"queries: expected (Q, {width}) or ({plan.num_boxes}, Q, {width}), got {given}")
    if heads < 1 or width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
    return queries
