"""A request in its place in the batch, and the steps it has taken.

Shape suffixes: B rows, N latents per span, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .grammar import GrammarState
from .requests import Generation, Request


@dataclass
class Row:
    """A request in its place in the batch."""

    ticket: int
    slot: int
    request: Request
    answer: Generation
    grammar: GrammarState | None = None
    launched: int = 0  # steps sent to the device, an upper bound of those taken
    in_span: int | None = None  # latents emitted in the open span; 0 right after its start token
    counted: int = 0  # tokens that count against max_new_tokens
    hidden: list[torch.Tensor] = field(default_factory=list)
    done: bool = False

    @property
    def columns(self) -> int:
        return self.answer.prompt_length + self.launched

    def free_steps(self) -> int:
        """Coming steps whose output needs no token."""
        return 0 if self.in_span is None else self.request.latent_steps - self.in_span

    def take(self, token: int, latent: bool, start_id: int, clean: bool) -> None:
        """One more emitted position."""
        self.counted += not (clean and latent)
        self.answer.tokens.append(token)
        self.answer.latent.append(latent)
        if latent:
            self.in_span = (self.in_span or 0) + 1
        else:
            self.in_span = 0 if token == start_id and self.request.latent_steps else None

    def replacement(self, span: int) -> torch.Tensor | None:
        """What the request has a span consume, `(N, D)`; None for the model's own states."""
        spans = self.request.latents
        return None if spans is None else spans[span % len(spans)]

    def why_it_ended(self) -> str:
        if self.answer.tokens[-1] in self.request.eos_token_ids and not self.answer.latent[-1]:
            return "eos"
        return "max_new_tokens" if self.counted >= self.request.max_new_tokens else "max_length"

    def collect(self, probe_offset: int) -> None:
        """Put the recorded hidden states into the answer: all, those fed back, and those the student starts from.

        Args:
            probe_offset: of the checkpoint: 0 for the states that came out at the slots, -1 for those before them.
        """
        if not self.hidden:
            return
        answer, steps = self.answer, self.request.latent_steps
        hidden = torch.stack(self.hidden)
        # The input that step t consumed was the latent that the emission before it announced.
        fed = torch.tensor([False, *answer.latent[:-1]], device=hidden.device)
        whole = int(fed.sum()) // steps * steps if steps else 0
        latents, at_slots = hidden[fed.roll(-1)][:whole], hidden[fed][:whole]
        probes = at_slots if probe_offset == 0 else latents
        shape = (-1, max(steps, 1), hidden.shape[1])
        with torch.inference_mode(False):
            consumed_SND = latents.clone().view(shape)
            for span in range(len(consumed_SND)):
                replacement = self.replacement(span)
                if replacement is not None:
                    consumed_SND[span] = replacement.detach()
            answer.latents, answer.probes = consumed_SND, probes.clone().view(shape)
            answer.step_hidden = hidden.clone()


@dataclass
class Look:
    """Steps sent to the device whose emissions the host has not read yet."""

    emitted: torch.Tensor
    hidden: torch.Tensor | None
    rows: list[Row]
    steps: int
    ready: Any = None  # CUDA event
