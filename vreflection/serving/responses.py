"""`/v1/responses`: OpenAI's newer interface, without what needs a store or tools."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic import Field

from .answer_request import AnswerRequest, read_format
from .conversation import RESPONSES, Conversation, add_message, call_text, kind_of, read_content, tool_answer
from .errors import ApiError, bad
from .interfaces import Event, Interface, whole_text
from .jobs import Job, TextPiece, usage
from .schema import MAX_TOP_LOGPROBS, GenerationFields, Integer, read_fields
from .service import AnswerService

IGNORED = {"prompt_cache_options"}
NEUTRAL: dict[str, tuple[Any, ...]] = {"background": (False,), "truncation": ("disabled",)}
LOGPROBS = "message.output_text.logprobs"
STORED = ("previous_response_id", "conversation", "prompt")


class ResponseFields(GenerationFields):
    input: Any
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(default=None, ge=1)
    top_logprobs: Integer | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    text: dict[str, Any] | None = None
    include: list[str] | None = None


class Responses(Interface):
    """A request for a response. Nothing is stored, so the conversation comes whole in `input`."""

    ending = b""

    def __init__(self, body: Any):
        if isinstance(body, dict):
            refuse_stored(body)
        fields = read_fields(ResponseFields, body, ignored=IGNORED, neutral=NEUTRAL)
        conversation = Conversation("input")
        if fields.instructions is not None:
            conversation.add("system", [fields.instructions], "instructions")
        read_input(fields.input, conversation)
        text = fields.text or {}
        self.fields, self.format = fields, text.get("format") or {"type": "text"}
        self.request = AnswerRequest(
            fields=fields,
            prompts=[conversation],
            max_tokens=fields.max_output_tokens,
            tokens_name="max_output_tokens",
            logprobs=(fields.top_logprobs or 0) if fields.top_logprobs or LOGPROBS in (fields.include or []) else None,
            response_format=read_format(self.format, "text.format", None),
        )
        self.sequence = 0

    async def whole(self, service: AnswerService, job: Job) -> dict[str, Any]:
        (choice,) = job.choices
        text, entries = await whole_text(service, job, choice)
        item = self.item(job, text, entries, ended(choice.finish), await service.details(job, choice))
        return self.response(service, job, ended(choice.finish), [item])

    async def events(self, service: AnswerService, job: Job) -> AsyncIterator[Event]:
        (choice,) = job.choices
        place = {"item_id": f"msg_{job.ident}", "output_index": 0, "content_index": 0}
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=self.response(service, job, "in_progress", []))
        yield self.event("response.output_item.added", output_index=0, item=self.item(job, None, [], "in_progress"))
        yield self.event("response.content_part.added", **place, part=self.part("", []))
        text, entries = "", []
        async for event in service.events(job, choice):
            if isinstance(event, TextPiece):
                text += event.text
                entries += event.logprobs
                yield self.event("response.output_text.delta", **place, delta=event.text, logprobs=list(event.logprobs))
        status = ended(choice.finish)
        item = self.item(job, text, entries, status, await service.details(job, choice))
        yield self.event("response.output_text.done", **place, text=text, logprobs=entries)
        yield self.event("response.content_part.done", **place, part=self.part(text, entries))
        yield self.event("response.output_item.done", output_index=0, item=item)
        yield self.event(f"response.{status}", response=self.response(service, job, status, [item]))

    def event(self, kind: str, **content) -> Event:
        self.sequence += 1
        return {"type": kind, "sequence_number": self.sequence - 1, **content}

    def frame(self, event: Event) -> bytes:
        return f"event: {event['type']}\n".encode() + super().frame(event)

    def failure(self, error: ApiError) -> Event:
        # With OpenAI's `error` object beside the event's own fields, which its clients raise from.
        inner = error.body()["error"]
        return self.event("error", code=error.code, message=error.message, param=error.param, error=inner)

    def part(self, text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": entries}

    def item(
        self, job: Job, text: str | None, entries: list[dict[str, Any]], status: str, details: Any = None
    ) -> dict[str, Any]:
        """The message that is the only item of the output; `text` None before it has any."""
        content = [] if text is None else [self.part(text, entries)]
        shown = {"id": f"msg_{job.ident}", "type": "message", "status": status, "role": "assistant", "content": content}
        return shown if details is None else {**shown, "latent": details}

    def response(self, service: AnswerService, job: Job, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        fields = self.fields
        running = status == "in_progress"
        extra = fields.model_extra or {}
        return {
            "id": f"resp_{job.ident}",
            "object": "response",
            "created_at": job.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "metadata": extra.get("metadata") or {},
            "model": service.settings.name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": fields.temperature or 0.0,
            "text": {"format": self.format},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": fields.top_logprobs or 0,
            "top_p": 1.0 if fields.top_p is None else fields.top_p,
            "truncation": "disabled",
            "usage": None if running else response_usage(job),
            "user": extra.get("user"),
        }


def ended(finish: str | None) -> str:
    return "incomplete" if finish == "length" else "completed"


def response_usage(job: Job) -> dict[str, Any]:
    """`usage` in this interface's words."""
    tokens = usage(job)
    return {
        "input_tokens": tokens["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": tokens["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens["total_tokens"],
        "latent_steps": tokens["latent_steps"],
    }


def refuse_stored(body: dict[str, Any]) -> None:
    """Refuse what names something stored: an earlier response, a conversation, a prompt template."""
    for name in STORED:
        if body.get(name) is not None:
            raise bad(
                f"{name}: expected none, as nothing is stored here, got one; send the whole conversation as input",
                name, "unsupported_field",
            )  # fmt: skip


def read_input(items: Any, conversation: Conversation) -> None:
    """The items of `input` as turns.

    Raises:
        ApiError: 400, naming the item and the part.
    """
    if isinstance(items, str):
        conversation.add("user", [items], "input")
        return
    if not isinstance(items, list) or not items:
        got = "an empty list" if items == [] else kind_of(items)
        raise bad(f"input: expected text or a list of items, got {got}", "input", "invalid_value")
    for number, item in enumerate(items):
        read_item(item, conversation, f"input.{number}")


def read_item(item: Any, conversation: Conversation, place: str) -> None:
    if not isinstance(item, dict):
        raise bad(f"{place}: expected an item with type or role, got {kind_of(item)}", place, "invalid_value")
    kind = "message" if item.get("type") is None else item["type"]
    if kind == "message":
        add_message(conversation, item, RESPONSES, place)
    elif kind == "function_call":
        conversation.add("assistant", [call_text({"function": item}, place)], place)
    elif kind == "function_call_output":
        output = item.get("output")
        if isinstance(output, dict):
            output = json.dumps(output, ensure_ascii=False)
        conversation.add("user", tool_answer(read_content(output, "user", RESPONSES, f"{place}.output")), place)
    elif kind == "item_reference":
        raise bad(f"{place}: expected the item itself, as nothing is stored here, got a reference", place)
    elif kind != "reasoning":  # another model's, which is not this one's to read
        known = "message, function_call, function_call_output or reasoning"
        raise bad(f"{place}: expected an item of type {known}, got {repr(kind)[:80]}", place, "unsupported_part")
