"""Per-row wishes about single tokens: biases, penalties by frequency, a least length, the tokens a grammar allows.

Shape suffixes: B rows, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from .sampling import SamplingSettings

EVERY_TOKEN = -1  # 32 set bits
WORD = 32


@dataclass
class VocabularyRows:
    """What the rows ask of single tokens; allocated once any row asks for something.

    Attributes:
        bias: `(B, V)` float32, added to the logits.
        counts: `(B, V)` float32, how often the row's answer holds each token.
        frequency_penalty, presence_penalty: `(B,)` float32, taken off per occurrence, and once.
        min_new_tokens: `(B,)` int64; before that many counted tokens no end-of-sequence id is picked.
        allowed: `(B, W)` int32, bit v % 32 of word v // 32 is set where token v may be picked.
        only_if_best: `(B,)` int64, a token that may be picked only where no other, allowed or not, scores higher, or
            -1.
    """

    bias: torch.Tensor
    counts: torch.Tensor
    frequency_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    min_new_tokens: torch.Tensor
    allowed: torch.Tensor
    only_if_best: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, vocabulary: int, device: torch.device | str) -> VocabularyRows:
        """Rows that ask for nothing."""
        table = lambda: torch.zeros(rows, vocabulary, dtype=torch.float32, device=device)  # noqa: E731
        number = lambda dtype: torch.zeros(rows, dtype=dtype, device=device)  # noqa: E731
        words = -(-vocabulary // WORD)
        return cls(
            table(), table(), number(torch.float32), number(torch.float32), number(torch.int64),
            torch.full((rows, words), EVERY_TOKEN, dtype=torch.int32, device=device),
            torch.full((rows,), -1, dtype=torch.int64, device=device),
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def narrow(self, rows: int) -> VocabularyRows:
        """Views of the first rows."""
        return VocabularyRows(*(tensor[:rows] for tensor in self.tensors()))

    def set_row(self, row: int, settings: SamplingSettings) -> None:
        """For a new request in a row; every token is allowed and none counted."""
        self.bias[row], self.counts[row], self.allowed[row], self.only_if_best[row] = 0, 0, EVERY_TOKEN, -1
        if settings.logit_bias:
            tokens, values = zip(*settings.logit_bias)
            self.bias[row, list(tokens)] = torch.tensor(values, device=self.bias.device)
        self.frequency_penalty[row], self.presence_penalty[row] = settings.frequency_penalty, settings.presence_penalty
        self.min_new_tokens[row] = settings.min_new_tokens

    def allow(self, row: int, words: torch.Tensor, only_if_best: int = -1) -> None:
        """The tokens that a row may pick next, `(W,)` int32 as in `allowed`, and its `only_if_best`."""
        self.allowed[row], self.only_if_best[row] = words.to(self.allowed.device), only_if_best

    def count(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """One more of `tokens` `(B,)` where `counts` `(B,)` is 1."""
        self.counts.scatter_add_(1, tokens[:, None], counts[:, None].float())

    def adjust(self, scores_BV: torch.Tensor, counted: torch.Tensor, end_ids: torch.Tensor) -> torch.Tensor:
        """Scores with everything above applied.

        Args:
            scores_BV: float32. counted: `(B,)` tokens of the answer so far. end_ids: `(B, E)`, filled up with -1.
        """
        scores = scores_BV + self.bias - self.frequency_penalty[:, None] * self.counts
        scores = scores - self.presence_penalty[:, None] * (self.counts > 0)
        vocabulary = scores.shape[1]
        bits = torch.arange(WORD, device=scores.device, dtype=torch.int32)
        allowed = ((self.allowed[:, :, None] >> bits) & 1).flatten(1)[:, :vocabulary].bool()
        # Slots without an end id point past the vocabulary.
        ends = torch.zeros(len(scores), vocabulary + 1, dtype=torch.bool, device=scores.device)
        ends = ends.scatter(1, torch.where(end_ids < 0, vocabulary, end_ids), True)[:, :vocabulary]
        too_early = (counted < self.min_new_tokens)[:, None] & ends
        token = self.only_if_best.clamp(min=0)[:, None]
        unwanted = (self.only_if_best >= 0) & (scores.argmax(dim=1) != self.only_if_best)
        allowed = allowed.scatter(1, token, allowed.gather(1, token) & ~unwanted[:, None])
        return scores.masked_fill(~allowed | too_early, float("-inf"))
