"""The host library's PIL image processor, with the limits on visual tokens as one explicit size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint_layouts import PROCESSOR

IMAGE_FILE = "preprocessor_config.json"
# Where this package is not imported, `AutoProcessor` would fall back to the bare tokenizer, which ignores images. Named
# as the folder's own code, the class is loaded with `trust_remote_code=True`, and refused without.
CODE_FILE = "processing_vreflection.py"
CODE = f'''"""The processor of this folder, for `AutoProcessor.from_pretrained(folder, trust_remote_code=True)`."""

from vreflection.model.processor import {PROCESSOR}

__all__ = ["{PROCESSOR}"]
'''


def load_image_processor(path: str, min_visual_tokens: int | None, max_visual_tokens: int | None, **hub) -> Any:
    """An image processor from the settings in a folder.

    Args:
        min_visual_tokens, max_visual_tokens: limits per image; None keeps the folder's own.
        hub: where the host library fetches files.

    Raises:
        CheckpointError: no settings that load. ValueError: limits that contradict each other.
    """
    processor_class = pil_image_processor_class()
    try:
        config, _ = processor_class.get_image_processor_dict(path, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected preprocessor_config.json in {path}, got none that loads ({first_line(error)}); "
            "copy the file of the Qwen2.5-VL base model there"
        ) from error
    config.pop("auto_map", None)  # about the folder, not about images
    # Both spellings occur in released checkpoints; one explicit size keeps the class default out of it.
    size = {**dict(processor_class.size), **(config.pop("size", None) or {})}
    area = token_pixels(
        config.get("patch_size", processor_class.patch_size), config.get("merge_size", processor_class.merge_size)
    )
    for edge, pixels_key, tokens in (
        ("shortest_edge", "min_pixels", min_visual_tokens),
        ("longest_edge", "max_pixels", max_visual_tokens),
    ):
        pixels = config.pop(pixels_key, None) or size.pop(pixels_key, None) or size.get(edge)
        size[edge] = pixels if tokens is None else tokens * area
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"expected 0 < min <= max pixels per image, got {size}; change min_visual_tokens or max_visual_tokens"
        )
    return processor_class(**config, size=size)


def set_processor_class(file: Path, name: str) -> None:
    """Write into a settings file which class `AutoProcessor` makes of the folder; next to the image settings the code
    that loads our own."""
    values = {**json.loads(file.read_text(encoding="utf-8")), "processor_class": name}
    if name != PROCESSOR:
        values.pop("auto_map", None)
    elif file.name == IMAGE_FILE:
        values["auto_map"] = {"AutoProcessor": f"{Path(CODE_FILE).stem}.{PROCESSOR}"}
        file.with_name(CODE_FILE).write_text(CODE, encoding="utf-8")
    text = json.dumps(values, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def token_pixels(patch_size: int, merge_size: int) -> int:
    """Pixels behind one visual token."""
    return (patch_size * merge_size) ** 2


def pil_image_processor_class() -> Any:
    """The host library's image processor that needs no torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil
    except ImportError:
        import transformers

    # Some versions call the PIL implementation by the plain name; the torchvision one shares that name elsewhere.
    plain = getattr(transformers, "Qwen2VLImageProcessor", None)
    if isinstance(plain, type) and not any("Torchvision" in base.__name__ for base in plain.__mro__):
        return plain
    raise ImportError(
        f"expected a PIL image processor for Qwen2-VL, got none in transformers {transformers.__version__}; "
        "install transformers>=5.5.4"
    )


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
