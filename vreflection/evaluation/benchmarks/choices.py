"""Options and right letters as the benchmarks write them: `(a) Open (b) Closed`, `(A) rubber\\n(B) cotton`, `(B)`.

Brackets may be full-width ones, as in a few rows of MME-RealWorld.
"""

from __future__ import annotations

import re

from ...errors import DataError
from ..records import LETTERS
from .source import REPAIR

_MARK = re.compile(r"[(\uff08]\s*([A-Za-z])\s*[)\uff09]")
_ONE = re.compile(r"\s*[(\uff08]?\s*([A-Za-z])\s*[)\uff09]?\s*\.?\s*")


def split_lettered(text: str, source: str) -> tuple[str, tuple[str, ...]]:
    """What stands before `(A)`, and the options' texts.

    Only marks that continue A, B, C … start an option, so that an option may hold a bracketed letter itself.

    Raises:
        DataError: `row-options` where fewer than two options follow one another.
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if mark[1].upper() == LETTERS[len(marks)]:
            marks.append(mark)
    if len(marks) < 2:
        raise DataError("row-options", f"expected options (A) … (B) …, got {text[:200]!r}; {REPAIR}", source)
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    options = tuple(text[mark.end() : stop].strip() for mark, stop in zip(marks, stops, strict=True))
    return text[: marks[0].start()].strip(), options


def without_letter(option: str, index: int, source: str) -> str:
    """`(A) Left` without its letter; an option that has none is taken as it is.

    Raises:
        DataError: `row-options` where it has another letter than its place says.
    """
    mark = _MARK.match(option.strip())
    if mark is None:
        return option.strip()
    if mark[1].upper() != LETTERS[index]:
        raise DataError("row-options", f"expected ({LETTERS[index]}) …, got {option[:200]!r}; {REPAIR}", source)
    return option.strip()[mark.end() :].strip()


def letter_of(text: object, source: str) -> str:
    """The letter in `(b)`, `B` or `B.`, upper case.

    Raises:
        DataError: `row-answer` where it is anything else.
    """
    match = _ONE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise DataError("row-answer", f"expected one letter, got {text!r}; {REPAIR}", source)
    return match[1].upper()
