"""`transformers.Trainer` with latent stages: parameter groups, loss parts, gauges and the free-running curriculum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import ConfigError
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration
from .config import FreeRunningSettings, OptimizerSettings, TrainSettings
from .free_running import choose_samples, roll_out
from .gauges import latent_gauges

HOST_KEYS = ("boxes", "box_sample", "box_image")


def training_arguments(settings: TrainSettings) -> TrainingArguments:
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
    }
    clash = sorted(set(fixed) & set(settings.trainer))
    if clash:
        raise ConfigError(
            f"trainer: {clash} have another home: `seed` and `output` at the top level, rates and decay under "
            "`optimizer`"
        )
    defaults = {"report_to": "none", "logging_steps": 10, "save_strategy": "no", "adam_beta2": 0.999}
    given = {name: as_number(value) for name, value in settings.trainer.items()}
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int)):
            raise ConfigError(f"trainer: {name}: expected an integer, got {given[name]!r}")
    try:
        return TrainingArguments(**{**defaults, **fixed, **given})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error


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


class LatentTrainer(Trainer):
    """Trains one stage or control arm.

    Batches are checked on the host (`BatchLayout`) before anything moves to the device. Each loss part and the collapse
    gauges are logged as means over the logging interval.
    """

    def __init__(
        self,
        model: VReflectionForConditionalGeneration,
        args: TrainingArguments,
        optimizer_settings: OptimizerSettings,
        free_running: FreeRunningSettings | None = None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, **kwargs)
        self.latent_config, self.objective = model.config, model.objective
        self.optimizer_settings = optimizer_settings
        uses_latents = model.config.traits.slot_input == "latents"
        self.free_running = (free_running if uses_latents else None) or FreeRunningSettings()
        self.model_accepts_loss_kwargs = False
        self.pending: dict[str, tuple[torch.Tensor, int]] = {}

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.optimizer_settings)  # pyright: ignore[reportArgumentType]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def _prepare_inputs(self, inputs):
        layout = BatchLayout.from_batch(
            self.latent_config,
            inputs["input_ids"],
            inputs.get("labels"),
            inputs.get("image_grid_thw"),
            *(inputs.get(key) for key in HOST_KEYS),
            device=self.args.device,
            ce_on_latent_slots=self.objective.ce_on_latent_slots,
        )
        prepared = super()._prepare_inputs({k: v for k, v in inputs.items() if k not in HOST_KEYS})
        return {**prepared, "layout": layout}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, **self.free_running_inputs(model, inputs), "alignment_step": self.state.global_step}
        output = model(**inputs)
        if model.training:
            self.note(output)
        return (output.loss, output) if return_outputs else output.loss

    def free_running_inputs(self, model, inputs) -> dict[str, torch.Tensor | None]:
        """`slot_inputs` and `free_running` of this step, or nothing; the visual tokens go on to the training pass."""
        share = self.free_running.share(self.state.global_step / max(self.state.max_steps, 1))
        layout: BatchLayout = inputs["layout"]
        if not share or not len(layout.boxes):
            return {}
        chosen = choose_samples(
            inputs["input_ids"].shape[0], share, self.args.seed, self.state.global_step, self.args.process_index
        )
        if not chosen.any():
            return {}
        core = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            tokens = core.batch_tokens(
                inputs.get("pixel_values"), inputs.get("image_features"), inputs.get("image_grid_thw")
            )
            slot_inputs, free = roll_out(
                core, inputs["input_ids"], inputs["position_ids"], tokens, layout, chosen
            )  # fmt: skip
        return {"slot_inputs": slot_inputs, "free_running": free, "image_features": tokens, "pixel_values": None}

    def note(self, output) -> None:
        """Remember loss parts and gauges as device tensors; they are read only when logged."""
        values = {name: value.detach() for name, value in output.losses.items()}
        if output.teacher_latents is not None:
            values |= {f"teacher_{k}": v for k, v in latent_gauges(output.teacher_latents).items()}
        if output.student_latents is not None:
            values |= {f"student_{k}": v for k, v in latent_gauges(output.student_latents).items()}
        for name, value in values.items():
            total, count = self.pending.get(name, (0.0, 0))
            self.pending[name] = (total + value, count + 1)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{name: float(total) / count for name, (total, count) in self.pending.items()}}
            self.pending = {}
        return super().log(logs, *args, **kwargs)
