import json
import re

import numpy as np
import pytest
from PIL import Image

from vreflection.data.visual_cot import read_visual_cot
from vreflection.errors import ConfigError
from vreflection.quickstart import tasks
from vreflection.quickstart.notes import COLOUR_NAMES, COLOURS

FOLLOW, ONE_HOP = tasks.TASKS["follow_the_notes"], tasks.TASKS["one_hop"]


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_rendering_is_a_function_of_task_split_index_and_seed(task):
    first, again = (tasks.scene_at(task, "test", 7, seed=1) for _ in range(2))
    assert np.array_equal(first.pixels_HWC, again.pixels_HWC) and first.notes == again.notes
    others = [
        tasks.scene_at(task, "test", 8, 1),
        tasks.scene_at(task, "test", 7, 2),
        tasks.scene_at(task, "train", 7, 1),
    ]
    assert all(not np.array_equal(first.pixels_HWC, other.pixels_HWC) for other in others)
    assert len(first.notes) == task.notes


def test_every_frame_names_the_next_note_of_the_path():
    last_targets = set()
    for index in range(60):
        scene = tasks.scene_at(FOLLOW, "train", index, 0)
        by_colour = {note.colour: place for place, note in enumerate(scene.notes)}
        targets = [by_colour[note.frame] for note in scene.notes]  # every frame has the colour of a note that is there
        assert targets[:4] == [1, 2, 3, 4]
        assert all(target != place for place, target in enumerate(targets))
        last_targets.add(targets[4])
    # The end of the path is not marked by where it points.
    assert len(last_targets) == 5


def test_rows_carry_a_box_and_a_span_per_note_of_the_path_and_the_answer_of_the_last(tmp_path):
    listing = tasks.write_dataset(tmp_path, FOLLOW, "test", 4, seed=2)
    rows = json.loads(listing.read_text())
    assert [row["question_id"] for row in rows] == [f"{i}-{k}" for i in range(4) for k in range(5)]
    for row in rows:
        index, hops = map(int, row["question_id"].split("-"))
        scene = tasks.scene_at(FOLLOW, "test", index, 2)
        human, gpt = (turn["value"] for turn in row["conversations"])
        assert human == f"<image>\nstart at the {scene.notes[0].colour} note , follow {hops} times : what digit ?"
        assert gpt == "<lvr>" * (hops + 1) + f"\n<answer> {scene.notes[hops].digit} </answer>"
        assert row["bboxes"] == [list(note.box) for note in scene.notes[: hops + 1]]
    # Through the ordinary reader, and with the same digits that a reader of the picture would find.
    samples, report = read_visual_cot(listing, tmp_path / "images", "raise")
    assert report.kept == 20 and [tasks.hops_of(sample) for sample in samples[:5]] == [0, 1, 2, 3, 4]


def test_chain_rows_say_the_same_in_words(tmp_path):
    tasks.write_dataset(tmp_path, FOLLOW, "train", 3, seed=0, questions_per_image=5)
    rows = json.loads((tmp_path / "train.json").read_text())
    chains = json.loads((tmp_path / "train_chain.json").read_text())
    for row, chain in zip(rows, chains, strict=True):
        assert {k: row[k] for k in ("question_id", "image")} == {k: chain[k] for k in ("question_id", "image")}
        assert row["conversations"][0] == chain["conversations"][0] and chain["bboxes"] == []
        words, answer = chain["conversations"][1]["value"].split("\n")
        assert answer == row["conversations"][1]["value"].split("\n")[1]
        triples = re.findall(r" (\w+) (\w+) (\d)", words)
        assert len(triples) == len(row["bboxes"]) and answer == f"<answer> {triples[-1][2]} </answer>"
        assert all(frame == following[0] for (_, frame, _), following in zip(triples, triples[1:]))


def test_one_hop_rows_have_one_box_and_one_span(tmp_path):
    rows = json.loads(tasks.write_dataset(tmp_path, ONE_HOP, "validation", 24, seed=5).read_text())
    assert len(rows) == 24
    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / "images" / row["image"])).astype(float)
        ((x0, y0, x1, y1),) = ([round(edge * 224) for edge in box] for box in row["bboxes"])
        named = re.fullmatch(r"<image>\nwhat digit is on the (\w+) note \?", row["conversations"][0]["value"])[1]
        # Two pixels of margin carry no ink, so the paper shows just inside the box.
        for edge in (pixels[y0 + 1, x0 + 1 : x1 - 1], pixels[y0 + 1 : y1 - 1, x1 - 2]):
            paper = np.median(edge, axis=0)
            distance = np.linalg.norm(np.array([COLOURS[name] for name in COLOUR_NAMES]) - paper, axis=1)
            assert COLOUR_NAMES[int(distance.argmin())] == named
        assert re.fullmatch(r"<lvr>\n<answer> \d </answer>", row["conversations"][1]["value"])


def test_training_images_are_asked_a_random_few_numbers_of_hops():
    asked = [tasks.asked_hops(FOLLOW, "train", index, 0, 2) for index in range(200)]
    assert all(len(set(hops)) == 2 for hops in asked)
    counts = np.bincount(np.concatenate(asked), minlength=5)
    assert counts.min() > 50  # 80 each on average
    assert tasks.asked_hops(FOLLOW, "test", 0, 0, 2) == [0, 1, 2, 3, 4]


def read_all(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dataset_bytes_are_deterministic_and_a_prefix_of_larger_ones(tmp_path):
    ticks = []
    tasks.write_dataset(tmp_path / "a", FOLLOW, "train", 4, 9, on_progress=lambda *tick: ticks.append(tick))
    tasks.write_dataset(tmp_path / "b", FOLLOW, "train", 4, 9)
    tasks.write_dataset(tmp_path / "c", FOLLOW, "train", 6, 9)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    small, same, large = (read_all(tmp_path / name) for name in "abc")
    assert small == same and len(small) == 6
    assert all(large[name] == data for name, data in small.items() if name.suffix == ".jpg")


def test_interrupted_write_leaves_nothing_and_keeps_the_old_dataset(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tasks.write_dataset(tmp_path, FOLLOW, "train", 5, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    tasks.write_dataset(tmp_path, FOLLOW, "train", 2)
    before = read_all(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tasks.write_dataset(tmp_path, FOLLOW, "train", 5, seed=1, on_progress=interrupt)
    assert read_all(tmp_path) == before


def test_smaller_rewrite_removes_stale_images_and_spares_other_splits(tmp_path):
    tasks.write_dataset(tmp_path, ONE_HOP, "test", 2)
    tasks.write_dataset(tmp_path, ONE_HOP, "train", 4)
    tasks.write_dataset(tmp_path, ONE_HOP, "train", 3)
    names = sorted(path.name for path in (tmp_path / "images" / "notes").iterdir())
    assert names == ["test_00000.jpg", "test_00001.jpg", "train_00000.jpg", "train_00001.jpg", "train_00002.jpg"]
    with pytest.raises(ValueError, match="images must be at least 1"):
        tasks.write_dataset(tmp_path, ONE_HOP, "train", 0)


def test_an_unknown_task_is_named():
    with pytest.raises(ConfigError, match="expected one of follow_the_notes, one_hop, got 'hop'"):
        tasks.task_named("hop")
