"""HR-Bench 4K and 8K: 200 questions each, asked four times with rotated options; base64 images in one Parquet file, or
in one of tabs.

An 8K image is 100 MB once decoded. Rows are read one at a time, and the four rotations of a question share one image.
"""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import DataError
from ..fingerprints import file_digest
from ..records import Item
from .choices import letter_of
from .parquet_rows import RowReader, read_columns
from .pictures import Opener, decode_picture
from .source import REPAIR, Contents, Source, Spec
from .tsv_rows import TsvRows

LETTERS = "ABCD"
TEXT = ("index", "question", "answer", "category", *LETTERS, "cycle_category")
CYCLES = ("0", "1", "2", "3")


def read(folder: Path, max_pixels: int, name: str, file: str) -> Contents:
    """Items question by question: four rotations side by side, on the image of the first of them in the file."""
    path = next((folder / other for other in (file, tsv_of(file)) if (folder / other).is_file()), folder / file)
    if path.suffix == ".tsv":
        reader = TsvRows(path, TEXT, ("image",))
        rows = reader.texts
    else:
        rows = read_columns(path, TEXT, others=("image",))
        reader = RowReader(path, ("image",))
    items = []
    for numbers in rotations(rows, path):
        opener = image_opener(reader, numbers, max_pixels)
        group = str(rows[numbers[0]]["index"])
        items += [_item(name, rows[number], group, opener, f"{path}:{number}") for number in numbers]
    return Contents(items, {path.name: file_digest(path)})


def tsv_of(file: str) -> str:
    """Name of the same table as tab-separated text."""
    return f"{Path(file).stem}.tsv"


def _item(name: str, row: dict[str, Any], group: str, opener: Opener, source: str) -> Item:
    if row["category"] not in ("single", "cross"):
        raise DataError("row-shape", f"expected category single or cross, got {row['category']!r}; {REPAIR}", source)
    if any(row[key] in (None, "") for key in (*LETTERS, "question")):
        raise DataError("row-options", f"expected a question and four options, got {row}; {REPAIR}", source)
    return Item(
        benchmark=name,
        id=str(row["index"]),
        question=row["question"].strip(),
        options=tuple(str(row[letter]).strip() for letter in LETTERS),
        gold={"original": letter_of(row["answer"], source)},
        labels={"category": row["category"], "cycle": cycle_of(row, source)},
        group=group,
        images=(opener,),
        image_keys=(f"{name}:{group}",),
    )


def cycle_of(row: dict[str, Any], source: str) -> str:
    cycle = str(row["cycle_category"]).strip().removesuffix(".0")
    if cycle not in CYCLES:
        raise DataError("row-shape", f"expected cycle_category 0 to 3, got {row['cycle_category']!r}; {REPAIR}", source)
    return cycle


def rotations(rows: Sequence[dict[str, Any]], path: Path) -> list[list[int]]:
    """Row numbers of each question's four rotations, questions in the order of their first row.

    Rotations have one question and one set of options. Where several images are asked the same, the n-th row of every
    cycle belongs to the n-th of them.

    Raises:
        DataError: `row-rotations` where a question has not each cycle equally often.
    """
    alike: dict[tuple[Any, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows):
        key = (row["question"], row["category"], *sorted(str(row[letter]) for letter in LETTERS))
        alike[key][cycle_of(row, f"{path}:{number}")].append(number)
    groups = []
    for key, cycles in alike.items():
        counts = [len(cycles[cycle]) for cycle in CYCLES]
        if len(set(counts)) > 1:
            raise DataError(
                "row-rotations",
                f"expected four rotations of {key[0]!r}, got {counts} rows of the cycles 0 to 3; {REPAIR}",
                str(path),
            )
        groups += [sorted(numbers) for numbers in zip(*(cycles[cycle] for cycle in CYCLES), strict=True)]
    return sorted(groups)


def image_opener(reader: RowReader | TsvRows, numbers: Sequence[int], max_pixels: int) -> Opener:
    """Opens the image of the first of these rows; neighbouring rows are compared with it, byte for byte."""
    first, checked = numbers[0], False

    def opened() -> Image.Image:
        nonlocal checked
        encoded = reader.row(first)["image"]
        image = decode_picture(decoded(encoded, f"{reader.path}:{first}"), f"{reader.path}:{first}", max_pixels)
        if not checked and list(numbers) == list(range(first, first + len(numbers))):
            for number in numbers[1:]:
                if reader.row(number)["image"] != encoded:
                    raise DataError(
                        "row-rotations",
                        f"expected the image of row {first} in its rotation, got another one; {REPAIR}",
                        f"{reader.path}:{number}",
                    )
        checked = True
        return image

    return opened


def decoded(text: Any, source: str) -> bytes:
    """The bytes of a base64 text, which may be wrapped into lines.

    Raises:
        DataError: `not-an-image`.
    """
    try:
        encoded = text.encode("ascii") if isinstance(text, str) else text
        return base64.b64decode(b"".join(encoded.split()), validate=True)
    except (binascii.Error, AttributeError, TypeError, ValueError) as error:
        raise DataError("not-an-image", f"expected an image as base64, got {error}; {REPAIR}", source) from None


def _spec(name: str, file: str) -> Spec:
    read_file: Callable[[Path, int], Contents] = partial(read, name=name, file=file)
    return Spec(
        name=name,
        source=Source(
            hub="DreamMr/HR-Bench",
            folders=("HR-Bench", "HR_Bench", "hrbench"),
            markers=(file, tsv_of(file)),
            patterns=(file,),
        ),
        read=read_file,
        rows=800,
        count_label="cycle",
        counts=dict.fromkeys(CYCLES, 200),
    )


SPEC_4K = _spec("hrbench4k", "hr_bench_4k.parquet")
SPEC_8K = _spec("hrbench8k", "hr_bench_8k.parquet")
