"""What surrounds every exchange: paths, the request's id, and the count of answers to requests."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from .metrics import Metrics

CLIENT_GONE = 499  # a status that nobody reads, for the count
_ID = re.compile(rb"[!-~]{1,200}")


class Envelope:
    """ASGI middleware, the outermost.

    - A slash at the end of a path changes nothing, and HEAD is GET without the body.
    - Every response has `x-request-id`: the client's own, or a new one.
    - Responses to requests for answers are counted by status, refused ones too.
    """

    def __init__(self, app, metrics: Metrics, counts: Callable[[str], bool]):
        self.app, self.metrics, self.counts = app, metrics, counts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        counted = scope["method"] == "POST" and self.counts(path)
        request_id = next((value for name, value in scope["headers"] if name.lower() == b"x-request-id"), b"")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()

        head = scope["method"] == "HEAD"

        async def sending(message) -> None:
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", request_id)]}
                if counted:
                    self.metrics.requests.labels(status=str(message["status"])).inc()
                    if message["status"] == CLIENT_GONE:
                        self.metrics.disconnected.inc()
            await send(message)

        method = "GET" if head else scope["method"]
        await self.app({**scope, "path": path, "method": method}, receive, sending)
