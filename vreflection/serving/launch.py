"""What a server needs before it starts: the checkpoint, and what makes maps of its answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.requests import Generation, Prompt
from ..errors import CheckpointError, ConfigError
from ..model.checkpoint import read_json
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..model.weight_files import DTYPES
from .schema import Box
from .service import Maps
from .settings import ServeSettings

logger = logging.getLogger(__name__)


def load_served(folder: Path, dtype: str | None, device: str | None):
    """Model, processor, and what makes maps of an answer (`None` where the checkpoint has nothing to look with).

    Raises:
        ConfigError: an unknown dtype or device. CheckpointError: nothing usable there.
    """
    check_dtype(dtype)
    place = usable_device(device)
    chosen = "auto" if dtype is None else DTYPES[dtype][1]
    if dtype is None and place.type == "cpu":
        chosen = torch.float32  # what CPUs compute fastest here
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype=chosen).eval().to(place)
    processor = VReflectionProcessor.from_pretrained(folder)
    return model, processor, answer_maps(model)


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def usable_device(name: str | None) -> torch.device:
    """A device of this machine; None takes a GPU if there is one.

    Raises:
        ConfigError: no device of that name here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"device: expected such as cpu or cuda:0, got {name!r}") from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= count):
        usable = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count if torch.cuda.is_available() else 0))])
        raise ConfigError(f"device: this machine and this PyTorch offer {usable}, got {name!r}")
    return device


def check_served(folder: Path, settings: ServeSettings, dtype: str | None, device: str | None) -> None:
    """What can be said before weights are loaded.

    Raises:
        ConfigError: an unknown dtype or device, or more tokens than the checkpoint has positions.
        CheckpointError: no usable configuration there.
    """
    check_dtype(dtype)
    usable_device(device)
    positions = positions_of(folder)
    if positions is not None and settings.max_length > positions:
        raise ConfigError(
            f"max_length: this checkpoint has {positions} positions, got {settings.max_length}; choose at most as many"
        )


def positions_of(folder: Path) -> int | None:
    """Positions that a checkpoint's configuration names.

    Raises:
        CheckpointError: no usable configuration there.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: expected config.json, found none")
    values = read_json(file)
    text = values.get("text_config")
    positions = (text if isinstance(text, dict) else values).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def answer_maps(model: VReflectionForConditionalGeneration) -> Maps | None:
    """Where an answer's latent steps look: the student's attention, or the language model's."""
    if model.config.traits.slot_input == "none":
        return None
    from ..visualization.attention_maps import maps_of

    def maps(prompt: Prompt, generation: Generation, boxes: Sequence[Box], first_span: int = 0) -> dict[str, Any]:
        looks = maps_of(model, prompt, generation, boxes=boxes, teacher=False)
        steps = [step for step, span in enumerate(looks.span) if span >= first_span]
        inside, masses = looks.in_own_box() if boxes else None, looks.image_mass
        return {
            "source": looks.attention.source,
            "span": [looks.span[step] for step in steps],
            "images": [
                {
                    "grid": list(image.shape[1:]),
                    "steps": [[round(v, 6) for v in image[step].flatten().tolist()] for step in steps],
                    "mass": None if masses is None else [round(float(masses[number, step]), 6) for step in steps],
                }
                for number, image in enumerate(looks.maps)
            ],
            "inside": None if inside is None else [inside[step] for step in steps],
        }

    return maps
