"""BLINK, validation split: 1901 questions in 14 tasks, one Parquet file each, up to four images a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import DataError
from ..fingerprints import file_digest
from ..records import Item
from .choices import letter_of
from .parquet_rows import RowReader, column_types, read_columns
from .pictures import Opener, decode_picture
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
        images = _images_per_row(path)
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
        images=tuple(_opener(reader, number, column, max_pixels) for column in IMAGES[:images]),
        image_keys=tuple(f"blink:{name}:{column}" for column in IMAGES[:images]),
        prompt=(row["prompt"] or "").strip(),
    )


def _opener(reader: RowReader, number: int, column: str, max_pixels: int) -> Opener:
    def opened() -> Image.Image:
        value = reader.row(number)[column] or {}
        return decode_picture(value.get("bytes") or b"", f"{reader.path}:{number}:{column}", max_pixels)

    return opened


def _images_per_row(path: Path) -> list[int]:
    """How many images each row has, read from the images' paths, which are small.

    Raises:
        DataError: `file-columns` where images are not stored as bytes, `image-count` where one is left out.
    """
    kinds = column_types(path)
    for column in IMAGES:
        kind = kinds.get(column, "none")
        if not kind.startswith("struct<") or "bytes: binary" not in kind or "path: string" not in kind:
            raise DataError(
                "file-columns", f"expected {column} as a struct of bytes and path, got {kind}; {REPAIR}", str(path)
            )
    counts = []
    for number, row in enumerate(read_columns(path, [f"{column}.path" for column in IMAGES])):
        there = [row[column] is not None for column in IMAGES]
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
