"""Where each box's keys lie in the packed visual tokens: planned once per batch, on the host, vectorised.

Shape suffixes used in `ops/`: B boxes, I images, T packed tokens, D width, Q queries, H heads, R = H*Q query rows,
N keys per region (padded), C RoI cells, K taps per cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

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
    """Keys of every box, padded to the longest region, as indices on one device.

    `token_index_BN` indexes the packed tokens, `local_index_BN` the box's own image (row-major); padding repeats the
    region's first token and is False in `mask_BN`. With RoI cells, `cell_index_BCK` indexes the N axis and
    `cell_weight_BCK` holds the bilinear weights (rows of the sparse map S, cells x tokens).
    """

    token_index_BN: torch.Tensor
    local_index_BN: torch.Tensor
    mask_BN: torch.Tensor
    grids: np.ndarray  # (I, 2) on the host
    box_image: np.ndarray  # (B,) on the host
    cell_index_BCK: torch.Tensor | None = None
    cell_weight_BCK: torch.Tensor | None = None

    @property
    def num_boxes(self) -> int:
        return self.token_index_BN.shape[0]

    @property
    def num_keys(self) -> int:
        return self.token_index_BN.shape[1]

    def image_maps(self, weights_BQN: torch.Tensor) -> list[torch.Tensor]:
        """Attention on the token grid of each box's image: a list of `(Q, h, w)`. For looking, not for the hot path."""
        queries = weights_BQN.shape[1]
        maps = []
        for box, image in enumerate(self.box_image):
            height, width = (int(v) for v in self.grids[image])
            flat = weights_BQN.new_zeros(queries, height * width)
            index = self.local_index_BN[box][self.mask_BN[box]]
            flat = flat.index_add(1, index, weights_BQN[box][:, self.mask_BN[box]])
            maps.append(flat.view(queries, height, width))
        return maps


def host_array(values, name: str, shape_tail: tuple[int, ...], dtype) -> np.ndarray:
    """`values` (tensor, array or list) as a host array of shape `(n, *shape_tail)`; a CUDA tensor costs one sync."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.size == 0:
        array = array.reshape(0, *shape_tail)
    if array.shape[1:] != shape_tail or array.ndim != 1 + len(shape_tail):
        expected = ", ".join(["n", *map(str, shape_tail)])
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(array.shape)}")
    return array.astype(dtype)


def device_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A host array as a tensor on `device`, without waiting for the copy."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


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
    return grids, box_image, np.cumsum(sizes) - sizes


def rect_plan(
    rects: np.ndarray, grids: np.ndarray, box_image: np.ndarray, offsets: np.ndarray, device: torch.device | str
) -> RegionPlan:
    """Plan from half-open token rectangles `(B, 4)` = `ty0, ty1, tx0, tx1`."""
    heights, widths = rects[:, 1] - rects[:, 0], rects[:, 3] - rects[:, 2]
    counts = heights * widths
    if len(rects) and (np.minimum(heights, widths) <= 0).any():
        bad = np.flatnonzero(np.minimum(heights, widths) <= 0)
        raise ValueError(
            f"boxes {bad.tolist()} cover no visual token; drop such rows beforehand "
            "(`vreflection.data.boxes.check_boxes` names them)"
        )
    key = np.arange(counts.max() if len(counts) else 0)
    mask = key < counts[:, None]
    key = np.where(mask, key, 0)
    safe_width = np.maximum(widths, 1)[:, None]
    rows = rects[:, 0:1] + key // safe_width
    columns = rects[:, 2:3] + key % safe_width
    local = rows * grids[box_image, 1][:, None] + columns
    return RegionPlan(
        token_index_BN=device_tensor(local + offsets[box_image][:, None], device),
        local_index_BN=device_tensor(local, device),
        mask_BN=device_tensor(mask, device),
        grids=grids,
        box_image=box_image,
    )


def window_plan(num_tokens: int, grids, boxes, box_image, device: torch.device | str = "cpu") -> RegionPlan:
    """Keys of each box by the window rule. `boxes` `(B, 4)` normalised; `grids` `(I, 2)` = (h, w) in tokens."""
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    boxes = check_boxes_match(boxes, box_image)
    rects = window_token_rects(boxes, grids[box_image] * MERGE_SIZE)
    return rect_plan(rects, grids, box_image, offsets, device)


def image_plan(num_tokens: int, grids, box_image, device: torch.device | str = "cpu") -> RegionPlan:
    """Keys of each box are all tokens of its own image, never a neighbour's in the pack."""
    grids, box_image, offsets = check_geometry(num_tokens, grids, box_image)
    size = grids[box_image]
    zero = np.zeros(len(box_image), dtype=np.int64)
    rects = np.stack([zero, size[:, 0], zero, size[:, 1]], axis=1)
    return rect_plan(rects, grids, box_image, offsets, device)


def check_boxes_match(boxes, box_image: np.ndarray) -> np.ndarray:
    boxes = host_array(boxes, "boxes", (4,), np.float64)
    if len(boxes) != len(box_image):
        raise ValueError(f"boxes and box_image disagree: {len(boxes)} boxes, {len(box_image)} image indices")
    if not np.isfinite(boxes).all():
        bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1)).tolist()
        raise ValueError(f"boxes {bad} are not finite: {boxes[bad].tolist()}")
    return boxes
