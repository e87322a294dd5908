"""Latent visual reasoning: a vision-language model that looks again, in latent steps, before it answers.

Names are imported on first use, so that `import vreflection` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import auto_classes
from ._version import __version__

if TYPE_CHECKING:
    from . import losses, ops
    from .data.boxes import box_to_token_indices
    from .engine.decoder import LatentDecoder
    from .errors import CheckpointError, ConfigError, DataError
    from .fused_attention import fuse
    from .model.config import VReflectionConfig
    from .model.modeling import VReflectionForConditionalGeneration
    from .model.processor import VReflectionProcessor
    from .modules import BoxGuidedCompression, DynamicAutoregressiveCompression

_HOMES = {
    "BoxGuidedCompression": "modules",
    "DynamicAutoregressiveCompression": "modules",
    "LatentDecoder": "engine.decoder",
    "VReflectionConfig": "model.config",
    "VReflectionForConditionalGeneration": "model.modeling",
    "VReflectionProcessor": "model.processor",
    "box_to_token_indices": "data.boxes",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "fuse": "fused_attention",
    "losses": "",
    "ops": "",
}

__all__ = [
    "BoxGuidedCompression",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DynamicAutoregressiveCompression",
    "LatentDecoder",
    "VReflectionConfig",
    "VReflectionForConditionalGeneration",
    "VReflectionProcessor",
    "__version__",
    "box_to_token_indices",
    "fuse",
    "losses",
    "ops",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'vreflection' has no attribute {name!r}; public names: {', '.join(__all__)}")
    home = _HOMES[name]
    module = importlib.import_module(f".{home or name}", __name__)
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `AutoModelForImageTextToText.from_pretrained(<a folder of ours>)` gives our class.
auto_classes.register()
