"""Conversations in the host library's form (`{"role": …, "content": …}`) as turns, images and a system text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data.template import SYSTEM_PROMPT, ChatTurn

ROLES = ("system", "user", "assistant")
# What a part of type "image" may hold its image under.
IMAGE_KEYS = ("image", "url", "path", "base64")
REMOTE = ("http://", "https://", "data:")


class Conversation(NamedTuple):
    """Turns after the system turn, whose text is `system`; `images` in the order of their places in the turns."""

    system: str
    turns: list[ChatTurn]
    images: list[Image.Image | bytes | str | Path]


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


def read_conversation(messages: Sequence[Mapping]) -> Conversation:
    """Turns and images of one conversation; without a system message the system text is that of training.

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
        texts = [read_part(part, f"message {number}", images) for part in parts]
        if role != "system":
            turns.append(ChatTurn(role, texts))
        elif None in texts:
            raise ValueError("message 0: expected a system message of text only, got an image")
        else:
            system = "".join(text for text in texts if text is not None)
    return Conversation(system, turns, images)


def read_part(part: Any, source: str, images: list) -> str | None:
    """A part's text, or None for an image, which is appended to `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        held = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
        if len(held) == 1:
            images.append(local_image(held[0]))
            return None
        raise ValueError(f"{source}: expected an image under one of {IMAGE_KEYS}, got {sorted(part)}")
    raise ValueError(f"{source}: expected parts of type text or image, got {kind or type(part).__name__!r}")


def local_image(image: Any) -> Image.Image | bytes | str | Path:
    """An image as our reader takes it; what lies elsewhere or is written as text is fetched by the host library."""
    if not isinstance(image, str) or not image.startswith(REMOTE):
        return image
    from transformers.image_utils import load_image

    return load_image(image)
