"""Tab-separated files with images in base64: texts at once, images a row at a time. Fields may hold line breaks."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError
from .source import REPAIR, check_columns

# Longest field: an 8K image in base64 has a tenth of it.
_MAX_FIELD = 2**28


class TsvRows:
    """Rows of a file with a header line; the place of each row is remembered, and one row is held.

    Args:
        columns: kept in `texts`, one mapping per row. large: only read by `row`.

    Raises:
        DataError: `file-not-tsv`, `file-columns`, or `row-shape` for a row with another number of fields.
    """

    def __init__(self, path: Path, columns: Sequence[str], large: Sequence[str]):
        self.path, self.large = path, list(large)
        self.lock = threading.Lock()
        self.texts: list[dict[str, Any]] = []
        self.starts: list[int] = []
        csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
        with path.open("rb") as file:
            rows = self._rows(file, 0)
            self.names, _ = next(rows, ([], 0))
            check_columns(self.names, [*columns, *large], path)
            for values, start in rows:
                row = self._named(values)
                self.texts.append({name: row[name] for name in columns})
                self.starts.append(start)

    def row(self, index: int) -> dict[str, Any]:
        """The large columns of row `index`."""
        with self.lock, self.path.open("rb") as file:
            file.seek(self.starts[index])
            values, _ = next(self._rows(file, self.starts[index]))
            row = self._named(values)
            return {name: row[name] for name in self.large}

    def _named(self, values: list[str]) -> dict[str, str]:
        if len(values) != len(self.names):
            raise DataError(
                "row-shape",
                f"expected {len(self.names)} fields, got {len(values)}; {REPAIR}",
                f"{self.path}:{len(self.texts)}",
            )
        return dict(zip(self.names, values, strict=True))

    def _rows(self, file: BinaryIO, start: int) -> Iterator[tuple[list[str], int]]:
        """Rows from here on, each with the place of its first byte."""
        place = start

        def lines() -> Iterator[str]:
            nonlocal place
            for number, line in enumerate(file):
                place += len(line)
                yield line.decode("utf-8-sig" if start == number == 0 else "utf-8")

        try:
            for values in csv.reader(lines(), delimiter="\t", strict=True):
                if values:
                    yield values, start
                start = place
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                "file-not-tsv", f"expected tab-separated UTF-8 text, got {error}; {REPAIR}", str(self.path)
            ) from None
