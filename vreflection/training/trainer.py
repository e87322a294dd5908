"""`transformers.Trainer` with latent stages: losses over the global batch, gauges, free running, guarded steps."""

from __future__ import annotations

import logging
import math
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import TrainingError
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration
from .arguments import parameter_groups
from .checkpoints import CheckpointingTrainer
from .free_running import choose_samples, free_running_inputs, rounds_needed
from .gauges import latent_gauges
from .guard import SkippableAdamW, StepGuard, StopSignal
from .loader import TrainData
from .parallel import agreed_maximum, bind_forward_method, shard_model
from .settings import TrainSettings
from .throughput import ThroughputMeter
from .zero import GradientOrder, check_deepspeed_config, poisoned
from .zero3 import ResidentParts

logger = logging.getLogger(__name__)

HOST_KEYS = ("boxes", "box_sample", "box_image")


class StopAfterStep(TrainerCallback):
    """Turns a received stop signal into a checkpoint and the end of training; lets the schedule count every step."""

    def __init__(self, trainer: LatentTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.schedule_behind:
            self.trainer.lr_scheduler.step()
        if self.trainer.stopping:
            control.should_save = control.should_training_stop = True


class LatentTrainer(CheckpointingTrainer, Trainer):
    """Trains one stage or control arm.

    Batches are checked on the host (`BatchLayout`) before anything moves to the device. A step's loss weighs every
    supervised token of all its micro-batches and processes alike, and every box alike in the latent losses, however the
    step is split. Loss parts and collapse gauges are logged as such means too.

    Args:
        model: of the stage to train, frozen as the stage asks.
        args: see `arguments.training_arguments`.
        settings: rates, curriculum, safety.
        data: plan of the batches; without it, the host trainer's own loader over `train_dataset`.
        parallel: see `TrainSettings.parallel`.
    """

    def __init__(
        self,
        model: VReflectionForConditionalGeneration,
        args: TrainingArguments,
        settings: TrainSettings,
        data: TrainData | None = None,
        parallel: str = "ddp",
        pad_token_id: int = 0,
        **kwargs,
    ):
        kwargs.setdefault("train_dataset", data.dataset if data is not None else None)
        super().__init__(model=model, args=args, **kwargs)
        self.latent_config, self.objective = model.config, model.objective
        self.settings, self.data, self.parallel, self.pad_token_id = settings, data, parallel, pad_token_id
        if self.is_deepspeed_enabled:
            check_deepspeed_config(self.accelerator.state.deepspeed_plugin.deepspeed_config, parallel)
        self.gradient_order: GradientOrder | None = None
        self.resident: ResidentParts | None = None
        self.schedule_behind = False
        uses_latents = model.config.traits.slot_input == "latents"
        self.free_share = settings.free_running.share if uses_latents else lambda progress: 0.0
        # The loss below is already that of the whole step.
        self.model_accepts_loss_kwargs = True
        self.of_step: dict[str, torch.Tensor] = {}  # notes of the coming optimizer step
        self.pending: dict[str, torch.Tensor] = {}  # of the steps taken since the last log row
        self.shift, self.epoch_length = 0, 0
        self.guard, self.stop, self.stopping = StepGuard(settings.safety.max_bad_steps), StopSignal(), False
        self.grad_norm: torch.Tensor | float | None = None
        self.meter = ThroughputMeter(model, args.device)
        self.run_free = MethodType(free_running_inputs, model)
        self.add_callback(StopAfterStep(self))

    def get_train_dataloader(self) -> DataLoader:
        if self.data is None:
            return super().get_train_dataloader()
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        return self.data.loader(
            count,
            self.shift,
            self.args.process_index,
            self.args.world_size,
            self.args.dataloader_num_workers,
            self.pad_token_id,
            pin=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings.optimizer)  # pyright: ignore[reportArgumentType]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            fused = self.args.device.type == "cuda" or None
            self.optimizer = SkippableAdamW(groups, betas=betas, eps=self.args.adam_epsilon, fused=fused)
        return self.optimizer

    def _prepare_for_training(self, *args, **kwargs):
        if self.parallel == "fsdp2":
            shard_model(self.model, self.args.device, self.args.bf16)  # pyright: ignore[reportArgumentType]
            # Sharded already; the default would replicate it on top.
            self.accelerator.prepare_model = lambda model, *_, **__: model
            self.run_free = bind_forward_method(self.model, "free_running_inputs", free_running_inputs)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled:
            self.gradient_order = GradientOrder(self.deepspeed.optimizer, self._core())  # pyright: ignore
            if self.parallel == "zero3":
                self.resident = ResidentParts(self.deepspeed, self._core())
        return prepared

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and its supervised positions and boxes on all processes together."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batch["layout"] = self.layout(batch, device)
            # Its place in the whole run, however steps are split over processes.
            place = self.state.global_step * num_batches + len(batches)
            batch["number"] = self.shift + place * self.args.world_size + self.args.process_index
            batches.append(batch)
        counts = torch.tensor([b["layout"].counts for b in batches], dtype=torch.float64).reshape(-1, 2).sum(0)
        counts = counts.to(device, torch.float32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        return batches, counts

    def layout(self, batch: dict[str, Any], device) -> BatchLayout:
        return BatchLayout.from_batch(
            self.latent_config,
            batch["input_ids"],
            batch.get("labels"),
            batch.get("image_grid_thw"),
            *(batch.get(key) for key in HOST_KEYS),
            cu_seqlens=batch.get("cu_seqlens"),
            device=device,
            ce_on_latent_slots=self.objective.ce_on_latent_slots,
        )

    def _prepare_inputs(self, inputs):
        layout = inputs.get("layout") or self.layout(inputs, self.args.device)
        kept = {key: value for key, value in inputs.items() if key not in (*HOST_KEYS, "sources", "layout")}
        return {**super()._prepare_inputs(kept), "layout": layout}  # pyright: ignore

    def training_step(self, model, inputs, num_items_in_batch=None):
        sources = inputs.get("sources", [])
        self.meter.note(inputs)
        if self.resident is not None:
            self.resident.gather()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradient_order is not None:
            self.gradient_order.check_empty()
        self.guard.note(loss, sources)
        loss = torch.nan_to_num(loss, 0.0, 0.0, 0.0)
        parts = self.args.world_size * self.current_gradient_accumulation_steps
        held = torch.stack([loss / self.args.world_size, torch.full_like(loss, 1 / parts)])
        self.of_step["loss"] = self.of_step.get("loss", 0.0) + held
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        layout: BatchLayout = inputs["layout"]
        shares = None
        if num_items_in_batch is not None:
            own = torch.tensor(layout.counts, dtype=torch.float32).to(layout.targets_S.device, non_blocking=True)
            # Gradients are averaged over processes.
            shares = own / num_items_in_batch.clamp(min=1) * self.args.world_size
        number = inputs.pop("number", self.state.global_step)
        inputs = {**inputs, **self.free_running_inputs(model, inputs, number)}
        output = model(**inputs, alignment_step=self.state.global_step, loss_shares=shares)
        if model.training:
            self.note(output, shares)
        loss = output.loss
        if self.is_deepspeed_enabled and model.training:
            loss = poisoned(loss)
        return (loss, output) if return_outputs else loss

    def free_running_inputs(self, model, inputs, number: int) -> dict[str, torch.Tensor | None]:
        """`slot_inputs` and `free_running` of this step, or nothing; the visual tokens go on to the training pass."""
        share = self.free_share(self.state.global_step / max(self.state.max_steps, 1))
        layout: BatchLayout = inputs["layout"]
        if not share:
            return {}
        samples = len(layout.sequence_lengths or inputs["input_ids"])
        chosen = choose_samples(samples, share, self.args.seed, number)
        # A sharded model is run by all processes or none.
        rounds = rounds_needed(layout, chosen)
        if self.parallel in ("fsdp2", "zero3"):
            rounds = agreed_maximum(rounds, self.args.device)
        if not rounds:
            return {}
        with self.accelerator.autocast():
            return self.run_free(inputs, chosen, rounds, self.settings.free_running.backpropagate)

    def _clip_grad_norm(self, model):
        return whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model, grad_norm=None):
        self.grad_norm = whole(super()._get_grad_norm(model, grad_norm))
        self.decide_step()
        return self.grad_norm

    def goes_on_from(self, step: int, used: int) -> None:
        """Continue the stream of micro-batches where it was left, even if a step now takes another number of them."""
        self.shift = used - step * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def micro_batches_used(self) -> int:
        per_step = self.args.gradient_accumulation_steps * self.args.world_size
        return self.shift + self.state.global_step * per_step

    def decide_step(self) -> None:
        """Take or skip the coming optimizer step, on all processes alike."""
        stop = self.stop.received is not None
        skip, self.stopping = self.guard.decide(self.grad_norm, stop, self.state.global_step + 1)
        optimizer = self._plain_optimizer()
        if isinstance(optimizer, SkippableAdamW):
            optimizer.skip_next = skip
        for name, held in ({} if skip else self.of_step).items():
            self.pending[name] = self.pending.get(name, 0.0) + held
        self.of_step = {}
        # DeepSpeed skips by itself, and then the host trainer leaves out the schedule's step too.
        self.schedule_behind = skip and self.is_deepspeed_enabled
        if self.schedule_behind and not self.deepspeed.optimizer.overflow:  # pyright: ignore
            raise TrainingError("DeepSpeed took a step whose loss or gradient is not finite; use parallel=fsdp2")

    def note(self, output, shares: torch.Tensor | None) -> None:
        """Remember loss parts and gauges as device tensors; they are read only when logged."""
        weights = torch.ones(2, device=output.loss.device) if shares is None else shares / self.args.world_size
        absent = torch.full((), math.nan, device=output.loss.device)
        values = {name: (value.detach(), name == "cross_entropy") for name, value in output.losses.items()}
        traits = self.latent_config.traits
        for part, latents in (("teacher", output.teacher_latents), ("student", output.student_latents)):
            if not getattr(traits, part):
                continue
            found = latent_gauges(latents) if latents is not None else {}
            for name in ("std_over_samples", "query_diversity"):
                values[f"{part}_{name}"] = (found.get(name, absent), False)
        for name, (value, per_token) in values.items():
            weight = weights[0 if per_token else 1] * torch.isfinite(value)
            held = torch.stack([torch.nan_to_num(value.float(), 0.0, 0.0, 0.0) * weight, weight])
            self.of_step[name] = self.of_step.get(name, 0.0) + held

    def means(self) -> dict[str, float]:
        """What was noted since the last time, on all processes together; left out where nothing had a value."""
        names = sorted(self.pending)
        held = torch.stack([self.pending[name] for name in names]) if names else torch.zeros(0, 2)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(held)
        self.pending = {}
        return {name: total / weight for name, (total, weight) in zip(names, held.tolist()) if weight}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            # The host's own sum counts skipped steps as zero.
            logs = {**{key: value for key, value in logs.items() if key != "loss"}, **self.means(), **self.meter.read()}
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped
        if self.data is not None:
            self.epoch_length = self.epoch_length or self.data.batches_per_epoch()
            self.state.epoch = self.micro_batches_used / self.epoch_length
        # Curves of steps that were skipped have no value; tools that read them need numbers.
        logs = {key: value for key, value in logs.items() if not (isinstance(value, float) and math.isnan(value))}
        return super().log(logs, *args, **kwargs)


def whole(norm):
    """A sharded norm as a plain number's tensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
