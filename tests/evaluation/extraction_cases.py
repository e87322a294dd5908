"""Raw answers and the letter each protocol reads in them; a dash is an answer that does not parse.

The question has the options A red, B blue, C green, D black. The columns of lmms-eval are its V* rule.
"""

OPTIONS = ("red", "blue", "green", "black")
PROTOCOLS = ("strict", "reference", "vlmevalkit", "lmms-eval", "lmms-eval-0.7.3", "lenient")

_TABLE = [
    # text, strict, reference, vlmevalkit, lmms-eval, lmms-eval-0.7.3, lenient
    ("B", "BBBBBB"),
    ("b", "BB-BBB"),  # VLMEvalKit's letters are capitals
    ("(B)", "BBBBBB"),
    ("(b)", "BB-BBB"),
    ("B.", "BBBBBB"),
    ("B)", "BBBBBB"),
    ("(B).", "BBBBBB"),
    ("B: blue", "BBBBBB"),
    ("B. blue", "BBBBBB"),
    ("(B) blue", "BBBBBB"),
    ("B: red", "-BBBB-"),  # the letter and the text name different options
    ("B. red", "-BBBB-"),
    ("B: I see two boats", "BB-BBB"),  # VLMEvalKit: not among the last four words
    ("B: or maybe C", "-B-BB-"),
    ("Option B", "BBBBBB"),  # reference: o, p, t, i, o, n, then B
    ("option (b)", "BB-BBB"),
    ("The answer is B.", "BEBBBB"),  # reference: the E of "The"
    ("The correct answer is (B)", "BEBBBB"),
    ("the final answer is option B", "BEBBBB"),
    ("Best answer is B", "BBBBBB"),  # reference and lmms-eval: the B of "Best"
    ("answer is B", "BABAAB"),  # lmms-eval: an answer that begins with A to D
    ("Answer: B", "-ABAAB"),
    ("The answer is B or C.", "-E-BB-"),
    ("A or B", "-A-AA-"),
    ("A\nB", "-A-AA-"),
    ("B\nB", "BBBBBB"),
    ("B\nThe answer is B.", "BB-BBB"),
    ("", "------"),
    ("   \n\t", "------"),
    (".", "------"),
    ("**B**", "BBBBBB"),
    ("__B__", "BB-BBB"),  # VLMEvalKit knows stars only; one letter A to D in all
    ("**The answer is (B)**", "BEBBBB"),
    ("*blue*", "BBBBBB"),
    ("`B`", "-B-BBB"),
    ("blue", "BBBBBB"),
    ("Blue.", "BBBBBB"),
    ("BLUE", "BBBBBB"),
    ("red", "AEADDA"),  # lmms-eval: the only letter of its four
    ("green", "CEC--C"),
    ("red or blue", "-E----"),
    ("The car is blue.", "-EB---"),
    ("blue\n", "BBBBBB"),
    ("E", "-E----"),  # beyond the options
    ("F", "------"),
    ("The letter is Z", "-E----"),
    ("A refusal: I cannot see the picture", "-A-AA-"),
    ("I think it is dark", "-D----"),
    ("I'm sorry, but without the image provided I cannot tell, but A", "-B-AA-"),
    ("Cannot determine the answer", "-C-CC-"),
    ("<answer>B</answer>", "BBBB-B"),
    ("<answer> (B) </answer>", "BBBBBB"),
    ("<answer>B", "BB---B"),  # unclosed
    ("<answer>\nB\n</answer>", "BBBBBB"),
    ("<answer>A</answer><answer>B</answer>", "BBAA-B"),  # harnesses take the first closed one
    ("<answer><answer>B</answer></answer>", "BB---B"),
    ("<answer>A</answer> so <answer>B", "BBAA-B"),
    ("<answer></answer>B", "------"),
    ("B</answer>", "-B-BB-"),
    ("It is green, so <answer>B</answer>", "BBBB-B"),
    ("<think>C</think><answer>B</answer>", "BBBB-B"),
    ("<think>C</think>B", "-C-BB-"),
    ("\\boxed{B}", "-BBB--"),
    ("<|lvr_start|><|lvr_end|><answer>B</answer><|im_end|>", "BBBB-B"),
    ("<|lvr_start|><|lvr_end|>B<|im_end|>", "BABBBB"),  # reference: the A of `start`
    ("<|lvr_start|>", "-A----"),
    ("<|lvr_start|><|lvr|><|lvr|>", "-A----"),
    ("B<|im_end|>", "BBBBBB"),
    ("<|im_end|>", "------"),
    ("Ｂ", "B----B"),  # full-width
    ("（Ｂ）", "B----B"),
    ("\u00a0B\u00a0", "BBBBBB"),  # no-break spaces
    ("\u200bB\u200b", "BB-BBB"),  # zero-width: part of a word in VLMEvalKit; for V* one letter in all
    ("“B”", "-B-BBB"),
    ("В", "------"),  # Cyrillic
    ("Ⓑ", "B----B"),
    ("𝐁", "B----B"),
    ("blue 🟦", "-BBBB-"),
    ("DCBA", "-D-DD-"),
    ("3", "------"),
    ("Yes", "-E----"),
]
# The dash of vlmevalkit for long texts: an option's text is only looked for in answers of at most twice all options.
_LONG = "The picture shows a street with many cars and, further back, a blue bus and a tree."
_TABLE += [
    (_LONG, "-E-AA-"),
    (_LONG + " The answer is B.", "-EBBB-"),
    ("B is what I would say here after looking twice", "-B-BB-"),  # vlmevalkit: not among the last four words
]

CASES = [
    (text, dict(zip(PROTOCOLS, (None if c == "-" else c for c in letters), strict=True))) for text, letters in _TABLE
]
