"""Which decoder step runs: an explicit choice or the best that fits, said once."""

from __future__ import annotations

import logging

import torch

from ..errors import ConfigError
from .cache import KVCache
from .steps import HostStep, QwenStep, why_not_qwen

logger = logging.getLogger(__name__)
STEPS = ("auto", "fused", "torch", "model")
_said: set[str] = set()


def why_not_fused(model, device: torch.device) -> str | None:
    """Why the Triton step cannot run here, or None."""
    from .fused import why_not

    return why_not_qwen(model) or why_not(device)


def choose_step(name: str, model, cache: KVCache) -> HostStep:
    """Build a step on a cache.

    Raises:
        ConfigError: an unknown step, or one that cannot run this model here.
    """
    if name not in STEPS:
        raise ConfigError(f"step: expected one of {STEPS}, got {name!r}")
    reasons = {"fused": why_not_fused(model, cache.device), "torch": why_not_qwen(model), "model": None}
    if name == "auto":
        name = next(option for option in ("fused", "torch", "model") if reasons[option] is None)
        skipped = "; ".join(f"{option}: {reason}" for option, reason in reasons.items() if reason)
        line = f"decode step: {name}" + (f" ({skipped})" if skipped else "")
        if line not in _said:
            _said.add(line)
            logger.info(line)
    reason = reasons[name]
    if reason is not None:
        raise ConfigError(f'step="{name}": {reason}; use step="auto"')
    if name == "fused":
        from .fused import FusedStep

        return FusedStep(model, cache)
    return QwenStep(model, cache) if name == "torch" else HostStep(model, cache)
