"""Readable definitions of correctness: one box at a time, nothing fused. Slow, runs anywhere, differentiable."""

from __future__ import annotations

import math

import torch
from torch import nn

from .regions import RegionPlan, check_geometry, host_array


def _bilinear(image_HWD: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Value at a point in token units (token centres on integers); outside, the border value is repeated."""
    height, width = image_HWD.shape[:2]
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image_HWD[top, left] * (1 - dx) + image_HWD[top, right] * dx
    lower = image_HWD[bottom, left] * (1 - dx) + image_HWD[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def roi_align_reference(
    tokens: torch.Tensor, grids, boxes, box_image, output_size: int, sampling_ratio: int = 2, aligned: bool = True
) -> torch.Tensor:
    """`roi_align` written as its definition: for each box, cell and sample, one bilinear look-up."""
    grids, box_image, offsets = check_geometry(tokens.shape[0], grids, box_image)
    boxes = host_array(boxes, "boxes", (4,), float)
    shift = 0.5 if aligned else 0.0
    cells = []
    for box, image in zip(boxes.tolist(), box_image.tolist()):
        height, width = (int(v) for v in grids[image])
        image_HWD = tokens[offsets[image] : offsets[image] + height * width].view(height, width, -1)
        left, top = box[0] * width - shift, box[1] * height - shift
        roi_width, roi_height = box[2] * width - shift - left, box[3] * height - shift - top
        if not aligned:
            roi_width, roi_height = max(roi_width, 1.0), max(roi_height, 1.0)
        bin_height, bin_width = roi_height / output_size, roi_width / output_size
        rows = sampling_ratio or max(math.ceil(bin_height), 0)
        columns = sampling_ratio or max(math.ceil(bin_width), 0)
        for cell in range(output_size**2):
            cell_row, cell_column = divmod(cell, output_size)
            total = tokens.new_zeros(tokens.shape[1])
            for sample in range(rows * columns):
                row, column = divmod(sample, columns)
                y = top + bin_height * (cell_row + (row + 0.5) / rows)
                x = left + bin_width * (cell_column + (column + 0.5) / columns)
                total = total + _bilinear(image_HWD, y, x)
            cells.append(total / max(rows * columns, 1))
    if not cells:
        return tokens.new_zeros(0, output_size**2, tokens.shape[1])
    return torch.stack(cells).view(len(boxes), output_size**2, -1)


def resample_reference(
    queries_BQD: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, attention: nn.MultiheadAttention, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-attention + LayerNorm as the stock module does it: project every key and value, box by box.

    Returns latents `(B, Q, D)` and head-averaged attention `(B, Q, N)` on the plan's tokens.
    """
    latents, maps = [], []
    for box in range(plan.num_boxes):
        keep = plan.mask_BN[box]
        keys = tokens[plan.token_index_BN[box][keep]]  # [n, D]
        sampling = None
        if plan.cell_index_BCK is not None and plan.cell_weight_BCK is not None:
            index, weight = plan.cell_index_BCK[box], plan.cell_weight_BCK[box].to(tokens.dtype)
            sampling = tokens.new_zeros(index.shape[0], plan.num_keys).scatter_add(1, index, weight)[:, keep]
            keys = sampling @ keys
        out, weights = attention(queries_BQD[box : box + 1], keys[None], keys[None], need_weights=True)
        weights = weights[0] if sampling is None else weights[0] @ sampling
        latents.append(norm(out[0]))
        maps.append(weights.new_zeros(weights.shape[0], plan.num_keys).index_copy(1, keep.nonzero()[:, 0], weights))
    return torch.stack(latents), torch.stack(maps)
