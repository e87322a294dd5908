"""Have the parameters changed since a decoder last looked? What was computed with the old ones must not be reused."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import ConfigError
from .steps import hooked

_optimizer_steps = 0


def _count(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimisers write without raising a tensor's version, so steps are counted as well.
register_optimizer_step_post_hook(_count)


# By exact type, as this is asked of every module before every first token.
SCALARS = frozenset({int, float, bool, str})
LISTS, SETS, TABLES = frozenset({list, tuple}), frozenset({set, frozenset}), frozenset({dict, OrderedDict})
# Their plain attributes are of no consequence for what they compute, and most modules are of these types.
SETTLED = frozenset({nn.Linear, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.SiLU})
# What every module has: registries, which are looked at by themselves, and the mode, which decoding sets anyway.
OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)


class WeightWatch:
    """Compares what a model computes with, with what it was at the last look.

    Sees parameters and buffers that were replaced, moved, changed in place or stepped by any torch optimizer of this
    process; forward hooks that came, went or were exchanged; and plain settings of modules, such as a norm's epsilon or
    which adapter is active. Not writes through `.data` or by other libraries.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.places, self.values = self.look()

    def look(self) -> tuple[list, list]:
        places, values = [], []
        for part in self.model.modules():
            if hooked(part):
                hooks = (*part._forward_pre_hooks, *part._forward_hooks)  # by numbers that never come again
                places.append((id(part), *hooks, id(part.__dict__.get("forward"))))
            attributes = part.__dict__
            if type(part) not in SETTLED and len(attributes) > len(OWN_ATTRIBUTES):
                places.append(
                    [
                        value if type(value) in SCALARS else settings(value)
                        for name, value in attributes.items()
                        if name not in OWN_ATTRIBUTES
                    ]
                )
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    places.append((id(tensor), tensor.data_ptr()))
                    # Tensors made in inference mode carry no version.
                    values.append(0 if tensor.is_inference() else tensor._version)
        return places, [*values, _optimizer_steps]

    def changed(self) -> tuple[bool, bool]:
        """Whether what a step was built from differs, and whether earlier results may, since the last call."""
        places, values = self.look()
        moved = places != self.places
        different = moved or values != self.values
        self.places, self.values = places, values
        return moved, different


def settings(value: Any) -> Any:
    """A copy of a plain value, of lists and tables of such; None for anything else."""
    kind = type(value)
    if kind in SCALARS:
        return value
    if kind in LISTS:
        return [settings(entry) for entry in value]
    if kind in SETS:
        return set(value)
    if kind in TABLES:
        return {key: settings(entry) for key, entry in value.items()}
    return None


def without_adapter_wrapper(model: Any) -> Any:
    """The model inside a PEFT model, whose layers hold the adapters.

    Raises:
        ConfigError: adapters that act outside the layers.
    """
    if hasattr(type(model), "prompt_inputs"):
        return model
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            f"model: {kind} adapters put tokens of their own before the prompt, which latent decoding does not know; "
            "use adapters inside the layers, such as LoRA"
        )
    inner: Any = getattr(getattr(model, "base_model", None), "model", None)
    return inner if hasattr(type(inner), "prompt_inputs") else model
