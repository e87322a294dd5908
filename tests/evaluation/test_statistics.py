import math

import pytest

from vreflection.evaluation.statistics import wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # scipy.stats.binomtest(correct, n).proportion_ci(method="wilson")
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
        (450, 512, 0.8477907, 0.9043784),
    ],
)
def test_known_intervals(correct, n, low, high):
    found = wilson(correct, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-6), pytest.approx(high, abs=2e-6))
    assert found.as_dict() == {"correct": correct, "n": n, "value": correct / n, "low": found.low, "high": found.high}


def test_the_bounds_solve_the_score_equation():
    for correct, n in ((3, 17), (450, 512), (255, 256)):
        found = wilson(correct, n)
        for bound in (found.low, found.high):
            distance = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts(correct, n):
    with pytest.raises(ValueError, match=f"got correct={correct}, n={n}"):
        wilson(correct, n)
