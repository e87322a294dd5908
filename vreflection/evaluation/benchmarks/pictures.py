"""Images of benchmark rows: from files and from bytes, decoded only when asked for, distrusted like training images."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image

from ...data.images import decode_image, open_image
from ...data.pixels import ImageView
from ...errors import DataError
from .source import REPAIR, revision_of

Opener = Callable[[], Image.Image]
# Gold boxes are in stored pixels, and published numbers were made from them. Kept in a run's manifest.
IMAGE_VIEW: ImageView = "stored"
_LIMIT = threading.RLock()


def picture_path(folder: Path, name: str, source: str) -> Path:
    """Where the image `name` of a row lies below the benchmark's folder.

    It never leaves that folder, not even through links; a snapshot in the hub's cache may link to that cache's files.

    Args:
        name: relative path in the row. source: the row, for messages.

    Raises:
        DataError: `path-escape` or `image-missing`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise DataError("path-escape", f"expected a relative name without '..', got {name!r}; {REPAIR}", source)
    path = folder / name
    if not os.path.isfile(path):
        raise DataError("image-missing", f"expected {name!r} in {folder}, got none; {REPAIR}", source)
    roots = [os.path.realpath(folder)]
    if revision_of(folder):
        roots.append(os.path.realpath(Path(os.path.abspath(folder)).parents[1] / "blobs"))
    real = os.path.realpath(path)
    if not any(os.path.commonpath((root, real)) == root for root in roots):
        raise DataError(
            "path-escape",
            f"expected {name!r} to stay inside {roots[0]}, got a link to {real}; copy the files there",
            source,
        )
    return path


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
