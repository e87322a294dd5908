"""The batched decode loop against one row at a time in plain Python, on a toy step in exact integer arithmetic."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.decoding import DecodeRules, DecodeState, SamplingSettings, decode

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
        self.states, self.table = states, table

    def embed(self, ids):
        return torch.tensor([embedding(t) for t in ids.tolist()], dtype=torch.float64)

    def forward(self, inputs, positions):
        rows = zip(self.states.long().tolist(), inputs.long().tolist(), positions.tolist(), strict=True)
        self.states = torch.tensor([recur(*row) for row in rows], dtype=torch.float64)
        return self.states.clone()

    def logits(self, hidden):
        return torch.tensor([scores_of(h, self.table) for h in hidden.long().tolist()], dtype=torch.float64)


@dataclass
class Row:
    """What the oracle says of one row: per emitted position its id and kind, and what was consumed next."""

    tokens: list
    latent: list
    hidden: list
    fed: list


def oracle(prompt, limit, table, steps, mode, penalty=1.0, force=False, given_latents=None):
    """Decode one row as the method is written, keeping `left`: latents that must still be consumed."""
    *ids, last = prompt
    hidden = [0, 0]
    for position, token in enumerate(prompt):
        hidden = recur(hidden, embedding(token), position)
    position, seen, counted, left = len(prompt), set(prompt), 0, 0
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
        row.latent.append(latent and not done)
        row.hidden.append(hidden)
        if done:
            return row
        inputs = embedding(token)
        if latent:
            inputs = hidden if given_latents is None else given_latents[steps - left]
        row.fed.append(inputs)
        consumed_token = None if latent else token
        hidden = recur(hidden, inputs, position)
        position += 1


def run(prompts, limits, table, steps, mode, penalty=1.0, force=False, given_latents=None):
    states, seen = [], torch.zeros(len(prompts), VOCABULARY, dtype=torch.bool)
    for n, prompt in enumerate(prompts):
        hidden = [0, 0]
        for position, token in enumerate(prompt):
            hidden = recur(hidden, embedding(token), position)
            seen[n, token] = True
        states.append(hidden)
    states = torch.tensor(states, dtype=torch.float64)
    state = DecodeState.after_prompt(
        torch.tensor([p[-1] for p in prompts]),
        states,
        torch.tensor([len(p) for p in prompts]),
        seen if penalty != 1.0 else None,
    )
    rules = DecodeRules(steps, START, LVR, PAD, torch.tensor([EOS, OTHER_EOS]), mode, torch.tensor(limits))
    latents = None if given_latents is None else torch.tensor(given_latents, dtype=torch.float64)
    return decode(
        ToyStep(states, table),
        state,
        rules,
        SamplingSettings(repetition_penalty=penalty),
        forced_first=torch.full((len(prompts),), START) if force else None,
        latent_inputs=latents,
        record=True,
    )


def compare(prompts, limits, table, steps, mode, penalty=1.0, force=False, given_latents=None):
    trace = run(prompts, limits, table, steps, mode, penalty, force, given_latents)
    tokens, latent = torch.stack(trace.tokens, 1).tolist(), torch.stack(trace.latent, 1).tolist()
    hidden = torch.stack(trace.hidden, 1).long().tolist()
    rows = [
        oracle(p, limit, table, steps, mode, penalty, force, None if given_latents is None else given_latents[n])
        for n, (p, limit) in enumerate(zip(prompts, limits))
    ]
    length = max(len(r.tokens) for r in rows)
    assert len(trace.tokens) == length
    for n, row in enumerate(rows):
        count = len(row.tokens)
        assert tokens[n] == row.tokens + [PAD] * (length - count)
        assert latent[n] == row.latent + [False] * (length - count)
        assert hidden[n][:count] == row.hidden
        assert [fed[n].long().tolist() for fed in trace.fed[: count - 1]] == row.fed
        assert [bool(flag[n]) for flag in trace.fed_latent[: count - 1]] == row.latent[: count - 1]
    if mode == "clean":
        picks = [any(t < len(r.tokens) and not r.latent[t] for r in rows) for t in range(length)]
        assert trace.lm_head_calls == sum(picks)
    else:
        assert trace.lm_head_calls == length
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
    given_latents = None
    if steps and data.draw(st.booleans()):
        number = st.integers(0, PRIME - 1)
        given_latents = [[[data.draw(number), data.draw(number)] for _ in range(steps)] for _ in prompts]
    compare(prompts, limits, table, steps, mode, penalty, force, given_latents)


class ScriptStep:
    """Wants the script's tokens one after another, whatever it is fed; hidden state t holds t in every channel."""

    def __init__(self, script):
        self.script, self.fed, self.positions = script, [], []

    def embed(self, ids):
        return -ids[:, None].double()

    def forward(self, inputs, positions):
        self.fed.append(inputs[0, 0].item())
        self.positions.append(positions[0].item())
        return torch.full_like(inputs, len(self.fed))

    def logits(self, hidden):
        wanted = self.script[int(hidden[0, 0])]
        return torch.nn.functional.one_hot(torch.tensor([wanted]), VOCABULARY).double()


def script(tokens, mode="clean", steps=3, limit=20, last=5, **options):
    step = ScriptStep(tokens)
    state = DecodeState.after_prompt(torch.tensor([last]), torch.zeros(1, 1).double(), torch.tensor([40]))
    rules = DecodeRules(steps, START, LVR, PAD, torch.tensor([EOS]), mode, torch.tensor([limit]))
    trace = decode(step, state, rules, SamplingSettings(), **options)
    return [int(t) for t in trace.tokens], step, trace


def test_exactly_n_latents_follow_the_start_token():
    for steps in (0, 1, 3):
        ghosts = [6] * steps
        tokens, step, trace = script([START, *ghosts, 7, EOS], steps=steps)
        assert tokens == [START, *[LVR] * steps, 7, EOS]
        # z1 is the state after the start token (1), z2 the state after z1 (2), ...
        assert step.fed == [-START, *range(1, steps + 1), -7]
        assert step.positions == list(range(40, 40 + len(step.fed)))
        assert trace.lm_head_calls == 3
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
        assert not bool(trace.latent[-1])


def test_a_forced_start():
    tokens, step, _ = script([7, 6, 6, 6, 8, EOS], forced_first=torch.tensor([START]))
    assert tokens == [START, LVR, LVR, LVR, 8, EOS] and step.fed[0] == -START


def test_rows_without_a_forced_start_pick_their_own():
    tokens, step, _ = script([7, START, 6, 6, 6, EOS], forced_first=torch.tensor([-1]))
    assert tokens == [7, START, LVR, LVR, LVR, EOS]


def test_given_latents_replace_the_rows_own():
    given_latents = torch.tensor([[[91.0], [92.0], [93.0]]])
    _, step, _ = script([START, 6, 6, 6, START, 6, 6, 6, EOS], latent_inputs=given_latents)
    assert step.fed == [-START, 91, 92, 93, -START, 91, 92, 93]


def test_finished_rows_stay_finished():
    table = [START, 3, 4, EOS]
    rows = compare([[3], [4, 4], [5, 3, 3]], [2, 9, 14], table, 3, "clean")
    assert len({len(r.tokens) for r in rows}) > 1


def test_callback_and_recording():
    heard = []
    tokens, _, trace = script(
        [START, 6, 6, 6, 7, EOS], on_token=lambda ids, latent: heard.append((int(ids), bool(latent)))
    )
    assert heard == [(START, False), (LVR, True), (LVR, True), (LVR, True), (7, False), (EOS, False)]
    assert not trace.hidden and not trace.fed


def test_bad_rules_are_named():
    for steps, mode, message in (
        (3, "both", "latent_mode: expected one of"),
        (-1, "clean", "expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            DecodeRules(steps, START, LVR, PAD, torch.tensor([EOS]), mode, torch.tensor([1]))
