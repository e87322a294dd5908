"""What a server needs before it starts: the checkpoint, and what makes maps of its answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.requests import Generation, Prompt
from ..errors import ConfigError
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..model.weight_files import DTYPES
from .schema import Box
from .service import Maps

logger = logging.getLogger(__name__)


def load_served(folder: Path, dtype: str | None, device: str | None):
    """Model, processor, and what makes maps of an answer (`None` where the checkpoint has nothing to look with).

    Raises:
        ConfigError: an unknown dtype or device. CheckpointError: nothing usable there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device: expected such as cpu or cuda:0, got {device!r} ({error})") from None
    chosen = "auto" if dtype is None else DTYPES[dtype][1]
    if dtype is None and place.type == "cpu":
        chosen = torch.float32  # what CPUs compute fastest here
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype=chosen).eval().to(place)
    processor = VReflectionProcessor.from_pretrained(folder, None, None)
    return model, processor, answer_maps(model)


def answer_maps(model: VReflectionForConditionalGeneration) -> Maps | None:
    """Where an answer's latent steps look: the student's attention, or the language model's."""
    if model.config.traits.slot_input == "none":
        return None
    from ..visualization.attention_maps import maps_of

    def maps(prompt: Prompt, generation: Generation, boxes: Sequence[Box], first_span: int = 0) -> dict[str, Any]:
        looks = maps_of(model, prompt, generation, boxes=boxes, teacher=False)
        steps = [step for step, span in enumerate(looks.span) if span >= first_span]
        inside = looks.in_own_box() if boxes else None
        return {
            "source": looks.attention.source,
            "span": [looks.span[step] for step in steps],
            "images": [
                {
                    "grid": list(image.shape[1:]),
                    "steps": [[round(v, 6) for v in image[step].flatten().tolist()] for step in steps],
                }
                for image in looks.maps
            ],
            "inside": None if inside is None else [inside[step] for step in steps],
        }

    return maps
