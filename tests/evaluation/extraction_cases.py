"""Raw answers and the letter each protocol reads in them; a dash is an answer that does not parse.

The question has the options A red, B blue, C green, D black. The `lmms-eval` column is its V* rule.
"""

OPTIONS = ("red", "blue", "green", "black")
PROTOCOLS = ("strict", "reference", "vlmevalkit", "lmms-eval")

_TABLE = [
    # text, strict, reference, vlmevalkit, lmms-eval
    ("B", "BBBB"),
    ("b", "BB-B"),  # VLMEvalKit's letters are capitals
    ("(B)", "BBBB"),
    ("(b)", "BB-B"),
    ("B.", "BBBB"),
    ("B)", "BBBB"),
    ("(B).", "BBBB"),
    ("B: blue", "BBBB"),
    ("B. blue", "BBBB"),
    ("(B) blue", "BBBB"),
    ("B: red", "-BBB"),  # the letter and the text name different options
    ("B. red", "-BBB"),
    ("B: I see two boats", "BB-B"),  # VLMEvalKit: not among the last four words
    ("B: or maybe C", "-B-B"),
    ("Option B", "BBBB"),  # reference: o, p, t, i, o, n, then B
    ("option (b)", "BB-B"),
    ("The answer is B.", "BEBB"),  # reference: the E of "The"
    ("The correct answer is (B)", "BEBB"),
    ("the final answer is option B", "BEBB"),
    ("Best answer is B", "BBBB"),  # reference and lmms-eval: the B of "Best"
    ("answer is B", "BABA"),  # lmms-eval: an answer that begins with A to D
    ("Answer: B", "-ABA"),
    ("The answer is B or C.", "-E-B"),
    ("A or B", "-A-A"),
    ("A\nB", "-A-A"),
    ("B\nB", "BBBB"),
    ("B\nThe answer is B.", "BB-B"),
    ("", "----"),
    ("   \n\t", "----"),
    (".", "----"),
    ("**B**", "BBBB"),
    ("__B__", "BB-B"),  # VLMEvalKit knows stars only; one letter A to D in all
    ("**The answer is (B)**", "BEBB"),
    ("*blue*", "BBBB"),
    ("`B`", "-B-B"),
    ("blue", "BBBB"),
    ("Blue.", "BBBB"),
    ("BLUE", "BBBB"),
    ("red", "AEAD"),  # lmms-eval: the only letter of its four
    ("green", "CEC-"),
    ("red or blue", "-E--"),
    ("The car is blue.", "-EB-"),
    ("blue\n", "BBBB"),
    ("E", "-E--"),  # beyond the options
    ("F", "----"),
    ("The letter is Z", "-E--"),
    ("A refusal: I cannot see the picture", "-A-A"),
    ("I think it is dark", "-D--"),
    ("I'm sorry, but without the image provided I cannot tell, but A", "-B-A"),
    ("Cannot determine the answer", "-C-C"),
    ("<answer>B</answer>", "BBBB"),
    ("<answer> (B) </answer>", "BBBB"),
    ("<answer>B", "BB--"),  # unclosed
    ("<answer>\nB\n</answer>", "BBBB"),
    ("<answer>A</answer><answer>B</answer>", "BBAA"),  # harnesses take the first closed one
    ("<answer><answer>B</answer></answer>", "BB--"),
    ("<answer>A</answer> so <answer>B", "BBAA"),
    ("<answer></answer>B", "----"),
    ("B</answer>", "-B-B"),
    ("It is green, so <answer>B</answer>", "BBBB"),
    ("<think>C</think><answer>B</answer>", "BBBB"),
    ("<think>C</think>B", "-C-B"),
    ("\\boxed{B}", "-BBB"),
    ("<|lvr_start|><|lvr_end|><answer>B</answer><|im_end|>", "BBBB"),
    ("<|lvr_start|><|lvr_end|>B<|im_end|>", "BABB"),  # reference: the A of `start`
    ("<|lvr_start|>", "-A--"),
    ("<|lvr_start|><|lvr|><|lvr|>", "-A--"),
    ("B<|im_end|>", "BBBB"),
    ("<|im_end|>", "----"),
    ("Ｂ", "B---"),  # full-width
    ("（Ｂ）", "B---"),
    ("\u00a0B\u00a0", "BBBB"),  # no-break spaces
    ("\u200bB\u200b", "BB-B"),  # zero-width: part of a word in VLMEvalKit; for V* one letter in all
    ("“B”", "-B-B"),
    ("В", "----"),  # Cyrillic
    ("Ⓑ", "B---"),
    ("𝐁", "B---"),
    ("blue 🟦", "-BBB"),
    ("DCBA", "-D-D"),
    ("3", "----"),
    ("Yes", "-E--"),
]
# The dash of vlmevalkit for long texts: an option's text is only looked for in answers of at most twice all options.
_LONG = "The picture shows a street with many cars and, further back, a blue bus and a tree."
_TABLE += [
    (_LONG, "-E-A"),
    (_LONG + " The answer is B.", "-EBB"),
    ("B is what I would say here after looking twice", "-B-B"),  # vlmevalkit: not among the last four words
]

CASES = [
    (text, dict(zip(PROTOCOLS, (None if c == "-" else c for c in letters), strict=True))) for text, letters in _TABLE
]
