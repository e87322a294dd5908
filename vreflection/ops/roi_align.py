"""RoI-Align on packed tokens, and its sampling map as indices and weights (rows of a sparse matrix)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .regions import RegionPlan, check_boxes_match, check_geometry, rect_plan

IMPLEMENTATIONS = ("auto", "torch", "reference")


def _axis_taps(
    start: np.ndarray, extent: np.ndarray, length: np.ndarray, cells: int, sampling_ratio: int, aligned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear taps along one axis: indices and weights `(B, cells, S, 2)`; the mean over samples is in the weights."""
    if not aligned:
        extent = np.maximum(extent, 1.0)
    bin_size = extent / cells
    samples = np.full(len(start), sampling_ratio) if sampling_ratio > 0 else np.maximum(np.ceil(bin_size), 0)
    count = int(max(samples.max(initial=1), 1))
    step = np.arange(count)
    cell = np.arange(cells)[None, :, None]
    position = start[:, None, None] + bin_size[:, None, None] * (
        cell + (step + 0.5) / np.maximum(samples, 1)[:, None, None]
    )
    last = (length - 1).astype(np.float64)[:, None, None]
    # Outside the outermost token centres the border value is repeated.
    position = np.clip(position, 0.0, last)
    low = np.floor(position)
    high = np.minimum(low + 1, last)
    fraction = position - low
    scale = (step < samples[:, None, None]) / np.maximum(samples, 1)[:, None, None]
    index = np.stack([low, high], axis=-1).astype(np.int64)
    weight = np.stack([(1 - fraction) * scale, fraction * scale], axis=-1)
    return index, weight


def roi_plan(
    num_tokens: int,
    grids,
    boxes,
    box_image,
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RegionPlan:
    """Plan whose keys are `output_size**2` RoI cells, sampled from the tokens in the box's support."""
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    boxes = check_boxes_match(boxes, box_image)
    if output_size < 1:
        raise ValueError(f"output_size: expected at least 1, got {output_size}")
    size = grids[box_image]
    scale = np.stack([size[:, 1], size[:, 0], size[:, 1], size[:, 0]], axis=1)
    rois = boxes * scale - (0.5 if aligned else 0.0)
    axis = [
        _axis_taps(rois[:, a], rois[:, a + 2] - rois[:, a], size[:, 1 - a], output_size, sampling_ratio, aligned)
        for a in (1, 0)
    ]
    (row_index, row_weight), (column_index, column_weight) = axis
    rects = np.stack(
        [
            fn(index, axis=(1, 2, 3)) + edge
            for index in (row_index, column_index)
            for fn, edge in ((np.min, 0), (np.max, 1))
        ],
        axis=1,
    ).reshape(-1, 4)
    plan = rect_plan(rects, grids, box_image, offsets, device)
    # (B, cell row, cell column, row taps, column taps): the outer product of the two axes.
    count, _, samples_y, _ = row_index.shape
    samples_x = column_index.shape[2]
    as_rows = (count, output_size, 1, samples_y * 2, 1)
    as_columns = (count, 1, output_size, 1, samples_x * 2)
    as_cells = (count, output_size**2, samples_y * samples_x * 4)
    rows = (row_index - rects[:, 0][:, None, None, None]).reshape(as_rows)
    columns = (column_index - rects[:, 2][:, None, None, None]).reshape(as_columns)
    width = (rects[:, 3] - rects[:, 2])[:, None, None, None, None]
    index = (rows * width + columns).reshape(as_cells)
    weight = (row_weight.reshape(as_rows) * column_weight.reshape(as_columns)).reshape(as_cells)
    return replace(
        plan,
        cell_index_BCK=torch.from_numpy(index).to(device, non_blocking=True),
        cell_weight_BCK=torch.from_numpy(weight).to(device=device, dtype=dtype, non_blocking=True),
    )


def sample_cells(plan: RegionPlan, values_BRN: torch.Tensor) -> torch.Tensor:
    """Apply S: per-token channels `(B, R, N)` to cell channels `(B, R, C)`."""
    assert plan.cell_index_BCK is not None and plan.cell_weight_BCK is not None
    count, cells, taps = plan.cell_index_BCK.shape
    index = plan.cell_index_BCK.view(count, 1, cells * taps).expand(-1, values_BRN.shape[1], -1)
    picked = values_BRN.gather(2, index).view(*values_BRN.shape[:2], cells, taps)
    return torch.einsum("brck,bck->brc", picked, plan.cell_weight_BCK.to(values_BRN.dtype))


def splat_cells(plan: RegionPlan, cells_BRC: torch.Tensor) -> torch.Tensor:
    """Apply the transpose of S: cell channels `(B, R, C)` back to token channels `(B, R, N)`."""
    assert plan.cell_index_BCK is not None and plan.cell_weight_BCK is not None
    count, cells, taps = plan.cell_index_BCK.shape
    rows = cells_BRC.shape[1]
    spread = torch.einsum("brc,bck->brck", cells_BRC, plan.cell_weight_BCK.to(cells_BRC.dtype))
    index = plan.cell_index_BCK.view(count, 1, cells * taps).expand(-1, rows, -1)
    out = cells_BRC.new_zeros(count, rows, plan.num_keys)
    return out.scatter_add(2, index, spread.reshape(count, rows, cells * taps))


def roi_align(
    tokens: torch.Tensor,
    grids: torch.Tensor,
    boxes: torch.Tensor,
    box_image: torch.Tensor,
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """RoI-Align of packed visual tokens; samples outside the token centres repeat the border value.

    This is torchvision's pure-PyTorch rule. Its compiled kernels instead zero samples more than one token outside the
    image, which a box within [0, 1] never has: for such boxes both agree.

    Args:
        tokens: `(T, D)` floating point, all images' visual tokens, row-major per image.
        grids: `(I, 2)` int, (h, w) of each image in tokens; kept on the CPU it costs no device sync.
        boxes: `(B, 4)` normalised `x0, y0, x1, y1`.
        box_image: `(B,)` int, the image each box lies in.
        output_size: cells per side, P.
        sampling_ratio: samples per cell and axis; 0 = adaptive, `ceil(box size / P)`.
        aligned: shift by half a token so that integer coordinates lie between token centres.
        impl: `"auto"`, `"torch"` or `"reference"`; only `"auto"` chooses.

    Returns:
        `(B, P*P, D)` in the dtype of `tokens`, cells row-major.

    Raises:
        ValueError: shapes or packing disagree, or `impl` is unknown.

    Source: He et al., Mask R-CNN, section 3. Gradients flow to `tokens` only.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "reference":
        from .reference import roi_align_reference

        return roi_align_reference(tokens, grids, boxes, box_image, output_size, sampling_ratio, aligned)
    plan = roi_plan(
        tokens.shape[0], grids, boxes, box_image, output_size, sampling_ratio, aligned, tokens.device, tokens.dtype
    )
    assert plan.cell_index_BCK is not None and plan.cell_weight_BCK is not None
    if not plan.num_boxes:
        return tokens.new_zeros(0, output_size**2, tokens.shape[1])
    # S as a dense (C, N) block per box: one batched product instead of K gathered copies of the features.
    count, cells, _ = plan.cell_index_BCK.shape
    map_BCN = tokens.new_zeros(count, cells, plan.num_keys).scatter_add(2, plan.cell_index_BCK, plan.cell_weight_BCK)
    return torch.bmm(map_BCN, tokens[plan.token_index_BN])
