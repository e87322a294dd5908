"""Parquet files with images: text columns at once, image columns a row at a time and forwards."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import DataError
from .parquet_pages import NotStreamable, StreamedColumn
from .source import REPAIR, check_columns

logger = logging.getLogger(__name__)

# Bytes of a row group's column from which it is read as a stream.
LARGE = 2**25
# Column chunks are read through a buffer of this size: one row group may hold gigabytes of images.
_BUFFER = 2**20


@contextmanager
def _explained(path: Path) -> Iterator[Any]:
    """The Parquet module; its errors become `DataError`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            "file-needs-pyarrow",
            "expected pyarrow to read Parquet, got none; pip install 'vreflection[eval]'",
            str(path),
        ) from None
    try:
        yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).strip().splitlines()[:1]
        raise DataError(
            "file-not-parquet",
            f"expected a whole Parquet file, got {what[0] if what else type(error).__name__}; {REPAIR}",
            str(path),
        ) from None


def column_types(path: Path) -> dict[str, str]:
    """Each column's type as text, such as `struct<bytes: binary, path: string>`; raises as `read_columns`."""
    with _explained(path) as parquet, parquet.ParquetFile(path) as file:
        return {field.name: str(field.type) for field in file.schema_arrow}


def read_columns(path: Path, columns: Sequence[str], others: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of small columns.

    Args:
        columns: names; `image.path` is one field of a struct. others: columns that must be there but are not read.

    Raises:
        DataError: `file-not-parquet`, `file-columns`, `file-needs-pyarrow`.
    """
    with _explained(path) as parquet, parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
        check_columns(file.schema_arrow.names, [name.partition(".")[0] for name in (*columns, *others)], path)
        return file.read(columns=list(columns), use_threads=False).to_pylist()


class RowReader:
    """Single rows of a Parquet file's large columns, cheap when asked for in ascending order; one row is held."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, list(columns)
        self.lock = threading.Lock()
        self.at, self.held = -1, {}
        self.file: Any = None
        self.batches: Iterator[Any] = iter(())
        self.next = -1  # row of the next batch; before the first one nothing is open
        self.streamed: dict[str, StreamedColumn] | None = None
        self.group = -1

    def row(self, index: int) -> dict[str, Any]:
        """Values of row `index`, text of very large columns as bytes; raises `DataError` as `read_columns`."""
        with self.lock, _explained(self.path) as parquet:
            if index != self.at:
                if self.file is None:
                    self.file = parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=_BUFFER)
                self.held = {}  # before the next one is read
                self.held, self.at = self._read(index), index
            return self.held

    def _read(self, index: int) -> dict[str, Any]:
        group, start = self._group_of(index)
        if group != self.group:
            self.group, self.streamed = group, self._stream(group)
        if self.streamed is not None:
            try:
                return {name: column.value(index - start) for name, column in self.streamed.items()}
            except NotStreamable as error:
                self._give_up(error)
        if self.next < start or self.next > index:
            rest = list(range(group, self.file.num_row_groups))
            self.batches = self.file.iter_batches(
                batch_size=1, row_groups=rest, columns=self.columns, use_threads=False
            )
            self.next = start
        while True:
            batch = next(self.batches)
            self.next += 1
            if self.next > index:
                return batch.to_pylist()[0]

    def _stream(self, group: int) -> dict[str, StreamedColumn] | None:
        """Streams of a row group's columns where one is too large for the library, which reads pages whole."""
        rows, schema = self.file.metadata.row_group(group), self.file.schema
        places = {schema.column(n).path: n for n in range(len(schema)) if schema.column(n).path in self.columns}
        chunks = {name: rows.column(place) for name, place in places.items()}
        flat = chunks.keys() == set(self.columns)
        if not flat or max(chunk.total_uncompressed_size for chunk in chunks.values()) < LARGE:
            return None
        levels = {name: schema.column(place) for name, place in places.items()}
        try:
            if any(column.max_repetition_level or column.max_definition_level > 1 for column in levels.values()):
                raise NotStreamable("nested values")
            return {
                name: StreamedColumn(self.path, chunk, levels[name].max_definition_level == 1)
                for name, chunk in chunks.items()
            }
        except NotStreamable as error:
            self._give_up(error)
            return None

    def _give_up(self, error: NotStreamable) -> None:
        logger.warning(
            "%s: cannot be read as a stream (%s); pages are read whole, which may take memory of the file's size",
            self.path,
            error,
        )
        self.streamed = None

    def _group_of(self, index: int) -> tuple[int, int]:
        """The row group a row lies in, and that group's first row."""
        start = 0
        for group in range(self.file.num_row_groups):
            rows = self.file.metadata.row_group(group).num_rows
            if index < start + rows:
                return group, start
            start += rows
        raise DataError("file-shape", f"expected row {index}, got a file of {start} rows; {REPAIR}", str(self.path))
