"""Intervals for proportions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


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


def wilson(correct: int, n: int, z: float = 1.959964) -> Proportion:
    """Wilson score interval of a proportion.

    Raises:
        ValueError: unless `0 <= correct <= n` and `n >= 1`.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Proportion(correct, n, share, max(0.0, centre - half), min(1.0, centre + half))
