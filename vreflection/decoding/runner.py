"""The decode loop over any step: eager tier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .sampling import SamplingSettings
from .state import DecodeRules, DecodeState, advance, plan_transition


class Step(Protocol):
    """One decoder step on a batch; owns its cache."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`(B,)` ids to `(B, D)` input embeddings."""
        ...

    def forward(self, inputs_BD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Consume one input per row at rope positions `(B,)`; returns the last hidden state `(B, D)`."""
        ...

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """`(B, D)` to `(B, V)`."""
        ...


@dataclass
class DecodeTrace:
    """What a decode emitted, one entry per step.

    Attributes:
        tokens: emitted ids `(B,)` per step. latent: whether the emitted position is a latent one `(B,)`.
        hidden: with `record`, last hidden states `(B, D)` whose logits gave each token.
        fed: with `record`, inputs consumed `(B, D)` by each step after the prompt, and `fed_latent` `(B,)`.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    latent: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    fed: list[torch.Tensor] = field(default_factory=list)
    fed_latent: list[torch.Tensor] = field(default_factory=list)
    lm_head_calls: int = 0


def decode(
    step: Step,
    state: DecodeState,
    rules: DecodeRules,
    sampling: SamplingSettings,
    *,
    generator: torch.Generator | None = None,
    forced_first: torch.Tensor | None = None,
    latent_inputs: torch.Tensor | None = None,
    record: bool = False,
    on_token: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> DecodeTrace:
    """Decode until every row has finished.

    Args:
        state: after the prompt (`DecodeState.after_prompt`).
        forced_first: `(B,)` ids emitted first, whatever the logits say; -1 leaves a row its own pick.
        latent_inputs: `(B, N, D)` states consumed inside spans instead of the row's own.
        record: keep inputs and hidden states in the trace.
        on_token: called with `(emitted, latent)` after each step.
    """
    trace = DecodeTrace()
    hidden = state.z
    while True:
        picked = pick_tokens(step, state, rules, sampling, hidden, generator, trace)
        if forced_first is not None and not trace.tokens:
            picked = torch.where(forced_first >= 0, forced_first, picked)
        state, emitted = advance(state, rules, hidden, picked)
        trace.tokens.append(emitted)
        trace.latent.append(state.mode)
        if record:
            trace.hidden.append(hidden)
        if on_token is not None:
            on_token(emitted, state.mode)
        if bool(state.finished.all()):
            return trace
        inputs = torch.where(
            state.mode[:, None], latent_state(state, rules, latent_inputs), step.embed(state.last_token)
        )
        if record:
            trace.fed.append(inputs)
            trace.fed_latent.append(state.mode)
        hidden = step.forward(inputs, state.position - 1)


def pick_tokens(step, state, rules, sampling, hidden, generator, trace) -> torch.Tensor:
    """Picks for rows that need one; a step whose rows are all latent or finished skips the vocabulary projection."""
    if rules.output_mode == "clean":
        mode, _ = plan_transition(state, rules)
        if bool((mode | state.finished).all()):
            return torch.full_like(state.last_token, rules.pad_id)
    trace.lm_head_calls += 1
    return sampling.pick(step.logits(hidden), state.seen, generator)


def latent_state(state: DecodeState, rules: DecodeRules, latent_inputs: torch.Tensor | None) -> torch.Tensor:
    if latent_inputs is None:
        return state.z
    index = (rules.latent_steps - state.remaining).clamp(0, max(rules.latent_steps - 1, 0))
    return latent_inputs.gather(1, index[:, None, None].expand(-1, 1, latent_inputs.shape[2]))[:, 0].to(state.z.dtype)
