"""`/v1/completions`: text that is continued as it stands, without a chat's template."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic import Field

from .answer_request import AnswerRequest, read_format
from .conversation import kind_of
from .errors import bad
from .interfaces import Event, Interface, heading, in_chunks, whole_text
from .jobs import Choice, Job, TextPiece, usage
from .schema import GenerationFields, Integer, integral, read_fields
from .service import AnswerService

DEFAULT_TOKENS = 16  # OpenAI's
MAX_TOP_LOGPROBS = 5  # OpenAI's
NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": ("",)}


class CompletionFields(GenerationFields):
    prompt: Any
    max_tokens: Integer | None = Field(default=None, ge=1)
    n: Integer | None = Field(default=None, ge=1)
    logprobs: Integer | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: Any = None


class Completion(Interface):
    """A completion request: a prompt, or several, which are answered apart."""

    def __init__(self, body: Any):
        fields = read_fields(CompletionFields, body, neutral=NEUTRAL)
        self.request = AnswerRequest(
            fields=fields,
            prompts=read_prompts(fields.prompt),
            max_tokens=fields.max_tokens or DEFAULT_TOKENS,
            choices=fields.n or 1,
            logprobs=fields.logprobs,
            response_format=read_format(fields.response_format, "response_format", "json_schema"),
        )

    async def whole(self, service: AnswerService, job: Job) -> dict[str, Any]:
        async def one(choice: Choice) -> dict[str, Any]:
            text, entries = await whole_text(service, job, choice)
            details = await service.details(job, choice)
            return self.choice(choice, text, entries, 0, choice.finish, details)

        choices = await asyncio.gather(*(one(choice) for choice in job.choices))
        return {**heading(service, job, "cmpl", "text_completion"), "choices": choices, "usage": usage(job)}

    def events(self, service: AnswerService, job: Job) -> AsyncIterator[Event]:
        head = heading(service, job, "cmpl", "text_completion")
        return in_chunks(head, job, [self.chunks(service, job, choice) for choice in job.choices])

    async def chunks(self, service: AnswerService, job: Job, choice: Choice) -> AsyncIterator[Event]:
        """One choice's part of each chunk."""
        offset = 0
        async for event in service.events(job, choice):
            if isinstance(event, TextPiece):
                yield self.choice(choice, event.text, event.logprobs, offset, None)
                offset += len(event.text)
        details = await service.details(job, choice)
        yield self.choice(choice, "", (), offset, choice.finish, details)

    def choice(self, choice: Choice, text: str, entries, offset: int, finish: str | None, details=None) -> Event:
        shown = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": finish}
        if self.request.logprobs is not None and (entries or finish is not None):
            shown["logprobs"] = columns(entries, offset)
        return shown if details is None else {**shown, "latent": details}


def columns(entries, offset: int) -> dict[str, Any]:
    """Entries of log probabilities in this interface's columns. `offset`: characters of the text before them."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }


def read_prompts(prompt: Any) -> list[str | list[int]]:
    """One text, its token ids, or a list of either.

    Raises:
        ApiError: 400.
    """
    if isinstance(prompt, str) or is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        got = "an empty list" if prompt == [] else kind_of(prompt)
        raise bad(f"prompt: expected text, token ids, or a list of either, got {got}", "prompt", "invalid_value")
    prompts: list[str | list[int]] = []
    for number, entry in enumerate(prompt):
        if isinstance(entry, str):
            prompts.append(entry)
        elif is_ids(entry):
            prompts.append([integral(token) for token in entry])
        else:
            place = f"prompt.{number}"
            raise bad(f"{place}: expected text or token ids, got {kind_of(entry)}", place, "invalid_value")
    return prompts


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(integral(token)) is int for token in value)
