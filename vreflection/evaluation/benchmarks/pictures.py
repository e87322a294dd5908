"""Images of benchmark rows: from files and from bytes, decoded only when asked for, distrusted like training images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ...data.images import decode_image, open_image
from ...data.pixels import ImageView

Opener = Callable[[], Image.Image]
# Gold boxes are in stored pixels, and published numbers were made from them. Kept in a run's manifest.
IMAGE_VIEW: ImageView = "stored"
_LIMIT = threading.RLock()


def picture_file(path: Path, max_pixels: int) -> Opener:
    """An image file, opened when called."""

    def opened() -> Image.Image:
        with library_limit(max_pixels):
            return open_image(path, max_pixels, view=IMAGE_VIEW)

    return opened


def decode_picture(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """An image of a row's bytes as RGB, transparency on white.

    Args:
        data: an encoded image. name: for messages. max_pixels: width * height above this is refused undecoded.

    Raises:
        DataError: reasons as `open_image`.
    """
    with library_limit(max_pixels):
        return decode_image(data, name, max_pixels, view=IMAGE_VIEW)


@contextmanager
def library_limit(max_pixels: int) -> Iterator[None]:
    """Raise the imaging library's own limit, which is process-wide, to `max_pixels` while the block runs."""
    with _LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        if before is not None and before < max_pixels:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
