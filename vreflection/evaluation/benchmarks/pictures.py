"""Images of benchmark rows: from files and from bytes, decoded only when asked for, distrusted like training images."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ...data.images import check_image_size, open_image, to_rgb
from ...errors import DataError

Opener = Callable[[], Image.Image]
# What the benchmarks hold; some other formats start external programs when opened.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_LIMIT = threading.RLock()


def picture_file(path: Path, max_pixels: int) -> Opener:
    """An image file, opened when called."""

    def opened() -> Image.Image:
        with library_limit(max_pixels):
            return open_image(path, max_pixels)

    return opened


def decode_picture(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """An image of a row's bytes as RGB, transparency on white.

    Args:
        data: an encoded image. name: for messages. max_pixels: width * height above this is refused undecoded.

    Raises:
        DataError: reasons as `open_image`.
    """
    if not data:
        raise DataError("image-empty", "expected an image, got 0 bytes; download the file again", name)
    try:
        with library_limit(max_pixels), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_image_size(*image.size, name=name, max_pixels=max_pixels)
            image.load()
            return to_rgb(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            "not-an-image", f"expected one of {', '.join(_FORMATS)}, got something else; download it again", name
        ) from None
    except Image.DecompressionBombError as error:
        raise DataError("image-too-large", f"expected at most {max_pixels} pixels, got {error}", name) from None
    # The library's decoders raise many types on damaged files.
    except Exception as error:
        raise DataError(
            "image-corrupt", f"expected a complete image, got {type(error).__name__}: {error}; download it again", name
        ) from error


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
