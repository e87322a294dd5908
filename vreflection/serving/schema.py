"""A chat request as OpenAI's clients send it: what is read, what is ignored, what is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError, bad

# Of no consequence for an answer.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "prompt_cache_retention", "verbosity",
}  # fmt: skip
# Accepted as long as they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "best_of": (1,), "min_p": (0,),
    "reasoning_effort": ("none",), "echo": (False,),
}  # fmt: skip


# A JSON list, although strict models take no list for a tuple.
Box = Annotated[tuple[float, float, float, float], Field(strict=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class Hidden(Strict):
    """Latents as bytes: float32, little-endian, base64, `(spans, steps, width)` row by row, or one span's alone."""

    data: str
    shape: list[int] = Field(min_length=2, max_length=3)


class LatentField(Strict):
    """What to do with the latent steps.

    `steps` per span, 0 for none (`off` is the same); `force` opens a span before the first token; `use` feeds these
    latents to the slots instead of the model's own, in a list span by span, with null for the model's own; `include`
    asks for `maps` of attention and `hidden` states; `box` belongs to every span, `boxes` one by one to the spans.
    """

    steps: int | None = Field(default=None, ge=0)
    off: bool = False
    force: bool = False
    use: Hidden | list[Hidden | None] | None = None
    include: list[Literal["maps", "hidden"]] = []
    box: Box | None = None
    boxes: list[Box] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    latent: LatentField | None = None


def read_request(body: Any) -> ChatRequest:
    """A checked request.

    Raises:
        ApiError: 400, naming the field, what was expected and what was got.
    """
    if not isinstance(body, dict):
        raise bad(f"expected a JSON object, got {type(body).__name__}", code="invalid_json")
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise explained(error) from None
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED or value is None:
            continue
        if name not in NEUTRAL:
            raise bad(f"unknown field {name[:60]!r}; leave it out", name[:60], "unknown_field")
        if value not in NEUTRAL[name]:
            raise bad(f"{name} is not supported here, got {str(value)[:80]!r}; leave it out", name, "unsupported_field")
    return request


def explained(error: ValidationError) -> ApiError:
    """The first of pydantic's findings in our words."""
    found = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in found["loc"])[:120]
    got = repr(found.get("input"))[:80]
    return bad(f"{place}: {found['msg']}, got {got}", place, "invalid_value")
