"""`LatentDecoder`: prompts in, answers out; rows come and go while the others decode on.

Shape suffixes: B rows, L prompt tokens, S spans, N latents per span, D width.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice

import torch

from ..decoding import NOTHING, DecodeRules
from ..errors import ConfigError
from .batch import Batch, constrained
from .finite import NOT_FINITE
from .grammar import Grammar
from .requests import Emitted, Generation, Prompt, Request, check_images, check_tokens
from .settings import resolve_latent_steps, resolve_latents, resolve_settings
from .weights import without_adapter_wrapper

# Steps between two looks of the host at what was emitted, when nobody waits for single tokens.
LOOK_EVERY = 8


class LatentDecoder(Batch):
    """Batched latent decoding with continuous admission.

    Args:
        model: a `VReflectionForConditionalGeneration`, or a PEFT model around one.
        max_batch_size: rows decoded together; further prompts wait for a free row.
        max_length: prompt and answer tokens per row, latents included; the cache for it is allocated at once. Default:
            the cache grows as needed.
        processor: a `VReflectionProcessor`; prompts may then be `(question, images)`, and answers carry text.
        step: `auto`, `fused` (Triton kernels, CUDA), `cpp` (one C++ call, CPU), `torch` (plain PyTorch) or
            `model` (the host model's forward).
        tier: `auto`, `eager`, `graph` or `loop`; see docs/decoding.md.
        latent_mode: `clean` or `parity` (see `DecodeRules`).
        image_cache: images whose visual tokens are kept for later prompts.
        share_prefixes: prompts that begin alike (the same image, say) compute their beginning once.

    Raises:
        ConfigError: a step or tier that cannot run here, or a cache that does not fit.
    """

    def __init__(
        self,
        model,
        *,
        max_batch_size: int = 8,
        max_length: int | None = None,
        processor=None,
        step: str = "auto",
        tier: str = "auto",
        latent_mode: str = "clean",
        image_cache: int = 16,
        share_prefixes: bool = True,
    ):
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size: expected at least 1, got {max_batch_size}")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length: expected at least 2, got {max_length}")
        if image_cache < 0:
            raise ConfigError(f"image_cache: expected at least 0, got {image_cache}")
        model = without_adapter_wrapper(model)
        if not hasattr(model, "prompt_inputs"):
            raise ConfigError(
                f"model: expected a VReflectionForConditionalGeneration, got {type(model).__name__}; "
                'its from_base(model, stage="base") makes one that shares the parameters'
            )
        pad = model.generation_config.pad_token_id
        rules = DecodeRules(model.config.lvr_start_id, model.config.lvr_id, 0 if pad is None else pad, latent_mode)
        super().__init__(
            model, processor, rules, max_batch_size, max_length, step, tier, image_cache, share_prefixes
        )  # fmt: skip
        # What other threads may touch: the queue and the tickets.
        self.lock = threading.Lock()
        self.waiting: dict[int, Request] = {}
        self.serving = False
        self.cancelled: deque[int] = deque()
        self.next_ticket = 0

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a LatentDecoder cannot be copied or pickled: it owns a cache, a queue and running requests; make another "
            "one with LatentDecoder(decoder.model, …)"
        )

    # Requests

    def request(
        self,
        prompt,
        *,
        latent_steps: int | None = None,
        allow_other_latent_steps: bool = False,
        force_latent: bool = False,
        latents: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        seed: int | None = None,
        return_latents: bool = False,
        hide_images: bool = False,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        generation_config=None,
        **settings,
    ) -> Request:
        """Check one prompt and its settings.

        Args:
            prompt: what the processor returns for one question, an encoded sample, or with a processor
                `(question, images)`.
            latent_steps: N per span; default the checkpoint's. Another number needs `allow_other_latent_steps`.
            force_latent: start a span right after the prompt.
            latents: states to consume inside spans instead of the model's own, for interventions: `(N, D)` for every
                span, or `(S, N, D)`, where span j consumes `latents[j % S]`. A sequence of `(N, D)` and None leaves
                the spans that have None to the model.
            seed: of the row's draws; the same seed gives the same answer whatever shares the batch. Default: drawn
                from torch's own generator.
            hide_images: no position after the prompt attends to image tokens, an intervention: what the answer knows of
                the image then went through the prompt's text.
            logprobs: record the log probability of each token, and of this many likeliest ones, as the model has them
                before temperature, penalties and biases.
            grammar: what the answer must follow after its latent spans, see `Grammars`.
            settings: `max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
                frequency_penalty, presence_penalty, logit_bias, min_new_tokens, eos_token_id` (see
                `SamplingSettings`; `logit_bias` is a mapping); defaults from the generation config.

        Raises:
            ConfigError: unsupported settings, or a prompt that can never fit into `max_length`.
            ValueError: a malformed prompt.
        """
        resolved = resolve_settings(generation_config or self.model.generation_config, settings)
        steps = resolve_latent_steps(self.model.config, latent_steps, allow_other_latent_steps, stacklevel=3)
        span_latents = resolve_latents(self.model, steps, latents)
        if seed is not None and not isinstance(seed, int):
            raise ConfigError(f"seed: expected an integer, got {seed!r}")
        if logprobs is not None and logprobs < 0:
            raise ConfigError(f"logprobs: expected at least 0, got {logprobs}")
        outside = [token for token, _ in resolved.sampling.logit_bias if not 0 <= token < self.vocabulary]
        if outside:
            raise ConfigError(f"logit_bias: expected token ids in [0, {self.vocabulary}), got {outside[0]}")
        if grammar is not None and not self.rules.clean:
            raise ConfigError('grammar: needs latent_mode="clean"; in parity mode ghosts would have to follow it')
        if grammar is not None and resolved.sampling.min_new_tokens:
            raise ConfigError("min_new_tokens: a grammar says where the answer ends; leave it out")
        made = Request(
            prompt=self.prompt(prompt),
            sampling=resolved.sampling,
            max_new_tokens=resolved.max_new_tokens,
            eos_token_ids=resolved.eos_token_ids,
            latent_steps=steps,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            force_latent=force_latent,
            latents=span_latents,
            return_latents=return_latents,
            hide_images=hide_images,
            logprobs=logprobs,
            grammar=grammar,
        )
        self.check_length(made)
        return made

    def prompt(self, given) -> Prompt:
        if isinstance(given, str) or (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)):
            if self.processor is None:
                raise ValueError("prompt: (question, images) needs a decoder with a processor; pass processor=…")
            question, images = (given, None) if isinstance(given, str) else given
            images = None if images is None else [images]
            given = self.processor(images, question, return_position_ids=True)
        made = Prompt.of(given)
        check_tokens(made, self.model.get_input_embeddings().weight.shape[0])
        if made.embeds is None:
            check_images(made, self.model.config.image_token_id, self.merge)
        return made

    def check_length(self, request: Request) -> None:
        if self.max_length is None:
            return
        span = request.latent_steps if self.rules.clean else 0
        needed = len(request.prompt) + request.max_new_tokens + span
        if needed > self.max_length:
            raise ConfigError(
                f"max_length: the prompt's {len(request.prompt)} tokens, {request.max_new_tokens} new ones and "
                f"{span} latents need {needed}, this decoder has {self.max_length}; lower max_new_tokens or make a "
                "decoder with a larger max_length"
            )

    def submit(self, request: Request) -> int:
        """Queue a request; returns its ticket. Safe to call from another thread than `advance`.

        Raises:
            RuntimeError: `generate` or `stream` is running on this decoder.
        """
        if self.serving:
            raise RuntimeError("this decoder is busy with generate or stream; submit to another decoder")
        return self.enqueue(request)

    def enqueue(self, request: Request) -> int:
        with self.lock:
            ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
            self.waiting[ticket] = request
        return ticket

    def cancel(self, ticket: int) -> None:
        """Give up a queued or running request at the next `advance`; unknown and finished tickets are ignored."""
        self.cancelled.append(ticket)

    def forget(self) -> None:
        """Drop shared beginnings and encoded images, as after writing to parameters through `.data`."""
        self.prefill.forget()

    @property
    def busy(self) -> bool:
        """Whether any request is queued or running, or an answer not handed out."""
        return bool(self.waiting or self.rows or self.looks or self.events)

    # Whole calls

    def generate(
        self,
        prompts: Iterable,
        *,
        seed: int | None = None,
        on_answer: Callable[[Generation], None] | None = None,
        **settings,
    ) -> list[Generation]:
        """Answer every prompt.

        Args:
            prompts: prompts (see `request`) or requests; a list is checked as a whole before anything starts, any
                other iterable is read as rows become free.
            seed: prompt i draws from `seed + i`.
            on_answer: called with each answer as it is finished.
            settings: of all prompts, see `request`; requests keep their own.

        Returns:
            answers in the order of the prompts.
        """
        answers: dict[int, Generation] = {}
        # Closed at once, not when an exception's traceback lets go of it.
        with closing(self.serve(self.requests(prompts, seed, settings), LOOK_EVERY)) as events:
            for event in events:
                if event.generation is not None:
                    answers[event.index] = event.generation
                    if on_answer is not None:
                        on_answer(event.generation)
        return [answers[index] for index in range(len(answers))]

    def stream(self, prompts: Iterable, *, seed: int | None = None, **settings) -> Iterator[Emitted]:
        """Yield every emitted position of every prompt as it comes; the last one of a prompt carries its answer.

        Closing the iterator gives the unfinished prompts up.
        """
        return self.serve(self.requests(prompts, seed, settings), look_every=1)

    def requests(self, prompts: Iterable, seed: int | None, settings: dict) -> Iterable[Request]:
        """Requests from prompts: of a list at once, so that nothing starts before all are checked; else on demand."""
        if isinstance(prompts, (str, tuple, Mapping, Prompt, Request)):
            raise ValueError(f"prompts: expected a list of prompts, got one {type(prompts).__name__}; pass [prompt]")
        pixels: dict[tuple[str, ...], torch.Tensor] = {}

        def made() -> Iterator[Request]:
            for index, prompt in enumerate(prompts):
                if isinstance(prompt, Request):
                    self.check_length(prompt)
                    yield prompt
                    continue
                request = self.request(prompt, seed=None if seed is None else seed + index, **settings)
                if request.prompt.pixel_values is not None and isinstance(prompts, list):
                    # Many questions on one image hold its pixels once.
                    keys = request.prompt.image_ids(self.merge)
                    request.prompt.pixel_values = pixels.setdefault(keys, request.prompt.pixel_values)
                yield request

        return list(made()) if isinstance(prompts, list) else made()

    def serve(self, requests: Iterable[Request], look_every: int) -> Generator[Emitted, None, None]:
        """Decode requests, never holding more of them than have a row, and yield what is emitted."""
        if self.busy or self.serving:
            raise RuntimeError("this decoder is busy with another call; finish or close it, or use another decoder")
        coming, index = iter(requests), {}
        self.serving = True
        try:
            while True:
                for request in islice(coming, self.max_batch_size - len(self.rows) - len(self.waiting)):
                    index[self.enqueue(request)] = len(index)
                if not self.busy:
                    return
                for event in self.advance(look_every):
                    number, answer = index[event.index], event.generation
                    if answer is not None:
                        answer.index = number
                        if answer.finish_reason == NOT_FINITE:
                            warnings.warn(f"an answer was cut short: {answer.error}", stacklevel=3)
                        elif answer.error is not None:
                            raise answer.error
                    yield replace(event, index=number)
        finally:
            for ticket in [*self.waiting, *self.by_ticket]:
                self.cancel(ticket)
            while self.busy:
                self.advance(look_every)
            self.serving = False

    # One turn of the engine

    def advance(self, look_every: int = 1) -> list[Emitted]:
        """Admit what fits, take up to `look_every` steps, and return what was emitted. Indices are tickets.

        A request that cannot be admitted, and all running ones if a step fails, end with `finish_reason` "error"; the
        decoder goes on with the others.
        """
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), on_device:
            self.drop_cancelled()
            self.admit()
            launched = bool(self.rows) and self.launch(look_every)
            # On a GPU the next steps are queued before the last ones are read: it never waits for the host.
            ahead = launched and self.device.type == "cuda" and self.tier.name != "loop"
            ahead = int(ahead and not constrained(list(self.rows.values())))
            try:
                while len(self.looks) > ahead:
                    self.read(self.looks.popleft())
            except BaseException as error:  # an interrupt, or the device itself
                self.fail(list(self.rows.values()), error)
                raise
        events, self.events = self.events, []
        return events

    def drop_cancelled(self) -> None:
        while self.cancelled:
            ticket = self.cancelled.popleft()
            row = self.by_ticket.get(ticket)
            with self.lock:
                request = self.waiting.pop(ticket, None)
            if row is not None:
                self.buffers.state.finished[row.slot] = True
                self.finish(row, NOTHING, False, "cancelled")
            elif request is not None:
                self.give_up(ticket, request, "cancelled")

    def give_up(self, ticket: int, request: Request, reason: str, error: BaseException | None = None) -> None:
        """Answer a request that never had a row."""
        answer = Generation(ticket, len(request.prompt), finish_reason=reason, error=error)
        self.events.append(Emitted(ticket, NOTHING, False, answer))

    def admit(self) -> None:
        with self.lock:
            free = self.max_batch_size - len(self.rows)
            taken = [(ticket, self.waiting.pop(ticket)) for ticket in list(islice(self.waiting, free))]
        if not taken:
            return
        try:
            self.admit_all(taken)
        except BaseException:
            # An interrupt: what has neither a row nor an answer waits on, first in the queue.
            answered = {event.index for event in self.events if event.generation is not None}
            with self.lock:
                left = {t: request for t, request in taken if t not in self.by_ticket and t not in answered}
                self.waiting = left | self.waiting
            raise

    def admit_all(self, taken: list[tuple[int, Request]]) -> None:
        """Give every request a row, or an answer that says why not."""
        try:
            if not self.rows:
                self.settle()
        except Exception as error:
            for ticket, request in taken:
                self.give_up(ticket, request, "error", error)
            return
        try:
            self.fill(taken)
        except Exception as error:
            # Whose fault was it? One by one, only the culprit fails.
            for ticket, request in taken:
                try:
                    if len(taken) == 1:
                        raise error
                    self.fill([(ticket, request)])
                except Exception as own:
                    self.give_up(ticket, request, "error", own)
