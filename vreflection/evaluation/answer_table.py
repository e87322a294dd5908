"""A run's folder read into columns: the manifest, and per benchmark one `AnswerTable`.

Rows are parsed one at a time and only columns are kept; equal texts are extracted once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from .extraction import ASKS_JUDGE, EXTRACTORS
from .protocol import LABEL_REVISIONS, Protocol, load_protocol, protocol_from
from .raw_files import raw_files
from .records import FORMAT, LETTERS, Manifest

_REMEMBERED = 64  # characters; longer answers hardly repeat
_CODE = {letter: code for code, letter in enumerate(LETTERS)}
UNPARSED = -1  # letter code of an answer that does not parse
_OPTIONAL = {"format", "notes"}
_SAME_IN_ALL = ("protocol", "digest", "stage", "latents", "benchmarks", "generation", "pixels")


@dataclass(frozen=True)
class Run:
    """A folder that `vreflection eval` wrote: its manifest, and the protocol it was asked with."""

    folder: Path
    manifest: Manifest
    protocol: Protocol

    @property
    def steps(self) -> int | None:
        """Latent steps of a span, where the manifest tells."""
        steps = self.manifest.latents.get("steps")
        return steps if isinstance(steps, int) else None


@dataclass
class AnswerTable:
    """Columns of one benchmark's answers, one entry per item in the order of the files.

    Attributes:
        expected: items the run was to ask.
        predicted: letter codes (0 is A; -1: does not parse). judged: whether the protocol's harness would ask a judge
            model about the answer. golds: right letters' codes by label revision.
        revision: the one that counts.
        groups: codes of the items' groups. labels: per key the items' codes and what the codes mean.
        options: number of options. facts: a value per item that differs where options, gold label or group differ.
        opened, closed: whether a latent span was opened, and whether each was closed.
        visual_tokens: per image. torn: files that end in a half-written line. repeated: rows left out as exact repeats.
    """

    benchmark: str
    expected: int
    ids: dict[str, int]
    predicted: np.ndarray
    judged: np.ndarray
    golds: Mapping[str, np.ndarray]
    revision: str
    groups: np.ndarray
    labels: Mapping[str, tuple[np.ndarray, list[str]]]
    options: np.ndarray
    facts: np.ndarray
    opened: np.ndarray
    closed: np.ndarray
    latent_steps: np.ndarray
    visual_tokens: np.ndarray
    finish_reasons: Mapping[str, int]
    torn: list[str]
    repeated: int

    @property
    def n(self) -> int:
        return len(self.predicted)

    @property
    def missing(self) -> int:
        return self.expected - self.n

    @property
    def gold(self) -> np.ndarray:
        return self.golds[self.revision]

    @property
    def corrected(self) -> int:
        """Items whose gold letter differs between the label revisions."""
        return int((self.golds["original"] != self.golds["corrected"]).sum())

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.gold

    def where(self, key: str, value: str) -> np.ndarray:
        """Mask of the items whose label `key` is `value`; none where no item has it."""
        codes, names = self.labels.get(key, (np.full(self.n, -1), []))
        return codes == names.index(value) if value in names else np.zeros(self.n, dtype=bool)

    def only(self, rows: np.ndarray) -> AnswerTable:
        """The items at these positions, in this order, with what a comparison needs of them."""
        names = ("predicted", "judged", "groups", "options", "facts", "opened", "closed", "latent_steps")
        kept = list(self.ids)
        return replace(
            self,
            ids={kept[row]: position for position, row in enumerate(rows.tolist())},
            golds={revision: codes[rows] for revision, codes in self.golds.items()},
            labels={key: (codes[rows], values) for key, (codes, values) in self.labels.items()},
            **{name: getattr(self, name)[rows] for name in names},
        )

    def with_answers(self, other: AnswerTable) -> AnswerTable:
        """These items with the answers of another table that holds the same items in the same order."""
        return replace(self, predicted=other.predicted, judged=other.judged)

    def labelled(self, revision: str) -> AnswerTable:
        """The same answers under another label revision."""
        return replace(self, revision=revision)

    def values(self, key: str) -> list[str]:
        """What label `key` reads in these items, sorted."""
        codes, names = self.labels.get(key, (np.zeros(0, dtype=int), []))
        return sorted(names[code] for code in set(codes.tolist()) if code >= 0)


def open_run(folder: Path) -> Run:
    """Read a run's manifest; where shards left several, they must agree.

    Raises:
        DataError: no manifest, one that is not of this format, or several that differ.
        ConfigError: the run's protocol is not known and not in its notes.
    """
    paths = sorted([*folder.glob("run.json"), *folder.glob("run.*.json")])
    if not paths:
        raise DataError(
            "missing-key", "expected run.json, got none; name a folder that `vreflection eval` wrote", str(folder)
        )
    manifests = [_manifest(path) for path in paths]
    for path, manifest in zip(paths[1:], manifests[1:], strict=True):
        differing = differences(manifests[0], manifest, _SAME_IN_ALL)
        if differing:
            raise DataError(
                "mixed-runs",
                f"expected the same run as in {paths[0].name}, got {differing}; answers of different runs cannot be "
                "scored together: keep each run in a folder of its own",
                str(path),
            )
    notes = manifests[0].notes
    if "protocol" in notes:
        protocol = protocol_from(notes["protocol"], f"{paths[0]}: notes: protocol")
    else:
        protocol = load_protocol(manifests[0].protocol)
    if protocol.tag != manifests[0].protocol:
        raise DataError(
            "mixed-runs",
            f"expected one protocol, got {manifests[0].protocol} and, in its notes, {protocol.tag}; run again",
            str(paths[0]),
        )
    return Run(folder, manifests[0], protocol)


def differences(first: Manifest, second: Manifest, names: Sequence[str]) -> str:
    """In which of the named fields two manifests differ, in words; empty where in none."""
    return "; ".join(
        f"{name}: {json.dumps(getattr(first, name), sort_keys=True)} against "
        f"{json.dumps(getattr(second, name), sort_keys=True)}"
        for name in names
        if getattr(first, name) != getattr(second, name)
    )


def _manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError("row-not-json", f"expected a manifest in JSON, got {error}", str(path)) from None
    if not isinstance(values, dict) or values.get("format", FORMAT) != FORMAT:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise DataError(
            "manifest-format", f"expected format {FORMAT}, got {got}; use the release that wrote it", str(path)
        )
    known = [f.name for f in fields(Manifest)]
    missing, unknown = set(known) - _OPTIONAL - set(values), set(values) - set(known)
    if missing or unknown:
        raise DataError(
            "manifest-format",
            f"expected the keys of a manifest, got without {sorted(missing)} and with unknown {sorted(unknown)}; "
            "run again, or use the release that wrote it",
            str(path),
        )
    return Manifest(**values)


def read_answers(run: Run, benchmark: str, extractor: str, labels: str = "original") -> AnswerTable:
    """Read and extract every answer to one benchmark.

    Args:
        extractor: name in `extraction.EXTRACTORS`.
        labels: label revision; items without a corrected label keep the original one.

    Raises:
        DataError: a row that is no answer to this benchmark, an item answered twice in different words, or more items
            than the run asked for.
        ConfigError: the run did not ask this benchmark.
    """
    asked = run.manifest.benchmarks
    if benchmark not in asked:
        raise ConfigError(f"{run.folder}: expected one of {sorted(asked)}, got {benchmark!r}: the run did not ask it")
    reader = _Reader(benchmark, extractor, labels)
    for path in raw_files(run.folder, benchmark):
        reader.read(path)
    expected = asked[benchmark].get("asked", asked[benchmark].get("rows"))
    if not isinstance(expected, int) or isinstance(expected, bool):
        raise DataError("manifest-format", f"expected the number of items asked of {benchmark}, got {expected!r}; "
                        "run again", str(run.folder / "run.json"))  # fmt: skip
    if len(reader.ids) > expected:
        raise DataError(
            "mixed-runs",
            f"expected at most the {expected} items the run asked of {benchmark}, got {len(reader.ids)}; "
            "the folder holds answers of another run: run again into an empty folder",
            str(run.folder / "raw"),
        )
    try:
        return reader.table(expected)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            "row-type",
            f"expected whole numbers of spans, steps and visual tokens, got {error}; run again into an empty folder",
            str(run.folder / "raw"),
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


@dataclass
class _Reader:
    benchmark: str
    extractor: str
    revision: str
    ids: dict[str, int] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)
    repeated: int = 0

    def __post_init__(self):
        self.texts: list[int] = []  # hash of each row's text
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in (
                *LABEL_REVISIONS,
                "predicted",
                "judged",
                "group",
                "labels",
                "options",
                "facts",
                "opened",
                "closed",
                "steps",
            )
        }
        self.visual: list[int] = []
        self.reasons: Counter[str] = Counter()
        self._groups: dict[str, int] = {}
        self._labels: dict[tuple, int] = {}
        self._options: dict[tuple, tuple] = {}  # one tuple per distinct set of options
        self._readings: dict[tuple, tuple[int, bool]] = {}

    def read(self, path: Path) -> None:
        for number, line in _lines(path):
            if not line.endswith(b"\n"):
                self.torn.append(path.name)  # its writer was killed; the item is missing and will be asked again
                return
            try:
                row = json.loads(line.decode())
            except ValueError as error:
                raise DataError(
                    "row-not-json", f"expected an answer in JSON, got {error}; delete the line and resume the run",
                    f"{path}:{number}",
                ) from None  # fmt: skip
            try:
                self._add(row, path, number)
            except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    "row-type",
                    f"expected an answer to {self.benchmark} with all its fields, got {type(error).__name__}: {error}; "
                    "delete the line and resume the run",
                    f"{path}:{number}",
                ) from None

    def _add(self, row: dict[str, Any], path: Path, number: int) -> None:
        ident, text = row["id"], row["text"]
        if row["benchmark"] != self.benchmark or not isinstance(ident, str) or not isinstance(text, str):
            raise ValueError(f"benchmark {row['benchmark']!r}, id {ident!r}")
        known = self.ids.setdefault(ident, len(self.ids))
        if known < len(self.texts):
            if self.texts[known] != hash(text):
                raise DataError(
                    "mixed-runs",
                    f"expected one answer to item {ident}, got a second one with another text; answers of two runs are "
                    "mixed in this folder: keep each run in a folder of its own",
                    f"{path}:{number}",
                )
            self.repeated += 1
            return
        distinct = tuple(row["options"])
        options = self._options.setdefault(distinct, distinct)
        original = row["gold"]["original"]
        corrected = row["gold"].get("corrected", original)
        for letter in (original, corrected):
            if letter not in LETTERS[: len(options)] or len(letter) != 1:
                raise ValueError(f"gold letter {letter!r} of {len(options)} options")
        self._append(row, options, (original, corrected), *self._reading(text, options))
        self.texts.append(hash(text))

    def _append(
        self, row: dict[str, Any], options: tuple, golds: tuple[str, str], predicted: int, judged: bool
    ) -> None:
        columns = self.columns
        columns["predicted"].append(predicted)
        columns["judged"].append(judged)
        columns["original"].append(_CODE[golds[0]])
        columns["corrected"].append(_CODE[golds[1]])
        columns["group"].append(self._groups.setdefault(row["group"], len(self._groups)))
        columns["labels"].append(self._labels.setdefault(tuple(row["labels"].items()), len(self._labels)))
        columns["options"].append(len(options))
        columns["facts"].append(hash((options, golds, row["group"])))
        columns["opened"].append(row["spans"] > 0)
        columns["closed"].append(row["closed"])
        columns["steps"].append(row["latent_steps"])
        self.visual.extend(row["visual_tokens"])
        self.reasons[row["finish_reason"]] += 1

    def _reading(self, text: str, options: tuple) -> tuple[int, bool]:
        """The letter's code, and whether a judge would be asked."""
        key = (text, options)
        reading = self._readings.get(key)
        if reading is None:
            letter = EXTRACTORS[self.extractor](text, options, self.benchmark)
            asks_judge = ASKS_JUDGE.get(self.extractor)
            judged = asks_judge is not None and asks_judge(text, options, self.benchmark)
            reading = (UNPARSED if letter is None else LETTERS.index(letter), judged)
            if len(text) <= _REMEMBERED:
                self._readings[key] = reading
        return reading

    def table(self, expected: int) -> AnswerTable:
        columns = self.columns
        combination = np.array(columns["labels"], dtype=np.int64)
        labels = {}
        sets = [dict(pairs) for pairs in self._labels]
        for key in dict.fromkeys(key for pairs in sets for key in pairs):
            names = list(dict.fromkeys(pairs[key] for pairs in sets if key in pairs))
            codes = np.array([names.index(pairs[key]) if key in pairs else -1 for pairs in sets], dtype=np.int64)
            labels[key] = (codes[combination], names)
        return AnswerTable(
            self.benchmark, expected, self.ids,
            np.array(columns["predicted"], dtype=np.int8), np.array(columns["judged"], dtype=bool),
            {revision: np.array(columns[revision], dtype=np.int8) for revision in LABEL_REVISIONS}, self.revision,
            np.array(columns["group"], dtype=np.int64), labels, np.array(columns["options"], dtype=np.int8),
            np.array(columns["facts"], dtype=np.int64), np.array(columns["opened"], dtype=bool),
            np.array(columns["closed"], dtype=bool), np.array(columns["steps"], dtype=np.int64),
            np.array(self.visual, dtype=np.int64), dict(self.reasons), self.torn, self.repeated,
        )  # fmt: skip
