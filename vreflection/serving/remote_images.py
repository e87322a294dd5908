"""Images by http(s) address: from public addresses only, within one time limit for all of it."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from .addresses import why_not_public
from .errors import ApiError, bad
from .settings import ServeSettings

Resolver = Callable[[str, int], list[str]]
# A name server's silence cannot be interrupted: it is waited for in threads that nobody else needs.
_resolving = ThreadPoolExecutor(8, thread_name_prefix="resolving")


def fetch(url: str, settings: ServeSettings, param: str, resolve: Resolver | None = None) -> bytes:
    """A remote image's bytes. The address that was checked is the one that is asked: names are resolved once.

    Raises:
        ApiError: not a public http(s) address, nothing usable there, or not whole within `fetch_seconds`.
    """
    deadline = time.monotonic() + settings.fetch_seconds
    parts, host, port = split_url(url, param)
    address = public_address(host, port, param, resolve or resolved, settings.fetch_seconds)
    shown = f"[{host}]" if ":" in host else host
    shown = shown if parts.port is None else f"{shown}:{parts.port}"
    connection = PinnedConnection(host, port, address, parts.scheme.lower() == "https", deadline)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": shown, "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise bad(f"expected status 200 from {shown}, got {answer.status}; redirects are not followed", param)
        content = answer.read(settings.max_body + 1)
        if answer.length and len(content) <= settings.max_body:
            raise http.client.IncompleteRead(content, answer.length)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        late = time.monotonic() >= deadline
        reason = f"not whole within {settings.fetch_seconds:g} s" if late else type(error).__name__
        raise bad(f"{shown} could not be read ({reason}); send the image's bytes", param, "invalid_image_url") from None
    finally:
        connection.alarm.cancel()
        connection.close()
    if len(content) > settings.max_body:
        raise ApiError(413, f"expected an image of at most {settings.max_body} bytes at {shown}", param=param)
    return content


def split_url(url: str, param: str) -> tuple[SplitResult, str, int]:
    """An http(s) address, its host and port.

    Raises:
        ApiError: malformed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    except ValueError as error:
        raise bad(f"expected an http(s) address, got {url[:80]!r} ({error})", param, "invalid_image_url") from None
    if not parts.hostname:
        raise bad(f"expected an address with a host, got {url[:80]!r}", param, "invalid_image_url")
    return parts, parts.hostname, port


class PinnedConnection(http.client.HTTPConnection):
    """Connects to a checked address, while the certificate is that of the name; shut down at the deadline.

    Args:
        deadline: of `time.monotonic`, for everything: a site that sends a byte a second never exceeds a limit per read.
    """

    def __init__(self, host: str, port: int, address: str, encrypted: bool, deadline: float):
        left = max(deadline - time.monotonic(), 0.01)
        super().__init__(host, port, timeout=left)
        self.address, self.encrypted = address, encrypted
        self.live: socket.socket | None = None  # `sock` is dropped before the answer is read
        self.alarm = threading.Timer(left, self.shut_down)
        self.alarm.daemon = True

    def connect(self) -> None:
        self.alarm.start()
        self.live = self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.encrypted:
            self.live = self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def shut_down(self) -> None:
        """Wake whoever reads."""
        if self.live is not None:
            with suppress(OSError):  # already closed
                socket.socket.shutdown(self.live, socket.SHUT_RDWR)


def resolved(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def public_address(host: str, port: int, param: str, resolve: Resolver, seconds: float = 10.0) -> str:
    """The first address of a host, if all of them are public.

    Raises:
        ApiError: it has none within so many seconds, or one that is private, loopback, link-local, or otherwise not of
            the public net.
    """
    try:
        addresses = _resolving.submit(resolve, host, port).result(seconds)
    except (OSError, UnicodeError, FutureTimeout):
        addresses = []
    if not addresses:
        raise bad(f"{host[:100]} has no address; send the image's bytes", param, "invalid_image_url")
    if any(why_not_public(address) is not None for address in addresses):
        raise bad(f"{host[:100]} is not on the public net; send the image's bytes", param, "invalid_image_url")
    return addresses[0]
