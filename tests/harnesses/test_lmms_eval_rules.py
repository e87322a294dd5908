"""The protocol `lmms-eval-0.7.3` against the functions and task files of lmms-eval itself."""

import random
import re
import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

from vreflection.evaluation.benchmarks.choices import split_lettered
from vreflection.evaluation.benchmarks.vstar import ASKS
from vreflection.evaluation.extraction import ASKS_JUDGE, EXTRACTORS
from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.records import Item

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-harnesses")

NAME = "lmms-eval-0.7.3"
OPTIONS = ("red", "blue", "green", "black")
CASES = runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "extraction_cases.py"))["CASES"]
LISTED = [text for text, _ in CASES] + [
    "Best option: D", "Best answer: C", "The best option is B", "The correct option is (E)", "Best option:",
    "The answer", "The answer is B.", "Answers: (c)", "answer is - D", "answer\n:\n b", "answer is Bob",
    "answer (B)x", "answer is", "answer I", "I pick (a), no, (C)", "b)", "(B:", "(b) , .", "B....",
    "<answer> B </answer>", "</answer> B", "\\boxed{B}", "ANSWER İS A", "The choice is c", "option:\tD",
    "A. red or B. blue", "x (D", "choices B", "Z", "Z B", "Sorry, Z", "I can't process this file. B",
    "Failed to obtain answer via API B", "e", "None of these", "5", "\nB\nC",
    "Failed to obtain answer via API, it is blue", "<think>A</think>B", "A</think>", "<think>A", "<think></think>",
    "<th<think>x</think>ink>A</think>B", "<analysis>(A)</analysis> (B)", "a</analysis> <think>b</think> c",
    "</think><think>A</think> B", "B<|im_end|>", "answer   is   (D)  ",
]  # fmt: skip
PIECES = (
    "A", "B", "c", "d", "E", "f", "Z", " ", " ", "\n", ".", ",", ":", "-", "(", ")", "[", "]", "answer", "Answers",
    " is ", "The ", "option ", "choice", "blue", "RED", "The best answer is", "Best option:", "<think>", "</think>",
    "<analysis>", "</analysis>", "<answer>", "</answer>", "\\boxed{", "}", "ſ", "ı", "İ", "Ｂ", "dog", "I ", "!", "*",
    "\t", "\u00a0",
)  # fmt: skip


def generated(count):
    dice = random.Random(7)
    return ["".join(dice.choices(PIECES, k=dice.randint(1, 9))) for _ in range(count)]


ANSWERS = list(dict.fromkeys([*LISTED, *generated(4000)]))


@pytest.fixture(scope="module")
def theirs():
    """Per benchmark: their letter, `False` where they would ask a judge, and an empty text or `None` for none."""
    from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags
    from lmms_eval.tasks.blink.utils import _extract_answer_letter as blink
    from lmms_eval.tasks.hrbench.utils import hrbench_evaluator
    from lmms_eval.tasks.mme_realworld.utils import extract_characters_regex as realworld
    from lmms_eval.tasks.mmvp.utils import _extract_answer_letter as mmvp
    from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter as vstar

    tags = parse_reasoning_tags_config('[["<think>", "</think>"], ["<analysis>", "</analysis>"]]')
    rules = {
        "mmvp": mmvp,
        "blink": lambda text: blink(text, "ABCD"),
        "vstar": vstar,
        "hrbench4k": lambda text: hrbench_evaluator.can_infer(text.strip(), dict(zip("ABCD", OPTIONS, strict=True))),
        "mme-realworld-lite": realworld,
    }
    return lambda name, text: rules[name](strip_reasoning_tags(text, tags))


def test_this_is_the_version():
    assert version("lmms-eval") == NAME.removeprefix("lmms-eval-")


@pytest.mark.parametrize("name", ["mmvp", "blink", "vstar", "hrbench4k", "mme-realworld-lite"])
def test_the_same_letter_for_every_answer(theirs, name):
    letters = set()
    for text in ANSWERS:
        expected = theirs(name, re.sub(r"<\|\w+\|>", "", text))  # special tokens are not decoded
        assert EXTRACTORS[NAME](text, OPTIONS, name) == (expected or None), text
        assert ASKS_JUDGE[NAME](text, OPTIONS, name) == (expected is False), text
        letters.add(expected or None)
    assert letters >= {"A", "B", None} and len(ANSWERS) > 3000


DOCS = {
    "mmvp": {"Question": "Is it open?", "Options": "(a) Wide open (b) Shut"},
    "blink": {"choices": ["red", "dark blue"], "prompt": "Which?\n(A) red\n(B) dark blue"},
    "vstar": {"text": f"Which colour?\n(A) red\n(B) dark blue\n{ASKS}"},
    "hrbench4k": {"question": "Which? ", **dict(zip("ABCD", OPTIONS, strict=True)), "E": None},
    "mme-realworld-lite": {"question": "Which?", "multi-choice options": ["(A) red", "(B) dark blue"]},
}
FILES = {
    "mmvp": "mmvp/mmvp.yaml", "blink": "blink/blink_counting.yaml", "vstar": "vstar_bench/vstar_bench.yaml",
    "hrbench4k": "hrbench/hrbench4k.yaml", "mme-realworld-lite": "mme_realworld/mme_realworld_lite.yaml",
}  # fmt: skip


def item(name):
    """The row as our loader reads it."""
    doc = DOCS[name]
    question, options, prompt = doc.get("question", "").strip(), ("red", "dark blue"), ""
    if name == "mmvp":
        question, options = doc["Question"], split_lettered(doc["Options"], "")[1]
    elif name == "vstar":
        question, options = split_lettered(doc["text"].removesuffix(ASKS), "")
    elif name == "hrbench4k":
        options = OPTIONS
    elif name == "blink":
        question, prompt = "Which?", doc["prompt"]
    return Item(name, "1", question, options, {"original": "A"}, {}, "1", (), (), prompt=prompt)


@pytest.mark.parametrize("name", FILES)
def test_the_same_prompt_and_limit(name):
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    protocol = load_protocol(NAME)
    task = load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / FILES[name]))
    words = (task.get("lmms_eval_specific_kwargs") or {}).get("default")
    assert protocol.prompt(item(name)) == task["doc_to_text"](DOCS[name], words)
    # 128 is what their Qwen2.5-VL chat model generates for a task that sets no limit.
    assert protocol.answer_tokens(name) == task.get("generation_kwargs", {}).get("max_new_tokens", 128)


def test_tasks_of_blink_count_alike():
    import lmms_eval.tasks
    from lmms_eval.api.group import GroupConfig
    from lmms_eval.utils import load_yaml_config

    group = GroupConfig(**load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / "blink" / "blink.yaml")))
    assert [metric.weight_by_size for metric in group.aggregate_metric_list] == [False]
    assert load_protocol(NAME).headline["blink"] == "blink-14 macro"
