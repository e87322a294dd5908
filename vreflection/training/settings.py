"""Training settings: YAML files with known keys only, overridable by `--set key=value`."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..losses import LatentObjective
from ..model.config import STAGES


@dataclass(frozen=True)
class DataSettings:
    """Training rows: `train` is a Visual-CoT JSON, JSONL or meta JSON, `image_folder` where its paths start."""

    train: str = ""
    image_folder: str | None = None
    max_length: int = 16384
    min_visual_tokens: int | None = None
    max_visual_tokens: int | None = None

    def __post_init__(self):
        if self.max_length < 1:
            raise ConfigError(f"data.max_length: expected at least 1, got {self.max_length}")


@dataclass(frozen=True)
class LatentSettings:
    """Latent settings of a new stage; `None` keeps the base model's or checkpoint's."""

    num_latent_tokens: int | None = None
    region: str | None = None
    roi_output_size: int | None = None
    roi_sampling_ratio: int | None = None
    resampler_num_heads: int | None = None
    query_init_std: float | None = None

    def given(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class FreeRunningSettings:
    """Share of samples whose slots hold the model's own states: 0 until `start`, rising linearly to `maximum` at `end`.

    `start` and `end` are fractions of all steps; `maximum` 0 turns the curriculum off.
    """

    maximum: float = 0.0
    start: float = 0.1
    end: float = 0.5

    def __post_init__(self):
        if not 0 <= self.maximum <= 1 or not 0 <= self.start <= self.end <= 1:
            raise ConfigError(f"free_running: expected 0 <= maximum <= 1 and 0 <= start <= end <= 1, got {self}")

    def share(self, progress: float) -> float:
        """Share at `progress` in [0, 1]."""
        if progress <= self.start:
            return 0.0
        return self.maximum * min(1.0, (progress - self.start) / max(self.end - self.start, 1e-9))


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates per part; `None` = `learning_rate`. No weight decay on norms, biases and queries."""

    learning_rate: float = 1e-5
    teacher_learning_rate: float | None = None
    student_learning_rate: float | None = None
    weight_decay: float = 0.1

    def __post_init__(self):
        for name in ("learning_rate", "teacher_learning_rate", "student_learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"optimizer.{name}: expected a finite number of at least 0, got {value}")


@dataclass(frozen=True)
class TrainSettings:
    """Everything one training run needs.

    Attributes:
        stage: what to train (`stage1`, `stage2`, `sft`, `boundary`, `filler`).
        model: folder or hub id of the base model; for stage 2 the stage-1 checkpoint.
        output: folder of the resulting checkpoint.
        objective: overrides of the stage's `LatentObjective`.
        trainer: arguments of `transformers.TrainingArguments`.
        attn_implementation: the host library's attention (`sdpa`, `flash_attention_2`, `eager`); `None` = its default.
        resume: continue from the last trainer checkpoint in `output`.
    """

    stage: str = "stage1"
    model: str = ""
    output: str = ""
    seed: int = 0
    resume: bool = False
    attn_implementation: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    latent: LatentSettings = field(default_factory=LatentSettings)
    objective: dict[str, Any] = field(default_factory=dict)
    free_running: FreeRunningSettings = field(default_factory=FreeRunningSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.stage not in STAGES or self.stage == "base":
            raise ConfigError(f"stage: expected one of {sorted(set(STAGES) - {'base'})}, got {self.stage!r}")
        try:
            self.latent_objective()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error

    def latent_objective(self) -> LatentObjective:
        kinds = typing.get_type_hints(LatentObjective)
        given = {
            name: convert(kinds[name], value, f"objective.{name}") if name in kinds else value
            for name, value in self.objective.items()
        }
        return LatentObjective.for_stage(self.stage, **{"alignment_seed": self.seed, **given})


def load_settings(path: str | Path, overrides: list[str] | None = None) -> TrainSettings:
    """Settings from a YAML file and `key=value` overrides (dotted keys, YAML values).

    Raises:
        ConfigError: unreadable file, unknown key (with the known ones), or a value of the wrong type.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"config: {path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} must hold a mapping, got {type(values).__name__}")
    for override in overrides or []:
        apply_override(values, override)
    return build(TrainSettings, values, str(path))


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


def settings_dict(settings: TrainSettings) -> dict[str, Any]:
    """Plain values, as a settings file would hold them."""
    return dataclasses.asdict(settings)
