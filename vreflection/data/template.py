"""Training and prompt text: placeholder expansion, ChatML segments, and the ids of the special tokens.

Ids always arrive through `LatentTokenIds`; this file knows token strings only.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from vreflection.errors import DataError

SlotStyle = Literal["latent", "filler", "boundary", "none"]
Role = Literal["user", "assistant"]

IMAGE_PLACEHOLDER = "<image>"
LATENT_PLACEHOLDER = "<lvr>"
SYSTEM_PROMPT = "You are a helpful assistant."

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
LVR_START, LVR, LVR_LATENT_END, LVR_END = "<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# In the order in which they are added to the tokenizer.
LATENT_TOKENS = (LVR_START, LVR, LVR_LATENT_END, LVR_END)

_RESERVED = (TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, *LATENT_TOKENS)
_IMAGE_PATTERN = re.compile(rf"\n?{re.escape(IMAGE_PLACEHOLDER)}\n?")
_DROPPED_LATENT_PATTERN = re.compile(rf"{re.escape(LATENT_PLACEHOLDER)}\n?")


_OPEN, _CLOSE = (re.compile(tag, re.IGNORECASE | re.ASCII) for tag in ("<answer>", "</answer>"))


def answer_range(text: str) -> slice | None:
    """Where the text inside the last `<answer>` lies, closed or not, in any case; `None` when there is none."""
    start = None
    for opening in _OPEN.finditer(text):
        start = opening.end()
    if start is None:
        return None
    closing = _CLOSE.search(text, start)
    return slice(start, closing.start() if closing else len(text))


def extract_answer(text: str) -> str | None:
    """Text inside the last `<answer>` (closed or not), stripped; `None` when there is none."""
    inside = answer_range(text)
    return None if inside is None else text[inside].strip()


@dataclass(frozen=True, slots=True)
class LatentTokenIds:
    """Ids of every token the data and decoding code must recognise; read from a tokenizer or a model config."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    lvr_start: int
    lvr: int
    lvr_latent_end: int
    lvr_end: int
    pad: int
    eos: int


class Turn(NamedTuple):
    """One conversation turn, placeholders unexpanded."""

    role: Role
    text: str


class Segment(NamedTuple):
    """A stretch of template text that is tokenised on its own, and whether cross-entropy sees it."""

    text: str
    supervised: bool


def check_slot_style(slot_style: str) -> None:
    """Raise `ValueError` unless `slot_style` is one of latent, filler, boundary, none."""
    if slot_style not in get_args(SlotStyle):
        raise ValueError(f"expected slot_style to be one of {get_args(SlotStyle)}, got {slot_style!r}")


def expand_user_text(text: str) -> str:
    """Replace each `<image>` of a user turn by a vision block, eating one newline on either side.

    The block holds a single `<|image_pad|>`; the encoder repeats it once per visual token.
    """
    return _IMAGE_PATTERN.sub(VISION_START + IMAGE_PAD + VISION_END, text)


def expand_assistant_text(text: str, slot_style: SlotStyle, num_latents: int) -> str:
    """Replace each `<lvr>` of an assistant turn by what the slot style asks for; other text is kept as it is.

    Args:
        text: assistant text with placeholders.
        slot_style: "latent" and "filler" give start + `num_latents` slots + end, "boundary" start + end, and "none"
            drops the placeholder with one newline after it.
        num_latents: slots per placeholder (Q), positive for "latent" and "filler".
    """
    check_slot_style(slot_style)
    if slot_style == "none":
        return _DROPPED_LATENT_PATTERN.sub("", text)
    if slot_style == "boundary":
        return text.replace(LATENT_PLACEHOLDER, LVR_START + LVR_END)
    if num_latents < 1:
        raise ValueError(f"expected num_latents >= 1 for slot style {slot_style!r}, got {num_latents}; use 'boundary'")
    return text.replace(LATENT_PLACEHOLDER, LVR_START + LVR * num_latents + LVR_END)


def count_placeholders(turns: Iterable[Turn]) -> tuple[int, int]:
    """Number of `<image>` in user turns and of `<lvr>` in assistant turns."""
    images = latents = 0
    for turn in turns:
        if turn.role == "user":
            images += turn.text.count(IMAGE_PLACEHOLDER)
        else:
            latents += turn.text.count(LATENT_PLACEHOLDER)
    return images, latents


def check_turns(turns: Sequence[Turn], source: str | None = None) -> None:
    """Require user and assistant turns that alternate, start with the user and end with the assistant.

    Raises:
        DataError: `conversation-order`, or `reserved-token` where a text spells a special token of the template, which
            would shift images and slots.
    """
    roles = [turn.role for turn in turns]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            "conversation-order",
            f"expected alternating user and assistant turns ending with the assistant, got {roles}; "
            "reorder or split the row",
            source,
        )
    for turn in turns:
        check_reserved(turn.text, source)


def check_reserved(text: str, source: str | None = None, special_tokens: Collection[str] = ()) -> None:
    """Raise DataError `reserved-token` if plain text spells a special token of the template, `text-surrogate` if it has
    half characters, which JSON's escapes and broken command lines can spell and no tokenizer reads.

    Args:
        special_tokens: further ones, such as all of a tokenizer's.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "text-surrogate",
            f"expected whole characters, got {text[error.start]!r} at character {error.start}; was the text cut inside "
            "an emoji, or is it no UTF-8?",
            source,
        ) from None
    spelled = reserved_in(text, special_tokens)
    if spelled:
        raise DataError(
            "reserved-token",
            f"expected plain text with {IMAGE_PLACEHOLDER} and {LATENT_PLACEHOLDER} placeholders, got special tokens "
            f"{spelled}; replace them by placeholders or remove them",
            source,
        )


def reserved_in(text: str, special_tokens: Collection[str] = ()) -> list[str]:
    """The special tokens, of the template and those given, that plain text spells."""
    return [token for token in dict.fromkeys((*_RESERVED, *special_tokens)) if token in text]


def conversation_segments(turns: Sequence[Turn], slot_style: SlotStyle, num_latents: int) -> list[Segment]:
    """ChatML text of a whole training conversation, system turn first.

    Each assistant turn's answer is supervised up to and including the turn end and its newline; the header that
    announces the turn is not.

    Args:
        turns: alternating turns as accepted by `check_turns`.
        slot_style: see `expand_assistant_text`.
        num_latents: slots per `<lvr>`.
    """
    segments = [_system_segment()]
    for turn in turns:
        if turn.role == "user":
            segments.extend(_user_segments(turn.text))
        else:
            answer = expand_assistant_text(turn.text, slot_style, num_latents)
            segments.append(Segment(f"{answer}{TURN_END}\n", True))
    return segments


def prompt_segments(question: str) -> list[Segment]:
    """ChatML text of an inference prompt: system turn, user turn, and the header of the answer to come."""
    return [_system_segment(), *_user_segments(question)]


class ChatTurn(NamedTuple):
    """One turn of a conversation to go on with; a part is text as it stands, or `None` for an image."""

    role: Role | Literal["system"]
    parts: Sequence[str | None]


def chat_segments(
    turns: Sequence[ChatTurn], system: str = SYSTEM_PROMPT, special_tokens: Collection[str] = ()
) -> list[Segment]:
    """ChatML text of a conversation and the header of the answer to come.

    Args:
        turns: in any order; a last turn of the assistant is the beginning of the answer, which goes on behind it.
        special_tokens: of the tokenizer, refused in texts like the template's own.

    Raises:
        DataError: `reserved-token`.
    """
    check_reserved(system, special_tokens=special_tokens)
    segments, shown = [_system_segment(system)], ""
    for turn in turns:
        shown = "".join(VISION_START + IMAGE_PAD + VISION_END if part is None else part for part in turn.parts)
        check_reserved("".join(part for part in turn.parts if part is not None), special_tokens=special_tokens)
        segments.append(Segment(f"{TURN_START}{turn.role}\n{shown}{TURN_END}\n", False))
    header = Segment(f"{TURN_START}assistant\n", False)
    if turns and turns[-1].role == "assistant":
        return [*segments[:-1], header, Segment(shown, False)]
    return [*segments, header]


def _system_segment(text: str = SYSTEM_PROMPT) -> Segment:
    check_reserved(text)
    return Segment(f"{TURN_START}system\n{text}{TURN_END}\n", False)


def _user_segments(text: str) -> list[Segment]:
    return [
        Segment(f"{TURN_START}user\n{expand_user_text(text)}{TURN_END}\n", False),
        Segment(f"{TURN_START}assistant\n", False),
    ]
