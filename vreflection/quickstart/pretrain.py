"""Pre-train the quickstart's base from random weights: a dense loss on the vision tower, then captions.

Reads training photos and training digits only; the questions of the later stages never appear.
Shape suffixes: B images of a batch, P of the pool, S sequence positions, N visual tokens (64), D features.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vreflection.quickstart.base import base_config, load_base, save_base
from vreflection.quickstart.batched_vision import pack_pixels, vision_features
from vreflection.quickstart.captioning import (
    VISUAL_TOKENS,
    caption_accuracy,
    caption_text,
    jpeg_round_trip,
    prompt_ids,
    validation_scenes,
)
from vreflection.quickstart.notes import (
    CELL,
    COLOURS,
    GRID,
    NOTES_PER_IMAGE,
    Note,
    ProgressCallback,
    Scene,
    make_scene,
)
from vreflection.quickstart.tokenizer import build_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

IGNORED = -100
BACKGROUND_DIGIT = 10
BACKGROUND_COLOUR = len(COLOURS)


@dataclass(frozen=True)
class PretrainSettings:
    """The recipe. Steps count optimiser updates; learning rates follow a warm-up and a cosine down to 10 %."""

    vision_steps: int = 400
    caption_steps: int = 300  # digits are right after 100; naming every note once takes the rest
    caption_images: int = 2048  # their visual tokens are computed once and reused
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    warm_up: int = 20
    clip: float = 1.0
    crowded_notes: int = 16  # three of four vision batches hold up to this many notes
    background_digit_weight: float = 0.1
    background_colour_weight: float = 0.2
    word_norm: float = 0.97  # of the digit and colour embeddings taken from the dense heads
    validation_images: int = 256


def token_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Digit (0..9, 10 background) and colour (0..7, 8 background) per visual token: two (64,) int64.

    A token belongs to the note that covers most of its four cells; a tie between notes is ignored (-100).
    """
    import numpy as np

    owner = np.full((GRID, GRID), -1)
    for index, note in enumerate(scene.notes):
        column, row, cells = note.x // CELL, note.y // CELL, note.size // CELL
        owner[row : row + cells, column : column + cells] = index
    cells_N4 = owner.reshape(GRID // 2, 2, GRID // 2, 2).swapaxes(1, 2).reshape(-1, 4)
    counts = (cells_N4[:, :, None] == np.arange(len(scene.notes))).sum(1)
    ranked = np.sort(counts, axis=1)
    best = counts.argmax(1)
    names = list(COLOURS)
    digits = np.array([note.digit for note in scene.notes])[best]
    colours = np.array([names.index(note.colour) for note in scene.notes])[best]
    tied = ranked[:, -1] == ranked[:, -2]
    empty = ranked[:, -1] == 0
    digits = np.where(empty, BACKGROUND_DIGIT, np.where(tied, IGNORED, digits))
    colours = np.where(empty, BACKGROUND_COLOUR, np.where(tied, IGNORED, colours))
    return digits, colours


def initialise(model: nn.Module) -> None:
    """Normal weights of std 1/sqrt(fan in), zero biases: the library's 0.02 is too small for widths of 128 and 192."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, torch.nn.Embedding):
                module.weight.normal_(0, module.weight.shape[1] ** -0.5)


def autocast_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (avx512_bf16); elsewhere bf16 autocast is slower than fp32."""
    import torch

    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported is not None and supported())


class _Schedule:
    """AdamW with warm-up, cosine and clipping over `steps` updates."""

    def __init__(self, parameters: list[nn.Parameter], steps: int, settings: PretrainSettings):
        import torch

        self.parameters, self.steps, self.settings, self.done = parameters, steps, settings, 0
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay)

    def update(self, loss: torch.Tensor) -> None:
        import torch

        warm = min(1.0, (self.done + 1) / self.settings.warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * warm * (0.1 + 0.9 * cosine)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


class _Pretraining:
    """One run: model, dense heads, random streams and the curve."""

    def __init__(self, settings: PretrainSettings, seed: int, on_progress: ProgressCallback | None):
        import numpy as np
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.settings, self.on_progress = settings, on_progress
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        self.model = Qwen2_5_VLForConditionalGeneration(base_config(self.tokenizer)).float()
        initialise(self.model)
        width = self.model.config.text_config.hidden_size
        self.digit_head = torch.nn.Linear(width, BACKGROUND_DIGIT + 1)
        self.colour_head = torch.nn.Linear(width, BACKGROUND_COLOUR + 1)
        initialise(torch.nn.ModuleList([self.digit_head, self.colour_head]))
        self.rng = np.random.default_rng([seed, 224])
        self.bf16 = autocast_bf16()
        self.curve: list[dict[str, float | str]] = []
        self.pool_batches = math.ceil(settings.caption_images / settings.batch_size)
        self.total = settings.vision_steps + self.pool_batches + settings.caption_steps
        self.done = 0

    def autocast(self) -> torch.autocast:
        import torch

        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def scenes(self, count: int | None = None) -> list[Scene]:
        return [make_scene("train", self.rng, count or NOTES_PER_IMAGE) for _ in range(self.settings.batch_size)]

    def features(self, scenes: list[Scene]) -> torch.Tensor:
        import numpy as np

        pixels = pack_pixels(np.stack([scene.pixels_HWC for scene in scenes]))
        return vision_features(self.model.model.visual, pixels, len(scenes))

    def tick(self, phase: str, step: int = 0, **values: float) -> None:
        self.done += 1
        last = self.done in (self.settings.vision_steps, self.total)
        if values and (step % 10 == 0 or last):
            self.curve.append({"phase": phase, "step": step, **{k: round(v, 4) for k, v in values.items()}})
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)

    def train_vision(self) -> None:
        """Phase one: every visual token names the digit and the colour of its note."""
        import torch
        from torch.nn import functional as F

        settings = self.settings
        digit_weight = torch.ones(BACKGROUND_DIGIT + 1)
        digit_weight[BACKGROUND_DIGIT] = settings.background_digit_weight
        colour_weight = torch.ones(BACKGROUND_COLOUR + 1)
        colour_weight[BACKGROUND_COLOUR] = settings.background_colour_weight
        modules = [self.model.model.visual, self.digit_head, self.colour_head]
        schedule = _Schedule([p for m in modules for p in m.parameters()], settings.vision_steps, settings)
        for step in range(settings.vision_steps):
            scenes = self.scenes(None if step % 4 == 3 else settings.crowded_notes)
            digits, colours = _stack_labels(scenes)
            with self.autocast():
                features = self.features(scenes)
                digit_logits, colour_logits = self.digit_head(features), self.colour_head(features)
            digit_loss = F.cross_entropy(digit_logits.float().flatten(0, 1), digits, digit_weight, ignore_index=IGNORED)
            colour_loss = F.cross_entropy(
                colour_logits.float().flatten(0, 1), colours, colour_weight, ignore_index=IGNORED
            )
            loss = digit_loss + colour_loss
            schedule.update(loss)
            accuracy = _on_notes(digit_logits, digits)
            self.tick("vision", step, loss=loss.item(), digit_accuracy=accuracy)

    def take_words_from_heads(self) -> None:
        """Point the embeddings of digits and colours where the dense heads found them in the visual tokens."""
        import torch

        table = self.model.get_input_embeddings().weight
        for words, head in ((map(str, range(10)), self.digit_head), (COLOURS, self.colour_head)):
            ids = [self.tokenizer(f" {word}").input_ids for word in words]
            assert all(len(pieces) == 1 for pieces in ids), "digits and colours are single tokens"
            rows = head.weight[: len(ids)].detach()
            rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1) * self.settings.word_norm
            with torch.no_grad():
                table[torch.tensor(ids).flatten()] = rows

    def train_captions(self) -> None:
        """Phase two: the language model lists all notes in random order, from frozen visual tokens."""
        import torch
        from torch.nn import functional as F

        settings = self.settings
        schedule = _Schedule(list(self.model.model.language_model.parameters()), settings.caption_steps, settings)
        prompt = prompt_ids(self.tokenizer)
        pool, features_PND = self.caption_pool()
        for step in range(settings.caption_steps):
            chosen = self.rng.choice(len(pool), settings.batch_size, replace=False)
            input_ids = torch.tensor([self.caption_ids(prompt, pool[index]) for index in chosen])
            with self.autocast():
                hidden = self.caption_hidden(input_ids, features_PND[torch.from_numpy(chosen)])
                logits = self.model.lm_head(hidden[:, len(prompt) - 1 : -1])
            targets = input_ids[:, len(prompt) :]
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            schedule.update(loss)
            right = logits[:, 1:10:2].argmax(-1) == targets[:, 1:10:2]
            self.tick("caption", step, loss=loss.item(), digit_accuracy=float(right.float().mean()))

    def caption_pool(self) -> tuple[list[tuple[Note, ...]], torch.Tensor]:
        """Notes of the captioning images and their visual tokens (images, N, D), from the now frozen tower."""
        import torch

        notes, features = [], []
        for _ in range(self.pool_batches):
            scenes = self.scenes()
            with torch.no_grad(), self.autocast():
                features.append(self.features(scenes))
            notes += [scene.notes for scene in scenes]
            self.tick("features")
        return notes, torch.cat(features)

    def caption_ids(self, prompt: list[int], notes: Sequence[Note]) -> list[int]:
        """Prompt, the caption in a fresh random order, and the end of the turn: the same length for every scene."""
        shuffled = [notes[index] for index in self.rng.permutation(len(notes))]
        return prompt + self.tokenizer(caption_text(shuffled) + "<|im_end|>\n").input_ids

    def caption_hidden(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Final hidden states (B, S, D) with visual tokens put in place and explicit three-axis positions."""
        import torch

        is_image = input_ids == self.model.config.image_token_id
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
        side = math.isqrt(VISUAL_TOKENS) * 2
        positions, _ = self.model.model.get_rope_index(
            input_ids[:1],
            mm_token_type_ids=is_image[:1].int(),
            image_grid_thw=torch.tensor([[1, side, side]]),
        )
        positions = positions.expand(3, len(input_ids), -1)
        return self.model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state

    def validate(self, scenes: list[Scene]) -> dict[str, float]:
        """Accuracies on JPEG images: dense heads on note-covered visual tokens, and digits given their colour word."""
        import numpy as np
        import torch

        digits, colours = _stack_labels(scenes)
        pixels = pack_pixels(np.stack([np.asarray(jpeg_round_trip(scene.pixels_HWC)) for scene in scenes]))
        prompt = prompt_ids(self.tokenizer)
        input_ids = torch.tensor([self.caption_ids(prompt, scene.notes) for scene in scenes])
        with torch.no_grad():
            features = vision_features(self.model.model.visual, pixels, len(scenes))
            logits = self.model.lm_head(self.caption_hidden(input_ids, features)[:, len(prompt) : -1 : 2])
            right = logits[:, :NOTES_PER_IMAGE].argmax(-1) == input_ids[:, len(prompt) + 1 :: 2][:, :NOTES_PER_IMAGE]
            return {
                "token_digit_accuracy": _on_notes(self.digit_head(features), digits),
                "token_colour_accuracy": _on_notes(self.colour_head(features), colours, BACKGROUND_COLOUR),
                "digit_given_colour_accuracy": float(right.float().mean()),
            }


def _stack_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of all visual tokens of a batch, flattened: two (B * 64,) int64."""
    import numpy as np
    import torch

    digits, colours = zip(*(token_labels(scene) for scene in scenes))
    return torch.from_numpy(np.concatenate(digits)), torch.from_numpy(np.concatenate(colours))


def _on_notes(logits: torch.Tensor, labels: torch.Tensor, background: int = BACKGROUND_DIGIT) -> float:
    """Accuracy over visual tokens that belong to a note."""
    kept = (labels >= 0) & (labels != background)
    return float((logits.flatten(0, 1).argmax(-1)[kept] == labels[kept]).float().mean())


def pretrain_base(
    out_dir: str | os.PathLike[str],
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
    settings: PretrainSettings | None = None,
) -> Path:
    """Train the base model from scratch and write its folder; returns the folder.

    Besides the usual transformers files (bf16 weights) the folder holds `training_log.json`: settings, seed, curve,
    versions, wall time and the final metrics on validation photos and digits, the caption accuracy measured on the
    folder as reloaded. bf16 autocast is used where the CPU has avx512_bf16, fp32 elsewhere. The global random state of
    torch is left as it was.

    Args:
        out_dir: new folder, or one that holds a model to replace.
        on_progress: called as `on_progress(done, total)` after every update and every batch of cached features.
    """
    import torch

    settings = settings or PretrainSettings()
    started, cpu_started = time.perf_counter(), time.process_time()
    with torch.random.fork_rng(devices=[]):
        run = _Pretraining(settings, seed, on_progress)
        run.train_vision()
        vision_seconds = time.perf_counter() - started
        run.take_words_from_heads()
        run.train_captions()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    scenes = validation_scenes(settings.validation_images)
    metrics = run.validate(scenes)
    folder = save_base(run.model, run.tokenizer, out_dir)
    metrics["caption_accuracy"] = caption_accuracy(*load_base(folder), scenes)
    log = {
        "seed": seed,
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "autocast": "bf16" if run.bf16 else "off",
        "seconds": {
            "vision": round(vision_seconds, 1),
            "caption": round(seconds - vision_seconds, 1),
            "cpu": round(cpu_seconds, 1),
        },
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "validation": {name: round(value, 4) for name, value in metrics.items()},
        "curve": run.curve,
    }
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return folder


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "numpy", "pillow", "scikit-learn", "scikit-image")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
