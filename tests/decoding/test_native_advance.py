"""The state machine's compiled operators against its definition in `state.py`: every number the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.decoding import DecodeBuffers, DecodeProgram, DecodeRules, DecodeState, PickPlan, ProgramKey
from vreflection.decoding.program import NativeMoves
from vreflection.decoding.state import MAX_END_IDS
from vreflection.ops import dispatch

pytestmark = pytest.mark.skipif(bool(dispatch.CPP_MISSING), reason=dispatch.CPP_MISSING)
START, LVR, PAD, VOCABULARY, WIDTH, RING = 5, 6, 0, 9, 3, 6


class Scripted:
    """A step that says what it is told to."""

    def __init__(self, hidden, picked):
        self.hidden, self.picked, self.turn, self.needed = hidden, picked, -1, []

    def embed(self, ids):
        return ids[:, None] * torch.ones(WIDTH)

    def forward(self, inputs, position, length, extent):
        self.turn += 1
        return (self.hidden[self.turn, : len(inputs)] + inputs).to(self.hidden.dtype)

    def pick(self, hidden, needed, rows, plan, state):
        self.needed.append(needed.clone())
        return self.picked[self.turn, : len(hidden)].clone()


def random_buffers(rows, seed, record, dtype):
    """States that a decoder may be in and others that it never is in."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda high, low=0: torch.randint(low, high, (rows,), generator=generator)  # noqa: E731
    flag = lambda: torch.rand(rows, generator=generator) < 0.4  # noqa: E731
    buffers = DecodeBuffers.allocate(rows, WIDTH, dtype, "cpu", RING)
    ends = torch.randint(-1, VOCABULARY, (rows, MAX_END_IDS), generator=generator)
    seen = torch.rand(rows, VOCABULARY, generator=generator) < 0.3
    buffers.state = DecodeState(
        number(4), number(9), number(9), ends.where(torch.rand(ends.shape, generator=generator) < 0.2, -1),
        flag(), number(5, -1), flag(), number(VOCABULARY), torch.rand(rows, WIDTH, generator=generator).to(dtype),
        number(9), number(9), number(9), seen,
    )  # fmt: skip
    if record:
        buffers.hidden = torch.zeros(RING, rows, WIDTH, dtype=dtype)
    buffers.budget.fill_(4)
    return buffers


@given(
    rows=st.integers(1, 7), unused=st.integers(0, 2), seed=st.integers(0, 2**31), steps=st.integers(1, RING),
    mode=st.sampled_from(["clean", "parity"]), text=st.booleans(), penalty=st.booleans(), record=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), inner=st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_both_forms_take_every_state_to_the_same_one(
    rows, unused, seed, steps, mode, text, penalty, record, dtype, inner
):
    rules = DecodeRules(START, LVR, PAD, mode)
    held = random_buffers(rows + unused, seed, record, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.rand(RING, rows, WIDTH, generator=generator).to(dtype)
    picked = torch.randint(VOCABULARY, (RING, rows), generator=generator)
    # Ids that matter come often.
    picked[torch.rand(picked.shape, generator=generator) < 0.3] = START
    key = ProgramKey(rows, 16, steps=steps, text=text, plan=PickPlan(penalty=penalty), record=record)
    results = []
    for native in (False, True):
        buffers, step = copy.deepcopy(held), Scripted(hidden, picked)
        program = DecodeProgram(step, buffers, rules, key, native=native)
        assert isinstance(program.native, NativeMoves) == native
        with torch.inference_mode(inner):
            program()
        recorded = [] if buffers.hidden is None else [buffers.hidden]
        limits = [buffers.state.latent_steps, buffers.state.max_new_tokens, buffers.state.capacity]
        results.append(
            [*buffers.state.tensors(), *limits, buffers.emitted, buffers.cursor, buffers.budget, buffers.running]
            + [*recorded, *step.needed]
        )
    for pure, native in zip(*results, strict=True):
        assert pure.dtype == native.dtype and torch.equal(pure, native)


def test_the_cpu_takes_the_compiled_form_and_a_trace_the_pure_one():
    rules = DecodeRules(START, LVR, PAD)
    step = Scripted(torch.rand(RING, 2, WIDTH), torch.zeros(RING, 2, dtype=torch.long))
    program = DecodeProgram(step, random_buffers(2, 0, False, torch.float32), rules, ProgramKey(2, 16))
    assert program.native is not None
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    torch.compile(program, backend=keep, fullgraph=True)()
    assert "decode_advance" not in str(graphs[0]) and "vreflection" not in str(graphs[0])


def test_states_out_of_bounds_are_refused_and_left_alone():
    rules = DecodeRules(START, LVR, PAD)
    buffers = random_buffers(2, 0, False, torch.float32)
    buffers.state.finished.fill_(False)
    buffers.state.mode.fill_(False)
    picked = torch.full((RING, 2), VOCABULARY)
    key = ProgramKey(2, 16, plan=PickPlan(penalty=True))
    program = DecodeProgram(Scripted(torch.rand(RING, 2, WIDTH), picked), buffers, rules, key)
    with pytest.raises(RuntimeError, match=r"seen: expected ids in \[0, 9\), got 9"):
        program()
    assert int(buffers.cursor) == 0 and int(buffers.budget) == 4 and not buffers.state.finished.any()
    picked.zero_()
    buffers.cursor.fill_(RING)
    with pytest.raises(RuntimeError, match=r"cursor: expected a line in \[0, 6\), got 6"):
        program()


def test_the_operators_pass_opcheck():
    buffers = random_buffers(3, 1, True, torch.float32)
    key = ProgramKey(3, 16, plan=PickPlan(penalty=True), record=True)
    native = DecodeProgram(None, buffers, DecodeRules(START, LVR, PAD), key).native
    operators, checks = torch.ops.vreflection, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.decode_plan.default, native.plan_arguments, test_utils=checks)
    hidden, picked = torch.rand(3, WIDTH), torch.tensor([1, 2, 3])
    arguments = (hidden, picked, *native.advance_arguments)
    torch.library.opcheck(operators.decode_advance.default, arguments, test_utils=checks)
