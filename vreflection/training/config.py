"""Settings files: YAML with known keys only, one file extending another, overridable by `--set key=value`."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .settings import TrainSettings
from .values import build


def load_settings(path: str | Path, overrides: list[str] | None = None) -> TrainSettings:
    """Settings from a YAML file and `key=value` overrides (dotted keys, YAML values).

    A bare name, such as `stage1_7b`, stands for the file of that name that ships with the package. A file with
    `extends: other.yaml` starts from that file (a path relative to its own, or else a shipped file's name) and changes
    what it names.

    Raises:
        ConfigError: unreadable file, unknown key (with the known ones), or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file() and path.name and path.parent == Path():
        path = config_file(path.with_suffix(".yaml").name)
    values = read_values(path)
    for override in overrides or []:
        apply_override(values, override)
    return build(TrainSettings, values, str(path))


def read_values(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A settings file's values on top of those of the file it extends."""
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"config: {path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold a mapping, got {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: expected a file name, got {base!r}")
    file = path.parent / base
    if not file.is_file() and Path(base).name == base:
        file = config_file(base)
    if file.resolve() in (path.resolve(), *seen):
        raise ConfigError(f"{path}: extends: {base} leads back to {file}")
    return merge(read_values(file, (*seen, path.resolve())), values)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, groups merged key by key; a new mapping."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        groups = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if groups else copy.deepcopy(value)
    return result


def config_file(name: str) -> Path:
    """A configuration that ships with the package, installed or in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"config: {name} does not exist, neither here nor among the files shipped with the package")


def apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set: expected key=value, got {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent!r} is a single value, not a group")
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def settings_dict(settings: TrainSettings) -> dict[str, Any]:
    """Plain values, as a settings file would hold them."""
    return dataclasses.asdict(settings)
