"""What every interface asks of the service, whatever its clients call it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .conversation import Conversation, kind_of
from .errors import bad
from .prompts import PromptSource
from .schema import GenerationFields

MAX_SCHEMA = 2**16  # characters of a JSON schema


@dataclass(frozen=True)
class ResponseFormat:
    """JSON that an answer must be: of a `schema`, or any object where that is None. `param`: the request's field."""

    schema: dict[str, Any] | bool | None
    param: str


@dataclass(frozen=True)
class AnswerRequest:
    """A checked request.

    Attributes:
        fields: how to answer. prompts: each is answered `choices` times.
        max_tokens: of an answer; None leaves it to the server. tokens_name: what the interface calls it.
        logprobs: log probabilities of the tokens, and of this many likeliest ones; None for none.
        response_format: None for free text.
    """

    fields: GenerationFields
    prompts: Sequence[PromptSource]
    max_tokens: int | None = None
    tokens_name: str = "max_tokens"
    choices: int = 1
    logprobs: int | None = None
    response_format: ResponseFormat | None = None

    @property
    def answers(self) -> int:
        return self.choices * len(self.prompts)

    def summary(self) -> list[Any]:
        """For the log: texts, and images by kind and size."""
        return [prompt.summary() if isinstance(prompt, Conversation) else prompt for prompt in self.prompts]


def read_format(value: Any, param: str, schema_key: str | None) -> ResponseFormat | None:
    """OpenAI's description of an answer's format.

    Args:
        param: the request's field. schema_key: where the schema's own description stands; None for beside `type`.

    Raises:
        ApiError: 400, naming the field.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat(None, param)
    if kind != "json_schema":
        got = kind_of(value) if kind is None else repr(kind)[:80]
        raise bad(
            f"{param}: expected an object of type text, json_object or json_schema, got {got}", param, "invalid_value"
        )
    place = param if schema_key is None else f"{param}.{schema_key}"
    described = value if schema_key is None else value.get(schema_key)
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict | bool):
        raise bad(f"{place}.schema: expected a JSON schema, got {kind_of(schema)}", place, "invalid_value")
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA:
        raise bad(f"{place}.schema: expected at most {MAX_SCHEMA} characters, got {size}", place, "invalid_value")
    return ResponseFormat(schema, param)
