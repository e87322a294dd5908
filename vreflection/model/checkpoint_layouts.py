"""Names of tensors and the form of `config.json` in the three checkpoint layouts."""

from __future__ import annotations

import json
from typing import Any

from transformers import Qwen2_5_VLConfig

from .checkpoint import detect_stage
from .config import HOST_MODEL_TYPE, STAGES, VReflectionConfig

LAYOUTS = ("vreflection", "qwen2_5_vl", "released")
PLAIN_CLASS = "Qwen2_5_VLForConditionalGeneration"
PROCESSOR, PLAIN_PROCESSOR = "VReflectionProcessor", "Qwen2_5_VLProcessor"
# Switches of the published training code that say which modules a checkpoint holds.
TEACHER_SWITCH, STUDENT_SWITCH = "use_box_feature_resampler", "use_stage2_distillation"


def stored_name(name: str, layout: str) -> str:
    """A tensor's name in a layout, from its name today."""
    if layout == "released":
        for current, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(current):
                return old + name.removeprefix(current)
    return name


def layout_config(
    original: dict[str, Any], config: VReflectionConfig, layout: str, shapes: dict[str, tuple[int, ...]], stage: str
) -> dict[str, Any]:
    """The content of `config.json` in a layout.

    Args:
        original: the source's `config.json`. config: the same, read and completed, with the stage to be written.
        shapes: the tensors to be written, under today's names. stage: the source's stage.
    """
    values = json.loads(config.to_json_string(use_diff=True))
    if layout == "qwen2_5_vl":
        return plain_config(values)
    traits = STAGES[config.stage]
    if config.stage != stage:
        values["trained_stage"] = stage
    if layout == "vreflection":
        values["architectures"] = ["VReflectionForConditionalGeneration"]
        for switch, present in ((TEACHER_SWITCH, traits.teacher), (STUDENT_SWITCH, traits.student)):
            if switch in values:
                values[switch] = present
        return values
    values = flat_config(values) if "text_config" in original else {**original, **latent_settings(values)}
    if detect_stage(shapes) == config.stage:
        values.pop("stage", None)
    else:
        values["stage"] = config.stage  # the tensors do not show it
    values["architectures"] = ["QwenWithLVR" if traits.teacher else PLAIN_CLASS]
    switches = {TEACHER_SWITCH: traits.teacher, STUDENT_SWITCH: traits.student}
    return {**values, "model_type": HOST_MODEL_TYPE, **switches}


def latent_settings(values: dict[str, Any]) -> dict[str, Any]:
    names = (*VReflectionConfig.__annotations__, "trained_stage")
    return {name: values[name] for name in names if name in values}


def plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """Only what stock Qwen2.5-VL knows."""
    known = {
        *Qwen2_5_VLConfig().to_dict(),
        "dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "quantization_config",
    }
    plain = {name: value for name, value in values.items() if name in known}
    return {**plain, "architectures": [PLAIN_CLASS], "model_type": HOST_MODEL_TYPE}


def flat_config(values: dict[str, Any]) -> dict[str, Any]:
    """Text settings at the top level, as the published weights have them and older host libraries expect."""
    values = dict(values)
    text, vision = dict(values.pop("text_config")), dict(values.pop("vision_config"))
    for part in (text, vision):
        part.pop("model_type", None)
        part.pop("dtype", None)
    rope = text.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
    if "mrope_section" in rope:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    if set(text.get("layer_types") or ["full_attention"]) == {"full_attention"}:
        text.pop("layer_types", None)
    vision.pop("rope_parameters", None)  # a constant of the architecture, unknown to older host libraries
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return {**text, **values, "vision_config": vision}
