"""Our classes in the host library's Auto tables, whichever library is imported first, without importing either.

When the tables come into being, stand-ins enter them; reading a folder of ours through one imports the class that it
stands for. Our modules register the classes themselves when they are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODEL_TYPE = "vreflection"


def ours(module: str, name: str):
    return getattr(importlib.import_module(f"vreflection.model.{module}"), name)


def enter_config(table: ModuleType) -> None:
    """A stand-in for `VReflectionConfig`, in `transformers.models.auto.configuration_auto`."""

    # Imported by the table before it.
    base = importlib.import_module("transformers.configuration_utils").PreTrainedConfig

    class VReflectionConfig(base):
        model_type = MODEL_TYPE

        def __new__(cls, *args, **kwargs):
            return ours("config", "VReflectionConfig")(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            return ours("config", "VReflectionConfig").from_dict(config_dict, **kwargs)

    table.AutoConfig.register(MODEL_TYPE, VReflectionConfig, exist_ok=True)


def enter_processor(table: ModuleType) -> None:
    """A stand-in for `VReflectionProcessor`, found by its name, in `transformers.models.auto.processing_auto`."""

    class VReflectionProcessor:
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return ours("processor", "VReflectionProcessor").from_pretrained(*args, **kwargs)

    table.AutoProcessor.register(VReflectionProcessor, VReflectionProcessor, exist_ok=True)


def register() -> None:
    """Enter the stand-ins, at once or when the host library imports its tables."""
    after_import("transformers.models.auto.configuration_auto", enter_config)
    after_import("transformers.models.auto.processing_auto", enter_processor)


def after_import(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call with the module `name` once it has been executed; at once if it has been."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """First in line for one module: hands out its own spec, with a loader that calls afterwards."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]):
        self.name, self.call = name, call

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.call(module)

        spec.loader.exec_module = exec_module  # each spec has a loader of its own
        return spec
