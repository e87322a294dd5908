"""What a benchmark is made of, and what a run leaves behind: items, raw answers, the manifest.

A run's folder holds `run.json` (`Manifest`) and per benchmark `raw/<benchmark>*.jsonl` (`RawAnswer`, one line per item,
in the order they came). Everything a score needs is in these two, so scoring never needs the images, the model, or
torch.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

LETTERS = string.ascii_uppercase
FORMAT = 1  # of run.json and of raw answers


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        benchmark: its name, such as `mmvp`. id: unique within the benchmark and the same in every run.
        question: without options. options: texts without their letters; the first one is A.
        gold: right letter by label revision; `original` is always there.
        labels: what tables group by, such as `{"task": "Counting"}`.
        group: items with the same value are answered right together or not at all (a pair, four rotations of a
            question); errors are correlated within it.
        images: opened when called, so that a data set never holds more than the images in work.
        image_keys: one per image; items with equal keys share the image and its prefill.
        boxes: gold boxes `(x0, y0, x1, y1)` as fractions of the first image, where the benchmark has them.
        prompt: the benchmark's own text with its options, where its rows have one (BLINK); some protocols show it.
    """

    benchmark: str
    id: str
    question: str
    options: tuple[str, ...]
    gold: Mapping[str, str]
    labels: Mapping[str, str]
    group: str
    images: tuple[Callable[[], Image.Image], ...]
    image_keys: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    prompt: str = ""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


@dataclass(frozen=True)
class RawAnswer:
    """What the model said to one item, and what scoring needs to know of the item.

    Attributes:
        text: the answer with special tokens, latent positions left out. finish_reason: see `Generation`.
        spans: latent spans opened. closed: whether each span was followed by `<|lvr_end|>`.
        latent_steps: latent positions. tokens: emitted tokens, latent positions left out.
        prompt_tokens, visual_tokens: of the prompt; visual tokens per image.
    """

    benchmark: str
    id: str
    options: tuple[str, ...]
    gold: Mapping[str, str]
    labels: Mapping[str, str]
    group: str
    text: str
    finish_reason: str
    spans: int = 0
    closed: bool = False
    latent_steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    visual_tokens: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


@dataclass(frozen=True)
class Manifest:
    """What a run was, written before its first answer; two runs compare only if these allow it.

    Attributes:
        protocol: name and version, such as `strict@1`; all of it is in `notes["protocol"]` (`Protocol.as_dict`).
        model: where it came from. digest: of its weights. stage: of the checkpoint.
        latents: `{"steps": 8, "mode": "clean", "forced": false, …}`.
        benchmarks: per benchmark `{"rows": 300, "asked": 300, "files": {name: digest}}`; with a limit fewer are asked.
        generation: `max_new_tokens`, sampling. versions: of this package, torch, transformers, device.
    """

    protocol: str
    model: str
    digest: str
    stage: str
    latents: Mapping[str, Any]
    benchmarks: Mapping[str, Mapping[str, Any]]
    generation: Mapping[str, Any]
    pixels: Mapping[str, int]
    versions: Mapping[str, str]
    format: int = FORMAT
    notes: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
