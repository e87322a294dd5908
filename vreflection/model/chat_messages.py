"""Conversations as turns, images and a system text: from the host library's form (`{"role": …, "content": …}`), and
back from the text that the template made of one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data.template import (
    IMAGE_PAD,
    SYSTEM_PROMPT,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    ChatTurn,
    chat_segments,
)
from ..errors import DataError
from .image_inputs import REMOTE, readable_image

ROLES = ("system", "user", "assistant")
# What a part of type "image" may hold its image under.
IMAGE_KEYS = ("image", "url", "path", "base64")
_TURN = re.compile(rf"{re.escape(TURN_START)}(system|user|assistant)\n(.*?){re.escape(TURN_END)}\n", re.DOTALL)
_HEADER = f"{TURN_START}assistant\n"


class Conversation(NamedTuple):
    """Turns after the system turn, whose text is `system`; `images` in the order of their places in the turns."""

    system: str
    turns: list[ChatTurn]
    images: list[Image.Image | bytes | str | Path]

    @property
    def last_role(self) -> str | None:
        return self.turns[-1].role if self.turns else None

    def text(self, add_header: bool, special_tokens: Collection[str] = ()) -> str:
        """Template text: each image as its three tokens.

        Args:
            add_header: end with the header of an answer; where the assistant spoke last, with its unfinished text.
                Without, all turns are complete.
            special_tokens: see `chat_segments`.
        """
        segments = [segment.text for segment in chat_segments(self.turns, self.system, special_tokens)]
        if not add_header:
            segments = [*segments, f"{TURN_END}\n"] if self.last_role == "assistant" else segments[:-1]
        return "".join(segments)


def split_conversations(value: Any) -> tuple[list[Sequence[Mapping]], bool]:
    """One conversation or a batch of them, and whether it was a batch."""
    messages = getattr(value, "messages", value)
    if isinstance(messages, (list, tuple)) and messages:
        if all(isinstance(message, Mapping) for message in messages):
            return [messages], False
        parts = [getattr(part, "messages", part) for part in messages]
        if all(isinstance(part, (list, tuple)) and part for part in parts):
            return parts, True
    raise ValueError(
        'conversation: expected a list of messages {"role": …, "content": …}, or a list of such lists, got '
        f"{type(value).__name__}"
    )


def read_template_text(text: str, source: str, special_tokens: Collection[str] = ()) -> Conversation:
    """The conversation whose template text this is, up to the header of an answer; its images come separately.

    Args:
        source: used in error messages.
        special_tokens: of the tokenizer, refused in the texts of the turns like the template's own.

    Raises:
        DataError: `reserved-token` where the template makes no such text, or special tokens stand elsewhere in it.
    """
    turns, end = [], 0
    while match := _TURN.match(text, end):
        role, shown = match.groups()
        turns.append((role, shown))
        end = match.end()
    begun = text[end:]
    if turns and turns[0][0] == "system" and begun.startswith(_HEADER):
        system = turns.pop(0)[1]
        if beginning := begun.removeprefix(_HEADER):
            turns.append(("assistant", beginning))
        conversation = Conversation(system, [ChatTurn(role, _parts(shown)) for role, shown in turns], [])
        try:
            if conversation.text(add_header=True, special_tokens=special_tokens) == text:
                return conversation
        except DataError as error:
            raise DataError(error.reason, str(error), source) from error
    raise DataError(
        "reserved-token",
        "expected a plain question, or text of apply_chat_template with add_generation_prompt=True (a system turn "
        f"first, the header of an answer last), got special tokens in other text that begins with {TURN_START}: "
        f"{text[:40]!r} … {text[-40:]!r}",
        source,
    )


def _parts(shown: str) -> list[str | None]:
    """A turn's text around its images, each of which is None."""
    first, *others = shown.split(VISION_START + IMAGE_PAD + VISION_END)
    return [first, *(part for text in others for part in (None, text))]


def read_conversation(messages: Sequence[Mapping], *, image_data: bool = True) -> Conversation:
    """Turns and images of one conversation; without a system message the system text is that of training.

    Args:
        image_data: whether the images are needed; without, a part of type image may stand for itself.

    Raises:
        ValueError: an unknown role or part, or a system message that is not the first.
    """
    system, turns, images = SYSTEM_PROMPT, [], []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES or (role == "system" and number):
            raise ValueError(
                f"message {number}: expected role user or assistant, or system for the first, got {role!r}"
            )
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"message {number}: expected content as text or a list of parts, got {content!r}")
        texts = [read_part(part, f"message {number}", images, image_data) for part in parts]
        if role != "system":
            turns.append(ChatTurn(role, texts))
        elif None in texts:
            raise ValueError("message 0: expected a system message of text only, got an image")
        else:
            system = "".join(text for text in texts if text is not None)
    return Conversation(system, turns, images)


def read_part(part: Any, source: str, images: list, image_data: bool = True) -> str | None:
    """A part's text, or None for an image, which is appended to `images` where its data are needed."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        sources = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
        if len(sources) <= 1 and not image_data:
            return None
        if len(sources) == 1:
            images.append(local_image(sources[0], f"{source}, image"))
            return None
        raise ValueError(f"{source}: expected an image under one of {IMAGE_KEYS}, got {sorted(part)}")
    raise ValueError(f"{source}: expected parts of type text or image, got {kind or type(part).__name__!r}")


def local_image(image: Any, name: str) -> Image.Image | bytes | str | Path:
    """An image as our reader takes it; what lies elsewhere or is written as text is fetched by the host library."""
    if not isinstance(image, str) or not image.startswith(REMOTE):
        return readable_image(image, name)
    from transformers.image_utils import load_image

    return load_image(image)
