"""Which decoder step runs: an explicit choice or the best that fits, said once."""

from __future__ import annotations

import logging

import torch

from ..errors import ConfigError
from ..ops import dispatch
from .cache import KVCache
from .cpp_step import CppStep, why_not_weights
from .cpp_step import why_not as why_not_cpp
from .fused_step import FusedStep
from .fused_step import why_not as why_not_fused
from .steps import HostStep, QwenStep, why_not_qwen

logger = logging.getLogger(__name__)
STEPS = ("auto", "fused", "cpp", "torch", "model")
_said: set[str] = set()


def why_not_host(model) -> str | None:
    """Why not even the host's own forward can decode on our cache, or None."""
    kinds = set(getattr(model.model.language_model.config, "layer_types", None) or [])
    if kinds <= {"full_attention"}:
        return None
    return f"the cache holds full attention only, the model has {sorted(kinds)} layers"


def step_report(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes for a Qwen2-type decoder, and why not the others."""
    skipped = ""
    for name, why_not in (("fused", why_not_fused), ("cpp", why_not_cpp)):
        reason = why_not(device, dtype)
        if reason is None:
            return name + skipped
        skipped += f"; not {name}: {reason}"
    return "torch" + skipped


def choose_step(name: str, model, cache: KVCache) -> HostStep:
    """Build a step on a cache.

    Raises:
        ConfigError: an unknown step, or one that cannot run this model here.
    """
    if name not in STEPS:
        raise ConfigError(f"step: expected one of {STEPS}, got {name!r}")
    structure = why_not_qwen(model)
    reasons = {
        "fused": structure or why_not_fused(cache.device, cache.dtype),
        "cpp": structure or why_not_cpp(cache.device, cache.dtype) or why_not_weights(model, cache.dtype),
        "torch": structure,
        "model": why_not_host(model),
    }
    if name == "auto":
        if dispatch.INTERPRETING:
            reasons["fused"] = "the interpreter only on request"
        usable = [option for option in STEPS[1:] if reasons[option] is None]
        if not usable:
            told = "; ".join(f"{option}: {reason}" for option, reason in reasons.items())
            raise ConfigError(f"no decoder step can run this model here: {told}")
        name = usable[0]
        skipped = "; ".join(f"{option}: {reason}" for option, reason in reasons.items() if reason)
        line = f"decode step: {name}" + (f" ({skipped})" if skipped else "")
        if line not in _said:
            _said.add(line)
            logger.info(line)
    reason = reasons[name]
    if reason is not None:
        raise ConfigError(f'step="{name}": {reason}; use step="auto"')
    steps = {"fused": FusedStep, "cpp": CppStep, "torch": QwenStep, "model": HostStep}
    return steps[name](model, cache)
