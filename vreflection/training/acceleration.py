"""Faster forms of parts of the model that other libraries offer: compiled layers, Liger's fused cross-entropy."""

from __future__ import annotations

import importlib.util
import logging

import torch

from ..errors import ConfigError
from ..model.modeling import VReflectionForConditionalGeneration
from .settings import TrainSettings

logger = logging.getLogger(__name__)


def accelerate_model(model: VReflectionForConditionalGeneration, settings: TrainSettings, device: torch.device) -> None:
    """Apply `compile` and `fused_cross_entropy` to a model.

    Raises:
        ConfigError: asked for outright, and not possible here.
    """
    if settings.compile is not None:
        compile_layers(model, settings.compile)
    if use_liger(settings.fused_cross_entropy, device):
        model.fused_cross_entropy = liger_cross_entropy()
        logger.info("cross-entropy: Liger's fused linear form; logits are never made")


def compile_layers(model: VReflectionForConditionalGeneration, backend: str) -> None:
    """Compile each decoder layer for any number of tokens; the code is shared among the layers.

    Attention over packed samples stays outside (see `model.packed_attention`).
    """
    known = torch._dynamo.list_backends(exclude_tags=None)
    if backend not in known:
        raise ConfigError(f"compile: expected one of {known}, got {backend!r}")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend, dynamic=True)


def use_liger(asked: str, device: torch.device) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if asked == "liger" and not installed:
        raise ConfigError("fused_cross_entropy: liger is not installed; pip install liger-kernel, or set it to auto")
    return asked == "liger" or (asked == "auto" and installed and device.type == "cuda")


def liger_cross_entropy():
    """Liger's loss under our calling convention: (head weight, hidden states, targets) -> mean, float32."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda weight, hidden, targets: loss(weight, hidden.to(weight.dtype), targets).float()
