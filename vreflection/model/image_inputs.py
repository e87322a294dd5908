"""Images as users pass them to the processor: which types are taken, and which image belongs to which question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError

# An image, its file, the bytes of one, or its pixels.
ImageLike = Image.Image | bytes | str | Path | np.ndarray | torch.Tensor
REMOTE = ("http://", "https://", "data:")


def readable_image(image: Any, name: str) -> Image.Image | bytes | str | Path:
    """An image as our reader takes it; pixels become a PIL image.

    Args:
        image: PIL image, path, bytes, or pixels (H, W, 3) or (3, H, W) uint8 in RGB. Three rows and three channels
            at once are read as (H, W, 3).
        name: used in error messages.

    Raises:
        DataError: `not-an-image` for another type, shape or dtype, `image-missing` for a URL.
    """
    if isinstance(image, str) and image.startswith(REMOTE):
        raise DataError(
            "image-missing",
            f"expected an image or its file, got the URL {image[:60]!r}; images by URL are not fetched here, "
            "load the image first",
            name,
        )
    if isinstance(image, (Image.Image, bytes, str, Path)):
        return image
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise DataError(
            "not-an-image",
            f"expected a PIL image, a path, bytes, or an array of pixels, got {type(image).__name__}; open it first",
            name,
        )
    pixels: Any = image
    shape, dtype = tuple(pixels.shape), pixels.dtype
    last, first = (len(shape) == 3 and shape[axis] == 3 for axis in (2, 0))
    if not (last or first) or dtype not in (np.uint8, torch.uint8):
        raise DataError(
            "not-an-image",
            f"expected pixels (H, W, 3) or (3, H, W) uint8, got {shape} {dtype}; scale them to 0…255 and convert them, "
            "or pass a PIL image",
            name,
        )
    array = pixels.detach().cpu().numpy() if isinstance(pixels, torch.Tensor) else pixels
    return Image.fromarray(np.ascontiguousarray(array if last else array.transpose(1, 2, 0)))


def group_images(
    images: Any, count: int, *, single: bool = False, places: Sequence[int] | None = None
) -> list[list[Image.Image | bytes | str | Path]]:
    """One list of images per question.

    Args:
        images: one image; per question an image, a list of images or None; or None for no images at all.
        count: number of questions.
        single: the only question may have its images without a list around them.
        places: how many images each question shows, where its text says so: a plain list is dealt out by these.

    Raises:
        ValueError: the entries do not match the questions. DataError: something is no image.
    """
    if images is None:
        return [[] for _ in range(count)]
    if _is_image(images) or not isinstance(images, Iterable):
        images = [images]
    images = list(images)
    flat = all(_is_image(image) for image in images)
    if single and len(images) != 1 and flat:
        images = [images]
    elif places is not None and flat and sum(places) == len(images):
        rest = iter(images)
        images = [[next(rest) for _ in range(places_of_one)] for places_of_one in places]
    if len(images) != count:
        raise ValueError(
            f"expected one entry of images per question ({count}), got {len(images)}; "
            "nest the list for several images per question, use None for a question without"
        )
    groups = []
    for n, entry in enumerate(images):
        group = [] if entry is None else [entry] if _is_image(entry) or not isinstance(entry, Iterable) else list(entry)
        groups.append([readable_image(image, f"images of prompt {n}, {i}") for i, image in enumerate(group)])
    return groups


def _is_image(value: Any) -> bool:
    return isinstance(value, (Image.Image, bytes, str, Path, np.ndarray, torch.Tensor))
