"""BLINK, validation split: 1901 questions in 14 tasks, one Parquet file each, up to four images a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..fingerprints import file_digest
from ..records import Item
from .choices import letter_of
from .mirrors import check_image_column, image_in_row
from .parquet_rows import RowReader, read_columns
from .source import REPAIR, Contents, Source, Spec

TASKS = {
    "Art_Style": 117, "Counting": 120, "Forensic_Detection": 132, "Functional_Correspondence": 130, "IQ_Test": 150,
    "Jigsaw": 150, "Multi-view_Reasoning": 133, "Object_Localization": 122, "Relative_Depth": 124,
    "Relative_Reflectance": 134, "Semantic_Correspondence": 139, "Spatial_Relation": 143,
    "Visual_Correspondence": 172, "Visual_Similarity": 135,
}  # fmt: skip
FILE = "val-00000-of-00001.parquet"
IMAGES = ("image_1", "image_2", "image_3", "image_4")
TEXT = ("idx", "question", "prompt", "choices", "answer")


def read(folder: Path, max_pixels: int) -> Contents:
    """Items of all tasks, in the order of the tasks' names."""
    missing = [task for task in TASKS if not (folder / task / FILE).is_file()]
    if missing:
        raise DataError(
            "benchmark-missing",
            f"blink: expected {FILE} in {len(TASKS)} folders, got none in {', '.join(missing)}; get them with: "
            f"{SPEC.source.how_to_get()}",
            str(folder),
        )
    items, files = [], {}
    for task in TASKS:
        path = folder / task / FILE
        reader = RowReader(path, IMAGES)
        images = _images_per_row(path, reader)
        for number, row in enumerate(read_columns(path, TEXT, others=IMAGES)):
            items.append(_item(task, row, number, images[number], reader, max_pixels))
        files[f"{task}/{FILE}"] = file_digest(path)
    return Contents(items, files)


def _item(task: str, row: Mapping[str, Any], number: int, images: int, reader: RowReader, max_pixels: int) -> Item:
    source = f"{reader.path}:{number}"
    name, choices = row["idx"], row["choices"]
    if not isinstance(name, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise DataError("row-shape", f"expected idx and choices as text, got {name!r}, {choices!r}; {REPAIR}", source)
    return Item(
        benchmark="blink",
        id=name,
        question=(row["question"] or "").strip(),
        options=tuple(choice.strip() for choice in choices),
        gold={"original": letter_of(row["answer"], source)},
        labels={"task": task},
        group=name,
        images=tuple(image_in_row(reader, number, column, max_pixels) for column in IMAGES[:images]),
        image_keys=tuple(f"blink:{name}:{column}" for column in IMAGES[:images]),
        prompt=(row["prompt"] or "").strip(),
    )


def _images_per_row(path: Path, reader: RowReader) -> list[int]:
    """How many images each row has, read from the images' paths, which are small.

    An absent image is a null, or a struct of nulls; only an image without a path is looked at itself.

    Raises:
        DataError: `file-columns` where images are not stored as bytes, `image-count` where one is left out.
    """
    for column in IMAGES:
        check_image_column(path, column)

    def is_there(number: int, column: str, value: Mapping[str, Any] | None) -> bool:
        if value is None:
            return False
        return value["path"] is not None or (reader.row(number)[column] or {}).get("bytes") is not None

    counts = []
    for number, row in enumerate(read_columns(path, [f"{column}.path" for column in IMAGES])):
        there = [is_there(number, column, row[column]) for column in IMAGES]
        if there != sorted(there, reverse=True) or not any(there):
            raise DataError(
                "image-count", f"expected image_1, image_2, … without gaps, got {there}; {REPAIR}", f"{path}:{number}"
            )
        counts.append(sum(there))
    return counts


SPEC = Spec(
    name="blink",
    source=Source(
        hub="BLINK-Benchmark/BLINK",
        folders=("BLINK", "blink"),
        markers=tuple(f"{task}/{FILE}" for task in TASKS),
        patterns=(f"*/{FILE}",),
        revision="a3666eb249237ba3d5eca8db21176cc47967e040",
    ),
    read=read,
    rows=1901,
    count_label="task",
    counts=TASKS,
)
