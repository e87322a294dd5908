"""ZeRO-3 with processes that run different modules: what only some of them run stays gathered everywhere.

DeepSpeed gathers a module's weights when it is entered, which is a collective, and checks that all processes entered
the same modules. A process whose batch has no image enters neither the vision tower nor the compression modules; one
without supervised positions enters the vocabulary projection, which a fused cross-entropy bypasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def whole_model() -> Iterator[None]:
    """Models made inside are built whole, as for every other way, instead of in pieces by the host library."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    if held is None or held() is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(held())


class ResidentParts:
    """Parts of a ZeRO-3 model whose weights every process keeps whole; their optimizer states and masters stay sharded.

    Args:
        engine: DeepSpeed's, of stage 3. model: what it shards.
    """

    def __init__(self, engine: Any, model: nn.Module):
        parts = resident_modules(model)
        for module in (m for part in parts for m in part.modules()):
            remove_hooks(module)
        self.parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
        kept = engine.optimizer.persistent_parameters  # gathered after every step
        known = {id(parameter) for parameter in kept}
        for parameter in self.parameters:
            parameter.ds_persist = True  # pyright: ignore[reportAttributeAccessIssue]
            if id(parameter) not in known:
                kept.append(parameter)
        self.gather()

    def gather(self) -> None:
        """Make every part whole: a skipped step and a loaded checkpoint leave them sharded. On all processes alike."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        absent = [p for p in self.parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]  # pyright: ignore
        if absent:
            absent[0].all_gather(absent)  # pyright: ignore


def resident_modules(model: Any) -> list[nn.Module]:
    names = ("box_feature_resampler", "student_resampler")
    parts: list[nn.Module] = [model.model.visual, *(getattr(model, name) for name in names if hasattr(model, name))]
    if model.fused_cross_entropy is not None:
        parts.append(model.lm_head)
        if model.config.get_text_config().tie_word_embeddings or model.config.tie_word_embeddings:
            parts.append(model.model.language_model.embed_tokens)
    return parts


def remove_hooks(module: nn.Module) -> None:
    """Take DeepSpeed's hooks off one module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed")]:
            hooks.pop(key)
