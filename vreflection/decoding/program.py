"""One decode step, or a whole latent span, as a call over tensors of fixed address.

Shape suffixes: B rows, N latents per span, M latents that a row replaces, D width, V vocabulary, R steps between two
looks of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch

from ..ops import dispatch
from .sampling import PickPlan, SamplingRows, pick_tokens
from .state import NOTHING, DecodeRules, DecodeState, advance, plan_transition


class Step(Protocol):
    """A decoder on a batch of rows; owns the key/value cache. Row b of every argument is row b of the cache."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`(B,)` ids to `(B, D)` input embeddings."""
        ...

    def forward(
        self, inputs_BD: torch.Tensor, position: torch.Tensor, length: torch.Tensor, extent: int
    ) -> torch.Tensor:
        """Consume one input per row.

        Args:
            position: `(B,)` rope position. length: `(B,)` keys in the row's cache; the new key goes there.
            extent: cache columns to look at, more than every length.

        Returns:
            last hidden states `(B, D)`, after the final norm.
        """
        ...

    def pick(
        self, hidden_BD: torch.Tensor, needed: torch.Tensor, rows: SamplingRows, plan: PickPlan, state: DecodeState
    ) -> torch.Tensor:
        """Token ids `(B,)`; where `needed` `(B,)` is False any id will do."""
        ...


def pick_from_logits(logits_BV, rows: SamplingRows, plan: PickPlan, state: DecodeState) -> torch.Tensor:
    seen = state.seen if plan.penalty else None
    return pick_tokens(logits_BV, rows, plan, state.counted, seen, state.vocabulary, state.end_ids)


@dataclass
class Replacements:
    """States that rows consume inside spans instead of their own last hidden state.

    Row b's latent number i, counted over all its spans, consumes `states[b, i % period[b]]` where
    `replaced[b, i % period[b]]`, else the row's own state.

    Attributes:
        states: `(B, M, D)`. replaced: `(B, M)` bool. period: `(B,)` int64, at least 1, at most M.
        consumed: `(B,)` int64, latents that the row has consumed.
    """

    states: torch.Tensor
    replaced: torch.Tensor
    period: torch.Tensor
    consumed: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, steps: int, width: int, dtype: torch.dtype, device: torch.device | str):
        """Rows that replace nothing."""
        number = lambda value: torch.full((rows,), value, dtype=torch.int64, device=device)  # noqa: E731
        return cls(
            torch.zeros(rows, steps, width, dtype=dtype, device=device),
            torch.zeros(rows, steps, dtype=torch.bool, device=device), number(1), number(0),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.states.shape[1]

    def narrow(self, rows: int) -> Replacements:
        """Views of the first rows."""
        return Replacements(*(getattr(self, f.name)[:rows] for f in fields(self)))

    def set_row(self, row: int, spans: Sequence[torch.Tensor | None]) -> None:
        """For a new request in a row: `(N, D)` states per span, None for the row's own; no spans replace nothing."""
        self.consumed[row], self.period[row], self.replaced[row] = 0, 1, False
        for number, states_ND in enumerate(spans):
            if states_ND is not None:
                place = slice(number * len(states_ND), (number + 1) * len(states_ND))
                self.states[row, place] = states_ND.to(self.states)
                self.replaced[row, place] = True
                self.period[row] = len(spans) * len(states_ND)

    def choose(self, mode: torch.Tensor, own_BD: torch.Tensor) -> torch.Tensor:
        """What the rows in `mode` `(B,)` consume next, `(B, D)`; counts it as consumed."""
        index = self.consumed % self.period
        self.consumed.add_(mode)
        states_BD = self.states.gather(1, index[:, None, None].expand(-1, 1, own_BD.shape[1]))[:, 0]
        return torch.where(self.replaced.gather(1, index[:, None]), states_BD, own_BD)


@dataclass
class DecodeBuffers:
    """Everything a step reads or writes besides weights and cache; allocated once.

    Attributes:
        emitted: `(R, B)` emissions of the steps since the host last looked. hidden: `(R, B, D)` their hidden states,
            when recorded. cursor: `(1,)` the next line of both.
        running, budget: see `tiers.Program`.
        replacements: once any request brought latents of its own.
    """

    state: DecodeState
    sampling: SamplingRows
    emitted: torch.Tensor
    cursor: torch.Tensor
    running: torch.Tensor
    budget: torch.Tensor
    hidden: torch.Tensor | None = None
    replacements: Replacements | None = None

    @classmethod
    def allocate(cls, rows: int, width: int, dtype: torch.dtype, device: torch.device | str, ring: int):
        one = lambda dtype: torch.zeros(1, dtype=dtype, device=device)  # noqa: E731
        return cls(
            state=DecodeState.idle(rows, width, dtype, device),
            sampling=SamplingRows.greedy(rows, device),
            emitted=torch.full((ring, rows), NOTHING, dtype=torch.int64, device=device),
            cursor=one(torch.int64),
            running=one(torch.int32),
            budget=one(torch.int64),
        )

    def rewind(self) -> None:
        """Before the next steps: nothing emitted."""
        self.emitted.fill_(NOTHING)
        self.cursor.zero_()


@dataclass(frozen=True)
class ProgramKey:
    """What makes one recorded program differ from another.

    Attributes:
        rows: the first rows of the buffers. extent: cache columns. steps: decode steps per call.
        text: whether any row may need a token; a program without is a latent span and never touches the vocabulary.
        plan, record, replace: what at least one row asks for.
    """

    rows: int
    extent: int
    steps: int = 1
    text: bool = True
    plan: PickPlan = field(default_factory=PickPlan)
    record: bool = False
    replace: bool = False


class DecodeProgram:
    """Callable: `key.steps` decode steps of the first `key.rows` rows. No host synchronisation, no growing tensor.

    Args:
        native: move the rows by the compiled operators rather than by `plan_transition` and `advance`, with the same
            result. Default: on the CPU, where they are there.
    """

    def __init__(
        self, step: Step, buffers: DecodeBuffers, rules: DecodeRules, key: ProgramKey, native: bool | None = None
    ):
        self.step, self.buffers, self.rules, self.key = step, buffers, rules, key
        self.steps = key.steps
        self.running, self.budget = buffers.running, buffers.budget
        self.rows = buffers.state.narrow(key.rows)
        if not key.plan.penalty:
            self.rows.seen = None
        if not key.plan.adjust:
            self.rows.vocabulary = None
        self.changing = self.rows.tensors()
        self.sampling = buffers.sampling.narrow(key.rows)
        self.emitted = buffers.emitted[:, : key.rows]
        self.hidden = None if buffers.hidden is None or not key.record else buffers.hidden[:, : key.rows]
        replaces = key.replace and buffers.replacements is not None
        self.replacements = buffers.replacements.narrow(key.rows) if replaces else None  # pyright: ignore
        self.nobody = torch.zeros(key.rows, dtype=torch.int64, device=buffers.cursor.device)
        if native is None:
            native = buffers.cursor.device.type == "cpu" and not dispatch.CPP_MISSING
        self.native = NativeMoves(self) if native else None

    @property
    def state(self) -> list[torch.Tensor]:
        """All that a call changes, the key/value cache apart."""
        recorded = [] if self.hidden is None else [self.hidden]
        counted = [] if self.replacements is None else [self.replacements.consumed]
        if self.rows.vocabulary is not None:
            counted.append(self.rows.vocabulary.counts)
        return [*self.changing, self.emitted, self.buffers.cursor, self.running, self.budget, *recorded, *counted]

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.once()

    def once(self) -> None:
        rows = self.rows
        inputs = torch.where(rows.mode[:, None], self.latent_inputs(), self.step.embed(rows.last_token))
        hidden = self.step.forward(inputs, rows.position, rows.length, self.key.extent)
        moves = self if self.native is None or torch.compiler.is_compiling() else self.native
        transition, needed = moves.plan()
        if self.key.text:
            picked = self.step.pick(hidden, needed, self.sampling, self.key.plan, rows)
        else:
            picked = self.nobody
        if rows.vocabulary is None:
            moves.advance(hidden, picked, transition)
        else:
            before = rows.counted.clone()
            moves.advance(hidden, picked, transition)
            rows.vocabulary.count(rows.last_token, rows.counted - before)

    def plan(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Count the input that was consumed: the transition, and which rows need a token `(B,)`."""
        rows = self.rows
        live = ~rows.finished
        # A finished row stands still: its place in the cache stays inside.
        rows.length.add_(live)
        rows.position.add_(live)
        transition = plan_transition(rows, self.rules)
        return transition, live & ~transition[0] if self.rules.clean else live

    def advance(self, hidden: torch.Tensor, picked: torch.Tensor, transition) -> None:
        """Take the step's output into the buffers."""
        moved, emitted = advance(self.rows, self.rules, hidden, picked, transition)
        self.emitted.index_copy_(0, self.buffers.cursor, emitted[None])
        if self.hidden is not None:
            self.hidden.index_copy_(0, self.buffers.cursor, hidden[None])
        self.buffers.cursor.add_(1)
        torch._foreach_copy_(self.changing, moved.tensors())
        self.budget.sub_(1)
        torch.mul(self.budget > 0, ~moved.finished.all(), out=self.running)

    def latent_inputs(self) -> torch.Tensor:
        """The rows' own last hidden states, or what replaces them."""
        own = self.rows.z
        return own if self.replacements is None else self.replacements.choose(self.rows.mode, own)


class NativeMoves:
    """`DecodeProgram.plan` and `advance` on the CPU, one compiled operator each: `csrc/decode_state.cpp`."""

    def __init__(self, program: DecodeProgram):
        rows, rules, buffers = program.rows, program.rules, program.buffers
        mode, remaining = torch.zeros_like(rows.mode), torch.zeros_like(rows.remaining)
        self.transition, self.needed = (mode, remaining), torch.zeros_like(mode)
        self.plan_arguments = (
            rows.last_token, rows.mode, rows.remaining, rows.finished, rows.latent_steps, rules.lvr_start_id,
            rules.clean, rows.position, rows.length, mode, remaining, self.needed,
        )  # fmt: skip
        self.advance_arguments = (
            mode, remaining, rows.max_new_tokens, rows.capacity, rows.end_ids, rows.length,
            rules.lvr_id, rules.pad_id, rules.clean,
            rows.mode, rows.remaining, rows.finished, rows.last_token, rows.z, rows.counted, rows.seen,
            program.emitted, program.hidden, buffers.cursor, program.budget, program.running,
        )  # fmt: skip

    def plan(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        torch.ops.vreflection.decode_plan.default(*self.plan_arguments)
        return self.transition, self.needed

    def advance(self, hidden: torch.Tensor, picked: torch.Tensor, transition) -> None:
        torch.ops.vreflection.decode_advance.default(hidden, picked, *self.advance_arguments)
