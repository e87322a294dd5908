"""Whether a newer run is slower than an older one, beyond the noise that the two runs show.

What is compared is each variant's time over the base's, round by round: the variants of a row were timed in turn, so
what slowed the whole machine in a round slowed both. The change of a variant is the difference of the two runs' median
logs.

Noise is measured twice, and a change must exceed both:

- *Rounds.* A bootstrap over the rounds of each run gives an interval for the change. Its level is 5 % for all judged
  variants together (each gets an equal part), so a hundred unchanged rows do not make five alarms. With few rounds such
  an interval is as wide as the rounds themselves: the two runs' rounds must then hardly overlap.
- *Rows.* Two runs of the same code differ by more than their rounds show: memory lies elsewhere, threads too. Where
  eight variants or more are judged, a change must also stand out from the spread of all changes (four times their
  median absolute deviation, scaled to a standard deviation).

Both err towards silence: what looks slower and is not flagged is settled by further rounds, repeated files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .rows import Row

MIN_ROUNDS = 5  # below, rounds that do not overlap at all are too likely by chance (4 against 4: 3 %)
MIN_ROWS = 8  # for the spread of all changes to mean something
_LEVEL = 0.05
_DRAWS = 20_000
_SPREADS = 4.0


@dataclass(frozen=True)
class Change:
    """One variant of one row, in both runs.

    Attributes:
        old, new: median of the time over the base's (seconds with `seconds=True`). change: new / old, above 1 slower.
        low, high: interval of `change` from the rounds, at the level described above.
        verdict: `slower`, `faster`, `same` (within the rounds' noise), `unclear` (beyond it, but not beyond the spread
            of all changes: either noise between runs, or most rows really changed), `few rounds` (not judged).
    """

    row: str
    variant: str
    base: str
    old: float
    new: float
    change: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All variants of rows that both runs have. `spread`: noise between rows as a factor; None if too few are judged.

    `only_old`, `only_new`: rows of one run alone. `unpaired`: rows with nothing to compare with (no second variant).
    `notes`: settings in which the runs differ.
    """

    changes: tuple[Change, ...]
    spread: float | None
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    unpaired: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


@dataclass(frozen=True)
class _Pair:
    row: str
    variant: str
    base: str
    old: np.ndarray  # logs, one per round
    new: np.ndarray

    @property
    def shift(self) -> float:
        return float(np.median(self.new) - np.median(self.old))

    @property
    def judged(self) -> bool:
        return min(len(self.old), len(self.new)) >= MIN_ROUNDS


def compare_rows(old: Sequence[Row], new: Sequence[Row], seconds: bool = False) -> Comparison:
    """Compare two runs; rows of the same suite and name belong together, repeated ones are taken as further rounds.

    Args:
        old, new: rows of each run, possibly of several files.
        seconds: compare seconds themselves; right only on a machine that does nothing else.

    Raises:
        DataError: different devices, or no row in common.
    """
    devices = [{row.settings["device"] for row in rows if "device" in row.settings} for rows in (old, new)]
    if devices[0] != devices[1]:
        told = " and ".join(", ".join(sorted(names)) or "none named" for names in devices)
        raise DataError("other_device", f"expected runs on the same device, got {told}; compare runs of one machine")
    before, after = _by_key(old), _by_key(new)
    shared = [key for key in before if key in after]
    if not shared:
        raise DataError(
            "nothing_shared", "expected rows of the same suites in both runs, got none; name runs of one suite"
        )
    pairs, unpaired = [], []
    for key in shared:
        found = _pairs(before[key], after[key], seconds)
        pairs += found
        if not found:
            unpaired.append(_label(key))
    judged = [pair for pair in pairs if pair.judged]
    spread = _spread([pair.shift for pair in judged])
    return Comparison(
        changes=tuple(_judge(pair, len(judged), spread) for pair in pairs),
        spread=None if spread is None else math.exp(spread),
        only_old=tuple(_label(key) for key in before if key not in after),
        only_new=tuple(_label(key) for key in after if key not in before),
        unpaired=tuple(unpaired),
        notes=tuple(_notes(old, new)),
    )


def _label(key: tuple[str, str]) -> str:
    return key[1].removeprefix("test_")


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.seconds:
            found.setdefault(row.key, []).append(row)
    return found


def _logs(rows: list[Row], variant: str, base: str | None) -> np.ndarray:
    rounds = [np.log(row.seconds[variant]) - (np.log(row.seconds[base]) if base else 0.0) for row in rows]
    return np.concatenate(rounds)


def _pairs(old: list[Row], new: list[Row], seconds: bool) -> list[_Pair]:
    """Variants that every row of both sides has; without the base itself, whose ratio is always 1."""
    base = None if seconds else old[0].base
    kept = set.intersection(*(set(row.seconds) for row in (*old, *new)))
    if base is not None and base not in kept:
        return []
    names = [name for name in old[0].seconds if name in kept and name != base]
    return [
        _Pair(old[0].label, name, base or "", _logs(old, name, base), _logs(new, name, base)) for name in names
    ]  # fmt: skip


def _spread(shifts: list[float]) -> float | None:
    if len(shifts) < MIN_ROWS:
        return None
    return float(1.4826 * np.median(np.abs(np.asarray(shifts) - np.median(shifts))))


@functools.lru_cache(maxsize=64)
def _drawn(rounds: int, run: int) -> tuple[np.ndarray, np.ndarray]:
    """Per draw the two ranks around the median of `rounds` rounds drawn with replacement."""
    ranks = np.random.default_rng(run).integers(0, rounds, (_DRAWS, rounds))
    ranks.sort(axis=1)
    return ranks[:, (rounds - 1) // 2], ranks[:, rounds // 2]


def _interval(pair: _Pair, count: int) -> tuple[float, float]:
    medians = []
    for run, values in enumerate((np.sort(pair.old), np.sort(pair.new))):
        below, above = _drawn(len(values), run)
        medians.append((values[below] + values[above]) / 2)
    tail = 100 * _LEVEL / (2 * max(count, 1))
    low, high = np.percentile(medians[1] - medians[0], [tail, 100 - tail])
    return float(low), float(high)


def _judge(pair: _Pair, count: int, spread: float | None) -> Change:
    low, high = _interval(pair, count)
    stands_out = spread is None or abs(pair.shift) > _SPREADS * spread
    if not pair.judged:
        verdict = "few rounds"
    elif low <= 0 <= high:
        verdict = "same"
    elif not stands_out:
        verdict = "unclear"
    else:
        verdict = "slower" if low > 0 else "faster"
    old, new = (math.exp(float(np.median(values))) for values in (pair.old, pair.new))
    return Change(
        pair.row, pair.variant, pair.base, old, new, math.exp(pair.shift), math.exp(low), math.exp(high), verdict
    )  # fmt: skip


def _notes(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    notes = []
    for name in ("torch", "threads"):
        values = [sorted({row.settings[name] for row in rows if name in row.settings}) for rows in (old, new)]
        if values[0] != values[1]:
            notes.append(f"{name} differs: {', '.join(values[0]) or 'unknown'} and {', '.join(values[1]) or 'unknown'}")
    return notes


def comparison_text(comparison: Comparison) -> str:
    """For reading: what changed first, then the rest, then what was not compared."""
    order = {"slower": 0, "unclear": 1, "faster": 2, "few rounds": 3, "same": 4}
    changes = sorted(comparison.changes, key=lambda change: (order[change.verdict], -change.change))
    head = ("case", "variant", "old", "new", "new / old", "noise of the rounds", "verdict")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for change in changes:
        unit = f" of {change.base}" if change.base else " s"
        old, new = (f"{value:.3g}{unit}" for value in (change.old, change.new))
        interval = f"{change.low:.3f} to {change.high:.3f}"
        lines.append(
            f"| {change.row} | {change.variant} | {old} | {new} | {change.change:.3f} | {interval} | {change.verdict} |"
        )
    judged = sum(change.verdict != "few rounds" for change in comparison.changes)
    spread = (
        f"fewer than {MIN_ROWS} variants, so noise between runs is not known: repeat what looks slower"
        if comparison.spread is None
        else f"all changes spread by a factor of {comparison.spread:.3f}, a flag needs its fourth power"
    )
    lines += ["", f"{judged} variants judged, {len(comparison.slower)} slower; {spread}."]
    if unclear := [change for change in comparison.changes if change.verdict == "unclear"]:
        most = max(unclear, key=lambda change: change.change)
        lines.append(
            f"{len(unclear)} unclear, up to {most.change:.2f} ({most.row}): beyond their rounds, not beyond that "
            "spread; repeat both runs into more files, on one machine."
        )
    if few := len(comparison.changes) - judged:
        lines.append(f"{few} with fewer than {MIN_ROUNDS} rounds are not judged; repeat their suite into more files.")
    for title, names in (
        ("only in the old run", comparison.only_old),
        ("only in the new run", comparison.only_new),
        ("nothing to compare with", comparison.unpaired),
    ):
        if names:
            lines.append(f"{title}: {', '.join(names)}")
    return "\n".join([*lines, *comparison.notes]) + "\n"
