"""Picking tokens from logits, row by row: penalties, temperature, top-k, top-p, min-p; no host synchronisation.

Draws come from a counter, not from a generator's state: the noise of a row is a function of its seed, of how many
tokens it has picked, and of the vocabulary index alone. So a row's tokens do not depend on who shares its batch.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .vocabulary import VocabularyRows

# SplitMix64 (Steele, Lea, Flood 2014); as signed numbers, because torch multiplies int64 modulo 2^64.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9 - 2**64
SECOND_MULTIPLIER = 0x94D049BB133111EB - 2**64


# Below, scores over temperature leave float32; the lowest in released generation configs is 1e-6.
LOWEST_TEMPERATURE = 1e-7


@dataclass(frozen=True)
class SamplingSettings:
    """How to pick. Greedy unless `do_sample`; penalties, biases and the least length apply either way.

    Attributes:
        temperature: at least 1e-7. top_k: 0 = off. top_p: in (0, 1], 1 = off. repetition_penalty: > 0, 1 = off, over
            prompt and generated ids.
        min_p: in [0, 1], 0 = off; leaves out tokens less likely than this fraction of the likeliest.
        frequency_penalty, presence_penalty: taken off a token's logit per occurrence in the answer, and once.
        logit_bias: pairs of a token id and what is added to its logit.
        min_new_tokens: before that many, no end-of-sequence id is picked.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self):
        if not self.temperature >= LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature: expected > 0 (at least {LOWEST_TEMPERATURE}), got {self.temperature}; greedy is "
                "do_sample=False"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 = off), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected > 0, got {self.repetition_penalty}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected in [0, 1], got {self.min_p}")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        for token, bias in self.logit_bias:
            if math.isnan(bias):
                raise ValueError(f"logit_bias: expected numbers, got {bias} for token {token}")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens: expected at least 0, got {self.min_new_tokens}")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed token by token, see `VocabularyRows`."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias or self.min_new_tokens)


@dataclass(frozen=True)
class PickPlan:
    """What at least one row asks for: decided on the host, so that a step has no branch on the device.

    A row that asks for less than the plan is picked as if it were alone.
    """

    sample: bool = False
    truncate: bool = False
    penalty: bool = False
    adjust: bool = False

    @classmethod
    def of(cls, settings: list[SamplingSettings], constrained: bool = False) -> PickPlan:
        """Args: constrained: a grammar governs a row."""
        sampled = [s for s in settings if s.do_sample]
        return cls(
            sample=bool(sampled),
            truncate=any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in sampled),
            penalty=any(s.repetition_penalty != 1 for s in settings),
            adjust=constrained or any(s.adjusts for s in settings),
        )


@dataclass
class SamplingRows:
    """Settings of every row, `(B,)` each, on the device."""

    do_sample: torch.Tensor  # bool
    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float32
    repetition_penalty: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    seed: torch.Tensor  # int64

    @classmethod
    def greedy(cls, rows: int, device: torch.device | str = "cpu") -> SamplingRows:
        rows_of = lambda value, dtype: torch.full((rows,), value, dtype=dtype, device=device)  # noqa: E731
        return cls(
            rows_of(False, torch.bool), rows_of(1.0, torch.float32), rows_of(0, torch.int64),
            rows_of(1.0, torch.float32), rows_of(1.0, torch.float32), rows_of(0.0, torch.float32),
            rows_of(0, torch.int64),
        )  # fmt: skip

    @classmethod
    def of(cls, settings: list[SamplingSettings], seeds: list[int], device: torch.device | str = "cpu") -> SamplingRows:
        rows = cls.greedy(len(settings), device)
        for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "min_p"):
            column = getattr(rows, name)
            column.copy_(torch.tensor([getattr(s, name) for s in settings], dtype=column.dtype))
        rows.seed.copy_(torch.tensor([signed(seed) for seed in seeds], dtype=torch.int64))
        return rows

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def narrow(self, rows: int) -> SamplingRows:
        """Views of the first rows."""
        return SamplingRows(*(tensor[:rows] for tensor in self.tensors()))


def signed(seed: int) -> int:
    """A seed's low 64 bits as a signed number."""
    low = seed & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low


def shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64."""
    x = (x ^ shift_right(x, 30)) * FIRST_MULTIPLIER
    x = (x ^ shift_right(x, 27)) * SECOND_MULTIPLIER
    return x ^ shift_right(x, 31)


def draw_keys(seed: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Keys `(B,)` of the next draw from seeds and the numbers of tokens picked so far."""
    return mix(mix(seed) + (picked + 1) * GOLDEN)


def gumbel_noise(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise `(B, V)` float32."""
    index = torch.arange(1, vocabulary + 1, device=keys.device) * GOLDEN
    # 23 bits and a half: strictly inside (0, 1) and exact in float32.
    uniform = (shift_right(mix(keys[:, None] + index), 41).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def penalise(scores_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    penalty = penalty[:, None]
    return torch.where(seen_BV, torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV)


def outside_nucleus(scores_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Tokens that top-k, top-p or min-p leaves out, `(B, V)` bool."""
    ordered, order = scores_BV.sort(dim=-1, descending=True, stable=True)
    width = scores_BV.shape[1]
    last = torch.where(rows.top_k > 0, rows.top_k.clamp(max=width), width) - 1
    # Ties with the k-th score stay, as in the host library.
    outside = ordered < ordered.gather(1, last[:, None])
    probability = ordered.masked_fill(outside, float("-inf")).softmax(dim=-1)
    # The smallest set whose mass reaches top_p; the best token always stays.
    outside |= (probability.cumsum(dim=-1) - probability >= rows.top_p[:, None]) & (rows.top_p < 1)[:, None]
    outside |= probability < rows.min_p[:, None] * probability[:, :1]
    return torch.zeros_like(outside).scatter(1, order, outside)


def final_scores(
    logits_BV: torch.Tensor,
    rows: SamplingRows,
    plan: PickPlan,
    seen_BV: torch.Tensor | None = None,
    picked: torch.Tensor | None = None,
    vocabulary: VocabularyRows | None = None,
    end_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 scores whose softmax a row is drawn from, or whose maximum a greedy row takes; see `pick_tokens`."""
    scores = logits_BV.float()
    if plan.penalty and seen_BV is not None:
        scores = penalise(scores, seen_BV, rows.repetition_penalty)
    if plan.adjust and vocabulary is not None and picked is not None and end_ids is not None:
        scores = vocabulary.adjust(scores, picked, end_ids)
    if plan.sample:
        scores = torch.where(rows.do_sample[:, None], scores / rows.temperature[:, None], scores)
        if plan.truncate:
            outside = outside_nucleus(scores, rows) & rows.do_sample[:, None]
            scores = scores.masked_fill(outside, float("-inf"))
    return scores


def pick_tokens(
    logits_BV: torch.Tensor,
    rows: SamplingRows,
    plan: PickPlan,
    picked: torch.Tensor,
    seen_BV: torch.Tensor | None = None,
    vocabulary: VocabularyRows | None = None,
    end_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids `(B,)` int64.

    Args:
        picked: `(B,)` tokens each row has picked before. seen_BV: for the repetition penalty.
        vocabulary, end_ids: `(B, E)` end-of-sequence ids, for what `plan.adjust` stands for.
    """
    scores = final_scores(logits_BV, rows, plan, seen_BV, picked, vocabulary, end_ids)
    if plan.sample:
        noise = gumbel_noise(draw_keys(rows.seed, picked), scores.shape[1])
        scores = torch.where(rows.do_sample[:, None], scores + noise, scores)
    return scores.argmax(dim=-1)
