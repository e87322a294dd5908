"""Evaluation protocols: prompt × pixel range × extractor × aggregation × label revision, as named and versioned data.

The shipped ones are the YAML files in `protocols/`; a file of one's own has the same keys.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .extraction import EXTRACTORS
from .records import Item

FOLDER = Path(__file__).parent / "protocols"
PROTOCOLS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
LABEL_REVISIONS = ("original", "corrected")
DEFAULT = "default"

# Fields a piece of a prompt may name. `letters` reads "A, B, C"; `prompt` is the benchmark's own text with its options.
_PIECES = {
    "question": {"question", "letters", "prompt"},
    "options": {"letters"},
    "option": {"letter", "text"},
    "ask": {"letters"},
}


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and how its answers are read.

    Attributes:
        name, version: named together they are `tag`; a change that can change a score is a new version.
        images_first: images before the text of the user turn.
        min_pixels, max_pixels: per image, as the image processor resizes it; `None` is the checkpoint's own.
        token_limits: most answer tokens per benchmark, `default` for the others; latent positions never count.
        label_revision: which of a benchmark's labels count, `original` or `corrected`.
        extractor: name in `extraction.EXTRACTORS`.
        pieces: of the prompt, per benchmark, `default` for the others: `question`, `options` (before the first option),
            `option` (for each of them), `ask`.
        headline: per benchmark the metric that stands for it where there is room for only one.
    """

    name: str
    version: int
    images_first: bool
    min_pixels: int | None
    max_pixels: int | None
    token_limits: Mapping[str, int]
    label_revision: str
    extractor: str
    pieces: Mapping[str, Mapping[str, str]]
    headline: Mapping[str, str]

    @property
    def tag(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def max_new_tokens(self) -> int:
        """The limit of benchmarks that have none of their own; see `answer_tokens`."""
        return self.token_limits[DEFAULT]

    def answer_tokens(self, benchmark: str) -> int:
        """Most answer tokens for one question of `benchmark`, latent positions not counted."""
        return self.token_limits.get(benchmark, self.token_limits[DEFAULT])

    def pieces_of(self, benchmark: str) -> Mapping[str, str]:
        return self.pieces.get(benchmark, self.pieces[DEFAULT])

    def prompt(self, item: Item) -> str:
        """The text of the user turn, without the images.

        Raises:
            DataError: the protocol shows the benchmark's own prompt, and the item has none.
        """
        pieces = self.pieces_of(item.benchmark)
        if "{prompt}" in pieces["question"] and not item.prompt:
            raise DataError(
                "missing-key",
                f"protocol {self.tag} asks with the benchmark's own prompt, got none; its rows need a `prompt` column",
                f"{item.benchmark}:{item.id}",
            )
        letters = ", ".join(item.letters)
        parts = [
            pieces["question"].format(question=item.question, letters=letters, prompt=item.prompt),
            pieces["options"].format(letters=letters),
            *(pieces["option"].format(letter=a, text=b) for a, b in zip(item.letters, item.options, strict=True)),
            pieces["ask"].format(letters=letters),
        ]
        return "".join(parts)

    def asking(self, benchmark: str) -> dict[str, Any]:
        """All that shapes raw answers to `benchmark`: two protocols that agree in it can score each other's runs."""
        return {
            "prompt": dict(self.pieces_of(benchmark)),
            "images_first": self.images_first,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "max_new_tokens": self.answer_tokens(benchmark),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `protocol_from` reads back; runs keep them in their manifest's `notes["protocol"]`."""
        plain = asdict(self)
        return {_KEY_OF.get(name, name): value for name, value in plain.items()}


_KEY_OF = {"token_limits": "max_new_tokens", "pieces": "prompt"}  # attribute: key in the file


def load_protocol(name_or_path: str | Path) -> Protocol:
    """A shipped protocol by name (`strict`) or tag (`strict@1`), or one from a YAML file.

    Raises:
        ConfigError: unknown name or version, unreadable file, unknown or missing key, value of the wrong type.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        return genuine(_read(Path(text)), text)
    name, _, version = text.partition("@")
    if name not in PROTOCOLS:
        raise ConfigError(
            f"protocol: expected one of {list(PROTOCOLS)} or a .yaml file with the same keys, got {text!r}"
        )
    protocol = _read(FOLDER / f"{name}.yaml")
    if version and version != str(protocol.version):
        raise ConfigError(
            f"protocol: expected {protocol.tag}, got {text}: this release asks or reads another way; "
            f"use the release that has {text}, or name --protocol {name}"
        )
    return protocol


def genuine(protocol: Protocol, where: str) -> Protocol:
    """The protocol, if its name is not that of a shipped one that reads or asks otherwise.

    Raises:
        ConfigError: it goes by a shipped protocol's name, but is another version or differs.
    """
    if protocol.name not in PROTOCOLS:
        return protocol
    shipped = _read(FOLDER / f"{protocol.name}.yaml")
    if protocol.version != shipped.version:
        raise ConfigError(
            f"{where}: expected {shipped.tag}, got {protocol.tag}: this release asks or reads another way; "
            f"use the release that has {protocol.tag}, or name --protocol {protocol.name}"
        )
    if protocol != shipped:
        differing = [f.name for f in fields(Protocol) if getattr(protocol, f.name) != getattr(shipped, f.name)]
        raise ConfigError(
            f"{where}: expected {shipped.tag} as it is shipped, got one that differs in {differing}; "
            "give it a name of its own"
        )
    return protocol


def _read(path: Path) -> Protocol:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a protocol in YAML, got {error}") from None
    return protocol_from(values, str(path))


def protocol_from(values: Any, where: str) -> Protocol:
    """A protocol from plain values, checked; `where` starts the messages.

    Raises:
        ConfigError: unknown or missing key, value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(values).__name__}")
    known = [_KEY_OF.get(f.name, f.name) for f in fields(Protocol)]
    _same_keys(values, known, where)
    name, version = values["name"], values["version"]
    if not isinstance(name, str) or not name or "@" in name:
        raise ConfigError(f"{where}: name: expected text without @, got {name!r}")
    _whole(version, 1, f"{where}: version")
    if not isinstance(values["images_first"], bool):
        raise ConfigError(f"{where}: images_first: expected true or false, got {values['images_first']!r}")
    for key in ("min_pixels", "max_pixels"):
        if values[key] is not None:
            _whole(values[key], 1, f"{where}: {key}", " or null")
    low, high = values["min_pixels"], values["max_pixels"]
    if low is not None and high is not None and low > high:
        raise ConfigError(f"{where}: expected min_pixels <= max_pixels, got {low} and {high}")
    _one_of(values["label_revision"], LABEL_REVISIONS, f"{where}: label_revision")
    _one_of(values["extractor"], tuple(EXTRACTORS), f"{where}: extractor")
    plain = {"name": name, "version": version, "images_first": values["images_first"]}
    return Protocol(
        **plain, min_pixels=low, max_pixels=high, token_limits=_limits(values["max_new_tokens"], where),
        label_revision=values["label_revision"], extractor=values["extractor"],
        pieces=_pieces(values["prompt"], where), headline=_texts(values["headline"], f"{where}: headline"),
    )  # fmt: skip


def _limits(values: Any, where: str) -> dict[str, int]:
    limits = _with_default(values, f"{where}: max_new_tokens")
    for benchmark, limit in limits.items():
        _whole(limit, 1, f"{where}: max_new_tokens: {benchmark}")
    return limits


def _pieces(values: Any, where: str) -> dict[str, dict[str, str]]:
    found = {}
    for benchmark, pieces in _with_default(values, f"{where}: prompt").items():
        here = f"{where}: prompt: {benchmark}"
        found[benchmark] = _texts(pieces, here)
        _same_keys(pieces, list(_PIECES), here)
        for piece, template in pieces.items():
            try:
                parsed = list(string.Formatter().parse(template))
            except ValueError as error:
                raise ConfigError(f"{here}: {piece}: {error}; write a brace of the text twice") from None
            # A field with a format or a conversion is named with it, so that it is not among the known ones.
            named = {
                f"{name}{':' * bool(spec)}{spec}{conversion or ''}"
                for _, name, spec, conversion in parsed
                if name is not None
            }
            if not named <= _PIECES[piece]:
                raise ConfigError(
                    f"{here}: {piece}: expected fields among {sorted(_PIECES[piece])}, got {sorted(named)}"
                )
    return found


def _with_default(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping) or DEFAULT not in values:
        raise ConfigError(
            f"{where}: expected benchmarks with their values, and `default` for the others; got {values!r}"
        )
    return {str(key): value for key, value in values.items()}


def _texts(values: Any, where: str) -> dict[str, str]:
    if not isinstance(values, Mapping) or not all(isinstance(text, str) for text in (*values, *values.values())):
        raise ConfigError(f"{where}: expected names with texts, got {values!r}")
    return dict(values)


def _same_keys(values: Mapping, known: list[str], where: str) -> None:
    unknown, missing = sorted(map(str, set(values) - set(known))), sorted(set(known) - set(values))
    if unknown or missing:
        raise ConfigError(f"{where}: unknown keys {unknown}, missing keys {missing}; a protocol has exactly {known}")


def _whole(value: Any, least: int, where: str, more: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}: expected a whole number of at least {least}{more}, got {value!r}")


def _one_of(value: Any, choices: tuple[str, ...], where: str) -> None:
    if value not in choices:
        raise ConfigError(f"{where}: expected one of {list(choices)}, got {value!r}")
