"""What is counted for each benchmark: slices of its items, and means over slices.

| benchmark | metrics |
|---|---|
| `mmvp` | individual; pair: both images of a pair right |
| `blink` | BLINK-5 micro, BLINK-14 micro and macro, each task |
| `vstar` | overall, direct_attributes, relative_position |
| `hrbench4k`, `hrbench8k` | mean of cycles, FSP (single), FCP (cross), all four right, each cycle |
| `mme-realworld-lite` | micro, Perception, Reasoning, domains, Avg-C (unweighted mean of the domains), E rate |

Any other benchmark has `overall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .answer_table import AnswerTable
from .records import LETTERS
from .statistics import GroupedProportion, Mean, Proportion, grouped_wilson, mean_of, wilson

BLINK_5 = ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
BLINK_TASKS = 14
GROUP_SIZE = {"mmvp": 2, "hrbench4k": 4, "hrbench8k": 4}  # elsewhere every item is a group


@dataclass(frozen=True)
class Slice:
    """Items that are counted together. `by_group`: a group counts once, and as right only if all its items are."""

    name: str
    items: np.ndarray
    by_group: bool = False


@dataclass(frozen=True)
class Metric:
    """A share with its 95 % interval.

    Attributes:
        kind: `items`, `groups` (right together or not at all), `mean` (unweighted, of other metrics), or `rate` (not an
            accuracy).
        n: items, or groups for kind `groups`. correct: `None` for a mean.
        groups, design_effect: of grouped items, whose interval takes the grouping into account.
    """

    name: str
    kind: str
    n: int
    correct: int | None
    value: float
    low: float
    high: float
    groups: int | None = None
    design_effect: float | None = None

    @classmethod
    def of(cls, name: str, kind: str, share: Proportion | Mean) -> Metric:
        correct = share.correct if isinstance(share, Proportion) else None
        grouped = (share.groups, share.design_effect) if isinstance(share, GroupedProportion) else (None, None)
        return cls(name, kind, share.n, correct, share.value, share.low, share.high, *grouped)


def slices(table: AnswerTable) -> list[Slice]:
    """The benchmark's slices that have items, the most general one first."""
    every = np.ones(table.n, dtype=bool)
    if table.benchmark == "mmvp":
        found = [Slice("individual", every), Slice("pair", every, by_group=True)]
    elif table.benchmark == "blink":
        found = _blink(table, every)
    elif table.benchmark == "vstar":
        found = [Slice("overall", every), *_each(table, "category", every)]
    elif table.benchmark in ("hrbench4k", "hrbench8k"):
        single, cross = table.where("category", "single"), table.where("category", "cross")
        found = [Slice("mean of cycles", every), Slice("FSP", single), Slice("FCP", cross)]
        found += [Slice("all four right", every, by_group=True), *_each(table, "cycle", every, "cycle ")]
    elif table.benchmark == "mme-realworld-lite":
        found = [Slice("micro", every)]
        for task in table.values("task"):
            of_task = table.where("task", task)
            found += [Slice(task, of_task), *_each(table, "domain", of_task, f"{task}: ")]
    else:
        found = [Slice("overall", every)]
    return [part for part in found if part.items.any()]


def _blink(table: AnswerTable, every: np.ndarray) -> list[Slice]:
    tasks = table.values("task")
    found = [Slice(f"{_of_tasks(tasks)} micro", every)]
    if set(BLINK_5) <= set(tasks):
        five = np.logical_or.reduce([table.where("task", task) for task in BLINK_5])
        found.append(Slice("blink-5 micro", five))
    return found + _each(table, "task", every)


def _of_tasks(tasks: Sequence[str]) -> str:
    return f"blink-{BLINK_TASKS}" if len(tasks) == BLINK_TASKS else f"{len(tasks)} of {BLINK_TASKS} tasks"


def _each(table: AnswerTable, key: str, within: np.ndarray, prefix: str = "") -> list[Slice]:
    return [Slice(f"{prefix}{value}", within & table.where(key, value)) for value in table.values(key)]


def group_counts(table: AnswerTable, items: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right items and items of each group within a slice."""
    _, code = np.unique(table.groups[items], return_inverse=True)
    return np.bincount(code, weights=right[items]).astype(np.int64), np.bincount(code)


def complete_groups(table: AnswerTable, items: np.ndarray) -> np.ndarray:
    """Codes of the groups all of whose items are there; only they can be right together."""
    codes, sizes = np.unique(table.groups[items], return_counts=True)
    return codes[sizes == GROUP_SIZE.get(table.benchmark, 1)]


def all_right(table: AnswerTable, items: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Per group of `codes`, whether each of its items is right."""
    wrong = np.unique(table.groups[items & ~table.right])
    return ~np.isin(codes, wrong)


def share_of(table: AnswerTable, part: Slice) -> Metric | None:
    """A slice's accuracy; `None` where it has no whole group to count."""
    if not part.by_group:
        return Metric.of(part.name, "items", grouped_wilson(*group_counts(table, part.items, table.right)))
    codes = complete_groups(table, part.items)
    if not len(codes):
        return None
    return Metric.of(part.name, "groups", wilson(int(all_right(table, part.items, codes).sum()), len(codes)))


def metrics(table: AnswerTable) -> list[Metric]:
    """All of a benchmark's metrics; empty for a benchmark without answers."""
    if not table.n:
        return []
    found = [metric for part in slices(table) if (metric := share_of(table, part)) is not None]
    if table.benchmark == "blink":
        tasks = table.values("task")
        found.insert(1, _mean(table, f"{_of_tasks(tasks)} macro", _each(table, "task", np.ones(table.n, dtype=bool))))
    elif table.benchmark.startswith("hrbench"):
        cycles = _each(table, "cycle", np.ones(table.n, dtype=bool))
        if len({int(cycle.items.sum()) for cycle in cycles}) > 1:  # answers are missing: the mean is not the share
            found[0] = _mean(table, "mean of cycles", cycles)
    elif table.benchmark == "mme-realworld-lite":
        found += _realworld(table)
    return found


def _mean(table: AnswerTable, name: str, parts: Sequence[Slice]) -> Metric:
    shares = [wilson(int(table.right[part.items].sum()), int(part.items.sum())) for part in parts if part.items.any()]
    return Metric.of(name, "mean", mean_of(shares))


def _realworld(table: AnswerTable) -> list[Metric]:
    domains = {task: _each(table, "domain", table.where("task", task)) for task in table.values("task")}
    found = [_mean(table, "Avg-C", [part for parts in domains.values() for part in parts])]
    found += [_mean(table, f"Avg-C {task}", parts) for task, parts in domains.items()]
    said = int((table.predicted == LETTERS.index("E")).sum())
    return [*found, Metric.of("E rate", "rate", wilson(said, table.n))]
