"""Probes of each box against all tokens of the box's own image: `region_attention` whose regions are whole images."""

from __future__ import annotations

import torch

from .region_attention import region_attention
from .regions import check_tokens, image_plan


def probe_attention(
    query_rows: torch.Tensor, tokens: torch.Tensor, grids, box_image, map_heads: int = 0, impl: str = "auto"
):
    """Attend from each box's absorbed probes to every token of its image, never to a neighbour's in the pack.

    Args:
        query_rows: `(B, R, D)`, or `(R, D)` shared. tokens: `(T, D)` packed.
        grids: `(I, 2)` int, (h, w) of each image in tokens; on the CPU it costs no device sync.
        box_image: `(B,)` int, the image each box's probes look at.
        map_heads, impl: as in `region_attention`.

    Returns:
        context `(B, R, D)`, or `(context, maps)`; maps `(S, R / map_heads)` run over each box's image row-major.

    Raises:
        ValueError: as in `region_attention`, or the packing disagrees.
    """
    check_tokens(tokens)
    plan = image_plan(tokens.shape[0], grids, box_image, tokens.device)
    return region_attention(query_rows, tokens, plan, map_heads, impl)
