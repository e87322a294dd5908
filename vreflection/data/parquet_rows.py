"""Rows of a Parquet file as plain values, a batch at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vreflection.errors import DataError

_COLUMNS = ("dataset", "split", "question_id", "image", "conversations", "bboxes", "box_images")
# Lists may be nested columns or JSON text; a text image may be a plain path.
_MAYBE_JSON = ("image", "conversations", "bboxes", "box_images")
_BATCH_ROWS = 512


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each row's known columns, nulls left out.

    Raises:
        DataError: `file-needs-pyarrow`, `file-not-parquet`, or `file-shape` for columns that cannot hold rows.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            "file-needs-pyarrow",
            "expected pyarrow to read Parquet, got none; pip install 'vreflection[train]' or convert the file to JSONL",
            str(path),
        ) from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        _check_columns(file.schema_arrow, columns, path)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                yield {name: _plain(name, value) for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).strip().splitlines()[:1]
        raise DataError(
            "file-not-parquet",
            f"expected a whole Parquet file, got {what[0] if what else type(error).__name__}; download it again",
            str(path),
        ) from None


def _check_columns(schema: Any, columns: list[str], path: Path) -> None:
    from pyarrow import types

    if "conversations" not in columns:
        raise DataError(
            "file-shape",
            f"expected the columns conversations, image and bboxes, got {', '.join(schema.names)}; rename the columns",
            str(path),
        )
    kind = schema.field("image").type if "image" in columns else None
    if kind is not None and (types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(
            "file-shape",
            f"expected image to hold paths as text or lists of text, got {kind}; "
            "write the images to files and put their paths into the column",
            str(path),
        )


def _plain(name: str, value: Any) -> Any:
    """A column's value, decoded where it is a list written as JSON text; the row check judges what stays text."""
    if name in _MAYBE_JSON and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
