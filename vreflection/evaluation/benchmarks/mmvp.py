"""MMVP: 300 questions in 150 pairs of images that an image encoder sees alike.

`Questions.csv` and `MMVP Images/<Index>.jpg`. Images are joined by number: folders sort them as 1, 10, 100, 101.
Mirrors have the same columns and `image` in Parquet files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..fingerprints import file_digest, listing_digest
from ..records import Item
from .choices import letter_of, split_lettered
from .mirrors import digests, mirror_files, mirror_rows
from .pictures import Opener, picture_file
from .source import REPAIR, Contents, Source, Spec, check_columns

QUESTIONS, IMAGES = "Questions.csv", "MMVP Images"
COLUMNS = ("Index", "Question", "Options", "Correct Answer")
MIRROR = "data/train-*.parquet"
# Rows whose published labels stand in each other's place. A mirror may have them put right.
PUBLISHED = {99: "A", 100: "B", 279: "A", 280: "B"}


def read(folder: Path, max_pixels: int) -> Contents:
    """Items with the labels as published and with the two swapped pairs put right; `group` is the pair."""
    table = folder / QUESTIONS
    if not table.is_file():
        return _read_mirror(folder, max_pixels)
    items, images = [], []
    for index, row in _rows(table).items():
        path = folder / IMAGES / f"{index}.jpg"
        if not path.is_file():
            raise DataError(
                "image-missing", f"expected the image of row {index} at {path}, got none; {SPEC.source.how_to_get()}"
            )
        items.append(_item(index, row, picture_file(path, max_pixels), f"{table}:{index}"))
        images.append(path)
    return Contents(items, {QUESTIONS: file_digest(table), IMAGES: listing_digest(images, folder)})


def _read_mirror(folder: Path, max_pixels: int) -> Contents:
    files = mirror_files(folder, MIRROR)
    items: dict[int, Item] = {}
    for row in mirror_rows(list(files.values()), COLUMNS, max_pixels):
        index = row.texts["Index"]
        if not isinstance(index, int) or any(not isinstance(row.texts[name], str) for name in COLUMNS[1:]):
            raise DataError("row-shape", f"expected a number and three texts, got {row.texts}; {REPAIR}", row.source)
        if index in items:
            raise DataError("row-duplicate", f"expected each Index once, got {index} again; {REPAIR}", row.source)
        items[index] = _item(index, row.texts, row.image, row.source)
    return Contents([items[index] for index in sorted(items)], digests(files))


def _item(index: int, row: Mapping[str, Any], image: Opener, source: str) -> Item:
    before, options = split_lettered(row["Options"], source)
    if before:
        raise DataError("row-options", f"expected options only, got {before!r} before (a); {REPAIR}", source)
    answer = letter_of(row["Correct Answer"], source)
    published = PUBLISHED.get(index, answer) if answer in "AB" else answer
    pair = str((index + 1) // 2)
    return Item(
        benchmark="mmvp",
        id=str(index),
        question=row["Question"].strip(),
        options=options,
        gold={
            "original": published,
            "corrected": "BA"["AB".index(published)] if index in PUBLISHED and published in "AB" else published,
        },
        labels={"pair": pair},
        group=pair,
        images=(image,),
        image_keys=(f"mmvp:{index}",),
    )


def _rows(table: Path) -> dict[int, dict[str, str]]:
    """Rows by number, ascending."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("file-not-csv", f"expected UTF-8 CSV, got {error}; {REPAIR}", str(table)) from None
    lines = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    check_columns([(name or "").strip() for name in lines.fieldnames or ()], COLUMNS, table)
    rows: dict[int, dict[str, str]] = {}
    for number, line in enumerate(lines, start=2):
        row = {(name or "").strip(): value for name, value in line.items()}
        source = f"{table}:{number}"
        if any(not isinstance(row.get(name), str) for name in COLUMNS):
            raise DataError("row-shape", f"expected {len(COLUMNS)} fields, got {row}; {REPAIR}", source)
        if not row["Index"].strip().isascii() or not row["Index"].strip().isdigit():
            raise DataError("row-shape", f"expected a number as Index, got {row['Index']!r}; {REPAIR}", source)
        index = int(row["Index"])
        if index in rows:
            raise DataError("row-duplicate", f"expected each Index once, got {index} again; {REPAIR}", source)
        rows[index] = row
    return dict(sorted(rows.items()))


SPEC = Spec(
    name="mmvp",
    source=Source(
        hub="MMVP/MMVP",
        folders=("MMVP", "mmvp"),
        markers=(QUESTIONS,),
        patterns=(QUESTIONS, f"{IMAGES}/*.jpg"),
        mirrors=(MIRROR,),
    ),
    read=read,
    rows=300,
)
