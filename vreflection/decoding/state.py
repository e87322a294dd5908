"""The per-row state machine of latent decoding, as tensors of static shape.

A row consumes either the embedding of its last token or, inside a span, its own last hidden state. After
`<|lvr_start|>` is consumed exactly N latents are consumed; the output of the last one is an ordinary token.

Shape suffixes: B rows, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OUTPUT_MODES = ("clean", "parity")


@dataclass(frozen=True)
class DecodeRules:
    """What does not change during a decode.

    Attributes:
        latent_steps: N, latents per span.
        lvr_start_id, lvr_id, pad_id: token ids. eos_ids: `(k,)` int64 on the device.
        output_mode: `clean` gives latent positions the `<|lvr|>` id and leaves them out of counts and penalties;
            `parity` appends, counts and penalises the arg-max "ghost" ids, as the reference implementation does.
        max_new_tokens: `(B,)` int64, counted tokens per row.
    """

    latent_steps: int
    lvr_start_id: int
    lvr_id: int
    pad_id: int
    eos_ids: torch.Tensor
    output_mode: str
    max_new_tokens: torch.Tensor

    def __post_init__(self):
        if self.output_mode not in OUTPUT_MODES:
            raise ValueError(f"latent_mode: expected one of {OUTPUT_MODES}, got {self.output_mode!r}")
        if self.latent_steps < 0:
            raise ValueError(f"latent_steps: expected at least 0, got {self.latent_steps}")


@dataclass
class DecodeState:
    """What changes, per row: `mode` (inside a span), `remaining` latents, the last token, state and rope position."""

    mode: torch.Tensor  # (B,) bool
    remaining: torch.Tensor  # (B,) int64
    finished: torch.Tensor  # (B,) bool
    last_token: torch.Tensor  # (B,) int64
    z: torch.Tensor  # (B, D)
    position: torch.Tensor  # (B,) int64, of the next input, the same on all three rope axes
    counted: torch.Tensor  # (B,) int64
    seen: torch.Tensor | None  # (B, V) bool, for the repetition penalty

    @classmethod
    def after_prompt(cls, last_token, hidden_BD, position, seen=None) -> DecodeState:
        """State when the prompt has been consumed and nothing has been picked yet."""
        zeros = torch.zeros_like(last_token)
        off = torch.zeros_like(last_token, dtype=torch.bool)
        return cls(off, zeros, off, last_token, hidden_BD, position, zeros, seen)


def plan_transition(state: DecodeState, rules: DecodeRules) -> tuple[torch.Tensor, torch.Tensor]:
    """`(mode, remaining)` after the step that consumed the state's input; needs no logits."""
    entering = state.last_token == rules.lvr_start_id
    remaining = torch.where(entering & ~state.mode, rules.latent_steps, state.remaining)
    remaining = remaining - state.mode.long()
    return (state.mode | entering) & (remaining > 0) & ~state.finished, remaining


def advance(
    state: DecodeState, rules: DecodeRules, hidden_BD: torch.Tensor, picked: torch.Tensor
) -> tuple[DecodeState, torch.Tensor]:
    """Consume one step's output.

    Args:
        hidden_BD: last hidden state of the step that consumed the state's input.
        picked: `(B,)` int64, the token picked from its logits; ignored in clean mode where the next input is a latent.

    Returns:
        the next state and the emitted ids `(B,)`.
    """
    mode, remaining = plan_transition(state, rules)
    clean = rules.output_mode == "clean"
    emitted = torch.where(mode, rules.lvr_id, picked) if clean else picked
    emitted = torch.where(state.finished, rules.pad_id, emitted)
    counts = ~state.finished & ~mode if clean else ~state.finished
    counted = state.counted + counts.long()
    # End of sequence is a pick like any other inside a span, and ignored there.
    ended = torch.isin(emitted, rules.eos_ids) & ~mode
    finished = state.finished | ended | (counted >= rules.max_new_tokens)
    seen = state.seen
    if seen is not None:
        already = seen.gather(1, emitted[:, None])
        seen = seen.scatter(1, emitted[:, None], already | counts[:, None])
    return (
        DecodeState(
            mode=mode & ~finished,
            remaining=remaining,
            finished=finished,
            last_token=emitted,
            z=hidden_BD,
            position=state.position + 1,
            counted=counted,
            seen=seen,
        ),
        emitted,
    )
