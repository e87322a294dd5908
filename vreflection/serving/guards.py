"""What every request passes before it is read: host, key, size, type."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import ApiError
from .settings import ServeSettings

OPEN_PATHS = ("/health",)
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class Guards:
    """ASGI middleware.

    - A server on the loopback answers only to its loopback names.
    - With a key, everything but `/health`, the page and its files wants it; compared in constant time.
    - Bodies are JSON, and no longer than allowed, whether or not their length was announced.
    """

    def __init__(self, app, settings: ServeSettings, open_paths: Callable[[str], bool]):
        self.app, self.settings, self.is_open = app, settings, open_paths

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self.check_host(headers)
            if not self.is_open(scope["path"]):
                self.check_key(headers)
            if scope["method"] == "POST":
                self.check_body(headers)
        except ApiError as error:
            await refuse(error, send)
            return
        await self.app(scope, self.limited(receive), self.with_headers(send))

    def check_host(self, headers: dict[bytes, bytes]) -> None:
        if self.settings.hosts is None:
            return
        named = headers.get(b"host", b"").decode("latin-1")
        name = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
        if name.lower() not in self.settings.hosts:
            raise ApiError(
                421, f"expected one of the hosts {', '.join(self.settings.hosts)}, got {named[:80]!r}; to serve other "
                "machines start with --host", code="wrong_host",
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
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body:
            raise too_large(self.settings.max_body)

    def limited(self, receive) -> Callable[[], Awaitable[Any]]:
        taken = 0

        async def counted():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.settings.max_body:
                raise too_large(self.settings.max_body)
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
