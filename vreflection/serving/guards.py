"""What every request passes before it is read: host, key, room, size, type, time."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .addresses import is_loopback
from .errors import ApiError
from .settings import ServeSettings

OPEN_PATHS = ("/health",)
BODY_RATE = 16 * 2**10  # bytes per second that a body may come at for ever
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


@dataclass
class Body:
    """A request's body on its way in; `deadline` of `time.monotonic`."""

    deadline: float
    reserved: int = 0
    taken: int = 0
    whole: bool = False


class Guards:
    """ASGI middleware.

    - A server on the loopback answers only to its loopback names, and to those that are allowed.
    - With a key, everything but `/health`, the page and its files wants it; compared in constant time.
    - A server without room says so before it takes in a body.
    - Bodies are JSON, no longer than allowed, whether or not their length was announced, alone and together, and
      come within a time.

    Args:
        full: of a path, why nothing more is taken there at present, or None.
    """

    def __init__(
        self,
        app,
        settings: ServeSettings,
        open_paths: Callable[[str], bool],
        full: Callable[[str], ApiError | None] = lambda path: None,
    ):
        self.app, self.settings, self.is_open, self.full = app, settings, open_paths, full
        self.buffered = 0  # bytes of the bodies of all requests under way

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(time.monotonic() + self.settings.body_seconds)
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self.check_host(headers)
            if not self.is_open(scope["path"]):
                self.check_key(headers)
            if scope["method"] == "POST":
                self.check_body(headers)
                error = self.full(scope["path"])
                if error is not None:
                    raise error
                length = headers.get(b"content-length", b"0")
                self.buffer(body, int(length) if length.isdigit() else 0)
        except ApiError as error:
            await refuse(error, send)
            return
        try:
            await self.app(scope, self.limited(receive, body), self.with_headers(send))
        finally:
            self.buffered -= body.reserved

    def buffer(self, body: Body, size: int) -> None:
        """Room for `size` bytes of a body, or ApiError 429."""
        more = max(size - body.reserved, 0)
        if more and self.buffered + more > self.settings.max_buffered:
            raise ApiError(
                429, "the server is taking in as many bytes as it may; try again in a second", code="overloaded",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self.buffered, body.reserved = self.buffered + more, body.reserved + more

    def check_host(self, headers: dict[bytes, bytes]) -> None:
        if self.settings.hosts is None:
            return
        named = headers.get(b"host", b"").decode("latin-1")
        name = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
        name = name.lower().rstrip(".")
        if not is_loopback(name) and name not in {host.lower() for host in self.settings.hosts}:
            raise ApiError(
                421, f"expected one of the hosts {', '.join(self.settings.hosts)}, got {named[:80]!r}; to serve other "
                "machines start with --host, behind a proxy with --allowed-host", code="wrong_host",
            )  # fmt: skip

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        if self.settings.api_key is None:
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self.settings.api_key.encode())
        if kind.lower() != b"bearer" or not right:
            raise ApiError(
                401, "expected a valid API key in the header Authorization: Bearer …", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def check_body(self, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # Pages of other origins can send any other type without asking first.
            raise ApiError(415, f"expected content-type application/json, got {kind.decode('latin-1')[:80]!r}")
        coding = headers.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"identity", b""):
            raise ApiError(
                415, f"expected no content-encoding, got {coding.decode('latin-1')[:80]!r}; send the body as it is",
                code="unsupported_encoding",
            )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise too_large(self.settings.max_body)

    def limited(self, receive, body: Body) -> Callable[[], Awaitable[Any]]:
        async def counted():
            if body.whole:
                return await receive()
            left = body.deadline + body.taken / BODY_RATE - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError:
                raise ApiError(
                    408, f"expected the body within {self.settings.body_seconds:g} s and at {BODY_RATE} bytes/s, got "
                    f"{body.taken} bytes", code="body_timeout", headers={"Connection": "close"},
                ) from None  # fmt: skip
            body.whole = message["type"] != "http.request" or not message.get("more_body", False)
            body.taken += len(message.get("body", b""))
            if body.taken > self.settings.max_body:
                raise too_large(self.settings.max_body)
            self.buffer(body, body.taken)
            return message

        return counted

    @staticmethod
    def with_headers(send):
        async def sending(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS.items()]}
            await send(message)

        return sending


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"expected a body of at most {limit} bytes; send smaller or fewer images", code="body_too_large"
    )


async def refuse(error: ApiError, send) -> None:
    body = json.dumps(error.body()).encode()
    named = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *named]
    await send({"type": "http.response.start", "status": error.status, "headers": [*headers, *HEADERS.items()]})
    await send({"type": "http.response.body", "body": body})
