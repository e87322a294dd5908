"""The batched decode loop against one row at a time in plain Python, on a toy step in exact integer arithmetic."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.decoding import (
    NOTHING,
    DecodeBuffers,
    DecodeProgram,
    DecodeRules,
    DecodeState,
    PickPlan,
    ProgramKey,
    Replacements,
    SamplingRows,
    SamplingSettings,
    advance,
    pick_from_logits,
    read_emission,
)

PAD, EOS, OTHER_EOS, START, LVR, VOCABULARY = 0, 1, 2, 10, 11, 12
PRIME = 101


def embedding(token):
    return [(7 * token + 1) % PRIME, (11 * token + 2) % PRIME]


def recur(state, inputs, position):
    return [(3 * s + 5 * x + position) % PRIME for s, x in zip(state, inputs)]


def scores_of(hidden, table):
    """Logits that depend on the whole history; the favourite comes from the table."""
    a, b = hidden
    scores = [((a * (v + 3) + b * (v * v + 1)) % 13) / 2 - 2 + v / 1000 for v in range(VOCABULARY)]
    scores[table[(a + 3 * b) % len(table)]] += 6
    return scores


class ToyStep:
    def __init__(self, states, table):
        self.states, self.table, self.picks = states, table, []

    def embed(self, ids):
        return torch.tensor([embedding(t) for t in ids.tolist()], dtype=torch.float64)

    def forward(self, inputs, positions, length, extent):
        rows = zip(self.states.long().tolist(), inputs.long().tolist(), positions.tolist(), strict=True)
        self.states = torch.tensor([recur(*row) for row in rows], dtype=torch.float64)
        return self.states.clone()

    def logits(self, hidden):
        return torch.tensor([scores_of(h, self.table) for h in hidden.long().tolist()], dtype=torch.float64)

    def pick(self, hidden, needed, rows, plan, state):
        self.picks.append(needed.clone())
        return pick_from_logits(self.logits(hidden), rows, plan, state)


@dataclass
class Row:
    """What the oracle says of one row: per emitted position its id and kind, and what was consumed next."""

    tokens: list
    latent: list
    hidden: list
    fed: list


def oracle(prompt, limit, table, steps, mode, penalty=1.0, force=False, spans=None):
    """Decode one row as the method is written, keeping `left`: latents that must still be consumed.

    Args:
        spans: states to consume instead, per span a list of them, or None for the row's own.
    """
    *ids, last = prompt
    hidden = [0, 0]
    for position, token in enumerate(prompt):
        hidden = recur(hidden, embedding(token), position)
    position, seen, counted, left = len(prompt), set(prompt), 0, 0
    replacements = [state for span in spans or [] for state in span or [None] * steps]
    consumed_latents = 0
    consumed_token = last  # None after a latent
    row = Row([], [], [], [])
    while True:
        scores = [float(torch.tensor(s, dtype=torch.float32)) for s in scores_of(hidden, table)]
        scores = [(s * penalty if s < 0 else s / penalty) if v in seen else s for v, s in enumerate(scores)]
        pick = START if force and not row.tokens else max(range(VOCABULARY), key=lambda v: scores[v])
        if consumed_token is None:
            left -= 1
        elif consumed_token == START:
            left = steps
        latent = left > 0
        hidden_slot = mode == "clean" and latent
        token = LVR if hidden_slot else pick
        if not hidden_slot:
            counted += 1
            seen.add(token)
        done = counted >= limit or (token in (EOS, OTHER_EOS) and not latent)
        row.tokens.append(token)
        row.latent.append(latent)
        row.hidden.append(hidden)
        if done:
            return row
        inputs = embedding(token)
        if latent:
            replacement = replacements[consumed_latents % len(replacements)] if replacements else None
            consumed_latents += 1
            inputs = hidden if replacement is None else replacement
        row.fed.append(inputs)
        consumed_token = None if latent else token
        hidden = recur(hidden, inputs, position)
        position += 1


@dataclass
class Trace:
    """What a batch emitted, per row, until each row's end."""

    tokens: list
    latent: list
    hidden: list
    fed: list
    lasts: list


def drive(step, first, rules, sampling, forced=None, spans=None, ring=4):
    """Decode rows until all have finished, the way an engine does: a first pick, then programs of `ring` steps.

    Args:
        first: state after the prompt, its tensors `(B, ...)`. forced: first tokens, -1 for none.
        spans: per row the latents to consume, as `Replacements.set_row` takes them.
    """
    rows, width = first.z.shape
    settings, plan = SamplingRows.of([sampling] * rows, [0] * rows), PickPlan.of([sampling])
    picked = step.pick(first.z, ~first.finished, settings, plan, first)
    if forced is not None:
        picked = torch.where(forced >= 0, forced, picked)
    state, emitted = advance(first, rules, first.z, picked)
    buffers = DecodeBuffers.allocate(rows, width, first.z.dtype, "cpu", ring)
    buffers.state, buffers.sampling = replace(state, z=state.z.clone()), settings
    buffers.hidden = torch.zeros(ring, rows, width, dtype=first.z.dtype)
    if spans is not None:
        steps = max(len(row) * int(state.latent_steps.max()) for row in spans)
        buffers.replacements = Replacements.allocate(rows, max(steps, 1), width, first.z.dtype, "cpu")
        for row, states in enumerate(spans):
            buffers.replacements.set_row(row, states)
    key = ProgramKey(rows, 1, plan=plan, record=True, replace=spans is not None)
    program = DecodeProgram(step, buffers, rules, key)
    fed, plain = [], program.step.forward
    program.step.forward = lambda inputs, *rest: (fed.append(inputs.clone()), plain(inputs, *rest))[1]
    lines, hidden = [emitted], [first.z.clone()]
    while not bool(program.rows.finished.all()):
        buffers.rewind()
        buffers.budget.fill_(ring)
        for call in range(ring):
            program()
            assert bool(buffers.running) == (call + 1 < ring and not bool(program.rows.finished.all()))
        lines += buffers.emitted.clone()
        hidden += buffers.hidden.clone()
    trace = Trace([], [], [], [], [])
    for row in range(rows):
        numbers = [int(line[row]) for line in lines]
        count = numbers.index(NOTHING) if NOTHING in numbers else len(numbers)
        assert all(number == NOTHING for number in numbers[count:]), "a finished row spoke again"
        tokens, latent, last = zip(*(read_emission(number) for number in numbers[:count]))
        assert last == (*[False] * (count - 1), True)
        trace.tokens.append(list(tokens))
        trace.latent.append(list(latent))
        trace.hidden.append([h[row] for h in hidden[:count]])
        trace.fed.append([f[row] for f in fed[: count - 1]])
    return trace


def after_prompt(last, states, positions, limits, steps, ends, seen=None, capacity=None):
    state = DecodeState.idle(len(last), states.shape[1], states.dtype)
    state.finished.fill_(False)
    state.latent_steps.fill_(steps)
    state.max_new_tokens.copy_(torch.tensor(limits))
    state.end_ids[:, : len(ends)] = torch.tensor(ends)
    state.last_token.copy_(torch.tensor(last))
    state.position.copy_(torch.tensor(positions))
    state.length.copy_(torch.tensor(positions))
    state.capacity.fill_(10**6 if capacity is None else capacity)
    state.z, state.seen = states, seen
    return state


def run(prompts, limits, table, steps, mode, penalty=1.0, force=False, spans=None):
    states, seen = [], torch.zeros(len(prompts), VOCABULARY, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        hidden = [0, 0]
        for position, token in enumerate(prompt):
            hidden = recur(hidden, embedding(token), position)
            seen[n, token] = True
        states.append(hidden)
    states = torch.tensor(states, dtype=torch.float64)
    lengths = [len(p) for p in prompts]
    state = after_prompt(
        [p[-1] for p in prompts], states, lengths, limits, steps, [EOS, OTHER_EOS], seen if penalty != 1.0 else None
    )
    rules = DecodeRules(START, LVR, PAD, mode)
    tensor = lambda states: None if states is None else torch.tensor(states, dtype=torch.float64)  # noqa: E731
    latents = None if spans is None else [[tensor(states) for states in row] for row in spans]
    forced = torch.full((len(prompts),), START) if force else None
    step = ToyStep(states, table)
    return drive(step, state, rules, SamplingSettings(repetition_penalty=penalty), forced, latents), step


def compare(prompts, limits, table, steps, mode, penalty=1.0, force=False, spans=None):
    trace, step = run(prompts, limits, table, steps, mode, penalty, force, spans)
    rows = [
        oracle(p, limit, table, steps, mode, penalty, force, None if spans is None else spans[n])
        for n, (p, limit) in enumerate(zip(prompts, limits))
    ]
    for n, row in enumerate(rows):
        assert trace.tokens[n] == row.tokens
        assert trace.latent[n] == row.latent
        assert [h.long().tolist() for h in trace.hidden[n]] == row.hidden
        assert [f.long().tolist() for f in trace.fed[n]] == row.fed
        # What a step asks for: a token exactly where the row says one, nothing inside spans or after the end.
        needed = [bool(asked[n]) for asked in step.picks[1:]]
        count = len(row.tokens) - 1
        wanted = [mode == "parity" or not latent for latent in row.latent[1:]]
        assert needed[:count] == wanted and not any(needed[count:])
    return rows


# Tables rich in starts and ends, so that spans open, reopen and are cut all the time.
tables = st.lists(st.sampled_from([EOS, OTHER_EOS, 3, 4, 5, 6, 7, START, START, START]), min_size=4, max_size=17)
prompts = st.lists(st.lists(st.sampled_from([3, 4, 5, 8, 9, START]), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), table=tables, prompts=prompts, steps=st.sampled_from([0, 1, 3]))
@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_every_row_of_a_batch_decodes_as_it_would_alone(mode, data, table, prompts, steps):
    limits = data.draw(st.lists(st.integers(1, 14), min_size=len(prompts), max_size=len(prompts)))
    penalty = data.draw(st.sampled_from([1.0, 1.0, 1.4, 0.7]))
    force = data.draw(st.booleans())
    spans = None
    if steps and data.draw(st.booleans()):
        number = st.integers(0, PRIME - 1)
        states = st.lists(st.tuples(number, number).map(list), min_size=steps, max_size=steps)
        spans = [data.draw(st.lists(st.none() | states, max_size=3)) for _ in prompts]
    compare(prompts, limits, table, steps, mode, penalty, force, spans)


class ScriptStep:
    """Wants the script's tokens one after another, whatever it is fed; hidden state t holds t in every channel."""

    def __init__(self, script):
        self.script, self.fed, self.positions, self.lengths = script, [], [], []

    def embed(self, ids):
        return -ids[:, None].double()

    def forward(self, inputs, positions, length, extent):
        self.fed.append(inputs[0, 0].item())
        self.positions.append(positions[0].item())
        self.lengths.append(length[0].item())
        return torch.full_like(inputs, len(self.fed))

    def pick(self, hidden, needed, rows, plan, state):
        wanted = self.script[min(int(hidden[0, 0]), len(self.script) - 1)]
        return torch.tensor([wanted])


def script(tokens, mode="clean", steps=3, limit=20, last=5, forced=None, spans=None, capacity=None):
    step = ScriptStep(tokens)
    state = after_prompt([last], torch.zeros(1, 1).double(), [40], [limit], steps, [EOS], capacity=capacity)
    trace = drive(step, state, DecodeRules(START, LVR, PAD, mode), SamplingSettings(), forced, spans, ring=1)
    return trace.tokens[0], step, trace


def test_exactly_n_latents_follow_the_start_token():
    for steps in (0, 1, 3):
        ghosts = [6] * steps
        tokens, step, trace = script([START, *ghosts, 7, EOS], steps=steps)
        assert tokens == [START, *[LVR] * steps, 7, EOS]
        # z1 is the state after the start token (1), z2 the state after z1 (2), ...
        assert step.fed == [-START, *range(1, steps + 1), -7]
        assert step.positions == list(range(40, 40 + len(step.fed)))
        assert step.lengths == step.positions and trace.latent == [[False, *[True] * steps, False, False]]
        assert script([START, *ghosts, 7, EOS], "parity", steps)[0] == [START, *ghosts, 7, EOS]


def test_a_start_token_ending_the_prompt_opens_a_span():
    tokens, step, _ = script([6, 6, 6, 7, EOS], last=START)
    assert tokens == [LVR, LVR, LVR, 7, EOS] and step.fed == [0, 1, 2, -7]


def test_ends_and_starts_inside_a_span_are_ignored():
    for ghosts in ([EOS, EOS, EOS], [START, START, START], [6, EOS, START], [START, 6, EOS]):
        assert script([START, *ghosts, 7, EOS])[0] == [START, LVR, LVR, LVR, 7, EOS]
        tokens, step, _ = script([START, *ghosts, 7, EOS], "parity")
        assert tokens == [START, *ghosts, 7, EOS] and step.fed == [-START, 1, 2, 3, -7]


def test_an_end_right_after_the_last_latent_ends():
    for mode in ("clean", "parity"):
        assert script([START, 6, 6, 6, EOS, 8], mode)[0][-1] == EOS


def test_a_second_span():
    tokens, step, _ = script([START, 6, 6, 6, START, 6, 6, 6, 7, EOS])
    assert tokens == [START, LVR, LVR, LVR, START, LVR, LVR, LVR, 7, EOS]
    assert step.fed == [-START, 1, 2, 3, -START, 5, 6, 7, -7]


def test_limits():
    endless = [START, 6, 6, 6, 7, 8, 9, 9]
    assert script(endless, limit=1)[0] == [START]
    assert script(endless, limit=2)[0] == [START, LVR, LVR, LVR, 7]  # latents do not count
    assert script(endless, limit=3)[0] == [START, LVR, LVR, LVR, 7, 8]
    for limit in (1, 2, 3, 4, 5, 6):  # ghosts do, and may be cut off
        tokens, step, trace = script(endless, "parity", limit=limit)
        assert tokens == endless[:limit] and len(step.fed) == limit - 1
        assert trace.latent[0][-1] == (limit in (2, 3, 4))


def test_a_forced_start():
    tokens, step, _ = script([7, 6, 6, 6, 8, EOS], forced=torch.tensor([START]))
    assert tokens == [START, LVR, LVR, LVR, 8, EOS] and step.fed[0] == -START


def test_rows_without_a_forced_start_pick_their_own():
    tokens, step, _ = script([7, START, 6, 6, 6, EOS], forced=torch.tensor([-1]))
    assert tokens == [7, START, LVR, LVR, LVR, EOS]


def test_latents_of_every_span_are_replaced():
    states = torch.tensor([[91.0], [92.0], [93.0]]).double()
    _, step, _ = script([START, 6, 6, 6, START, 6, 6, 6, EOS], spans=[[states]])
    assert step.fed == [-START, 91, 92, 93, -START, 91, 92, 93]


@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_spans_are_replaced_one_by_one_and_from_the_first_again(mode):
    first, third = torch.tensor([[91.0], [92.0]]).double(), torch.tensor([[95.0], [96.0]]).double()
    opened = [START, 6, 6, START, 6, 6, START, 6, 6, START, 6, 6, EOS]
    _, step, _ = script(opened, mode, steps=2, spans=[[first, None, third]])
    # Hidden state t holds t: the second span consumes the row's own.
    assert step.fed == [-START, 91, 92, -START, 4, 5, -START, 95, 96, -START, 91, 92]


def test_finished_rows_stay_finished():
    table = [START, 3, 4, EOS]
    rows = compare([[3], [4, 4], [5, 3, 3]], [2, 9, 14], table, 3, "clean")
    assert len({len(r.tokens) for r in rows}) > 1


def test_the_end_of_the_cache_ends_a_row():
    """A full cache still gives the token that its last key speaks for; inside a span too."""
    endless = [START, 6, 6, 6, 7, 8, 9, 9, 9, 9]
    for room in range(8):
        tokens, step, trace = script(endless, capacity=40 + room)
        assert tokens == [START, LVR, LVR, LVR, 7, 8, 9, 9][: room + 1] and len(step.fed) == room
        assert trace.latent[0][-1] == (room in (1, 2, 3))


def test_a_latent_span_equals_as_many_single_steps():
    """A program without picks, of several steps, emits and leaves behind the same."""
    rules = DecodeRules(START, LVR, PAD)
    ends = []
    for spans in (False, True):
        step = ScriptStep([START, 6, 6, 6, 7, 8, EOS])
        state = after_prompt([START], torch.zeros(1, 1).double(), [40], [20], 3, [EOS])
        buffers = DecodeBuffers.allocate(1, 1, torch.float64, "cpu", 8)
        buffers.state, buffers.sampling = state, SamplingRows.greedy(1)
        buffers.budget.fill_(8)
        if spans:
            DecodeProgram(step, buffers, rules, ProgramKey(1, 1, steps=3, text=False))()
        else:
            for _ in range(3):
                DecodeProgram(step, buffers, rules, ProgramKey(1, 1))()
        DecodeProgram(step, buffers, rules, ProgramKey(1, 1))()
        assert [read_emission(int(n))[0] for n in buffers.emitted[:4, 0]] == [LVR, LVR, LVR, 7]
        assert int(buffers.budget) == 4 and int(buffers.cursor) == 4
        ends.append([*buffers.state.tensors(), buffers.emitted, torch.tensor(step.fed)])
    for single, span in zip(*ends):
        assert torch.equal(single, span)


def test_bad_rules_are_named():
    with pytest.raises(ValueError, match="latent_mode: expected one of .*, got 'both'"):
        DecodeRules(START, LVR, PAD, "both")
