"""Image files and rows for the data tests; the tokenizer and image processor are those of `tiny`."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def processor(tiny):
    return tiny.processor()


@pytest.fixture
def image_folder(tmp_path):
    """Root with notes/a.png (4 x 3 visual tokens) and notes/b.png (2 x 5)."""
    folder = tmp_path / "images" / "notes"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (h, w) in {"a.png": (4, 3), "b.png": (2, 5)}.items():
        Image.fromarray(rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8)).save(folder / name)
    return folder.parent


def make_row(**changes):
    """A good row; `changes` replace keys, and the value ... removes one."""
    row = {
        "dataset": "notes",
        "split": "train",
        "question_id": 7,
        "image": "notes/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": "<lvr>\n<answer> red </answer>"},
        ],
        "bboxes": [[0.1, 0.2, 0.6, 0.7]],
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="rows.json"):
        path = tmp_path / name
        text = "\n".join(json.dumps(r) for r in rows) if name.endswith(".jsonl") else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write
