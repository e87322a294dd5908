"""Where each box's keys lie in the packed visual tokens: planned once per batch, on the host, vectorised.

Shape suffixes used in `ops/`: B boxes, I images, T packed tokens, D width, Q queries, H heads, R = H*Q query rows,
S keys of all boxes end to end, P RoI cells per side, C = P*P cells, K taps per axis and cell.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from .schemas import implement, wide_dtype

MERGE_SIZE = 2  # 14-px patches per visual token and axis in the Qwen2-VL family


def window_token_rects(boxes: np.ndarray, patch_grids: np.ndarray) -> np.ndarray:
    """Token rectangle that a box covers under the window rule.

    Args:
        boxes: `(B, 4)` float, normalised `x0, y0, x1, y1`.
        patch_grids: `(B, 2)` int, the image's size `(H, W)` in 14-px patches, one row per box.

    Returns:
        `(B, 4)` int64 `ty0, ty1, tx0, tx1` (half-open, in tokens); an empty rectangle has `ty1 <= ty0` or `tx1 <= tx0`.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    patch_grids = np.asarray(patch_grids, dtype=np.float64).reshape(-1, 2)
    size = patch_grids[:, ::-1]  # (W, H), to match x before y
    low = np.clip(np.floor(boxes[:, :2] * size), 0, size - 1)
    high = np.clip(np.ceil(boxes[:, 2:] * size), 0, size)
    first = low // MERGE_SIZE
    last = (high + 1) // MERGE_SIZE
    return np.stack([first[:, 1], last[:, 1], first[:, 0], last[:, 0]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class RegionPlan:
    """Keys of every box: ragged rectangles of the packed tokens, nothing padded.

    Attributes:
        spans_B5: int64 `[first, stride, height, width, key_offset]`. Key j of a box is token
            `first + (j // width) * stride + j % width` and entry `key_offset + j` of the S keys.
        key_box_S: int32, the box of every key.
        num_tokens: T, rows of the packed tokens the plan was made for.
        tap_index, tap_weight: `(2, B, P, K)` or `None`. RoI-Align as a separable sparse map S: axis 0 holds token rows
            inside the rectangle, axis 1 columns; a cell is the product of its two axes' taps.
        spans_host, grids, box_image: the same geometry on the host; `None` while `torch.compile` traces.
    """

    spans_B5: torch.Tensor
    key_box_S: torch.Tensor
    num_tokens: int
    tap_index: torch.Tensor | None = None
    tap_weight: torch.Tensor | None = None
    spans_host: np.ndarray | None = None
    grids: np.ndarray | None = None
    box_image: np.ndarray | None = None

    @property
    def num_boxes(self) -> int:
        return self.spans_B5.shape[0]

    @property
    def num_keys(self) -> int:
        return self.key_box_S.shape[0]

    @property
    def geometry(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The four tensors every operator takes."""
        return self.spans_B5, self.key_box_S, self.tap_index, self.tap_weight

    def key_tokens(self) -> torch.Tensor:
        """Packed token index of every key, `(S,)` int64."""
        first, stride, _, width, key_offset = self.spans_B5[self.key_box_S.long()].unbind(1)
        key = torch.arange(self.num_keys, device=first.device) - key_offset
        return first + key // width * stride + key % width

    def keys_in(self, image_keys: RegionPlan) -> torch.Tensor:
        """Where this plan's keys lie among those of `image_keys`, an `image_plan` of the same boxes; `(S,)` int64."""
        spans = image_keys.spans_B5[self.key_box_S.long()]
        return spans[:, 4] + self.key_tokens() - spans[:, 0]

    def image_maps(self, maps_SQ: torch.Tensor) -> list[torch.Tensor]:
        """Attention on the token grid of each box's image: a list of `(Q, h, w)`; views when a box is its image."""
        if self.spans_host is None or self.grids is None or self.box_image is None:
            raise ValueError("image_maps needs the geometry on the host; call it outside torch.compile")
        maps = []
        offsets = first_tokens(self.grids)
        for (first, stride, height, width, key), image in zip(self.spans_host.tolist(), self.box_image.tolist()):
            rows, columns = self.grids[image].tolist()
            part = maps_SQ[key : key + height * width].view(height, width, -1).permute(2, 0, 1)
            if (height, width) != (rows, columns):
                top, left = divmod(first - int(offsets[image]), stride)
                margins = (left, columns - left - width, top, rows - top - height)
                part = torch.nn.functional.pad(part, margins)
            maps.append(part)
        return maps


def host_array(values, name: str, shape_tail: tuple[int, ...], dtype) -> np.ndarray:
    """`values` (tensor, array or list) as a host array of shape `(n, *shape_tail)`; a CUDA tensor costs one sync."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        array = (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    else:
        array = np.asarray(values)
    if array.size == 0:
        array = array.reshape(0, *shape_tail)
    if array.shape[1:] != shape_tail or array.ndim != 1 + len(shape_tail):
        expected = ", ".join(["n", *map(str, shape_tail)])
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(array.shape)}")
    try:
        cast = array.astype(dtype)
    except OverflowError:  # whole numbers of any length
        if np.issubdtype(dtype, np.integer):
            raise ValueError(f"{name}: expected whole numbers that {np.dtype(dtype)} holds, got larger ones") from None
        cast = np.vectorize(_nearest_float, otypes=[dtype])(array)
    if np.issubdtype(cast.dtype, np.integer) and (cast != array).any():
        raise ValueError(f"{name}: expected whole numbers, got {array.tolist()}")
    return cast


def _nearest_float(value) -> float:
    """A number as a float, infinite where no finite float is that large."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def device_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A host array as a tensor on `device`, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the stream
    return tensor.to(device, non_blocking=True)


def check_geometry(num_tokens: int, grids, box_image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validate the packing: returns grids `(I, 2)`, box_image `(B,)` and the first packed row of each image `(I,)`."""
    grids = host_array(grids, "grids", (2,), np.int64)
    box_image = host_array(box_image, "box_image", (), np.int64)
    if (grids <= 0).any():
        raise ValueError(f"grids: expected positive (h, w) in tokens, got {grids.tolist()}")
    sizes = grids[:, 0] * grids[:, 1]
    if int(sizes.sum()) != num_tokens:
        raise ValueError(
            f"tokens and grids disagree: grids {grids.tolist()} need {int(sizes.sum())} packed rows, got {num_tokens}; "
            "grids are (h, w) in merged visual tokens, half the 14-px patch grid"
        )
    if len(box_image) and (box_image.min() < 0 or box_image.max() >= len(grids)):
        raise ValueError(f"box_image: expected values in [0, {len(grids)}), got {box_image.tolist()}")
    return grids, box_image, first_tokens(grids)


def first_tokens(grids: np.ndarray) -> np.ndarray:
    """First packed row of each image."""
    sizes = grids[:, 0] * grids[:, 1]
    return np.cumsum(sizes) - sizes


def rect_plan(
    rects: np.ndarray, grids: np.ndarray, box_image: np.ndarray, offsets: np.ndarray, device: torch.device | str
) -> RegionPlan:
    """Plan from half-open token rectangles `(B, 4)` = `ty0, ty1, tx0, tx1`."""
    heights, widths = rects[:, 1] - rects[:, 0], rects[:, 3] - rects[:, 2]
    if len(rects) and (np.minimum(heights, widths) <= 0).any():
        bad = np.flatnonzero(np.minimum(heights, widths) <= 0)
        raise ValueError(
            f"boxes {bad.tolist()} cover no visual token; drop such rows beforehand "
            "(`vreflection.data.boxes.check_boxes` names them)"
        )
    counts = heights * widths
    strides = grids[box_image, 1]
    first = offsets[box_image] + rects[:, 0] * strides + rects[:, 2]
    spans = np.stack([first, strides, heights, widths, np.cumsum(counts) - counts], axis=1).astype(np.int64)
    return RegionPlan(
        spans_B5=device_tensor(spans, device),
        key_box_S=device_tensor(np.repeat(np.arange(len(rects), dtype=np.int32), counts), device),
        num_tokens=int((grids[:, 0] * grids[:, 1]).sum()),
        spans_host=spans,
        grids=grids,
        box_image=box_image,
    )


def window_plan(num_tokens: int, grids, boxes, box_image, device: torch.device | str = "cpu") -> RegionPlan:
    """Keys of each box by the window rule. `boxes` `(B, 4)` normalised; `grids` `(I, 2)` = (h, w) in tokens."""
    if torch.compiler.is_compiling():
        arguments = traced_geometry(grids, box_image, boxes)
        spans, key_box = torch.ops.vreflection.window_plan(*arguments, num_tokens, str(device))
        return RegionPlan(spans, key_box, num_tokens)
    return host_window_plan(num_tokens, grids, boxes, box_image, device)


def host_window_plan(num_tokens: int, grids, boxes, box_image, device: torch.device | str) -> RegionPlan:
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    boxes = check_boxes_match(boxes, box_image)
    rects = window_token_rects(boxes, grids[box_image] * MERGE_SIZE)
    return rect_plan(rects, grids, box_image, offsets, device)


def image_plan(num_tokens: int, grids, box_image, device: torch.device | str = "cpu") -> RegionPlan:
    """Keys of each box are all tokens of its own image, never a neighbour's in the pack."""
    if torch.compiler.is_compiling():
        arguments = traced_geometry(grids, box_image)
        spans, key_box = torch.ops.vreflection.image_plan(*arguments, num_tokens, str(device))
        return RegionPlan(spans, key_box, num_tokens)
    return host_image_plan(num_tokens, grids, box_image, device)


def host_image_plan(num_tokens: int, grids, box_image, device: torch.device | str) -> RegionPlan:
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    size = grids[box_image]
    zero = np.zeros(len(box_image), dtype=np.int64)
    rects = np.stack([zero, size[:, 0], zero, size[:, 1]], axis=1)
    return rect_plan(rects, grids, box_image, offsets, device)


def traced_geometry(*values) -> list[torch.Tensor]:
    """Geometry as tensors, for the planning operators that `torch.compile` sees instead of host code."""
    return [torch.as_tensor(value) for value in values]


def check_boxes_match(boxes, box_image: np.ndarray) -> np.ndarray:
    boxes = host_array(boxes, "boxes", (4,), np.float64)
    if len(boxes) != len(box_image):
        raise ValueError(f"boxes and box_image disagree: {len(boxes)} boxes, {len(box_image)} image indices")
    if not np.isfinite(boxes).all():
        bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1)).tolist()
        raise ValueError(f"boxes {bad} are not finite: {boxes[bad].tolist()}")
    return boxes


def check_tokens(tokens: torch.Tensor, width: int | None = None) -> None:
    expected = "D" if width is None else width
    if tokens.dim() != 2 or (width is not None and tokens.shape[1] != width):
        raise ValueError(f"tokens: expected packed (T, {expected}), got {tuple(tokens.shape)}")
    if not tokens.is_floating_point():
        raise ValueError(f"tokens: expected floating point, got {tokens.dtype}")


def check_plan(plan: RegionPlan, tokens: torch.Tensor) -> None:
    """Refuse a plan of other tokens, or whose sampling weights do not have the precision these tokens need."""
    if not isinstance(plan, RegionPlan):
        raise ValueError(f"plan: expected a RegionPlan (window_plan, image_plan, roi_plan), got {type(plan).__name__}")
    if plan.spans_B5.device.type != tokens.device.type:
        raise ValueError(
            f"plan: made for {plan.spans_B5.device.type}, tokens are on {tokens.device.type}; "
            "pass device=tokens.device when making it"
        )
    if plan.num_tokens != tokens.shape[0]:
        raise ValueError(f"tokens: the plan was made for {plan.num_tokens} packed rows, got {tokens.shape[0]}")
    if plan.tap_weight is not None and plan.tap_weight.dtype != wide_dtype(tokens.dtype):
        needed = wide_dtype(tokens.dtype)
        raise ValueError(
            f"plan: {tokens.dtype} tokens need {needed} sampling weights, got {plan.tap_weight.dtype}; "
            f"make it with roi_plan(..., dtype={needed})"
        )


def row_strided(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens whose channels are adjacent and whose rows do not share memory; anything else is copied.

    The kernels ask for the former. Autograd needs the latter: it takes the gradient of a view of shared memory for that
    of one entry.
    """
    apart = tokens.shape[0] < 2 or tokens.stride(0) >= tokens.shape[1]
    return tokens if tokens.stride(1) == 1 and apart else tokens.contiguous()


def _traced_window_plan(grids, box_image, boxes, num_tokens, device):
    plan = host_window_plan(num_tokens, grids, boxes, box_image, device)
    return plan.spans_B5, plan.key_box_S


def _traced_image_plan(grids, box_image, num_tokens, device):
    plan = host_image_plan(num_tokens, grids, box_image, device)
    return plan.spans_B5, plan.key_box_S


implement("window_plan", _traced_window_plan)
implement("image_plan", _traced_image_plan)


def without_autocast(device_type: str):
    """A context in which products keep the dtypes they are given; torch knows no autocast for the meta device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def autocast_values(*values: torch.Tensor) -> list[torch.Tensor]:
    """Everything in the autocast dtype when autocast is on; otherwise one dtype is asked for."""
    device = values[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device) and values[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return [value.to(dtype) for value in values]
    dtypes = {str(value.dtype) for value in values}
    if len(dtypes) > 1:
        raise ValueError(
            f"queries, tokens and weights must have one dtype, got {sorted(dtypes)}; cast them, or use torch.autocast"
        )
    return list(values)
