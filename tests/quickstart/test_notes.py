import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from vreflection.quickstart import notes
from vreflection.quickstart.photos import SPLITS, photos_of


def test_digits_are_disjoint_across_splits_and_counted():
    owned = {split: set(notes.digit_indices(split)) for split in SPLITS}
    assert {split: len(indices) for split, indices in owned.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert len(set.union(*owned.values())) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_stay_inside_their_split(split):
    owned, photos = set(notes.digit_indices(split)), {photo.name for photo in photos_of(split)}
    for index in range(20):
        scene = notes.scene_at(split, index, seed=3)
        assert scene.photo in photos
        assert {note.digit_index for note in scene.notes} <= owned


def test_scene_geometry():
    for index in range(50):
        scene = notes.scene_at("train", index, seed=0)
        assert scene.pixels_HWC.shape == (224, 224, 3) and scene.pixels_HWC.dtype == np.uint8
        assert len(scene.notes) == 5 and len({note.colour for note in scene.notes}) == 5
        for note in scene.notes:
            assert note.size in (42, 56) and note.x % 14 == note.y % 14 == 0
            assert 0 <= note.x <= 224 - note.size and 0 <= note.y <= 224 - note.size
        for one, two in itertools.combinations(scene.notes, 2):
            apart_x = one.x + one.size <= two.x or two.x + two.size <= one.x
            apart_y = one.y + one.size <= two.y or two.y + two.size <= one.y
            assert apart_x or apart_y


def test_rendering_is_a_function_of_split_index_and_seed():
    first, again = (notes.scene_at("test", 7, seed=1) for _ in range(2))
    assert np.array_equal(first.pixels_HWC, again.pixels_HWC) and first.notes == again.notes
    others = [notes.scene_at("test", 8, 1), notes.scene_at("test", 7, 2), notes.scene_at("train", 7, 1)]
    assert all(not np.array_equal(first.pixels_HWC, other.pixels_HWC) for other in others)


def nearest_colour(pixels: np.ndarray) -> str:
    names = list(notes.COLOURS)
    palette = np.array([notes.COLOURS[name] for name in names], dtype=float)
    return names[int(np.linalg.norm(palette - pixels, axis=1).argmin())]


def test_box_covers_the_asked_note_in_the_written_image(tmp_path):
    listing = notes.write_dataset(tmp_path, "validation", 24, seed=5)
    for row in json.loads(listing.read_text()):
        pixels = np.asarray(Image.open(tmp_path / "images" / row["image"])).astype(float)
        x0, y0, x1, y1 = (round(edge * 224) for edge in row["bboxes"][0])
        asked = re.search(r"on the (\w+) note", row["conversations"][0]["value"]).group(1)
        # Two pixels of margin carry no ink, so the frame just inside the box shows the paper.
        inside = [pixels[y0 + 1, x0 + 1 : x1 - 1], pixels[y1 - 2, x0 + 1 : x1 - 1]]
        inside += [pixels[y0 + 1 : y1 - 1, x0 + 1], pixels[y0 + 1 : y1 - 1, x1 - 2]]
        for edge in inside:
            assert nearest_colour(np.median(edge, axis=0)) == asked
            assert np.abs(edge - np.median(edge, axis=0)).max() < 45  # paper all along, up to JPEG ringing
        assert pixels[y0:y1, x0:x1].min() < 80  # ink


def test_rows_follow_the_visual_cot_schema(tmp_path):
    listing = notes.write_dataset(tmp_path, "test", 6, seed=0)
    assert listing == tmp_path / "test.json"
    rows = json.loads(listing.read_text())
    assert [row["question_id"] for row in rows] == list(range(6))
    for index, row in enumerate(rows):
        assert set(row) == {"dataset", "split", "question_id", "image", "conversations", "bboxes"}
        assert row["image"] == f"notes/test_{index:05d}.jpg"
        human, gpt = row["conversations"]
        assert human["from"] == "human"
        assert re.fullmatch(r"<image>\nwhat digit is on the \w+ note \?", human["value"])
        assert gpt["from"] == "gpt" and re.fullmatch(r"<lvr>\n<answer> \d </answer>", gpt["value"])
        ((x0, y0, x1, y1),) = row["bboxes"]
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    scene = notes.scene_at("test", 4, 0)
    assert f"> {scene.notes[0].digit} <" in rows[4]["conversations"][1]["value"]


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dataset_bytes_are_deterministic_and_a_prefix_of_larger_ones(tmp_path):
    ticks = []
    notes.write_dataset(tmp_path / "a", "train", 4, seed=9, on_progress=lambda *tick: ticks.append(tick))
    notes.write_dataset(tmp_path / "b", "train", 4, seed=9)
    notes.write_dataset(tmp_path / "c", "train", 6, seed=9)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    small, same, large = (read_all(tmp_path / name) for name in "abc")
    assert small == same and len(small) == 5
    assert all(large[name] == data for name, data in small.items() if name.suffix == ".jpg")


def test_interrupted_write_leaves_nothing_and_keeps_the_old_dataset(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notes.write_dataset(tmp_path, "train", 5, seed=0, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    notes.write_dataset(tmp_path, "train", 2, seed=0)
    before = read_all(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        notes.write_dataset(tmp_path, "train", 5, seed=1, on_progress=interrupt)
    assert read_all(tmp_path) == before


def test_smaller_rewrite_removes_stale_images_and_spares_other_splits(tmp_path):
    notes.write_dataset(tmp_path, "test", 2)
    notes.write_dataset(tmp_path, "train", 4)
    notes.write_dataset(tmp_path, "train", 3)
    names = sorted(path.name for path in (tmp_path / "images" / "notes").iterdir())
    assert names == ["test_00000.jpg", "test_00001.jpg", "train_00000.jpg", "train_00001.jpg", "train_00002.jpg"]
    with pytest.raises(ValueError, match="count"):
        notes.write_dataset(tmp_path, "train", 0)
