"""Few queries against the raw tokens of each box's region, with the key and value projections absorbed.

With `R = heads * queries` rows folded through `W_k` beforehand, scores are `rows @ tokens.T`; the context is taken over
raw tokens and projected through `W_v` afterwards. Exact: the key bias is constant per row and cancels in the softmax,
and attention rows sum to one, so the value bias passes through. No key or value of width D is ever made per token.
"""

from __future__ import annotations

import torch

from .regions import RegionPlan
from .roi_align import sample_cells, splat_cells


def absorb_queries(queries: torch.Tensor, in_proj_weight: torch.Tensor, in_proj_bias: torch.Tensor, heads: int):
    """Fold `W_q`, the key projection and the softmax scale into query rows.

    Args:
        queries: `(..., Q, D)`.
        in_proj_weight: `(3D, D)`, in_proj_bias: `(3D,)`, as in `torch.nn.MultiheadAttention`.

    Returns:
        `(..., H*Q, D)`, head-major.
    """
    width = queries.shape[-1]
    head_width = width // heads
    projected = torch.nn.functional.linear(queries, in_proj_weight[:width], in_proj_bias[:width])
    per_head = projected.unflatten(-1, (heads, head_width)).transpose(-3, -2)  # [..., H, Q, head width]
    key_weight = in_proj_weight[width : 2 * width].view(heads, head_width, width)
    rows = torch.matmul(per_head * head_width**-0.5, key_weight)  # [..., H, Q, D]
    return rows.flatten(-3, -2)


def region_attention(
    query_rows: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed query rows to each box's region.

    Args:
        query_rows: `(R, D)` shared by all boxes, or `(B, R, D)`; see `absorb_queries`.
        tokens: `(T, D)` packed visual tokens.
        plan: keys per box, from `window_plan`, `image_plan` or `roi_plan`.

    Returns:
        context `(B, R, D)` over raw tokens and weights `(B, R, N)` on the plan's tokens, float32 or wider, zero where
        the plan is padding. With RoI cells the softmax runs over cells and the weights are splatted back.
    """
    region_BND = tokens[plan.token_index_BN]
    scores = torch.matmul(region_BND, query_rows.to(tokens.dtype).transpose(-1, -2)).transpose(1, 2)  # [B, R, N]
    wide = torch.promote_types(scores.dtype, torch.float32)
    if plan.cell_index_BCK is None:
        scores = scores.to(wide).masked_fill(~plan.mask_BN[:, None], float("-inf"))
        weights = scores.softmax(dim=-1)
    else:
        weights = splat_cells(plan, sample_cells(plan, scores.to(wide)).softmax(dim=-1))
    return torch.matmul(weights.to(region_BND.dtype), region_BND), weights


def project_context(
    context_BRD: torch.Tensor, in_proj_weight: torch.Tensor, in_proj_bias: torch.Tensor, heads: int
) -> torch.Tensor:
    """Apply the value projection per head: `(B, H*Q, D)` to `(B, Q, D)`, before the output projection."""
    width = context_BRD.shape[-1]
    per_head = context_BRD.unflatten(1, (heads, -1))  # [B, H, Q, D]
    value_weight = in_proj_weight[2 * width :].view(heads, width // heads, width)
    values = torch.matmul(per_head, value_weight.transpose(-1, -2))  # [B, H, Q, head width]
    return values.transpose(1, 2).flatten(-2) + in_proj_bias[2 * width :]


def head_mean(weights_BRN: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention averaged over heads, `(B, H*Q, N)` to `(B, Q, N)`."""
    return weights_BRN.unflatten(1, (heads, -1)).mean(dim=1)
