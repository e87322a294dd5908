"""Checking every row of a data file before a run depends on it: text, boxes, and images down to the last pixel."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vreflection.data.atomic import atomic_write
from vreflection.data.clean_index import is_clean_index, write_clean_index
from vreflection.data.images import image_header, open_image
from vreflection.data.in_order import in_order
from vreflection.data.pixels import ImageView
from vreflection.data.rows import Rows
from vreflection.errors import DataError

# Rows per unit of work: some tenths of a second of decoding.
_CHUNK = 64
_SHARES = (0, 5, 50, 95, 100)
_SHOWN = {"image_width": "image width, px", "image_height": "image height, px", "box_area_percent": "box area, %"}


@dataclass(frozen=True)
class RowFinding:
    """What was found about one row: an error, or what the clean index and the statistics need."""

    error: DataError | None = None
    clamped: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    box_areas: tuple[float, ...] = ()
    question: tuple[str, str] = ("", "")


@dataclass
class CheckReport:
    """What became of every row of a check.

    Attributes:
        rows: all rows.
        dropped: reason -> errors, each with its `file:row`.
        clamped: boxes moved back into the image by at most the tolerance.
        chosen: positions of the usable rows.
        sizes: (width, height) of each usable row's images.
        box_areas: share of the image that each usable box covers.
        questions: how often each (dataset, question_id) occurs among usable rows.
        image_view: how images were read, and what boxes are fractions of. rotated_images: how many image files have an
            EXIF orientation that turns or mirrors them, whether or not that view applies it.
    """

    rows: int = 0
    dropped: dict[str, list[DataError]] = field(default_factory=dict)
    clamped: int = 0
    chosen: list[int] = field(default_factory=list)
    sizes: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    box_areas: list[float] = field(default_factory=list)
    questions: Counter[tuple[str, str]] = field(default_factory=Counter)
    image_view: ImageView = "stored"
    rotated_images: int = 0

    @property
    def kept(self) -> int:
        return len(self.chosen)

    def add(self, index: int, finding: RowFinding) -> None:
        """Count one row."""
        self.rows += 1
        if finding.error is not None:
            self.dropped.setdefault(finding.error.reason, []).append(finding.error)
            return
        self.clamped += finding.clamped
        self.chosen.append(index)
        self.sizes.append(finding.sizes)
        self.box_areas.extend(finding.box_areas)
        self.questions[finding.question] += 1

    def counts(self) -> dict[str, Any]:
        """Numbers of the report, fit for JSON."""
        repeated = {question: count for question, count in self.questions.items() if count > 1}
        widths_heights = np.array([size for sizes in self.sizes for size in sizes]).reshape(-1, 2)
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": {reason: len(errors) for reason, errors in self._by_count()},
            "clamped_boxes": self.clamped,
            "image_view": self.image_view,
            "rotated_images": self.rotated_images,
            "rows_without_image": sum(not sizes for sizes in self.sizes),
            "repeated_question_ids": len(repeated),
            "image_width": _distribution(widths_heights[:, 0]),
            "image_height": _distribution(widths_heights[:, 1]),
            "image_megapixels": _distribution(widths_heights.prod(1) / 1e6),
            "box_area_percent": _distribution(100 * np.array(self.box_areas)),
        }

    def summary(self, examples: int = 3) -> str:
        """Human-readable account, with up to `examples` rows per reason, most frequent reason first."""
        counts = self.counts()
        num_dropped = self.rows - self.kept
        lines = [f"{self.kept} of {self.rows} rows kept, {num_dropped} dropped, {self.clamped} boxes clamped"]
        for reason, errors in self._by_count():
            lines.append(f"  {reason}: {len(errors)}")
            lines += [f"    {error}" for error in errors[:examples]]
            lines += [f"    and {len(errors) - examples} more"] if len(errors) > examples else []
        lines.append(self._view_line())
        if counts["rows_without_image"]:
            lines.append(f"rows of text only: {counts['rows_without_image']}")
        if counts["repeated_question_ids"]:
            lines.append(f"note: {counts['repeated_question_ids']} question_ids occur in more than one row")
        shown = {
            "image_width": "image width, px",
            "image_height": "image height, px",
            "box_area_percent": "box area, %",
        }
        for key, label in shown.items():
            if counts[key]:
                lines.append(f"{label}: " + ", ".join(f"{name} {value:.4g}" for name, value in counts[key].items()))
        return "\n".join(lines)

    def _view_line(self) -> str:
        """In which frame boxes are read, and for how many photos that makes a difference."""
        frame = {
            "stored": "images as stored, without EXIF orientation",
            "shown": "images as a viewer shows them, upright",
        }[self.image_view]
        photos = {0: "no photo is rotated", 1: "1 photo is rotated"}
        line = (
            f"boxes are read in {frame}; {photos.get(self.rotated_images, f'{self.rotated_images} photos are rotated')}"
        )
        if self.rotated_images:
            other = "shown" if self.image_view == "stored" else "stored"
            line += f" (if their boxes were drawn on images as {other}: --image-view {other})"
        return line

    def _by_count(self) -> list[tuple[str, list[DataError]]]:
        return sorted(self.dropped.items(), key=lambda item: (-len(item[1]), item[0]))


def check_rows(
    rows: Rows, decode: bool = True, workers: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Check every row.

    Args:
        rows: the rows of a data file.
        decode: decode every image completely; otherwise its header only, which misses images cut short.
        workers: threads (decoding leaves Python's lock). An image that many rows share is opened once.
        on_progress: called with (rows done, rows).

    Raises:
        DataError: `file-changed` and the like; bad rows are in the report.
    """
    if workers < 1:
        raise ValueError(f"expected at least one worker, got {workers}")
    if is_clean_index(rows.path):
        message = "expected a data file to check, got a clean index; name the file that it was made from"
        raise DataError("file-shape", message, str(rows.path))
    seen = _SeenImages(decode, rows.image_view)
    report = CheckReport(image_view=rows.image_view)
    starts = range(0, len(rows), _CHUNK)
    for start, findings in zip(starts, in_order(workers, lambda at: _check_chunk(rows, at, seen), starts)):
        for offset, finding in enumerate(findings):
            report.add(start + offset, finding)
        if on_progress is not None:
            on_progress(report.rows, len(rows))
    report.rotated_images = len(seen.rotated)
    return report


def write_check(
    out: Path, report: CheckReport, rows: Rows, image_folder: Path | None = None, dataset: str = ""
) -> Path:
    """Write the clean index to `out` and the full report, every dropped row in it, beside it as `<out>.report.json`.

    Args:
        out: file to write.
        report: what `check_rows` found.
        rows: the rows that were checked, opened with `image_folder` and `dataset`.

    Returns:
        The report's path.

    Raises:
        DataError: `no-rows` where no row is usable (the report is written all the same), `file-changed`.
        OSError: the folder cannot be written to.
    """
    target = out.with_name(out.name + ".report.json")
    dropped = {
        reason: [{"row": error.source, "message": error.message} for error in errors]
        for reason, errors in report.dropped.items()
    }
    with atomic_write(target) as file:
        file.write(json.dumps({**report.counts(), "dropped_rows": dropped}, indent=1, ensure_ascii=False).encode())
    if not report.kept:
        raise DataError("no-rows", f"expected a usable row, got none; {target} says why for each", str(rows.path))
    write_clean_index(
        out, rows.path, image_folder, dataset, rows.versions, report.chosen, report.sizes, report.image_view
    )
    return target


def _check_chunk(rows: Rows, start: int, seen: "_SeenImages") -> list[RowFinding]:
    return [_check_row(rows, index, seen) for index in range(start, min(start + _CHUNK, len(rows)))]


def _check_row(rows: Rows, index: int, seen: "_SeenImages") -> RowFinding:
    try:
        sample, clamped = rows.parse(index)
        sizes = tuple(seen.size(path, sample.source) for path in sample.image_paths)
    except DataError as error:
        if error.reason.startswith("file-"):
            raise
        return RowFinding(error=error)
    areas = (sample.boxes[:, 2] - sample.boxes[:, 0]) * (sample.boxes[:, 3] - sample.boxes[:, 1])
    return RowFinding(None, clamped, sizes, tuple(areas.tolist()), (sample.dataset, sample.question_id))


class _SeenImages:
    """Sizes and errors of the images met so far, for all threads."""

    def __init__(self, decode: bool, view: ImageView):
        self.decode = decode
        self.view: ImageView = view
        self.rotated: set[str] = set()
        self._found: dict[str, tuple[int, int] | DataError] = {}

    def size(self, path: str, source: str) -> tuple[int, int]:
        """The image's width and height, or its error with the row's name."""
        found = self._found.get(path)
        if found is None:  # two threads may meet here; both come to the same answer
            try:
                header = image_header(path)
                found = open_image(path, view=self.view).size if self.decode else header.size(self.view)
                if header.orientation > 1:
                    self.rotated.add(path)
            except DataError as error:
                found = error
            self._found[path] = found
        if isinstance(found, DataError):
            raise DataError(found.reason, found.message, source)
        return found


def _distribution(values: np.ndarray) -> dict[str, float]:
    """Smallest, 5 %, median, 95 % and largest value; empty without values."""
    if not len(values):
        return {}
    names = ("min", "p5", "median", "p95", "max")
    return {name: round(value, 6) for name, value in zip(names, np.percentile(values, _SHARES).tolist())}
