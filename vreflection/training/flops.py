"""Arithmetic of a training step, and what devices can do at most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .step_time import GPUS


def device_peak(device: torch.device) -> float | None:
    """Dense bfloat16 flop/s of a CUDA device, `None` where not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak for part, gpu in GPUS.items() if part in name), None)


def step_flops(model: nn.Module, lengths: Sequence[int], supervised: int, patches: int) -> float:
    """Floating-point operations a micro-batch needs, forward and backward, nothing computed twice.

    Two per weight and token forward, two more for the gradient of what comes in, and two for the gradient of the weight
    where it is trained; causal attention likewise over half of each sequence's square. The head counts supervised
    positions only, the frozen vision tower its forward pass over `patches`.

    Args:
        lengths: tokens per sequence. supervised: positions with a label. patches: 0 where visual tokens were stored.
    """
    config = model.config.get_text_config()  # pyright: ignore
    language, vision = model.model.language_model, model.model.visual  # pyright: ignore
    linear = 0.0
    for name, parameter in language.named_parameters():
        if "embed_tokens" not in name:
            linear += parameter.numel() * (6 if parameter.requires_grad else 4)
    head = config.vocab_size * config.hidden_size * (6 if model.lm_head.weight.requires_grad else 4)  # pyright: ignore
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 6.0 * config.num_hidden_layers * width * sum(length * length for length in lengths)
    tower = 2.0 * sum(p.numel() for p in vision.blocks.parameters()) * patches
    return linear * sum(lengths) + head * supervised + attention + tower
