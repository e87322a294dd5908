"""The per-row state machine of latent decoding, as tensors of static shape.

A row consumes either the embedding of its last token or, inside a span, its own last hidden state. After
`<|lvr_start|>` is consumed exactly N latents are consumed; the output of the last one is an ordinary token.

Shape suffixes: B rows, D width, V vocabulary, E end-of-sequence ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from .vocabulary import VocabularyRows

OUTPUT_MODES = ("clean", "parity")
MAX_END_IDS = 8


@dataclass(frozen=True)
class DecodeRules:
    """What all rows of a decoder share.

    Attributes:
        lvr_start_id, lvr_id, pad_id: token ids.
        output_mode: `clean` gives latent positions the `<|lvr|>` id and leaves them out of counts and penalties;
            `parity` appends, counts and penalises the arg-max "ghost" ids, as the reference implementation does.
    """

    lvr_start_id: int
    lvr_id: int
    pad_id: int
    output_mode: str = "clean"

    def __post_init__(self):
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"latent_mode: expected one of {OUTPUT_MODES}, got {self.output_mode!r}")

    @property
    def clean(self) -> bool:
        return self.output_mode == "clean"


@dataclass
class DecodeState:
    """What a row is (its limits) and where it stands. Rows nobody uses are finished."""

    # Limits, set when a row is admitted.
    latent_steps: torch.Tensor  # (B,) int64: N, latents per span
    max_new_tokens: torch.Tensor  # (B,) int64: counted tokens
    capacity: torch.Tensor  # (B,) int64: keys the row's cache can hold
    end_ids: torch.Tensor  # (B, E) int64, filled up with -1
    # Where it stands.
    mode: torch.Tensor  # (B,) bool: the next input is a latent
    remaining: torch.Tensor  # (B,) int64: latents left in the span
    finished: torch.Tensor  # (B,) bool
    last_token: torch.Tensor  # (B,) int64
    z: torch.Tensor  # (B, D): last hidden state
    position: torch.Tensor  # (B,) int64: rope position of the next input, the same on all three axes
    length: torch.Tensor  # (B,) int64: keys in the row's cache
    counted: torch.Tensor  # (B,) int64
    seen: torch.Tensor | None = None  # (B, V) bool, for the repetition penalty
    vocabulary: VocabularyRows | None = None  # once any row asks for something of single tokens

    LIMITS = ("latent_steps", "max_new_tokens", "capacity", "end_ids")

    @classmethod
    def idle(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> DecodeState:
        """Rows that are all finished."""
        number = lambda: torch.zeros(rows, dtype=torch.int64, device=device)  # noqa: E731
        flag = lambda value: torch.full((rows,), value, dtype=torch.bool, device=device)  # noqa: E731
        ends = torch.full((rows, MAX_END_IDS), -1, dtype=torch.int64, device=device)
        z = torch.zeros(rows, width, dtype=dtype, device=device)
        return cls(
            number(), number(), number(), ends, flag(False), number(), flag(True), number(), z,
            number(), number(), number(),
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """Everything that a step replaces."""
        changing = (getattr(self, f.name) for f in fields(self) if f.name not in (*self.LIMITS, "vocabulary"))
        return [tensor for tensor in changing if tensor is not None]

    def narrow(self, rows: int) -> DecodeState:
        """Views of the first rows."""
        part = lambda value: value.narrow(rows) if isinstance(value, VocabularyRows) else value[:rows]  # noqa: E731
        values = (getattr(self, f.name) for f in fields(self))
        return DecodeState(*(None if value is None else part(value) for value in values))


def plan_transition(state: DecodeState, rules: DecodeRules) -> tuple[torch.Tensor, torch.Tensor]:
    """`(mode, remaining)` after the step that consumed the state's input; needs no logits."""
    entering = state.last_token == rules.lvr_start_id
    remaining = torch.where(entering & ~state.mode, state.latent_steps, state.remaining) - state.mode.long()
    return (state.mode | entering) & (remaining > 0) & ~state.finished, remaining


def advance(
    state: DecodeState, rules: DecodeRules, hidden_BD: torch.Tensor, picked: torch.Tensor, transition=None
) -> tuple[DecodeState, torch.Tensor]:
    """Take one step's output.

    Args:
        state: `length` and `position` already count the input that the step consumed.
        hidden_BD: last hidden state of that step.
        picked: `(B,)` int64, the token picked from its logits; ignored in clean mode where the next input is a latent.
        transition: `plan_transition(state, rules)`, if already computed.

    Returns:
        the next state and what the step emitted, `(B,)` int64: see `emission`.
    """
    mode, remaining = plan_transition(state, rules) if transition is None else transition
    emitted = torch.where(mode, rules.lvr_id, picked) if rules.clean else picked
    emitted = torch.where(state.finished, rules.pad_id, emitted)
    counts = ~(state.finished | mode) if rules.clean else ~state.finished
    counted = state.counted + counts
    # End of sequence is a pick like any other inside a span, and ignored there.
    ended = (emitted[:, None] == state.end_ids).any(dim=1) & ~mode
    # Without room for one more key the row cannot go on.
    finished = state.finished | ended | (counted >= state.max_new_tokens) | (state.length >= state.capacity)
    seen = state.seen
    if seen is not None:
        index = emitted[:, None]
        seen = seen.scatter(1, index, seen.gather(1, index) | counts[:, None])
    moved = DecodeState(
        *(getattr(state, name) for name in DecodeState.LIMITS),
        mode=mode & ~finished, remaining=remaining, finished=finished, last_token=emitted, z=hidden_BD,
        position=state.position, length=state.length, counted=counted, seen=seen,
        vocabulary=state.vocabulary,
    )  # fmt: skip
    return moved, emission(emitted, mode, finished, state.finished)


LATENT_BIT, LAST_BIT, NOTHING = 32, 33, -1


def emission(emitted, latent, finished, finished_before) -> torch.Tensor:
    """One number per row: the id, whether its position is a latent one, whether it is the row's last; or NOTHING."""
    flags = (latent.long() << LATENT_BIT) | (finished.long() << LAST_BIT)
    return torch.where(finished_before, NOTHING, emitted | flags)


def read_emission(number: int) -> tuple[int, bool, bool]:
    """`(id, latent, last)` of an emission that is not NOTHING."""
    return number & (2**LATENT_BIT - 1), bool(number >> LATENT_BIT & 1), bool(number >> LAST_BIT & 1)
