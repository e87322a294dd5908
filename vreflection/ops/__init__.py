"""Torch operations on packed visual tokens. `reference` defines correctness; the rest must agree with it."""

from .region_attention import absorb_queries, head_mean, project_context, region_attention
from .regions import RegionPlan, image_plan, window_plan, window_token_rects
from .roi_align import roi_align, roi_plan

__all__ = [
    "RegionPlan",
    "absorb_queries",
    "head_mean",
    "image_plan",
    "project_context",
    "region_attention",
    "roi_align",
    "roi_plan",
    "window_plan",
    "window_token_rects",
]
