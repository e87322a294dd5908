"""RoI-Align on packed tokens, and its sampling map as separable taps (rows of a sparse matrix)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .cells import rectangle, sample_cells, splat_cells, tap_matrices
from .dispatch import choose, operator
from .regions import (
    RegionPlan,
    check_boxes_match,
    check_geometry,
    check_tokens,
    device_tensor,
    rect_plan,
    row_strided,
    traced_geometry,
    without_autocast,
)
from .schemas import implement, wide_dtype


def _axis_taps(
    start: np.ndarray, extent: np.ndarray, length: np.ndarray, cells: int, sampling_ratio: int, aligned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear taps along one axis: indices and weights `(B, P, 2 * samples)`, each cell a mean over its samples."""
    if not aligned:
        extent = np.maximum(extent, 1.0)
    bin_size = extent / cells
    samples = np.full(len(start), sampling_ratio) if sampling_ratio > 0 else np.maximum(np.ceil(bin_size), 0)
    count = int(max(samples.max(initial=1), 1))
    step, cell = np.arange(count), np.arange(cells)[None, :, None]
    used = step < samples[:, None, None]
    within = np.where(used, step, 0)  # samples that a box does not take repeat its first one, with weight zero
    position = start[:, None, None] + bin_size[:, None, None] * (
        cell + (within + 0.5) / np.maximum(samples, 1)[:, None, None]
    )
    last = (length - 1).astype(np.float64)[:, None, None]
    # Outside the outermost token centres the border value is repeated.
    position = np.clip(position, 0.0, last)
    low = np.floor(position)
    high = np.minimum(low + 1, last)
    fraction = position - low
    scale = used / np.maximum(samples, 1)[:, None, None]
    index = np.concatenate([low, high], axis=-1).astype(np.int64)
    weight = np.concatenate([(1 - fraction) * scale, fraction * scale], axis=-1)
    return index, weight


def check_sampling(output_size: int, sampling_ratio: int) -> None:
    if not isinstance(output_size, int) or output_size < 1:
        raise ValueError(f"output_size: expected a whole number of at least 1, got {output_size!r}")
    if not isinstance(sampling_ratio, int) or sampling_ratio < 0:
        raise ValueError(f"sampling_ratio: expected samples per cell and axis, or 0 (adaptive), got {sampling_ratio!r}")


# Beyond, an adaptive grid fills the memory, and float64 soon no longer tells one token from the next.
MAX_SAMPLES = 2**16
MAX_COORDINATE = 1e12


def check_samples(boxes: np.ndarray, scale: np.ndarray, output_size: int, sampling_ratio: int) -> None:
    """Refuse boxes so large that no sampling grid can be laid over them.

    Args:
        boxes, scale: `(B, 4)`, normalised, and the tokens of the image along each coordinate.
    """
    too_far = (np.abs(boxes) > MAX_COORDINATE).any(axis=1)
    if not sampling_ratio and not too_far.any():
        extents = (boxes[:, 2:] - boxes[:, :2]) * scale[:, 2:]
        too_far = (extents > MAX_SAMPLES * output_size).any(axis=1)
    if too_far.any():
        bad = np.flatnonzero(too_far).tolist()
        raise ValueError(
            f"boxes {bad} are too large to sample: {boxes[bad].tolist()}; expected normalised coordinates, 0 to 1 "
            "inside the image"
        )


def _pad_taps(taps: np.ndarray, count: int) -> np.ndarray:
    return np.pad(taps, ((0, 0), (0, 0), (0, count - taps.shape[-1])))


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
    """Plan whose keys are `output_size**2` RoI cells, sampled from the tokens in the box's support.

    `dtype` is that of the tap weights: float32, or float64 for float64 tokens.
    """
    check_sampling(output_size, sampling_ratio)
    settings = (output_size, sampling_ratio, aligned)
    if torch.compiler.is_compiling():
        arguments = traced_geometry(grids, box_image, boxes)
        plan = torch.ops.vreflection.roi_plan(*arguments, num_tokens, *settings, dtype == torch.float64, str(device))
        return RegionPlan(plan[0], plan[1], num_tokens, plan[2], plan[3])
    return host_roi_plan(num_tokens, grids, boxes, box_image, *settings, device, dtype)


def host_roi_plan(
    num_tokens: int, grids, boxes, box_image, output_size: int, sampling_ratio: int, aligned: bool, device, dtype
) -> RegionPlan:
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    boxes = check_boxes_match(boxes, box_image)
    size = grids[box_image]
    scale = np.stack([size[:, 1], size[:, 0], size[:, 1], size[:, 0]], axis=1)
    check_samples(boxes, scale, output_size, sampling_ratio)
    rois = boxes * scale - (0.5 if aligned else 0.0)
    axes = [
        _axis_taps(rois[:, a], rois[:, a + 2] - rois[:, a], size[:, 1 - a], output_size, sampling_ratio, aligned)
        for a in (1, 0)
    ]
    low = [index.min(axis=(1, 2)) for index, _ in axes]
    high = [index.max(axis=(1, 2)) + 1 for index, _ in axes]
    plan = rect_plan(np.stack([low[0], high[0], low[1], high[1]], axis=1), grids, box_image, offsets, device)
    taps = max(index.shape[-1] for index, _ in axes)
    inside = [_pad_taps(index - start[:, None, None], taps) for (index, _), start in zip(axes, low)]
    weight = np.stack([_pad_taps(weight, taps) for _, weight in axes])
    return replace(
        plan,
        tap_index=device_tensor(np.stack(inside), device),
        tap_weight=device_tensor(weight, device).to(dtype, non_blocking=True),
    )


def roi_align_torch(tokens, spans, tap_index, tap_weight) -> torch.Tensor:
    """Plain form of the operator `roi_align`, box by box."""
    host = spans.tolist()
    out = tokens.new_empty(len(host), tap_index.shape[2] ** 2, tokens.shape[1])
    with without_autocast(tokens.device.type):
        for box, span in enumerate(host):
            maps = tap_matrices(host, tap_index, tap_weight, box)
            out[box] = sample_cells(rectangle(tokens, span).to(tap_weight.dtype), *maps)
    return out


def roi_align_backward_torch(grad, spans, tap_index, tap_weight, num_tokens) -> torch.Tensor:
    host = spans.tolist()
    out = tap_weight.new_zeros(num_tokens, grad.shape[2])
    with without_autocast(grad.device.type):
        for box, span in enumerate(host):
            maps = tap_matrices(host, tap_index, tap_weight, box)
            rectangle(out, span).add_(splat_cells(grad[box].to(tap_weight.dtype), *maps))
    return out.to(grad.dtype)


def _traced_roi_plan(
    grids, box_image, boxes, num_tokens, output_size, sampling_ratio, aligned, float64, device
):  # fmt: skip
    dtype = torch.float64 if float64 else torch.float32
    plan = host_roi_plan(num_tokens, grids, boxes, box_image, output_size, sampling_ratio, aligned, device, dtype)
    return plan.geometry


for _name, _function in (
    ("roi_align_torch", roi_align_torch),
    ("roi_align_backward_torch", roi_align_backward_torch),
    ("roi_plan", _traced_roi_plan),
):
    implement(_name, _function)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, spans, tap_index, tap_weight, impl):
        ctx.save_for_backward(spans, tap_index, tap_weight)
        ctx.impl, ctx.num_tokens = impl, tokens.shape[0]
        return operator("roi_align", impl, tokens.device.type)(tokens, spans, tap_index, tap_weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        backward = operator("roi_align_backward", ctx.impl, grad.device.type)
        return backward(grad.contiguous(), *ctx.saved_tensors, ctx.num_tokens), None, None, None, None


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
        impl: `"auto"`, `"reference"`, `"torch"`, `"cpp"` or `"triton"`; only `"auto"` chooses.

    Returns:
        `(B, P*P, D)` in the dtype of `tokens`, cells row-major.

    Raises:
        ValueError: shapes or packing disagree, or `impl` is unknown or cannot run on these tensors.

    Source: He et al., Mask R-CNN, section 3. Gradients flow to `tokens` only.
    """
    check_tokens(tokens)
    impl = choose("roi_align", impl, tokens)
    if impl == "reference":
        from .reference import roi_align_reference

        check_sampling(output_size, sampling_ratio)
        return roi_align_reference(tokens, grids, boxes, box_image, output_size, sampling_ratio, aligned)
    plan = roi_plan(
        tokens.shape[0], grids, boxes, box_image, output_size, sampling_ratio, aligned,
        tokens.device, wide_dtype(tokens.dtype),
    )  # fmt: skip
    if not plan.num_boxes:
        return tokens.new_zeros(0, output_size**2, tokens.shape[1]) + tokens[:0].sum()
    return _RoIAlign.apply(row_strided(tokens), plan.spans_B5, plan.tap_index, plan.tap_weight, impl)
