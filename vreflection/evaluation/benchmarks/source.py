"""Where a benchmark's files come from, what they must hold, and what is left of them once they are read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.images import MAX_IMAGE_PIXELS
from ...errors import ConfigError, DataError
from ..records import LETTERS, Item


@dataclass(frozen=True)
class Source:
    """Where a benchmark is published and how its folder is recognised.

    Attributes:
        hub: id of the data set. revision: commit whose files the counts were taken from, where one is known.
        folders: names its folder may have below the data root. markers: one of these files lies in it.
        patterns: files to download. mirrors: patterns of the files of another form of the data set, read as well.
        licence: what its card says where that restricts its use.
    """

    hub: str
    folders: tuple[str, ...]
    markers: tuple[str, ...]
    patterns: tuple[str, ...]
    revision: str | None = None
    licence: str = ""
    mirrors: tuple[str, ...] = ()

    def how_to_get(self) -> str:
        pinned = f" --revision {self.revision}" if self.revision else ""
        files = "".join(f" --include '{pattern}'" for pattern in self.patterns)
        return (
            f"hf download {self.hub} --repo-type dataset{pinned}{files} --local-dir <data root>/{self.folders[0]}, "
            "or pass --hub"
        )


@dataclass(frozen=True)
class Contents:
    """What a loader found: items, in which those that share an image are neighbours, and digests of the files."""

    items: Sequence[Item]
    files: Mapping[str, str]


@dataclass(frozen=True)
class Spec:
    """A benchmark as distributed.

    Attributes:
        read: from its folder and the most pixels an image may have to its contents.
        rows: how many. counts: rows per value of the item label `count_label`.
        max_pixels: width * height above which an image is refused before it is decoded.
    """

    name: str
    source: Source
    read: Callable[[Path, int], Contents]
    rows: int
    count_label: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    max_pixels: int = MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that was read and checked.

    Attributes:
        items: all of them; images are opened only when asked for. files: name → digest.
        verified: whether the row counts are the published ones. revision: the hub commit, where known.
    """

    name: str
    items: tuple[Item, ...]
    files: Mapping[str, str]
    folder: Path
    verified: bool
    revision: str = ""
    licence: str = ""


def find_folder(spec: Spec, root: Path) -> Path:
    """The benchmark's folder: the data root itself, or one of its usual names below it.

    Raises:
        DataError: `benchmark-missing`.
    """
    source = spec.source
    candidates = [root, *(root / name for name in source.folders)]
    # A mirror's file names say little: only where the distributed files are in none of the folders.
    for patterns in (source.markers, source.mirrors):
        for folder in candidates:
            if any(next(folder.glob(pattern), None) for pattern in patterns):
                return folder
    raise DataError(
        "benchmark-missing",
        f"{spec.name}: expected {' or '.join((*source.markers, *source.mirrors))} in one of "
        f"{', '.join(map(str, candidates))}, got none; get it with: {source.how_to_get()}",
    )


def fetch(spec: Spec) -> Path:
    """The benchmark's files from the hub, through its cache.

    Raises:
        DataError: `hub-unreachable`, also where the hub refuses. ConfigError: its client is not installed.
    """
    source = spec.source
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            "--hub: expected the package huggingface_hub, got none; pip install huggingface_hub"
        ) from None
    try:
        folder = snapshot_download(
            source.hub, repo_type="dataset", revision=source.revision, allow_patterns=list(source.patterns)
        )
    # The client raises its own, the network library's and plain errors; all of them mean the files are not here.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            "hub-unreachable",
            f"{spec.name}: expected {source.hub} from the hub, got {first}; connect this machine to it, or download on "
            f"another one and pass --data-root: {source.how_to_get()}",
        ) from error
    return Path(folder)


def check_items(spec: Spec, items: Sequence[Item], source: Path) -> None:
    """Ids are unique, right letters are among the options.

    Raises:
        DataError: `row-duplicate`, `row-options` or `row-answer`, naming the item.
    """
    seen: set[str] = set()
    for item in items:
        name = f"{spec.name}:{item.id}"
        if item.id in seen:
            raise DataError("row-duplicate", f"expected each id once, got {item.id!r} again; {REPAIR}", str(source))
        seen.add(item.id)
        if not 2 <= len(item.options) <= len(LETTERS) or not item.question:
            raise DataError(
                "row-options", f"expected a question and 2 to 26 options, got {list(item.options)}; {REPAIR}", name
            )
        for letter in item.gold.values():
            if letter not in item.letters:
                raise DataError(
                    "row-answer", f"expected the right letter among {item.letters}, got {letter!r}; {REPAIR}", name
                )


REPAIR = "the file was changed or is damaged, download it again"


def counts_verified(spec: Spec, items: Sequence[Item], folder: Path, allow_other: bool) -> bool:
    """Whether the row counts are the published ones.

    Raises:
        DataError: `benchmark-rows` where they are not and `allow_other` is off.
    """
    counts = Counter(item.labels[spec.count_label] for item in items) if spec.counts else Counter()
    wrong = [
        f"{value}: {spec.counts.get(value, 0)} expected, {counts[value]} found"
        for value in (*spec.counts, *(value for value in counts if value not in spec.counts))
        if counts[value] != spec.counts.get(value, 0)
    ]
    if len(items) == spec.rows and not wrong:
        return True
    if allow_other:
        return False
    detail = f" ({'; '.join(wrong[:5])})" if wrong else ""
    raise DataError(
        "benchmark-rows",
        f"{spec.name}: expected {spec.rows} rows, got {len(items)}{detail}; the files were changed or cut, get them "
        f"again with: {spec.source.how_to_get()}; or go on with other counts: --allow-other-counts",
        str(folder),
    )


def check_columns(names: Sequence[str], needed: Sequence[str], source: Path) -> None:
    """Raise `DataError` `file-columns` where columns are missing."""
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            "file-columns",
            f"expected the columns {', '.join(needed)}, got {', '.join(names) or 'none'} (missing: "
            f"{', '.join(missing)}); {REPAIR}",
            str(source),
        )


def revision_of(folder: Path) -> str:
    """The commit in a hub cache's path, which ends in `snapshots/<commit>`."""
    parts = Path(os.path.abspath(folder)).parts
    return parts[-1] if len(parts) > 1 and parts[-2] == "snapshots" else ""
