"""Quickstart settings from `configs/quickstart.yaml`: sizes, and one training run per arm."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import ConfigError
from ..training.config import apply_override, config_file, merge
from ..training.settings import TrainSettings
from ..training.values import build, convert

MAIN_ARMS = ("stage1", "stage2")


@dataclass(frozen=True)
class SplitSizes:
    """Questions (one image each) per split, and the seed that draws them."""

    train: int = 1024
    validation: int = 0
    test: int = 512
    seed: int = 0


@dataclass(frozen=True)
class QuickstartSettings:
    """Parsed settings. `arms` holds raw values; `arm(name, …)` makes a run of one."""

    seed: int = 0
    data: SplitSizes = field(default_factory=SplitSizes)
    examples: int = 12
    shared: dict = field(default_factory=dict)
    arms: dict = field(default_factory=dict)

    def start_of(self, name: str) -> str:
        return self.arms[name].get("start", "base")

    def steps_of(self, name: str) -> int:
        return int(merge(self.shared, self.arms[name]).get("trainer", {}).get("max_steps", 0))

    def total_steps(self, name: str) -> int:
        """Steps from the base model on, earlier arms included."""
        start = self.start_of(name)
        return self.steps_of(name) + (0 if start == "base" else self.total_steps(start))

    def arm(self, name: str, model: Path, output: Path, bf16: bool) -> TrainSettings:
        """Training settings of one arm, on the CPU, in bf16 autocast where that is fast."""
        values = merge(self.shared, self.arms[name])
        values.pop("start", None)
        values |= {"model": str(model), "output": str(output), "seed": self.seed}
        values["trainer"] = {**values.get("trainer", {}), "use_cpu": True, "bf16": bf16, "disable_tqdm": True}
        return build(TrainSettings, values, f"arms.{name}")

    def fingerprint(self, name: str, context: str) -> str:
        """Changes whenever anything that decides the arm's result changes; says whether a finished arm can be kept."""
        start = self.start_of(name)
        parts = [
            context if start == "base" else self.fingerprint(start, context),
            merge(self.shared, self.arms[name]),
            [self.seed, self.data.train, self.data.validation, self.data.test, self.data.seed],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_quickstart(path: Path | None = None, overrides: list[str] | None = None) -> QuickstartSettings:
    """Settings from `path` (default: the shipped file) and `key=value` overrides.

    Raises:
        ConfigError: unknown keys, wrong types, or an arm that starts from an unknown or later one.
    """
    path = config_file("quickstart.yaml") if path is None else path
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config: cannot read {path}: {error}") from error
    for override in overrides or []:
        apply_override(values, override)
    settings = convert(QuickstartSettings, values, str(path))
    seen = {"base"}
    for name in settings.arms:
        if settings.start_of(name) not in seen:
            raise ConfigError(f"arms.{name}: start must be 'base' or an earlier arm, got {settings.start_of(name)!r}")
        seen.add(name)
        settings.arm(name, Path("model"), Path("output"), bf16=False)
    missing = [name for name in MAIN_ARMS if name not in settings.arms]
    if missing:
        raise ConfigError(f"{path}: the quickstart needs the arms {list(MAIN_ARMS)}, missing {missing}")
    return settings
