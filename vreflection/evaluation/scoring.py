"""Score a run offline: raw answers and the manifest in, every number of the tables out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .answer_table import UNPARSED, AnswerTable, Run, open_run, read_answers
from .extraction import ASKS_JUDGE
from .metrics import GROUP_SIZE, Metric, complete_groups, metrics
from .protocol import LABEL_REVISIONS, Protocol, genuine, load_protocol
from .records import LETTERS
from .statistics import Proportion, wilson


@dataclass(frozen=True)
class BenchmarkScore:
    """One benchmark of a run.

    Attributes:
        n, expected: items answered, and asked for. headline: name of the metric that stands for the benchmark.
        unparsed: answers that did not parse; they count as wrong. judged: answers about which the protocol's harness
            would ask a judge model; `None` where it has none. beyond: letters beyond the question's options.
        gold_letters, predicted_letters: how often each is right, and was said.
        floor: accuracy of always saying the letter `floor_letter`.
        triggered: answers with a latent span. closed: of these, those whose spans were all closed; `None` without any.
        latent_steps, visual_tokens: least, median and most, per answer and per image; `None` without answers.
        groups, incomplete_groups: groups of items, and those that lack some. corrected: items whose label the corrected
            revision changes. torn: files that end in a half-written line. repeated: rows left out as exact repeats.
    """

    benchmark: str
    n: int
    expected: int
    headline: str
    metrics: list[Metric]
    unparsed: Proportion | None
    judged: Proportion | None
    beyond: int
    gold_letters: Mapping[str, int]
    predicted_letters: Mapping[str, int]
    floor_letter: str
    floor: Proportion | None
    triggered: Proportion | None
    closed: Proportion | None
    latent_steps: tuple[int, float, int] | None
    visual_tokens: tuple[int, float, int] | None
    finish_reasons: Mapping[str, int]
    groups: int
    incomplete_groups: int
    corrected: int
    torn: list[str]
    repeated: int

    @property
    def missing(self) -> int:
        return self.expected - self.n

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def main(self) -> Metric | None:
        """The headline metric, or the most general one where too few answers are there for it."""
        return self.metric(self.headline) or (self.metrics[0] if self.metrics else None)


@dataclass(frozen=True)
class RunScore:
    """A run scored under a protocol and a label revision.

    Attributes:
        asked_with: tag of the protocol the run was asked with. protocol: tag of the one it was scored with.
    """

    folder: str
    model: str
    digest: str
    stage: str
    latents: Mapping[str, Any]
    asked_with: str
    protocol: str
    labels: str
    pixels: Mapping[str, int]
    generation: Mapping[str, Any]
    versions: Mapping[str, str]
    benchmarks: list[BenchmarkScore]

    @property
    def missing(self) -> int:
        return sum(score.missing for score in self.benchmarks)

    @property
    def expected(self) -> int:
        return sum(score.expected for score in self.benchmarks)

    @property
    def steps(self) -> int | None:
        steps = self.latents.get("steps")
        return steps if isinstance(steps, int) else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "missing": self.missing, "expected": self.expected}


def scoring_protocol(run: Run, protocol: str | Path | Protocol | None) -> Protocol:
    """The protocol to score a run with: its own, or another one that would have asked in the same way.

    Raises:
        ConfigError: the other protocol would have asked differently (prompt, pixel range, token limit), or none is
            given and the run's own is no longer what it was.
    """
    if protocol is None:
        return genuine(run.protocol, str(run.folder))
    chosen = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    for benchmark in run.manifest.benchmarks:
        asked, would_ask = run.protocol.asking(benchmark), chosen.asking(benchmark)
        differing = [
            f"{key} {asked[key]!r} against {would_ask[key]!r}" for key in asked if asked[key] != would_ask[key]
        ]
        if differing:
            raise ConfigError(
                f"{run.folder}: {chosen.tag} asks {benchmark} in another way than {run.protocol.tag}, which asked this "
                f"run ({'; '.join(differing)}); scoring can change only extraction, aggregation and labels: "
                f"answer again with `vreflection eval … --protocol {chosen.name}`"
            )
    return chosen


def label_revision(protocol: Protocol, labels: str | None) -> str:
    if labels is not None and labels not in LABEL_REVISIONS:
        raise ConfigError(f"labels: expected one of {list(LABEL_REVISIONS)}, got {labels!r}")
    return labels or protocol.label_revision


def score_run(
    folder: str | Path,
    protocol: str | Path | Protocol | None = None,
    labels: str | None = None,
    partial: bool = False,
) -> RunScore:
    """Score a run's folder.

    Args:
        protocol: name, tag or file of a protocol that asks in the same way; default: the run's own.
        labels: `original` or `corrected`; default: the protocol's.
        partial: score what is there although answers are missing.

    Raises:
        DataError: unusable manifest or row, or answers are missing and `partial` is off.
        ConfigError: unknown protocol or label revision, or a protocol that asks in another way.
    """
    run = open_run(Path(folder))
    chosen = scoring_protocol(run, protocol)
    revision = label_revision(chosen, labels)
    tables = [read_answers(run, name, chosen.extractor, revision) for name in run.manifest.benchmarks]
    if not partial:
        refuse_missing(run, tables)
    manifest = run.manifest
    return RunScore(
        str(run.folder), manifest.model, manifest.digest, manifest.stage, manifest.latents, manifest.protocol,
        chosen.tag, revision, manifest.pixels, manifest.generation, manifest.versions,
        [score_table(table, chosen) for table in tables],
    )  # fmt: skip


def refuse_missing(run: Run, tables: list[AnswerTable]) -> None:
    """Raise if answers are missing, with their number by benchmark and the two ways on."""
    missing = {table.benchmark: table for table in tables if table.missing}
    if missing:
        counts = ", ".join(f"{table.missing} of {table.expected} in {name}" for name, table in missing.items())
        raise DataError(
            "incomplete",
            f"expected an answer to every item, got none to {counts}; the same `vreflection eval` command answers the "
            "rest, --partial scores what is there",
            str(run.folder),
        )


def score_table(table: AnswerTable, protocol: Protocol) -> BenchmarkScore:
    """All numbers of one benchmark."""
    n = table.n
    gold = np.bincount(table.gold, minlength=len(LETTERS))
    opened = int(table.opened.sum())
    every = np.ones(n, dtype=bool)
    groups = len(np.unique(table.groups))
    return BenchmarkScore(
        table.benchmark, n, table.expected, protocol.headline.get(table.benchmark, ""), _both_labels(table),
        wilson(int((table.predicted == UNPARSED).sum()), n) if n else None,
        wilson(int(table.judged.sum()), n) if n and protocol.extractor in ASKS_JUDGE else None,
        int((table.predicted >= table.options).sum()),
        _by_letter(table.gold), _by_letter(table.predicted[table.predicted != UNPARSED]),
        LETTERS[int(gold.argmax())] if n else "", wilson(int(gold.max()), n) if n else None,
        wilson(opened, n) if n else None,
        wilson(int((table.opened & table.closed).sum()), opened) if opened else None,
        _range(table.latent_steps), _range(table.visual_tokens), table.finish_reasons,
        groups, groups - len(complete_groups(table, every)) if table.benchmark in GROUP_SIZE else 0,
        table.corrected, table.torn, table.repeated,
    )  # fmt: skip


def _both_labels(table: AnswerTable) -> list[Metric]:
    """The metrics; where corrected labels differ, also those under the revision that does not count."""
    rows = metrics(table)
    if table.corrected:
        (other,) = set(LABEL_REVISIONS) - {table.revision}
        rows += [replace(metric, name=f"{metric.name}, {other} labels") for metric in metrics(table.labelled(other))]
    return rows


def _by_letter(codes: np.ndarray) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(LETTERS))
    return {letter: int(count) for letter, count in zip(LETTERS, counts, strict=True) if count}


def _range(values: np.ndarray) -> tuple[int, float, int] | None:
    return (int(values.min()), float(np.median(values)), int(values.max())) if len(values) else None
