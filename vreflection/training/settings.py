"""Training settings, as dataclasses: every key of a settings file, its default and what it may be."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.pixels import checked_view
from ..errors import ConfigError
from ..losses import LatentObjective
from ..model.config import TRAINED_STAGES
from .values import convert

PARALLEL = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
DTYPES = ("float32", "bfloat16")
FUSED_CROSS_ENTROPY = ("auto", "liger", "off")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {list(choices)}, got {value!r}")


@dataclass(frozen=True)
class DataSettings:
    """Training rows.

    Attributes:
        train: Visual-CoT JSON, JSONL, Parquet, meta JSON, or a clean index of `vreflection data check`.
        image_folder: where the rows' image paths start.
        image_view: `stored` reads images without EXIF orientation and colour profile, as the boxes of the public data
            are meant; `shown` as a viewer shows them, for boxes that were drawn on what one shows.
        max_length: longest sample in tokens; longer ones are left out whole, and counted.
        pack_tokens: token budget of a micro-batch: samples are packed end to end, without padding. `None` pads
            `trainer.per_device_train_batch_size` samples instead.
        shuffle: a new order every epoch; otherwise that of the file, so that a curriculum is a file in the right order.
        min_visual_tokens, max_visual_tokens: limits per image; `None` keeps the model's own.
        workers: loader processes.
        feature_store: folder of the frozen vision tower's output; what is missing there is computed before training.
        held_out: rows kept out of training for the gauges (see `GaugeSettings`), or a file of such rows.
    """

    train: str = ""
    image_folder: str | None = None
    image_view: str = "stored"
    max_length: int = 16384
    pack_tokens: int | None = None
    shuffle: bool = True
    min_visual_tokens: int | None = None
    max_visual_tokens: int | None = None
    workers: int = 0
    feature_store: str | None = None
    held_out: int | str = 0

    def __post_init__(self):
        checked_view(self.image_view, "data.image_view")
        if self.max_length < 1:
            raise ConfigError(f"data.max_length: expected at least 1, got {self.max_length}")
        if self.pack_tokens is not None and self.pack_tokens < 1:
            raise ConfigError(f"data.pack_tokens: expected at least 1 or null, got {self.pack_tokens}")
        if self.workers < 0:
            raise ConfigError(f"data.workers: expected at least 0, got {self.workers}")
        if isinstance(self.held_out, int) and self.held_out < 0:
            raise ConfigError(f"data.held_out: expected at least 0 rows or a file, got {self.held_out}")


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

    `start` and `end` are fractions of all steps; `maximum` 0 turns the curriculum off. Both 0: from the first step on.

    Attributes:
        backpropagate: the gradient flows through the fed-back states to what made them. On one process, or under `ddp`,
            without gradient checkpointing. With `objective.alignment_weight: 0` it is all that trains the latents.
    """

    maximum: float = 0.0
    start: float = 0.1
    end: float = 0.5
    backpropagate: bool = False

    def __post_init__(self):
        if not 0 <= self.maximum <= 1 or not 0 <= self.start <= self.end <= 1:
            raise ConfigError(f"free_running: expected 0 <= maximum <= 1 and 0 <= start <= end <= 1, got {self}")

    def share(self, progress: float) -> float:
        """Share at `progress` in [0, 1]."""
        if progress >= self.end:
            return self.maximum
        if progress <= self.start:
            return 0.0
        return self.maximum * (progress - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. Learning rates per part; `None` = `learning_rate`. No weight decay on norms, biases and queries."""

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
class LoraSettings:
    """Low-rank adapters (PEFT) on the language model's linear layers; the two compression modules train in full.

    Attributes:
        rank: 0 trains all weights of the language model instead.
        alpha: adapters are scaled by alpha / rank.
        token_rows: also train the embedding and output rows of the four latent tokens, which no base model has learnt.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    token_rows: bool = True

    def __post_init__(self):
        if self.rank < 0 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise ConfigError(f"lora: expected rank >= 0, alpha > 0 and 0 <= dropout < 1, got {self}")


@dataclass(frozen=True)
class GaugeSettings:
    """Held-out check of what the latents do, every `every` steps and at the end; 0 turns it off.

    Needs `data.held_out` rows. What it measures: `vreflection.training.probe`.

    Attributes:
        maps_every: draw where `maps_samples` of those rows are looked at, every so many steps and at the end; 0 turns
            it off (see `vreflection.training.map_logging`).
    """

    every: int = 0
    maps_every: int = 0
    maps_samples: int = 4

    def __post_init__(self):
        if self.every < 0:
            raise ConfigError(f"gauges.every: expected at least 0, got {self.every}")
        if self.maps_every < 0 or self.maps_samples < 1:
            raise ConfigError(
                f"gauges: expected maps_every of at least 0 and maps_samples of at least 1, got {self.maps_every} and "
                f"{self.maps_samples}"
            )


@dataclass(frozen=True)
class SafetySettings:
    """`max_bad_steps` skipped steps in a row (a loss or gradient that is not finite, on any rank) end the run."""

    max_bad_steps: int = 5

    def __post_init__(self):
        if self.max_bad_steps < 1:
            raise ConfigError(f"safety.max_bad_steps: expected at least 1, got {self.max_bad_steps}")


@dataclass(frozen=True)
class TrainSettings:
    """Everything one training run needs.

    Attributes:
        stage: what to train (`stage1`, `stage2`, `sft`, `boundary`, `filler`, `filler_aligned`).
        model: folder or hub id of the base model; for stage 2 the stage-1 checkpoint.
        output: folder of the resulting checkpoint.
        objective: overrides of the stage's `LatentObjective`.
        trainer: arguments of `transformers.TrainingArguments`.
        dtype: of the frozen and trained weights; `float32` with `trainer.bf16` is mixed precision.
        attn_implementation: the host library's attention (`sdpa`, `flash_attention_2`, `eager`); `None` = its default.
        parallel: how several processes share the work: `ddp`, `fsdp2`, or DeepSpeed's `zero1`, `zero2`, `zero3`.
        compile: backend that `torch.compile` builds every decoder layer with, such as `inductor`; `None` = none.
        fused_cross_entropy: Liger's fused linear cross-entropy: `auto` (on a GPU, where installed), `liger`, `off`.
        resume: continue from the last trainer checkpoint in `output`.
    """

    stage: str = "stage1"
    model: str = ""
    output: str = ""
    seed: int = 0
    resume: bool = False
    dtype: str = "float32"
    attn_implementation: str | None = None
    parallel: str = "ddp"
    compile: str | None = None
    fused_cross_entropy: str = "auto"
    data: DataSettings = field(default_factory=DataSettings)
    latent: LatentSettings = field(default_factory=LatentSettings)
    objective: dict[str, Any] = field(default_factory=dict)
    free_running: FreeRunningSettings = field(default_factory=FreeRunningSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    gauges: GaugeSettings = field(default_factory=GaugeSettings)
    safety: SafetySettings = field(default_factory=SafetySettings)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_choice("stage", self.stage, TRAINED_STAGES)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("fused_cross_entropy", self.fused_cross_entropy, FUSED_CROSS_ENTROPY)
        try:
            self.latent_objective()
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error

    def latent_objective(self) -> LatentObjective:
        kinds = typing.get_type_hints(LatentObjective) | {"keep_alignment": bool}
        given = {
            name: convert(kinds[name], value, f"objective.{name}") if name in kinds else value
            for name, value in self.objective.items()
        }
        return LatentObjective.for_stage(self.stage, **{"alignment_seed": self.seed, **given})
