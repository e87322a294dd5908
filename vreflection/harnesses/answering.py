"""Interleaved images and text in, answers out: what every harness's wrapper needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.encode import encode_prompt
from ..data.images import open_image
from ..data.template import IMAGE_PLACEHOLDER
from ..engine.decoder import LatentDecoder
from ..engine.requests import Generation, Prompt, Request
from ..errors import ConfigError, DataError
from ..evaluation.extraction import inside_answer
from ..model.checkpoint import local_folder
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..model.weight_files import DTYPES

Segment = str | Path | Image.Image


@dataclass(frozen=True)
class ChatQuestion:
    """One user turn.

    Attributes:
        segments: in order; a `str` is text, anything else an image or its file, taken as a viewer shows it.
        settings: `max_new_tokens`, sampling and the like for `LatentDecoder.request`.
        until: the answer ends before the first of these texts, which are looked for in what it hands over.
    """

    segments: Sequence[Segment]
    settings: dict[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatAnswer:
    """What a harness scores, and what it cost.

    Attributes:
        text: the answer without special tokens and, where it has tags, what stands inside the last `<answer>`.
        prompt_tokens: of the prompt. tokens: emitted, latent positions left out. latent_steps: latent positions.
    """

    text: str
    prompt_tokens: int
    tokens: int
    latent_steps: int


class ChatAnswerer:
    """A checkpoint that answers questions of a harness, batched, images and all.

    Args:
        model: checkpoint folder or hub id. batch_size: questions decoded together.
        min_pixels, max_pixels: per image; default the checkpoint's own.
        latent_steps, force_latent: see `LatentDecoder.request`.
        dtype: default as stored. device: default the first GPU if there is one.

    Raises:
        CheckpointError, ConfigError: nothing usable there, or values that cannot be meant.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        latent_steps: int | None = None,
        force_latent: bool = False,
        dtype: str | None = None,
        device: str | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        folder = local_folder(model)
        self.processor = VReflectionProcessor.from_pretrained(folder)
        size = self.processor.image_processor.size
        low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        if low > high:
            raise ConfigError(f"expected min_pixels <= max_pixels, got {low} and {high}")
        self.processor.image_processor.size = type(size)(shortest_edge=low, longest_edge=high)
        loaded = VReflectionForConditionalGeneration.from_pretrained(
            folder, dtype="auto" if dtype is None else DTYPES[dtype][1]
        )
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.eval().to(torch.device(place))
        self.decoder = LatentDecoder(self.model, max_batch_size=batch_size)
        self.latents = {"latent_steps": latent_steps, "force_latent": force_latent, "allow_other_latent_steps": True}

    def answers(self, questions: Iterable[ChatQuestion]) -> list[ChatAnswer]:
        """Answers in order. Images are prepared as rows become free."""
        seen: list[ChatQuestion] = []

        def requests() -> Iterator[Request]:
            for question in questions:
                seen.append(question)
                yield self.request(question)

        return [self.read(answer, seen[answer.index]) for answer in self.decoder.generate(requests())]

    def request(self, question: ChatQuestion) -> Request:
        settings = {"do_sample": False, "repetition_penalty": 1.0, "seed": 0, **self.latents, **question.settings}
        return self.decoder.request(self.prompt(question), **settings)

    def prompt(self, question: ChatQuestion) -> Prompt:
        parts, images = [], []
        for segment in question.segments:
            if isinstance(segment, str):
                if IMAGE_PLACEHOLDER in segment:
                    raise DataError(
                        "reserved-token", f"expected a text without {IMAGE_PLACEHOLDER}, got {segment[:200]!r}"
                    )
                parts.append(segment)
            else:
                images.append(segment if isinstance(segment, Image.Image) else open_image(segment, view="shown"))
                parts.append(IMAGE_PLACEHOLDER)
        return Prompt.of(encode_prompt("".join(parts), self.processor, images))

    def read(self, answer: Generation, question: ChatQuestion) -> ChatAnswer:
        ids = [token for token, inside in zip(answer.tokens, answer.latent, strict=True) if not inside]
        # Tags first: harnesses score bare answers, and many tasks stop at the line break before the tag.
        text = inside_answer(self.processor.decode(ids)).strip()
        for stop in question.until:
            text = text.partition(stop)[0] if stop else text
        return ChatAnswer(text.strip(), answer.prompt_length, len(ids), answer.latent_steps_taken)


def sampling_settings(harness_settings: dict[str, Any], default_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A harness's generation settings as the decoder's, and its stop texts.

    Raises:
        ConfigError: settings that latent decoding does not have.
    """
    values = dict(harness_settings)
    until = values.pop("until", None) or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    settings: dict[str, Any] = {"max_new_tokens": int(values.pop("max_new_tokens", None) or default_tokens)}
    temperature = values.pop("temperature", None)
    sample = bool(values.pop("do_sample", None)) or bool(temperature)
    top_p, top_k = values.pop("top_p", None), values.pop("top_k", None)
    if sample and (temperature is None or temperature > 0):
        settings |= {"do_sample": True, "temperature": 1.0 if temperature is None else float(temperature)}
        settings |= {name: value for name, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    for name in ("repetition_penalty", "seed"):
        if values.get(name) is not None:
            settings[name] = values[name]
        values.pop(name, None)
    # What asks for nothing beyond what happens anyway.
    neutral = {"num_beams": (None, 1), "use_cache": (None, True), "num_return_sequences": (None, 1)}
    unknown = [name for name, value in values.items() if value not in neutral.get(name, (None,))]
    if unknown:
        raise ConfigError(
            f"generation settings: {sorted(unknown)} are not supported by latent decoding; leave them out"
        )
    return settings, stops
