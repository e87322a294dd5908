"""Box geometry: validation of normalised boxes and the window rule that turns a box into visual tokens.

Shape legend: B boxes, h x w visual tokens of an image whose grid is H x W patches of 14 px (h = H / merge).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from vreflection.errors import DataError
from vreflection.ops import regions
from vreflection.ops.regions import MERGE_SIZE

# How far a coordinate may lie outside [0, 1] and still be read as rounding of the annotation: such boxes are clamped
# and counted. Further out, the row most likely holds pixels or another image's box, so it is refused.
CLAMP_TOLERANCE = 0.05
# Sides below this are empty. It sits far under one pixel of any image, yet far above float64 rounding, so a box that
# passes always covers at least one visual token.
MIN_BOX_SIDE = 1e-9

_FIX_ORDER = "write boxes as x0, y0, x1, y1 with x0 < x1 and y0 < y1"


def window_token_rects(boxes: ArrayLike, grids_hw: ArrayLike) -> np.ndarray:
    """Visual-token rectangle of each box under the window rule, with checked arguments.

    The rule itself (`vreflection.ops.regions`) widens the box to whole patches, then to whole visual tokens, and
    clamps what lies outside the image.

    Args:
        boxes: (B, 4) normalised x0, y0, x1, y1; computed in float64.
        grids_hw: (B, 2) or (2,) patch rows H and columns W of each box's image; a third leading column (a full
            `grid_thw`) is accepted and ignored.

    Returns:
        (B, 4) int64 `ty0, ty1, tx0, tx1`, end-exclusive, in visual tokens. Where the rule selects nothing (inverted
        boxes, points on a token border) or the box is not finite, all zeros. The rule itself does not ask for an
        area: a point inside a token selects that token, so validate with `check_boxes` first.

    Raises:
        ValueError: wrong shapes, or a grid that is not a positive multiple of the merge size.
    """
    boxes_B4 = np.asarray(boxes, dtype=np.float64)
    if boxes_B4.ndim != 2 or boxes_B4.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (B, 4), got {boxes_B4.shape}; wrap a single box in a list")
    grids = np.asarray(grids_hw, dtype=np.int64)
    if grids.ndim not in (1, 2) or grids.shape[-1] not in (2, 3):
        raise ValueError(f"expected grids of shape (B, 2), (B, 3), (2,) or (3,), got {grids.shape}; pass H, W per box")
    hw_B2 = np.broadcast_to(grids[..., -2:], (len(boxes_B4), 2))
    if (hw_B2 <= 0).any() or (hw_B2 % MERGE_SIZE).any():
        raise ValueError(
            f"expected patch grids that are positive multiples of {MERGE_SIZE}, got {hw_B2.tolist()}; "
            "pass H, W in 14-px patches, not in visual tokens or pixels"
        )
    finite_B = np.all(np.isfinite(boxes_B4), axis=1)
    rects_B4 = regions.window_token_rects(np.where(finite_B[:, None], boxes_B4, 0.0), hw_B2)
    empty_B = (rects_B4[:, 0] >= rects_B4[:, 1]) | (rects_B4[:, 2] >= rects_B4[:, 3])
    rects_B4[empty_B | ~finite_B] = 0
    return rects_B4


def box_mask(box: Sequence[float], height: int, width: int) -> np.ndarray:
    """Tokens a box covers under the window rule, `(h, w)` bool."""
    (top, bottom, left, right) = window_token_rects([box], [height * MERGE_SIZE, width * MERGE_SIZE])[0]
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def box_to_token_indices(box: Sequence[float], grid_thw: Sequence[int]) -> list[int]:
    """Row-major indices of the visual tokens a box covers within its own image, by the window rule.

    Args:
        box: normalised x0, y0, x1, y1.
        grid_thw: (1, H, W), the image's grid in 14-px patches.

    Returns:
        Indices into the image's h * w visual tokens; empty where the rule selects nothing.

    Raises:
        ValueError: wrong shapes or grid, or more than one frame.
    """
    frames, _, width = (int(value) for value in grid_thw)
    if frames != 1:
        raise ValueError(f"expected one frame (grid_thw[0] == 1), got {frames}; the window rule is for still images")
    ty0, ty1, tx0, tx1 = window_token_rects([list(box)], list(grid_thw))[0].tolist()
    columns = width // MERGE_SIZE
    return [row * columns + column for row in range(ty0, ty1) for column in range(tx0, tx1)]


def check_boxes(boxes: ArrayLike, source: str | None = None) -> tuple[np.ndarray, int]:
    """Validate normalised boxes and clamp those that stick out of the image by at most `CLAMP_TOLERANCE`.

    Args:
        boxes: (n, 4) `x0, y0, x1, y1`; n = 0 is allowed.
        source: `file:row`, put in front of error messages.

    Returns:
        (n, 4) float64 boxes inside [0, 1], and how many of them were changed by clamping.

    Raises:
        DataError: `box-shape`, `box-nan` (NaN or infinite), `box-outside`, `box-inverted` or `box-empty`.
    """
    try:
        boxes_n4 = np.array(boxes, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            "box-shape", f"expected a list of four-number boxes, got {boxes!r}; {_FIX_ORDER}", source
        ) from None
    if boxes_n4.size == 0 and boxes_n4.shape in ((0,), (0, 4)):
        return np.zeros((0, 4)), 0
    if boxes_n4.ndim != 2 or boxes_n4.shape[1] != 4:
        raise DataError("box-shape", f"expected boxes of shape (n, 4), got {boxes_n4.shape}; {_FIX_ORDER}", source)
    for index, box in enumerate(boxes_n4):
        _check_raw_box(index, box, source)
    clamped_n4 = boxes_n4.clip(0.0, 1.0)
    for index, (raw, box) in enumerate(zip(boxes_n4, clamped_n4, strict=True)):
        if min(box[2] - box[0], box[3] - box[1]) < MIN_BOX_SIDE:
            raise DataError(
                "box-empty",
                f"expected a box with an area inside the image, got box {index} = {raw.tolist()}; "
                f"drop the row or {_FIX_ORDER}",
                source,
            )
    return clamped_n4, int((clamped_n4 != boxes_n4).any(axis=1).sum())


def _check_raw_box(index: int, box: np.ndarray, source: str | None) -> None:
    """Reject a (4,) box that clamping cannot repair."""
    got = f"got box {index} = {box.tolist()}"
    if not np.isfinite(box).all():
        raise DataError("box-nan", f"expected finite coordinates, {got}; drop the row or annotate it again", source)
    if box.min() < -CLAMP_TOLERANCE or box.max() > 1.0 + CLAMP_TOLERANCE:
        raise DataError(
            "box-outside",
            f"expected coordinates in [0, 1] (tolerance {CLAMP_TOLERANCE}), {got}; "
            "divide pixel coordinates by the image's width and height",
            source,
        )
    if box[2] < box[0] or box[3] < box[1]:
        raise DataError("box-inverted", f"expected x0 < x1 and y0 < y1, {got}; {_FIX_ORDER}", source)
