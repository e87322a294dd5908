"""Where each row of a data file lies: an index built once, kept on disk, and shared by every process that reads it.

The index is read through a memory map; the data file itself through positioned reads, so that its pages do not count
as a worker's memory and a file cut short is an error message, not a crash. The rows of a Parquet file are copied into
the index as JSON text, because Parquet cannot be read row by row.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vreflection.data.array_file import read_arrays, write_arrays
from vreflection.data.atomic import atomic_write
from vreflection.data.json_list import MAX_ROW_BYTES, scan_json_list
from vreflection.data.parquet_rows import parquet_rows
from vreflection.errors import DataError

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".vr-index"
# JSON below this is scanned anew by every process (some hundredths of a second) instead of leaving a file beside it.
SMALL_FILE_BYTES = 2**20
_MAGIC = b"VRINDEX1"
_END_BYTES = 4096
# Seconds to wait for another process's index, and between looks.
_LOCK_WAIT, _LOCK_LOOK = 300.0, 0.05
_told_folders: set[str] = set()


class Fingerprint(NamedTuple):
    """What tells one version of a data file from another without reading it whole."""

    size: int
    mtime_ns: int
    ends_crc: int  # of the first and last 4 KiB


def fingerprint(path: str | Path) -> Fingerprint:
    """The file's fingerprint.

    Raises:
        DataError: `file-missing`.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            crc = zlib.crc32(file.read(_END_BYTES))
            file.seek(max(0, status.st_size - _END_BYTES))
            return Fingerprint(status.st_size, status.st_mtime_ns, zlib.crc32(file.read(_END_BYTES), crc))
    except OSError as error:
        raise DataError(
            "file-missing", f"expected a readable data file, got {error.strerror}; check the path", str(path)
        ) from None


@dataclass(frozen=True)
class RowIndex:
    """Places of a file's rows.

    Attributes:
        spans_n3: int64 first byte, byte after the last, and row number (from 1; the line of a JSONL file).
        is_meta: the rows are entries that name other data files.
        text_path: the file that the spans point into: the data file, or this index for Parquet.
        of: the version of the data file that was indexed.
    """

    spans_n3: np.ndarray
    is_meta: bool
    text_path: Path
    of: Fingerprint


def load_index(path: str | Path, index_folder: str | Path | None = None) -> RowIndex:
    """The index of a data file, built now if there is none, or if it is damaged or of another version of the file.

    Args:
        path: `.jsonl`, `.parquet`, or JSON under any other name.
        index_folder: where the index is kept; otherwise beside the data file, or where that folder is not writable in
            the user's cache folder (told once in the log). JSON under 1 MiB is indexed in memory then.

    Raises:
        DataError: `file-missing`, `file-not-json`, `file-shape`, `file-not-parquet`, `file-needs-pyarrow`,
            `file-changed` (written to while being indexed), or `file-index` where no folder takes the index.
    """
    path = Path(path)
    version = fingerprint(path)
    places = index_places(path, index_folder)
    found = _find_index(places, path, version)
    if found is not None:
        return found
    if version.size < SMALL_FILE_BYTES and index_folder is None and path.suffix != ".parquet":
        spans_n3, is_meta = _build(path, version, _no_text)
        return RowIndex(spans_n3, is_meta, path, version)
    with _one_builder(path):
        return _find_index(places, path, version) or _store(path, version, places)


def index_places(path: Path, index_folder: str | Path | None) -> list[Path]:
    """Index files to try, best first. Outside the data folder the name carries a hash of the data file's whole path."""
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    elsewhere = f"{path.name}-{digest}{INDEX_SUFFIX}"
    if index_folder is not None:
        return [Path(index_folder) / elsewhere]
    beside = path.with_name(path.name + INDEX_SUFFIX)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        return [beside]
    return [beside, cache / "vreflection" / "indexes" / elsewhere]


@contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let processes that start together build an index one after the other, so that all but one find it.

    The lock is on the data file and ends with its process. Where there are no locks (some network file systems) all
    build; that is slower, and as safe.
    """
    with open(path, "rb") as file, ExitStack() as held:
        try:
            import fcntl

            for _ in range(round(_LOCK_WAIT / _LOCK_LOOK)):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(_LOCK_LOOK)
                else:
                    held.callback(fcntl.flock, file, fcntl.LOCK_UN)
                    break
        except (ImportError, OSError):
            pass
        yield


def _store(path: Path, version: Fingerprint, places: list[Path]) -> RowIndex:
    """Build the index into the first folder that takes it."""
    refused: list[str] = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place) as file:
                spans_n3, is_meta = _build(path, version, file.write)
                write_arrays(file, _MAGIC, {"of": list(version), "is_meta": is_meta}, {"spans": spans_n3})
        except OSError as error:
            refused.append(f"{place.parent} ({error.strerror})")
            continue
        if refused and str(place) not in _told_folders:
            _told_folders.add(str(place))
            logger.warning("row index of %s kept in %s: could not write to %s", path, place.parent, ", ".join(refused))
        found = _read_index(place, path, version)
        if found is not None:
            return found
        refused.append(f"{place.parent} (what was written cannot be read back)")
    raise DataError(
        "file-index",
        f"expected a folder that can hold the row index, got {', '.join(refused)}; free space or name an index_folder",
        str(path),
    )


def _find_index(places: list[Path], path: Path, version: Fingerprint) -> RowIndex | None:
    """The first usable index."""
    return next((found for place in places if (found := _read_index(place, path, version)) is not None), None)


def _read_index(place: Path, path: Path, version: Fingerprint) -> RowIndex | None:
    """The index in `place`, or None where it is absent, damaged or of another version of the data file."""
    found = read_arrays(place, _MAGIC)
    if found is None or Fingerprint(*found[0]["of"]) != version:
        return None
    header, arrays = found
    return RowIndex(arrays["spans"], header["is_meta"], place if path.suffix == ".parquet" else path, version)


def _no_text(text: bytes) -> int:
    raise AssertionError("only Parquet rows are copied, and never in memory")


def _build(path: Path, version: Fingerprint, write_text: Callable[[bytes], Any]) -> tuple[np.ndarray, bool]:
    """Spans [n, 3] of a file's rows, and whether it is a meta file; Parquet rows go through `write_text` as JSON."""
    is_meta = False
    spans = array("q")
    if path.suffix == ".parquet":
        at = 0
        for number, row in enumerate(parquet_rows(path), start=1):
            text = json.dumps(row, default=_stand_in).encode() + b"\n"
            write_text(text)
            spans.extend((at, at + len(text), number))
            at += len(text)
    else:
        with open(path, "rb") as file:
            if path.suffix == ".jsonl":
                for span in _scan_lines(file, path):
                    spans.extend(span)
            else:
                for number, (start, end, value) in enumerate(scan_json_list(file, path), start=1):
                    spans.extend((start, end, number))
                    is_meta = is_meta or (isinstance(value, dict) and "data_path" in value)
    if fingerprint(path) != version:
        message = "expected a file at rest, got one written to while it was indexed; start again when it is whole"
        raise DataError("file-changed", message, str(path))
    return np.frombuffer(spans, dtype=np.int64).reshape(-1, 3), is_meta


def _stand_in(value: Any) -> dict[str, str]:
    """For Parquet values that JSON does not know: an object, which no check of a row accepts."""
    return {"unsupported type": type(value).__name__}


def _scan_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, int]]:
    """Non-blank lines. Lines are not parsed, except until one proves that the file holds JSON at all."""
    at = number = 0
    proven = False
    first_error: ValueError | RecursionError | None = None
    first_bad = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        start, at = at, at + len(line)
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_ROW_BYTES)):  # such a row is refused when read
            at += len(rest)
        if start == 0 and line.startswith(b"\xef\xbb\xbf"):
            start, line = 3, line[3:]
        if not line or line.isspace():
            continue
        if not proven:
            try:
                json.loads(line.decode())
                proven = True
            except (ValueError, RecursionError) as error:
                first_error, first_bad = first_error or error, first_bad or number
        yield start, at, number
    if first_error is not None and not proven:
        raise DataError(
            "file-not-json",
            f"no line is JSON: {path}:{first_bad}: expected one JSON object per line, got {first_error}; "
            "check the file type",
            str(path),
        )
