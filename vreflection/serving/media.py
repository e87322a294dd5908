"""Images of a request: data addresses, and remote ones where they are allowed."""

from __future__ import annotations

import base64
import binascii
import io
import re
from urllib.parse import unquote_to_bytes

from PIL import Image

from ..data import images
from ..errors import DataError
from .errors import ApiError, bad
from .remote_images import fetch
from .settings import ServeSettings

# What a file is, is read from its bytes; a browser calls those it does not know an octet stream.
_DATA = re.compile(
    r"data:(image/[a-z0-9.+-]{1,40}|application/octet-stream)?((?:;[a-z0-9-]+=[^;,]{0,100})*);base64,", re.IGNORECASE
)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
# The page draws on canvases of half this size; larger pictures would only take longer to send.
PREVIEW_SIDE = 2048


def image_bytes(url: str, settings: ServeSettings, param: str) -> bytes:
    """What is behind an `image_url`.

    Raises:
        ApiError: not an address of an allowed kind, or nothing there.
    """
    if url[:5].lower() == "data:":
        return data_bytes(url, param)
    if settings.remote_images and url[:8].lower().startswith(("http://", "https://")):
        return fetch(url, settings, param)
    allowed = "data:image/…;base64,…" + (" or an http(s) address" if settings.remote_images else "")
    raise bad(f"{param}: expected {allowed}, got {url[:40]!r}; send the image's bytes", param, "invalid_image_url")


def decode_image(content: bytes, settings: ServeSettings, param: str) -> Image.Image:
    """An image's bytes as RGB, as a viewer shows it.

    Raises:
        ApiError: no usable image.
    """
    try:
        return images.decode_image(content, param, settings.max_pixels, view="shown")
    except DataError as error:
        raise not_usable(error, param) from None


def announced_pixels(content: bytes, settings: ServeSettings, param: str) -> int:
    """Width times height by an image's head alone.

    Raises:
        ApiError: no usable image, as far as its head says.
    """
    try:
        width, height = images.header_of_bytes(content, param, settings.max_pixels).stored_size
    except DataError as error:
        raise not_usable(error, param) from None
    return width * height


def not_usable(error: DataError, param: str) -> ApiError:
    return bad(f"not a usable image ({error.reason}): {error.message}", param, "invalid_image")


def data_bytes(url: str, param: str) -> bytes:
    """The bytes of a data address; its base64 in either alphabet, with or without padding and line breaks."""
    head = _DATA.match(url)
    if head is None:
        raise bad(f"{param}: expected data:image/…;base64,…, got {url[:40]!r}", param, "invalid_image_url")
    try:
        text = url[head.end() :].encode("ascii")
        text = unquote_to_bytes(text) if b"%" in text else text
        text = text.translate(_PLAIN_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{param}: expected base64 after the comma, got {error}", param, "invalid_image_url") from None


def preview(url: str, settings: ServeSettings, param: str) -> bytes:
    """The picture that the model gets of a data address, as a PNG to draw; large ones are made smaller.

    Raises:
        ApiError: no usable image.
    """
    image = decode_image(data_bytes(url, param), settings, param)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
