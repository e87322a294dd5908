"""From checked requests to decoding, and from what is emitted to answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from ..data.template import reserved_in
from ..decoding import MAX_END_IDS
from ..engine.finite import NOT_FINITE
from ..engine.grammar import Grammar, Grammars
from ..engine.requests import Emitted, Generation, Prompt, Request
from ..errors import ConfigError
from .answer_request import AnswerRequest, ResponseFormat
from .errors import ApiError, bad, overloaded, stopping
from .jobs import Choice, Job, LatentStep, SpanEnd, TextPiece
from .latent_settings import LatentSettings, packed
from .logprobs import TokenLogprobs
from .prompts import Picture, PromptMaker
from .schema import Box, GenerationFields, LatentField
from .settings import ServeSettings
from .text_stream import TextStream
from .worker import Stopped, Worker

FINISH = {"eos": "stop", "max_new_tokens": "length", "max_length": "length"}
LEAST_TOP_P = 1e-6  # what 0 means: the likeliest token alone
# Maps of an answer's spans from a number on; box j belongs to span j, a box alone to every span.
Maps = Callable[[Prompt, Generation, Sequence[Box], int], dict[str, Any]]


class Lanes:
    """Threads that read requests, apart by how long a request may keep them."""

    def __init__(self):
        self.texts = ThreadPoolExecutor(2, thread_name_prefix="texts")
        self.images = ThreadPoolExecutor(2, thread_name_prefix="images")
        self.large = ThreadPoolExecutor(1, thread_name_prefix="large-images")
        self.remote = ThreadPoolExecutor(16, thread_name_prefix="remote-images")

    def shutdown(self) -> None:
        for lane in (self.texts, self.images, self.large, self.remote):
            lane.shutdown(wait=False, cancel_futures=True)


class AnswerService:
    """Answers requests on one decoder.

    Args:
        worker: owns the decoder. processor: of the checkpoint. settings: limits.
        maps: makes attention maps of an answer; runs in the worker's thread.
    """

    def __init__(self, worker: Worker, processor, settings: ServeSettings, maps: Maps | None = None):
        self.worker, self.processor, self.settings, self.maps = worker, processor, settings, maps
        self.decoder = worker.decoder
        self.config = self.decoder.model.config
        self.in_work, self.stopping = 0, False
        self.prompts = PromptMaker(processor, settings)
        self.latent = LatentSettings(settings, self.trained_steps, self.config.hidden_width, maps is not None)
        self.token_logprobs = TokenLogprobs(processor.tokenizer)
        self.grammars: Grammars | None = None
        self.grammar_lock = threading.Lock()
        # Clients choose the steps; the log is not theirs. Set once: the filters belong to all threads.
        warnings.filterwarnings("ignore", message="decoding with .* latent steps")
        self.lanes = Lanes()

    @property
    def trained_steps(self) -> int:
        return 0 if self.config.traits.slot_input == "none" else self.config.num_latent_tokens

    @property
    def eos_token_ids(self) -> list[int]:
        ids = self.decoder.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else [int(token) for token in ids]

    # Admission

    def reserve(self, request: AnswerRequest) -> int:
        """Room for a request's answers, whose number is returned.

        Raises:
            ApiError: 400 if there can never be room for as many, 429 if there is none now, 503 while stopping.
        """
        count, limit = request.answers, self.settings.max_choices
        name = "n" if len(request.prompts) == 1 else "prompt"
        if count > limit:
            raise bad(f"{name}: expected at most {limit} answers to a request, got {count}", name)
        most = self.settings.batch_size + self.settings.max_queue
        if count > most:
            raise bad(
                f"{name}: expected at most {most} answers to a request, as this server decodes "
                f"{self.settings.batch_size} at a time and lets {self.settings.max_queue} wait, got {count}", name,
            )  # fmt: skip
        error = self.full(count)
        if error is not None:
            raise error
        self.in_work += count
        return count

    def full(self, count: int = 1) -> ApiError | None:
        """Why there is no room for `count` more answers now, or None."""
        if self.stopping:
            return stopping()
        if self.in_work + count > self.settings.batch_size + self.settings.max_queue:
            return overloaded(self.in_work, 1 + self.in_work // (4 * self.settings.batch_size))
        return None

    def release(self, count: int) -> None:
        self.in_work -= count

    async def prepare(self, request: AnswerRequest) -> Job:
        """Check a request, open its images, make its prompts; nothing is queued yet.

        Texts, images, large images and remote images have lanes of their own: nobody waits for somebody else's picture.
        """
        run, lanes, prompts = asyncio.get_running_loop().run_in_executor, self.lanes, self.prompts
        self.check_model(request)
        pictures: list[list[Picture]] = []
        for source in request.prompts:
            references = await run(lanes.texts, prompts.check, source)
            pictures.append([])
            for reference in references:
                lane = lanes.remote if prompts.pictures.is_remote(reference) else lanes.texts
                content = await run(lane, prompts.pictures.read, reference)
                lane = lanes.large if content.pixels > self.settings.large_pixels else lanes.images
                picture = prompts.pictures.known(content)
                pictures[-1].append(await run(lane, prompts.pictures.decode, content) if picture is None else picture)
        return await run(lanes.texts, self._prepare, request, pictures)

    def check_model(self, request: AnswerRequest) -> None:
        fields = request.fields
        if fields.model != self.settings.name:
            raise ApiError(
                404, f"model: expected {self.settings.name!r}, got {fields.model[:80]!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _prepare(self, request: AnswerRequest, pictures: list[list[Picture]]) -> Job:
        fields = request.fields
        latent = self.latent.resolved(fields.latent or LatentField())
        settings = self.sampling(fields) | latent | {"logprobs": request.logprobs}
        stops = self.stops(fields)
        if request.response_format is not None:
            settings["grammar"] = self.grammar(request.response_format, fields)
        prompts = [self.prompts.prompt(source, images) for source, images in zip(request.prompts, pictures)]
        job = Job(uuid.uuid4().hex, int(time.time()), request, prompts)
        seed = fields.seed if fields.seed is not None else int(torch.randint(2**62, ()))
        for prompt in job.prompts:
            tokens = self.tokens(request, prompt, latent["latent_steps"])
            if (fields.min_tokens or 0) > tokens:
                raise bad(f"min_tokens: expected at most {tokens} here, got {fields.min_tokens}", "min_tokens")
            for number in range(request.choices):
                decoding = self._request(prompt, settings, tokens, (seed + number) % 2**62)
                text = TextStream(self.processor, stops, fields.min_tokens or 0)
                job.choices.append(Choice(len(job.choices), decoding, text, asyncio.Queue()))
        return job

    def tokens(self, request: AnswerRequest, prompt: Prompt, steps: int) -> int:
        """The longest that an answer may become, in tokens without latent steps.

        What a request asks for beyond the server's limit is cut to the limit, and further to what fits; up to the
        limit it gets what it asks for, or ApiError 400 where that does not fit.
        """
        room, most = self.settings.max_length - len(prompt), self.settings.max_tokens
        wanted = request.max_tokens
        if wanted is None or wanted > most:
            tokens = min(self.settings.default_tokens if wanted is None else most,
                         max(room - self.settings.spans * steps, 1))  # fmt: skip
        else:
            tokens = wanted
        # A span's beginning and end are tokens of the answer.
        spans = min(self.settings.spans, -(-tokens // 2)) if steps else 0
        if room < tokens + spans * steps:
            name = "prompt" if isinstance(request.prompts[0], str | list) else request.prompts[0].name
            raise bad(
                f"{name}: the prompt's {len(prompt)} tokens, {tokens} new ones and {spans} spans of {steps} latent "
                f"steps do not fit into {self.settings.max_length}; shorten the prompt or lower {request.tokens_name}",
                name, "context_length_exceeded",
            )  # fmt: skip
        return tokens

    def _request(self, prompt: Prompt, settings: dict[str, Any], tokens: int, seed: int) -> Request:
        try:
            return self.decoder.request(
                prompt, max_new_tokens=tokens, seed=seed, allow_other_latent_steps=True, **settings
            )
        except (ConfigError, ValueError) as error:
            name = str(error).partition(":")[0]
            raise bad(str(error), name if name.isidentifier() else None, "invalid_value") from None

    def sampling(self, fields: GenerationFields) -> dict[str, Any]:
        """Keywords of `LatentDecoder.request` that say how tokens are picked and where an answer ends."""
        settings: dict[str, Any] = {
            "do_sample": bool(fields.temperature),
            "repetition_penalty": fields.repetition_penalty or 1.0,
            "frequency_penalty": fields.frequency_penalty or 0.0,
            "presence_penalty": fields.presence_penalty or 0.0,
            "logit_bias": fields.logit_bias or {},
            "min_new_tokens": fields.min_tokens or 0,
        }
        if fields.temperature:
            top_k = fields.top_k or 0
            settings |= {
                "temperature": max(fields.temperature, 1e-3),
                "top_p": 1.0 if fields.top_p is None else max(fields.top_p, LEAST_TOP_P),
                # Off, whether said with -1 or with more tokens than there are.
                "top_k": top_k if 0 < top_k < self.decoder.vocabulary else 0,
                "min_p": fields.min_p or 0.0,
            }
        if fields.ignore_eos or fields.stop_token_ids:
            own: list[int] = [] if fields.ignore_eos else self.eos_token_ids
            ends = list(dict.fromkeys(own + (fields.stop_token_ids or [])))
            if len(ends) > MAX_END_IDS or any(not 0 <= token < self.decoder.vocabulary for token in ends):
                raise bad(
                    f"stop_token_ids: expected at most {MAX_END_IDS} ids in [0, {self.decoder.vocabulary}), the "
                    f"model's own among them, got {str(ends)[:80]}",
                    "stop_token_ids", "invalid_value",
                )  # fmt: skip
            settings["eos_token_id"] = ends
        return settings

    def stops(self, fields: GenerationFields) -> list[str]:
        stops = fields.stop or []
        if len(stops) > self.settings.max_stops or any(len(stop) > 200 for stop in stops):
            raise bad(f"stop: expected at most {self.settings.max_stops} texts of at most 200 characters", "stop")
        return stops

    def grammar(self, response_format: ResponseFormat, fields: GenerationFields) -> Grammar:
        param = response_format.param
        if fields.ignore_eos:
            raise bad(f"ignore_eos: expected false with {param}, whose end is the answer's, got true", "ignore_eos")
        spelled = reserved_in(json.dumps(response_format.schema, ensure_ascii=False), self.processor.special_tokens)
        if spelled:
            raise bad(f"{param}: expected a schema of plain text, got special tokens {spelled}; an answer cannot spell "
                      "them", param, "reserved-token")  # fmt: skip
        try:
            with self.grammar_lock:
                if self.grammars is None:
                    self.grammars = Grammars(self.processor.tokenizer, self.decoder.vocabulary, self.eos_token_ids)
            if response_format.schema is None:
                return self.grammars.json_object()
            return self.grammars.json_schema(response_format.schema)
        except (ConfigError, ValueError) as error:
            raise bad(f"{param}: {error}", param, "invalid_value") from None

    # Decoding

    def start(self, job: Job, stream: bool) -> None:
        """Queue every choice; from here on events come into their queues."""
        loop = asyncio.get_running_loop()
        for choice in job.choices:
            put = choice.queue.put_nowait
            try:
                choice.ticket = self.worker.submit(
                    choice.request, lambda event, put=put: loop.call_soon_threadsafe(put, event), stream
                )
            except Stopped:
                raise stopping() from None

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
                if event.logprobs is not None and not self.token_logprobs.is_special(event.token):
                    choice.logprobs.append(self.token_logprobs.entry(event.logprobs))
                if piece := choice.text.push(event.token):
                    yield TextPiece(piece, self._logprobs(choice))
            if choice.text.stopped and choice.done is None and ended is None:
                self.worker.cancel(choice.ticket)  # pyright: ignore[reportArgumentType]
                ended = await self._cancelled(choice)
                choice.done, choice.finish = ended, "stop"
            elif ended is not None:
                choice.done, piece = ended, choice.text.finish()
                choice.finish = "stop" if choice.text.stopped else self._finish(ended, job.request.response_format)
                logprobs = self._logprobs(choice)
                if piece or logprobs:
                    yield TextPiece(piece, logprobs)

    @staticmethod
    def _logprobs(choice: Choice) -> tuple[dict[str, Any], ...]:
        """Entries that have not been sent; behind a stop text, only of tokens that begin before it."""
        entries, choice.logprobs = choice.logprobs, []
        if choice.text.stopped:
            size = len(choice.text.text.encode())
            kept, spelled = [], choice.spelled
            for entry in entries:
                if spelled < size:
                    kept.append(entry)
                spelled += len(entry["bytes"])
            entries = kept
        choice.spelled += sum(len(entry["bytes"]) for entry in entries)
        return tuple(entries)

    async def _cancelled(self, choice: Choice) -> Generation:
        """The answer of a choice that was cut at a stop text; what came after is not counted."""
        while True:
            event: Emitted = await choice.queue.get()
            if event.generation is not None:
                return event.generation

    @staticmethod
    def _finish(ended: Generation, response_format: ResponseFormat | None) -> str:
        if response_format is not None and isinstance(ended.error, ConfigError):
            raise bad(f"{response_format.param}: {ended.error}", response_format.param, "invalid_value")
        if ended.finish_reason in ("error", NOT_FINITE):
            raise ApiError(500, "decoding failed; the request can be sent again", code="decoding_failed")
        if ended.finish_reason == "cancelled":
            raise stopping()
        return FINISH[ended.finish_reason or "eos"]

    async def details(self, job: Job, choice: Choice, so_far: bool = False) -> dict[str, Any] | None:
        """What the request's `latent.include` asked for, of the spans that are whole and have not been sent.

        Args:
            so_far: of an answer that goes on, if it still does.

        Returns:
            None where nothing is left to send.
        """
        latent = job.request.fields.latent or LatentField()
        if not latent.include:
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
            details: dict[str, Any] = {"steps": steps, "spans": spans}
            if "hidden" in latent.include and answer.latents is not None and spans:
                details["hidden"] = packed(answer.latents[first:])
            prompt = choice.request.prompt
            if "maps" in latent.include and self.maps is not None and prompt.image_grid_thw is not None:
                tokens = self.decoder.prefill.features.of([prompt])[0]
                seen = replace(prompt, pixel_values=None, image_features=tokens)
                boxes = latent.boxes or ([] if latent.box is None else [latent.box])
                details["maps"] = self.maps(seen, answer, boxes, first)
            return details

        try:
            details = await asyncio.wrap_future(self.worker.call(make))
        except Stopped:
            raise stopping() from None
        if so_far and details is not None:
            choice.sent_spans = details["spans"]
        return details

    def _so_far(self, choice: Choice) -> Generation | None:
        """A running answer as if it had ended here; `None` when it has. In the worker's thread."""
        row = self.decoder.by_ticket.get(-1 if choice.ticket is None else choice.ticket)
        if row is None:
            return None
        answer = replace(row.answer, tokens=list(row.answer.tokens), latent=list(row.answer.latent))
        replace(row, answer=answer).collect(self.config.probe_offset)
        return answer
