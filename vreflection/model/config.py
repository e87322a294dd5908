"""Configuration of a Qwen2.5-VL with latent steps."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

from transformers import AutoConfig, Qwen2_5_VLConfig

from ..auto_classes import MODEL_TYPE
from ..errors import ConfigError


@dataclass(frozen=True)
class StageTraits:
    """What a training stage or control arm consists of.

    Attributes:
        teacher, student: whether the checkpoint carries Box-Guided / Dynamic Autoregressive Compression.
        slot_style: what an `<lvr>` placeholder becomes (see `vreflection.data.template`).
        slot_input: what the slots are fed: `latents` (teacher latents in training, own states in decoding),
            `embedding` (the `<|lvr|>` embedding: filler tokens) or `none` (there are no slots).
    """

    teacher: bool
    student: bool
    slot_style: str
    slot_input: str

    @property
    def trains_teacher(self) -> bool:
        return self.teacher and not self.student


STAGES: dict[str, StageTraits] = {
    "base": StageTraits(False, False, "none", "none"),
    "sft": StageTraits(False, False, "none", "none"),
    "boundary": StageTraits(False, False, "boundary", "none"),
    "filler": StageTraits(False, False, "filler", "embedding"),
    "filler_aligned": StageTraits(True, False, "filler", "embedding"),
    "stage1": StageTraits(True, False, "latent", "latents"),
    "stage2": StageTraits(True, True, "latent", "latents"),
    "decode": StageTraits(False, False, "latent", "latents"),
}
# What a latent checkpoint is once its two modules are left out: it decodes with latents and trains no further stage.
DECODE_STAGE = "decode"
TRAINED_STAGES = tuple(sorted(set(STAGES) - {"base", DECODE_STAGE}))


# The type of base models, released checkpoints and folders that earlier versions saved.
HOST_MODEL_TYPE = Qwen2_5_VLConfig.model_type


class VReflectionConfig(Qwen2_5_VLConfig):
    """A Qwen2.5-VL configuration plus the latent settings. Unknown keys of released checkpoints are kept.

    The model type is our own, so that the host library's Auto classes give our model or refuse the folder: its plain
    class would load the weights and answer without latents.

    Attributes:
        stage: one of `STAGES`.
        num_latent_tokens: Q, latent slots per span.
        lvr_start_id, lvr_id, lvr_latent_end_id, lvr_end_id: ids of the four latent tokens.
        region, roi_output_size, roi_sampling_ratio: the teacher's region (see `BoxGuidedCompression`).
        resampler_num_heads: heads of both modules; `None` = `min(8, D // 64)`.
        query_init_std: standard deviation of the teacher's initial queries.
        probe_offset, alignment_offset: where the hidden states were taken that the student starts from and that were
            aligned to the teacher, relative to the slots; set through the model's `objective` (see `LatentObjective`).
    """

    model_type = MODEL_TYPE

    stage: str = "base"
    num_latent_tokens: int = 8
    lvr_start_id: int = 151665
    lvr_id: int = 151666
    lvr_latent_end_id: int = 151667
    lvr_end_id: int = 151668
    region: str = "window"
    roi_output_size: int = 7
    roi_sampling_ratio: int = 2
    resampler_num_heads: int | None = None
    query_init_std: float = 0.02
    probe_offset: int = 0
    alignment_offset: int = -1

    @property
    def traits(self) -> StageTraits:
        if self.stage not in STAGES:
            raise ConfigError(f"stage: expected one of {sorted(STAGES)}, got {self.stage!r}")
        return STAGES[self.stage]

    @property
    def hidden_width(self) -> int:
        """D: the language model's width, which the vision tower's merger projects to."""
        return self.text_config.hidden_size  # pyright: ignore[reportOptionalMemberAccess]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == HOST_MODEL_TYPE:
            values = {**values, "model_type": cls.model_type}
        return values, unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What is filed under this configuration is registered before anybody can ask for it.
        for table, module in (("modeling_auto", "modeling"), ("tokenization_auto", "processor")):
            if f"transformers.models.auto.{table}" in sys.modules:
                importlib.import_module(f".{module}", __package__)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_base_config(cls, base: Qwen2_5_VLConfig, stage: str, **overrides) -> VReflectionConfig:
        """The base model's settings with latent settings on top."""
        values = base.to_dict()
        values.pop("model_type", None)
        unknown = set(overrides) - set(cls.__annotations__)
        if unknown:
            raise ConfigError(f"unknown latent settings {sorted(unknown)}; known: {sorted(cls.__annotations__)}")
        config = cls(**{**values, **overrides, "stage": stage})
        _ = config.traits
        return config


def check_teacher_settings(config: VReflectionConfig, settings: dict) -> None:
    """Refuse settings that differ from those a taken-over teacher was built with."""
    for name in ("num_latent_tokens", "region", "roi_output_size", "roi_sampling_ratio", "resampler_num_heads"):
        if name in settings and settings[name] != getattr(config, name):
            raise ConfigError(
                f"{name}: the {config.stage.replace('stage', 'stage-')} teacher was trained with "
                f"{getattr(config, name)!r}, got {settings[name]!r}; leave it out"
            )


AutoConfig.register(VReflectionConfig.model_type, VReflectionConfig, exist_ok=True)  # over its stand-in
