"""Answers about which a harness would have asked its judge model."""

import runpy
from pathlib import Path
from types import SimpleNamespace

from vreflection.evaluation.scoring import score_run
from vreflection.evaluation.tables import score_text

RUNS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("scored_runs.py"))))


def test_answers_for_a_judge_are_counted_where_the_harness_has_one(tmp_path):
    said = ["B", "A or B", "I cannot say, A or C", "C"] * 2
    run = RUNS.write_run(tmp_path / "run", {"hrbench4k": RUNS.hrbench(said)}, "lmms-eval-0.7.3")
    score = score_run(run)
    (part,) = score.benchmarks
    assert part.judged is not None and part.unparsed is not None
    assert (part.judged.correct, part.judged.n, part.unparsed.correct) == (4, 8, 4)
    assert "- the harness would have asked its judge model, here unparsed: 50.0 % (4 of 8, " in score_text(score)
    assert score.as_dict()["benchmarks"][0]["judged"]["correct"] == 4
    other = score_run(RUNS.write_run(tmp_path / "strict", {"hrbench4k": RUNS.hrbench(said)}, "strict"))
    assert other.benchmarks[0].judged is None and "judge model" not in score_text(other)
