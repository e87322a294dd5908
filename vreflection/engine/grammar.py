"""Grammars that an answer must follow: JSON, JSON schemas, regular expressions, through the library llguidance.

A grammar begins after the latent spans: before its first token an answer may open spans, and a span ends with
`<|lvr_end|>`. Where the grammar is complete, only an end-of-sequence id is left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..decoding.vocabulary import WORD
from ..errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


# JSON as `json.dumps` writes it: with free white space a model can go on for ever without saying anything.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """A checked grammar for one tokenizer; made by `Grammars`, passed to `LatentDecoder.request`."""

    source: str
    tokenizer: LLTokenizer
    ordinary: torch.Tensor  # (W,) int32, the bits of tokens that are not special


class Grammars:
    """Makes grammars for a model's tokenizer.

    Args:
        tokenizer: a fast tokenizer of the transformers library.
        vocabulary: rows of the model's vocabulary projection.
        eos_token_ids: what ends an answer.

    Raises:
        ConfigError: llguidance is not installed, or it cannot read this tokenizer.
    """

    def __init__(self, tokenizer, vocabulary: int, eos_token_ids: Sequence[int]):
        try:
            from llguidance import hf
        except ImportError:
            raise ConfigError("grammar: llguidance is not installed; pip install 'vreflection[serve]'") from None
        try:
            self.tokenizer = hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos_token_ids))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"grammar: expected a byte-level fast tokenizer, got one that fails: {error}") from None
        # Once for all answers: it asks about every token.
        self.ordinary = torch.full((-(-vocabulary // WORD),), -1, dtype=torch.int32)
        for token in filter(self.tokenizer.is_special_token, range(self.tokenizer.vocab_size)):
            clear_bit(self.ordinary, token)

    def json_object(self) -> Grammar:
        """Any JSON object, on one line."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON on one line that follows a JSON schema.

        Raises:
            ConfigError: not a schema, or one that asks for what the library does not know.
        """
        from llguidance import LLMatcher

        if schema is False:
            raise ConfigError("grammar: expected a JSON schema, got false, which no JSON follows")
        schema = {} if schema is True else schema
        try:
            return self.checked(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=ONE_LINE))
        except ValueError as error:
            raise ConfigError(f"grammar: expected a JSON schema, got one that fails: {error}") from None

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole.

        Raises:
            ConfigError: not a regular expression of the library's.
        """
        from llguidance import LLMatcher

        return self.checked(LLMatcher.grammar_from_regex(pattern))

    def checked(self, source: str) -> Grammar:
        from llguidance import LLMatcher

        fault = LLMatcher.validate_grammar(source, self.tokenizer)
        if fault:
            raise ConfigError(f"grammar: expected one that can be compiled, got: {fault.strip()[:300]}")
        # Some are valid and cannot begin: endless references, too many states.
        matcher = LLMatcher(self.tokenizer, source)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ConfigError(
                f"grammar: expected one that an answer can follow, got: {first_line(matcher.get_error())}"
            )
        return Grammar(source, self.tokenizer, self.ordinary)


class GrammarState:
    """Where one answer stands in its grammar.

    Args:
        words: of 32 bits, that hold one for every row of the vocabulary projection.
        lvr_start_id, lvr_end_id: open and close a span. may_open_spans: before the grammar's first token.
    """

    def __init__(self, grammar: Grammar, words: int, lvr_start_id: int, lvr_end_id: int, may_open_spans: bool):
        from llguidance import LLMatcher

        self.matcher = LLMatcher(grammar.tokenizer, grammar.source)
        self.words, self.ordinary = words, grammar.ordinary
        self.lvr_start_id, self.lvr_end_id, self.may_open_spans = lvr_start_id, lvr_end_id, may_open_spans
        self.begun = self.in_span = False

    def take(self, token: int) -> None:
        """One more token of the answer, latent positions left out.

        Raises:
            ConfigError: the grammar cannot take it.
        """
        if self.in_span:
            self.in_span = False  # its end
        elif token == self.lvr_start_id and self.may_open_spans and not self.begun:
            self.in_span = True
        else:
            self.begun = True
            if not self.matcher.is_stopped() and not self.matcher.consume_token(token):
                raise ConfigError(f"grammar: token {token} does not fit: {first_line(self.matcher.get_error())}")

    def allowed(self) -> torch.Tensor:
        """Tokens that may come next, `(W,)` int32 as `VocabularyRows.allowed`.

        Raises:
            ConfigError: none is left, as where the tokenizer cannot spell what the grammar wants.
        """
        if self.in_span:
            words = torch.zeros(self.words, dtype=torch.int32)
            set_bit(words, self.lvr_end_id)
            return words
        raw = bytearray(self.matcher.compute_bitmask())
        if self.matcher.is_error():
            raise ConfigError(f"grammar: {first_line(self.matcher.get_error())}")
        raw.extend(bytes(max(4 * self.words - len(raw), 0)))
        words = torch.frombuffer(raw, dtype=torch.int32)[: self.words].clone()
        if not self.matcher.is_accepting() and not self.matcher.is_stopped():
            words[: len(self.ordinary)] &= (
                self.ordinary
            )  # literals that spell a special token would become it, and end the answer
        if not bool(words.any()):
            raise ConfigError("grammar: no ordinary token of this tokenizer can go on; can it spell the grammar's "
                              "characters, and are there special tokens among its texts?")  # fmt: skip
        if self.span_token >= 0:
            set_bit(words, self.lvr_start_id)
        return words

    @property
    def span_token(self) -> int:
        """What opens a span, where one may open; else -1.

        It is to be picked only where the model likes it best of all tokens: a model that was never asked for JSON likes
        another look better than a brace, again and again.
        """
        return self.lvr_start_id if self.may_open_spans and not (self.begun or self.in_span) else -1


def first_line(fault: str) -> str:
    """What went wrong, without the dump of the library's state below it."""
    return fault.partition("\n")[0][:300]


def set_bit(words: torch.Tensor, token: int) -> None:
    words[token // WORD] |= one_bit(token)


def clear_bit(words: torch.Tensor, token: int) -> None:
    words[token // WORD] &= ~one_bit(token)


def one_bit(token: int) -> int:
    """A token's bit in its word, as a signed number of 32 bits."""
    bit = 1 << (token % WORD)
    return bit - (1 << WORD) if bit == 1 << (WORD - 1) else bit
