"""Losses of both stages, in float32 (float64 for float64 inputs), always connected to the graph.

Shape suffixes: B boxes, Q latents per box, D width, N keys (padded), S supervised positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from .ops.distillation_loss import KL_REDUCTIONS, kl_sum, mean_square

PUBLISHED_ALIGNMENT = 0.5
ALIGNMENTS = ("symmetric", "stochastic", "llm_only", "bcm_only")


@dataclass(frozen=True)
class LatentObjective:
    """Which losses a stage takes, and how. `None` weights are off.

    Attributes:
        alignment_weight: λ of the latent alignment (stage 1, or stage 2 with `keep_alignment`).
        distillation_weight: λ of `latent_mse + attention_kl_weight * attention_kl` (stage 2).
        alignment: `symmetric`, `stochastic`, `llm_only` or `bcm_only`.
        stochastic_probability: chance that a step's gradient goes to the language-model side.
        ce_on_latent_slots: supervise the slots' token ids; otherwise `<|lvr|>` labels are left out.
        alignment_offset: hidden states aligned to Z are taken at slot + offset.
        probe_offset: hidden states used as probes are taken at slot + offset.
    """

    alignment_weight: float | None = None
    distillation_weight: float | None = None
    attention_kl_weight: float = 1.0
    alignment: str = "symmetric"
    stochastic_probability: float = 0.5
    alignment_seed: int = 0
    kl_reduction: str = "sum_queries"
    ce_on_latent_slots: bool = False
    alignment_offset: int = -1
    probe_offset: int = 0

    def __post_init__(self):
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment: expected one of {ALIGNMENTS}, got {self.alignment!r}")
        if self.kl_reduction not in KL_REDUCTIONS:
            raise ValueError(f"kl_reduction: expected one of {KL_REDUCTIONS}, got {self.kl_reduction!r}")
        if not 0 <= self.stochastic_probability <= 1:
            raise ValueError(f"stochastic_probability: expected 0..1, got {self.stochastic_probability}")
        for name in ("alignment_weight", "distillation_weight", "attention_kl_weight"):
            value = getattr(self, name)
            off = value is None and name != "attention_kl_weight"
            if not off and (value is None or not (math.isfinite(value) and value >= 0)):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        for name in ("alignment_offset", "probe_offset"):
            value = getattr(self, name)
            if type(value) is not int or value not in (-1, 0):
                raise ValueError(
                    f"{name}: expected 0 (the slot itself) or -1 (the position that predicts it), got {value!r}; "
                    "any other leaves the positions from the start token to the last slot"
                )

    @classmethod
    def for_stage(cls, stage: str, keep_alignment: bool = False, **overrides) -> LatentObjective:
        """The published settings of a stage, with overrides.

        `keep_alignment` keeps stage 1's alignment term in stage 2, at its published weight unless one is given; a
        weight of None is none given, since the shipped stage-2 settings turn the term off with it.
        """
        unknown = set(overrides) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown objective settings {sorted(unknown)}; known: {[f.name for f in fields(cls)]}")
        base = {
            "stage1": cls(alignment_weight=PUBLISHED_ALIGNMENT, ce_on_latent_slots=True),
            "stage2": cls(distillation_weight=1.0, alignment_weight=PUBLISHED_ALIGNMENT if keep_alignment else None),
            "filler_aligned": cls(alignment_weight=PUBLISHED_ALIGNMENT),
        }.get(stage, cls())
        if keep_alignment and stage != "stage2":
            raise ValueError(f"keep_alignment: an option of stage 2, got stage {stage!r}")
        if keep_alignment and overrides.get("alignment_weight") is None:
            overrides.pop("alignment_weight", None)
        return replace(base, **overrides)


def latent_alignment(
    hidden_BQD: torch.Tensor, teacher_BQD: torch.Tensor, mode: str = "symmetric", llm_side: bool = True
) -> torch.Tensor:
    """Mean squared distance of hidden states and teacher latents; `mode` says which side receives the gradient.

    The value is the same in every mode. `symmetric` sends half the gradient to each side, and equals half the gradient
    of `mse(hidden, teacher)` without any stop-gradient. `stochastic` sends all of it to the side that `llm_side` names
    (see `stochastic_side`): at probability one half its expected gradient is the symmetric one.

    Returns a float32 scalar; zero, still connected, for an empty batch.
    """
    check_same_shape("hidden", hidden_BQD, "teacher", teacher_BQD)
    hidden, teacher = widen(hidden_BQD), widen(teacher_BQD)
    if mode == "symmetric":
        return 0.5 * mean_square(hidden.detach(), teacher) + 0.5 * mean_square(hidden, teacher.detach())
    if mode == "llm_only" or (mode == "stochastic" and llm_side):
        return mean_square(hidden, teacher.detach())
    if mode in ("bcm_only", "stochastic"):
        return mean_square(hidden.detach(), teacher)
    raise ValueError(f"mode: expected one of {ALIGNMENTS}, got {mode!r}")


def stochastic_side(seed: int, step: int, probability: float) -> bool:
    """Whether step `step` trains the language-model side. A pure function of its arguments: equal on every rank, and
    after a resume."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < probability


def latent_mse(student_BQD: torch.Tensor, teacher_BQD: torch.Tensor) -> torch.Tensor:
    """Mean of (Ẑ − Z)², float32."""
    check_same_shape("student", student_BQD, "teacher", teacher_BQD)
    return mean_square(student_BQD, teacher_BQD)


def attention_kl(teacher_BQN: torch.Tensor, student_BQN: torch.Tensor, reduction: str = "sum_queries") -> torch.Tensor:
    """KL(teacher ‖ student) of attention rows on the same N tokens; `ops.distillation_loss` takes packed, ragged ones.

    `(1/B) Σ_b Σ_q Σ_n A_T (log A_T − log(A_S + 1e-9))`, with 0·log 0 = 0. `mean_queries` divides by Q as well.
    """
    check_same_shape("teacher", teacher_BQN, "student", student_BQN)
    if reduction not in KL_REDUCTIONS:
        raise ValueError(f"reduction: expected one of {KL_REDUCTIONS}, got {reduction!r}")
    rows = teacher_BQN.shape[0] * (teacher_BQN.shape[1] if reduction == "mean_queries" else 1)
    return kl_sum(teacher_BQN, student_BQN) / max(rows, 1)


def supervised_cross_entropy(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over supervised positions, float32; zero, still connected, when there are none."""
    if not len(targets_S):
        return widen(logits_SV).sum()
    return F.cross_entropy(widen(logits_SV), targets_S)


def widen(values: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_same_shape(left_name: str, left: torch.Tensor, right_name: str, right: torch.Tensor) -> None:
    if left.shape != right.shape:
        raise ValueError(
            f"{left_name} and {right_name} must have one shape, got {tuple(left.shape)} and {tuple(right.shape)}"
        )
