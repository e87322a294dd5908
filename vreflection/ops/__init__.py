"""Torch operations on packed visual tokens. `reference` defines correctness; the rest must agree with it."""

from .distillation_loss import distillation_loss
from .probe_attention import probe_attention
from .region_attention import region_attention
from .regions import RegionPlan, image_plan, window_plan, window_token_rects
from .resample import AttentionWeights, absorb_queries, project_context, resample
from .roi_align import roi_align, roi_plan

__all__ = [
    "AttentionWeights",
    "RegionPlan",
    "absorb_queries",
    "distillation_loss",
    "image_plan",
    "probe_attention",
    "project_context",
    "region_attention",
    "resample",
    "roi_align",
    "roi_plan",
    "window_plan",
    "window_token_rects",
]
