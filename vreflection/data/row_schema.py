"""One row of Visual-CoT data: its keys and spellings, and every check that turns it into a `Sample`.

Reasons added here: `row-type`, `missing-key`, `image-type`, `image-count`, `conversation-type`,
`box-count`, `box-image-ambiguous`, `box-images`; the rest come from `boxes`, `images` and `template`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from vreflection.data.boxes import check_boxes
from vreflection.data.images import resolve_image_path
from vreflection.data.pixels import ImageView
from vreflection.data.template import IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER, Role, Turn, check_turns, count_placeholders
from vreflection.errors import DataError

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
    image_view: ImageView = "stored"  # how its images are read; the boxes are fractions of what is read


def parse_row(
    row: Any, image_folder: str | Path, source: str, dataset: str = "", image_view: ImageView = "stored"
) -> tuple[Sample, int]:
    """Check one decoded row.

    Args:
        row: `{dataset, question_id, image, conversations, bboxes}`; `dataset` and `question_id` may be missing
            (`dataset` argument and `source` stand in). `image` may be missing, null or [] in rows of text only, and
            `bboxes` wherever no answer holds `<lvr>`. Rows with several images need `box_images`, the image index of
            each box.
        image_folder: root of the images.
        source: `file:row` for messages.
        dataset: stand-in dataset name.
        image_view: see `pixels`; in which view the row's boxes are.

    Returns:
        The sample and how many of its boxes were clamped.

    Raises:
        DataError: the first thing wrong with the row.
    """
    if not isinstance(row, dict):
        raise DataError("row-type", f"expected an object per row, got {describe(row)}; {_ROW_FIX}", source)
    if "conversations" not in row:
        raise _missing_key("conversations", source)
    name = row.get("dataset", dataset)
    question_id = row.get("question_id", source)
    if not isinstance(name, str) or isinstance(question_id, bool) or not isinstance(question_id, (str, int)):
        raise DataError(
            "row-type",
            "expected a text dataset and a text or integer question_id, "
            f"got {describe(name)} and {describe(question_id)}; {_ROW_FIX}",
            source,
        )
    turns = _parse_turns(row["conversations"], source)
    check_turns(turns, source)
    images = _row_images(row, turns, source)
    boxes_n4, clamped = check_boxes(_row_boxes(row, turns, source), source)
    _check_counts(turns, len(images), len(boxes_n4), source)
    box_images_n = _parse_box_images(row.get("box_images"), len(boxes_n4), len(images), source)
    try:
        paths = tuple(str(resolve_image_path(image_folder, name, image)) for image in images)
    except DataError as error:
        raise DataError(error.reason, str(error), source) from error
    return Sample(str(question_id), name, paths, turns, boxes_n4, box_images_n, source, image_view), clamped


def _missing_key(key: str, source: str) -> DataError:
    return DataError("missing-key", f"expected the key {key}, got a row without it; {_ROW_FIX}", source)


def _row_images(row: dict[str, Any], turns: tuple[Turn, ...], source: str) -> list[str]:
    """Image names; none where nothing in the row speaks of an image or a box."""
    if row.get("image") in (None, []) and count_placeholders(turns) == (0, 0) and not row.get("bboxes"):
        return []
    if "image" not in row:
        raise _missing_key("image", source)
    return _parse_images(row["image"], source)


def _row_boxes(row: dict[str, Any], turns: tuple[Turn, ...], source: str) -> list[Any]:
    """Boxes as numbers, unchecked; none where the key is absent and no answer asks for a box."""
    if row.get("bboxes") is None and count_placeholders(turns)[1] == 0:
        return []
    if "bboxes" not in row:
        raise _missing_key("bboxes", source)
    return _flatten_boxes(row["bboxes"], source)


def _parse_turns(value: Any, source: str) -> tuple[Turn, ...]:
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in list(_ROLES)
        for turn in value
    )
    if not good:
        raise DataError(
            "conversation-type",
            f"expected a list of {{from: {'/'.join(_ROLES)}, value: text}}, got {describe(value)}; {_ROW_FIX}",
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
            "image-type", f"expected image as text, [text] or [[text]], got {describe(value)}; {_ROW_FIX}", source
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
            f"expected bboxes as a list of [x0, y0, x1, y1] numbers, got {describe(value)}; {_ROW_FIX}",
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
            f"expected {num_boxes} image indices from 0 to {num_images - 1}, got {describe(value)}; fix box_images",
            source,
        )
    return np.array(value, dtype=np.int64)


def describe(value: Any) -> str:
    """Type and a short excerpt, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
