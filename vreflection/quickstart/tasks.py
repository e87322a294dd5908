"""The quickstart's two tasks, and their rows in the Visual-CoT schema.

`follow_the_notes`: every note's frame has the colour of the next note; "start at the red note , follow 3 times : what
digit ?". Each hop depends on what the look before it found, so one look at the image is not enough.
`one_hop`: "what digit is on the red note ?". One look is enough.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .notes import (
    COLOUR_NAMES,
    FRAMED_CELLS,
    JPEG_QUALITY,
    Note,
    ProgressCallback,
    Scene,
    all_places,
    pin_notes,
    random_crop,
    random_scene,
)
from .photos import SPLITS, check_split

if TYPE_CHECKING:
    import numpy as np

    from ..data.visual_cot import Sample

MAX_HOPS = 4


@dataclass(frozen=True)
class Task(ABC):
    """A family of questions about notes.

    Attributes:
        name: on the command line. question: template, with `{colour}` and perhaps `{hops}`.
        hops: numbers of hops that are asked; a row with K hops has K + 1 boxes, hence K + 1 latent spans.
        notes: per image.
    """

    name: str
    question: str
    hops: tuple[int, ...]
    notes: int

    @abstractmethod
    def scene(self, split: str, rng: np.random.Generator) -> Scene:
        """One image; `notes[0]` is the one that questions start at."""

    @abstractmethod
    def path(self, scene: Scene, hops: int) -> tuple[Note, ...]:
        """The notes to look at, in order; the last one carries the answer."""


@dataclass(frozen=True)
class OneHop(Task):
    name: str = "one_hop"
    question: str = "what digit is on the {colour} note ?"
    hops: tuple[int, ...] = (0,)
    notes: int = 5

    def scene(self, split: str, rng: np.random.Generator) -> Scene:
        return random_scene(split, rng, self.notes)

    def path(self, scene: Scene, hops: int) -> tuple[Note, ...]:
        return scene.notes[:1]


@dataclass(frozen=True)
class FollowTheNotes(Task):
    """`scene.notes` lie in path order: the path's five distinct notes, then one off it.

    The last note of the path and the one off it point to random others, so that no note is known by being nobody's
    target or its own path's end.
    """

    name: str = "follow_the_notes"
    question: str = "start at the {colour} note , follow {hops} times : what digit ?"
    hops: tuple[int, ...] = tuple(range(MAX_HOPS + 1))
    notes: int = MAX_HOPS + 2

    def scene(self, split: str, rng: np.random.Generator) -> Scene:
        pixels_HWC, photo = random_crop(rng, split)
        places = all_places(rng, self.notes, FRAMED_CELLS)
        colours = [COLOUR_NAMES[colour] for colour in rng.permutation(len(COLOUR_NAMES))[: self.notes]]
        following = [place + 1 for place in range(MAX_HOPS)]
        for place in range(MAX_HOPS, self.notes):
            following.append(int(rng.choice([other for other in range(self.notes) if other != place])))
        frames = [colours[place] for place in following]
        return Scene(pixels_HWC, pin_notes(split, rng, places, colours, frames, pixels_HWC), photo)

    def path(self, scene: Scene, hops: int) -> tuple[Note, ...]:
        return scene.notes[: hops + 1]


TASKS: dict[str, Task] = {task.name: task for task in (FollowTheNotes(), OneHop())}


def task_named(name: str) -> Task:
    """A task by its name, or ConfigError."""
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def scene_at(task: Task, split: str, index: int, seed: int) -> Scene:
    """Scene number `index` of the data set (`task`, `split`, `seed`): independent of how many others are drawn."""
    import numpy as np

    return task.scene(split, np.random.default_rng([seed, SPLITS.index(check_split(split)), index]))


def question_text(task: Task, scene: Scene, hops: int) -> str:
    return task.question.format(colour=scene.notes[0].colour, hops=hops)


def hops_of(sample: Sample) -> int:
    """Number of hops that a row of one of the tasks asks for."""
    return int(str(sample.question_id).rpartition("-")[2])


def latent_row(task: Task, split: str, index: int, scene: Scene, hops: int) -> dict[str, Any]:
    """One question as a Visual-CoT row: a box and an `<lvr>` per note of the path, in order."""
    path = task.path(scene, hops)
    return {
        "dataset": task.name,
        "split": split,
        "question_id": f"{index}-{hops}",
        "image": f"notes/{split}_{index:05d}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question_text(task, scene, hops)}"},
            {"from": "gpt", "value": "<lvr>" * len(path) + f"\n{answer_text(path)}"},
        ],
        "bboxes": [list(note.box) for note in path],
    }


def answer_text(path: tuple[Note, ...]) -> str:
    return f"<answer> {path[-1].digit} </answer>"


def chain_text(path: tuple[Note, ...]) -> str:
    """Every note of a path in words: paper, frame, digit."""
    return "".join(f" {note.colour}{'' if note.frame is None else f' {note.frame}'} {note.digit}" for note in path)


def chain_row(task: Task, split: str, index: int, scene: Scene, hops: int) -> dict[str, Any]:
    """The same question with the path spelled out in words before the answer, and no box."""
    row, path = latent_row(task, split, index, scene, hops), task.path(scene, hops)
    row["conversations"][1]["value"] = f"{chain_text(path)}\n{answer_text(path)}"
    return {**row, "bboxes": []}


def asked_hops(task: Task, split: str, index: int, seed: int, per_image: int) -> list[int]:
    """Which numbers of hops are asked about an image: all of them on held-out images, else a random few."""
    import numpy as np

    if split != "train" or per_image >= len(task.hops):
        return list(task.hops)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 1])
    return sorted(int(hops) for hops in rng.choice(task.hops, per_image, replace=False))


def write_dataset(
    out_dir: str | os.PathLike[str],
    task: Task,
    split: str,
    images: int,
    seed: int = 0,
    questions_per_image: int = 1,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Write `images` images with their questions and return the path of the Visual-CoT file.

    Layout: `out_dir/<split>.json` (a list of rows), `out_dir/<split>_chain.json` (the same questions, answered in
    words) and `out_dir/images/notes/<split>_00000.jpg`; a row's `image` is relative to `out_dir/images`. Boxes are x0,
    y0, x1, y1 as fractions of the image, in the order of the hops. The same arguments give the same bytes, and image i
    does not depend on `images`. Everything is first written to a temporary folder inside `out_dir`; `<split>.json`
    appears last, so a file that exists is complete.

    Args:
        questions_per_image: of the training split; held-out images are asked every number of hops.
        on_progress: called as `on_progress(done, total)` after every image.
    """
    from PIL import Image

    check_split(split)
    if images < 1:
        raise ValueError(f"images must be at least 1; got {images}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=out_dir))
    try:
        rows: list[dict[str, Any]] = []
        chains: list[dict[str, Any]] = []
        for index in range(images):
            scene = scene_at(task, split, index, seed)
            for hops in asked_hops(task, split, index, seed, questions_per_image):
                rows.append(latent_row(task, split, index, scene, hops))
                chains.append(chain_row(task, split, index, scene, hops))
            Image.fromarray(scene.pixels_HWC).save(staging / Path(rows[-1]["image"]).name, quality=JPEG_QUALITY)
            if on_progress is not None:
                on_progress(index + 1, images)
        (staging / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (staging / f"{split}_chain.json").write_text(json.dumps(chains, indent=1), encoding="utf-8")
        return _publish(staging, out_dir, split)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, out_dir: Path, split: str) -> Path:
    """Move complete files into place: the older listing goes first, the new one comes last."""
    final = out_dir / f"{split}.json"
    final.unlink(missing_ok=True)
    images = out_dir / "images" / "notes"
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.glob(f"{split}_*.jpg"):
        stale.unlink()
    for path in sorted(staging.glob("*.jpg")):
        path.replace(images / path.name)
    (staging / f"{split}_chain.json").replace(out_dir / f"{split}_chain.json")
    (staging / final.name).replace(final)
    return final
