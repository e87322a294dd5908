"""Picking a token from logits: penalty, temperature, top-k, top-p; batched, without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How to pick. Greedy unless `do_sample`; `repetition_penalty` applies either way.

    Attributes:
        temperature: > 0. top_k: 0 = off. top_p: in (0, 1], 1 = off. repetition_penalty: > 0, 1 = off, over prompt and
            generated ids.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected > 0, got {self.temperature}; greedy is do_sample=False")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 = off), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected > 0, got {self.repetition_penalty}")

    def scores(self, logits_BV: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 scores `(B, V)` after penalty and, when sampling, temperature, top-k and top-p."""
        scores = logits_BV.float()
        if self.repetition_penalty != 1.0 and seen is not None:
            penalty = self.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if not self.do_sample:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = scores.sort(dim=-1, descending=True)
            probability = ordered.softmax(dim=-1)
            # Keep the smallest set whose mass reaches top_p; the best token always stays.
            outside = probability.cumsum(dim=-1) - probability >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
        return scores

    def pick(
        self, logits_BV: torch.Tensor, seen: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Token ids `(B,)` int64."""
        scores = self.scores(logits_BV, seen)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        # Exponential race: a categorical draw without the host sync of torch.multinomial.
        noise = torch.empty_like(scores).exponential_(generator=generator)
        return (scores.softmax(dim=-1) / noise).argmax(dim=-1)
