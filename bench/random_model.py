"""Qwen2.5-VL of any size with random weights, made where it stays: for suites at real shapes."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.training.model_shape import ModelShape

SLOTS = 8  # latents of a span
RESERVED = 9  # words at the end of the vocabulary that are tokens of a meaning


def host_config(shape: ModelShape) -> Qwen2_5_VLConfig:
    """A config of these sizes; the special tokens are the last ones of the vocabulary."""
    half = shape.width // shape.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    every = shape.vision_layers // shape.full_layers
    ids = {name: shape.vocabulary - 1 - place for place, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"))}  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "tie_word_embeddings": shape.tied, "rope_theta": 1e6,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": sections},
            "max_position_embeddings": 128000, "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_width, "intermediate_size": shape.vision_mlp,
            "num_heads": max(shape.vision_width // 80, 2), "out_hidden_size": shape.width, "patch_size": shape.patch,
            "window_size": shape.window, "fullatt_block_indexes": list(range(every - 1, shape.vision_layers, every)),
        },
        tie_word_embeddings=shape.tied, **ids,
    )  # fmt: skip


def random_model(
    shape: ModelShape, device: str, dtype: torch.dtype, heads: int = 8
) -> tuple[Qwen2_5_VLForConditionalGeneration, VReflectionForConditionalGeneration]:
    """The host library's model and ours for stage 1, on the same parameters. `heads`: of the compression module."""
    names = ("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id")
    ids = {name: shape.vocabulary - RESERVED + place for place, name in enumerate(names)}
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            host = Qwen2_5_VLForConditionalGeneration(host_config(shape))
            ours = VReflectionForConditionalGeneration.from_base(
                host, "stage1", num_latent_tokens=SLOTS, resampler_num_heads=heads, **ids
            )
    finally:
        torch.set_default_dtype(kept)
    return host, ours
