"""From a raw answer to a letter: one extractor per protocol.

Each takes `(text, options, benchmark)` and returns a capital letter, or `None` where the answer does not parse. A
letter beyond the options is returned where the harness would return it, and counts as wrong. All run in time linear in
the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

from .harness_rules import lmms_eval, vlmevalkit
from .records import LETTERS

Extractor = Callable[[str, Sequence[str], str], str | None]

_OPEN, _CLOSE = (re.compile(tag, re.IGNORECASE | re.ASCII) for tag in ("<answer>", "</answer>"))
_SPECIAL = re.compile(r"<\|[^<>|]{1,64}\|>")
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>")
_EMPHASIS = str.maketrans("", "", "*_")
_QUOTES = str.maketrans("‘’“”", "''\"\"")
_TRAILING = " .,;:!?"

_LONE = re.compile(r"(?:option )?(?:\(([a-z])\)|([a-z])\)?)[.!]?")
_PHRASE = re.compile(r"(?:the )?(?:(?:correct|final|best) )?answer is:? (?:option )?(?:\(([a-z])\)|([a-z]))[.!]?")
_LED = re.compile(r"(?:option )?(?:\(([a-z])\)|([a-z]))([:.)]| )\s*")  # a letter with text behind it
# Another letter named in that text. A bare capital A or I may be a word.
_NAMED = re.compile(r"\(([A-Za-z])\)|\b[Oo]ption ([A-Za-z])\b|\b([B-HJ-Z])\b")


def inside_answer(text: str) -> str:
    """Text inside the last `<answer>`, closed or not; the whole text where there is none."""
    opened = None
    for found in _OPEN.finditer(text):
        opened = found
    if opened is None:
        return text
    closed = _CLOSE.search(text, opened.end())
    return text[opened.end() : closed.start() if closed else None]


def strict(text: str, options: Sequence[str], benchmark: str = "") -> str | None:
    """The letter of a plain answer, or of an answer that is one option's text; `None` for anything else.

    Accepted, ignoring case: `B`, `(B)`, `B.`, `B)`, `B: text`, `Option B`, `[the] [correct|final|best] answer is
    [option] (B)`, one option's text, alone or behind its own letter as the prompt shows it. Several lines must each say
    so, and the same.
    """
    lines = [line for line in map(_plain, inside_answer(text).splitlines()) if line]
    texts = _option_texts(tuple(options))
    whole = _folded(" ".join(lines))
    letters = {LETTERS[texts.index(whole)]} if whole and texts.count(whole) == 1 else set()
    if len(lines) <= 8:  # an answer of more lines is prose
        said = [_line_letter(line, texts) for line in lines]
        if said and None not in said:
            letters.update(filter(None, said))
    return letters.pop() if len(letters) == 1 and letters <= set(LETTERS[: len(options)]) else None


@lru_cache(maxsize=4096)
def _option_texts(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_folded(_plain(option)) for option in options)


def _line_letter(line: str, texts: Sequence[str]) -> str | None:
    lower = line.lower()
    found = _LONE.fullmatch(lower) or _PHRASE.fullmatch(lower)
    if found:
        return (found[1] or found[2]).upper()
    led = _LED.match(lower)
    if led is None:
        folded = _folded(line)
        return LETTERS[texts.index(folded)] if texts.count(folded) == 1 else None
    letter, rest = (led[1] or led[2]).upper(), line[led.end() :]
    own = LETTERS.index(letter)
    if own < len(texts) and texts[own] == _folded(rest):
        return letter
    if led[3] != ":" or _folded(rest) in texts:
        return None
    named = {(a or b or c).upper() for a, b, c in _NAMED.findall(rest)}
    return letter if named <= {letter} else None


def _plain(text: str) -> str:
    """Without special tokens, markdown emphasis, invisible characters; wide letters and spaces as plain ones."""
    text = _SPECIAL.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return " ".join(text.translate(_EMPHASIS).split())


def _folded(plain: str) -> str:
    return plain.casefold().rstrip(_TRAILING)


_FIRST_A_TO_E = re.compile(r"[A-Ea-e]")


def reference(text: str, options: Sequence[str] = (), benchmark: str = "") -> str | None:
    """The first letter A to E inside the last `<answer>`, or anywhere in the text where there is none, ignoring case.

    So "The answer is B." is E, and a latent span without an answer is A, the first such letter of `<|lvr_start|>`.
    """
    inner = inside_answer(text).rstrip()
    for end in _TURN_ENDS:  # no part of the answer
        inner = inner.removesuffix(end).rstrip()
    found = _FIRST_A_TO_E.search(inner)
    return found[0].upper() if found else None


EXTRACTORS: dict[str, Extractor] = {
    "strict": strict,
    "reference": reference,
    "vlmevalkit": vlmevalkit,
    "lmms-eval": lmms_eval,
}
