"""Qwen2.5-VL with latent steps: one class for both stages, their controls, and decoding.

Shape suffixes: B boxes (= latent spans), Q slots per span, D width, T image tokens, L sequence length, S supervised
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from transformers.models.auto import modeling_auto as tables
from transformers.utils import ModelOutput

from ..errors import CheckpointError
from ..losses import (
    LatentObjective,
    latent_alignment,
    stochastic_side,
    supervised_cross_entropy,
)
from ..modules import BoxGuidedCompression, CrossAttentionResampler, DynamicAutoregressiveCompression
from ..ops import RegionPlan, distillation_loss, image_plan
from .checkpoint import CheckpointMixin
from .config import STAGES, VReflectionConfig, check_teacher_settings
from .generation import LatentGenerationMixin
from .layout import BatchLayout, fill_slots
from .packed_attention import PACKED_ATTENTION, Sequences
from .packed_vision import packed_vision


@dataclass
class VReflectionOutput(ModelOutput):
    """Output of a training forward.

    Attributes:
        loss: weighted total, float32 scalar.
        losses: unweighted parts: `cross_entropy`, and by stage `latent_alignment`, `latent_mse`, `attention_kl`.
        logits: `(S, V)` at supervised positions, or `(batch, L, V)` with `all_logits=True`; `None` in training with
            `fused_cross_entropy`, which never makes them.
        last_hidden_state: `(batch, L, D)` after the final norm.
        teacher_latents, student_latents: `(B, Q, D)` or `None`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    teacher_latents: torch.Tensor | None = None
    student_latents: torch.Tensor | None = None


# (weight of the head (V, D), hidden states (S, D), targets (S,)) -> mean cross-entropy.
FusedCrossEntropy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class TeacherView:
    """The teacher's latents `(B, Q, D)`, its attention `(S, Q)` and the plan that says where those S keys are."""

    latents_BQD: torch.Tensor
    maps_SQ: torch.Tensor
    plan: RegionPlan


class VReflectionForConditionalGeneration(CheckpointMixin, LatentGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL that emits latent steps before answering.

    The stage in the configuration says which compression modules exist (`box_feature_resampler`, `student_resampler`)
    and which losses `forward` takes; `objective` holds their weights and can be replaced. Source: V-Reflection.
    """

    config_class = VReflectionConfig
    config: VReflectionConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: VReflectionConfig):
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        traits, width = config.traits, config.hidden_width
        if traits.teacher:
            self.box_feature_resampler = BoxGuidedCompression(
                width,
                config.num_latent_tokens,
                config.resampler_num_heads,
                region=config.region,
                output_size=config.roi_output_size,
                sampling_ratio=config.roi_sampling_ratio,
                query_init_std=config.query_init_std,
            )
        if traits.student:
            self.student_resampler = DynamicAutoregressiveCompression(width, config.resampler_num_heads)
        offsets = {name: getattr(config, name) for name in ("probe_offset", "alignment_offset")}
        self.objective = LatentObjective.for_stage(config.stage, **offsets)
        self.fused_cross_entropy: FusedCrossEntropy | None = None

    @property
    def objective(self) -> LatentObjective:
        """The losses of `forward`; its offsets also go into the configuration: they hold for the trained weights."""
        return self._objective

    @objective.setter
    def objective(self, objective: LatentObjective) -> None:
        self._objective = objective
        self.config.probe_offset = objective.probe_offset
        if objective.alignment_weight is not None:  # else that of an earlier stage stands
            self.config.alignment_offset = objective.alignment_offset

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The host library visits children first and would leave its own initialisation in them; it skips modules
        # without parameters of their own, so the attention itself must be caught.
        if isinstance(module, nn.MultiheadAttention):
            module.out_proj.reset_parameters()
            module._reset_parameters()
        elif isinstance(module, CrossAttentionResampler):
            module.reset_parameters()

    @classmethod
    def from_base(cls, base, stage: str, **latent_settings) -> VReflectionForConditionalGeneration:
        """Start a stage from a base model.

        Args:
            base: a `Qwen2_5_VLForConditionalGeneration`, one of our models, or a path to either. An instance shares
                its parameters with the result.
            stage: one of `STAGES`. `"stage2"` needs a stage-1 model.
            latent_settings: fields of `VReflectionConfig`, such as `num_latent_tokens` or the token ids.

        Raises:
            CheckpointError: stage 2 from anything but stage 1.
            ConfigError: settings that contradict a teacher taken over from `base`.
        """
        if not isinstance(base, nn.Module):
            base = cls.from_pretrained(base)
        base_stage = getattr(base.config, "stage", "base")
        if stage == "stage2" and base_stage != "stage1":
            raise CheckpointError(
                f"stage 2 starts from a stage-1 checkpoint, got one of stage {base_stage!r}; train stage 1 first and "
                "pass its folder (`vreflection train --config … --set model=<stage-1 folder>`)"
            )
        if hasattr(base, "box_feature_resampler"):
            check_teacher_settings(base.config, latent_settings)
        config = VReflectionConfig.from_base_config(base.config, stage, **latent_settings)
        with torch.device("meta"):
            model = cls(config)
        model.model, model.lm_head = base.model, base.lm_head
        model.generation_config = base.generation_config
        reference = base.lm_head.weight
        for name in ("box_feature_resampler", "student_resampler"):
            if not hasattr(model, name):
                continue
            if hasattr(base, name):
                setattr(model, name, getattr(base, name))
            else:
                module = getattr(model, name).to_empty(device=reference.device)
                module.reset_parameters()
                module.to(reference.dtype)
        # Everything that reads a config, such as the attention implementation, reads this one from here on.
        config.text_config, config.vision_config = base.config.text_config, base.config.vision_config
        model.model.config = config
        return model.train(base.training)

    def freeze_for_stage(self) -> None:
        """Set `requires_grad`: vision and merger never; the teacher until stage 2; the student in stage 2."""
        self.requires_grad_(True)
        self.model.visual.requires_grad_(False)
        if self.config.traits.teacher:
            self.box_feature_resampler.requires_grad_(self.config.traits.trains_teacher)

    def visual_tokens(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Packed visual tokens `(T, D)` of all images; without gradient while the vision tower is frozen."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.visual.parameters())
        packed = nullcontext() if trained else packed_vision(self.model.visual)
        with packed, torch.set_grad_enabled(trained):
            features = self.model.get_image_features(pixel_values, image_grid_thw).pooler_output
        return torch.cat(list(features)) if isinstance(features, (list, tuple)) else features

    def embed(self, input_ids: torch.Tensor, tokens_TD: torch.Tensor | None, layout: BatchLayout) -> torch.Tensor:
        """Input embeddings `(batch, L, D)` with the visual tokens in their places."""
        embeds = self.get_input_embeddings()(input_ids)
        if tokens_TD is None:
            return embeds
        if len(tokens_TD) != len(layout.image_index_T):
            raise ValueError(
                f"image_features: expected {len(layout.image_index_T)} visual tokens for the image tokens in "
                f"input_ids, got {len(tokens_TD)}"
            )
        flat = embeds.flatten(0, 1)
        return flat.index_copy(0, layout.image_index_T, tokens_TD.to(flat.dtype)).view_as(embeds)

    def teacher_view(self, tokens_TD: torch.Tensor, layout: BatchLayout) -> TeacherView:
        """Box-Guided Compression of the batch's boxes; gradient only where the stage trains it."""
        module = self.box_feature_resampler
        plan = module.plan(tokens_TD, layout.grids, layout.boxes, layout.box_image)
        with torch.set_grad_enabled(self.config.traits.trains_teacher and torch.is_grad_enabled()):
            latents, maps = module.resample(module.queries[0], tokens_TD, plan)
        return TeacherView(latents, maps, plan)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        box_sample: torch.Tensor | None = None,
        box_image: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        layout: BatchLayout | None = None,
        slot_inputs: torch.Tensor | None = None,
        free_running: torch.Tensor | None = None,
        alignment_step: int = 0,
        loss_shares: torch.Tensor | None = None,
        all_logits: bool = False,
        **kwargs,
    ):
        """One forward pass; with `labels`, the losses of the configured stage.

        Without `labels` and `image_features` this is the host model's own forward. With them:

        Args:
            input_ids, labels: `(batch, L)` int64, right- or left-padded; labels are -100 where not supervised.
            attention_mask: `(batch, L)`, or `cu_seqlens` `(sequences + 1,)` for one packed row.
            position_ids: `(3, batch, L)`; made from `mm_token_type_ids` when absent.
            pixel_values, image_grid_thw: as from the image processor; or `image_features` `(T, D)`, the visual tokens.
            boxes: `(B, 4)` normalised, in the order of their spans; box_sample, box_image: `(B,)`.
            layout: the host-side check of all of the above, if already made.
            slot_inputs: `(B, Q, D)` states to feed to the slots where `free_running` `(B,)` is True.
            alignment_step: step number for `alignment = stochastic`.
            loss_shares: `(2,)`, what this batch's mean over supervised positions and its means over boxes count for in
                `loss`, so that a step of several batches weighs every token alike; the parts in `losses` stay means.

        Returns:
            `VReflectionOutput`.

        Raises:
            ValueError: parts of the batch disagree.
        """
        if labels is None and image_features is None:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                pixel_values=pixel_values, image_grid_thw=image_grid_thw, mm_token_type_ids=mm_token_type_ids, **kwargs,
            )  # fmt: skip
        if input_ids is None:
            raise ValueError("forward with labels or image_features needs input_ids, got None")
        if layout is None:
            layout = BatchLayout.from_batch(
                self.config, input_ids, labels, image_grid_thw, boxes, box_sample, box_image, cu_seqlens,
                ce_on_latent_slots=self.objective.ce_on_latent_slots,
            )  # fmt: skip
        tokens = self.batch_tokens(pixel_values, image_features, image_grid_thw)
        embeds = self.embed(input_ids, tokens, layout)
        teacher = None
        if self.config.traits.teacher and tokens is not None and len(layout.boxes):
            teacher = self.teacher_view(tokens, layout)
            if self.config.traits.slot_input == "latents":
                embeds = fill_slots(embeds, teacher.latents_BQD.detach(), layout, slot_inputs, free_running)
        position_ids = self.positions(
            input_ids, position_ids, mm_token_type_ids, image_grid_thw, attention_mask, cu_seqlens
        )
        hidden = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            use_cache=False,
            **self.sequence_bounds(attention_mask, layout),
            **kwargs,
        ).last_hidden_state
        return self.losses(hidden, tokens, teacher, layout, labels is not None, alignment_step, loss_shares, all_logits)

    def sequence_bounds(self, attention_mask, layout: BatchLayout) -> dict:
        """How the language model's attention learns which positions belong together."""
        if layout.sequence_lengths is None:
            return {"attention_mask": attention_mask}
        if self.config.get_text_config()._attn_implementation == PACKED_ATTENTION:
            # A mapping is taken as it is: no mask of the whole row is made.
            return {"attention_mask": {"full_attention": None}, "sequences": Sequences(layout.sequence_lengths)}
        return {"attention_mask": None}

    def batch_tokens(self, pixel_values, image_features, image_grid_thw) -> torch.Tensor | None:
        if image_features is not None:
            if pixel_values is not None:
                raise ValueError("expected pixel_values or image_features, got both")
            if image_features.dim() != 2 or image_features.shape[1] != self.config.hidden_width:
                raise ValueError(
                    f"image_features: expected (T, {self.config.hidden_width}), got {tuple(image_features.shape)}"
                )
            return image_features
        if pixel_values is None:
            if image_grid_thw is not None and len(image_grid_thw):
                raise ValueError("image_grid_thw without pixel_values or image_features")
            return None
        return self.visual_tokens(pixel_values, image_grid_thw)

    def positions(self, input_ids, position_ids, mm_token_type_ids, image_grid_thw, attention_mask, cu_seqlens):
        """Rope positions `(3, batch, L)`; a packed row gets the text row on top that separates its sequences."""
        if position_ids is None:
            if cu_seqlens is not None:
                raise ValueError("a packed batch (cu_seqlens) needs position_ids (3, 1, L), restarting per sequence")
            if image_grid_thw is None:
                mm_token_type_ids = torch.zeros_like(input_ids)
            elif mm_token_type_ids is None:
                raise ValueError(
                    "images need mm_token_type_ids (1 at image tokens, 0 elsewhere) or position_ids (3, batch, L); "
                    "without them positions would silently be one-dimensional"
                )
            position_ids, _ = self.model.get_rope_index(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                attention_mask=attention_mask,
            )
        if cu_seqlens is None or position_ids.shape[0] == 4:
            return position_ids
        bounds = cu_seqlens.to(position_ids.device)
        flat = torch.arange(input_ids.shape[1], device=position_ids.device)
        start = bounds[torch.searchsorted(bounds, flat, right=True) - 1]
        return torch.cat([(flat - start).view(1, 1, -1).to(position_ids.dtype), position_ids])

    def losses(
        self, hidden, tokens, teacher, layout, supervised, alignment_step, loss_shares, all_logits
    ) -> VReflectionOutput:
        """Loss parts and their weighted sum; see `LatentObjective`."""
        flat, objective = hidden.flatten(0, 1), self.objective
        token_share, box_share = (1.0, 1.0) if loss_shares is None else loss_shares.unbind()
        rows, output = flat.index_select(0, layout.supervised_index_S), VReflectionOutput(last_hidden_state=hidden)
        if supervised and self.training and self.fused_cross_entropy is not None and len(rows):
            parts = {"cross_entropy": self.fused_cross_entropy(self.lm_head.weight, rows, layout.targets_S)}
        else:
            output.logits = self.lm_head(rows)
            parts = {"cross_entropy": supervised_cross_entropy(output.logits, layout.targets_S)} if supervised else {}
        if supervised:
            total = token_share * parts["cross_entropy"]
            if teacher is not None:
                output.teacher_latents = teacher.latents_BQD
            if objective.alignment_weight is not None and self.config.traits.teacher:
                parts["latent_alignment"] = self.alignment_loss(flat, teacher, layout, alignment_step)
                total = total + box_share * (objective.alignment_weight * parts["latent_alignment"])
            if objective.distillation_weight is not None and self.config.traits.student:
                parts |= self.distillation_losses(flat, tokens, teacher, layout, output)
                weighted = parts["latent_mse"] + objective.attention_kl_weight * parts["attention_kl"]
                total = total + box_share * (objective.distillation_weight * weighted)
            output.loss, output.losses = total + self.unused_parameters(flat, teacher), parts
        if all_logits:
            output.logits = self.lm_head(hidden)
        return output

    def alignment_loss(self, flat_hidden, teacher: TeacherView | None, layout: BatchLayout, step: int) -> torch.Tensor:
        objective = self.objective
        if teacher is None:
            return connected_zero(flat_hidden, self.box_feature_resampler)
        hidden_BQD = flat_hidden[layout.slot_index_BQ + objective.alignment_offset]
        llm_side = stochastic_side(objective.alignment_seed, step, objective.stochastic_probability)
        return latent_alignment(hidden_BQD, teacher.latents_BQD, objective.alignment, llm_side)

    def unused_parameters(self, flat_hidden, teacher: TeacherView | None) -> torch.Tensor | float:
        """A connected zero where this step's losses leave the trainable teacher out: every rank reduces alike."""
        objective = self.objective
        if not self.config.traits.trains_teacher:
            return 0.0
        one_sided = objective.alignment in ("llm_only", "stochastic")
        if teacher is not None and objective.alignment_weight is not None and not one_sided:
            return 0.0
        return connected_zero(flat_hidden[:0], self.box_feature_resampler)

    def distillation_losses(self, flat_hidden, tokens, teacher, layout, output) -> dict[str, torch.Tensor]:
        if teacher is None:
            zero = connected_zero(flat_hidden, self.student_resampler)
            return {"latent_mse": zero, "attention_kl": zero}
        probes = flat_hidden[layout.slot_index_BQ + self.objective.probe_offset]
        plan = image_plan(tokens.shape[0], layout.grids, layout.box_image, tokens.device)
        latents, student_maps_SQ = self.student_resampler.resample(probes, tokens, plan)
        output.student_latents = latents
        mse, kl = distillation_loss(
            latents, teacher.latents_BQD, student_maps_SQ, teacher.maps_SQ, teacher.plan.keys_in(plan),
            self.objective.kl_reduction,
        )  # fmt: skip
        return {"latent_mse": mse, "attention_kl": kl}


def connected_zero(hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Zero that still reaches `hidden` and every trainable parameter of `module`, so that all ranks reduce alike."""
    total = hidden.float().sum()
    for parameter in module.parameters():
        if parameter.requires_grad:
            total = total + parameter.float().sum()
    return total * 0.0


for auto_class in (AutoModel, AutoModelForImageTextToText, tables.AutoModelForMultimodalLM):
    auto_class.register(VReflectionConfig, VReflectionForConditionalGeneration)
# The pipelines look names up here, to say whether they know the class.
for names in (tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, tables.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names[VReflectionConfig.model_type] = VReflectionForConditionalGeneration.__name__

__all__ = ["STAGES", "VReflectionForConditionalGeneration", "VReflectionOutput"]
