"""The sizes of a Qwen2.5-VL with latent steps, read from `config.json`; its parameters, counted without building it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PIXEL_CHANNELS, FRAMES = 3, 2  # of a patch of the vision tower


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the language model, the vision tower and the two compression modules.

    Attributes:
        width, mlp, layers, heads, kv_heads, vocabulary: of the language model; `tied` heads share the embedding.
        vision_width, vision_mlp, vision_layers: of the vision tower; `full_layers` of its layers attend across windows.
        patch, merge, window: pixels per patch side, patches per visual token side, pixels per attention window side.
        latents: slots per span.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision_width: int = 1280
    vision_mlp: int = 3420
    vision_layers: int = 32
    full_layers: int = 4
    patch: int = 14
    merge: int = 2
    window: int = 112
    latents: int = 8

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def layer_matrices(self) -> int:
        """Elements of one decoder layer's weight matrices."""
        return 2 * self.width * (self.width + self.kv_width) + 3 * self.width * self.mlp

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer: matrices, biases of queries, keys and values, two norms."""
        return self.layer_matrices + self.width + 2 * self.kv_width + 2 * self.width

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        return 0 if self.tied else self.embedding

    @property
    def language(self) -> int:
        """Parameters of the language model, head included."""
        return self.embedding + self.layers * self.layer + self.width + self.head

    @property
    def patch_width(self) -> int:
        """Values per patch."""
        return PIXEL_CHANNELS * FRAMES * self.patch**2

    @property
    def vision_layer_matrices(self) -> int:
        return 4 * self.vision_width**2 + 3 * self.vision_width * self.vision_mlp

    @property
    def merger_matrices(self) -> int:
        merged = self.merge**2 * self.vision_width
        return merged * (merged + self.width)

    @property
    def vision(self) -> int:
        """Parameters of the vision tower, merger included."""
        width = self.vision_width
        layer = self.vision_layer_matrices + 4 * width + 2 * self.vision_mlp + width + 2 * width
        merger = self.merger_matrices + self.merge**2 * width + self.width + width
        return self.patch_width * width + self.vision_layers * layer + merger

    @property
    def student(self) -> int:
        """Parameters of Dynamic Autoregressive Compression: four projections with biases, one norm."""
        return 4 * self.width * (self.width + 1) + 2 * self.width

    @property
    def teacher(self) -> int:
        """Parameters of Box-Guided Compression: as the student, plus the queries."""
        return self.student + self.latents * self.width

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on every matrix of every decoder layer, and the four latent tokens' rows."""
        rows = 4 * self.width * (1 if self.tied else 2)
        # q, o: (D, D) each; k, v: (D, KV) each; gate, up, down: (D, F) each.
        ends = 4 * self.width + 2 * (self.width + self.kv_width) + 3 * (self.width + self.mlp)
        return self.layers * rank * ends + rows


NAMED = {
    "7b": ModelShape(3584, 18944, 28, 28, 4, 152064, tied=False),
    "3b": ModelShape(2048, 11008, 36, 16, 2, 151936, tied=True),
}


def model_shape(model: str | Path) -> ModelShape:
    """Sizes by name (`7b`, `3b`, or a hub id that ends in one, such as `Qwen/Qwen2.5-VL-7B-Instruct`) or from a folder.

    Raises:
        ConfigError: neither a known name nor a folder with a `config.json` of a Qwen2.5-VL.
    """
    folder = Path(model)
    if folder.is_dir():
        return shape_from_config(read_config(folder / "config.json"), str(folder / "config.json"))
    words = str(model).lower().replace("/", "-").replace("_", "-").split("-")
    for name, shape in NAMED.items():
        if name in words:
            return shape
    raise ConfigError(f"model: expected a checkpoint folder or a name with {sorted(NAMED)}, got {str(model)!r}")


def read_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected the config.json of a checkpoint: {error}") from error
    return values if isinstance(values, dict) else {}


def shape_from_config(values: dict[str, Any], source: str = "config") -> ModelShape:
    """Sizes from the content of `config.json`, nested or flat."""
    text = values.get("text_config") or values
    vision = values.get("vision_config") or {}
    try:
        return ModelShape(
            width=text["hidden_size"],
            mlp=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision_width=vision.get("hidden_size", 1280),
            vision_mlp=vision.get("intermediate_size", 3420),
            vision_layers=vision.get("depth", 32),
            full_layers=len(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            patch=vision.get("patch_size", 14),
            merge=vision.get("spatial_merge_size", 2),
            window=vision.get("window_size", 112),
            latents=values.get("num_latent_tokens", 8),
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{source}: expected the settings of a Qwen2.5-VL, got none for {error}") from error
