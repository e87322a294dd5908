import json
import pickle

import pytest
from PIL import Image

from vreflection.data.check import check_rows
from vreflection.data.grounding import DEFAULT_QUESTIONS, RowText, convert_annotations, position
from vreflection.data.rows import open_rows
from vreflection.errors import ConfigError, DataError

COCO, REFS = RowText(DEFAULT_QUESTIONS["coco"], dataset="coco"), RowText(DEFAULT_QUESTIONS["refcoco"])
CAT, DOG, CAR = 17, 18, 3


def instances():
    """Per annotation id: what becomes of it."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 100} for i in (0, 1, 2)]
    boxes = [
        (1, 1, CAT, [20, 10, 40, 20], {}),  # kept
        (2, 1, DOG, [0, 0, 10, 10], {}),
        (3, 1, DOG, [50, 50, 10, 10], {}),  # two dogs
        (4, 1, CAR, [0, 0, 100, 100], {"iscrowd": 1}),
        (5, 2, CAT, [150, 60, 0, 20], {}),  # no width
        (6, 2, DOG, [190, 10, 30, 20], {}),  # sticks out by 10 %
        (7, 2, CAR, [195, 95, 6.5, 5], {}),  # by 0.75 %: clipped
        (8, 9, CAR, [0, 0, 5, 5], {}),  # no such image
        (9, 2, 99, [0, 0, 5, 5], {}),  # no such category
        (10, 2, 4, [0, 0, 5], {}),
        (11, 1, 4, [0, 0, float("nan"), 5], {}),
        (12, 2, 5, [0, 0, 5, 5], {}),  # a name that spells a token
        (13, [1], CAT, [0, 0, 5, 5], {}),  # ids that are none
        (14, None, CAR, [0, 0, 5, 5], {}),
    ]
    annotations = [
        {"id": key, "image_id": image, "category_id": kind, "bbox": box, "segmentation": [[1, 2]], **more}
        for key, image, kind, box, more in boxes
    ]
    names = {CAT: "cat", DOG: "dog", CAR: "car", 4: "hat", 5: "<lvr> cup"}
    categories = [{"id": key, "name": name} for key, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for i in (1, 2):
        Image.new("RGB", (200, 100)).save(folder / f"{i}.jpg")
    return folder.parent


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_coco(tmp_path, pictures):
    source, out = write(tmp_path / "instances.json", instances()), tmp_path / "rows.jsonl"
    text = RowText(COCO.question, dataset="coco", image_prefix="train/")
    report = convert_annotations("coco", source, out, text)
    assert report.dropped == {
        "not-unique": ["2", "3"],
        "crowd": ["4"],
        "zero-area": ["5"],
        "outside": ["6"],
        "no-image": ["8", "13", "14"],
        "no-category": ["9"],
        "box-shape": ["10", "11"],
        "text": ["12"],
    }
    first, second = map(json.loads, out.read_text().splitlines())
    assert first == {
        "dataset": "coco",
        "question_id": "coco-1",
        "image": "train/1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhere in the image is the cat?"},
            {"from": "gpt", "value": "<lvr>\n<answer> top left </answer>"},
        ],
        "bboxes": [[0.1, 0.1, 0.3, 0.3]],
    }
    assert second["bboxes"] == [[0.975, 0.95, 1.0, 1.0]]
    checked = check_rows(open_rows(out, pictures))
    assert (checked.kept, checked.dropped, checked.clamped) == (2, {}, 0)
    assert report.summary().startswith("2 rows written, 12 annotations left out\n  ")
    assert "  not-unique: 2 (annotation 2, 3)" in report.summary()


def test_a_crowd_of_the_category_makes_it_ambiguous(tmp_path):
    content = instances()
    content["annotations"] += [{"id": 20, "image_id": 1, "category_id": CAT, "bbox": [0, 0, 9, 9], "iscrowd": 1}]
    report = convert_annotations("coco", write(tmp_path / "i.json", content), tmp_path / "rows.jsonl", COCO)
    assert report.written == 1 and report.dropped["not-unique"] == ["1", "2", "3", "20"]


def test_refcoco_with_instances(tmp_path, pictures):
    refs = [
        {
            "ref_id": 5,
            "ann_id": 2,
            "split": "train",
            "sentences": [{"sent": "left  dog", "raw": "Left dog"}, {"raw": "a dog"}],
        },
        {"ref_id": 6, "ann_id": 3, "split": "testA", "sentences": ["dog in the middle"]},
        {"ref_id": 7, "ann_id": 77, "split": "train", "sentences": ["nothing"]},
        {"ref_id": 8, "ann_id": 5, "split": "train", "sentences": ["flat cat"]},
        {"ref_id": 9, "ann_id": 2, "split": "train", "sentences": [{"tokens": []}]},
    ]
    source, out = write(tmp_path / "instances.json", instances()), tmp_path / "rows.jsonl"
    text = RowText("Find {name} ({category}).", "{x0} {y0} {x1} {y1}", "train/")
    report = convert_annotations("refcoco", source, out, text, write(tmp_path / "refs.json", refs), "train")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["refcoco-5-0", "refcoco-5-1"]
    assert rows[0]["conversations"][0]["value"] == "<image>\nFind left dog (dog)." and rows[0]["split"] == "train"
    assert rows[0]["conversations"][1]["value"] == "<lvr>\n<answer> 0.000 0.000 0.050 0.100 </answer>"
    assert report.dropped == {"no-annotation": ["77 of ref 7"], "zero-area": ["8"], "text": ["9"]}
    assert check_rows(open_rows(out, pictures)).kept == 2
    everything = convert_annotations("refcoco", source, out, text, tmp_path / "refs.json")
    assert everything.written == 3 and "rows of several splits (train 2, testA 1); --split" in everything.summary()


def test_flat_expressions(tmp_path, pictures):
    flat = [
        {"image": "train/1.jpg", "bbox": [100, 40, 40, 30], "width": 200, "height": 100, "expression": "the é"},
        {"file_name": "train/2.jpg", "bbox": [0, 0, 5, 5], "width": 200, "height": 100, "sentences": ["a", "b"]},
        {"image": "train/1.jpg", "bbox": [0, 0, 5, 5], "sentence": "no size"},
        {"image": "train/1.jpg", "bbox": [0, 0, 5, 5], "width": 200, "height": 100},
    ]
    out = tmp_path / "rows.jsonl"
    report = convert_annotations("refcoco", write(tmp_path / "flat.json", flat), out, REFS)
    assert report.written == 3 and report.dropped == {"no-image": ["3"], "text": ["4"]}
    assert check_rows(open_rows(out, pictures)).kept == 3
    assert open_rows(out, pictures)[0].conversations[0].text == '<image>\nWhere in the image is "the é"?'


def test_positions():
    assert [position(x, y) for y in (0, 0.5, 1) for x in (0.33, 0.34, 0.67)] == [
        *("top left", "top", "top right"),
        *("left", "centre", "right"),
        *("bottom left", "bottom", "bottom right"),
    ]


def test_what_is_refused_leaves_no_file(tmp_path):
    source, out = write(tmp_path / "instances.json", instances()), tmp_path / "rows.jsonl"
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([]))
    (tmp_path / "disguised.json").write_bytes(pickle.dumps([]))
    (tmp_path / "broken.json").write_text('{"images": [')
    cases = [
        (ConfigError, "a pickle, which can run any code", ("refcoco", source, out, REFS, tmp_path / "refs(unc).p")),
        (ConfigError, "a pickle, which can run any code", ("refcoco", tmp_path / "disguised.json", out, REFS)),
        (ConfigError, "--refs: expected none with --from coco", ("coco", source, out, COCO, source)),
        (DataError, "broken.json: expected JSON, got Expecting value", ("coco", tmp_path / "broken.json", out, COCO)),
        (DataError, "none.json: expected a readable file", ("coco", tmp_path / "none.json", out, COCO)),
        (DataError, "expected a list of objects, got dict", ("refcoco", source, out, REFS)),
        (DataError, "with images, annotations, categories", ("coco", write(tmp_path / "l.json", []), out, COCO)),
        (DataError, "expected a usable annotation, got none", ("refcoco", tmp_path / "l.json", out, REFS)),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            convert_annotations(*arguments)
    assert not list(tmp_path.glob("*rows*"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{colour}", "expected a template with fields among name, .* got KeyError"),
        ("{name", "expected a template with fields"),
        ("{}", "expected a template with fields"),
        ("{name.__class__}", "expected fields among name, .*, got name.__class__"),
        ("<image> {name}", "expected none of <image>, <lvr>"),
    ],
)
def test_templates_that_cannot_work(template, message):
    with pytest.raises(ConfigError, match=f"--question-template: {message}"):
        RowText(template)
    with pytest.raises(ConfigError, match=f"--answer-template: {message}"):
        RowText("?", template)
