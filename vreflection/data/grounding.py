"""Box annotations of other data sets (COCO, RefCOCO) as rows of our schema.

COCO gives one row per image and category that occurs exactly once in it: with two dogs, "the dog" has no one box.
RefCOCO gives one row per expression, which its authors wrote to be unique. The default answer is the place of the box's
centre on a grid of three by three ("top left" to "bottom right"): it follows from the box alone.
"""

import json
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vreflection.data.atomic import atomic_write
from vreflection.data.boxes import CLAMP_TOLERANCE
from vreflection.data.template import IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER, check_reserved
from vreflection.errors import ConfigError, DataError

Source = Literal["coco", "refcoco"]

DEFAULT_QUESTIONS: dict[Source, str] = {
    "coco": "Where in the image is the {name}?",
    "refcoco": 'Where in the image is "{name}"?',
}
DEFAULT_ANSWER = "{position}"
FIELDS = ("name", "category", "position", "x0", "y0", "x1", "y1")
_MARKS = (IMAGE_PLACEHOLDER, LATENT_PLACEHOLDER, "<answer>", "</answer>")
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class RowText:
    """How rows are worded. Templates know the fields of `FIELDS`; coordinates are shares of the image's sides."""

    question: str
    answer: str = DEFAULT_ANSWER
    image_prefix: str = ""
    dataset: str = ""

    def __post_init__(self):
        for option, template in (("--question-template", self.question), ("--answer-template", self.answer)):
            try:
                used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
                template.format(**dict.fromkeys(FIELDS, ""))
            except (ValueError, LookupError, AttributeError) as error:
                known = ", ".join(FIELDS)
                raise ConfigError(f"{option}: expected a template with fields among {known}, got {error!r}") from None
            if any(mark in template for mark in _MARKS):
                raise ConfigError(f"{option}: expected none of {', '.join(_MARKS)}, got {template!r}; they are added")
            if unknown := [name for name in used if name not in FIELDS]:
                raise ConfigError(f"{option}: expected fields among {', '.join(FIELDS)}, got {', '.join(unknown)}")


@dataclass
class ConversionReport:
    """Rows written, and the annotation ids that gave none, by reason."""

    written: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, annotation: Any) -> None:
        """Count an annotation that gives no row."""
        self.dropped.setdefault(reason, []).append(str(annotation))

    def summary(self, examples: int = 3) -> str:
        """Human-readable account, with up to `examples` annotation ids per reason."""
        lines = [f"{self.written} rows written, {sum(map(len, self.dropped.values()))} annotations left out"]
        for reason, ids in sorted(self.dropped.items(), key=lambda item: (-len(item[1]), item[0])):
            more = f", and {len(ids) - examples} more" if len(ids) > examples else ""
            lines.append(f"  {reason}: {len(ids)} (annotation {', '.join(ids[:examples])}{more})")
        if len(self.splits) > 1:
            told = ", ".join(f"{name or 'none'} {count}" for name, count in self.splits.items())
            lines.append(f"note: rows of several splits ({told}); --split takes one")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Found:
    """One usable annotation: box in pixels, x0 y0 x1 y1 after clipping to the image."""

    key: str
    file_name: str
    size: tuple[float, float]
    box: tuple[float, float, float, float]
    name: str
    category: str = ""
    split: str = ""


def convert_annotations(
    source: Source,
    annotations: Path,
    out: Path,
    text: RowText,
    refs: Path | None = None,
    split: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write rows as JSONL, whole or not at all.

    Args:
        source: "coco" for an instances file; "refcoco" for one with `refs`, or without for a flat list of
            `{image | file_name, bbox, width, height, sentence | sentences | expression}`. Boxes are x, y, width, height
            in pixels.
        annotations, refs: JSON files.
        out: JSONL file to write.
        text: wording of the rows, and where images lie.
        split: take only refs of this split.
        on_progress: called with (annotations done, all).

    Raises:
        ConfigError: refs for COCO, or pickled refs.
        DataError: `file-missing`, `file-not-json`, `file-shape`, or `no-rows` where nothing is usable.
    """
    if source == "coco" and refs is not None:
        raise ConfigError("--refs: expected none with --from coco; use --from refcoco")
    content = _read_json(annotations)
    report = ConversionReport()
    if source == "coco":
        entries = list(_coco(_Instances(content, annotations), report))
    elif refs is not None:
        entries = list(_refs(_Instances(content, annotations), _read_json(refs), refs, report))
    else:
        entries = list(_flat(content, annotations, report))
    with atomic_write(out) as file:
        for done, entry in enumerate(entries, start=1):
            row = None if split is not None and entry.split != split else _row(entry, source, text, report)
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                report.written += 1
                report.splits[entry.split] += 1
            if on_progress is not None and (done % 1000 == 0 or done == len(entries)):
                on_progress(done, len(entries))
        if not report.written:
            raise DataError("no-rows", f"expected a usable annotation, got none: {report.summary()}", str(annotations))
    return report


def _row(entry: _Found, source: Source, text: RowText, report: ConversionReport) -> dict[str, Any] | None:
    width, height = entry.size
    x0, y0, x1, y1 = (round(value / side, 6) for value, side in zip(entry.box, (width, height, width, height)))
    name = " ".join(entry.name.split())
    try:
        check_reserved(name)
        clean = not any(mark in name for mark in _MARKS)
        name.encode()
    except (DataError, UnicodeEncodeError):
        clean = False
    if not name or not clean:
        report.drop("text", entry.key)
        return None
    if x0 >= x1 or y0 >= y1:
        report.drop("zero-area", entry.key)
        return None
    values = {"name": name, "category": entry.category, "position": position((x0 + x1) / 2, (y0 + y1) / 2)}
    values |= {key: f"{value:.3f}" for key, value in zip(("x0", "y0", "x1", "y1"), (x0, y0, x1, y1))}
    question, answer = text.question.format(**values), text.answer.format(**values)
    return {
        "dataset": text.dataset,
        **({"split": entry.split} if entry.split else {}),
        "question_id": f"{source}-{entry.key}",
        "image": f"{text.image_prefix}{entry.file_name}",
        "conversations": [
            {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}"},
            {"from": "gpt", "value": f"{LATENT_PLACEHOLDER}\n<answer> {answer} </answer>"},
        ],
        "bboxes": [[x0, y0, x1, y1]],
    }


def position(x: float, y: float) -> str:
    """Words for a point (shares of width and height): "top left", "top", …, "centre", …, "bottom right"."""
    words = (_ROWS[min(int(3 * y), 2)], _COLUMNS[min(int(3 * x), 2)])
    return " ".join(word for word in words if word) or "centre"


class _Instances:
    """COCO tables by id."""

    def __init__(self, content: Any, path: Path):
        tables = ("images", "annotations", "categories")
        if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in tables):
            got = ", ".join(content)[:200] if isinstance(content, dict) else type(content).__name__
            raise DataError("file-shape", f"expected an object with {', '.join(tables)}, got {got}; check", str(path))
        self.images = _by_id(content["images"])
        self.categories = _by_id(content["categories"])
        self.annotations = [entry for entry in content["annotations"] if isinstance(entry, dict)]

    def find(self, entry: Mapping[str, Any], key: str, report: ConversionReport, name: str | None = None):
        """A usable annotation as `_Found`, or None with its reason counted."""
        image = self.images.get(_scalar(entry.get("image_id")), {})
        category = self.categories.get(_scalar(entry.get("category_id")), {}).get("name")
        name = name or category
        if not isinstance(name, str):
            report.drop("no-category", key)
            return None
        if entry.get("iscrowd"):
            report.drop("crowd", key)
            return None
        return _find(entry, image, key, name, report, category if isinstance(category, str) else "")


def _scalar(value: Any) -> Any:
    """An id that can be looked up; None for anything else."""
    return value if isinstance(value, (int, str)) else None


def _by_id(entries: list[Any]) -> dict[Any, dict[str, Any]]:
    listed = [entry for entry in entries if isinstance(entry, dict)]
    return {key: entry for entry in listed if (key := _scalar(entry.get("id"))) is not None}


def _find(
    entry: Mapping[str, Any],
    image: Mapping[str, Any],
    key: str,
    name: str,
    report: ConversionReport,
    category: str = "",
) -> _Found | None:
    """Check image and box; boxes that stick out by no more than the reader's tolerance are clipped."""
    file_name, width, height = image.get("file_name"), image.get("width", 0), image.get("height", 0)
    if not isinstance(file_name, str) or not all(_is_number(side) and side > 0 for side in (width, height)):
        report.drop("no-image", key)
        return None
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        report.drop("box-shape", key)
        return None
    x, y, w, h = box
    if w <= 0 or h <= 0:
        report.drop("zero-area", key)
        return None
    out = max(-x / width, -y / height, (x + w) / width - 1, (y + h) / height - 1)
    if out > CLAMP_TOLERANCE:
        report.drop("outside", key)
        return None
    clipped = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
    return _Found(key, file_name, (width, height), clipped, name, category, str(entry.get("split") or ""))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _coco(instances: _Instances, report: ConversionReport) -> Iterator[_Found]:
    """Annotations whose category no other annotation of the image has, crowds included."""
    kinds = [(_scalar(entry.get("image_id")), _scalar(entry.get("category_id"))) for entry in instances.annotations]
    counts = Counter(kinds)
    for entry, kind in zip(instances.annotations, kinds):
        key = str(entry.get("id"))
        if counts[kind] > 1:
            report.drop("not-unique", key)
        elif (found := instances.find(entry, key, report)) is not None:
            yield found


def _refs(instances: _Instances, refs: Any, path: Path, report: ConversionReport) -> Iterator[_Found]:
    boxes = _by_id(instances.annotations)
    for number, ref in enumerate(_entries(refs, path), start=1):
        annotation = boxes.get(_scalar(ref.get("ann_id")))
        if annotation is None:
            report.drop("no-annotation", f"{ref.get('ann_id')} of ref {ref.get('ref_id', number)}")
            continue
        for key, sentence in _sentences(ref, f"{ref.get('ref_id', number)}", report):
            found = instances.find({**annotation, "split": ref.get("split")}, key, report, sentence)
            if found is not None:
                yield found


def _flat(content: Any, path: Path, report: ConversionReport) -> Iterator[_Found]:
    for number, entry in enumerate(_entries(content, path), start=1):
        image = {"file_name": entry.get("image", entry.get("file_name"))}
        image |= {side: entry.get(side) for side in ("width", "height")}
        for key, sentence in _sentences(entry, str(entry.get("id", number)), report):
            found = _find(entry, image, key, sentence, report)
            if found is not None:
                yield found


def _entries(content: Any, path: Path) -> list[dict[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError("file-shape", f"expected a list of objects, got {type(content).__name__}; check", str(path))
    return content


def _sentences(entry: Mapping[str, Any], key: str, report: ConversionReport) -> Iterator[tuple[str, str]]:
    """(key, expression) pairs from `sentences` (texts, or objects with `sent`), `sentence` or `expression`."""
    given = entry.get("sentences", entry.get("sentence", entry.get("expression")))
    listed = given if isinstance(given, list) else [given]
    for number, sentence in enumerate(listed):
        plain = sentence.get("sent", sentence.get("raw")) if isinstance(sentence, dict) else sentence
        unique = key if len(listed) == 1 else f"{key}-{number}"
        if isinstance(plain, str):
            yield unique, plain
        else:
            report.drop("text", unique)


def _read_json(path: Path) -> Any:
    """A JSON file without COCO's outlines, which would fill the memory and are not used."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"expected a readable file, got {error.strerror}; check the path"
        raise DataError("file-missing", message, str(path)) from None
    if path.suffix in (".p", ".pkl", ".pickle") or content[:1] == b"\x80":
        raise ConfigError(
            f"{path}: expected JSON, got a pickle, which can run any code when it is read; "
            "where you trust its origin, load it in a place of its own and write it with json.dump"
        )
    try:
        return json.loads(content.decode("utf-8-sig"), object_hook=_without_outline)
    except (ValueError, RecursionError) as error:
        raise DataError("file-not-json", f"expected JSON, got {error}; download it again", str(path)) from None


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry
