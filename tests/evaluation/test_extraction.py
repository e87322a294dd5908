import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vreflection.evaluation.extraction import ASKS_JUDGE, EXTRACTORS, inside_answer

TABLE = runpy.run_path(str(Path(__file__).with_name("extraction_cases.py")))
OPTIONS, CASES = TABLE["OPTIONS"], TABLE["CASES"]
LONG = 200_000  # characters; what is quadratic in it does not end


@pytest.mark.parametrize("protocol", TABLE["PROTOCOLS"])
@pytest.mark.parametrize(("text", "letters"), CASES, ids=[ascii(text) for text, _ in CASES])
def test_adversarial_answers(text, letters, protocol):
    assert EXTRACTORS[protocol](text, OPTIONS, "vstar") == letters[protocol]


def test_the_table_covers_what_it_is_for():
    assert len(CASES) == len({text for text, _ in CASES}) >= 40
    for protocol in TABLE["PROTOCOLS"]:
        assert {letters[protocol] for _, letters in CASES} >= {"A", "B", None}
    # No two protocols read all of them alike.
    assert len({tuple(letters[p] for _, letters in CASES) for p in TABLE["PROTOCOLS"]}) == len(TABLE["PROTOCOLS"])


@pytest.mark.parametrize(
    ("name", "text", "letter"),
    [
        ("mmvp", "A", "A"),
        ("mmvp", "(b)", "B"),
        ("mmvp", "b.", "B"),
        ("mmvp", "The answer is (B)", "B"),
        ("mmvp", "The answer is brown", "B"),
        ("mmvp", "I think option A", "A"),
        ("mmvp", "A refusal", "A"),
        ("mmvp", "The dog looks at a ball", "A"),
        ("mmvp", "beyond", "B"),
        ("mmvp", "Yes", None),
        ("mmvp", "", None),
        ("mmvp", "C", None),
        ("blink", "B. x", "B"),
        ("blink", "  ( c )", "C"),
        ("blink", "The answer is B", "T"),
        ("blink", "I think B", "I"),
        ("blink", "3", None),
        ("blink", "", None),
        ("mme-realworld-lite", "", "A"),
        ("mme-realworld-lite", "(", "A"),
        ("mme-realworld-lite", "b", "B"),
        ("mme-realworld-lite", "The best answer is B", "B"),
        ("mme-realworld-lite", "The best option is B", "B"),
        ("mme-realworld-lite", "Definitely C", "D"),
        ("mme-realworld-lite", "x y", None),
        ("mme-realworld-lite", "none of these words hold any capital letter at all you see", None),
        ("hrbench4k", "B is what I would say here after looking twice", "B"),
        ("hrbench8k", "At the far end of the long street there is a blue bus, and more.", "B"),
        ("hrbench4k", "red or blue", None),
        ("vstar", "The answer is brown", "B"),
        ("vstar", "Can't say", "C"),
        ("vstar", "It is red.", "D"),
        ("vstar", "It is <think> C </think> (A)", "A"),
    ],
)
def test_lmms_eval_has_a_rule_per_benchmark(name, text, letter):
    assert EXTRACTORS["lmms-eval"](text, OPTIONS, name) == letter


# Read by lmms-eval 0.7.3 itself; "judge": its rules find nothing and it would ask a model.
@pytest.mark.parametrize(
    ("name", "text", "letter"),
    [
        ("blink", "(b).", "B"),
        ("blink", "The answer is B.", "B"),
        ("blink", "I think B", None),
        ("blink", "I think the answer is C because", "C"),
        ("blink", "A or (B), so (C)", "C"),
        ("blink", "Blue", "B"),
        ("blink", "3", None),
        ("blink", "<answer> B </answer>", None),
        ("blink", "answer is Bob", "A"),
        ("blink", "the dog", None),
        ("blink", "answer A, no, answer B", "B"),
        ("blink", "<think>A</think>B", "B"),
        ("blink", "A</think> (b)", "B"),
        ("blink", "<think>A", None),
        ("mmvp", "The answer is (B)", "B"),
        ("mmvp", "the dog looks at a ball", "A"),
        ("mmvp", "<answer> B </answer>", "B"),
        ("mmvp", "Yes", None),
        ("vstar", "The choice is c", "C"),
        ("vstar", "red", "D"),
        ("vstar", "\\boxed{B}", None),
        ("vstar", "ANSWER İS A", "A"),
        ("vstar", "<analysis>A</analysis> B", "B"),
        ("mme-realworld-lite", "Best option: D", "D"),
        ("mme-realworld-lite", "Best answer: C", "C"),
        ("mme-realworld-lite", "The correct option is (E)", "E"),
        ("mme-realworld-lite", "", "A"),
        ("mme-realworld-lite", "<answer> b </answer>", None),
        ("hrbench4k", "It is blue", "B"),
        ("hrbench4k", "<answer> B </answer>", "B"),
        ("hrbench4k", "I can't process this file. B", "Z"),
        ("hrbench4k", "Z", "Z"),
        ("hrbench4k", "A or B", "judge"),
        ("hrbench8k", "red or blue", "judge"),
        ("hrbench4k", "Failed to obtain answer via API B", "judge"),
        ("hrbench4k", "", "judge"),
    ],
)
def test_lmms_eval_0_7_3(name, text, letter):
    judge = letter == "judge"
    assert EXTRACTORS["lmms-eval-0.7.3"](text, OPTIONS, name) == (None if judge else letter)
    assert ASKS_JUDGE["lmms-eval-0.7.3"](text, OPTIONS, name) == judge


@pytest.mark.parametrize(
    ("protocol", "name", "text", "judge"),
    [
        ("vlmevalkit", "mmvp", "B", False),
        ("vlmevalkit", "mmvp", "A or B", True),
        ("vlmevalkit", "mmvp", "<answer>A or B</answer>", True),
        ("vlmevalkit", "mmvp", "Cannot determine the answer", False),  # read as a refusal, without a judge
        ("vlmevalkit", "mme-realworld-lite", "x", False),
        ("lmms-eval", "hrbench4k", "<answer>A or B</answer>", True),
        ("lmms-eval", "hrbench4k", "Z", False),
        ("lmms-eval", "blink", "3", False),
    ],
)
def test_answers_that_a_harness_would_show_a_judge(protocol, name, text, judge):
    assert ASKS_JUDGE[protocol](text, OPTIONS, name) == judge
    assert not judge or EXTRACTORS[protocol](text, OPTIONS, name) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: D", "D"),
        ("D,", "D"),
        ("[D]", "D"),
        ("Option D is correct.", "D"),
        ("Answer: D. black", "D"),
        ("So the answer is: [B].", "B"),
        ("The right choice is (C)", "C"),
        ("D is the best answer!", "D"),
        ("I choose D", "D"),
        ("Answer: blue", "B"),
        ("I see a bus.\nAnswer: D", "D"),
        ("Answer: D\nbecause", None),
        ("A is correct\nB is correct", None),
        ("B or C is correct", None),
        ("D is not correct", None),
        ("The answer is not D", None),
        ("Answer: B: red", None),
        ("Answer: E", None),
        ("D, E", None),
        ("Answer", None),
    ],
)
def test_lenient_reads_more_than_strict(text, letter):
    assert EXTRACTORS["lenient"](text, OPTIONS, "") == letter
    assert EXTRACTORS["strict"](text, OPTIONS, "") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [("", "A"), ("<answer>b</answer>", "B"), ("The answer is B", "B"), ("Sorry", None), ("x", None)],
)
def test_vlmevalkit_has_a_rule_of_its_own_for_mme_realworld(text, letter):
    assert EXTRACTORS["vlmevalkit"](text, OPTIONS, "mme-realworld-lite") == letter


@pytest.mark.parametrize(
    ("options", "text", "letter"),
    [
        (("A is closer", "B is closer"), "B is closer", "B"),
        (("A is closer", "B is closer"), "A: A is closer", "A"),
        (("Point A", "Point B"), "Point B.", "B"),
        (("Point A", "Point B"), "point a", "A"),
        (("A", "B"), "B", "B"),
        (("B", "A"), "B", None),  # the letter of one option and the text of the other
        (("red", "red"), "red", None),
        (("red", "red"), "B", "B"),
        (("5 * 3", "5 * 4"), "5 * 4", "B"),
        (("don’t know", "yes"), "don't know", "A"),
        (("a red car", "a bus"), "A red car", "A"),
        (("a bus", "a red car"), "A red car", "B"),
        (("yes", "no"), "C", None),
        (("yes", "no", "no sign"), "The answer is No", None),
        (("The white cat is on the left", "The dog"), "the white cat\u00a0is on the  left.", "A"),
    ],
)
def test_strict_and_the_options(options, text, letter):
    assert EXTRACTORS["strict"](text, options, "blink") == letter


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("x <Answer>B</ANSWER> y", "B"),
        ("İİİ<answer>B</answer>", "B"),  # lower case is longer than the text
        ("<answer>A</answer><answer>B", "B"),
        ("no tag", "no tag"),
    ],
)
def test_the_last_answer(text, inner):
    assert inside_answer(text) == inner


@pytest.mark.parametrize("protocol", TABLE["PROTOCOLS"])
@pytest.mark.parametrize("name", ["mmvp", "blink", "vstar", "hrbench4k", "mme-realworld-lite"])
@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "a ",
        "<answer>",
        "<answer> ",
        "<|",
        "<|lvr|>",
        "(",
        "**",
        "\\boxed{",
        "answer is",
        "option ",
        "A\n",
        "<think>",
        "[",
        "</think>",
    ],
)
def test_very_long_answers_end(protocol, name, unit):
    text = "B" + unit * (LONG // len(unit)) + "x"
    letter = EXTRACTORS[protocol](text, OPTIONS, name)
    assert letter is None or letter.isupper()
    assert EXTRACTORS[protocol](text, OPTIONS, name) == letter
    if protocol in ("strict", "lenient"):
        assert letter is None or unit in ("**", "<|lvr|>")


@pytest.mark.parametrize("protocol", TABLE["PROTOCOLS"])
@pytest.mark.parametrize("name", ["mmvp", "blink", "vstar", "hrbench4k", "mme-realworld-lite"])
@pytest.mark.parametrize("start", ["answer", "answer is", "option", "("])
def test_long_gaps_end(protocol, name, start):
    EXTRACTORS[protocol](start + " " * LONG + "x", OPTIONS, name)


@given(st.text(max_size=80), st.sampled_from(sorted(EXTRACTORS)), st.sampled_from(["mmvp", "blink", "vstar", "other"]))
def test_any_text_gives_one_capital_or_nothing(text, protocol, name):
    letter = EXTRACTORS[protocol](text, OPTIONS, name)
    assert letter is None or (len(letter) == 1 and "A" <= letter <= "Z")


@given(
    st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{})", "Option {}", "the answer is {}", "**{}**"])
)
def test_strict_reads_every_accepted_form_in_any_wrapping(letter, form):
    said = form.format(letter)
    for text in (
        said,
        said.lower(),
        f"<answer>{said}</answer>",
        f"  {said}\n",
        f"<|lvr_start|><|lvr_end|>{said}<|im_end|>",
    ):
        assert EXTRACTORS["strict"](text, OPTIONS, "") == letter


def test_extraction_needs_no_torch():
    import subprocess

    code = "import sys, vreflection.evaluation.tables, vreflection.cli.eval_score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
