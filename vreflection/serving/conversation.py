"""Messages as clients write them, read into turns of text and images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import bad

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user",
    "function": "user",
}  # fmt: skip
DETAILS = ("auto", "low", "high", "original")


@dataclass(frozen=True)
class ImageReference:
    """An image of a message: its address, OpenAI's `detail`, and where in the request it stands."""

    url: str
    detail: str
    place: str


@dataclass
class Turn:
    """Consecutive messages of one role. `places`: for each part, where the message stands that it belongs to."""

    role: Role
    parts: list[str | ImageReference]
    places: list[str]

    def texts(self) -> dict[str, str]:
        """Each message's text by its place."""
        texts: dict[str, list[str]] = {}
        for part, place in zip(self.parts, self.places):
            if isinstance(part, str):
                texts.setdefault(place, []).append(part)
        return {place: "".join(parts) for place, parts in texts.items()}


@dataclass
class Conversation:
    """Turns in order, no two of one role in a row. `name`: of the request's field that holds them.

    A system turn in front sets the system prompt. A last turn of the assistant is the beginning of the answer.
    """

    name: str
    turns: list[Turn] = field(default_factory=list)

    def add(self, role: Role, parts: Sequence[str | ImageReference], place: str) -> None:
        """One more message; it joins the turn before it, on a new line, if both have one role."""
        if self.turns and self.turns[-1].role == role:
            parts = ["\n", *parts]
        else:
            self.turns.append(Turn(role, [], []))
        self.turns[-1].parts += parts
        self.turns[-1].places += [place] * len(parts)

    def images(self) -> Iterator[ImageReference]:
        for turn in self.turns:
            yield from (part for part in turn.parts if isinstance(part, ImageReference))

    def texts(self) -> Iterator[str]:
        for turn in self.turns:
            yield from (part for part in turn.parts if isinstance(part, str))

    def summary(self) -> list[dict[str, Any]]:
        """For the log: texts as they are, images by their kind and size."""
        return [{"role": turn.role, "content": [shortened(part) for part in turn.parts]} for turn in self.turns]


def shortened(part: str | ImageReference) -> str:
    if isinstance(part, str):
        return part
    head, comma, data = part.url.partition(",")
    if part.url[:5].lower() == "data:" and comma:
        return f"<image {head[5:85]}, {len(data)} characters>"
    return f"<image {part.url[:200]}>"


@dataclass(frozen=True)
class Dialect:
    """How one interface spells the parts of a message, and what to write instead of parts that it does not have."""

    texts: dict[str, str]  # type of a part -> the key that holds its text
    image: str
    instead: dict[str, str]


IMAGE_URL = '{"type": "image_url", "image_url": {"url": "data:image/…;base64,…"}}'
INPUT_IMAGE = '{"type": "input_image", "image_url": "data:image/…;base64,…"}'
TEXT = '{"type": "text", "text": "…"}'
INPUT_TEXT = '{"type": "input_text", "text": "…"}'
CHAT = Dialect(
    texts={"text": "text", "refusal": "refusal"},
    image="image_url",
    instead={"input_image": IMAGE_URL, "image": IMAGE_URL, "input_text": TEXT, "output_text": TEXT},
)
RESPONSES = Dialect(
    texts={"input_text": "text", "output_text": "text", "refusal": "refusal"},
    image="input_image",
    instead={"image_url": INPUT_IMAGE, "image": INPUT_IMAGE, "text": INPUT_TEXT},
)


def read_messages(messages: Sequence[Any]) -> Conversation:
    """The conversation of a chat request's `messages`.

    Raises:
        ApiError: 400, naming the message and the part.
    """
    conversation = Conversation("messages")
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        if not isinstance(message, dict):
            raise bad(f'{place}: expected {{"role": …, "content": …}}, got {kind_of(message)}', place, "invalid_value")
        add_message(conversation, message, CHAT, place)
    return conversation


def add_message(conversation: Conversation, message: dict[str, Any], dialect: Dialect, place: str) -> None:
    """One message's text, images and tool calls."""
    name = message.get("role")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise bad(f"{place}.role: expected one of {', '.join(ROLES)}, got {repr(name)[:80]}", f"{place}.role")
    if message.get("audio"):
        raise bad(f"{place}.audio: expected text, got audio; send its transcript", f"{place}.audio")
    parts = read_content(message.get("content"), role, dialect, f"{place}.content")
    if isinstance(refusal := message.get("refusal"), str) and not parts:
        parts = [refusal]
    calls = [call_text(call, f"{place}.tool_calls.{n}") for n, call in enumerate(listed(message.get("tool_calls")))]
    if message.get("function_call"):
        calls.append(call_text({"function": message["function_call"]}, f"{place}.function_call"))
    parts += [f"\n{call}" if parts or n else call for n, call in enumerate(calls)]
    if name in ("tool", "function"):
        parts = tool_answer(parts)
    if not parts and message.get("content") is None and role != "assistant":
        raise bad(f"{place}.content: expected text or a list of parts, got none", f"{place}.content", "missing_field")
    conversation.add(role, parts, place)


def read_content(content: Any, role: Role, dialect: Dialect, place: str) -> list[str | ImageReference]:
    """A message's content as text and images."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise bad(f"{place}: expected text or a list of parts, got {kind_of(content)}", place, "invalid_value")
    parts = [read_part(part, dialect, f"{place}.{number}") for number, part in enumerate(content)]
    for part in parts:
        if isinstance(part, ImageReference) and role != "user":
            article = "an" if role == "assistant" else "a"
            raise bad(f"{part.place}: expected text in {article} {role} turn, got an image", part.place)
    return parts


def read_part(part: Any, dialect: Dialect, place: str) -> str | ImageReference:
    known = [*(kind for kind in dialect.texts if kind != "refusal"), dialect.image]
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        got = f"an object without type: {list(part)[:5]}" if isinstance(part, dict) else kind_of(part)
        raise bad(f"{place}: expected a part of type {' or '.join(known)}, got {got}", place, "invalid_value")
    kind = part["type"]
    if kind in dialect.texts:
        key = dialect.texts[kind]
        if not isinstance(part.get(key), str):
            raise bad(f"{place}.{key}: expected text, got {kind_of(part.get(key))}", f"{place}.{key}", "invalid_value")
        return part[key]
    if kind == dialect.image:
        return read_image(part, place)
    advice = f"write {dialect.instead[kind]}" if kind in dialect.instead else "leave it out"
    raise bad(f"{place}: expected a part of type {' or '.join(known)}, got {kind[:60]!r}; {advice}", place,
              "unsupported_part")  # fmt: skip


def read_image(part: dict[str, Any], place: str) -> ImageReference:
    address = part.get("image_url")
    inside = address if isinstance(address, dict) else {"url": address}
    url, detail = inside.get("url"), inside.get("detail") or part.get("detail") or "auto"
    if not isinstance(url, str):
        where = f"{place}.image_url" + (".url" if isinstance(address, dict) else "")
        got = "a file's id" if part.get("file_id") else kind_of(url)
        raise bad(f"{where}: expected data:image/…;base64,…, got {got}", where, "invalid_image_url")
    if detail not in DETAILS:
        raise bad(f"{place}: expected detail {', '.join(DETAILS)}, got {repr(detail)[:80]}", place, "invalid_value")
    return ImageReference(url, detail, place)


def call_text(call: Any, place: str) -> str:
    """A tool call of an earlier answer, as Qwen's template writes it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(f"{place}: expected a function with a name, got {repr(call)[:80]}", place, "invalid_value")
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function.get("arguments") or "{}"
    shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {shown}}}\n</tool_call>'


def tool_answer(parts: Sequence[str | ImageReference]) -> list[str | ImageReference]:
    """What a tool returned, as Qwen's template writes it: a turn of the user."""
    return ["<tool_response>\n", *parts, "\n</tool_response>"]


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "none" if value is None else names.get(type(value), type(value).__name__)
