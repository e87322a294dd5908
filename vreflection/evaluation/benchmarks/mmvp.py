"""MMVP: 300 questions in 150 pairs of images that an image encoder sees alike.

`Questions.csv` and `MMVP Images/<Index>.jpg`. Images are joined by number: folders sort them as 1, 10, 100, 101.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ...errors import DataError
from ..fingerprints import file_digest, listing_digest
from ..records import Item
from .choices import letter_of, split_lettered
from .pictures import picture_file
from .source import REPAIR, Contents, Source, Spec, check_columns

QUESTIONS, IMAGES = "Questions.csv", "MMVP Images"
COLUMNS = ("Index", "Question", "Options", "Correct Answer")
# Rows whose published labels stand in each other's place.
SWAPPED = {99: 100, 100: 99, 279: 280, 280: 279}


def read(folder: Path, max_pixels: int) -> Contents:
    """Items with the labels as published and with the two swapped pairs put right; `group` is the pair."""
    table = folder / QUESTIONS
    rows = _rows(table)
    answers = {index: letter_of(row["Correct Answer"], f"{table}:{index}") for index, row in rows.items()}
    items, images = [], []
    for index, row in rows.items():
        source = f"{table}:{index}"
        path = folder / IMAGES / f"{index}.jpg"
        if not path.is_file():
            raise DataError(
                "image-missing", f"expected the image of row {index} at {path}, got none; {SPEC.source.how_to_get()}"
            )
        before, options = split_lettered(row["Options"], source)
        if before:
            raise DataError("row-options", f"expected options only, got {before!r} before (a); {REPAIR}", source)
        pair = str((index + 1) // 2)
        items.append(
            Item(
                benchmark="mmvp",
                id=str(index),
                question=row["Question"].strip(),
                options=options,
                gold={
                    "original": answers[index],
                    "corrected": answers.get(SWAPPED.get(index, index), answers[index]),
                },
                labels={"pair": pair},
                group=pair,
                images=(picture_file(path, max_pixels),),
                image_keys=(f"mmvp:{index}",),
            )
        )
        images.append(path)
    return Contents(items, {QUESTIONS: file_digest(table), IMAGES: listing_digest(images, folder)})


def _rows(table: Path) -> dict[int, dict[str, str]]:
    """Rows by number, ascending."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("file-not-csv", f"expected UTF-8 CSV, got {error}; {REPAIR}", str(table)) from None
    lines = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    check_columns([(name or "").strip() for name in lines.fieldnames or ()], COLUMNS, table)
    found: dict[int, dict[str, str]] = {}
    for number, line in enumerate(lines, start=2):
        row = {(name or "").strip(): value for name, value in line.items()}
        source = f"{table}:{number}"
        if any(not isinstance(row.get(name), str) for name in COLUMNS):
            raise DataError("row-shape", f"expected {len(COLUMNS)} fields, got {row}; {REPAIR}", source)
        if not row["Index"].strip().isascii() or not row["Index"].strip().isdigit():
            raise DataError("row-shape", f"expected a number as Index, got {row['Index']!r}; {REPAIR}", source)
        index = int(row["Index"])
        if index in found:
            raise DataError("row-duplicate", f"expected each Index once, got {index} again; {REPAIR}", source)
        found[index] = row
    return dict(sorted(found.items()))


SPEC = Spec(
    name="mmvp",
    source=Source(
        hub="MMVP/MMVP",
        folders=("MMVP", "mmvp"),
        markers=(QUESTIONS,),
        patterns=(QUESTIONS, f"{IMAGES}/*.jpg"),
    ),
    read=read,
    rows=300,
)
