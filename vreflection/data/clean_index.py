"""The clean index that `vreflection data check` writes: which rows of which version of a data file to use."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vreflection.data.array_file import has_magic, read_arrays, write_arrays
from vreflection.data.atomic import atomic_write
from vreflection.data.pixels import ImageView
from vreflection.data.row_index import Fingerprint, fingerprint
from vreflection.errors import DataError

_MAGIC = b"VRCLEAN1"


@dataclass(frozen=True)
class CleanIndex:
    """A read clean index.

    Attributes:
        data: the data file it is for.
        image_folder: root of the images when they were checked, None where a meta file names its own.
        dataset: name for rows without one.
        files: data files behind the rows, in order: fingerprint and SHA-256 when they were checked.
        chosen_n: int64 positions of the usable rows among all rows of the data file.
        image_ends_n: int64, where each chosen row's images end in `sizes_m2`.
        sizes_m2: int32 width and height (px) of each image.
        image_view: how the images were read.
    """

    data: Path
    image_folder: str | None
    dataset: str
    files: tuple[tuple[Fingerprint, str], ...]
    chosen_n: np.ndarray
    image_ends_n: np.ndarray
    sizes_m2: np.ndarray
    image_view: ImageView = "stored"


def is_clean_index(path: str | Path) -> bool:
    """Whether a file was written by `write_clean_index`."""
    return has_magic(path, _MAGIC)


def write_clean_index(
    path: str | Path,
    data: str | Path,
    image_folder: str | Path | None,
    dataset: str,
    files: dict[str, Fingerprint],
    chosen: Sequence[int],
    sizes: Sequence[Sequence[tuple[int, int]]],
    image_view: ImageView = "stored",
) -> None:
    """Write a clean index, whole or not at all.

    Args:
        path: the file to write.
        data, image_folder, dataset: as in `rows.open_rows`.
        files: the data files behind the rows, as `Rows.versions` gives them; each is read once for its SHA-256.
        chosen: positions of the usable rows.
        sizes: (width, height) of each chosen row's images. image_view: in which view.

    Raises:
        DataError: `file-changed` where a data file is no longer the one that was checked.
        OSError: the folder cannot be written to.
    """
    recorded = []
    for name, version in files.items():
        recorded.append([list(version), _sha256(name)])
        if fingerprint(name) != version:
            raise DataError(
                "file-changed", "expected the file that was checked, got another version; check again", name
            )
    folder = Path(path).absolute().parent
    header = {
        "data": [os.path.relpath(Path(data).absolute(), folder), str(Path(data).absolute())],
        "image_folder": None if image_folder is None else str(Path(image_folder).absolute()),
        "dataset": dataset,
        "image_view": image_view,
        "files": recorded,
    }
    arrays = {
        "chosen": np.asarray(chosen, dtype=np.int64),
        "image_ends": np.cumsum([len(images) for images in sizes], dtype=np.int64),
        "sizes": np.array([size for images in sizes for size in images], dtype=np.int32).reshape(-1, 2),
    }
    with atomic_write(path) as file:
        write_arrays(file, _MAGIC, header, arrays)


def read_clean_index(path: str | Path) -> CleanIndex:
    """Read a clean index; its data file is looked for beside it as it was, then under its absolute path.

    Raises:
        DataError: `file-damaged`, or `file-missing` where the data file is in neither place.
    """
    found = read_arrays(path, _MAGIC)
    if found is None:
        message = "expected a whole clean index, got a damaged one; run `vreflection data check` again"
        raise DataError("file-damaged", message, str(path))
    header, arrays = found
    places = [Path(os.path.normpath(Path(path).parent / header["data"][0])), Path(header["data"][1])]
    data = next((place for place in places if place.is_file()), None)
    if data is None:
        raise DataError(
            "file-missing",
            f"expected the data file of this clean index at {' or '.join(map(str, places))}, got none; "
            "move it there or run `vreflection data check` again",
            str(path),
        )
    files = tuple((Fingerprint(*version), digest) for version, digest in header["files"])
    return CleanIndex(
        data, header["image_folder"], header["dataset"], files, arrays["chosen"], arrays["image_ends"], arrays["sizes"],
        header.get("image_view", "stored"),
    )  # fmt: skip


def check_same_files(clean: CleanIndex, path: Path, files: dict[str, Fingerprint]) -> None:
    """Refuse data files that are not those that were checked; a copy with the same bytes is the same file.

    Raises:
        DataError: `file-changed`.
    """
    for (version, digest), (name, now) in zip(clean.files, files.items()):
        if now != version and (now.size != version.size or _sha256(name) != digest):
            raise _stale(path, f"another version of {name}", clean)
    if len(clean.files) != len(files):
        raise _stale(path, f"{len(files)} files behind {clean.data} instead of {len(clean.files)}", clean)


def _stale(path: Path, got: str, clean: CleanIndex) -> DataError:
    command = f"vreflection data check --data {clean.data} --out {path}"
    return DataError("file-changed", f"expected the data that was checked, got {got}; run `{command}` again", str(path))


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
