"""Coloured notes with handwritten digits, pinned on photographs: what the tasks of the quickstart are drawn from.

Shape suffixes: H, W image rows and columns (pixels), C colour channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vreflection.quickstart.photos import INSTALL_HINT, check_split, load_photo, photos_of

if TYPE_CHECKING:
    import numpy as np

IMAGE_SIZE = 224  # pixels; 8 x 8 visual tokens of 28 px
CELL = 14  # pixels; notes sit on the patch grid
GRID = IMAGE_SIZE // CELL
PLAIN_CELLS = (3, 4)  # notes without a frame: 42 or 56 px
FRAMED_CELLS = (4,)  # notes with one: 56 px
FRAME_WIDTH = 5  # pixels
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
COLOUR_NAMES = tuple(COLOURS)

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Note:
    """One square note.

    Attributes:
        colour: of the paper. digit, digit_index: what is written on it, and which of scikit-learn's digits that is.
        x, y, size: pixels, multiples of 14. frame: colour of the frame, or None.
    """

    colour: str
    digit: int
    digit_index: int
    x: int
    y: int
    size: int
    frame: str | None = None

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


def random_crop(rng: np.random.Generator, split: str) -> tuple[np.ndarray, str]:
    """A random 224x224 crop (scale, place, mirror) of one of the split's photos."""
    photos = photos_of(split)
    name = photos[rng.integers(len(photos))].name
    levels = _photo_pyramid(name)
    level = levels[rng.integers(len(levels))]
    top = rng.integers(level.shape[0] - IMAGE_SIZE + 1)
    left = rng.integers(level.shape[1] - IMAGE_SIZE + 1)
    crop = level[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return (crop[:, ::-1] if rng.random() < 0.5 else crop).copy(), name


def free_places(rng: np.random.Generator, count: int, cells: Sequence[int]) -> list[tuple[int, int, int]]:
    """Up to `count` squares that do not overlap, as (column, row, cells); fewer only when the grid is full.

    Args:
        cells: sizes to choose from, in cells of 14 pixels.
    """
    import numpy as np

    most: list[tuple[int, int, int]] = []
    for _ in range(20):
        taken = np.zeros((GRID, GRID), dtype=bool)
        places: list[tuple[int, int, int]] = []
        for _ in range(12 * count):
            size = cells[int(rng.integers(len(cells)))]
            column, row = rng.integers(GRID - size + 1, size=2)
            window = taken[row : row + size, column : column + size]
            if window.any():
                continue
            window[:] = True
            places.append((int(column), int(row), size))
            if len(places) == count:
                return places
        most = max(most, places, key=len)
        if count > len(COLOURS):  # crowded pre-training scenes take what fits
            break
    return most


def all_places(rng: np.random.Generator, count: int, cells: Sequence[int]) -> list[tuple[int, int, int]]:
    """Exactly `count` places."""
    for _ in range(20):
        places = free_places(rng, count, cells)
        if len(places) == count:
            return places
    raise RuntimeError(f"could not place {count} notes on a {GRID}x{GRID} grid")


def draw_note(pixels_HWC: np.ndarray, note: Note, rng: np.random.Generator) -> None:
    """Paint one note, its frame and its digit in place."""
    import numpy as np

    def jittered(colour: str) -> np.ndarray:
        jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
        return np.clip(np.array(COLOURS[colour]) + jitter, 0, 255)

    paper, left, top, size = jittered(note.colour), note.x, note.y, note.size
    if note.frame is not None:
        pixels_HWC[top : top + size, left : left + size] = jittered(note.frame)
        left, top, size = left + FRAME_WIDTH, top + FRAME_WIDTH, size - 2 * FRAME_WIDTH
    opacity = _ink(size)[note.digit_index].astype(np.float32)[..., None] / 255
    painted = paper * (1 - 0.88 * opacity)  # the ink keeps 12 % of the paper's colour
    pixels_HWC[top : top + size, left : left + size] = painted.round().astype(np.uint8)


def pin_notes(
    split: str,
    rng: np.random.Generator,
    places: Sequence[tuple[int, int, int]],
    colours: Sequence[str],
    frames: Sequence[str | None],
    pixels_HWC: np.ndarray,
) -> tuple[Note, ...]:
    """Draw notes with random digits of the split at `places`, in that order."""
    labels, owned = _digits()[1], digit_indices(split)
    notes = []
    for (column, row, cells), colour, frame in zip(places, colours, frames, strict=True):
        index = owned[rng.integers(len(owned))]
        note = Note(colour, int(labels[index]), index, column * CELL, row * CELL, cells * CELL, frame)
        draw_note(pixels_HWC, note, rng)
        notes.append(note)
    return tuple(notes)


def random_scene(split: str, rng: np.random.Generator, count: int, framed: bool = False) -> Scene:
    """Notes of random colours anywhere on a crop of one of the split's photos.

    Args:
        split: train, validation or test.
        rng: NumPy generator; the scene is a function of its state alone.
        count: notes to place. Up to 8 notes have distinct colours; above that colours repeat and, when the grid is
            full, fewer notes are placed.
        framed: give every note a frame of a random other colour.
    """
    pixels_HWC, photo = random_crop(rng, split)
    few = count <= len(COLOURS)
    places = (all_places if few else free_places)(rng, count, FRAMED_CELLS if framed else PLAIN_CELLS)
    kinds = len(COLOUR_NAMES)
    order = rng.permutation(kinds)[: len(places)] if few else rng.integers(kinds, size=len(places))
    colours = [COLOUR_NAMES[colour] for colour in order]
    frames: list[str | None] = [None] * len(places)
    if framed:
        frames = [COLOUR_NAMES[(colour + 1 + rng.integers(kinds - 1)) % kinds] for colour in order]
    return Scene(pixels_HWC, pin_notes(split, rng, places, colours, frames, pixels_HWC), photo)
