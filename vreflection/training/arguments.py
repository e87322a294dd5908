"""From settings to the host trainer's arguments and parameter groups."""

from __future__ import annotations

import importlib.util
import logging
from fnmatch import fnmatchcase
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
    # The command draws its own bar.
    "disable_tqdm": True,
    "adam_beta2": 0.999,
    # Would wait for the device at every micro-batch; the step guard looks once per step.
    "logging_nan_inf_filter": False,
    # Every loss is connected to every trainable parameter.
    "ddp_find_unused_parameters": False,
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
SAVE_STRATEGIES = ("no", "steps")
_GAUGES = "set `gauges.every` and `data.held_out` to watch held-out rows"
_PARALLEL = "set `parallel` at the top level, e.g. parallel=fsdp2"
_COMPILE = "set `compile` at the top level, e.g. compile=inductor"
# The host trainer's arguments that nothing here looks at, and what to do instead; a `*` stands for any ending.
WITHOUT_EFFECT = {
    "label_smoothing_factor": "leave it out; the loss has no smoothing",
    "resume_from_checkpoint": "set `resume: true` at the top level",
    "data_seed": "set `seed` at the top level; it also orders the rows",
    "dataloader_drop_last": "leave it out; every batch is planned",
    "neftune_noise_alpha": "leave it out; embeddings get no noise",
    "group_by_length": "set `data.pack_tokens`; packing leaves no padding",
    "train_sampling_strategy": "set `data.pack_tokens`; rows are drawn at random, and packing leaves no padding",
    "do_eval": _GAUGES,
    "eval_strategy": _GAUGES,
    "eval_steps": _GAUGES,
    "eval_on_start": _GAUGES,
    "load_best_model_at_end": f"{_GAUGES}, and choose a checkpoint by them",
    "auto_find_batch_size": "set `data.pack_tokens`; `vreflection train --plan` says what fits",
    "torch_compile*": _COMPILE,
    "use_liger_kernel": "set `fused_cross_entropy` at the top level",
    "liger_kernel_config": "set `fused_cross_entropy` at the top level",
    "fp16": "set `bf16: true` instead",
    "fsdp*": _PARALLEL,
    "push_to_hub": "leave it out and upload the output folder",
}
INTEGERS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")


def training_arguments(settings: TrainSettings, parallel: str = "ddp") -> TrainingArguments:
    """The host trainer's arguments, with this package's needs filled in."""
    given = {name: as_number(value) for name, value in settings.trainer.items()}
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if given.get(name) is False:  # how YAML 1.1 reads `no`
            given[name] = "no"
    check_effect(given)
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
    for name in INTEGERS:
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int)):
            raise ConfigError(f"trainer: {name}: expected an integer, got {given[name]!r}")
    if parallel.startswith("zero") and launched_config() is None:
        given.setdefault("deepspeed", deepspeed_file(parallel))
    if given.get("deepspeed") is not None:
        check_deepspeed_config(read_deepspeed_config(given["deepspeed"]), parallel)
    given.setdefault("report_to", default_report())
    if settings.data.feature_store is not None:
        # The others wait for the process that computes longest.
        given.setdefault("ddp_timeout", 7 * 24 * 3600)
    given["report_to"] = "none" if given["report_to"] is None else given["report_to"]
    check_reports(given["report_to"])
    try:
        return TrainingArguments(**{**DEFAULTS, **fixed, **given})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"trainer: {error}") from error


def check_effect(given: dict[str, Any]) -> None:
    """Refuse arguments of the host trainer that would change nothing."""
    if str(given.get("optim", OPTIMIZERS[0])) not in OPTIMIZERS:
        raise ConfigError(f"trainer: optim: expected AdamW ({', '.join(OPTIMIZERS)}), got {given['optim']!r}")
    if given.get("save_strategy", "no") not in SAVE_STRATEGIES:
        got = given["save_strategy"]
        raise ConfigError(f"trainer: save_strategy: expected steps or no, got {got!r}; use steps with save_steps")
    for name, value in given.items():
        default = getattr(TrainingArguments.__dataclass_fields__.get(name), "default", None)
        if value is None or value is False or value == default:
            continue
        for pattern, instead in WITHOUT_EFFECT.items():
            if fnmatchcase(name, pattern):
                raise ConfigError(f"trainer: {name} would have no effect; {instead}")


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
    """Trainable parameters by part (language model, teacher, student) and by weight decay.

    A teacher that no loss reaches (`alignment: llm_only`) does not decay either: it stays as it is.
    """
    objective = getattr(model, "objective", None)
    frozen_teacher = objective is not None and objective.alignment == "llm_only"
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
        part = name.split(".")[0]
        rate = rates.get(part)
        rate = settings.learning_rate if rate is None else rate
        still = frozen_teacher and part == "box_feature_resampler"
        decay = 0.0 if still or name in no_decay else settings.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
