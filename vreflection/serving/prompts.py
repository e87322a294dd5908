"""Conversations, plain texts and token ids as prompts of the decoder."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from ..data.encode import encode_chat
from ..data.template import SYSTEM_PROMPT, ChatTurn, reserved_in
from ..engine.requests import Prompt
from ..errors import DataError
from .conversation import Conversation, ImageReference, Turn
from .errors import ApiError, bad
from .media import announced_pixels, decode_image, image_bytes
from .settings import ServeSettings

# Longest side (px) of an image with detail "low", as in OpenAI's interface.
LOW_DETAIL_SIDE = 512
# A text's UTF-8 can shrink to a third when a tokenizer composes its characters (three letters of Hangul to a syllable).
COMPOSED = 3

# A key, and `process_images` of an image.
Picture = tuple[str, dict[str, torch.Tensor]]
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

    def check(self, source: PromptSource) -> list[ImageReference]:
        """What can be refused before any image is opened; the images in order.

        Raises:
            ApiError: too long, too many images, or special tokens in a text.
        """
        if isinstance(source, str):
            self.check_length([source], "prompt")
            self.check_reserved(source, "prompt")
        if not isinstance(source, Conversation):
            return []
        self.check_length(source.texts(), source.name)
        for turn in source.turns:
            for place, text in turn.texts().items():  # joined by newlines, which no special token holds
                self.check_reserved(text, place)
        references, most = list(source.images()), self.settings.max_images
        if len(references) > most:
            raise bad(f"{source.name}: expected at most {most} images, got {len(references)}", source.name)
        return references

    def prompt(self, source: PromptSource, pictures: Sequence[Picture] = ()) -> Prompt:
        """Tokens and pixels of a source that `check` accepts.

        Args:
            pictures: of its images, in order.

        Raises:
            ApiError: too long.
        """
        if isinstance(source, Conversation):
            return self.of_conversation(source, pictures)
        return self.of_ids(self.processor.encode_text(source) if isinstance(source, str) else source)

    def check_length(self, texts: Iterable[str], name: str) -> None:
        """Refuse texts whose bytes alone say that their tokens are too many, before they are tokenised."""
        texts = list(texts)
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        # Only what is not ASCII can be composed.
        shortest = sum(size if text.isascii() else size // COMPOSED for text, size in zip(texts, sizes))
        least = shortest // self.longest_token
        if least > self.settings.max_length:
            raise too_long(name, self.settings.max_length, f"{sum(sizes)} bytes of text, which are at least {least}")

    def of_conversation(self, conversation: Conversation, pictures: Sequence[Picture]) -> Prompt:
        name, limit = conversation.name, self.settings.max_length
        turns, system = list(conversation.turns), SYSTEM_PROMPT
        if turns and turns[0].role == "system":
            system = "".join(part for part in turns.pop(0).parts if isinstance(part, str))
        try:
            encoded = encode_chat(
                [chat_turn(turn) for turn in turns], self.processor, [patches for _, patches in pictures],
                system=system, max_length=limit,
            )  # fmt: skip
        except DataError as error:
            code = {"too-long": "context_length_exceeded"}.get(error.reason, error.reason)
            raise bad(f"{name}: {error.message}", name, code) from None
        return replace(Prompt.of(encoded), image_keys=tuple(key for key, _ in pictures) if pictures else None)

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


@dataclass(frozen=True)
class ImageContent:
    """An image's bytes. `key`: of bytes and detail. `pixels`: as its head announces them."""

    reference: ImageReference
    content: bytes
    key: str
    pixels: int


class Pictures:
    """Images as patches, the last ones kept: conversations and comparisons send the same image again and again."""

    def __init__(self, processor, settings: ServeSettings):
        self.processor, self.settings = processor, settings
        self.lock = threading.Lock()
        self.kept: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self.kept_bytes = 0

    @staticmethod
    def is_remote(reference: ImageReference) -> bool:
        return reference.url[:5].lower() != "data:"

    def read(self, reference: ImageReference) -> ImageContent:
        """An image's bytes, and how much work they are.

        Raises:
            ApiError: nothing there, or an image that its head alone disqualifies.
        """
        content = image_bytes(reference.url, self.settings, reference.place)
        key = hashlib.blake2b(content, digest_size=16).hexdigest() + ("-low" if reference.detail == "low" else "")
        return ImageContent(reference, content, key, announced_pixels(content, self.settings, reference.place))

    def known(self, content: ImageContent) -> Picture | None:
        """What was made of the same bytes before."""
        with self.lock:
            if content.key not in self.kept:
                return None
            self.kept.move_to_end(content.key)
            return content.key, self.kept[content.key]

    def decode(self, content: ImageContent) -> Picture:
        """A key of the image's bytes and detail, and `process_images` of it.

        Raises:
            ApiError: not a usable image.
        """
        known = self.known(content)
        if known is not None:
            return known
        reference, key, low = content.reference, content.key, content.reference.detail == "low"
        image = decode_image(content.content, self.settings, reference.place)
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
