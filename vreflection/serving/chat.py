"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from pydantic import Field

from .answer_request import AnswerRequest, read_format
from .conversation import read_messages
from .errors import bad
from .interfaces import Event, Interface, heading, in_chunks, whole_text
from .jobs import Choice, Job, LatentStep, SpanEnd, TextPiece, usage
from .schema import MAX_TOP_LOGPROBS, GenerationFields, Integer, read_fields
from .service import AnswerService

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip


class ChatFields(GenerationFields):
    messages: list[Any] = Field(min_length=1)
    max_tokens: Integer | None = Field(default=None, ge=1)
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    n: Integer | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: Any = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


def refuse_other_ends(fields: ChatFields, continued: bool) -> None:
    """A last turn of the assistant is continued, and any other is answered; refuse what asks for something else.

    Raises:
        ApiError: 400, naming the field.
    """
    what = "as a last turn of the assistant is continued here" if continued else "as no turn of the assistant is last"
    for name, value, expected in (
        ("continue_final_message", fields.continue_final_message, continued),
        ("add_generation_prompt", fields.add_generation_prompt, not continued),
    ):
        if value is not None and value is not expected:
            raise bad(f"{name}: expected {str(expected).lower()}, {what}, got {str(value).lower()}", name)


class Chat(Interface):
    """A chat request."""

    def __init__(self, body: Any):
        fields = read_fields(ChatFields, body, neutral=NEUTRAL)
        if fields.top_logprobs and not fields.logprobs:
            raise bad("top_logprobs: expected logprobs: true beside it; add it", "top_logprobs", "invalid_value")
        conversation = read_messages(fields.messages)
        refuse_other_ends(fields, continued=conversation.turns[-1].role == "assistant")
        self.request = AnswerRequest(
            fields=fields,
            prompts=[conversation],
            max_tokens=fields.max_completion_tokens or fields.max_tokens,
            choices=fields.n or 1,
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            response_format=read_format(fields.response_format, "response_format", "json_schema"),
        )

    def logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.request.logprobs is None else {"content": entries, "refusal": None}

    async def whole(self, service: AnswerService, job: Job) -> dict[str, Any]:
        async def one(choice: Choice) -> dict[str, Any]:
            text, entries = await whole_text(service, job, choice)
            shown = {
                "index": choice.index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self.logprobs(entries),
                "finish_reason": choice.finish,
            }
            details = await service.details(job, choice)
            return shown if details is None else {**shown, "latent": details}

        choices = await asyncio.gather(*(one(choice) for choice in job.choices))
        return {**heading(service, job, "chatcmpl", "chat.completion"), "choices": choices, "usage": usage(job)}

    def events(self, service: AnswerService, job: Job) -> AsyncIterator[Event]:
        head = heading(service, job, "chatcmpl", "chat.completion.chunk")
        return in_chunks(head, job, [self.chunks(service, job, choice) for choice in job.choices])

    async def chunks(self, service: AnswerService, job: Job, choice: Choice) -> AsyncIterator[Event]:
        """One choice's part of each chunk."""

        def chunk(delta: dict[str, Any], finish: str | None = None, entries=(), **latent) -> Event:
            logprobs = self.logprobs(list(entries)) if entries else None
            return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **latent}

        yield chunk({"role": "assistant", "content": ""})
        shows_steps = self.request.fields.latent is not None
        async for event in service.events(job, choice):
            if isinstance(event, TextPiece):
                yield chunk({"content": event.text}, entries=event.logprobs)
            elif isinstance(event, SpanEnd):
                details = await service.details(job, choice, so_far=True)
                if details is not None:
                    yield chunk({}, latent=details)
            elif isinstance(event, LatentStep) and shows_steps:
                yield chunk({}, latent=asdict(event))
        details = await service.details(job, choice)
        yield chunk({}, choice.finish, **({} if details is None else {"latent": details}))
