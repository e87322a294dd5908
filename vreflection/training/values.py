"""Plain values into settings dataclasses, refusing unknown keys and wrong types."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from ..errors import ConfigError


def build(kind: type, values: dict[str, Any], where: str):
    """A settings dataclass from plain values, refusing unknown keys and wrong types."""
    known = typing.get_type_hints(kind)
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; known: {sorted(known)}")
    return kind(**{name: convert(known[name], value, f"{where}: {name}") for name, value in values.items()})


def convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a group of settings, got {value!r}")
        return build(kind, value, where)  # pyright: ignore[reportArgumentType]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is types.NoneType and value is None:
            return None
        if plain is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            # YAML 1.1 reads 1e-5 as a string.
            try:
                return float(value)
            except ValueError:
                continue
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{where}: expected {names}, got {value!r} ({type(value).__name__})")
