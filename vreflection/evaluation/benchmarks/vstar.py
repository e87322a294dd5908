"""V*: 191 questions on small things in large photographs, with gold boxes.

`test_questions.jsonl`, images by relative path, and beside each image a JSON file of the same stem with its boxes.
Mirrors have the rows and `image` in Parquet files, without boxes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.images import image_size
from ...errors import DataError
from ..fingerprints import file_digest, listing_digest
from ..records import Item
from .choices import letter_of, split_lettered
from .mirrors import digests, mirror_files, mirror_rows
from .pictures import IMAGE_VIEW, Opener, library_limit, picture_file, picture_path
from .source import REPAIR, Contents, Source, Spec, check_columns

QUESTIONS = "test_questions.jsonl"
KEYS = ("image", "text", "category", "label", "question_id")
MIRROR = "data/test-*.parquet"
# Stands after the options in every row; a protocol asks in its own words.
ASKS = "Answer with the option's letter from the given choices directly."
Box = tuple[float, float, float, float]


def read(folder: Path, max_pixels: int) -> Contents:
    """Items with options taken out of the text and boxes as shares of the image."""
    table = folder / QUESTIONS
    if not table.is_file():
        return _read_mirror(folder, max_pixels)
    items, files = [], []
    for number, row in enumerate(_rows(table), start=1):
        source = f"{table}:{number}"
        path = picture_path(folder, row["image"], source)
        with library_limit(max_pixels):
            size = image_size(path, max_pixels, view=IMAGE_VIEW)
        boxes = path.with_suffix(".json")
        image = picture_file(path, max_pixels)
        items.append(_item(row, image, f"vstar:{row['image']}", source, read_boxes(boxes, size)))
        files += [path, boxes]
    return Contents(items, {QUESTIONS: file_digest(table), "images and boxes": listing_digest(files, folder)})


def _read_mirror(folder: Path, max_pixels: int) -> Contents:
    files = mirror_files(folder, MIRROR)
    items = []
    for row in mirror_rows(list(files.values()), KEYS[1:], max_pixels):
        texts = _row({"image": row.source, **row.texts}, row.source)
        items.append(_item(texts, row.image, f"vstar:{texts['category']}/{texts['question_id']}", row.source))
    return Contents(items, digests(files))


def _item(row: Mapping[str, Any], image: Opener, key: str, source: str, boxes: tuple[Box, ...] = ()) -> Item:
    question, options = split_lettered(row["text"].strip().removesuffix(ASKS), source)
    name = f"{row['category']}/{row['question_id']}"
    return Item(
        benchmark="vstar",
        id=name,
        question=question,
        options=options,
        gold={"original": letter_of(row["label"], source)},
        labels={"category": row["category"]},
        group=name,
        images=(image,),
        image_keys=(key,),
        boxes=boxes,
    )


def _rows(table: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with table.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(json.loads(line), f"{table}:{number}"))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "file-not-json", f"expected one JSON object per line, got {error}; {REPAIR}", str(table)
        ) from None
    return rows


def _row(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError("row-type", f"expected an object, got {type(row).__name__}; {REPAIR}", source)
    check_columns(list(row), KEYS, Path(source))
    wrong = [key for key in KEYS[:-1] if not isinstance(row[key], str)]
    if wrong:
        raise DataError("row-type", f"expected text as {', '.join(wrong)}, got {row}; {REPAIR}", source)
    return row


def read_boxes(path: Path, size: tuple[int, int]) -> tuple[Box, ...]:
    """Gold boxes `(x0, y0, x1, y1)` as shares of an image of `size` (px), from `bbox: [[x, y, width, height]]` in px.

    Raises:
        DataError: `boxes-missing`, `box-shape`, `box-outside`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "boxes-missing",
            f"expected the gold boxes, got {error}; {SPEC.source.how_to_get()}",
            str(path),
        ) from None
    boxes = values.get("bbox") if isinstance(values, Mapping) else None
    if not isinstance(boxes, list) or not boxes or not all(_four_numbers(box) for box in boxes):
        raise DataError("box-shape", f"expected bbox as [[x, y, width, height], …], got {boxes!r}; {REPAIR}", str(path))
    width, height = size
    shares = []
    for x, y, w, h in boxes:
        # One pixel of rounding is forgiven.
        if min(x, y) < -1 or min(w, h) <= 0 or x + w > width + 1 or y + h > height + 1:
            raise DataError(
                "box-outside", f"expected boxes inside {width}x{height} px, got {[x, y, w, h]}; {REPAIR}", str(path)
            )
        shares.append(
            (max(x / width, 0.0), max(y / height, 0.0), min((x + w) / width, 1.0), min((y + h) / height, 1.0))
        )
    return tuple(shares)


def _four_numbers(box: Any) -> bool:
    numbers = isinstance(box, Sequence) and len(box) == 4
    # JSON as Python reads it has NaN and infinity.
    return numbers and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in box)


SPEC = Spec(
    name="vstar",
    source=Source(
        hub="craigwu/vstar_bench",
        folders=("vstar_bench", "vstar", "vstar-bench"),
        markers=(QUESTIONS,),
        patterns=(QUESTIONS, "direct_attributes/*", "relative_position/*"),
        mirrors=(MIRROR,),
    ),
    read=read,
    rows=191,
    count_label="category",
    counts={"direct_attributes": 115, "relative_position": 76},
)
