"""Three-axis rotary positions (temporal, row, column) of one sample with text and still images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from vreflection.errors import DataError


def mrope_positions(
    input_ids: ArrayLike,
    image_token_id: int,
    grids_thw: Sequence[Sequence[int]] | ArrayLike,
    spatial_merge_size: int = 2,
) -> np.ndarray:
    """Positions of one unpadded sample, equal to the host model's `get_rope_index`.

    Text advances all three axes by one per token. An image starting at position p uses (p, p + row, p + column), and
    the text after it continues at p + max(h, w).

    Args:
        input_ids: (L,) token ids, each image as h * w consecutive image tokens.
        image_token_id: id of the image token.
        grids_thw: (I, 3) grids in patches, in the order of the images; one frame each.
        spatial_merge_size: patches per visual token and axis.

    Returns:
        (3, L) int64.

    Raises:
        DataError: `image-tokens` if the image tokens are not exactly the blocks the grids announce.
    """
    ids_L = np.asarray(input_ids).reshape(-1)
    grids_I3 = np.asarray(grids_thw, dtype=np.int64).reshape(-1, 3)
    is_image_L = ids_L == image_token_id
    expected = int((grids_I3[:, 0] * (grids_I3[:, 1:] // spatial_merge_size).prod(1)).sum())
    if (grids_I3[:, 0] != 1).any() or expected != int(is_image_L.sum()):
        raise _mismatch(grids_I3, spatial_merge_size, int(is_image_L.sum()))
    positions_3L = np.empty((3, len(ids_L)), dtype=np.int64)
    cursor = position = 0
    for _, grid_h, grid_w in grids_I3.tolist():
        h, w = grid_h // spatial_merge_size, grid_w // spatial_merge_size
        start = cursor + int(is_image_L[cursor:].argmax())
        end = start + h * w
        if not is_image_L[start:end].all():
            raise _mismatch(grids_I3, spatial_merge_size, int(is_image_L.sum()))
        positions_3L[:, cursor:start] = np.arange(position, position + start - cursor)
        position += start - cursor
        rows, columns = np.divmod(np.arange(h * w), w)
        positions_3L[0, start:end] = position
        positions_3L[1, start:end] = position + rows
        positions_3L[2, start:end] = position + columns
        position += max(h, w)
        cursor = end
    positions_3L[:, cursor:] = np.arange(position, position + len(ids_L) - cursor)
    return positions_3L


def _mismatch(grids_I3: np.ndarray, merge: int, found: int) -> DataError:
    return DataError(
        "image-tokens",
        f"expected one block of h*w image tokens per still image for patch grids {grids_I3.tolist()} (merge {merge}), "
        f"got {found} image tokens in other blocks; encode text and images with the same processor settings",
    )
