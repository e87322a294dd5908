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

from ..data.template import answer_range
from .harness_rules import lmms_eval, lmms_eval_asks_judge, vlmevalkit, vlmevalkit_asks_judge
from .lmms_eval_0_7_3 import lmms_eval_0_7_3, lmms_eval_0_7_3_asks_judge
from .records import LETTERS

Extractor = Callable[[str, Sequence[str], str], str | None]

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
    inside = answer_range(text)
    return text if inside is None else text[inside]


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


# What `lenient` takes off a line: what leads up to the letter, what follows it, and brackets and marks around it.
_LEAD = re.compile(
    r"(?:(?:so|therefore|thus|hence),? )?(?:the |my )?(?:(?:correct|final|best|right) )?(?:answer|option|choice)\b"
    r"(?: is)? ?:? ?(?:option |choice )?|i (?:choose|pick|select) (?:option )?",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r" (?:is|would be) (?:the )?(?:correct|right|best)(?: answer| option| choice| one)?[.!]*$", re.IGNORECASE
)
_MARKS = "[]{}\"'` "


def lenient(text: str, options: Sequence[str], benchmark: str = "") -> str | None:
    """What `strict` reads; else the letter that the last line says and no other line contradicts.

    Beyond the forms of `strict` a line may be `Answer: D`, `D,`, `[D]`, `Option D is correct.`, `I choose D` and such.
    """
    letter = strict(text, options)
    if letter is not None:
        return letter
    texts = _option_texts(tuple(options))
    letters = [_lenient_letter(line, texts) for line in map(_plain, inside_answer(text).splitlines()) if line]
    said = set(filter(None, letters))
    if not letters or letters[-1] is None or len(said) > 1:
        return None
    return letters[-1] if letters[-1] in LETTERS[: len(options)] else None


def _lenient_letter(line: str, texts: Sequence[str]) -> str | None:
    verdict = _VERDICT.search(line)
    core = line[: verdict.start()] if verdict else line
    lead = _LEAD.match(core)
    core = core[lead.end() :] if lead else core
    core = core.rstrip(_TRAILING).strip(_MARKS).rstrip(_TRAILING)
    return _line_letter(core, texts) if core else None


@lru_cache(maxsize=4096)
def _option_texts(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_folded(_plain(option)) for option in options)


def _line_letter(line: str, texts: Sequence[str]) -> str | None:
    lower = line.lower()
    match = _LONE.fullmatch(lower) or _PHRASE.fullmatch(lower)
    if match:
        return (match[1] or match[2]).upper()
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
    match = _FIRST_A_TO_E.search(inner)
    return match[0].upper() if match else None


EXTRACTORS: dict[str, Extractor] = {
    "strict": strict,
    "lenient": lenient,
    "reference": reference,
    "vlmevalkit": vlmevalkit,
    "lmms-eval": lmms_eval,
    "lmms-eval-0.7.3": lmms_eval_0_7_3,
}
# Of the harnesses that ask a judge model where their rules find nothing: whether they would.
ASKS_JUDGE: dict[str, Callable[[str, Sequence[str], str], bool]] = {
    "vlmevalkit": vlmevalkit_asks_judge,
    "lmms-eval": lmms_eval_asks_judge,
    "lmms-eval-0.7.3": lmms_eval_0_7_3_asks_judge,
}
