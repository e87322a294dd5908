"""What goes into a decoder and what comes out.

Shape suffixes: L prompt tokens, I images, N latents per span, D width.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..decoding import SamplingSettings
from .grammar import Grammar

# The picked token with its log probability, then the likeliest ones.
Logprobs = list[tuple[int, float]]

PIECE = 2**19  # bytes of an image hashed at a time


@dataclass
class Prompt:
    """One prompt's tensors, unpadded: `input_ids` `(L,)` on the host and what its images need.

    Attributes:
        position_ids: `(3, L)`; or `mm_token_type_ids` `(L,)` to make them from.
        image_grid_thw: `(I, 3)` with `pixel_values` `(P, width)` or `image_features` `(T, D)`.
        image_keys: one per image; equal keys mean equal images. Made from the pixels when absent.
        embeds: `(L, D)`, when the caller has already put the visual tokens in their places.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    mm_token_type_ids: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    image_keys: tuple[str, ...] | None = None
    embeds: torch.Tensor | None = None

    FIELDS = ("input_ids", "position_ids", "mm_token_type_ids", "image_grid_thw", "pixel_values", "image_features")

    @classmethod
    def of(cls, given: Any) -> Prompt:
        """From a processor's output for one question, an encoded sample, or a prompt.

        Raises:
            ValueError: more than one prompt, an empty one, or none of the known kinds.
        """
        if isinstance(given, Prompt):
            return replace(given)  # what is derived below stays off the caller's object
        get = given.get if isinstance(given, Mapping) else lambda name: getattr(given, name, None)
        values: dict[str, Any] = {name: get(name) for name in cls.FIELDS}
        if values["input_ids"] is None:
            raise ValueError(
                f"prompt: expected a processor's output with input_ids, an encoded sample, or (question, images) with "
                f"a decoder that has a processor; got {type(given).__name__}"
            )
        for name in ("input_ids", "mm_token_type_ids"):
            if values[name] is not None:
                values[name] = one_row(name, values[name])
        if values["position_ids"] is not None:
            values["position_ids"] = three_axes(values["position_ids"], len(values["input_ids"]))
        mask = get("attention_mask")
        if mask is not None and not bool(mask.all()):
            keep = mask.reshape(-1).bool()
            for name in ("input_ids", "mm_token_type_ids", "position_ids"):
                if values[name] is not None:
                    values[name] = values[name][..., keep]
        for name in ("image_grid_thw", "pixel_values", "image_features"):
            if values[name] is not None and not len(values[name]):
                values[name] = None
        keys = get("image_keys")
        return cls(**values, image_keys=None if keys is None else tuple(keys))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def image_ids(self, merge: int = 2) -> tuple[str, ...]:
        """One key per image: the caller's, or a digest of what the image is given by."""
        if self.image_keys is None:
            self.image_keys = tuple(digest(part, grid) for part, grid in self.image_parts(merge))
        return self.image_keys

    def image_parts(self, merge: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each image's pixels or features, and its grid."""
        if self.image_grid_thw is None:
            return []
        source = self.pixel_values if self.pixel_values is not None else self.image_features
        if source is None:
            raise ValueError("image_grid_thw without pixel_values or image_features")
        sizes = [int(t * h * w) for t, h, w in self.image_grid_thw.tolist()]
        if self.pixel_values is None:
            sizes = [size // merge**2 for size in sizes]
        if sum(sizes) != len(source):
            name = "pixel_values" if self.pixel_values is not None else "image_features"
            raise ValueError(f"{name}: expected {sum(sizes)} rows for image_grid_thw, got {len(source)}")
        return list(zip(source.split(sizes), self.image_grid_thw))


def three_axes(position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Rope positions of one prompt as `(3, L)`."""
    if position_ids.dim() == 3 and position_ids.shape[1] == 1:
        position_ids = position_ids[:, 0]
    if position_ids.shape != (3, length):
        raise ValueError(f"position_ids: expected (3, {length}) or (3, 1, {length}), got {tuple(position_ids.shape)}")
    return position_ids


def check_tokens(prompt: Prompt, vocabulary: int) -> None:
    """Ids and what comes with them fit, or ValueError."""
    ids, types = prompt.input_ids, prompt.mm_token_type_ids
    if not bool(((ids >= 0) & (ids < vocabulary)).all()):
        raise ValueError(
            f"input_ids: expected ids in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}; is the tokenizer "
            "the model's own?"
        )
    if types is not None and len(types) != len(ids):
        raise ValueError(f"mm_token_type_ids: expected {len(ids)} like input_ids, got {len(types)}")
    images = 0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw)
    if prompt.image_keys is not None and len(prompt.image_keys) != images:
        raise ValueError(f"image_keys: expected one per image ({images}), got {len(prompt.image_keys)}")


def check_images(prompt: Prompt, image_token_id: int, merge: int) -> None:
    """Pixels, grids and image tokens of a prompt agree, or ValueError."""
    if prompt.pixel_values is not None and prompt.image_features is not None:
        raise ValueError("expected pixel_values or image_features, got both")
    parts = prompt.image_parts(merge)
    needed = sum(int(grid.prod()) // merge**2 for _, grid in parts)
    found = int((prompt.input_ids == image_token_id).sum())
    if found != needed:
        raise ValueError(
            f"image tokens and image_grid_thw disagree: {found} image tokens in input_ids, the grids need {needed}; "
            "was the prompt cut inside an image, or are its images missing?"
        )


def one_row(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.dim() == 2 and value.shape[0] != 1:
        raise ValueError(
            f"{name}: expected one prompt, (L,) or (1, L), got {tuple(value.shape)}; pass a list of prompts"
        )
    value = value.reshape(-1)
    if not len(value):
        raise ValueError(f"{name}: expected at least one token, got none")
    return value


def digest(part: torch.Tensor, grid: torch.Tensor) -> str:
    """A name for an image's content. Hashed in pieces side by side: a large image is a hundred megabytes of pixels."""
    values = part.detach().contiguous().cpu()
    raw = memoryview(values.view(-1).view(torch.uint8).numpy())
    pieces = [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]
    # Threads, as hashing large buffers holds no interpreter lock.
    found = hashers().map(sha256, pieces) if len(pieces) > 1 else map(sha256, pieces)
    whole = hashlib.sha256(b"".join(found))
    whole.update(str((values.dtype, tuple(values.shape), grid.tolist())).encode())
    return whole.hexdigest()


def sha256(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


@functools.cache
def hashers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "image-digest")


os.register_at_fork(after_in_child=hashers.cache_clear)  # a child has no threads


@dataclass
class Request:
    """A prompt and how to answer it; made by `LatentDecoder.request`."""

    prompt: Prompt
    sampling: SamplingSettings
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    latent_steps: int
    seed: int = 0
    force_latent: bool = False
    latents: tuple[torch.Tensor | None, ...] | None = None  # per span (N, D) or None for the model's own; then again
    return_latents: bool = False
    hide_images: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass
class Generation:
    """An answer.

    Attributes:
        index: of the prompt in the call, or the ticket of `submit`.
        tokens: emitted ids; latent positions hold `<|lvr|>` in clean mode, ghosts in parity mode.
        latent: per token, whether its position is a latent one.
        finish_reason: `eos`, `max_new_tokens`, `max_length` (no room left in the cache), `cancelled`, `error` or
            `not_finite` (NaN or infinity in the model's arithmetic; `tokens` are those before).
        error: what went wrong, with `error` or `not_finite`, or in making `text`; `generate` and `stream` raise it, and
            warn of `not_finite`.
        text: decoded answer without special tokens, when the decoder has a processor.
        latents, probes: with `return_latents`, `(spans, N, D)`: states consumed by the slots, and hidden states that
            the student's attention starts from: at the slots, or before them (`probe_offset` of the configuration).
        step_hidden: with `return_latents`, `(tokens, D)` hidden states whose logits gave each token.
        logprobs: with `logprobs`, per token the token with its log probability, then the likeliest ones; None at
            latent positions.
    """

    index: int
    prompt_length: int
    tokens: list[int] = field(default_factory=list)
    latent: list[bool] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    text: str | None = None
    latents: torch.Tensor | None = None
    probes: torch.Tensor | None = None
    step_hidden: torch.Tensor | None = None
    logprobs: list[Logprobs | None] = field(default_factory=list)

    @property
    def latent_steps_taken(self) -> int:
        return sum(self.latent)


@dataclass(frozen=True)
class Emitted:
    """One position of a stream: its `token`, and whether it is a `latent` one; `generation` with the last.

    An answer that is cut short (cancelled, or failed) comes with `token` -1. `logprobs` as in `Generation`.
    """

    index: int
    token: int
    latent: bool
    generation: Generation | None = None
    logprobs: Logprobs | None = None
