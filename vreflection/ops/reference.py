"""Readable definitions of correctness: one box at a time, nothing fused. Slow, runs anywhere, differentiable."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from .cells import tap_matrices
from .regions import RegionPlan, check_boxes_match, check_geometry


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
    from .roi_align import check_samples

    grids, box_image, offsets = check_geometry(tokens.shape[0], grids, box_image)
    boxes = check_boxes_match(boxes, box_image)
    check_samples(boxes, np.tile(grids[box_image][:, ::-1], 2), output_size, sampling_ratio)
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
    connected = tokens[:0].sum()  # also where no box or no sample reads a token
    if not cells:
        return tokens.new_zeros(0, output_size**2, tokens.shape[1]) + connected
    return torch.stack(cells).view(len(boxes), output_size**2, -1) + connected


def region_keys(tokens: torch.Tensor, plan: RegionPlan):
    """Per box, its tokens `(n, D)` and the dense sampling matrix `(C, n)` of its RoI cells, or `None`."""
    index, host = plan.key_tokens(), (plan.spans_B5 if plan.spans_host is None else plan.spans_host).tolist()
    for box, (_, _, height, width, key) in enumerate(host):
        keys = tokens[index[key : key + height * width]]
        if plan.tap_index is None or plan.tap_weight is None:
            yield keys, None
            continue
        rows, columns = tap_matrices(host, plan.tap_index, plan.tap_weight, box)
        yield keys, torch.kron(rows.contiguous(), columns.contiguous()).to(keys.dtype)


def region_attention_reference(rows: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, map_heads: int):
    """`region_attention` as its definition: context `(B, R, D)` and head-mean weights `(S, R / map_heads)`."""
    contexts, maps = [], []
    for box, (keys, sampling) in enumerate(region_keys(tokens, plan)):
        cells = keys if sampling is None else sampling @ keys
        weights = (rows[box if len(rows) > 1 else 0] @ cells.T).softmax(-1)
        contexts.append(weights @ cells)
        weights = weights if sampling is None else weights @ sampling
        if map_heads:
            maps.append(weights.unflatten(0, (map_heads, -1)).mean(0).T)
    return torch.stack(contexts), torch.cat(maps) if maps else rows.new_empty(0)


def resample_reference(queries_BQD: torch.Tensor, tokens: torch.Tensor, plan: RegionPlan, weights, heads: int):
    """Cross-attention as the stock module does it: project every key and value, box by box.

    Returns `(B, Q, D)` after the output projection and head-averaged attention `(S, Q)` on the plan's keys.
    """
    outputs, maps = [], []
    for box, (keys, sampling) in enumerate(region_keys(tokens, plan)):
        keys = keys if sampling is None else sampling @ keys
        out, attention = F.multi_head_attention_forward(
            queries_BQD[box if len(queries_BQD) > 1 else 0], keys, keys, tokens.shape[1], heads,
            weights.in_proj_weight, weights.in_proj_bias, None, None, False, 0.0,
            weights.out_proj_weight, weights.out_proj_bias,
        )  # fmt: skip
        assert attention is not None
        outputs.append(out)
        maps.append((attention if sampling is None else attention @ sampling).T)
    return torch.stack(outputs), torch.cat(maps)
