"""Rows of a data file as a sequence that reads and checks each row when it is asked for.

Opening costs an index (`row_index`), not a parse: any number of processes can hold the same file of any size.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from vreflection.data.clean_index import CleanIndex, check_same_files, is_clean_index, read_clean_index
from vreflection.data.json_list import MAX_ROW_BYTES
from vreflection.data.pixels import ImageView, checked_view
from vreflection.data.row_index import Fingerprint, RowIndex, fingerprint, load_index
from vreflection.data.row_schema import Sample, describe, parse_row
from vreflection.errors import DataError


def open_rows(
    path: str | Path,
    image_folder: str | Path | None = None,
    dataset: str = "",
    index_folder: str | Path | None = None,
    image_view: ImageView | None = None,
) -> "Rows":
    """Open a data file.

    Args:
        path: `.jsonl` (one row per line), `.parquet`, or a JSON list of rows or of meta entries `{ds_name, data_path,
            image_folder, ds_type}`; a meta file stands for its files end to end. Relative paths in meta entries start
            at the meta file's folder. Or a clean index of such a file, as `vreflection data check` writes it.
        image_folder: root of the images; needed for rows, overrides the entries' own for a meta file, and for a clean
            index the one that was checked.
        dataset: name for rows that carry no `dataset` key (a meta entry's `ds_name` is used there; a clean index
            has its own).
        index_folder: where to keep the row index instead of beside the data file.
        image_view: how images are read, `stored` or `shown` (see `pixels`): the view that the boxes are fractions of.
            None is the clean index's, or `stored`.

    Raises:
        ValueError: no `image_folder` for a file of rows.
        DataError: a reason that starts with `file-`, for files that cannot be used at all. A bad row or meta entry
            raises when it is read.
            `file-changed` where the data file of a clean index is no longer the one that was checked, `file-view` where
            it was checked with the other view.
    """
    return Rows(path, image_folder, dataset, index_folder, image_view)


class Rows(Sequence[Sample]):
    """A lazily read sequence of checked rows; see `open_rows`.

    `rows[i]` raises `DataError` for a bad row, with its `file:row`. Pickles as its settings: a worker process opens
    the files again, and refuses them with `file-changed` if they are no longer the ones that were opened here.
    """

    def __init__(
        self,
        path: str | Path,
        image_folder: str | Path | None = None,
        dataset: str = "",
        index_folder: str | Path | None = None,
        image_view: ImageView | None = None,
    ):
        if image_view is not None:
            checked_view(image_view, "image_view")
        self.path = Path(path)
        self._settings = (str(path), image_folder, dataset, index_folder, image_view)
        data = self.path
        self._clean: CleanIndex | None = None
        if is_clean_index(path):
            self._clean, self._clean_version = read_clean_index(path), fingerprint(path)
            data, dataset = self._clean.data, self._clean.dataset
            image_folder = self._clean.image_folder if image_folder is None else image_folder
            image_view = self._clean.image_view if image_view is None else image_view
            _check_same_view(self._clean, self.path, image_view)
        self.image_view: ImageView = image_view or "stored"
        self._parts = list(_open_parts(data, image_folder, dataset, index_folder, self.image_view, ()))
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        if self._clean is not None:
            check_same_files(self._clean, self.path, self._data_versions())

    def __len__(self) -> int:
        if self._clean is not None:
            return len(self._clean.chosen_n)
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.parse(i)[0] for i in range(*index.indices(len(self)))]
        return self.parse(index)[0]

    def parse(self, index: int) -> tuple[Sample, int]:
        """The sample, and how many of its boxes were clamped.

        Raises:
            DataError: the first thing wrong with the row.
        """
        part, local = self._locate(index)
        return part.parse(local)

    def source(self, index: int) -> str:
        """`file:row` of a row, without reading it."""
        part, local = self._locate(index)
        return part.source(local)

    def image_sizes(self, index: int) -> list[tuple[int, int]] | None:
        """Width and height (px) of a row's images without opening them; None where no clean index tells."""
        place = self._place(index)
        if self._clean is None:
            part, local = self._locate(place)
            return part.rows.image_sizes(local) if isinstance(part, _InnerRows) else None
        start = int(self._clean.image_ends_n[place - 1]) if place else 0
        return [
            (width, height) for width, height in self._clean.sizes_m2[start : self._clean.image_ends_n[place]].tolist()
        ]

    @property
    def versions(self) -> dict[str, Fingerprint]:
        """The files behind the rows (a clean index first), and which version of each was opened."""
        own = {} if self._clean is None else {str(self.path): self._clean_version}
        return {**own, **self._data_versions()}

    def _data_versions(self) -> dict[str, Fingerprint]:
        found: dict[str, Fingerprint] = {}
        for part in self._parts:
            found |= part.versions
        return found

    def _place(self, index: int) -> int:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"expected a row index below {len(self)}, got {index}")
        return place

    def _locate(self, index: int) -> "tuple[_FileRows | _InnerRows | _BadEntry, int]":
        place = self._place(index)
        if self._clean is not None:
            place = int(self._clean.chosen_n[place])
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self._parts[number]
        return part, place - (int(self._ends[number]) - len(part))

    def __reduce__(self):
        return _open_again, (self._settings, self.versions)


def _open_again(settings: tuple[Any, ...], versions: dict[str, Fingerprint]) -> Rows:
    rows = Rows(*settings)
    for path, version in rows.versions.items():
        if versions.get(path) != version:
            raise _changed(path)
    return rows


@dataclass(frozen=True)
class _BadEntry:
    """A meta entry that names no usable file: one row that cannot be read."""

    error: DataError
    versions: ClassVar[dict[str, Fingerprint]] = {}

    def __len__(self) -> int:
        return 1

    def source(self, local: int) -> str:
        return self.error.source or ""

    def parse(self, local: int) -> tuple[Sample, int]:
        raise DataError(self.error.reason, self.error.message, self.error.source)


@dataclass(frozen=True)
class _InnerRows:
    """A clean index that a meta file names."""

    rows: Rows

    @property
    def versions(self) -> dict[str, Fingerprint]:
        return self.rows.versions

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, local: int) -> str:
        return self.rows.source(local)

    def parse(self, local: int) -> tuple[Sample, int]:
        return self.rows.parse(local)


class _FileRows:
    """The rows of one file."""

    def __init__(self, path: Path, index: RowIndex, image_folder: str | Path, dataset: str, image_view: ImageView):
        self.path, self.index, self.image_folder, self.dataset = path, index, image_folder, dataset
        self.image_view: ImageView = image_view
        self._file = open(index.text_path, "rb")  # noqa: SIM115 - as long as the rows

    @property
    def versions(self) -> dict[str, Fingerprint]:
        return {str(self.path): self.index.of}

    def __len__(self) -> int:
        return len(self.index.spans_n3)

    def source(self, local: int) -> str:
        return f"{self.path}:{self.index.spans_n3[local, 2]}"

    def parse(self, local: int) -> tuple[Sample, int]:
        return parse_row(self.value(local), self.image_folder, self.source(local), self.dataset, self.image_view)

    def value(self, local: int) -> Any:
        """The row as decoded JSON."""
        start, end, _ = self.index.spans_n3[local].tolist()
        if end - start > MAX_ROW_BYTES:
            got = f"{(end - start) / 2**20:.0f} MB"
            raise DataError(
                "row-too-large",
                f"expected a row of at most {MAX_ROW_BYTES >> 20} MB, got {got}; remove the row",
                self.source(local),
            )
        text = self._read_at(start, end - start)
        if len(text) != end - start:
            raise _changed(str(self.path))
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            if self.path.suffix != ".jsonl":  # parsed when it was indexed
                raise _changed(str(self.path)) from None
            raise DataError(
                "row-not-json",
                f"expected one JSON object per line, got {error}; fix or remove the row",
                self.source(local),
            ) from None

    def _read_at(self, start: int, count: int) -> bytes:
        # Positioned, because forked workers share the file's position.
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, start)
        with open(self._file.name, "rb") as file:
            file.seek(start)
            return file.read(count)


def _open_parts(
    path: Path,
    image_folder: str | Path | None,
    dataset: str,
    index_folder: str | Path | None,
    image_view: ImageView,
    parents: tuple[Path, ...],
) -> Iterator[_FileRows | _InnerRows | _BadEntry]:
    """The file's own rows, or those of the files that a meta file names."""
    index = load_index(path, index_folder)
    if not index.is_meta:
        yield _FileRows(path, index, _need_folder(image_folder, path), dataset, image_view)
        return
    entries = _FileRows(path, index, "", "", image_view)
    for local in range(len(entries)):
        entry, source = entries.value(local), entries.source(local)
        try:
            _check_entry(entry, path, parents, source)
        except DataError as error:
            yield _BadEntry(error)
            continue
        folder = path.parent / entry["image_folder"] if image_folder is None else image_folder
        target, lineage = path.parent / entry["data_path"], (*parents, path.resolve())
        if is_clean_index(target):
            yield _InnerRows(Rows(target, folder, entry["ds_name"], index_folder, image_view))
        else:
            yield from _open_parts(target, folder, entry["ds_name"], index_folder, image_view, lineage)


def _check_entry(entry: Any, path: Path, parents: tuple[Path, ...], source: str) -> None:
    wanted = ("ds_name", "data_path", "image_folder")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in wanted):
        raise DataError(
            "meta-entry",
            f"expected an object with text {', '.join(wanted)}, got {describe(entry)}; fix the entry",
            source,
        )
    if (path.parent / entry["data_path"]).resolve() in (path.resolve(), *parents):
        got = f"a meta file ({entry['data_path']}) that leads back here"
        raise DataError("meta-entry", f"expected a data file, got {got}; fix the entry", source)


def _need_folder(image_folder: str | Path | None, path: Path) -> str | Path:
    if image_folder is None:
        raise ValueError(f"expected image_folder for the rows of {path}, got None; only meta files carry their own")
    if not Path(image_folder).is_dir():
        raise DataError("file-missing", f"expected a folder of images at {image_folder}, got none; check it", str(path))
    return image_folder


def _check_same_view(clean: CleanIndex, path: Path, image_view: ImageView) -> None:
    if image_view != clean.image_view:
        command = f"vreflection data check --data {clean.data} --image-view {image_view} --out {path}"
        raise DataError(
            "file-view",
            f"expected images read as they were checked ({clean.image_view}), got {image_view}; set data.image_view or "
            f"--image-view to {clean.image_view}, or run `{command}`",
            str(path),
        )


def _changed(path: str) -> DataError:
    return DataError("file-changed", "expected the file that was opened, got another version of it; start again", path)
