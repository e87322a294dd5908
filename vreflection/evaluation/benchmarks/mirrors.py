"""Mirrors of benchmarks as the hub's data-set library writes them: Parquet files of one split, images inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import DataError
from ..fingerprints import file_digest
from .parquet_rows import RowReader, column_types, read_columns
from .pictures import Opener, decode_picture
from .source import REPAIR

IMAGE = "image"


@dataclass(frozen=True)
class MirrorRow:
    """A row's texts, what opens its image, and where it is, for messages."""

    texts: Mapping[str, Any]
    image: Opener
    source: str


def mirror_files(folder: Path, pattern: str) -> dict[str, Path]:
    """The files of a split, in order, by their names below `folder`; empty where there are none."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}


def mirror_rows(paths: Sequence[Path], columns: Sequence[str], max_pixels: int) -> Iterator[MirrorRow]:
    """Rows of all files.

    Args:
        columns: of texts; the image is in the column `image`.

    Raises:
        DataError: `file-not-parquet`, or `file-columns` where one is missing or images are not stored as bytes.
    """
    for path in paths:
        reader = RowReader(path, (IMAGE,))
        rows = read_columns(path, columns, others=(IMAGE,))
        check_image_column(path, IMAGE)
        for number, row in enumerate(rows):
            yield MirrorRow(row, image_in_row(reader, number, IMAGE, max_pixels), f"{path}:{number}")


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: file_digest(path) for name, path in files.items()}


def image_in_row(reader: RowReader, number: int, column: str, max_pixels: int) -> Opener:
    """Opens the image of a row whose column is a struct of bytes and path."""

    def opened() -> Image.Image:
        value = reader.row(number)[column] or {}
        return decode_picture(value.get("bytes") or b"", f"{reader.path}:{number}:{column}", max_pixels)

    return opened


def check_image_column(path: Path, column: str) -> None:
    """Raise `DataError` `file-columns` where images are not stored as bytes."""
    kind = column_types(path).get(column, "none")
    if not kind.startswith("struct<") or "bytes: binary" not in kind or "path: string" not in kind:
        raise DataError(
            "file-columns", f"expected {column} as a struct of bytes and path, got {kind}; {REPAIR}", str(path)
        )
