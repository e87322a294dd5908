"""From settings to the host trainer's arguments and parameter groups."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..errors import ConfigError
from .config import config_file
from .settings import OptimizerSettings, TrainSettings
from .zero import check_deepspeed_config, launched_config, read_deepspeed_config

logger = logging.getLogger(__name__)

DEFAULTS = {
    "logging_steps": 10,
    "save_strategy": "no",
    "save_total_limit": 2,
    "adam_beta2": 0.999,
    # Would wait for the device at every micro-batch; the step guard looks once per step.
    "logging_nan_inf_filter": False,
    # Every loss is connected to every trainable parameter.
    "ddp_find_unused_parameters": False,
}
INTEGERS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")


def training_arguments(settings: TrainSettings, parallel: str = "ddp") -> TrainingArguments:
    """The host trainer's arguments, with this package's needs filled in."""
    known = set(TrainingArguments.__dataclass_fields__)
    unknown = sorted(set(settings.trainer) - known)
    if unknown:
        raise ConfigError(f"trainer: unknown keys {unknown}; see transformers.TrainingArguments")
    fixed = {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "seed": settings.seed,
        "output_dir": settings.output,
        "learning_rate": settings.optimizer.learning_rate,
        "weight_decay": settings.optimizer.weight_decay,
        "dataloader_num_workers": settings.data.workers,
    }
    clash = sorted(set(fixed) & set(settings.trainer))
    if clash:
        raise ConfigError(
            f"trainer: {clash} have another home: `seed` and `output` at the top level, rates and decay under "
            "`optimizer`, loader processes under `data.workers`"
        )
    given = {name: as_number(value) for name, value in settings.trainer.items()}
    for name in INTEGERS:
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int)):
            raise ConfigError(f"trainer: {name}: expected an integer, got {given[name]!r}")
    if parallel.startswith("zero") and launched_config() is None:
        given.setdefault("deepspeed", deepspeed_file(parallel))
    if given.get("deepspeed") is not None:
        check_deepspeed_config(read_deepspeed_config(given["deepspeed"]), parallel)
    given.setdefault("report_to", default_report())
    check_reports(given["report_to"])
    try:
        return TrainingArguments(**{**DEFAULTS, **fixed, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"trainer: {error}") from error


def check_reports(report_to: str | list[str]) -> None:
    """Loggers that are asked for must be there."""
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("wandb", "trackio", "tensorboard") and importlib.util.find_spec(name) is None:
            raise ConfigError(f"trainer: report_to: {name} is not installed; pip install {name}, or report_to=none")


def default_report() -> str:
    """Tensorboard where it is installed."""
    if importlib.util.find_spec("tensorboard") is not None:
        return "tensorboard"
    logger.info("tensorboard is not installed: curves go to trainer_state.json only; pip install 'vreflection[train]'")
    return "none"


def deepspeed_file(parallel: str) -> str:
    """The shipped DeepSpeed configuration of a ZeRO stage.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"parallel: {parallel} needs DeepSpeed; pip install deepspeed, or use fsdp2")
    return str(config_file(f"deepspeed/{parallel}.json"))


def as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a string; the host library does not convert."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Trainable parameters by part (language model, teacher, student) and by weight decay."""
    rates = {
        "box_feature_resampler": settings.teacher_learning_rate,
        "student_resampler": settings.student_learning_rate,
    }
    no_decay = {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if leaf.endswith("bias") or leaf == "queries" or "norm" in type(module).__name__.lower()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = rates.get(name.split(".")[0])
        rate = settings.learning_rate if rate is None else rate
        decay = 0.0 if name in no_decay else settings.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
