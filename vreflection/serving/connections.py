"""Connections with a time limit on every phase: head, body, idleness, and clients that do not read."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .settings import ServeSettings


def timed_protocol(settings: ServeSettings) -> type[H11Protocol]:
    """uvicorn's protocol with a server's limits; a connection that exceeds one is closed.

    The limit on bodies is not here but in `Guards`, which can still answer.
    """

    class TimedProtocol(H11Protocol):
        waiting: asyncio.TimerHandle | None = None  # for a head, or the rest of a body that nobody wants
        stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.write(refusal(too_many(settings.max_connections)))
                transport.close()
                return
            self.wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self.between_requests:
                self.stop_waiting()
            elif self.waiting is None:
                self.wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:
                self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_waiting()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self.stuck is None:
                self.stuck = self.loop.call_later(settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self.stuck is not None:
                self.stuck.cancel()
                self.stuck = None
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            self.transport.write(refusal(ApiError(400, msg, code="invalid_http")))
            self.transport.close()

        @property
        def between_requests(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def wait(self) -> None:
            self.stop_waiting()
            self.waiting = self.loop.call_later(settings.header_seconds, self.transport.abort)

        def stop_waiting(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return TimedProtocol


def too_many(limit: int) -> ApiError:
    return ApiError(
        503, f"the server has {limit} connections open and takes no more; try again later", code="overloaded"
    )


def refusal(error: ApiError) -> bytes:
    """A whole response, for connections on which no request was read."""
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
