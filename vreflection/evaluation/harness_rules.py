"""What two public harnesses read out of an answer, rule by rule, their quirks included.

Facts from VLMEvalKit (option and text matching of 2025, the MME-RealWorld path) and an earlier lmms-eval (its task
files for MMVP, BLINK, V*, HR-Bench, MME-RealWorld, and the answer clean-up of its Qwen2.5-VL model); lmms-eval 0.7.3 is
in `lmms_eval_0_7_3`. Both decode without special tokens, so these are dropped first. Where they would ask a judge
model, the answer does not parse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .records import LETTERS

_SPECIAL = re.compile(r"<\|[^<>|]{1,64}\|>")
REFUSED = "Z"  # the letter both use for an answer that fits no option
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def without_special_tokens(text: str) -> str:
    return _SPECIAL.sub("", text)


def first_closed_answer(text: str) -> str | None:
    """Text inside the first `<answer>` that is closed, stripped."""
    _, opened, rest = text.partition("<answer>")
    inner, closed, _ = rest.partition("</answer>")
    return inner.strip() if opened and closed else None


def vlmevalkit(text: str, options: Sequence[str], benchmark: str = "") -> str | None:
    """VLMEvalKit with exact matching. What stands in a closed `<answer>` is the answer a model class hands over."""
    text = without_special_tokens(text).strip()
    inner = first_closed_answer(text)
    if benchmark.startswith("mme-realworld"):
        return realworld_letter(text if inner is None else inner.upper())
    return _parsed(_vlmevalkit_match(text, options))


def vlmevalkit_asks_judge(text: str, options: Sequence[str], benchmark: str = "") -> bool:
    """Whether VLMEvalKit would ask its judge model about this answer."""
    text = without_special_tokens(text).strip()
    return not benchmark.startswith("mme-realworld") and _vlmevalkit_match(text, options) is None


def _vlmevalkit_match(text: str, options: Sequence[str]) -> str | None:
    inner = first_closed_answer(text)
    return matched_option(text if inner is None else inner, options, last_words=4, most_text=2.0)


def _parsed(letter: str | None) -> str | None:
    return None if letter == REFUSED else letter


def matched_option(
    text: str, options: Sequence[str], last_words: int | None = None, most_text: float | None = None
) -> str | None:
    """The one option letter that is a word of its own, else the one option whose text occurs; `REFUSED` for a refusal.

    Args:
        last_words: the letter must be among that many last words. most_text: longest text in which an option's text is
            looked for, as a multiple of all options' length.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = text.translate(_PUNCTUATION).split()
    said = [letter for letter in LETTERS[: len(options)] if letter in words]
    if len(said) == 1 and (last_words is None or words.index(said[0]) >= len(words) - last_words):
        return said[0]
    if not said and REFUSED in words:
        return REFUSED
    return option_text_in(text, options, most_text)


def option_text_in(text: str, options: Sequence[str], most_text: float | None = None) -> str | None:
    """The letter of the one option whose text occurs in `text`, ignoring case; see `matched_option`."""
    lower = text.lower()
    if most_text is not None and len(lower) > most_text * sum(map(len, options)):
        return None
    named = [letter for letter, option in zip(LETTERS, options) if option.lower() in lower]
    return named[0] if len(named) == 1 else None


# The fifth and later ones ran together in the harnesses' lists, so they are never found in an answer.
REALWORLD_PREFIXES = ("The best answer is", "The correct answer is", "The answer is", "The answer")


def realworld_letter(text: str, prefixes: Sequence[str] = REALWORLD_PREFIXES) -> str | None:
    """MME-RealWorld's own rule: the first capital A to E behind the usual phrases; an empty answer is A."""
    text = text.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    match = re.search("[A-E]", text)
    if match:
        return match[0]
    if len(text.split()) > 10:
        return None
    return next((letter for letter in "ABCDE" if text.lower() in f"({letter})".lower()), None)


def lmms_eval(text: str, options: Sequence[str], benchmark: str = "") -> str | None:
    """lmms-eval: a rule per benchmark, after its clean-up of `<think>`, `<answer>` and `\\boxed{}`."""
    text = cleaned_of_reasoning(without_special_tokens(text))
    rule = _LMMS_EVAL.get(benchmark)
    return rule(text) if rule else _parsed(matched_option(text.strip(), options))


def lmms_eval_asks_judge(text: str, options: Sequence[str], benchmark: str = "") -> bool:
    """Whether lmms-eval would ask its judge model about this answer."""
    text = cleaned_of_reasoning(without_special_tokens(text))
    return benchmark not in _LMMS_EVAL and matched_option(text.strip(), options) is None


def cleaned_of_reasoning(text: str) -> str:
    """What follows the first `</think>`; of it the first closed `<answer>`, else the last `\\boxed{}`, else all."""
    _, closed, rest = text.partition("</think>")
    text = rest if closed else text
    inner = first_closed_answer(text)
    if inner is not None:
        return inner
    start = text.rfind("\\boxed{")
    return text.strip() if start < 0 else _to_matching_brace(text[start + len("\\boxed{") :]).strip()


def _to_matching_brace(text: str) -> str:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return text


_MMVP = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\(?([ab])\)?\.?\s*$",  # nothing but the letter
        r"^\(?([ab])\)?[.\s]",  # the letter first
        r"answer\s+is\s+\(?([ab])",
        r"option\s+\(?([ab])",
        r"([ab])\)?(?:\s|$)",  # the end of any word in a or b
        r"^([ab])",
    )
)
VSTAR = tuple(
    re.compile(pattern)
    for pattern in (
        r"^([A-D])",  # also the first letter of a word
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    )
)
_BLINK = re.compile(r"[(\s]*([a-z])", re.IGNORECASE | re.ASCII)


def mmvp_letter(text: str) -> str | None:
    text = text.strip()
    match = next(filter(None, (pattern.search(text) for pattern in _MMVP)), None)
    return match[1].upper() if match else None


def _vstar(text: str) -> str | None:
    text = text.strip().upper()
    match = next(filter(None, (pattern.search(text) for pattern in VSTAR)), None)
    if match:
        return match[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def _blink(text: str) -> str | None:
    match = _BLINK.match(text.strip())
    return match[1].upper() if match else None


_LMMS_EVAL: dict[str, Callable[[str], str | None]] = {
    "mmvp": mmvp_letter,
    "blink": _blink,
    "vstar": _vstar,
    "mme-realworld-lite": realworld_letter,
}
