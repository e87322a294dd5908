"""Reading a whole Visual-CoT file at once: every row checked, bad rows dropped with a reason and their `file:row`.

Rows count from 1, which for JSON lines is the line number. For large files, `rows.open_rows` reads rows as they are
asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vreflection.data.row_schema import Sample, parse_row
from vreflection.data.rows import open_rows
from vreflection.errors import DataError

__all__ = ["OnError", "ReadReport", "Sample", "parse_row", "read_visual_cot"]

OnError = Literal["skip", "raise"]


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
        path, image_folder, dataset: as in `rows.open_rows`.
        on_error: "skip" drops a bad row and reports it, "raise" raises its `DataError`.

    Returns:
        The samples in file order, and the report.

    Raises:
        DataError: `file-missing`, `file-not-json` (with the position), `file-shape` and the like for the file itself,
            whatever `on_error` says, and bad rows with `on_error="raise"`.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"expected on_error 'skip' or 'raise', got {on_error!r}")
    rows = open_rows(path, image_folder, dataset)
    samples: list[Sample] = []
    report = ReadReport()
    for index in range(len(rows)):
        try:
            sample, clamped = rows.parse(index)
        except DataError as error:
            if on_error == "raise" or error.reason.startswith("file-"):
                raise
            report.drop(error)
            continue
        samples.append(sample)
        report.kept += 1
        report.clamped += clamped
    return samples, report
