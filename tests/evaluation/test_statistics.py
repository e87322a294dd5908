import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from vreflection.evaluation.statistics import (
    GroupedProportion,
    cluster_variance,
    flip_test,
    grouped_wilson,
    mcnemar,
    mean_of,
    paired,
    tango,
    wilson,
)

COUNTS = st.integers(0, 60)


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


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_those_of_scipy(case):
    correct, n = case
    found, theirs = wilson(correct, n), stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=1e-6), pytest.approx(theirs.high, abs=1e-6))


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


def rotations(seed, questions=200, size=4):
    """Grouped right and wrong answers to questions of different difficulty."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(questions), size)
    return rng.random(len(groups)) < rng.random(questions)[groups], groups


@pytest.mark.parametrize("seed", range(3))
def test_grouped_variance_is_that_of_statsmodels(seed):
    right, groups = rotations(seed)
    groups[5] = 0  # groups of unequal size
    fit = OLS(right.astype(float), np.ones(len(right))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    sums, sizes = np.bincount(groups, weights=right).astype(int), np.bincount(groups)
    assert cluster_variance(sums, sizes) == pytest.approx(fit.bse[0] ** 2, rel=1e-9)
    found = grouped_wilson(sums, sizes)
    share = right.mean()
    assert found.design_effect == pytest.approx(fit.bse[0] ** 2 / (share * (1 - share) / len(right)), rel=1e-9)
    plain = wilson(found.correct, found.n)
    assert found.design_effect > 1.5 and found.high - found.low > plain.high - plain.low


def test_grouped_intervals_at_the_edges():
    assert grouped_wilson([1, 0, 1], [1, 1, 1]) == wilson(2, 3)
    everything = grouped_wilson([4] * 50, [4] * 50)
    assert isinstance(everything, GroupedProportion)
    assert (everything.low, everything.n, everything.groups) == (wilson(50, 50).low, 200, 50)
    # One right in every pair: the spread is zero, and the interval no narrower than that of independent items.
    assert grouped_wilson([1] * 50, [2] * 50).low == wilson(50, 100).low
    for wrong in (([], []), ([2], [1]), ([0], [0]), ([1], [1, 1])):
        with pytest.raises(ValueError, match="at least one group"):
            grouped_wilson(*wrong)


def test_grouped_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = plain = 0
    for _ in range(1000):
        chance = rng.beta(0.8, 0.8, 100)
        sums = rng.binomial(4, chance)
        found, naive = grouped_wilson(sums, np.full(100, 4)), wilson(int(sums.sum()), 400)
        hits += found.low <= 0.5 <= found.high
        plain += naive.low <= 0.5 <= naive.high
    assert 930 <= hits <= 970  # 3 standard deviations about 950
    assert plain < 850


def test_the_mean_of_one_is_itself_and_of_many_narrower():
    one = wilson(30, 40)
    assert (mean_of([one]).low, mean_of([one]).high) == (pytest.approx(one.low), pytest.approx(one.high))
    many = mean_of([wilson(30, 40)] * 4)
    assert many.high - many.value == pytest.approx((one.high - one.value) / 2)
    assert (many.n, many.parts) == (160, 4)
    assert mean_of([wilson(1, 1), wilson(0, 99)]).value == 0.5  # unweighted
    with pytest.raises(ValueError, match="at least one proportion"):
        mean_of([])


@given(COUNTS, COUNTS)
def test_mcnemar_is_that_of_statsmodels_and_scipy(first_only, second_only):
    p, mid_p = mcnemar(first_only, second_only)
    n, k = first_only + second_only, min(first_only, second_only)
    if n:
        table = [[7, first_only], [second_only, 3]]
        assert p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert p == pytest.approx(min(1, 2 * stats.binom.cdf(k, n, 0.5)), rel=1e-9)
    assert mid_p == pytest.approx(min(1, 2 * stats.binom.cdf(k, n, 0.5) - stats.binom.pmf(k, n, 0.5)), rel=1e-9)


@pytest.mark.parametrize(("first_only", "second_only"), [(5000, 5200), (900, 1100), (0, 1500), (40_000, 41_000)])
def test_mcnemar_of_many(first_only, second_only):
    n = first_only + second_only
    assert mcnemar(first_only, second_only)[0] == pytest.approx(2 * stats.binom.cdf(first_only, n, 0.5), rel=1e-8)


def test_mcnemar_of_impossible_counts():
    with pytest.raises(ValueError, match="at least 0, got -1 and 3"):
        mcnemar(-1, 3)


def likeliest_share(first_only, second_only, n, delta):
    """Share of `first_only` under a given difference, by maximising the likelihood numerically."""
    concordant = n - first_only - second_only

    def loss(share):
        return -(
            first_only * math.log(share)
            + second_only * math.log(share + delta)
            + concordant * math.log(1 - 2 * share - delta)
        )

    edge = 1e-12
    bounds = (max(edge, edge - delta), (1 - delta) / 2 - edge)
    return optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x


@pytest.mark.parametrize(("first_only", "second_only", "n"), [(12, 2, 50), (2, 12, 50), (9, 20, 300), (30, 31, 800)])
def test_the_paired_interval_solves_the_score_equation(first_only, second_only, n):
    low, high = tango(first_only, second_only, n)
    for bound, sign in ((low, 1), (high, -1)):
        share = likeliest_share(first_only, second_only, n, bound)
        gap = second_only - first_only - n * bound
        z = gap / math.sqrt(n * (2 * share + bound * (1 - bound)))
        assert z == pytest.approx(sign * 1.959964, rel=1e-4)
    assert tango(second_only, first_only, n) == (pytest.approx(-high), pytest.approx(-low))


@settings(max_examples=60)
@given(COUNTS, COUNTS, COUNTS)
def test_the_paired_interval_holds_the_difference(first_only, second_only, rest):
    n = first_only + second_only + rest
    if n:
        low, high = tango(first_only, second_only, n)
        assert -1 <= low <= (second_only - first_only) / n <= high <= 1
        assert low < high  # also without a single discordant item


def brute_force(differences):
    observed = abs(sum(differences))
    flips = list(itertools.product((-1, 1), repeat=len(differences)))
    hits = sum(abs(sum(s * d for s, d in zip(flip, differences, strict=True))) >= observed for flip in flips)
    return hits / len(flips)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_flips_are_counted_out(differences):
    p, method = flip_test(differences)
    assert method == "exact" and p == pytest.approx(brute_force(differences))


def test_flips_of_single_items_are_mcnemar():
    assert flip_test([1] * 12 + [-1] * 4 + [0] * 30)[0] == pytest.approx(mcnemar(4, 12)[0])


def test_too_many_flips_are_told():
    rng = np.random.default_rng(2)
    differences = rng.choice([-2, -1, 1, 2, 2], 20_000)
    p, method = flip_test(differences)
    z = differences.sum() / math.sqrt(np.square(differences).sum())
    assert method == "normal" and p == pytest.approx(2 * stats.norm.sf(abs(z)))


def test_exact_and_normal_flips_agree_where_both_can_be_had():
    rng = np.random.default_rng(3)
    differences = rng.choice([-3, -1, 0, 1, 2, 4], 400)
    z = differences.sum() / math.sqrt(np.square(differences).sum())
    assert flip_test(differences)[0] == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)


def test_paired_counts_and_groups():
    first = np.array([1, 1, 0, 0, 1, 0, 1, 0], dtype=bool)
    second = np.array([1, 0, 1, 1, 1, 0, 1, 1], dtype=bool)
    found = paired(first, second, np.arange(8))
    assert (found.both, found.first_only, found.second_only, found.neither) == (3, 1, 3, 1)
    assert found.difference == pytest.approx(0.25)
    assert (found.low, found.high) == tango(1, 3, 8)
    assert found.p == found.grouped_p == mcnemar(1, 3)[0] and found.design_effect == 1
    grouped = paired(first, second, ["a", "a", "b", "b", "c", "c", "d", "d"])
    assert (grouped.groups, grouped.discordant) == (4, 4)
    assert grouped.grouped_p == pytest.approx(brute_force([-1 + 0, 2, 0, 1]))
    with pytest.raises(ValueError, match="as many items in both runs and groups, got 8, 8, 7"):
        paired(first, second, np.arange(7))
    with pytest.raises(ValueError, match="got 0, 0, 0"):
        paired([], [], [])


def test_grouped_differences_keep_their_level():
    """Two runs of equal skill whose answers agree within a question: the plain test finds what is not there."""
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(60), 4)
    plain = grouped = covered = 0
    for _ in range(400):
        first, second = (np.repeat(rng.random(60) < 0.5, 4) ^ (rng.random(240) < 0.05) for _ in range(2))
        found = paired(first, second, groups)
        plain += found.p < 0.05
        grouped += found.grouped_p < 0.05
        covered += found.low <= 0 <= found.high
    assert grouped <= 34 and covered >= 366  # 5 % of 400 and three standard deviations
    assert plain > 60  # three times its level


def test_groups_without_a_spread_count_as_one_item_each():
    same = np.ones(40, dtype=bool)
    found = paired(same, same, np.repeat(np.arange(10), 4))
    assert (found.low, found.high) == tango(0, 0, 10) and found.grouped_p == 1
