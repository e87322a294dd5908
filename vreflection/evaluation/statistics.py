"""Intervals for proportions and for paired differences, exact paired tests; all of them for grouped items too.

Items of one group (a pair of images, four rotations of a question) are not independent. Their intervals are widened by
the design effect, the ratio of the cluster-robust variance to the one of independent items; their test flips whole
groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z95 = 1.959964  # two-sided 95 %
_EXACT_SUM = 20_000  # differences up to which the flips of whole groups are counted out; above, a normal distribution


@dataclass(frozen=True)
class Proportion:
    """`correct` of `n` with its 95 % Wilson score interval."""

    correct: int
    n: int
    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class GroupedProportion(Proportion):
    """A proportion of grouped items. `design_effect`: variance over that of independent items, at least 1."""

    groups: int
    design_effect: float


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of the proportions of `parts`, with its 95 % interval; `n` items in all."""

    n: int
    parts: int
    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(correct: int, n: int, z: float = Z95) -> Proportion:
    """Wilson score interval of a proportion.

    Raises:
        ValueError: unless `0 <= correct <= n` and `n >= 1`.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    return Proportion(correct, n, correct / n, *_score_bounds(correct / n, n, z))


def _score_bounds(share: float, n: float, z: float) -> tuple[float, float]:
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def grouped_wilson(correct: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray, z: float = Z95):
    """Wilson interval of grouped items with `n / design effect` items in place of `n`.

    Args:
        correct, sizes: right items and items of each group.

    Returns:
        `GroupedProportion`; plain `Proportion` where every group is one item. Where all items are right, or all wrong,
        their variance says nothing: every group counts as one item.

    Raises:
        ValueError: unequal lengths, no group, or a group with other than `0 <= correct <= size`, `size >= 1`.
    """
    right, size = np.asarray(correct, dtype=np.int64), np.asarray(sizes, dtype=np.int64)
    if right.shape != size.shape or not size.size or (size < 1).any() or (right < 0).any() or (right > size).any():
        raise ValueError("expected 0 <= correct <= size and size >= 1 for at least one group")
    total, n, groups = int(right.sum()), int(size.sum()), len(size)
    if groups == n:
        return wilson(total, n, z)
    share = total / n
    effect = n / groups
    if 0 < total < n and groups > 1:
        effect = max(1.0, cluster_variance(right, size) / (share * (1 - share) / n))
    return GroupedProportion(total, n, share, *_score_bounds(share, n / effect, z), groups, effect)


def cluster_variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Variance of `sum(sums) / sum(sizes)` from its spread over groups (whole numbers); two groups at least.

    Counted in whole numbers up to the last division, so that the order of the groups does not show.
    """
    groups, n, total = len(sizes), int(sizes.sum()), int(sums.sum())
    squares, products, size_squares = (int((x * y).sum()) for x, y in ((sums, sums), (sums, sizes), (sizes, sizes)))
    spread = n * n * squares - 2 * n * total * products + total * total * size_squares
    return groups * spread / ((groups - 1) * n**4)


def mean_of(parts: Iterable[Proportion]) -> Mean:
    """Unweighted mean of independent proportions; interval by adding the squares of their distances to their bounds.

    Raises:
        ValueError: no parts.
    """
    given = list(parts)
    if not given:
        raise ValueError("expected at least one proportion, got none")
    count = len(given)
    value = sum(part.value for part in given) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in given)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in given)) / count
    return Mean(sum(part.n for part in given), count, value, max(0.0, value - below), min(1.0, value + above))


@dataclass(frozen=True)
class Paired:
    """Two runs on the same items, the second against the first.

    Attributes:
        n, groups: items, and groups of them. both, first_only, second_only, neither: items right in which of the runs.
        difference, low, high: accuracy of the second minus that of the first with its 95 % interval (Tango's score
            interval, items divided by the design effect).
        p: two-sided exact McNemar test. mid_p: its mid-p version, less conservative. Both take items as independent.
        grouped_p: the same with whole groups flipped; equals `p` where every group is one item.
        grouped_method: `exact`, or `normal` where there are too many differences to count out.
    """

    n: int
    groups: int
    both: int
    first_only: int
    second_only: int
    neither: int
    difference: float
    low: float
    high: float
    design_effect: float
    p: float
    mid_p: float
    grouped_p: float
    grouped_method: str

    @property
    def discordant(self) -> int:
        return self.first_only + self.second_only

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "discordant": self.discordant}


def paired(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, groups: Sequence[Any] | np.ndarray):
    """Compare two runs on the same items.

    Args:
        first, second: whether each item is right, in the same order. groups: each item's group.

    Raises:
        ValueError: no items, or unequal lengths.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if not len(a) or not len(a) == len(b) == len(groups):
        raise ValueError(f"expected as many items in both runs and groups, got {len(a)}, {len(b)}, {len(groups)}")
    _, code = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(code)
    sums = np.bincount(code, weights=b.astype(np.int64) - a.astype(np.int64)).astype(np.int64)
    n, first_only, second_only = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    difference = (second_only - first_only) / n
    effect = _difference_effect(sums, sizes, first_only + second_only)
    low, high = tango(first_only / effect, second_only / effect, n / effect)
    p, mid_p = mcnemar(first_only, second_only)
    grouped_p, method = flip_test(sums)
    return Paired(
        n, len(sizes), int((a & b).sum()), first_only, second_only, int((~a & ~b).sum()), difference, low, high,
        effect, p, mid_p, grouped_p, method,
    )  # fmt: skip


def _difference_effect(sums: np.ndarray, sizes: np.ndarray, discordant: int) -> float:
    n, groups = int(sizes.sum()), len(sizes)
    if groups == n:
        return 1.0
    difference = sums.sum() / n
    independent = (discordant / n - difference**2) / n
    if groups == 1 or independent <= 0:
        return n / groups  # nothing to see a spread in: every group counts as one item
    return max(1.0, cluster_variance(sums, sizes) / independent)


def tango(first_only: float, second_only: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of the paired difference `(second_only - first_only) / n` (Tango 1998, Statistics in Medicine 17).

    The bounds are where the score test of that difference has `|z|`. Counts may be fractions (effective items).
    """
    difference = (second_only - first_only) / n

    def distance(delta: float) -> float:
        # Likeliest share of `first_only` if the difference were `delta`: the larger root of a quadratic.
        b = -second_only - first_only + (2 * n - second_only + first_only) * delta
        c = -first_only * delta * (1 - delta)
        share = max(0.0, (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n))
        variance = n * (2 * share + delta * (1 - delta))
        gap = second_only - first_only - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    low = _crossing(lambda delta: distance(delta) - z, -1.0, difference)
    high = _crossing(lambda delta: distance(delta) + z, difference, 1.0)
    return low, high


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between `low` and `high`; the end where it does not."""
    for _ in range(60):  # halves the bracket to below 1e-15
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mcnemar(first_only: int, second_only: int) -> tuple[float, float]:
    """Two-sided exact McNemar test and its mid-p version: twice the smaller one-sided (mid-)p, at most 1.

    Raises:
        ValueError: a negative count.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"expected counts of at least 0, got {first_only} and {second_only}")
    n, k = first_only + second_only, min(first_only, second_only)
    at = term = _fair_coin(n, k)
    total = at
    for successes in range(k, 0, -1):
        term *= successes / (n - successes + 1)
        total += term
        if term < total * 1e-18:
            break
    return min(1.0, 2 * total), min(1.0, 2 * total - at)


def _fair_coin(n: int, k: int) -> float:
    """Probability of `k` heads in `n` throws."""
    if n <= 1000:
        return math.comb(n, k) / 2**n
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def flip_test(differences: Sequence[int] | np.ndarray) -> tuple[float, str]:
    """Two-sided test that the two runs are exchangeable within each group.

    Under that hypothesis a group's difference (items right in the second run minus in the first) is as likely with the
    other sign, all groups independently. With groups of one item this is McNemar's exact test.

    Returns:
        p, and how it was got: `exact` (all sign patterns, counted by convolution) or `normal`.
    """
    values = np.asarray(differences, dtype=np.int64)
    observed, reach = abs(int(values.sum())), int(np.abs(values).sum())
    if observed == 0:
        return 1.0, "exact"
    counts = Counter(np.abs(values[values != 0]).tolist())
    if len(counts) == 1:
        ((step, groups),) = counts.items()
        ahead = (groups + observed // step) // 2
        return mcnemar(groups - ahead, ahead)[0], "exact"
    if reach > _EXACT_SUM:
        return math.erfc(observed / math.sqrt(2 * float(np.square(values).sum()))), "normal"
    chances = np.ones(1)
    for step, groups in sorted(counts.items()):  # the same sum in whatever order they came
        spread = np.zeros(2 * step * groups + 1)
        spread[:: 2 * step] = [_fair_coin(groups, heads) for heads in range(groups + 1)]
        chances = np.convolve(chances, spread)
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chances[sums >= observed].sum())), "exact"
