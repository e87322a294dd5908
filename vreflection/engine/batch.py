"""The rows of a decoder on its device: filled with prompts, stepped, looked at, freed.

Shape suffixes: B rows, D width.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext

import torch

from ..decoding import (
    NOTHING,
    DecodeBuffers,
    DecodeProgram,
    DecodeRules,
    DecodeState,
    PickPlan,
    ProgramKey,
    Replacements,
    SamplingRows,
    VocabularyRows,
    advance,
    read_emission,
)
from ..decoding.tiers import choose_tier
from ..decoding.vocabulary import WORD
from ..errors import ConfigError
from .cache import KVCache
from .choice import choose_step
from .finite import BROKEN, NOT_FINITE, finite_rows, not_finite, picked_weights
from .grammar import GrammarState
from .memory import check_fit
from .prefill import Prefill
from .requests import Emitted, Generation, Logprobs, Request
from .rows import Look, Row
from .steps import eval_mode
from .weights import WeightWatch

COLUMN_STEP = 64  # cache lengths are multiples of this, so that few shapes ever occur
SMALLEST_EXTENT = {"cpu": 64, "cuda": 512}
# Steps whose emissions fit between two looks of the host.
RING = 64
LOOP_RING = 1024


class Batch:
    """Cache, buffers, step and tier of a decoder, and the requests that have a row.

    `rows` and `by_ticket` hold the running requests, `looks` the steps whose emissions have not been read, `events`
    what was emitted and not handed out yet (an exception must not lose it).
    """

    def __init__(
        self,
        model,
        processor,
        rules: DecodeRules,
        max_batch_size: int,
        max_length: int | None,
        step: str,
        tier: str,
        image_cache: int,
        share_prefixes: bool,
    ):
        self.model, self.processor = model, processor
        self.max_batch_size, self.max_length = max_batch_size, max_length
        config = model.config
        text = config.get_text_config()
        self.device, self.width = model.device, text.hidden_size
        self.dtype = model.get_input_embeddings().weight.dtype
        self.merge = config.vision_config.spatial_merge_size
        self.rules = rules
        self.tier = choose_tier(tier, self.device)
        heads = text.num_key_value_heads
        self.cache_shape = {
            "layers": text.num_hidden_layers,
            "heads": heads,
            "width": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            "dtype": self.dtype,
        }
        columns = round_up(max_length or 4 * COLUMN_STEP, COLUMN_STEP)
        check_fit(self.cache_shape, max_batch_size, columns, self.device)
        with torch.inference_mode():
            self.cache = KVCache(rows=max_batch_size, columns=columns, device=self.device, **self.cache_shape)
            ring = LOOP_RING if self.tier.name == "loop" else RING
            self.buffers = DecodeBuffers.allocate(max_batch_size, self.width, self.dtype, self.device, ring)
        self.step_name, self.step = step, choose_step(step, model, self.cache)
        self.weights = WeightWatch(model)
        self.prefill = Prefill(model, self.step, self.cache, image_cache, share_prefixes)
        self.programs: dict[ProgramKey, DecodeProgram] = {}
        self.rows: dict[int, Row] = {}
        self.by_ticket: dict[int, Row] = {}
        self.looks: deque[Look] = deque()
        self.events: list[Emitted] = []

    def settle(self) -> None:
        """Before the first request after a rest: changed parameters are noticed."""
        moved, different = self.weights.changed()
        if different:
            self.prefill.forget()
        if moved:
            self.forget_programs()
            try:
                self.step = self.prefill.step = choose_step(self.step_name, self.model, self.cache)
            except Exception:
                self.weights.places = []  # the old step must not run: try again next time
                raise

    def places(self, count: int) -> list[int]:
        """Free rows: low ones, so that steps stay narrow, and among those first the ones that hold no prompt."""
        bucket = next_power_of_2(max(len(self.rows) + count, *(slot + 1 for slot in self.rows), 1))
        free = [slot for slot in range(self.max_batch_size) if slot not in self.rows]
        return sorted(sorted(free, key=lambda slot: (slot >= bucket, slot in self.prefill.held, slot))[:count])

    def fill(self, taken: list[tuple[int, Request]]) -> None:
        slots, requests = self.places(len(taken)), [request for _, request in taken]
        try:
            self.make_room(max(len(request.prompt) for request in requests) + 1)
            with eval_mode(self.model):
                hidden = self.prefill.fill(slots, [request.prompt for request in requests])
            last = torch.stack([hidden[slot][0] for slot in slots])
            lengths = [self.visible_length(slot, request) for slot, request in zip(slots, requests)]
            grammars = [self.grammar_state(request) for request in requests]
            emissions = self.first_picks(slots, requests, last, [hidden[slot][1] for slot in slots], lengths, grammars)
        except BaseException:
            # The rows stay idle, and steps of their neighbours may write anywhere in them.
            for slot in slots:
                self.prefill.held.pop(slot, None)
            raise
        for (ticket, request), slot, number, z, grammar in zip(taken, slots, emissions, last, grammars):
            row = Row(ticket, slot, request, Generation(ticket, len(request.prompt)), grammar)
            if int(request.prompt.input_ids[-1]) == self.rules.lvr_start_id and request.latent_steps:
                row.in_span = 0
            self.rows[slot] = self.by_ticket[ticket] = row
            if request.return_latents:
                row.hidden.append(z)
            self.note(row, number, z)

    def grammar_state(self, request: Request) -> GrammarState | None:
        if request.grammar is None:
            return None
        rules, config = self.rules, self.model.config
        state = GrammarState(
            request.grammar,
            -(-self.vocabulary // WORD),
            rules.lvr_start_id,
            config.lvr_end_id,
            bool(request.latent_steps),
        )
        if request.latent_steps and int(request.prompt.input_ids[-1]) == rules.lvr_start_id:
            state.take(rules.lvr_start_id)
        return state

    def visible_length(self, slot: int, request: Request) -> int:
        """Columns of the filled prompt that later positions look at; hidden images leave the cache."""
        ids = request.prompt.input_ids
        if not request.hide_images:
            return len(ids)
        kept = (ids != self.model.config.image_token_id).nonzero()[:, 0].to(self.device)
        self.cache.keep_columns(slot, kept)
        self.prefill.held.pop(slot, None)  # no prompt of another row can begin with what is left
        return len(kept)

    def first_picks(
        self,
        slots,
        requests: list[Request],
        last_BD,
        positions: list[int],
        lengths: list[int],
        grammars: list[GrammarState | None],
    ) -> list[int]:
        """Set the rows' state, pick each one's first token; returns emissions."""
        device, state = self.device, self.buffers.state
        number = lambda values: torch.tensor(values, dtype=torch.int64, device=device)  # noqa: E731
        start = self.rules.lvr_start_id
        last = [int(request.prompt.input_ids[-1]) for request in requests]
        capacity = self.max_length or torch.iinfo(torch.int64).max
        fresh = DecodeState.idle(len(slots), self.width, self.dtype, device)
        fresh.latent_steps = number([r.latent_steps for r in requests])
        fresh.max_new_tokens = number([r.max_new_tokens for r in requests])
        fresh.capacity.fill_(capacity)
        for row, request in enumerate(requests):
            fresh.end_ids[row, : len(request.eos_token_ids)] = number(list(request.eos_token_ids))
        fresh.finished.fill_(False)
        fresh.last_token, fresh.z = number(last), last_BD
        fresh.position, fresh.length = number(positions), number(lengths)
        plan = pick_plan(requests)
        sampling = SamplingRows.of([r.sampling for r in requests], [r.seed for r in requests], device)
        if plan.penalty or state.seen is not None:
            self.make_penalty_buffer()
            fresh.seen = torch.stack([seen_ids(r.prompt.input_ids.to(device), state.seen.shape[1]) for r in requests])  # pyright: ignore
        if any(r.latents is not None for r in requests) or self.buffers.replacements is not None:
            self.set_replacements(slots, requests)
        if plan.adjust or state.vocabulary is not None:
            self.make_vocabulary_rows()
            fresh.vocabulary = VocabularyRows.allocate(len(slots), self.vocabulary, device)
            for row, (request, grammar) in enumerate(zip(requests, grammars)):
                fresh.vocabulary.set_row(row, request.sampling)
                if grammar is not None:
                    fresh.vocabulary.allow(row, grammar.allowed(), grammar.span_token)
        picked = self.step.pick(last_BD, ~fresh.finished, sampling, plan, fresh)
        forced = number([start if r.force_latent and id != start else -1 for r, id in zip(requests, last)])
        moved, emitted = advance(fresh, self.rules, last_BD, torch.where(forced >= 0, forced, picked))
        index = number(slots)
        limits = [getattr(moved, name) for name in DecodeState.LIMITS]
        targets = [
            *(getattr(state, name) for name in DecodeState.LIMITS),
            *state.tensors(),
            *self.buffers.sampling.tensors(),
        ]
        for target, value in zip(targets, [*limits, *moved.tensors(), *sampling.tensors()], strict=True):
            target.index_copy_(0, index, value.to(target.dtype))
        if state.vocabulary is not None and fresh.vocabulary is not None:
            fresh.vocabulary.count(moved.last_token, moved.counted)
            for target, value in zip(state.vocabulary.tensors(), fresh.vocabulary.tensors(), strict=True):
                target.index_copy_(0, index, value)
        weights = picked_weights(self.model.get_output_embeddings(), picked)
        sound = finite_rows(last_BD) & finite_rows(weights)
        return torch.where(sound, emitted, BROKEN).tolist()

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def make_vocabulary_rows(self) -> None:
        state = self.buffers.state
        if state.vocabulary is None:
            state.vocabulary = VocabularyRows.allocate(self.max_batch_size, self.vocabulary, self.device)
            self.forget_programs()

    def make_penalty_buffer(self) -> None:
        state = self.buffers.state
        if state.seen is None:
            state.seen = torch.zeros(self.max_batch_size, self.vocabulary, dtype=torch.bool, device=self.device)
            self.forget_programs()

    def set_replacements(self, slots: list[int], requests: list[Request]) -> None:
        """Put the requests' latents in place; rows without any replace nothing."""
        buffers, before = self.buffers, self.buffers.replacements
        steps = max((len(r.latents) * r.latent_steps for r in requests if r.latents is not None), default=1)
        if before is None or before.steps < steps:
            grown = Replacements.allocate(self.max_batch_size, steps, self.width, self.dtype, self.device)
            if before is not None:
                grown.states[:, : before.steps], grown.replaced[:, : before.steps] = before.states, before.replaced
                grown.period, grown.consumed = before.period, before.consumed
            buffers.replacements = grown
            self.forget_programs()
        assert buffers.replacements is not None
        for slot, request in zip(slots, requests):
            buffers.replacements.set_row(slot, request.latents or ())

    def make_room(self, columns: int) -> None:
        """Grow the cache to `columns`, where it may grow."""
        if columns <= self.cache.columns:
            return
        columns = round_up(max(columns, self.cache.columns * 3 // 2), COLUMN_STEP)
        check_fit(self.cache_shape, self.max_batch_size, columns, self.device, held=self.cache.nbytes)
        self.cache.grow(columns)
        self.forget_programs()

    def forget_programs(self) -> None:
        """Buffers moved: what was recorded on the old ones is void."""
        self.programs.clear()
        clear = getattr(self.tier, "clear", None)
        if clear is not None:
            clear()

    def launch(self, look_every: int) -> bool:
        """Send steps to the device; whether it went well."""
        rows = list(self.rows.values())
        try:
            free = min(row.free_steps() for row in rows) if self.rules.clean and not self.looks else 0
            calls, span = self.look_steps(look_every, rows), self.span_steps(free, rows)
            steps = span or calls
            columns = max(row.columns for row in rows) + steps
            if self.max_length is None:
                self.make_room(columns)
            program = self.program(rows, min(columns, self.cache.columns), span)
            self.buffers.rewind()
            with eval_mode(self.model) if self.step.name == "model" else nullcontext():
                self.tier.run(program, 1 if span else calls)
            for row in rows:
                row.launched += steps
                self.prefill.written(row.slot, row.columns)
            self.looks.append(self.look(rows, program, steps))
            return True
        except BaseException as error:
            self.fail(rows, error)
            if isinstance(error, Exception):
                return False
            raise

    def fail(self, rows: list[Row], error: BaseException) -> None:
        """A step failed somewhere: nobody knows how far the rows are, so they end here."""
        self.looks.clear()
        self.buffers.state.finished.fill_(True)
        for row in rows:
            self.finish(row, NOTHING, False, "error", error)
        self.prefill.forget()
        self.forget_programs()

    def look_steps(self, look_every: int, rows: list[Row]) -> int:
        """Steps until the host looks again: no more than the longest row can still take."""
        if constrained(rows):
            return 1  # what may come next depends on what came
        ring = self.buffers.emitted.shape[0]
        left = max(row.request.max_new_tokens - row.counted for row in rows)
        if self.tier.name == "loop":
            # Room for a span; whoever opens more is launched again.
            return max(1, min(ring, left + max(row.request.latent_steps for row in rows)))
        spans = any(row.request.latent_steps for row in rows)
        return max(1, min(look_every, ring) if spans else min(look_every, ring, left))

    def span_steps(self, free: int, rows: list[Row]) -> int:
        """Steps to take as one latent span, 0 for none. Recorded spans come in whole lengths only."""
        free = min(free, self.buffers.emitted.shape[0])
        if self.tier.name == "loop":
            return 0
        if self.tier.name == "eager":
            return free
        return free if free and all(row.in_span == 0 for row in rows) else 0

    def program(self, rows: list[Row], columns: int, span: int) -> DecodeProgram:
        wanted = max(row.slot for row in rows) + 1
        record = any(row.request.return_latents or row.request.logprobs is not None for row in rows)
        if record and self.buffers.hidden is None:
            ring = self.buffers.emitted.shape[0]
            shape = (ring, self.max_batch_size, self.width)
            self.buffers.hidden = torch.zeros(shape, dtype=self.dtype, device=self.device)
        key = ProgramKey(
            rows=self.bucket(wanted),
            extent=self.extent(columns),
            steps=span or 1,
            text=not span,
            plan=pick_plan([row.request for row in rows]),
            record=record,
            replace=any(row.request.latents is not None for row in rows),
        )
        if key not in self.programs:
            self.programs[key] = DecodeProgram(self.step, self.buffers, self.rules, key)
        return self.programs[key]

    def bucket(self, rows: int) -> int:
        """Rows a step computes: few different numbers where programs are recorded."""
        return rows if self.tier.name == "eager" else min(next_power_of_2(rows), self.max_batch_size)

    def extent(self, columns: int) -> int:
        """Cache columns a step looks at: few different numbers, so that few programs are recorded."""
        smallest = SMALLEST_EXTENT.get(self.device.type, 64)
        rounded = round_up(columns, smallest) if self.tier.name == "eager" else next_power_of_2(max(columns, smallest))
        return min(rounded, self.cache.columns)

    def look(self, rows: list[Row], program: DecodeProgram, steps: int) -> Look:
        sound = finite_rows(self.buffers.state.z)
        emitted = torch.cat([self.buffers.emitted[:steps], sound.long()[None]])
        hidden = None if program.hidden is None else program.hidden[:steps].clone()
        if self.device.type != "cuda":
            return Look(emitted, hidden, rows, steps)
        host = torch.empty(emitted.shape, dtype=emitted.dtype, pin_memory=True)
        host.copy_(emitted, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Look(host, hidden, rows, steps, ready)

    def read(self, look: Look) -> None:
        if look.ready is not None:
            look.ready.synchronize()
        *lines, sound = look.emitted.tolist()
        for row in look.rows:
            if not (row.done or sound[row.slot] or ended_by_choice(row, lines)):
                self.break_off(row)
            # A loop on the device may stop early.
            row.launched += sum(line[row.slot] != NOTHING for line in lines) - look.steps
        for number, line in enumerate(lines):
            for row in look.rows:
                if row.done or line[row.slot] == NOTHING:
                    continue
                hidden_D = None if look.hidden is None else look.hidden[number, row.slot]
                if row.request.return_latents and hidden_D is not None:
                    row.hidden.append(hidden_D)
                self.note(row, line[row.slot], hidden_D)

    def note(self, row: Row, number: int, hidden_D: torch.Tensor | None) -> None:
        """Take one emission, and the hidden state that it was picked from, into a row's answer."""
        if number == BROKEN:
            self.break_off(row)
            return
        token, latent, last = read_emission(number)
        row.take(token, latent, self.rules.lvr_start_id, self.rules.clean)
        entries = None
        if row.request.logprobs is not None and hidden_D is not None and not latent:
            entries = log_probabilities(self.step.logits(hidden_D[None])[0], token, row.request.logprobs)
        if row.request.logprobs is not None:
            row.answer.logprobs.append(entries)
        if last:
            self.finish(row, token, latent, row.why_it_ended(), logprobs=entries)
            return
        self.events.append(Emitted(row.ticket, token, latent, logprobs=entries))
        if row.grammar is not None and not latent:
            try:
                row.grammar.take(token)
                self.buffers.state.vocabulary.allow(row.slot, row.grammar.allowed(), row.grammar.span_token)  # pyright: ignore
            except ConfigError as error:
                self.buffers.state.finished[row.slot] = True
                self.finish(row, NOTHING, False, "error", error)

    def break_off(self, row: Row) -> None:
        """End a row whose arithmetic broke down; nothing of it is shared."""
        self.buffers.state.finished[row.slot] = True
        self.prefill.held.pop(row.slot, None)
        self.finish(row, NOTHING, False, NOT_FINITE, not_finite(len(row.answer.tokens)))

    def finish(
        self,
        row: Row,
        token: int,
        latent: bool,
        reason: str,
        error: BaseException | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Free a row and hand its answer out."""
        row.done = True
        answer = row.answer
        answer.finish_reason, answer.error = reason, error
        del self.rows[row.slot], self.by_ticket[row.ticket]
        # A finished row still writes, just past its end.
        self.prefill.written(row.slot, row.columns + 1)
        try:
            if self.processor is not None:
                shown = [t for t, hidden in zip(answer.tokens, answer.latent) if not hidden]
                answer.text = self.processor.decode(shown)
            if row.request.return_latents:
                row.collect(self.model.config.probe_offset)
        except Exception as own:
            answer.error = answer.error or own
        self.events.append(Emitted(row.ticket, token, latent, answer, logprobs))


def constrained(rows: list[Row]) -> bool:
    """Whether a grammar governs any row: the host then looks after every step that may need a token."""
    return any(row.grammar is not None for row in rows)


def pick_plan(requests: list[Request]) -> PickPlan:
    return PickPlan.of([r.sampling for r in requests], any(r.grammar is not None for r in requests))


def log_probabilities(logits_V: torch.Tensor, token: int, count: int) -> Logprobs:
    """Natural logarithms of the model's own probabilities: of `token`, then of the `count` likeliest."""
    values = logits_V.float().log_softmax(dim=0)
    top = values.topk(min(count, len(values)))
    return [(token, float(values[token])), *zip(top.indices.tolist(), top.values.tolist())]


def ended_by_choice(row: Row, lines: list[list[int]]) -> bool:
    """Whether a row picked an end-of-sequence id in these steps, which no broken row does."""
    picks = (read_emission(line[row.slot]) for line in lines if line[row.slot] != NOTHING)
    return any(last and not latent and token in row.request.eos_token_ids for token, latent, last in picks)


def seen_ids(input_ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Ids that occur in a prompt, `(V,)` bool."""
    return torch.zeros(vocabulary, dtype=torch.bool, device=input_ids.device).index_fill(0, input_ids, True)


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
