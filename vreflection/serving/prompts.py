"""Conversations, plain texts and token ids as prompts of the decoder."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch
from PIL import Image

from ..data.encode import encode_chat
from ..data.template import SYSTEM_PROMPT, ChatTurn, reserved_in
from ..engine.requests import Prompt
from ..errors import DataError
from .conversation import Conversation, ImageReference, Turn
from .errors import ApiError, bad
from .media import decode_image, image_bytes
from .settings import ServeSettings

# Longest side (px) of an image with detail "low", as in OpenAI's interface.
LOW_DETAIL_SIDE = 512
# A text's UTF-8 can shrink to a third when a tokenizer composes its characters (three letters of Hangul to a syllable).
COMPOSED = 3

# A conversation, a text to go on with, or its token ids.
PromptSource = Conversation | str | list[int]


class PromptMaker:
    """Makes prompts with a checkpoint's processor, within a server's limits."""

    def __init__(self, processor, settings: ServeSettings):
        self.processor, self.settings = processor, settings
        self.pictures = Pictures(processor, settings)
        ordinary = set(processor.tokenizer.get_vocab()) - set(processor.special_tokens)
        # In a byte-level vocabulary each character stands for a byte.
        self.longest_token = max(map(len, ordinary), default=1)
        ids = processor.token_ids
        # Without images and spans of their own these would say something untrue.
        self.refused_ids = {
            ids.image, ids.video, ids.vision_start, ids.vision_end, ids.lvr_start, ids.lvr, ids.lvr_latent_end,
            ids.lvr_end,
        }  # fmt: skip
        self.vocabulary = len(processor.tokenizer)

    def prompt(self, source: PromptSource) -> Prompt:
        """Tokens and pixels.

        Raises:
            ApiError: too long, special tokens in a text, or an image that cannot be used.
        """
        if isinstance(source, Conversation):
            return self.of_conversation(source)
        return self.of_text(source) if isinstance(source, str) else self.of_ids(source)

    def check_length(self, texts: Iterable[str], name: str) -> None:
        """Refuse texts whose bytes alone say that their tokens are too many, before they are tokenised."""
        size = sum(len(text.encode()) for text in texts)
        least = size // (COMPOSED * self.longest_token)
        if least > self.settings.max_length:
            raise too_long(name, self.settings.max_length, f"{size} bytes of text, which are at least {least}")

    def of_conversation(self, conversation: Conversation) -> Prompt:
        name, limit = conversation.name, self.settings.max_length
        self.check_length(conversation.texts(), name)
        for turn in conversation.turns:
            self.check_reserved("".join(part for part in turn.parts if isinstance(part, str)), turn.place)
        references = list(conversation.images())
        if len(references) > self.settings.max_images:
            raise bad(f"{name}: expected at most {self.settings.max_images} images, got {len(references)}", name)
        pictures = [self.pictures.of(reference) for reference in references]
        turns, system = list(conversation.turns), SYSTEM_PROMPT
        if turns and turns[0].role == "system":
            system = "".join(part for part in turns.pop(0).parts if isinstance(part, str))
        try:
            encoded = encode_chat(
                [chat_turn(turn) for turn in turns], self.processor, [image for _, image in pictures],
                system=system, max_length=limit,
            )  # fmt: skip
        except DataError as error:
            code = {"too-long": "context_length_exceeded"}.get(error.reason, error.reason)
            raise bad(f"{name}: {error.message}", name, code) from None
        return replace(Prompt.of(encoded), image_keys=tuple(key for key, _ in pictures) if pictures else None)

    def of_text(self, text: str) -> Prompt:
        self.check_length([text], "prompt")
        self.check_reserved(text, "prompt")
        return self.of_ids(self.processor.encode_text(text))

    def of_ids(self, ids: list[int]) -> Prompt:
        if not ids:
            raise bad("prompt: expected text or token ids, got none", "prompt", "invalid_value")
        if len(ids) > self.settings.max_length:
            raise too_long("prompt", self.settings.max_length, str(len(ids)))
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary or i in self.refused_ids), None)
        if wrong is not None:
            raise bad(
                f"prompt: expected token ids in [0, {self.vocabulary}) without those of images and latent steps, "
                f"got {str(wrong)[:40]}",
                "prompt", "invalid_value",
            )  # fmt: skip
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return Prompt(input_ids, mm_token_type_ids=torch.zeros_like(input_ids))

    def check_reserved(self, text: str, place: str) -> None:
        spelled = reserved_in(text, self.processor.special_tokens)
        if spelled:
            raise bad(
                f"{place}: expected plain text, got special tokens {spelled}; remove them, or put a blank inside them",
                place, "reserved-token",
            )  # fmt: skip


def too_long(name: str, limit: int, got: str) -> ApiError:
    return bad(f"{name}: expected at most {limit} tokens, got {got}; shorten it", name, "context_length_exceeded")


def chat_turn(turn: Turn) -> ChatTurn:
    return ChatTurn(turn.role, [part if isinstance(part, str) else None for part in turn.parts])


class Pictures:
    """Images as patches, the last ones kept: conversations and comparisons send the same image again and again."""

    def __init__(self, processor, settings: ServeSettings):
        self.processor, self.settings = processor, settings
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self.kept_bytes = 0

    def of(self, reference: ImageReference) -> tuple[str, dict[str, torch.Tensor]]:
        """A key of the image's bytes and detail, and `process_images` of it.

        Raises:
            ApiError: nothing usable there.
        """
        content = image_bytes(reference.url, self.settings, reference.place)
        low = reference.detail == "low"
        key = hashlib.blake2b(content, digest_size=16).hexdigest() + ("-low" if low else "")
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return key, self.kept[key]
        image = decode_image(content, self.settings, reference.place)
        try:
            patches = self.processor.process_images([low_detail(image) if low else image])
        except DataError as error:
            message = f"{reference.place}: not a usable image ({error.reason}): {error.message}"
            raise bad(message, reference.place, "invalid_image") from None
        with self.lock:
            if key not in self.kept:
                self.kept[key] = patches
                self.kept_bytes += patches["pixel_values"].nbytes
            while self.kept_bytes > self.settings.image_cache and len(self.kept) > 1:
                _, oldest = self.kept.popitem(last=False)
                self.kept_bytes -= oldest["pixel_values"].nbytes
        return key, patches


def low_detail(image: Image.Image) -> Image.Image:
    """An image that fits into `LOW_DETAIL_SIDE` pixels a side; smaller ones stay as they are."""
    longest = max(image.size)
    if longest <= LOW_DETAIL_SIDE:
        return image
    # Rounded up, so that a thin image does not become too thin to be used.
    width, height = (-(-side * LOW_DETAIL_SIDE // longest) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
