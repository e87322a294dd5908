"""Runner tiers without a GPU: the eager one for real, the others on a stand-in for CUDA that records closures."""

import contextlib
import gc
import logging
import subprocess
import sys

import pytest
import torch

from vreflection.decoding import tiers
from vreflection.decoding.tiers import EagerTier, GraphTier, LoopTier, available_tiers, choose_tier, tier_report
from vreflection.errors import ConfigError
from vreflection.ops import dispatch


class Counter:
    """A program that adds `steps` to a value until the value reaches `goal` or the budget is used up."""

    def __init__(self, cuda=None, goal=100, steps=1, key="counter"):
        self.cuda, self.goal, self.steps, self.key = cuda, goal, steps, key
        self.running = torch.zeros(1, dtype=torch.int32)  # stale, as after an earlier run
        self.budget = torch.full((1,), -7)
        self.value = torch.zeros(1, dtype=torch.int64)
        self.calls = 0

    @property
    def state(self):
        return [self.value]

    def work(self):
        self.calls += 1
        self.budget -= self.steps
        self.value += self.steps
        self.running.copy_((self.value < self.goal) & (self.budget > 0))

    def __call__(self):
        if self.cuda is not None and self.cuda.capturing is not None:
            self.cuda.capturing.recorded.append(self.work)
        else:
            self.work()


class Stream:
    def wait_stream(self, other):
        pass


class StandInCuda:
    """What the tiers touch of `torch.cuda`, and the loop operators; `log` holds the order of events."""

    def __init__(self):
        self.log, self.captures, self.loops, self.destroyed = [], [], {}, []
        self.pools, self.capturing, self.driver, self.reserved = 0, None, 13000, 0
        self.current, self.fail_capture = Stream(), False
        cuda = self

        class Graph:
            def __init__(self, keep_graph=False):
                self.keep_graph, self.recorded = keep_graph, []

            def replay(self):
                cuda.log.append("replay")
                for work in self.recorded:
                    work()

            def raw_cuda_graph(self):
                assert self.keep_graph
                cuda.loops[id(self)] = self.recorded
                return id(self)

        self.CUDAGraph = Graph

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append("capture")
        self.captures.append((pool, stream, capture_error_mode))
        self.capturing, self.current = graph, stream
        if self.fail_capture:
            self.capturing = None
            raise ValueError("operation not permitted")  # and the side stream stays current, as in torch
        self.reserved += 1000
        yield
        self.capturing = None

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def graph_pool_handle(self):
        self.pools += 1
        return ("pool", self.pools)

    def set_stream(self, stream):
        self.current = stream

    # The operators of csrc/device_loop.cu
    def device_loop_support(self):
        return self.driver

    def device_loop_create(self, graph, running):
        return graph

    def device_loop_launch(self, loop, running):
        self.log.append("launch")
        while True:
            for work in self.loops[loop]:
                work()
            if not int(running):
                return

    def device_loop_destroy(self, loop):
        self.destroyed.append(loop)


@pytest.fixture
def cuda(monkeypatch):
    stand_in = StandInCuda()
    for name in ("CUDAGraph", "graph", "stream", "graph_pool_handle", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stand_in.current)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: stand_in.reserved)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(tiers, "loop_operators", lambda: stand_in)
    monkeypatch.setattr(dispatch, "CUDA_MISSING", "")
    monkeypatch.setattr(tiers, "_announced", set())
    return stand_in


# The eager tier, for real


def test_eager_stops_when_nothing_is_left_to_do():
    program = Counter(goal=5)
    EagerTier().run(program, 50)
    assert program.calls == int(program.value) == 5


def test_eager_stops_on_its_budget():
    program = Counter(goal=100, steps=8)
    EagerTier().run(program, 3)
    assert program.calls == 3 and int(program.value) == 24 and int(program.budget) == 0


def test_a_stale_flag_does_not_keep_a_run_from_starting():
    program = Counter()
    for _ in range(3):
        EagerTier().run(program, 2)  # leaves running at 0
    assert int(program.value) == 6


def test_eager_reads_nothing_off_the_cpu():
    program = Counter()
    program.running = torch.zeros(1, dtype=torch.int32, device="meta")
    program.budget, program.value = program.budget.to("meta"), program.value.to("meta")
    EagerTier().run(program, 4)  # a meta tensor has no value to read
    assert program.calls == 4


def test_no_calls_and_fewer():
    program = Counter()
    EagerTier().run(program, 0)
    assert program.calls == 0 and int(program.budget) == 0
    with pytest.raises(ValueError, match="calls: expected at least 0, got -1"):
        EagerTier().run(program, -1)


def test_tensors_of_inference_mode_are_fine():
    with torch.inference_mode():
        program = Counter()
    program.work = lambda: None
    EagerTier().run(program, 1)
    assert int(program.budget) == 1


# Graph and loop, recorded and replayed by the stand-in


@pytest.mark.parametrize("tier", [GraphTier, LoopTier])
@pytest.mark.parametrize(("goal", "steps", "calls"), [(100, 1, 6), (100, 8, 3), (4, 1, 4)])
def test_same_results_as_eager(cuda, tier, goal, steps, calls):
    expected, program = Counter(goal=goal, steps=steps), Counter(cuda, goal, steps)
    recorder = tier()
    for _ in range(2):
        EagerTier().run(expected, calls)
        recorder.run(program, calls)
        assert int(program.value) == int(expected.value)
        assert int(program.running) == int(expected.running) == 0
        assert int(program.budget) == int(expected.budget)
        for counter in (expected, program):
            counter.value.zero_()
    assert cuda.log.count("capture") == 1


def test_captured_once_per_key_in_one_pool_and_on_one_stream(cuda):
    tier, first, second = GraphTier(), Counter(cuda, key="a"), Counter(cuda, key="b")
    for program in (first, second, first, second):
        tier.run(program, 3)
    assert cuda.log == ["capture", *["replay"] * 3, "capture", *["replay"] * 9]
    assert len(set(cuda.captures)) == 1 and cuda.captures[0][0] == ("pool", 1)
    assert cuda.captures[0][2] == "thread_local"
    assert set(tier.captured) == {"a", "b"}
    assert tier.captured["a"].bytes == 1000 and tier.captured["a"].seconds > 0
    with pytest.raises(TypeError):
        tier.captured["c"] = None  # type: ignore[index]


def test_a_given_pool_is_used(cuda):
    tier = GraphTier(pool="shared")
    tier.run(Counter(cuda), 1)
    tier.clear()
    tier.run(Counter(cuda), 1)
    assert [pool for pool, _, _ in cuda.captures] == ["shared", "shared"] and cuda.pools == 0


@pytest.mark.parametrize("tier", [GraphTier, LoopTier])
def test_capture_leaves_the_state_as_it_was(cuda, tier):
    program = Counter(cuda)
    program.value.fill_(41)
    program.running.fill_(9)
    tier().record(program)
    assert program.calls == tiers.WARM_UP_CALLS  # the capture itself runs nothing
    assert [int(t) for t in (program.value, program.running, program.budget)] == [41, 9, -7]


def test_warm_up_calls_start_from_the_same_state(cuda):
    program, seen = Counter(cuda), []
    work = program.work
    program.work = lambda: (seen.append((int(program.value), int(program.budget))), work())
    GraphTier().record(program)
    assert seen == [(0, 1), (0, 1)]


@pytest.mark.parametrize("recorded_before", [False, True])
def test_a_failed_capture_leaves_state_and_stream_but_not_the_pool(cuda, recorded_before):
    program, tier, here = Counter(cuda), GraphTier(), cuda.current
    if recorded_before:
        tier.record(Counter(cuda, key="before"))
        cuda.captures.clear()
    cuda.fail_capture = True
    with pytest.raises(ValueError, match="not permitted") as caught:
        tier.run(program, 3)
    assert "'counter'" in caught.value.__notes__[0]
    assert int(program.value) == 0 and cuda.current is here and "counter" not in tier.captured
    cuda.fail_capture = False
    tier.run(program, 3)
    assert int(program.value) == 3
    assert [pool for pool, _, _ in cuda.captures] == [("pool", 1), ("pool", 2)]


def test_a_key_belongs_to_one_set_of_tensors(cuda):
    tier, old, new = GraphTier(), Counter(cuda), Counter(cuda)
    tier.run(old, 1)
    with pytest.raises(RuntimeError, match="'counter' was captured over other tensors"):
        tier.run(new, 1)
    tier.drop(lambda key: key == "counter")
    tier.run(new, 1)
    assert int(new.value) == 1


def test_dropping(cuda):
    tier = GraphTier()
    for key in ("a", "b"):
        tier.run(Counter(cuda, key=key), 1)
    tier.drop(lambda key: key == "a")
    assert set(tier.captured) == {"b"}
    tier.run(Counter(cuda, key="a"), 1)
    assert {pool for pool, _, _ in cuda.captures} == {("pool", 1)}
    tier.clear()
    assert not tier.captured
    tier.run(Counter(cuda, key="a"), 1)  # into a fresh pool: the old one's last graph is gone
    assert cuda.captures[-1][0] == ("pool", 2)


def test_a_loop_is_one_launch(cuda):
    tier, program = LoopTier(), Counter(cuda, goal=30)
    tier.run(program, 1000)
    assert cuda.log == ["capture", "launch"] and int(program.value) == 30
    tier.run(program, 0)
    assert cuda.log == ["capture", "launch"] and int(program.value) == 30


def test_dropped_loops_are_destroyed(cuda):
    tier = LoopTier()
    tier.run(Counter(cuda), 2)
    assert not cuda.destroyed
    tier.clear()
    gc.collect()
    assert len(cuda.destroyed) == 1


def test_a_closed_loop_is_not_destroyed_again(cuda):
    loop = tiers.DeviceLoop(torch.cuda.CUDAGraph(keep_graph=True), torch.zeros(1, dtype=torch.int32))
    loop.close()
    loop.close()
    del loop
    gc.collect()
    assert len(cuda.destroyed) == 1


# Choosing and refusing


def test_on_the_cpu():
    told = available_tiers("cpu")
    assert told == {"eager": None, "graph": "graphs need CUDA", "loop": "graphs need CUDA"}
    assert isinstance(choose_tier("eager", "cpu"), EagerTier) and isinstance(choose_tier("auto", "cpu"), EagerTier)


def test_auto_takes_the_graph_and_loop_is_on_request(cuda):
    assert type(choose_tier("auto", "cuda")) is GraphTier
    assert type(choose_tier("graph", torch.device("cuda", 0))) is GraphTier
    assert type(choose_tier("loop", "cuda")) is LoopTier


def test_auto_says_so_once(cuda, caplog):
    with caplog.at_level(logging.INFO, logger="vreflection.decoding.tiers"):
        for device in ("cpu", "cuda", "cpu", "cuda"):
            choose_tier("auto", device)
        choose_tier("loop", "cuda")
    assert caplog.messages == ["decode tier: graphs need CUDA: eager", "decode tier: graph"]


def refusals():
    def without_device(cuda, patch):
        patch.setattr(torch.cuda, "is_available", lambda: False)

    def old_torch(cuda, patch):
        del cuda.CUDAGraph.raw_cuda_graph

    def not_built(cuda, patch):
        patch.setattr(dispatch, "CUDA_MISSING", "no nvcc found")

    def old_build(cuda, patch):
        patch.setattr(tiers, "loop_operators", lambda: object())

    def old_driver(cuda, patch):
        cuda.driver = 12020

    def old_toolkit(cuda, patch):
        cuda.driver = 0

    def other_allocator(cuda, patch):
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")

    return [
        (without_device, "no CUDA device"),
        (old_torch, f"torch {torch.__version__} has no CUDAGraph.raw_cuda_graph"),
        (not_built, "the CUDA part of the extension is not built or does not load: no nvcc found"),
        (old_build, "it is of an older build"),
        (old_driver, "driver 12.2 is older than 12.4"),
        (old_toolkit, "built with CUDA older than 12.4, or newer than the driver runs"),
        (other_allocator, "torch's native allocator"),
    ]


@pytest.mark.parametrize(("break_it", "reason"), refusals(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_loop_that_cannot_run_is_refused_with_its_reason(cuda, monkeypatch, break_it, reason):
    break_it(cuda, monkeypatch)
    assert reason in available_tiers("cuda")["loop"]
    for make in (LoopTier, lambda: choose_tier("loop", "cuda")):
        with pytest.raises(ConfigError) as caught:
            make()
        assert f'tier="loop" cannot run on cuda: {available_tiers("cuda")["loop"]}; usable there: ' in str(caught.value)
    if break_it.__name__ == "without_device":
        assert str(caught.value).endswith('usable there: eager (tier="auto" takes eager)')
    else:
        assert type(choose_tier("auto", "cuda")) is GraphTier
        assert str(caught.value).endswith('usable there: eager, graph (tier="auto" takes graph)')


def test_a_driver_of_12_4_is_enough(cuda):
    cuda.driver = 12040
    assert available_tiers("cuda")["loop"] is None


def test_graphs_are_refused_where_there_are_none(cuda, monkeypatch):
    with pytest.raises(ConfigError, match="graphs need CUDA"):
        choose_tier("graph", "cpu")
    monkeypatch.delattr(torch.cuda, "graph_pool_handle")
    assert available_tiers("cuda")["graph"] == f"torch {torch.__version__} has no torch.cuda.graph_pool_handle"
    assert isinstance(choose_tier("auto", "cuda"), EagerTier)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"tier: expected one of \('auto', 'eager', 'graph', 'loop'\), got 'fast'"):
        choose_tier("fast", "cpu")


def test_report(cuda):
    assert tier_report() == {
        "decode tier eager": "usable, on request",
        "decode tier graph": "usable, chosen by auto",
        "decode tier loop": "usable, on request",
    }
    assert tier_report("cpu")["decode tier eager"] == "usable, chosen by auto"
    assert tier_report("cpu")["decode tier loop"] == "no: graphs need CUDA"


def test_imports_and_answers_where_torch_has_no_graphs():
    code = """
import torch
for name in ("CUDAGraph", "graph", "graph_pool_handle"):
    delattr(torch.cuda, name)
torch.cuda.is_available = lambda: True
from vreflection.decoding import tiers
told = tiers.available_tiers("cuda")
assert told["graph"].endswith("has no torch.cuda.CUDAGraph") and told["loop"] == told["graph"], told
assert tiers.choose_tier("auto", "cuda").name == "eager"
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_the_operators_load_without_a_driver():
    """The library opens on a torch without CUDA, so that what it says can be tested there."""
    library = dispatch.Path(dispatch.__file__).parents[1] / "_C_cuda.abi3.so"
    if not library.exists() or torch.version.cuda:
        pytest.skip("needs the CUDA part of the extension, and a torch without CUDA")
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
operators = torch.ops.vreflection
assert operators.device_loop_support() == 0
try:
    operators.device_loop_destroy(5)
except RuntimeError as error:
    assert "no loop 5; it was destroyed or never created" in str(error)
else:
    raise SystemExit("an unknown loop was destroyed")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
