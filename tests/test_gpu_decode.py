"""Runner tiers on a real GPU; the engine: tests/engine/test_gpu_engine.py. Run with `pytest -m gpu`."""

import subprocess
import sys

import pytest
import torch

from vreflection.decoding.tiers import EagerTier, GraphTier, LoopTier, available_tiers

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, WIDTH, MODULUS = 4, 64, 97
MIB = 2**20


class Recurrence:
    """Rows of small whole numbers through a matrix product, until `goal` steps are done; exact in float32 and TF32.

    Like a decode step, it writes what each step gave to a ring, and stands still once it is finished.
    """

    def __init__(self, goal=40, steps=1, key="recurrence", scratch=0):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randint(0, MODULUS, size, generator=generator).float().cuda()  # noqa: E731
        self.weight, self.rows = draw(WIDTH, WIDTH), draw(ROWS, WIDTH)
        self.ring = torch.zeros(goal + 1, ROWS, dtype=torch.int64, device="cuda")
        self.cursor = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.running = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.budget = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.goal, self.steps, self.key, self.scratch = goal, steps, key, scratch

    @property
    def state(self):
        return [self.rows, self.ring, self.cursor]

    def __call__(self):
        for _ in range(self.steps):
            live = self.cursor < self.goal
            after = (self.rows @ self.weight) % MODULUS
            self.ring.index_copy_(0, self.cursor, after.argmax(dim=1)[None])
            self.rows.copy_(torch.where(live, after, self.rows))
            self.cursor.add_(live)
            self.budget.sub_(1)
            self.running.copy_((self.cursor < self.goal) & (self.budget > 0))
        if self.scratch:
            self.rows.add_(torch.empty(self.scratch, dtype=torch.int8, device="cuda").zero_()[:WIDTH])

    def result(self):
        return [t.cpu() for t in (self.rows, self.ring[: self.goal], self.cursor, self.running)]


if triton is not None:

    @triton.jit
    def _count_kernel(value, running, budget, goal):
        counted = tl.load(value) + 1
        left = tl.load(budget) - 1
        tl.store(value, counted)
        tl.store(budget, left)
        tl.store(running, ((counted < goal) & (left > 0)).to(tl.int32))


class TritonCounter:
    key, steps, goal = "count", 1, 1000

    def __init__(self):
        self.value, self.budget = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
        self.running = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.state = [self.value]

    def __call__(self):
        _count_kernel[(1,)](self.value, self.running, self.budget, self.goal)


@pytest.fixture(params=["graph", "loop"])
def tier(request):
    reason = available_tiers("cuda")[request.param]
    if reason:
        pytest.skip(reason)
    return {"graph": GraphTier, "loop": LoopTier}[request.param]()


@pytest.fixture
def loop():
    reason = available_tiers("cuda")["loop"]
    if reason:
        pytest.skip(reason)
    return LoopTier()


def free_bytes():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


# Runner tiers


@pytest.mark.parametrize(("goal", "steps", "calls"), [(40, 1, 40), (40, 1, 64), (40, 8, 3), (7, 1, 3), (1, 1, 1)])
def test_tiers_give_the_results_of_eager(tier, goal, steps, calls):
    expected, program = Recurrence(goal, steps), Recurrence(goal, steps)
    for _ in range(2):  # the second run starts from a running flag left at 0
        EagerTier().run(expected, calls)
        tier.run(program, calls)
        for got, wanted in zip(program.result(), expected.result(), strict=True):
            assert torch.equal(got, wanted)
    assert len(tier.captured) == 1


def test_results_are_seen_by_the_work_that_follows_on_the_same_stream(tier):
    expected, program = Recurrence(), Recurrence()
    EagerTier().run(expected, 10)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tier.run(program, 10)
        copied = program.rows.clone()
        tier.run(program, 10)
    torch.cuda.synchronize()
    assert torch.equal(copied, expected.rows)


def test_a_loop_stops_when_nothing_is_left_to_do(loop):
    program = Recurrence(goal=30)
    loop.run(program, 10**6)
    assert int(program.cursor) == 30 and int(program.running) == 0
    assert int(program.budget) == 10**6 - 30  # not one step more


def test_a_loop_stops_on_its_budget(loop):
    program = Recurrence(goal=100, steps=4)
    loop.run(program, 5)
    assert int(program.cursor) == 20 and int(program.budget) == 0 and int(program.running) == 0
    loop.run(program, 2)
    assert int(program.cursor) == 28


@pytest.mark.skipif(triton is None, reason="needs triton")
def test_triton_kernels_inside(tier):
    program = TritonCounter()
    tier.run(program, 100)
    assert int(program.value) == 100
    tier.run(program, 900)
    assert int(program.value) == 1000 and int(program.running) == 0


def test_runs_do_not_wait_for_the_device(tier):
    program = Recurrence()
    tier.run(program, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        slept = torch.cuda.Event()
        slept.record()
        tier.run(program, 5)
        assert not slept.query()  # the host came back while the device was still asleep
        EagerTier().run(program, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_leaves_the_state_as_it_was(tier):
    program = Recurrence()
    EagerTier().run(program, 3)
    before = [t.clone() for t in (*program.state, program.running, program.budget)]
    tier.record(program)
    for left, was in zip((*program.state, program.running, program.budget), before, strict=True):
        assert torch.equal(left, was)


def test_a_thousand_runs_leave_memory_flat(tier):
    program = Recurrence(goal=10)
    for _ in range(20):
        tier.run(program, 8)
    allocated, free = torch.cuda.memory_allocated(), free_bytes()
    for _ in range(1000):
        tier.run(program, 8)
    assert torch.cuda.memory_allocated() == allocated
    assert free - free_bytes() < MIB


def test_dropped_recordings_give_their_memory_back(tier):
    def captured_and_dropped(count):
        for number in range(count):
            tier.run(Recurrence(goal=10, key=number), 8)
        tier.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return free_bytes()

    captured_and_dropped(10)
    free = captured_and_dropped(10)
    assert free - captured_and_dropped(50) < 8 * MIB


def test_recordings_share_their_memory(tier):
    for key in ("first", "second", "third"):
        tier.run(Recurrence(key=key, scratch=64 * MIB), 4)
    assert tier.captured["first"].bytes >= 64 * MIB
    assert tier.captured["second"].bytes + tier.captured["third"].bytes < 64 * MIB


FAILED_CAPTURE = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_gpu_decode import GraphTier, Recurrence

class Reader(Recurrence):
    def __call__(self):
        super().__call__()
        if torch.cuda.is_current_stream_capturing():
            {mistake}

here, tier = torch.cuda.current_stream(), GraphTier()
tier.run(Recurrence(key="good"), 2)
reader = Reader(key="bad")
before = reader.rows.clone()
try:
    tier.run(reader, 1)
except Exception as error:
    assert "'bad'" in error.__notes__[0], error
else:
    raise SystemExit("captured")
assert torch.cuda.current_stream() == here and torch.equal(reader.rows, before)
again, expected = Recurrence(key="again"), Recurrence()
tier.run(again, 10)
for _ in range(10):
    expected()
assert torch.equal(again.rows, expected.rows)
"""


@pytest.mark.parametrize("mistake", ["raise ValueError('a mistake')", "int(self.cursor)"])
def test_a_failed_capture_leaves_everything_usable(mistake):
    from pathlib import Path

    code = FAILED_CAPTURE.format(folder=str(Path(__file__).parent), mistake=mistake)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
