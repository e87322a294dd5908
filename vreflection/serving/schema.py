"""Fields of a request that all interfaces share: what is read, what is ignored, what is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError, bad

# Fields that have no consequence for an answer.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "prompt_cache_retention", "verbosity", "chat_template_kwargs", "request_id", "priority", "cache_salt",
    "add_special_tokens", "spaces_between_special_tokens", "max_tool_calls",
    "reasoning", "reasoning_effort",
}  # fmt: skip
# Fields that are accepted with these values, which request nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "skip_special_tokens": (True,), "use_beam_search": (False,),
    "include_stop_str_in_output": (False,), "length_penalty": (0, 1), "early_stopping": (False,),
    "best_of": (1,), "add_generation_prompt": (True,), "documents": ([],), "mm_processor_kwargs": ({},),
    "return_tokens_as_token_ids": (False,), "return_token_ids": (False,), "echo": (False,), "typical_p": (1,),
    "no_repeat_ngram_size": (0,), "num_beams": (1,), "truncate_prompt_tokens": (-1,),
}  # fmt: skip
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
MAX_ENTRIES = 1024  # of a list; the limits that depend on the server are far below


def integral(value: Any) -> Any:
    """16.0 as 16: JSON writers of some languages know one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def in_list(value: Any) -> Any:
    """What may stand alone, in a list."""
    return value if value is None or isinstance(value, list) else [value]


def id_keys(value: Any) -> Any:
    """Keys of a JSON object as the integers that they spell."""
    if not isinstance(value, dict):
        return value
    wrong = next((key for key in value if not (key.isascii() and key.isdigit() and len(key) < 19)), None)
    if wrong is not None:
        raise PydanticCustomError("token_id", "expected token ids as keys, got {key}", {"key": repr(wrong[:40])})
    return {int(key): bias for key, bias in value.items()}


Integer = Annotated[int, BeforeValidator(integral)]
Four = Annotated[list[float], Field(min_length=4, max_length=4)]
Box = Annotated[Four, AfterValidator(tuple)]
Texts = Annotated[list[str], BeforeValidator(in_list)]
Biases = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(id_keys)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hidden(Strict):
    """Latents as bytes: float32, little-endian, base64, `(spans, steps, width)` row by row, or one span's alone."""

    data: str
    shape: list[Integer] = Field(min_length=2, max_length=3)


class LatentField(Strict):
    """What to do with the latent steps.

    `steps` per span, 0 for none (`off` is the same); `force` opens a span before the first token; `use` feeds these
    latents to the slots instead of the model's own, in a list span by span, with null for the model's own; `include`
    asks for `maps` of attention and `hidden` states; `box` belongs to every span, `boxes` one by one to the spans.
    """

    steps: Integer | None = Field(default=None, ge=0)
    off: bool = False
    force: bool = False
    use: Annotated[list[Hidden | None] | None, BeforeValidator(in_list)] = Field(default=None, max_length=MAX_ENTRIES)
    include: list[Literal["maps", "hidden"]] = Field(default=[], max_length=MAX_ENTRIES)
    box: Box | None = None
    boxes: list[Box] | None = Field(default=None, max_length=MAX_ENTRIES)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """Null is the same as absent, as in every other field."""
        return {name: v for name, v in value.items() if v is not None} if isinstance(value, dict) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationFields(BaseModel):
    """How to answer, the same in every interface. Fields without a place here stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: Integer | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Biases | None = Field(default=None, max_length=MAX_ENTRIES)
    seed: Integer | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Texts | None = Field(default=None, max_length=MAX_ENTRIES)
    stop_token_ids: list[Integer] | None = Field(default=None, max_length=MAX_ENTRIES)
    ignore_eos: bool | None = None
    min_tokens: Integer | None = Field(default=None, ge=0)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    latent: LatentField | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Fields = TypeVar("Fields", bound=GenerationFields)


def read_fields(
    kind: type[Fields],
    body: Any,
    *,
    ignored: Collection[str] = (),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
) -> Fields:
    """A checked request of one interface.

    Args:
        ignored, neutral: of this interface, beside `IGNORED` and `NEUTRAL`.

    Raises:
        ApiError: 400, naming the field, what was expected and what was got.
    """
    if not isinstance(body, dict):
        raise bad(f"expected a JSON object, got {type(body).__name__}", code="invalid_json")
    try:
        fields = kind.model_validate(body)
    except ValidationError as error:
        raise explained(error) from None
    for name, value in (fields.model_extra or {}).items():
        if value is None or name in IGNORED or name in ignored:
            continue
        values = (NEUTRAL | dict(neutral or {})).get(name)
        if values is None:
            raise bad(f"unknown field {name[:60]!r}; leave it out", name[:60], "unknown_field")
        if value not in values:
            raise bad(f"{name} is not supported here, got {str(value)[:80]!r}; leave it out", name, "unsupported_field")
    return fields


def explained(error: ValidationError) -> ApiError:
    """The first of pydantic's findings in our words."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:120]
    if first["type"] == "missing":
        return bad(f"{place}: expected a value, got none; add it", place, "missing_field")
    got = "" if first["type"] == "token_id" else f", got {repr(first.get('input'))[:80]}"
    return bad(f"{place}: {first['msg']}{got}", place, "invalid_value")


def check_values(body: Any) -> None:
    """Refuse what JSON's escapes can spell and nothing behind them can take: half characters, NaN, infinity.

    Raises:
        ApiError: 400, naming the place.
    """
    names: list[str | int] = []
    levels: list[Iterator[tuple[str | int, Any]]] = [iter([("body", body)])]
    while levels:
        for name, value in levels[-1]:
            if isinstance(value, dict | list):
                names.append(name)
                if isinstance(value, dict):
                    for key in value:
                        refuse_broken(key, names)
                levels.append(iter(value.items()) if isinstance(value, dict) else enumerate(value))
                break
            if isinstance(value, float | str):
                refuse_broken(value, names, name)
        else:
            levels.pop()
            if names:
                names.pop()


def refuse_broken(value: float | str, names: list[str | int], *name: str | int) -> None:
    if not isinstance(value, str):
        if not math.isfinite(value):
            place = place_of([*names, *name])
            raise bad(f"{place}: expected a finite number, got {value}", place, "invalid_value")
    elif not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = place_of([*names, *name])
            raise bad(
                f"{place}: expected whole characters, got half of a surrogate pair ({value[error.start]!r}) at "
                f"character {error.start}; was the text cut inside an emoji?",
                place, "invalid_text",
            ) from None  # fmt: skip


def place_of(names: list[str | int]) -> str:
    """A path into the body, printable whatever the names of its fields hold, and short."""
    shown = [str(name)[:60] for name in names]
    shown = [name if name.isprintable() else repr(name)[1:-1] for name in shown]
    return ".".join(shown[1:] or shown)[-120:]
