"""Calls when a module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


def after_import(name: str, call: Callable[[], object]) -> None:
    """Call once the module `name` has been executed: at once if it has been. An ImportError becomes a warning."""
    if name in sys.modules:
        quietly(call)
    else:
        sys.meta_path.insert(0, _Watch(name, call))


def quietly(call: Callable[[], object]) -> None:
    """Somebody else's import must not fail because of us."""
    try:
        call()
    except ImportError as error:
        warnings.warn(f"vreflection is not known to the Auto classes of transformers: {error}", stacklevel=2)


class _Watch(MetaPathFinder):
    """First in line for one module: hands out its own spec, with a loader that calls afterwards."""

    def __init__(self, name: str, call: Callable[[], object]):
        self.name, self.call = name, call

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            quietly(self.call)

        spec.loader.exec_module = exec_module  # each spec has a loader of its own
        return spec
