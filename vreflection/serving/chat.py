"""From a checked chat request to decoding requests, and from what is emitted to an answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..data.encode import encode_chat
from ..data.template import SYSTEM_PROMPT, ChatTurn
from ..engine.requests import Emitted, Generation, Prompt, Request
from ..errors import ConfigError, DataError
from .errors import ApiError, bad, overloaded
from .media import decode_image, image_bytes
from .schema import Box, ChatRequest, Hidden, LatentField
from .settings import ServeSettings
from .text_stream import TextStream
from .worker import Worker

FINISH = {"eos": "stop", "max_new_tokens": "length", "max_length": "length"}
# Maps of an answer's spans from a number on; box j belongs to span j, a box alone to every span.
Maps = Callable[[Prompt, Generation, Sequence[Box], int], dict[str, Any]]


@dataclass(frozen=True)
class TextPiece:
    """More of an answer's text."""

    text: str


@dataclass(frozen=True)
class LatentStep:
    """A latent step was taken: the answer's `step`-th, and the `span_step`-th of span number `span`, from 0."""

    step: int
    span: int
    span_step: int


@dataclass(frozen=True)
class SpanEnd:
    """A span is whole, and the answer goes on."""

    span: int


@dataclass
class Choice:
    """One answer under way. `done` holds it when it is whole."""

    index: int
    request: Request
    text: TextStream
    queue: asyncio.Queue
    ticket: int | None = None
    done: Generation | None = None
    finish: str | None = None
    steps: int = 0
    tokens: int = 0
    spans: int = 0  # that have begun
    span_steps: int = 0  # of the open span, 0 outside
    sent_spans: int = 0  # whose maps and latents were sent while the answer went on


@dataclass
class Job:
    """A chat request under way."""

    ident: str
    created: int
    request: ChatRequest
    prompt: Prompt
    choices: list[Choice] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first: float | None = None


class ChatService:
    """Answers chat requests on one decoder.

    Args:
        worker: owns the decoder. processor: of the checkpoint. settings: limits.
        maps: makes attention maps of an answer; runs in the worker's thread.
    """

    def __init__(self, worker: Worker, processor, settings: ServeSettings, maps: Maps | None = None):
        self.worker, self.processor, self.settings, self.maps = worker, processor, settings, maps
        self.decoder = worker.decoder
        self.config = self.decoder.model.config
        self.in_work = 0
        self.pictures = Pictures(processor, settings)
        # Clients choose the steps; the log is not theirs. Set once: the filters belong to all threads.
        warnings.filterwarnings("ignore", message="decoding with .* latent steps")
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="images")

    @property
    def trained_steps(self) -> int:
        return 0 if self.config.traits.slot_input == "none" else self.config.num_latent_tokens

    # Admission

    def reserve(self, count: int) -> None:
        """Room for `count` answers, or ApiError 429."""
        if self.in_work + count > self.settings.batch_size + self.settings.max_queue:
            raise overloaded(self.in_work, 1 + self.in_work // (4 * self.settings.batch_size))
        self.in_work += count

    def release(self, count: int) -> None:
        self.in_work -= count

    async def prepare(self, asked: ChatRequest) -> Job:
        """Check a request, open its images, make its prompt; nothing is queued yet."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.readers, self._prepare, asked, loop)

    def _prepare(self, asked: ChatRequest, loop) -> Job:
        if asked.model != self.settings.name:
            raise ApiError(
                404, f"model: expected {self.settings.name!r}, got {asked.model[:80]!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        settings = self.sampling(asked)
        latent = self.latent_settings(asked.latent or LatentField())
        prompt = self.prompt(asked)
        room, steps = self.settings.max_length - len(prompt), latent["latent_steps"]
        wanted = asked.max_completion_tokens or asked.max_tokens
        tokens = wanted or min(self.settings.default_tokens, max(room - self.settings.spans * steps, 1))
        # A span's beginning and end are tokens of the answer.
        spans = min(self.settings.spans, -(-tokens // 2)) if steps else 0
        if tokens > self.settings.max_tokens:
            raise bad(f"max_tokens: expected at most {self.settings.max_tokens}, got {tokens}", "max_tokens")
        if room < tokens + spans * steps:
            raise bad(
                f"messages: the prompt's {len(prompt)} tokens, {tokens} new ones and {spans} spans of {steps} latent "
                f"steps do not fit into {self.settings.max_length}; shorten the prompt or lower max_tokens",
                "messages", "context_length_exceeded",
            )  # fmt: skip
        job = Job(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), asked, prompt)
        seed = asked.seed if asked.seed is not None else int(torch.randint(2**62, ()))
        stops = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or [])
        if len(stops) > self.settings.max_stops or any(len(stop) > 200 for stop in stops):
            raise bad(f"stop: expected at most {self.settings.max_stops} texts of at most 200 characters", "stop")
        for index in range(asked.n or 1):
            request = self._request(prompt, settings | latent, tokens, (seed + index) % 2**62)
            job.choices.append(Choice(index, request, TextStream(self.processor, stops), asyncio.Queue()))
        return job

    def _request(self, prompt: Prompt, settings: dict[str, Any], tokens: int, seed: int) -> Request:
        try:
            return self.decoder.request(
                prompt, max_new_tokens=tokens, seed=seed, allow_other_latent_steps=True, **settings
            )
        except (ConfigError, ValueError) as error:
            raise bad(str(error)) from None

    def sampling(self, asked: ChatRequest) -> dict[str, Any]:
        count = asked.n or 1
        if count > self.settings.max_choices:
            raise bad(f"n: expected at most {self.settings.max_choices}, got {count}", "n")
        temperature = asked.temperature
        settings: dict[str, Any] = {
            "do_sample": bool(temperature),
            "repetition_penalty": asked.repetition_penalty or 1.0,
        }
        if temperature:
            settings |= {"temperature": max(temperature, 1e-3), "top_p": asked.top_p or 1.0, "top_k": asked.top_k or 0}
        return settings

    def latent_settings(self, asked: LatentField) -> dict[str, Any]:
        """Settings of the decoder, or ApiError where the checkpoint does not allow what is asked."""
        trained = self.trained_steps
        steps = 0 if asked.off else trained if asked.steps is None else asked.steps
        if asked.off and asked.steps:
            raise bad(f"latent: expected off or steps, got off with {asked.steps} steps", "latent.steps")
        if steps not in (0, trained):
            if not self.settings.other_latent_steps or not trained:
                raise bad(f"latent.steps: this checkpoint allows 0 or {trained}, got {steps}", "latent.steps")
            if steps > self.settings.max_latent_steps:
                raise bad(
                    f"latent.steps: expected at most {self.settings.max_latent_steps}, got {steps}", "latent.steps"
                )
        if asked.force and not trained:
            raise bad("latent.force: this checkpoint has no latent steps; leave it out", "latent.force")
        if "maps" in asked.include and self.maps is None:
            raise bad("latent.include: this server makes no maps", "latent.include")
        if asked.box is not None and asked.boxes is not None:
            raise bad("latent.boxes: expected box or boxes, got both", "latent.boxes")
        if asked.boxes is not None and not 0 < len(asked.boxes) <= self.settings.spans:
            raise bad(
                f"latent.boxes: expected 1 to {self.settings.spans} boxes, one per span, got {len(asked.boxes)}",
                "latent.boxes",
            )
        settings: dict[str, Any] = {"latent_steps": steps, "force_latent": asked.force}
        if asked.include:
            settings["return_latents"] = True
        if asked.use is not None:
            settings["latents"] = self.span_latents(asked.use, steps)
        return settings

    def span_latents(self, use: Hidden | list[Hidden | None], steps: int) -> list[torch.Tensor | None]:
        """Latents per span, None for the model's own, as `LatentDecoder.request` takes them."""
        spans: list[torch.Tensor | None] = []
        for states in use if isinstance(use, list) else [use]:
            spans += [None] if states is None else self.unpacked(states, steps)
        if not 0 < len(spans) <= self.settings.spans:
            raise bad(f"latent.use: expected 1 to {self.settings.spans} spans, got {len(spans)}", "latent.use")
        return spans

    def unpacked(self, states: Hidden, steps: int) -> torch.Tensor:
        """`(spans, steps, width)`."""
        width = self.config.hidden_width
        spans = states.shape[0] if len(states.shape) == 3 else 1
        if states.shape[-2:] != [steps, width] or not steps or not 0 < spans <= self.settings.spans:
            raise bad(
                f"latent.use: expected shape ({steps}, {width}) or (spans, {steps}, {width}) with 1 to "
                f"{self.settings.spans} spans, got {tuple(states.shape)}",
                "latent.use",
            )
        size = 4 * spans * steps * width
        try:
            raw = base64.b64decode(states.data, validate=True)
        except ValueError as error:
            raise bad(f"latent.use: expected base64, got {error}", "latent.use") from None
        if len(raw) != size:
            raise bad(f"latent.use: expected {size} bytes, got {len(raw)}", "latent.use")
        values = np.frombuffer(raw, dtype="<f4").reshape(spans, steps, width)
        if not np.isfinite(values).all():
            raise bad("latent.use: expected finite numbers", "latent.use")
        return torch.from_numpy(values.copy())

    def prompt(self, asked: ChatRequest) -> Prompt:
        """Tokens and pixels of a conversation."""
        messages = list(asked.messages)
        system = SYSTEM_PROMPT
        if messages[0].role in ("system", "developer"):
            first = messages.pop(0)
            if not isinstance(first.content, str) and any(part.type != "text" for part in first.content):
                raise bad("messages.0: expected text in a system turn", "messages.0.content")
            system = "".join(text for text in parts_of(first.content, []) if text is not None)
        urls: list[tuple[str, str]] = []
        turns = []
        for number, message in enumerate(messages, len(asked.messages) - len(messages)):
            place = f"messages.{number}.content"
            if message.role not in ("user", "assistant"):
                raise bad(f"messages.{number}: a system turn comes first, got one later", f"messages.{number}.role")
            found: list[str] = []
            turns.append(ChatTurn(message.role, parts_of(message.content, found)))  # pyright: ignore[reportArgumentType]
            if found and message.role != "user":
                raise bad(f"{place}: expected text in an assistant turn, got an image", place)
            urls += [(url, place) for url in found]
        if len(urls) > self.settings.max_images:
            raise bad(f"messages: expected at most {self.settings.max_images} images, got {len(urls)}", "messages")
        pictures = [self.pictures.of(url, place) for url, place in urls]
        images = [made for _, made in pictures]
        try:
            encoded = encode_chat(turns, self.processor, images, system=system, max_length=self.settings.max_length)
        except DataError as error:
            code = {"too-long": "context_length_exceeded"}.get(error.reason, error.reason)
            raise bad(f"messages: {error.message}", "messages", code) from None
        return replace(Prompt.of(encoded), image_keys=tuple(key for key, _ in pictures) if pictures else None)

    # Decoding

    def start(self, job: Job, stream: bool) -> None:
        """Queue every choice; from here on events come into their queues."""
        loop = asyncio.get_running_loop()
        for choice in job.choices:
            put = choice.queue.put_nowait
            choice.ticket = self.worker.submit(
                choice.request, lambda event, put=put: loop.call_soon_threadsafe(put, event), stream
            )

    def cancel(self, job: Job) -> None:
        for choice in job.choices:
            if choice.ticket is not None and choice.done is None:
                self.worker.cancel(choice.ticket)

    async def events(self, job: Job, choice: Choice) -> AsyncIterator[TextPiece | LatentStep | SpanEnd]:
        """What a choice emits until it is whole."""
        while choice.finish is None:
            event: Emitted = await choice.queue.get()
            if job.first is None:
                job.first = time.monotonic()
            ended = event.generation
            if event.token >= 0 and event.latent:
                choice.spans += not choice.span_steps
                choice.steps, choice.span_steps = choice.steps + 1, choice.span_steps + 1
                yield LatentStep(choice.steps, choice.spans - 1, choice.span_steps)
            elif event.token >= 0:
                choice.tokens += 1
                if choice.span_steps and ended is None:
                    yield SpanEnd(choice.spans - 1)
                choice.span_steps = 0
                if piece := choice.text.push(event.token):
                    yield TextPiece(piece)
            if choice.text.stopped and choice.done is None and ended is None:
                self.worker.cancel(choice.ticket)  # pyright: ignore[reportArgumentType]
                ended = await self._cancelled(choice)
                choice.done, choice.finish = ended, "stop"
            elif ended is not None:
                choice.done, piece = ended, choice.text.finish()
                choice.finish = "stop" if choice.text.stopped else self._finish(ended)
                if piece:
                    yield TextPiece(piece)

    async def _cancelled(self, choice: Choice) -> Generation:
        """The answer of a choice that was cut at a stop text; what came after is not counted."""
        while True:
            event: Emitted = await choice.queue.get()
            if event.generation is not None:
                return event.generation

    @staticmethod
    def _finish(ended: Generation) -> str:
        if ended.finish_reason == "error":
            raise ApiError(500, "decoding failed; the request can be sent again", code="decoding_failed")
        if ended.finish_reason == "cancelled":
            raise ApiError(503, "the server is stopping; send the request to it again later", code="stopping")
        return FINISH[ended.finish_reason or "eos"]

    async def details(self, job: Job, choice: Choice, so_far: bool = False) -> dict[str, Any] | None:
        """What the request's `latent.include` asked for, of the spans that are whole and have not been sent.

        Args:
            so_far: of an answer that goes on, if it still does.

        Returns:
            None where nothing is left to send.
        """
        asked = job.request.latent or LatentField()
        if not asked.include:
            return None
        first = choice.sent_spans

        def make() -> dict[str, Any] | None:
            answer = self._so_far(choice) if so_far else choice.done
            if answer is None:
                return None
            spans = 0 if answer.latents is None else len(answer.latents)
            if first == spans and (so_far or first):
                return None
            # The decoder may be ahead of the events that `choice` counts.
            steps = answer.latent_steps_taken if so_far else choice.steps
            made: dict[str, Any] = {"steps": steps, "spans": spans}
            if "hidden" in asked.include and answer.latents is not None and spans:
                made["hidden"] = packed(answer.latents[first:])
            if "maps" in asked.include and self.maps is not None and job.prompt.image_grid_thw is not None:
                tokens = self.decoder.prefill.features.of([job.prompt])[0]
                seen = replace(job.prompt, pixel_values=None, image_features=tokens)
                boxes = asked.boxes or ([] if asked.box is None else [asked.box])
                made["maps"] = self.maps(seen, answer, boxes, first)
            return made

        try:
            made = await asyncio.wrap_future(self.worker.call(make))
        except DataError as error:
            param = "latent.box" if asked.boxes is None else "latent.boxes"
            raise bad(f"{param}: {error.message}", param) from None
        if so_far and made is not None:
            choice.sent_spans = made["spans"]
        return made

    def _so_far(self, choice: Choice) -> Generation | None:
        """A running answer as if it had ended here; `None` when it has. In the worker's thread."""
        row = self.decoder.by_ticket.get(-1 if choice.ticket is None else choice.ticket)
        if row is None:
            return None
        held = replace(row, answer=replace(row.answer, tokens=list(row.answer.tokens), latent=list(row.answer.latent)))
        held.collect()
        return held.answer


class Pictures:
    """Images as patches, the last ones kept: conversations and comparisons send the same image again and again."""

    def __init__(self, processor, settings: ServeSettings):
        self.processor, self.settings = processor, settings
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self.held = 0  # bytes

    def of(self, url: str, param: str) -> tuple[str, dict[str, torch.Tensor]]:
        """A key of the image's bytes, and `process_images` of it.

        Raises:
            ApiError: nothing usable there.
        """
        content = image_bytes(url, self.settings, param)
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return key, self.kept[key]
        image = decode_image(content, self.settings, param)
        try:
            made = self.processor.process_images([image])
        except DataError as error:
            raise bad(f"not a usable image ({error.reason}): {error.message}", param, "invalid_image") from None
        with self.lock:
            if key not in self.kept:
                self.kept[key] = made
                self.held += made["pixel_values"].nbytes
            while self.held > self.settings.image_cache and len(self.kept) > 1:
                _, old = self.kept.popitem(last=False)
                self.held -= old["pixel_values"].nbytes
        return key, made


def parts_of(content, urls: list[str]) -> list[str | None]:
    """A message's parts: text, or `None` for an image, whose address goes to `urls`."""
    if isinstance(content, str):
        return [content]
    parts: list[str | None] = []
    for part in content:
        if part.type == "text":
            parts.append(part.text)
        else:
            urls.append(part.image_url.url)
            parts.append(None)
    return parts


def packed(latents_ND: torch.Tensor) -> dict[str, Any]:
    """`Hidden` of latents."""
    values = latents_ND.detach().float().cpu().numpy().astype("<f4")
    return {"data": base64.b64encode(values.tobytes()).decode(), "shape": list(values.shape)}


def usage(job: Job) -> dict[str, Any]:
    """Tokens of a job; latent steps are counted apart from completion tokens."""
    completion, latent = sum(c.tokens for c in job.choices), sum(c.steps for c in job.choices)
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion,
        "total_tokens": len(job.prompt) + completion,
        "latent_steps": latent,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
