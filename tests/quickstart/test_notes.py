import itertools

import numpy as np
import pytest

from vreflection.quickstart import notes
from vreflection.quickstart.photos import SPLITS, photos_of


def test_digits_are_disjoint_across_splits_and_counted():
    owned = {split: set(notes.digit_indices(split)) for split in SPLITS}
    assert {split: len(indices) for split, indices in owned.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert len(set.union(*owned.values())) == 1797


def scenes(split, count, number=5, framed=False):
    return [notes.random_scene(split, np.random.default_rng([3, i]), number, framed) for i in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_stay_inside_their_split(split):
    owned, photos = set(notes.digit_indices(split)), {photo.name for photo in photos_of(split)}
    for scene in scenes(split, 20, framed=True):
        assert scene.photo in photos
        assert {note.digit_index for note in scene.notes} <= owned


@pytest.mark.parametrize(("framed", "sizes"), [(False, (42, 56)), (True, (56,))])
def test_scene_geometry(framed, sizes):
    for scene in scenes("train", 40, 6, framed):
        assert scene.pixels_HWC.shape == (224, 224, 3) and scene.pixels_HWC.dtype == np.uint8
        assert len(scene.notes) == 6 and len({note.colour for note in scene.notes}) == 6
        for note in scene.notes:
            assert note.size in sizes and note.x % 14 == note.y % 14 == 0
            assert 0 <= note.x <= 224 - note.size and 0 <= note.y <= 224 - note.size
            assert (note.frame in notes.COLOURS and note.frame != note.colour) if framed else note.frame is None
        for one, two in itertools.combinations(scene.notes, 2):
            apart_x = one.x + one.size <= two.x or two.x + two.size <= one.x
            apart_y = one.y + one.size <= two.y or two.y + two.size <= one.y
            assert apart_x or apart_y


def test_crowded_scenes_take_what_fits():
    counts = [len(scene.notes) for scene in scenes("train", 5, 14, framed=True)]
    assert min(counts) > 6 and max(counts) > 8 and max(counts) <= 14


def nearest_colour(pixels: np.ndarray) -> str:
    palette = np.array([notes.COLOURS[name] for name in notes.COLOUR_NAMES], dtype=float)
    return notes.COLOUR_NAMES[int(np.linalg.norm(palette - np.median(pixels, axis=0), axis=1).argmin())]


def test_a_framed_note_shows_its_frame_its_paper_and_its_ink():
    for scene in scenes("test", 10, 6, framed=True):
        for note in scene.notes:
            square = scene.pixels_HWC[note.y : note.y + note.size, note.x : note.x + note.size].astype(float)
            frame, inner = square[: notes.FRAME_WIDTH].reshape(-1, 3), square[notes.FRAME_WIDTH : -notes.FRAME_WIDTH]
            assert nearest_colour(frame) == note.frame
            # Two pixels of margin carry no ink.
            assert nearest_colour(inner[0, notes.FRAME_WIDTH : -notes.FRAME_WIDTH]) == note.colour
            assert inner[:, notes.FRAME_WIDTH : -notes.FRAME_WIDTH].min() < 80


def test_a_full_grid_is_refused():
    with pytest.raises(RuntimeError, match="could not place 40 notes"):
        notes.all_places(np.random.default_rng(0), 40, (4,))
