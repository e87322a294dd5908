"""Pre-train the quickstart's base from random weights, in two phases.

1. Vision tower: every visual token names the digit, the paper and the frame of its note.
2. Captions: the language model lists the notes of an image, from the now frozen visual tokens.

It never sees a question. Reads training photos and training digits only.
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
)
from vreflection.quickstart.notes import CELL, COLOURS, GRID, ProgressCallback, Scene, random_scene
from vreflection.quickstart.tasks import TASKS, FollowTheNotes, OneHop, scene_at
from vreflection.quickstart.tokenizer import build_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

IGNORED = -100
HEADS_FILE = "vision_heads.safetensors"
# Dense labels of a visual token: classes without the background, and the background's weight in the loss.
LABELS = {"digit": (10, 0.1), "colour": (len(COLOURS), 0.2), "frame": (len(COLOURS), 0.2)}
FOLLOW, ONE_HOP = FollowTheNotes(), OneHop()


@dataclass(frozen=True)
class PretrainSettings:
    """The recipe. Steps count optimiser updates; learning rates follow a warm-up and a cosine down to 10 %.

    Attributes:
        layers: of the language model. vision_from: folder of a base whose vision tower is taken over, with its part of
            the log; then no vision step is made. caption_images: their visual tokens are computed once and reused; one
            in four is without frames. crowded_notes: three of four vision batches hold up to this many. word_norm: of
            the digit and colour embeddings that are taken from the dense heads.
    """

    layers: int = 4
    vision_from: str | None = None
    vision_steps: int = 800
    caption_steps: int = 350
    caption_images: int = 2048
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    warm_up: int = 20
    clip: float = 1.0
    crowded_notes: int = 14
    word_norm: float = 0.97
    validation_images: int = 256


def token_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Digit, paper and frame colour per visual token, `(64,)` int64 each; the last class is the background.

    A token belongs to the note that covers most of its four cells; a tie between notes is ignored (-100). A note
    without a frame has the background's.
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
    tied = ranked[:, -1] == ranked[:, -2]
    empty = ranked[:, -1] == 0
    names = list(COLOURS)
    classes = {
        "digit": [note.digit for note in scene.notes],
        "colour": [names.index(note.colour) for note in scene.notes],
        "frame": [len(names) if note.frame is None else names.index(note.frame) for note in scene.notes],
    }
    return {
        name: np.where(empty, LABELS[name][0], np.where(tied, IGNORED, np.array(of_notes)[best]))
        for name, of_notes in classes.items()
    }


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
        self.model = Qwen2_5_VLForConditionalGeneration(base_config(self.tokenizer, settings.layers)).float()
        initialise(self.model)
        width = self.model.config.text_config.hidden_size
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, classes + 1) for name, (classes, _) in LABELS.items()}
        )
        initialise(self.heads)
        self.seed, self.rng = seed, np.random.default_rng([seed, 224])
        self.bf16 = autocast_bf16()
        self.curve: list[dict[str, float | str]] = []
        self.pool_batches = math.ceil(settings.caption_images / settings.batch_size)
        self.vision_steps = 0 if settings.vision_from else settings.vision_steps
        self.total = self.vision_steps + self.pool_batches + settings.caption_steps
        self.done = 0

    def autocast(self) -> torch.autocast:
        import torch

        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)

    def scenes(self, count: int, framed: bool) -> list[Scene]:
        return [random_scene("train", self.rng, count, framed) for _ in range(self.settings.batch_size)]

    def features(self, scenes: list[Scene]) -> torch.Tensor:
        import numpy as np

        pixels = pack_pixels(np.stack([scene.pixels_HWC for scene in scenes]))
        return vision_features(self.model.model.visual, pixels, len(scenes))

    def tick(self, phase: str, step: int = 0, **values: float) -> None:
        self.done += 1
        if values and step % 20 == 0:
            self.curve.append({"phase": phase, "step": step, **{k: round(v, 4) for k, v in values.items()}})
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)

    def vision(self) -> float:
        """Train the vision tower, or take another base's; returns the seconds that its training took."""
        import torch

        visual = self.model.model.visual
        if self.settings.vision_from is None:
            started = time.perf_counter()
            self.train_vision()
            # What follows learns from the tower as it will be stored.
            visual.load_state_dict({name: t.to(torch.bfloat16) for name, t in visual.state_dict().items()})
            return time.perf_counter() - started
        from safetensors.torch import load_file

        folder = Path(self.settings.vision_from)
        visual.load_state_dict(load_base(folder)[0].model.visual.state_dict())
        self.heads.load_state_dict(load_file(folder / HEADS_FILE))
        log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
        self.curve += [point for point in log["curve"] if point["phase"] == "vision"]
        return log["seconds"]["vision"]

    def train_vision(self) -> None:
        """Phase one. Of four batches two are crowded with framed notes, one with plain ones, one is as in use."""
        import torch

        settings = self.settings
        modules = [self.model.model.visual, self.heads]
        schedule = _Schedule([p for m in modules for p in m.parameters()], settings.vision_steps, settings)
        for step in range(settings.vision_steps):
            count = FOLLOW.notes if step % 4 == 3 else settings.crowded_notes
            scenes = self.scenes(count, framed=step % 4 != 2)
            labels = _stack_labels(scenes)
            with self.autocast():
                features = self.features(scenes)
                logits = {name: head(features).float().flatten(0, 1) for name, head in self.heads.items()}
            losses = [_dense_loss(logits[name], labels[name], name) for name in LABELS]
            loss = torch.stack(losses).sum()
            schedule.update(loss)
            accuracy = {f"{name}_accuracy": _on_notes(logits[name], labels[name], name) for name in LABELS}
            self.tick("vision", step, loss=loss.item(), **accuracy)

    def take_words_from_heads(self) -> None:
        """Point the embeddings of digits and colours where the dense heads found them in the visual tokens."""
        import torch

        table = self.model.get_input_embeddings().weight
        for words, name in ((map(str, range(10)), "digit"), (COLOURS, "colour")):
            ids = [self.tokenizer(f" {word}").input_ids for word in words]
            assert all(len(pieces) == 1 for pieces in ids), "digits and colours are single tokens"
            rows = self.heads[name].weight[: len(ids)].detach()
            rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1) * self.settings.word_norm
            with torch.no_grad():
                table[torch.tensor(ids).flatten()] = rows

    def train_language(self) -> None:
        """Phase two, on the visual tokens of one pool of images. A batch is framed or not, so of one length."""
        import numpy as np

        # A stream of its own, so that it does not depend on where the tower comes from.
        self.rng = np.random.default_rng([self.seed, 225])
        pool, features_PND = self.caption_pool()
        framed = [place for place, scene in enumerate(pool) if scene.notes[0].frame is not None]
        plain = [place for place, scene in enumerate(pool) if scene.notes[0].frame is None]
        prompt, settings = prompt_ids(self.tokenizer), self.settings
        schedule = _Schedule(list(self.model.model.language_model.parameters()), settings.caption_steps, settings)
        for step in range(settings.caption_steps):
            chosen = self.rng.choice(plain if step % 4 == 2 else framed, settings.batch_size, replace=False)
            captions = [(prompt, self.caption_target(pool[place])) for place in chosen]
            loss, accuracy = self.text_loss(captions, features_PND[chosen])
            schedule.update(loss)
            self.tick("caption", step, loss=loss.item(), token_accuracy=accuracy)

    def caption_pool(self) -> tuple[list[Scene], torch.Tensor]:
        """Captioning images and their visual tokens (images, N, D), from the now frozen tower."""
        import torch

        pool, features = [], []
        for batch in range(self.pool_batches):
            framed = batch % 4 != 3
            scenes = self.scenes(FOLLOW.notes if framed else ONE_HOP.notes, framed)
            with torch.no_grad(), self.autocast():
                features.append(self.features(scenes))
            pool += scenes
            self.tick("features")
        return pool, torch.cat(features)

    def caption_target(self, scene: Scene) -> list[int]:
        """A caption in fresh random orders, of the notes and of what is said of each, and the end of the turn."""
        shuffled = [scene.notes[index] for index in self.rng.permutation(len(scene.notes))]
        caption = caption_text(shuffled, digit_first=self.rng.random() < 0.5)
        return self.tokenizer(caption + "<|im_end|>\n").input_ids

    def text_loss(self, texts: Sequence[tuple[list[int], list[int]]], features) -> tuple[torch.Tensor, float]:
        """Cross-entropy and token accuracy of the targets of (prompt, target) pairs, all of one length."""
        import torch
        from torch.nn import functional as F

        prompt_length = len(texts[0][0])
        input_ids = torch.tensor([prompt + target for prompt, target in texts])
        targets = input_ids[:, prompt_length:]
        with self.autocast():
            hidden = self.language_hidden(input_ids, features)
            logits = self.model.lm_head(hidden[:, prompt_length - 1 : -1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, float((logits.argmax(-1) == targets).float().mean())

    def language_hidden(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
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
        """Accuracies of the dense heads on the visual tokens of notes, on JPEG images."""
        import numpy as np
        import torch

        labels = _stack_labels(scenes)
        pixels = pack_pixels(np.stack([np.asarray(jpeg_round_trip(scene.pixels_HWC)) for scene in scenes]))
        with torch.no_grad():
            features = vision_features(self.model.model.visual, pixels, len(scenes))
            return {
                f"token_{name}_accuracy": _on_notes(head(features).flatten(0, 1), labels[name], name)
                for name, head in self.heads.items()
                if (labels[name] < LABELS[name][0]).logical_and(labels[name] >= 0).any()
            }


def _stack_labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Labels of all visual tokens of a batch, flattened: (B * 64,) int64 each."""
    import numpy as np
    import torch

    labels = [token_labels(scene) for scene in scenes]
    return {name: torch.from_numpy(np.concatenate([of[name] for of in labels])) for name in LABELS}


def _dense_loss(logits: torch.Tensor, labels: torch.Tensor, name: str) -> torch.Tensor:
    import torch
    from torch.nn import functional as F

    classes, background = LABELS[name]
    weight = torch.ones(classes + 1)
    weight[classes] = background
    return F.cross_entropy(logits, labels, weight, ignore_index=IGNORED)


def _on_notes(logits: torch.Tensor, labels: torch.Tensor, name: str) -> float:
    """Accuracy over visual tokens that are not background."""
    on_note = (labels >= 0) & (labels != LABELS[name][0])
    return float((logits.argmax(-1)[on_note] == labels[on_note]).float().mean())


def validation_scenes(task_name: str, count: int, seed: int = 0) -> list[Scene]:
    """The first `count` scenes of a task's validation split (its photos and digits are never trained on)."""
    return [scene_at(TASKS[task_name], "validation", index, seed) for index in range(count)]


def pretrain_base(
    out_dir: str | os.PathLike[str],
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
    settings: PretrainSettings | None = None,
) -> Path:
    """Train the base model from scratch and write its folder; returns the folder.

    Besides the usual transformers files (bf16 weights) the folder holds the dense heads and `training_log.json`:
    settings, seed, curve, versions, wall time and the final metrics on validation photos and digits, those of the
    language model measured on the folder as reloaded. bf16 autocast is used where the CPU has avx512_bf16, fp32
    elsewhere. The global random state of torch is left as it was.

    Args:
        out_dir: new folder, or one that holds a model to replace.
        on_progress: called as `on_progress(done, total)` after every update and every batch of cached features.
    """
    import torch
    from safetensors.torch import save

    settings = settings or PretrainSettings()
    with torch.random.fork_rng(devices=[]):
        run = _Pretraining(settings, seed, on_progress)
        vision_seconds = run.vision()
        language_started = time.perf_counter()
        run.take_words_from_heads()
        run.train_language()
    language_seconds = time.perf_counter() - language_started
    framed = validation_scenes(FOLLOW.name, settings.validation_images)
    plain = validation_scenes(ONE_HOP.name, settings.validation_images)
    metrics = run.validate(framed) | {f"plain_{name}": value for name, value in run.validate(plain).items()}
    folder = save_base(run.model, run.tokenizer, out_dir, {HEADS_FILE: save(run.heads.state_dict())})
    reloaded = load_base(folder)
    metrics["caption_accuracy"] = caption_accuracy(*reloaded, framed)
    metrics["plain_caption_accuracy"] = caption_accuracy(*reloaded, plain)
    log = {
        "seed": seed,
        "settings": {name: value for name, value in asdict(settings).items() if name != "vision_from"},
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "autocast": "bf16" if run.bf16 else "off",
        "seconds": {"vision": round(vision_seconds, 1), "language": round(language_seconds, 1)},
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
