"""The toy task: coloured notes with handwritten digits pinned on photographs, and its Visual-CoT dataset files.

Shape suffixes: H, W image rows and columns (pixels), C colour channels.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vreflection.quickstart.photos import INSTALL_HINT, SPLITS, check_split, load_photo, photos_of

if TYPE_CHECKING:
    import numpy as np

IMAGE_SIZE = 224  # pixels; 8 x 8 visual tokens of 28 px
CELL = 14  # pixels; notes sit on the patch grid
GRID = IMAGE_SIZE // CELL
NOTE_CELLS = (3, 4)  # 42 or 56 px
NOTES_PER_IMAGE = 5
COLOUR_JITTER = 20  # per channel, in 0..255
JPEG_QUALITY = 95
TEST_DIGITS_PER_CLASS = 36  # 360 of 1,797
VALIDATION_DIGITS_PER_CLASS = 18  # 180 of 1,797

# Bright enough for dark ink; any two stay apart under the jitter.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 62, 58),
    "orange": (244, 146, 44),
    "yellow": (240, 224, 72),
    "green": (84, 178, 82),
    "blue": (72, 122, 232),
    "purple": (152, 88, 206),
    "pink": (246, 152, 200),
    "white": (232, 232, 232),
}
QUESTION = "what digit is on the {colour} note ?"
CAPTION_PROMPT = "list the notes :"

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Note:
    """One square note: `x`, `y`, `size` in pixels (multiples of 14), `digit_index` into the digits of scikit-learn."""

    colour: str
    digit: int
    digit_index: int
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 as fractions of the image."""
        edges = (self.x, self.y, self.x + self.size, self.y + self.size)
        return tuple(edge / IMAGE_SIZE for edge in edges)  # type: ignore[return-value]


@dataclass(frozen=True)
class Scene:
    """One rendered image with everything needed to ask about it."""

    pixels_HWC: np.ndarray  # (224, 224, 3) uint8
    notes: tuple[Note, ...]
    photo: str


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits: (1797, 8, 8) uint8 ink in 0..16 and (1797,) labels."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the quickstart's digits come with scikit-learn: {INSTALL_HINT}") from error
    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


@functools.cache
def digit_indices(split: str) -> tuple[int, ...]:
    """Indices into scikit-learn's 1,797 digits owned by one split; the same for every seed, balanced over classes."""
    import numpy as np

    check_split(split)
    labels = _digits()[1]
    rng = np.random.default_rng(1797)
    first, last = TEST_DIGITS_PER_CLASS, TEST_DIGITS_PER_CLASS + VALIDATION_DIGITS_PER_CLASS
    part = {"test": slice(0, first), "validation": slice(first, last), "train": slice(last, None)}[split]
    chosen = [rng.permutation(np.flatnonzero(labels == digit))[part] for digit in range(10)]
    return tuple(sorted(int(index) for index in np.concatenate(chosen)))


@functools.cache
def _ink(size: int) -> np.ndarray:
    """Every digit upscaled to a note of `size` pixels: (1797, size, size) uint8 opacity, two pixels of margin."""
    import numpy as np
    from PIL import Image

    images = _digits()[0]
    margin = 2
    inner = size - 2 * margin
    ink = np.zeros((len(images), size, size), dtype=np.uint8)
    for index, image in enumerate(images):
        scaled = (image.astype(np.float32) * (255 / 16)).clip(0, 255).astype(np.uint8)
        big = Image.fromarray(scaled).resize((inner, inner), Image.Resampling.BICUBIC)
        ink[index, margin:-margin, margin:-margin] = np.asarray(big)
    return ink


@functools.cache
def _photo_pyramid(name: str) -> tuple[np.ndarray, ...]:
    """A photo at full size and at smaller scales, as long as a 224-px crop fits."""
    import numpy as np
    from PIL import Image

    full = load_photo(name)
    height, width = full.shape[:2]
    levels = [full]
    for scale in (0.75, 0.55, 0.4, 0.25):
        rows, columns = round(height * scale), round(width * scale)
        if min(rows, columns) >= IMAGE_SIZE + CELL:
            levels.append(np.asarray(Image.fromarray(full).resize((columns, rows), Image.Resampling.LANCZOS)))
    return tuple(levels)


def _crop(rng: np.random.Generator, split: str) -> tuple[np.ndarray, str]:
    """A random 224x224 crop (scale, place, mirror) of one of the split's photos."""
    photos = photos_of(split)
    name = photos[rng.integers(len(photos))].name
    levels = _photo_pyramid(name)
    level = levels[rng.integers(len(levels))]
    top = rng.integers(level.shape[0] - IMAGE_SIZE + 1)
    left = rng.integers(level.shape[1] - IMAGE_SIZE + 1)
    crop = level[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return (crop[:, ::-1] if rng.random() < 0.5 else crop).copy(), name


def _places(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """Up to `count` non-overlapping squares as (column, row, cells); fewer only when the grid is full."""
    import numpy as np

    for _ in range(20):
        taken = np.zeros((GRID, GRID), dtype=bool)
        places: list[tuple[int, int, int]] = []
        for _ in range(12 * count):
            cells = NOTE_CELLS[rng.integers(len(NOTE_CELLS))]
            column, row = rng.integers(GRID - cells + 1, size=2)
            window = taken[row : row + cells, column : column + cells]
            if window.any():
                continue
            window[:] = True
            places.append((int(column), int(row), cells))
            if len(places) == count:
                return places
        if count > NOTES_PER_IMAGE:  # crowded pre-training scenes take what fits
            return places
    raise RuntimeError(f"could not place {count} notes on a {GRID}x{GRID} grid")


def _draw(pixels_HWC: np.ndarray, note: Note, rng: np.random.Generator) -> None:
    """Paint one note and its digit in place."""
    import numpy as np

    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
    paper = np.clip(np.array(COLOURS[note.colour]) + jitter, 0, 255)
    opacity = _ink(note.size)[note.digit_index].astype(np.float32)[..., None] / 255
    painted = paper * (1 - 0.88 * opacity)  # the ink keeps 12 % of the paper's colour
    pixels_HWC[note.y : note.y + note.size, note.x : note.x + note.size] = painted.round().astype(np.uint8)


def make_scene(split: str, rng: np.random.Generator, count: int = NOTES_PER_IMAGE) -> Scene:
    """Render one scene from the photos and digits of `split`.

    Args:
        split: train, validation or test.
        rng: NumPy generator; the scene is a function of its state alone.
        count: notes to place. Up to 8 notes have distinct colours; above that colours repeat and, when the
            grid is full, fewer notes are placed.
    """
    pixels_HWC, photo = _crop(rng, split)
    labels = _digits()[1]
    owned = digit_indices(split)
    names = list(COLOURS)
    notes = []
    places = _places(rng, count)
    order = rng.permutation(len(names)) if len(places) <= len(names) else rng.integers(len(names), size=len(places))
    for (column, row, cells), colour in zip(places, order):
        index = owned[rng.integers(len(owned))]
        note = Note(names[colour], int(labels[index]), index, column * CELL, row * CELL, cells * CELL)
        _draw(pixels_HWC, note, rng)
        notes.append(note)
    return Scene(pixels_HWC, tuple(notes), photo)


def scene_at(split: str, index: int, seed: int) -> Scene:
    """The scene number `index` of the dataset (`split`, `seed`): independent of how many others are drawn."""
    import numpy as np

    return make_scene(split, np.random.default_rng([seed, SPLITS.index(check_split(split)), index]))


def _row(split: str, index: int, scene: Scene, asked: Note) -> dict:
    question = QUESTION.format(colour=asked.colour)
    return {
        "dataset": "notes",
        "split": split,
        "question_id": index,
        "image": f"notes/{split}_{index:05d}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": f"<lvr>\n<answer> {asked.digit} </answer>"},
        ],
        "bboxes": [list(asked.box)],
    }


def write_dataset(
    out_dir: str | os.PathLike[str],
    split: str,
    count: int,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Write `count` images with one question each and return the path of the Visual-CoT file.

    Layout: `out_dir/<split>.json` (a list of rows) and `out_dir/images/notes/<split>_00000.jpg`; a row's `image` is
    relative to `out_dir/images`. Boxes are x0, y0, x1, y1 as fractions of the image. The same arguments give the
    same bytes, and row i does not depend on `count`. Everything is first written to a temporary folder inside
    `out_dir`; the JSON file appears last, so a file that exists is complete.

    Args:
        on_progress: called as `on_progress(done, total)` after every image.
    """
    from PIL import Image

    check_split(split)
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=out_dir))
    try:
        rows = []
        for index in range(count):
            scene = scene_at(split, index, seed)
            row = _row(split, index, scene, scene.notes[0])
            Image.fromarray(scene.pixels_HWC).save(staging / Path(row["image"]).name, quality=JPEG_QUALITY)
            rows.append(row)
            if on_progress is not None:
                on_progress(index + 1, count)
        listing = staging / f"{split}.json"
        listing.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return _publish(staging, listing, out_dir, split)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, listing: Path, out_dir: Path, split: str) -> Path:
    """Move finished files into place: an older listing goes first, the new one comes last."""
    final = out_dir / listing.name
    final.unlink(missing_ok=True)
    images = out_dir / "images" / "notes"
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.glob(f"{split}_*.jpg"):
        stale.unlink()
    for path in sorted(staging.glob("*.jpg")):
        path.replace(images / path.name)
    listing.replace(final)
    return final
