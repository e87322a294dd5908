"""Entry point of lmms-eval's group `lmms_eval.models`: says where the model is, imports nothing heavy."""

from __future__ import annotations


def manifest():
    """The model `vreflection`, in lmms-eval's own words."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vreflection", chat_class_path="vreflection.harnesses.lmms_eval_model.VReflectionChat")
