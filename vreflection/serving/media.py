"""Images of a request: data addresses, and remote ones where they are allowed."""

from __future__ import annotations

import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Callable
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from ..data import images
from ..errors import DataError
from .errors import ApiError, bad
from .settings import ServeSettings

# What a file is, is read from its bytes; a browser calls those it does not know an octet stream.
_DATA = re.compile(
    r"data:(image/[a-z0-9.+-]{1,40}|application/octet-stream)?((?:;[a-z0-9-]+=[^;,]{0,100})*);base64,", re.IGNORECASE
)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
# The page draws on canvases of half this size; larger pictures would only take longer to send.
PREVIEW_SIDE = 2048
Resolver = Callable[[str, int], list[str]]


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
        raise bad(f"not a usable image ({error.reason}): {error.message}", param, "invalid_image") from None


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


def fetch(url: str, settings: ServeSettings, param: str, resolve: Resolver | None = None) -> bytes:
    """A remote image's bytes. The address that was checked is the one that is asked: names are resolved once."""
    import http.client
    import ssl

    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    except ValueError as error:
        raise bad(f"expected an http(s) address, got {url[:80]!r} ({error})", param, "invalid_image_url") from None
    if not parts.hostname:
        raise bad(f"expected an address with a host, got {url[:80]!r}", param, "invalid_image_url")
    address = public_address(parts.hostname, port, param, resolve or resolved)
    connection: http.client.HTTPConnection
    if parts.scheme.lower() == "https":
        connection = _PinnedHTTPS(parts.hostname, port, address, settings.fetch_seconds, ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(address, port, timeout=settings.fetch_seconds)
    host = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
    named = host if parts.port is None else f"{host}:{parts.port}"
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": named, "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise bad(f"expected status 200 from {named}, got {answer.status}; redirects are not followed", param)
        content = answer.read(settings.max_body + 1)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        raise bad(f"{named} could not be read ({type(error).__name__}); send the image's bytes", param) from None
    finally:
        connection.close()
    if len(content) > settings.max_body:
        raise ApiError(413, f"expected an image of at most {settings.max_body} bytes at {named}", param=param)
    return content


def _pinned_https():
    import http.client

    class Pinned(http.client.HTTPSConnection):
        """Connects to a checked address, while the certificate is that of the name."""

        def __init__(self, host: str, port: int, address: str, timeout: float, context):
            super().__init__(host, port, timeout=timeout, context=context)
            self.address, self.tls = address, context

        def connect(self) -> None:
            plain = socket.create_connection((self.address, self.port), self.timeout)
            self.sock = self.tls.wrap_socket(plain, server_hostname=self.host)

    return Pinned


def _PinnedHTTPS(*arguments):  # noqa: N802
    return _pinned_https()(*arguments)


def resolved(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def public_address(host: str, port: int, param: str, resolve: Resolver) -> str:
    """The first address of a host, if all of them are public.

    Raises:
        ApiError: it has none, or one that is private, loopback, link-local, or otherwise not of the public net.
    """
    try:
        found = resolve(host, port)
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise bad(f"{host[:100]} has no address; send the image's bytes", param, "invalid_image_url")
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or address
        if not inner.is_global or inner.is_multicast:
            raise bad(f"{host[:100]} is not on the public net; send the image's bytes", param, "invalid_image_url")
    return found[0]
