"""The stock form of `resample`: keys and values of every token, for regions of so few tokens that it is cheaper."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .cells import rectangle, sample_cells, splat_cells, tap_matrices
from .regions import RegionPlan, device_tensor, row_strided


def resample_projected(queries_BQD, tokens, plan: RegionPlan, weights, heads: int):
    """As `resample`, for plans with their geometry on the host. Keys are padded to the longest region."""
    width, boxes, tokens = tokens.shape[1], plan.num_boxes, row_strided(tokens)
    weight_q, weight_kv = weights.in_proj_weight.split([width, 2 * width])
    bias_q, bias_kv = weights.in_proj_bias.split([width, 2 * width])
    keys_BND, mask_BN = (region_cells(tokens, plan), None) if plan.tap_index is not None else padded(tokens, plan)
    queries = F.linear(queries_BQD, weight_q, bias_q).expand(boxes, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = F.linear(keys_BND, weight_kv, bias_kv).unflatten(-1, (2, heads, -1)).unbind(2)
    scores = (queries * (width // heads) ** -0.5) @ keys.permute(0, 2, 3, 1)  # [B, H, Q, N]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask_BN is not None:
        wide = wide.masked_fill(~mask_BN[:, None, None], float("-inf"))
    attention = wide.softmax(-1)
    context = attention.to(values.dtype) @ values.transpose(1, 2)
    out = F.linear(context.transpose(1, 2).flatten(2), weights.out_proj_weight, weights.out_proj_bias)
    return out, key_maps(attention.mean(1).transpose(1, 2), plan, mask_BN)


def padded(tokens: torch.Tensor, plan: RegionPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Region tokens `(B, N, D)`, short regions repeating their first token, and the mask `(B, N)` of real keys."""
    assert plan.spans_host is not None
    if plan.num_boxes == 1:
        return rectangle(tokens, plan.spans_host[0].tolist()).flatten(0, 1)[None], None
    first, stride, height, width, _ = (column[:, None] for column in plan.spans_host.T)
    key = np.arange((height * width).max())
    mask = key < height * width
    key = np.where(mask, key, 0)
    index = first + key // width * stride + key % width
    return tokens[device_tensor(index, tokens.device)], device_tensor(mask, tokens.device)


def region_cells(tokens: torch.Tensor, plan: RegionPlan) -> torch.Tensor:
    """RoI features `(B, C, D)`."""
    assert plan.spans_host is not None and plan.tap_index is not None and plan.tap_weight is not None
    spans, cells = plan.spans_host.tolist(), []
    for box, span in enumerate(spans):
        maps = tap_matrices(spans, plan.tap_index, plan.tap_weight, box)
        cells.append(sample_cells(rectangle(tokens, span).to(plan.tap_weight.dtype), *maps).to(tokens.dtype))
    return torch.stack(cells)


def key_maps(maps_BNQ: torch.Tensor, plan: RegionPlan, mask_BN: torch.Tensor | None) -> torch.Tensor:
    """Head-mean attention on padded keys or cells as `(S, Q)` on the plan's keys."""
    if plan.tap_index is None:
        if mask_BN is None:
            return maps_BNQ.flatten(0, 1)
        assert plan.spans_host is not None
        longest, host = mask_BN.shape[1], plan.spans_host
        kept = np.concatenate([box * longest + np.arange(h * w) for box, (_, _, h, w, _) in enumerate(host)])
        return maps_BNQ.flatten(0, 1)[device_tensor(kept, maps_BNQ.device)]
    assert plan.spans_host is not None and plan.tap_weight is not None
    spans = plan.spans_host.tolist()
    return torch.cat(
        [
            splat_cells(maps_BNQ[box], *tap_matrices(spans, plan.tap_index, plan.tap_weight, box)).flatten(0, 1)
            for box in range(plan.num_boxes)
        ]
    )
