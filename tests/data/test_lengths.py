"""Lengths that are kept from one start to the next hold only what is still so."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from vreflection.data import images, lengths
from vreflection.data.encode import LatentDataset
from vreflection.data.lengths import measure_lengths
from vreflection.data.rows import open_rows
from vreflection.errors import DataError


def picture(path, h, w, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def rows(write_rows, row):
    text = [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a"}]
    return write_rows(
        [
            row(bboxes=[[-0.01, 0.2, 0.6, 0.7]]),  # clamped
            row(image="notes/b.png"),
            row(image=..., bboxes=..., conversations=text),
            row(image="notes/b.png", question_id=8),
        ]
    )


@pytest.fixture
def measure(rows, processor, image_folder, tmp_path, monkeypatch):
    """`measure()` measures against one cache; `measure.rows` are those measured anew by the last call."""
    seen = []
    plain = lengths.measure_sample
    monkeypatch.setattr(lengths, "measure_sample", lambda data, index: (seen.append(index), plain(data, index))[1])

    def measured(folder=image_folder, path=rows, **options):
        seen.clear()
        dataset = LatentDataset(open_rows(path, folder), processor, **options)
        found = measure_lengths(dataset, cache=tmp_path / "lengths.npz")
        measured.rows = list(seen)
        return found

    return measured


def same(one, other):
    return one.tokens.tolist() == other.tokens.tolist() and one.clamped == other.clamped


def test_what_did_not_change_is_not_measured_again(measure):
    first = measure()
    assert measure.rows == [0, 1, 2, 3] and first.clamped == 1 and first.tokens.all()
    assert same(measure(), first) and measure.rows == []
    measure(num_latents=4)
    assert measure.rows == [0, 1, 2, 3]


def test_a_dropped_row_is_measured_again_at_every_start(measure, image_folder):
    image = image_folder / "notes/b.png"
    content, times = image.read_bytes(), (os.stat(image).st_atime_ns, os.stat(image).st_mtime_ns)
    image.unlink()
    for expected in ([0, 1, 2, 3], [1, 3]):
        found = measure()
        assert [error.reason for error in found.dropped] == ["image-missing"] * 2 and measure.rows == expected
        assert (found.tokens > 0).tolist() == [True, False, True, False]
    image.write_bytes(content)
    os.utime(image, ns=times)  # nothing about the file tells that it was away
    whole = measure()
    assert whole.tokens.all() and not whole.dropped and measure.rows == [1, 3]
    assert same(measure(), whole) and measure.rows == []


def test_a_usable_row_whose_image_went_away(measure, image_folder):
    whole = measure()
    (image_folder / "notes/b.png").unlink()
    for _ in range(2):
        found = measure()
        assert found.tokens.tolist() == [whole.tokens[0], 0, whole.tokens[2], 0] and measure.rows == [1, 3]
        assert len(found.dropped) == 2 and found.clamped == 1


def test_a_changed_image_is_measured_again(measure, image_folder):
    first = measure()
    picture(image_folder / "notes/b.png", 3, 6, seed=1)
    second = measure()
    assert measure.rows == [1, 3]
    assert (second.tokens - first.tokens).tolist() == [0, 8, 0, 8] and second.clamped == 1
    assert same(measure(), second) and measure.rows == []


def test_other_image_folders_are_other_lengths(measure, tmp_path, image_folder):
    first = measure()
    other = tmp_path / "other"
    picture(other / "notes/a.png", 4, 3)
    picture(other / "notes/b.png", 4, 5)
    assert (measure(other).tokens - first.tokens).tolist() == [0, 10, 0, 10] and measure.rows == [0, 1, 2, 3]
    link = tmp_path / "link"
    link.symlink_to(image_folder)
    assert same(measure(link), first)
    link.unlink()
    link.symlink_to(other)
    images._real_folder.cache_clear()  # as at a new start
    assert not same(measure(link), first)


def test_the_folder_that_a_meta_file_names_counts(measure, tmp_path, rows, image_folder):
    other = tmp_path / "other"
    picture(other / "notes/a.png", 4, 3)
    picture(other / "notes/b.png", 4, 5)
    meta = tmp_path / "meta.json"
    found = []
    for folder in (image_folder, other):
        entry = {"ds_name": "notes", "data_path": str(rows), "image_folder": str(folder), "ds_type": "x"}
        meta.write_text(json.dumps([entry]))
        found.append(measure(None, meta).tokens)
    assert (found[1] - found[0]).tolist() == [0, 10, 0, 10]


def test_a_damaged_cache_is_none(measure, tmp_path):
    first = measure()
    cache = tmp_path / "lengths.npz"
    whole = cache.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for content in [b"", b"PK", whole[:-30], whole[: len(whole) // 2], b"text", *flipped]:
        cache.write_bytes(content)
        assert same(measure(), first)
    measure()
    assert measure.rows == []


def test_a_data_file_that_changed_is_an_error_not_a_dropped_row(rows, processor, image_folder, monkeypatch):
    dataset = LatentDataset(open_rows(rows, image_folder), processor)
    error = DataError("file-changed", "expected the file that was opened", str(rows))

    def fail(index):
        raise error

    monkeypatch.setattr(dataset.samples, "parse", fail)
    with pytest.raises(DataError) as caught:
        measure_lengths(dataset)
    assert caught.value is error


def test_a_process_measures_the_same(rows, tiny, image_folder, monkeypatch):
    (image_folder / "notes/b.png").write_bytes(b"no image")
    dataset = LatentDataset(open_rows(rows, image_folder), tiny.processor())
    alone = measure_lengths(dataset)
    monkeypatch.setattr(lengths, "CHUNK", 2)
    shared = measure_lengths(dataset, workers=1)
    assert same(alone, shared)
    assert [(e.reason, e.source) for e in alone.dropped] == [(e.reason, e.source) for e in shared.dropped] != []


def test_lengths_follow_the_view(measure, processor, image_folder, write_rows, row):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (28 * 8, 28)).save(image_folder / "notes" / "side.jpg", exif=tags)
    path = write_rows([row(image="notes/side.jpg")])
    for view in ("stored", "shown"):
        dataset = LatentDataset(open_rows(path, image_folder, image_view=view), processor)
        assert lengths.cache_key(dataset) != lengths.cache_key(
            LatentDataset(
                open_rows(path, image_folder, image_view={"stored": "shown", "shown": "stored"}[view]), processor
            )
        )
        assert measure_lengths(dataset).tokens.tolist() == [len(dataset[0].input_ids)]
