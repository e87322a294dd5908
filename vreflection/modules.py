"""The two compression modules: Box-Guided Compression (teacher) and Dynamic Autoregressive Compression (student).

Shape suffixes: B boxes, I images, T packed visual tokens, D width, Q latents per box, N keys per region (padded).
"""

from __future__ import annotations

import torch
from torch import nn

from .ops import RegionPlan, absorb_queries, head_mean, image_plan, project_context, region_attention, window_plan
from .ops.reference import resample_reference
from .ops.roi_align import roi_plan

REGIONS = ("window", "roi_align")
IMPLEMENTATIONS = ("auto", "torch", "reference")


def default_num_heads(hidden_size: int) -> int:
    """`min(8, D // 64)`, at least one."""
    return max(1, min(8, hidden_size // 64))


class CrossAttentionResampler(nn.Module):
    """One biased cross-attention followed by LayerNorm (eps 1e-6): what both modules share.

    No residual, MLP, positional term or input norm. Parameters are named as in released checkpoints:
    `cross_attn.{in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias}`, `output_norm.{weight, bias}`.
    `impl="auto"` takes the absorbed form (`vreflection.ops.region_attention`); `"reference"` the stock attention.
    """

    def __init__(self, hidden_size: int, num_heads: int | None = None, impl: str = "auto"):
        super().__init__()
        num_heads = default_num_heads(hidden_size) if num_heads is None else num_heads
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
        self.hidden_size, self.num_heads, self.impl = hidden_size, num_heads, impl
        self.cross_attn = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def reset_parameters(self) -> None:
        """Initialise every parameter; nothing is left to what the memory held."""
        self.cross_attn.out_proj.reset_parameters()  # the next line leaves its weight alone
        self.cross_attn._reset_parameters()
        self.output_norm.reset_parameters()

    def resample(
        self, queries: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(B, Q, D)` and head-averaged attention `(B, Q, N)` on the plan's tokens.

        `queries` is `(Q, D)`, shared by all boxes, or `(B, Q, D)`.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.hidden_size:
            raise ValueError(f"tokens: expected packed (T, {self.hidden_size}), got {tuple(tokens.shape)}")
        if plan.num_boxes == 0:
            return tokens.new_zeros(0, queries.shape[-2], self.hidden_size), tokens.new_zeros(0, queries.shape[-2], 0)
        if self.impl == "reference":
            queries = queries.expand(plan.num_boxes, -1, -1)
            return resample_reference(queries, tokens, plan, self.cross_attn, self.output_norm)
        attention = self.cross_attn
        rows = absorb_queries(queries, attention.in_proj_weight, attention.in_proj_bias, self.num_heads)
        context, weights = region_attention(rows, tokens, plan)
        values = project_context(context, attention.in_proj_weight, attention.in_proj_bias, self.num_heads)
        latents = self.output_norm(attention.out_proj(values))
        return latents, head_mean(weights, self.num_heads)


class BoxGuidedCompression(CrossAttentionResampler):
    """Compress the visual tokens inside each box into Q latents with learnable queries (the teacher, "BCM").

    Args:
        hidden_size: D, the width of a visual token.
        num_latents: Q, latents per box.
        num_heads: attention heads; default `min(8, D // 64)`.
        region: `"window"`, whole tokens the box touches, or `"roi_align"`, a grid of bilinear samples.
        output_size, sampling_ratio: the RoI-Align grid side and samples per cell and axis.
        query_init_std: standard deviation of the initial queries.
        impl: `"auto"`, `"torch"` (absorbed projections) or `"reference"`.

    Source: V-Reflection, Box-Guided Compression.
    """

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 8,
        num_heads: int | None = None,
        region: str = "window",
        output_size: int = 7,
        sampling_ratio: int = 2,
        query_init_std: float = 0.02,
        impl: str = "auto",
    ):
        super().__init__(hidden_size, num_heads, impl)
        if region not in REGIONS:
            raise ValueError(f"region: expected one of {REGIONS}, got {region!r}")
        if num_latents < 1:
            raise ValueError(f"num_latents: expected at least 1, got {num_latents}")
        self.region, self.output_size, self.sampling_ratio = region, output_size, sampling_ratio
        self.query_init_std = query_init_std
        self.queries = nn.Parameter(torch.empty(1, num_latents, hidden_size))
        nn.init.normal_(self.queries, std=query_init_std)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.queries, std=self.query_init_std)

    def plan(self, tokens: torch.Tensor, grids, boxes, box_image) -> RegionPlan:
        """Host-side plan of every box's keys; reuse it when the same boxes are seen twice in a step."""
        if self.region == "window":
            return window_plan(tokens.shape[0], grids, boxes, box_image, tokens.device)
        return roi_plan(
            tokens.shape[0], grids, boxes, box_image, self.output_size, self.sampling_ratio, device=tokens.device
        )

    def forward(
        self,
        tokens: torch.Tensor,
        grids: torch.Tensor,
        boxes: torch.Tensor,
        box_image: torch.Tensor,
        return_attention: bool = False,
    ):
        """Compress each box.

        Args:
            tokens: `(T, D)` floating point, all images' visual tokens packed, row-major per image.
            grids: `(I, 2)` int, (h, w) of each image in tokens. Geometry kept on the CPU costs no device sync.
            boxes: `(B, 4)` normalised `x0, y0, x1, y1`.
            box_image: `(B,)` int, the image each box lies in.
            return_attention: also return attention on each box's image, averaged over heads.

        Returns:
            latents `(B, Q, D)`, or `(latents, maps)` with `maps` a list of `(Q, h, w)`, zero outside the box.

        Raises:
            ValueError: shapes disagree, or a box covers no token or is not finite.
        """
        plan = self.plan(tokens, grids, boxes, box_image)
        latents, weights = self.resample(self.queries[0], tokens, plan)
        return (latents, plan.image_maps(weights)) if return_attention else latents


class DynamicAutoregressiveCompression(CrossAttentionResampler):
    """Probe the whole image of each box with hidden states as queries (the student, "DAC").

    Args:
        hidden_size: D. num_heads: attention heads; default `min(8, D // 64)`. impl: as in `BoxGuidedCompression`.

    Source: V-Reflection, Dynamic Autoregressive Compression.
    """

    def forward(
        self,
        probes: torch.Tensor,
        tokens: torch.Tensor,
        grids: torch.Tensor,
        box_image: torch.Tensor,
        return_attention: bool = False,
    ):
        """Attend from each box's probes to all tokens of its own image.

        Args:
            probes: `(B, Q, D)` hidden states of the language model.
            tokens, grids, box_image, return_attention: as in `BoxGuidedCompression.forward`.

        Returns:
            latents `(B, Q, D)`, or `(latents, maps)` with `maps` a list of `(Q, h, w)`.
        """
        plan = image_plan(tokens.shape[0], grids, box_image, tokens.device)
        if probes.dim() != 3 or probes.shape[0] != plan.num_boxes or probes.shape[2] != self.hidden_size:
            raise ValueError(
                f"probes: expected ({plan.num_boxes}, Q, {self.hidden_size}) to match box_image, "
                f"got {tuple(probes.shape)}"
            )
        latents, weights = self.resample(probes, tokens, plan)
        return (latents, plan.image_maps(weights)) if return_attention else latents
