import json

import numpy as np
import pytest

from vreflection.data.visual_cot import read_visual_cot
from vreflection.errors import DataError

TWO_IMAGES = {
    "image": ["notes/a.png", "notes/b.png"],
    "conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "<lvr> x <lvr> y"}],
    "bboxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]],
}
# name: (changed keys, reason, what the message must quote)
BAD_ROWS = {
    "no image key": ({"image": ...}, "missing-key", "image"),
    "no conversations key": ({"conversations": ...}, "missing-key", "conversations"),
    "no bboxes key": ({"bboxes": ...}, "missing-key", "bboxes"),
    "dataset number": ({"dataset": 3}, "row-type", "int 3"),
    "question_id list": ({"question_id": [1]}, "row-type", "list [1]"),
    "question_id bool": ({"question_id": True}, "row-type", "bool True"),
    "image number": ({"image": 5}, "image-type", "int 5"),
    "image none": ({"image": []}, "image-type", "list []"),
    "image too deep": ({"image": [[["notes/a.png"]]]}, "image-type", "notes/a.png"),
    "image absent": ({"image": "notes/z.png"}, "image-missing", "notes/z.png"),
    "image outside": ({"image": "../rows.json"}, "path-escape", "../rows.json"),
    "image absolute": ({"image": "/etc/hostname"}, "path-escape", "/etc/hostname"),
    "image twice": ({"image": ["notes/a.png", "notes/b.png"]}, "image-count", "(2), got 1"),
    "conversation text": ({"conversations": "hi"}, "conversation-type", "str 'hi'"),
    "turn without value": ({"conversations": [{"from": "human"}]}, "conversation-type", "human"),
    "turn of a robot": ({"conversations": [{"from": "robot", "value": "x"}]}, "conversation-type", "robot"),
    "turn from a list": ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "conversation-type", "gpt"),
    "turn with half a character": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<lvr>\ud83d"}]},
        "text-surrogate",
        "character 5",
    ),
    "latent without image": (
        {"image": ..., "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<lvr>"}]},
        "missing-key",
        "image",
    ),
    "box without image": (
        {"image": [], "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]},
        "image-type",
        "list []",
    ),
    "image null": ({"image": None}, "image-type", "NoneType None"),
    "boxes null": ({"bboxes": None}, "box-shape", "NoneType None"),
    "no answer": ({"conversations": [{"from": "human", "value": "<image>?"}]}, "conversation-order", "['user']"),
    "reserved": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<lvr><|lvr|>"}]},
        "reserved-token",
        "<|lvr|>",
    ),
    "boxes missing": ({"bboxes": []}, "box-count", "(1), got 0"),
    "boxes too many": ({"bboxes": [[0, 0, 1, 1], [0, 0, 1, 1]]}, "box-count", "(1), got 2"),
    "box flat": ({"bboxes": [0, 0, 1, 1]}, "box-shape", "[0, 0, 1, 1]"),
    "box text": ({"bboxes": [["0", 0, 1, 1]]}, "box-shape", "'0'"),
    "box bool": ({"bboxes": [[False, 0, 1, True]]}, "box-shape", "False"),
    "box short": ({"bboxes": [[0, 0, 1]]}, "box-shape", "[0, 0, 1]"),
    "box object": ({"bboxes": {"x0": 0}}, "box-shape", "x0"),
    "box huge": ({"bboxes": [[0, 0, 10**400, 1]]}, "box-shape", "1000"),
    "box nan": ({"bboxes": [[0, 0, float("nan"), 1]]}, "box-nan", "nan"),
    "box pixels": ({"bboxes": [[10, 20, 60, 70]]}, "box-outside", "[10.0, 20.0, 60.0, 70.0]"),
    "box inverted": ({"bboxes": [[0.6, 0, 0.5, 1]]}, "box-inverted", "[0.6, 0.0, 0.5, 1.0]"),
    "box empty": ({"bboxes": [[0.5, 0, 0.5, 1]]}, "box-empty", "[0.5, 0.0, 0.5, 1.0]"),
    "box of which image": (TWO_IMAGES, "box-image-ambiguous", "2 images and no box_images"),
    "box image beyond": ({**TWO_IMAGES, "box_images": [0, 2]}, "box-images", "[0, 2]"),
    "box image short": ({**TWO_IMAGES, "box_images": [0]}, "box-images", "2 image indices"),
    "box image type": ({**TWO_IMAGES, "box_images": [0, True]}, "box-images", "True"),
}


def test_good_row(write_rows, image_folder, row):
    path = write_rows([row()])
    (sample,), report = read_visual_cot(path, image_folder)
    assert sample.question_id == "7" and sample.dataset == "notes" and sample.source == f"{path}:1"
    assert sample.image_paths == (str(image_folder / "notes/a.png"),)
    assert sample.conversations == (("user", "<image>\nWhat colour?"), ("assistant", "<lvr>\n<answer> red </answer>"))
    assert sample.boxes.dtype == np.float64 and sample.boxes.tolist() == [[0.1, 0.2, 0.6, 0.7]]
    assert sample.box_images.tolist() == [0]
    assert (report.kept, report.dropped, report.clamped) == (1, {}, 0)
    with pytest.raises(AttributeError):
        sample.dataset = "x"


def test_accepted_spellings(write_rows, image_folder, row):
    rows = [
        row(image=["notes/a.png"]),
        row(image=[["notes/a.png"]]),
        row(bboxes=[[[0.1, 0.2, 0.6, 0.7]]]),
        row(dataset=..., question_id=...),
        row(bboxes=[[-0.02, 0.2, 0.6, 1.01]]),
        row(**TWO_IMAGES, box_images=[1, 0]),
        row(**{**TWO_IMAGES, "image": [["notes/a.png"], ["notes/b.png"]]}, box_images=[1, 1]),
        row(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "no box"}], bboxes=[]),
    ]
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    look = [{"from": "human", "value": "<image>Why?"}, {"from": "gpt", "value": "So."}]
    rows += [
        row(conversations=talk, image=image, bboxes=boxes) for image in (..., None, []) for boxes in (..., None, [])
    ]
    rows += [row(conversations=look, bboxes=boxes) for boxes in (..., None, [])]
    path = write_rows(rows)
    samples, report = read_visual_cot(path, image_folder, on_error="raise", dataset="fallback")
    assert report.kept == len(rows) and report.clamped == 1
    assert samples[3].dataset == "fallback" and samples[3].question_id == f"{path}:4"
    assert samples[4].boxes.tolist() == [[0, 0.2, 0.6, 1]]
    assert samples[5].box_images.tolist() == [1, 0] and samples[6].box_images.tolist() == [1, 1]
    assert [len(sample.image_paths) for sample in samples[7:]] == [1, *[0] * 9, *[1] * 3]
    assert all(sample.boxes.shape == (0, 4) and sample.box_images.shape == (0,) for sample in samples[7:])


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_dropped_with_a_reason_or_raised(kind, write_rows, image_folder, row):
    changes, reason, quoted = BAD_ROWS[kind]
    path = write_rows([row(), row(**changes), row()])
    samples, report = read_visual_cot(path, image_folder)
    assert len(samples) == report.kept == 2
    assert report.dropped == {reason: [f"{path}:2"]}
    with pytest.raises(DataError) as caught:
        read_visual_cot(path, image_folder, on_error="raise")
    message = str(caught.value)
    assert caught.value.reason == reason and caught.value.source == f"{path}:2"
    assert message.startswith(f"{path}:2: expected") and "got" in message and ";" in message and quoted in message


@pytest.mark.parametrize("bad", [None, 3, "text", [1]])
def test_rows_that_are_no_objects(bad, write_rows, image_folder, row):
    path = write_rows([bad, row()])
    assert read_visual_cot(path, image_folder)[1].dropped == {"row-type": [f"{path}:1"]}


def test_json_lines(tmp_path, image_folder, row):
    path = tmp_path / "rows.jsonl"
    long_number = '{"bboxes": ' + "9" * 5000 + "}"
    good = json.dumps(row())
    path.write_text("\n".join(["{broken", "", good, good[:-9], long_number, good]) + "\n", encoding="utf-8")
    samples, report = read_visual_cot(path, image_folder)
    assert [sample.source for sample in samples] == [f"{path}:3", f"{path}:6"]
    assert report.dropped == {"row-not-json": [f"{path}:1", f"{path}:4", f"{path}:5"]}
    with pytest.raises(DataError, match=r"rows.jsonl:1: expected one JSON object per line, got .*; fix") as caught:
        read_visual_cot(path, image_folder, on_error="raise")
    assert caught.value.reason == "row-not-json"


@pytest.mark.parametrize(
    "name, content, reason, quoted",
    [
        ("x.json", b'[{"a": 1},\n {"b": }]', "file-not-json", "line 2 column 8"),
        ("x.json", b"", "file-not-json", "line 1 column 1"),
        ("x.json", b"\xff\xd8\xff\xe0", "file-not-json", "byte 0xff at position 0"),
        ("x.json", b"[" * 200_000, "file-not-json", "expected JSON"),
        ("x.json", b"[" + b"9" * 5000 + b"]", "file-not-json", "digits"),
        ("x.json", b'{"rows": []}', "file-shape", "got dict"),
        ("x.jsonl", b"hello\nworld\n", "file-not-json", "x.jsonl:1: expected one JSON object per line"),
    ],
)
def test_files_that_are_not_json(tmp_path, name, content, reason, quoted):
    path = tmp_path / name
    path.write_bytes(content)
    for on_error in ("skip", "raise"):
        with pytest.raises(DataError) as caught:
            read_visual_cot(path, tmp_path, on_error=on_error)
        assert caught.value.reason == reason
        assert str(caught.value).startswith(f"{path}: ") and quoted in str(caught.value)


def test_missing_file_and_wrong_arguments(tmp_path, write_rows, row):
    with pytest.raises(
        DataError, match="none.json: expected a readable data file, got No such file.*; check"
    ) as caught:
        read_visual_cot(tmp_path / "none.json", tmp_path)
    assert caught.value.reason == "file-missing"
    with pytest.raises(ValueError, match="expected image_folder for the rows of"):
        read_visual_cot(write_rows([row()]))
    with pytest.raises(DataError, match="rows.json: expected a folder of images at .*/absent, got none; check"):
        read_visual_cot(write_rows([row()]), tmp_path / "absent")
    with pytest.raises(ValueError, match="on_error 'skip' or 'raise', got 'ignore'"):
        read_visual_cot(write_rows([row()]), tmp_path, on_error="ignore")


def test_byte_order_mark_and_unicode(tmp_path, image_folder, row):
    text = json.dumps([row(question_id="日本")], ensure_ascii=False)
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_visual_cot(path, image_folder)[0][0].question_id == "日本"


def test_meta_file(tmp_path, image_folder, write_rows, row):
    write_rows([row(dataset=...), row(bboxes=[])], "one.json")
    write_rows([row(image="a.png", bboxes=[[0, 0, 1, 1.01]])], "two.jsonl")
    meta = write_rows(
        [
            {"ds_name": "first", "data_path": "one.json", "image_folder": "images", "ds_type": "Q_IMG"},
            {
                "ds_name": "second",
                "data_path": str(tmp_path / "two.jsonl"),
                "image_folder": str(image_folder / "notes"),
            },
            {"ds_name": "third", "data_path": 5, "image_folder": "images"},
            {"ds_name": "self", "data_path": "meta.json", "image_folder": "images"},
        ],
        "meta.json",
    )
    samples, report = read_visual_cot(meta)
    assert [(s.dataset, s.source) for s in samples] == [
        ("first", f"{tmp_path / 'one.json'}:1"),
        ("notes", f"{tmp_path / 'two.jsonl'}:1"),
    ]
    assert report.dropped == {
        "box-count": [f"{tmp_path / 'one.json'}:2"],
        "meta-entry": [f"{meta}:3", f"{meta}:4"],
    }
    assert (report.kept, report.clamped, report.num_dropped) == (2, 1, 3)
    with pytest.raises(DataError):
        read_visual_cot(meta, on_error="raise")


def test_meta_entry_with_a_broken_file_stops_the_read(tmp_path, write_rows):
    meta = write_rows([{"ds_name": "a", "data_path": "none.json", "image_folder": "."}], "meta.json")
    with pytest.raises(DataError, match="none.json: expected a readable data file"):
        read_visual_cot(meta)


def test_summary_names_counts_reasons_and_rows(write_rows, image_folder, row):
    path = write_rows([row(bboxes=[[0, 0, 1.01, 1]]), row(image=5), *[row(bboxes=[]) for _ in range(5)]])
    _, report = read_visual_cot(path, image_folder)
    assert report.summary().splitlines() == [
        "1 rows kept, 6 dropped, 1 boxes clamped",
        f"  box-count: 5 ({path}:3, {path}:4, {path}:5, and 2 more)",
        f"  image-type: 1 ({path}:2)",
    ]
