"""Reader of Visual-CoT data: a JSON list, JSON lines, or a meta file that lists several of them.

Every row is checked before it becomes a `Sample`. A bad row is dropped with a reason and its `file:row` (or raised);
rows count from 1, which for JSON lines is the line number. Reasons added here: `row-not-json`, `row-type`,
`missing-key`, `image-type`, `image-count`, `conversation-type`, `box-count`, `box-image-ambiguous`, `box-images`,
`meta-entry`; the rest come from `boxes`, `images` and `template`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from vreflection.data.boxes import check_boxes
from vreflection.data.images import resolve_image_path
from vreflection.data.template import IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER, Role, Turn, check_turns, count_placeholders
from vreflection.errors import DataError

OnError = Literal["skip", "raise"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROW_FIX = "fix or remove the row"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One checked training row."""

    question_id: str
    dataset: str
    image_paths: tuple[str, ...]
    conversations: tuple[Turn, ...]
    boxes: np.ndarray  # [n, 4] float64 in [0, 1], one per `<lvr>`, in order
    box_images: np.ndarray  # [n] int64, index into image_paths
    source: str = ""  # "file:row"


@dataclass(slots=True)
class ReadReport:
    """What became of the rows of one read."""

    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> ["file:row", ...]
    clamped: int = 0  # boxes moved back into the image

    @property
    def num_dropped(self) -> int:
        return sum(len(rows) for rows in self.dropped.values())

    def drop(self, error: DataError) -> None:
        """Count a dropped row under the error's reason."""
        self.dropped.setdefault(error.reason, []).append(error.source or "unknown")

    def merge(self, other: "ReadReport") -> None:
        """Add another report's counts to this one."""
        self.kept += other.kept
        self.clamped += other.clamped
        for reason, rows in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(rows)

    def summary(self, examples: int = 3) -> str:
        """Human-readable account, with up to `examples` rows per reason, most frequent reason first."""
        lines = [f"{self.kept} rows kept, {self.num_dropped} dropped, {self.clamped} boxes clamped"]
        for reason, rows in sorted(self.dropped.items(), key=lambda item: (-len(item[1]), item[0])):
            more = f", and {len(rows) - examples} more" if len(rows) > examples else ""
            lines.append(f"  {reason}: {len(rows)} ({', '.join(rows[:examples])}{more})")
        return "\n".join(lines)


def read_visual_cot(
    path: str | Path, image_folder: str | Path | None = None, on_error: OnError = "skip", dataset: str = ""
) -> tuple[list[Sample], ReadReport]:
    """Read and check Visual-CoT rows.

    Args:
        path: `.jsonl` (one row per line), or a JSON list of rows or of meta entries `{ds_name, data_path,
            image_folder, ds_type}`. Relative paths in meta entries start at the meta file's folder.
        image_folder: root of the images; needed for rows, overrides the entries' own for a meta file.
        on_error: "skip" drops a bad row and reports it, "raise" raises its `DataError`.
        dataset: name for rows that carry no `dataset` key (a meta entry's `ds_name` is used there).

    Returns:
        The samples in file order, and the report.

    Raises:
        DataError: `file-missing`, `file-not-json` (with the position) or `file-shape` for the file itself, whatever
            `on_error` says, and bad rows with `on_error="raise"`.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"expected on_error 'skip' or 'raise', got {on_error!r}")
    path = Path(path)
    if path.suffix == ".jsonl":
        return _read_rows(_json_lines(path), _need_folder(image_folder, path), dataset, on_error)
    content = _load_json(path)
    if not isinstance(content, list):
        raise DataError(
            "file-shape", f"expected a list of rows, got {type(content).__name__}; wrap the rows in a list", str(path)
        )
    entries = [(f"{path}:{row}", entry) for row, entry in enumerate(content, start=1)]
    if any(isinstance(entry, dict) and "data_path" in entry for _, entry in entries):
        return _read_meta(path, entries, image_folder, on_error)
    return _read_rows(iter(entries), _need_folder(image_folder, path), dataset, on_error)


def parse_row(row: Any, image_folder: str | Path, source: str, dataset: str = "") -> tuple[Sample, int]:
    """Check one decoded row.

    Args:
        row: `{dataset, question_id, image, conversations, bboxes}`; `dataset` and `question_id` may be missing
            (`dataset` argument and `source` stand in). Rows with several images need `box_images`, the image index of
            each box.
        image_folder: root of the images.
        source: `file:row` for messages.
        dataset: stand-in dataset name.

    Returns:
        The sample and how many of its boxes were clamped.

    Raises:
        DataError: the first thing wrong with the row.
    """
    if not isinstance(row, dict):
        raise DataError("row-type", f"expected an object per row, got {_kind(row)}; {_ROW_FIX}", source)
    missing = [key for key in ("image", "conversations", "bboxes") if key not in row]
    if missing:
        raise DataError(
            "missing-key",
            f"expected the keys image, conversations and bboxes, got none named {', '.join(missing)}; {_ROW_FIX}",
            source,
        )
    name = row.get("dataset", dataset)
    question_id = row.get("question_id", source)
    if not isinstance(name, str) or isinstance(question_id, bool) or not isinstance(question_id, (str, int)):
        raise DataError(
            "row-type",
            f"expected a text dataset and a text or integer question_id, got {_kind(name)} and {_kind(question_id)}; "
            f"{_ROW_FIX}",
            source,
        )
    turns = _parse_turns(row["conversations"], source)
    check_turns(turns, source)
    images = _parse_images(row["image"], source)
    boxes_n4, clamped = check_boxes(_flatten_boxes(row["bboxes"], source), source)
    _check_counts(turns, len(images), len(boxes_n4), source)
    box_images_n = _parse_box_images(row.get("box_images"), len(boxes_n4), len(images), source)
    try:
        paths = tuple(str(resolve_image_path(image_folder, name, image)) for image in images)
    except DataError as error:
        raise DataError(error.reason, str(error), source) from error
    return Sample(str(question_id), name, paths, turns, boxes_n4, box_images_n, source), clamped


def _read_rows(
    rows: Iterator[tuple[str, Any]], image_folder: str | Path, dataset: str, on_error: OnError
) -> tuple[list[Sample], ReadReport]:
    samples: list[Sample] = []
    report = ReadReport()
    for source, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            sample, clamped = parse_row(row, image_folder, source, dataset)
        except DataError as error:
            if on_error == "raise":
                raise
            report.drop(error)
            continue
        samples.append(sample)
        report.kept += 1
        report.clamped += clamped
    return samples, report


def _read_meta(
    path: Path, entries: list[tuple[str, Any]], image_folder: str | Path | None, on_error: OnError
) -> tuple[list[Sample], ReadReport]:
    samples: list[Sample] = []
    report = ReadReport()
    for source, entry in entries:
        try:
            wanted = ("ds_name", "data_path", "image_folder")
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in wanted):
                raise DataError(
                    "meta-entry",
                    f"expected an object with text {', '.join(wanted)}, got {_kind(entry)}; fix the entry",
                    source,
                )
            data_path = path.parent / entry["data_path"]
            if data_path.resolve() == path.resolve():
                raise DataError(
                    "meta-entry", f"expected a data file, got the meta file {path} itself; fix the entry", source
                )
            folder = path.parent / entry["image_folder"] if image_folder is None else image_folder
            more, part = read_visual_cot(data_path, folder, on_error, entry["ds_name"])
        except DataError as error:
            if on_error == "raise" or error.reason.startswith("file-"):
                raise
            report.drop(error)
            continue
        samples.extend(more)
        report.merge(part)
    return samples, report


def _load_json(path: Path) -> Any:
    text = _read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long to convert, and absurd nesting
        raise DataError(
            "file-not-json", f"expected JSON, got {error}; repair the file or download it again", str(path)
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, row) per non-blank line; a broken line yields its DataError as the row."""
    first_error: DataError | None = None
    parsed = 0
    broken: list[tuple[str, Any]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = DataError("row-not-json", f"expected one JSON object per line, got {error}; {_ROW_FIX}", source)
            first_error = first_error or row
        else:
            parsed += 1
        if parsed:
            yield from broken
            broken.clear()
            yield source, row
        else:
            broken.append((source, row))
    if first_error is not None and not parsed:
        raise DataError("file-not-json", f"no line is JSON: {first_error}", str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "file-not-json",
            f"expected UTF-8 JSON, got byte 0x{error.object[error.start]:02x} at position {error.start}; "
            "check the file type",
            str(path),
        ) from None
    except OSError as error:
        raise DataError(
            "file-missing", f"expected a readable data file, got {error.strerror}; check the path", str(path)
        ) from None


def _need_folder(image_folder: str | Path | None, path: Path) -> str | Path:
    if image_folder is None:
        raise ValueError(f"expected image_folder for the rows of {path}, got None; only meta files carry their own")
    if not Path(image_folder).is_dir():
        raise DataError("file-missing", f"expected a folder of images at {image_folder}, got none; check it", str(path))
    return image_folder


def _parse_turns(value: Any, source: str) -> tuple[Turn, ...]:
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in list(_ROLES)
        for turn in value
    )
    if not good:
        raise DataError(
            "conversation-type",
            f"expected a list of {{from: {'/'.join(_ROLES)}, value: text}}, got {_kind(value)}; {_ROW_FIX}",
            source,
        )
    return tuple(Turn(cast(Role, _ROLES[turn["from"]]), turn["value"]) for turn in value)


def _parse_images(value: Any, source: str) -> list[str]:
    """Accept str, [str] and [[str]]."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, list) for name in names):
        names = [inner for name in names for inner in name]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            "image-type", f"expected image as text, [text] or [[text]], got {_kind(value)}; {_ROW_FIX}", source
        )
    return names


def _flatten_boxes(value: Any, source: str) -> list[Any]:
    """Accept [[x0, y0, x1, y1], ...], also nested one list deeper; reject anything but numbers inside."""
    boxes = value
    if isinstance(boxes, list) and boxes and all(isinstance(b, list) and b and isinstance(b[0], list) for b in boxes):
        boxes = [inner for group in boxes for inner in group]
    numbers = isinstance(boxes, list) and all(
        isinstance(box, list) and len(box) == 4 and all(type(number) in (int, float) for number in box) for box in boxes
    )
    if not numbers:
        raise DataError(
            "box-shape",
            f"expected bboxes as a list of [x0, y0, x1, y1] numbers, got {_kind(value)}; {_ROW_FIX}",
            source,
        )
    return boxes


def _check_counts(turns: tuple[Turn, ...], num_images: int, num_boxes: int, source: str) -> None:
    placeholders, spans = count_placeholders(turns)
    if placeholders != num_images:
        raise DataError(
            "image-count",
            f"expected one {IMAGE_PLACEHOLDER} per image ({num_images}), got {placeholders}; {_ROW_FIX}",
            source,
        )
    if spans != num_boxes:
        raise DataError(
            "box-count", f"expected one box per {LATENT_PLACEHOLDER} ({spans}), got {num_boxes}; {_ROW_FIX}", source
        )


def _parse_box_images(value: Any, num_boxes: int, num_images: int, source: str) -> np.ndarray:
    if value is None:
        if num_images > 1 and num_boxes:
            raise DataError(
                "box-image-ambiguous",
                f"expected box_images naming each box's image, got {num_images} images and no box_images; add the list",
                source,
            )
        return np.zeros(num_boxes, dtype=np.int64)
    good = isinstance(value, list) and len(value) == num_boxes
    if not good or not all(type(index) is int and 0 <= index < num_images for index in value):
        raise DataError(
            "box-images",
            f"expected {num_boxes} image indices from 0 to {num_images - 1}, got {_kind(value)}; fix box_images",
            source,
        )
    return np.array(value, dtype=np.int64)


def _kind(value: Any) -> str:
    """Type and a short excerpt, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
