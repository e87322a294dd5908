"""What lmms-eval 0.7.3 reads out of an answer: its task files behind its Qwen2.5-VL chat model, quirks included.

The model class hands over the text without special tokens, with `<answer>` and `\\boxed{}`, and cuts nothing off at a
task's stop texts; the command then drops `<think>` and `<analysis>` blocks. Compared with the harness's own functions
in `tests/harnesses/test_lmms_eval_rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from .harness_rules import VSTAR, matched_option, mmvp_letter, option_text_in, realworld_letter, without_special_tokens
from .records import LETTERS

# Values of the command's `--reasoning_tags`.
_REASONING = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
_FAILED = "Failed to obtain answer via API"  # looked for in answers, where it never is
_REALWORLD_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def lmms_eval_0_7_3(text: str, options: Sequence[str], benchmark: str = "") -> str | None:
    """The letter that lmms-eval 0.7.3 reads without a judge; on HR-Bench a refusal is `Z`."""
    text = without_reasoning(without_special_tokens(text))
    rule = _RULES.get(benchmark)
    return rule(text, options) if rule else _hrbench(text, options)


def lmms_eval_0_7_3_asks_judge(text: str, options: Sequence[str], benchmark: str = "") -> bool:
    """Whether lmms-eval 0.7.3 would ask its judge model about this answer: on HR-Bench alone."""
    return benchmark not in _RULES and lmms_eval_0_7_3(text, options, benchmark) is None


def without_reasoning(text: str) -> str:
    """What is left without closed reasoning blocks, and behind a closing tag that was never opened; stripped."""
    for opening, closing in _REASONING:
        start = text.find(opening)
        while start >= 0:
            end = text.find(closing, start)
            if end < 0:
                break
            text = text[:start] + text[end + len(closing) :]
            # The two sides may make a new tag where they meet.
            start = text.find(opening, max(0, start - len(opening)))
        if opening not in text:
            text = text.rpartition(closing)[2]
    return text.strip()


@lru_cache(maxsize=32)
def _blink_patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    one = f"([{letters}])"
    return (
        re.compile(rf"^\(?{one}\)?[.\s:,)]*$", re.IGNORECASE),
        # Spaces are taken once and for all, so that the time stays linear; what follows them is no space.
        re.compile(rf"answers?(?:\s+is)?(?:\s*[:\-])?\s*+\(?{one}\)?(?![A-Za-z])", re.IGNORECASE),
        re.compile(rf"\({one}\)"),
        re.compile(rf"[(\s]*{one}", re.IGNORECASE),
    )


def _blink(text: str, options: Sequence[str]) -> str | None:
    """A first line of one letter; else the last `answer is B`; else the last `(B)`; else the first letter of all."""
    terse, stated, bracketed, leading = _blink_patterns(LETTERS[: len(options)] or LETTERS)
    first_line = text.partition("\n")[0].strip()
    letter = terse.match(first_line) if len(first_line) <= 4 else None
    if letter is None:
        for pattern in (stated, bracketed):
            letters = pattern.findall(text)
            if letters:
                return letters[-1].upper()
        letter = leading.match(text)
    return letter[1].upper() if letter else None


def _vstar(text: str, options: Sequence[str]) -> str | None:
    text = text.upper()
    letter = next(filter(None, (pattern.search(text) for pattern in VSTAR)), None)
    if letter:
        return letter[1].upper()
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def _hrbench(text: str, options: Sequence[str]) -> str | None:
    return option_text_in(text, options) if _FAILED in text else matched_option(text, options)


_RULES: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    "mmvp": lambda text, options: mmvp_letter(text),
    "blink": _blink,
    "vstar": _vstar,
    "mme-realworld-lite": lambda text, options: realworld_letter(text, _REALWORLD_PREFIXES),
}
