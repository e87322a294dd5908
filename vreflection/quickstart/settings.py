"""Quickstart settings from `configs/quickstart*.yaml`: the task, sizes, and one training run per arm."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..training.config import apply_override, config_file, merge, read_values
from ..training.settings import TrainSettings, check_choice
from ..training.values import build, convert
from .tasks import TASKS, Task, task_named

FILES = {"follow_the_notes": "quickstart.yaml", "one_hop": "quickstart_one_hop.yaml"}
REPORTED_ARM = "stage2"  # its checkpoint is decoded for the report's pictures
ROWS = ("latent", "chain")  # answers with latent spans, or spelled out in words
ARM_KEYS = ("start", "rows", "curriculum")
OWN_KEYS = ("model", "output", "seed")  # of an arm's training settings, decided by the run
LEAST = {
    "seed": 0,
    "layers": 1,
    "examples": 0,
    "interventions": 0,
    "decode_every": 0,
    "workers": 0,
    "data.train": 1,
    "data.validation": 0,
    "data.test": 1,
    "data.seed": 0,
    "data.questions_per_image": 1,
}


@dataclass(frozen=True)
class SplitSizes:
    """Images per split, the seed that draws them, and questions per training image.

    Held-out images are asked every number of hops.
    """

    train: int = 2048
    validation: int = 0
    test: int = 200
    seed: int = 0
    questions_per_image: int = 2


@dataclass(frozen=True)
class QuickstartSettings:
    """Parsed settings. `arms` holds raw values; `arm(name, …)` makes a run of one.

    Attributes:
        task: of `tasks.TASKS`. layers: of the language model; other than 4, its base is pre-trained first.
        examples: held-out questions shown in the report. interventions: test images asked again with latents swapped
            or removed. decode_every: steps between decodings of the validation questions during training, 0 for never.
        workers: arms trained side by side, a thread each; 0 for one per core, at most two.
        shared: merged under every arm.
    """

    task: str = "follow_the_notes"
    seed: int = 0
    layers: int = 4
    data: SplitSizes = field(default_factory=SplitSizes)
    examples: int = 6
    interventions: int = 64
    decode_every: int = 0
    workers: int = 0
    shared: dict = field(default_factory=dict)
    arms: dict = field(default_factory=dict)

    @property
    def the_task(self) -> Task:
        return task_named(self.task)

    @property
    def data_set(self) -> dict[str, Any]:
        """What decides the images and the questions."""
        return {"task": self.task, **asdict(self.data)}

    @property
    def worker_count(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, min(2, cores))

    def start_of(self, name: str) -> str:
        """`base`, or the arm whose checkpoint this one starts from."""
        return self.arms[name].get("start", "base")

    def rows_of(self, name: str) -> str:
        return self.arms[name].get("rows", "latent")

    def has_curriculum(self, name: str) -> bool:
        return self.arms[name].get("curriculum", False)

    def steps_of(self, name: str) -> int:
        return (merge(self.shared, self.arms[name]).get("trainer") or {}).get("max_steps", 0)

    def total_steps(self, name: str) -> int:
        """Steps from the base model on, earlier arms included."""
        start = self.start_of(name)
        return self.steps_of(name) + (0 if start == "base" else self.total_steps(start))

    def arm(self, name: str, model: Path, output: Path, bf16: bool) -> TrainSettings:
        """Training settings of one arm, on the CPU, in bf16 autocast where that is fast."""
        values = merge(self.shared, self.arms[name])
        for key in ARM_KEYS:
            values.pop(key, None)
        if self.has_curriculum(name):
            values["data"] = {**values.get("data", {}), "shuffle": False}
        values |= {"model": str(model), "output": str(output), "seed": self.seed}
        values["trainer"] = {**values.get("trainer", {}), "use_cpu": True, "bf16": bf16, "disable_tqdm": True}
        return build(TrainSettings, values, f"arms.{name}")

    def fingerprint(self, name: str, context: str) -> str:
        """Changes whenever anything that decides the arm's result changes; says whether a finished arm can be kept."""
        start = self.start_of(name)
        data = [getattr(self.data, key) for key in ("train", "validation", "test", "seed", "questions_per_image")]
        parts = [
            context if start == "base" else self.fingerprint(start, context),
            merge(self.shared, self.arms[name]),
            [self.task, self.seed, self.layers, data, self.interventions, self.decode_every],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_quickstart(
    path: Path | None = None, overrides: list[str] | None = None, task: str | None = None
) -> QuickstartSettings:
    """Settings from `path` (default: the file shipped for `task`) and `key=value` overrides.

    Raises:
        ConfigError: unknown keys, wrong types, or an arm that starts from an unknown or later one.
    """
    return quickstart_settings(*quickstart_values(path, overrides or [], task))


def quickstart_values(path: Path | None, overrides: list[str], task: str | None) -> tuple[dict[str, Any], str]:
    """Plain values of a settings file, and its name; see `load_quickstart`."""
    if task is not None:
        task_named(task)
    path = config_file(FILES[task or next(iter(FILES))]) if path is None else path
    values = read_values(path)
    for override in overrides:
        apply_override(values, override)
    named = values.get("task", next(iter(FILES)))
    if task is not None and named != task:
        raise ConfigError(f"task: {path} is for the task {named!r}, got --task {task}; leave one of them out")
    return values, str(path)


def quickstart_settings(values: dict[str, Any], where: str) -> QuickstartSettings:
    """Checked settings from plain values; see `load_quickstart`."""
    arms = check_groups(values.get("arms"), f"{where}: arms")
    values = {**values, "arms": {name: arm for name, arm in arms.items() if arm is not None}}
    settings: QuickstartSettings = convert(QuickstartSettings, values, where)
    check_choice("task", settings.task, tuple(TASKS))
    for name, least in LEAST.items():
        value = operator.attrgetter(name)(settings)
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    if settings.decode_every and not settings.data.validation:
        raise ConfigError("decode_every: needs validation questions; --set data.validation=64")
    earlier = {"base"}
    for name in settings.arms:
        if settings.start_of(name) not in earlier:
            raise ConfigError(f"arms.{name}: start must be 'base' or an earlier arm, got {settings.start_of(name)!r}")
        earlier.add(name)
        check_arm(settings, name)
    if not settings.arms:
        raise ConfigError(f"{where}: expected at least one arm, got none")
    return settings


def check_groups(values: Any, where: str) -> dict[str, Any]:
    """`values` if it is a mapping of groups of settings, some of them null; an empty one for null."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected groups of settings by name, got {values!r}")
    for name, group in values.items():
        if group is not None and not isinstance(group, dict):
            raise ConfigError(f"{where}.{name}: expected a group of settings, got {group!r}")
    return values


def check_arm(settings: QuickstartSettings, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", str(name)):
        raise ConfigError(f"arms: a name becomes a folder, expected letters, digits, '_', '-' and '.', got {name!r}")
    arm = settings.arms[name]
    decided = [key for key in OWN_KEYS if key in arm]
    if decided:
        raise ConfigError(f"arms.{name}: {', '.join(decided)} cannot be set per arm; leave out what the run decides")
    check_choice(f"arms.{name}: rows", settings.rows_of(name), ROWS)
    if not isinstance(settings.has_curriculum(name), bool):
        raise ConfigError(f"arms.{name}: curriculum: expected true or false, got {settings.has_curriculum(name)!r}")
    steps = settings.steps_of(name)
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"arms.{name}: trainer.max_steps: expected a whole number of at least 1, got {steps!r}")
    stage = settings.arm(name, Path("model"), Path("output"), bf16=False).stage
    if settings.rows_of(name) == "chain" and stage != "sft":
        raise ConfigError(f"arms.{name}: rows: chain is for stage sft, as it has no spans, got {stage}; use latent")
