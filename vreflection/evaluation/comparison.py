"""Compare runs item by item: paired differences with intervals and exact tests, refused where runs were not alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .answer_table import AnswerTable, Run, open_run, read_answers
from .metrics import Slice, all_right, complete_groups, slices
from .protocol import Protocol
from .scoring import label_revision, refuse_missing, scoring_protocol
from .statistics import Paired, paired

_SHOWN = 3  # items named in a message
_TOLD = {"dtype", "device"}  # change answers by rounding only: told, not refused


@dataclass(frozen=True)
class Difference:
    """One slice of a benchmark in two runs. `kind`: `items`, or `groups` that are right together or not at all."""

    name: str
    kind: str
    first: float
    second: float
    paired: Paired


@dataclass(frozen=True)
class BenchmarkComparison:
    """A benchmark's differences, its headline slice first. `left_out`: items that only one run answered."""

    benchmark: str
    differences: list[Difference]
    left_out: int


@dataclass(frozen=True)
class Comparison:
    """A run against the first one.

    Attributes:
        only_first, only_second: benchmarks that the other run did not ask.
        told: settings that differ without making the runs unlike, with both values.
    """

    first: str
    second: str
    protocol: str
    labels: str
    benchmarks: list[BenchmarkComparison]
    only_first: list[str]
    only_second: list[str]
    told: dict[str, tuple[Any, Any]]

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        for benchmark, scored in zip(plain["benchmarks"], self.benchmarks, strict=True):
            for values, difference in zip(benchmark["differences"], scored.differences, strict=True):
                values["paired"] = difference.paired.as_dict()
        return plain


def compare_runs(
    first: str | Path,
    second: str | Path,
    protocol: str | Path | Protocol | None = None,
    labels: str | None = None,
    partial: bool = False,
) -> Comparison:
    """Compare the second run with the first on every benchmark that both asked.

    Args:
        protocol, labels: as for `score_run`, for both runs. partial: compare the items both answered.

    Raises:
        DataError: the runs differ in protocol, label revision, pixel range, generation, files or items, they share no
            benchmark, or answers are missing and `partial` is off.
        ConfigError: as for `score_run`.
    """
    a, b = open_run(Path(first)), open_run(Path(second))
    refuse_unlike(a, b, labels)
    chosen = [scoring_protocol(run, protocol) for run in (a, b)]
    revision = label_revision(chosen[0], labels)
    asked_a, asked_b = a.manifest.benchmarks, b.manifest.benchmarks
    shared = [name for name in asked_a if name in asked_b]
    if not shared:
        _refuse(a, b, f"a benchmark both asked, got {sorted(asked_a)} and {sorted(asked_b)}", "ask both the same one")
    tables = [[read_answers(run, name, chosen[0].extractor, revision) for name in shared] for run in (a, b)]
    if not partial:
        for run, of_run in zip((a, b), tables, strict=True):
            refuse_missing(run, of_run)
    found = [_compare(a, b, x, y, partial) for x, y in zip(*tables, strict=True)]
    return Comparison(
        str(a.folder), str(b.folder), chosen[0].tag, revision, found,
        sorted(set(asked_a) - set(shared)), sorted(set(asked_b) - set(shared)), _differing_quietly(a, b),
    )  # fmt: skip


def refuse_unlike(a: Run, b: Run, labels: str | None) -> None:
    """Raise unless two runs were asked alike; latents, model and versions may differ.

    Raises:
        DataError: with what differs, and what to do.
    """
    first, second = a.manifest, b.manifest
    again = "answer one of them again with the other's settings"
    if first.protocol != second.protocol:
        _refuse(a, b, f"one protocol, got {first.protocol} and {second.protocol}", again)
    for name in first.benchmarks:
        if name in second.benchmarks and a.protocol.asking(name) != b.protocol.asking(name):
            asked, other = a.protocol.asking(name), b.protocol.asking(name)
            differing = {key: (asked[key], other[key]) for key in asked if asked[key] != other[key]}
            _refuse(a, b, f"{first.protocol} to ask {name} in one way, got {differing}", again)
    if labels is None and a.protocol.label_revision != b.protocol.label_revision:
        revisions = f"{a.protocol.label_revision} and {b.protocol.label_revision}"
        _refuse(a, b, f"one label revision, got {revisions}", "name one with --labels")
    if a.protocol.extractor != b.protocol.extractor:
        _refuse(a, b, f"one extractor, got {a.protocol.extractor} and {b.protocol.extractor}", again)
    if dict(first.pixels) != dict(second.pixels):
        _refuse(a, b, f"one pixel range, got {dict(first.pixels)} and {dict(second.pixels)}", again)
    generation = [{key: m.generation.get(key) for key in _settings(a, b) - _TOLD} for m in (first, second)]
    if generation[0] != generation[1]:
        _refuse(a, b, f"the same generation, got {generation[0]} and {generation[1]}", again)
    for name in first.benchmarks:
        files = [run.manifest.benchmarks.get(name, {}).get("files") for run in (a, b)]
        if name in second.benchmarks and files[0] != files[1]:
            _refuse(a, b, f"the same files of {name}, got {files[0]} and {files[1]}", "answer both from the same files")


def _differing_quietly(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    first, second = a.manifest, b.manifest
    pairs = {key: (first.generation.get(key), second.generation.get(key)) for key in sorted(_TOLD)}
    for group in ("latents", "versions"):
        mine, theirs = getattr(first, group), getattr(second, group)
        pairs |= {f"{group}.{key}": (mine.get(key), theirs.get(key)) for key in sorted({*mine, *theirs})}
    pairs |= {"model": (first.model, second.model), "digest": (first.digest, second.digest)}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _settings(a: Run, b: Run) -> set[str]:
    """Names of generation settings, without the token limits, which the protocols tell."""
    return (set(a.manifest.generation) | set(b.manifest.generation)) - {"max_new_tokens"}


def _refuse(a: Run, b: Run, problem: str, fix: str) -> None:
    raise DataError(
        "unlike-runs", f"expected {problem}; these runs cannot be compared: {fix}", f"{a.folder}, {b.folder}"
    )


def _compare(a: Run, b: Run, first: AnswerTable, second: AnswerTable, partial: bool) -> BenchmarkComparison:
    mine, theirs = set(first.ids), set(second.ids)
    alone = [sorted(mine - theirs), sorted(theirs - mine)]
    if any(alone) and not partial:
        shown = " and ".join(f"{len(ids)} ({', '.join(ids[:_SHOWN])})" for ids in alone)
        _refuse(
            a, b, f"the same items of {first.benchmark}, got {shown} that the other lacks", "ask both the same items"
        )
    shared = [ident for ident in first.ids if ident in theirs]
    at_first = np.array([first.ids[ident] for ident in shared], dtype=np.int64)
    at_second = np.array([second.ids[ident] for ident in shared], dtype=np.int64)
    changed = np.flatnonzero(first.facts[at_first] != second.facts[at_second])
    if len(changed):
        shown = ", ".join(shared[i] for i in changed[:_SHOWN])
        problem = (
            f"the same options and gold letters in {first.benchmark}, got {len(changed)} items that differ ({shown})"
        )
        _refuse(a, b, problem, "answer both from the same files")
    x, y = first.only(at_first), second.only(at_second)
    return BenchmarkComparison(
        first.benchmark,
        [d for part in slices(x) if (d := _difference(x, y, part))] if x.n else [],
        sum(map(len, alone)),
    )


def _difference(x: AnswerTable, y: AnswerTable, part: Slice) -> Difference | None:
    """Both tables hold the same items in the same order; groups are those of the first."""
    if not part.by_group:
        result = paired(x.right[part.items], y.right[part.items], x.groups[part.items])
        return _named(part.name, "items", result)
    codes = complete_groups(x, part.items)
    if not len(codes):
        return None
    first, second = (all_right(x.with_answers(table), part.items, codes) for table in (x, y))
    return _named(part.name, "groups", paired(first, second, codes))


def _named(name: str, kind: str, result: Paired) -> Difference:
    first, second = result.both + result.first_only, result.both + result.second_only
    return Difference(name, kind, first / result.n, second / result.n, result)


def compare_all(
    folders: Sequence[str | Path],
    protocol: str | Path | Protocol | None = None,
    labels: str | None = None,
    partial: bool = False,
) -> list[Comparison]:
    """Every further run against the first one."""
    return [compare_runs(folders[0], other, protocol, labels, partial) for other in folders[1:]]
