"""The two compression modules: Box-Guided Compression (teacher) and Dynamic Autoregressive Compression (student).

Shape suffixes: B boxes, I images, T packed visual tokens, D width, Q latents per box, S keys of all boxes (ragged).
"""

from __future__ import annotations

import torch
from torch import nn

from .ops import AttentionWeights, RegionPlan, image_plan, resample, roi_plan, window_plan
from .ops.dispatch import IMPLEMENTATIONS
from .ops.regions import check_geometry, check_tokens
from .ops.schemas import wide_dtype

REGIONS = ("window", "roi_align")


def default_num_heads(hidden_size: int) -> int:
    """`min(8, D // 64)`, at least one."""
    return max(1, min(8, hidden_size // 64))


def image_maps(plan: RegionPlan, maps_SQ: torch.Tensor, grids, box_image) -> list[torch.Tensor]:
    """`RegionPlan.image_maps`; under `torch.compile` in a break of the graph: only the host knows the sizes."""
    if torch.compiler.is_compiling():
        return _untraced_image_maps(plan.spans_B5, maps_SQ, plan.num_tokens, grids, box_image)
    return plan.image_maps(maps_SQ)


def _untraced_image_maps(spans_B5, maps_SQ, num_tokens: int, grids, box_image) -> list[torch.Tensor]:
    grids, box_image, _ = check_geometry(num_tokens, grids, box_image)
    plan = RegionPlan(spans_B5, maps_SQ, num_tokens, None, None, spans_B5.cpu().numpy(), grids, box_image)
    return plan.image_maps(maps_SQ)


_untraced_image_maps._torchdynamo_disable = True  # what torch.compiler.disable sets, without importing the compiler


class CrossAttentionResampler(nn.Module):
    """One biased cross-attention followed by LayerNorm (eps 1e-6): what both modules share.

    No residual, MLP, positional term or input norm. Parameters are named as in released checkpoints:
    `cross_attn.{in_proj_weight, in_proj_bias, out_proj.weight, out_proj.bias}`, `output_norm.{weight, bias}`.
    `impl` is that of `vreflection.ops.resample`; `"reference"` is the stock attention.
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

    @property
    def attention_weights(self) -> AttentionWeights:
        attention = self.cross_attn
        return AttentionWeights(
            attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
        )

    def resample(
        self, queries: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, return_maps: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents `(B, Q, D)` and, unless told otherwise, head-averaged attention `(S, Q)` on the plan's keys.

        `queries` is `(Q, D)`, shared by all boxes, or `(B, Q, D)`.
        """
        out = resample(queries, tokens, plan, self.attention_weights, self.num_heads, return_maps, self.impl)
        values, maps = out if return_maps else (out, None)
        return self.output_norm(values), maps


class BoxGuidedCompression(CrossAttentionResampler):
    """Compress the visual tokens inside each box into Q latents with learnable queries (the teacher, "BCM").

    Args:
        hidden_size: D, the width of a visual token.
        num_latents: Q, latents per box.
        num_heads: attention heads; default `min(8, D // 64)`.
        region: `"window"`, whole tokens the box touches, or `"roi_align"`, a grid of bilinear samples.
        output_size, sampling_ratio: the RoI-Align grid side and samples per cell and axis.
        query_init_std: standard deviation of the initial queries.
        impl: `"auto"`, `"reference"`, `"torch"`, `"cpp"` or `"triton"`; see `vreflection.ops.resample`.

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
            tokens.shape[0], grids, boxes, box_image, self.output_size, self.sampling_ratio,
            device=tokens.device, dtype=wide_dtype(tokens.dtype),
        )  # fmt: skip

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
        check_tokens(tokens, self.hidden_size)
        plan = self.plan(tokens, grids, boxes, box_image)
        latents, maps = self.resample(self.queries[0], tokens, plan, return_attention)
        return (latents, image_maps(plan, maps, grids, box_image)) if maps is not None else latents


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
        check_tokens(tokens, self.hidden_size)
        plan = image_plan(tokens.shape[0], grids, box_image, tokens.device)
        if probes.dim() != 3 or probes.shape[0] != plan.num_boxes or probes.shape[2] != self.hidden_size:
            raise ValueError(
                f"probes: expected ({plan.num_boxes}, Q, {self.hidden_size}) to match box_image, "
                f"got {tuple(probes.shape)}"
            )
        latents, maps = self.resample(probes, tokens, plan, return_attention)
        return (latents, image_maps(plan, maps, grids, box_image)) if maps is not None else latents
