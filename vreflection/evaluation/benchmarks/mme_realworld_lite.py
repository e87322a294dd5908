"""MME-RealWorld-Lite: 1919 questions with five options, the last of which says that the image does not show it.

Distributed as `data.zip` with `MME-RealWorld-Lite.json` and `imgs/` inside; read from there, or from where it was
unpacked. Research use only, says its card.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.json_list import scan_json_list
from ...errors import DataError
from ..fingerprints import bytes_digest, file_digest, listing_digest
from ..records import Item
from .choices import letter_of, without_letter
from .pictures import Opener, decode_picture, picture_file, picture_path
from .source import REPAIR, Contents, Source, Spec, check_columns
from .zip_images import ZipImages

QUESTIONS, ARCHIVE = "MME-RealWorld-Lite.json", "data.zip"
KEYS = ("Question_id", "Image", "Text", "Answer choices", "Ground truth", "Category", "Subtask", "Task")
# Satellite pictures: larger than what is allowed elsewhere. 1.2 GB decoded.
MAX_PIXELS = 400_000_000


def read(folder: Path, max_pixels: int) -> Contents:
    """Items in the file's order, questions on one image side by side."""
    tables = [path for path in (folder / QUESTIONS, folder / "data" / QUESTIONS) if path.is_file()]
    if tables:
        table, archive = tables[0], None
        with table.open("rb") as file:
            rows = [row for _, _, row in scan_json_list(file, table)]
        files = {QUESTIONS: file_digest(table)}
    else:
        archive = ZipImages(folder / ARCHIVE)
        member = archive.find(QUESTIONS)
        if member is None:
            raise DataError("benchmark-missing", f"expected {QUESTIONS} inside, got none; {REPAIR}", str(archive.path))
        data, table = archive.read(member), archive.path / QUESTIONS
        rows = [row for _, _, row in scan_json_list(io.BytesIO(data), table)]
        files = {QUESTIONS: bytes_digest(data)}
    if archive is None and (folder / ARCHIVE).is_file() and not _image_folders(folder):
        archive = ZipImages(folder / ARCHIVE)
    if archive is not None:
        files[ARCHIVE] = file_digest(archive.path)
        find: Callable[[str, str], Opener] = partial(_in_archive, archive, max_pixels)
    else:
        find = partial(_in_folders, folder, max_pixels)
        names = sorted({row["Image"] for row in rows if isinstance(row, dict) and isinstance(row.get("Image"), str)})
        files["images"] = listing_digest([_path(folder, name, str(table)) for name in names], folder)
    items = [_item(row, find, f"{table}:{number}") for number, row in enumerate(rows, start=1)]
    first: dict[tuple[str, ...], int] = {}
    for place, item in enumerate(items):
        first.setdefault(item.image_keys, place)
    return Contents(sorted(items, key=lambda item: first[item.image_keys]), files)


def _item(row: Any, find: Callable[[str, str], Opener], source: str) -> Item:
    if not isinstance(row, dict):
        raise DataError("row-type", f"expected an object, got {type(row).__name__}; {REPAIR}", source)
    check_columns(list(row), KEYS, Path(source))
    choices = row["Answer choices"]
    texts = [key for key in KEYS if key != "Answer choices" and not isinstance(row[key], str)]
    if texts or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError("row-type", f"expected texts and a list of choices, got {row}; {REPAIR}", source)
    return Item(
        benchmark="mme-realworld-lite",
        id=row["Question_id"],
        question=row["Text"].strip(),
        options=tuple(without_letter(choice, index, source) for index, choice in enumerate(choices)),
        gold={"original": letter_of(row["Ground truth"], source)},
        labels={"task": row["Task"], "domain": row["Subtask"], "category": row["Category"]},
        group=row["Question_id"],
        images=(find(row["Image"], source),),
        image_keys=(f"mme-realworld-lite:{row['Image']}",),
    )


def _in_archive(archive: ZipImages, max_pixels: int, name: str, source: str) -> Opener:
    member = archive.find(name)
    if member is None:
        raise DataError("image-missing", f"expected {name!r} in {archive.path}, got none; {REPAIR}", source)

    def opened() -> Image.Image:
        return decode_picture(archive.read(member), f"{archive.path}:{member.filename}", max_pixels)

    return opened


def _in_folders(folder: Path, max_pixels: int, name: str, source: str) -> Opener:
    return picture_file(_path(folder, name, source), max_pixels)


def _image_folders(folder: Path) -> list[Path]:
    return [path for path in (folder / "data" / "imgs", folder / "imgs") if path.is_dir()]


def _path(folder: Path, name: str, source: str) -> Path:
    """Where an unpacked image lies; it never leaves the benchmark's folder."""
    roots = _image_folders(folder)
    if not roots:
        raise DataError(
            "image-missing",
            f"expected {ARCHIVE} or the folder data/imgs or imgs, got none; {SPEC.source.how_to_get()}",
            str(folder),
        )
    return picture_path(roots[0], name, source)


SPEC = Spec(
    name="mme-realworld-lite",
    source=Source(
        hub="yifanzhang114/MME-RealWorld-Lite",
        folders=("MME-RealWorld-Lite", "mme-realworld-lite"),
        markers=(ARCHIVE, QUESTIONS, f"data/{QUESTIONS}"),
        patterns=(ARCHIVE,),
        licence="research only",
    ),
    read=read,
    rows=1919,
    count_label="task",
    counts={"Perception": 1169, "Reasoning": 750},
    max_pixels=MAX_PIXELS,
)
