"""A request under way: its answers, what they emit, and what they have used."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from ..engine.requests import Generation, Prompt, Request
from .answer_request import AnswerRequest
from .text_stream import TextStream


@dataclass(frozen=True)
class TextPiece:
    """More of an answer's text, and with log probabilities the entries of its tokens (see `TokenLogprobs`)."""

    text: str
    logprobs: tuple[dict[str, Any], ...] = ()


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
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of tokens whose text has not been sent
    spelled: int = 0  # bytes of the tokens before those


@dataclass
class Job:
    """A request under way."""

    ident: str
    created: int
    request: AnswerRequest
    prompts: list[Prompt]
    choices: list[Choice] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first: float | None = None


def usage(job: Job) -> dict[str, Any]:
    """Tokens of a job; latent steps are counted apart from completion tokens."""
    prompt = sum(len(prompt) for prompt in job.prompts)
    completion, latent = sum(c.tokens for c in job.choices), sum(c.steps for c in job.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "latent_steps": latent,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
