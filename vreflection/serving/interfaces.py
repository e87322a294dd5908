"""What OpenAI's interfaces have in common: a request read, an answer as one object or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .._version import __version__
from .answer_request import AnswerRequest
from .errors import ApiError
from .jobs import Choice, Job, TextPiece, usage
from .service import AnswerService

Event = dict[str, Any]


class Interface(ABC):
    """One request of one interface.

    Args:
        body: parsed JSON that `check_values` accepts.

    Attributes:
        request: what the service is asked. stream: whether the answer goes out in events.
        ending: bytes behind the last event of a stream.

    Raises:
        ApiError: 400, naming the field.
    """

    request: AnswerRequest
    ending = b"data: [DONE]\n\n"

    @abstractmethod
    def __init__(self, body: Any): ...

    @property
    def stream(self) -> bool:
        return bool(self.request.fields.stream)

    @abstractmethod
    async def whole(self, service: AnswerService, job: Job) -> dict[str, Any]:
        """The answer as one object."""

    @abstractmethod
    def events(self, service: AnswerService, job: Job) -> AsyncIterator[Event]:
        """The answer piece by piece; raises ApiError where it fails."""

    def frame(self, event: Event) -> bytes:
        """An event as it goes out."""
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

    def failure(self, error: ApiError) -> Event:
        """The last event of a stream that fails."""
        return error.body()


async def whole_text(service: AnswerService, job: Job, choice: Choice) -> tuple[str, list[dict[str, Any]]]:
    """A choice's text to its end, and the entries of its log probabilities."""
    pieces = [event async for event in service.events(job, choice) if isinstance(event, TextPiece)]
    return "".join(piece.text for piece in pieces), [entry for piece in pieces for entry in piece.logprobs]


async def interleaved(streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Event]:
    """The events of several streams as they come; raises what one of them raises, as soon as it does."""
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def drain(stream: AsyncIterator[Event]) -> None:
        try:
            async for event in stream:
                queue.put_nowait(event)
        except Exception as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(drain(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            event = await queue.get()
            if event is None:
                running -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()


async def in_chunks(head: Event, job: Job, streams: Sequence[AsyncIterator[Event]]) -> AsyncIterator[Event]:
    """Chunks with one choice each, and with the usage at the end where the request includes it.

    Args:
        head: of every chunk. streams: each choice's part of its chunks.
    """
    with_usage = job.request.fields.include_usage
    head = {**head, "usage": None} if with_usage else head
    async for choice in interleaved(streams):
        yield {**head, "choices": [choice]}
    if with_usage:
        yield {**head, "choices": [], "usage": usage(job)}


def heading(service: AnswerService, job: Job, prefix: str, kind: str) -> dict[str, Any]:
    """What every chat and completion object begins with."""
    return {
        "id": f"{prefix}-{job.ident}",
        "object": kind,
        "created": job.created,
        "model": service.settings.name,
        "system_fingerprint": f"vreflection-{__version__}",
    }
