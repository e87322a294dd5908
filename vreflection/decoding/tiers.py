"""Runner tiers: who repeats a decode step, the host one call at a time, a CUDA graph, or the device itself.

| tier | one `run` of n calls | runs on |
|---|---|---|
| `eager` | n calls in Python | anything |
| `graph` | n replays of one CUDA graph | CUDA |
| `loop` | one launch: a graph that repeats the step until nothing is left to do | CUDA 12.4 |

All give the same results. None waits for the device on CUDA, once a program has been captured.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ..errors import ConfigError

logger = logging.getLogger(__name__)

TIERS = ("eager", "graph", "loop")
WARM_UP_CALLS = 2  # the first compiles kernels and makes workspaces, the second runs as the recorded one will
LOOP_DRIVER = 12040  # conditional graph nodes
_announced: set[str] = set()


class Program(Protocol):
    """One call's work, over tensors whose addresses never change.

    A program draws no numbers from torch's generators: a recorded draw would repeat.
    """

    @property
    def key(self) -> Hashable:
        """Everything that changes the recorded work: batch bucket, cache extent, kinds of pick, steps."""
        ...

    @property
    def steps(self) -> int:
        """Decode steps that one call performs."""
        ...

    @property
    def running(self) -> torch.Tensor:
        """`(1,)` int32, written by every call: 0 once nothing is left to do or the budget is used up."""
        ...

    @property
    def budget(self) -> torch.Tensor:
        """`(1,)` int64: steps that may still be taken; every call takes `steps` off."""
        ...

    @property
    def state(self) -> Sequence[torch.Tensor]:
        """The small tensors that a call changes; not the key/value cache: its columns past a row's end are free."""
        ...

    def __call__(self) -> None: ...


class Tier(Protocol):
    name: str

    def run(self, program: Program, calls: int) -> None:
        """Make at most `calls` calls; sets `program.budget` itself. Does not wait for a CUDA device."""
        ...


class EagerTier:
    """Calls in Python. On the CPU it stops once nothing is left to do; elsewhere reading the flag would wait."""

    name = "eager"

    def run(self, program: Program, calls: int) -> None:
        set_budget(program, calls)
        readable = program.running.device.type == "cpu"
        for _ in range(calls):
            program()
            if readable and not int(program.running):
                return


@dataclass(frozen=True)
class Captured:
    """What a recorded program costs: device memory that its capture added, and host time with warm-up."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Recording:
    # Replays write to the program's tensors: they live as long as the recording.
    program: Program
    addresses: tuple[int, ...]
    launch: Callable[[], None]
    cost: Captured


class GraphTier:
    """Captures each program once, by its key, and replays it.

    The graphs share one memory pool, so what they need together is what the largest needs: they must not run at the
    same time, and a program keeps its results in tensors of its own.

    Args:
        pool: a `torch.cuda.graph_pool_handle()` to share with other graphs that never run at the same time.
        device: checked at construction only; a program runs where its tensors are.

    Raises:
        ConfigError: the tier cannot run here.
    """

    name = "graph"

    def __init__(self, pool: Any = None, device: torch.device | str = "cuda"):
        refuse_unusable(self.name, device)
        self._given_pool, self._pool = pool, pool
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._recordings: dict[Hashable, Recording] = {}

    @property
    def captured(self) -> Mapping[Hashable, Captured]:
        """Key to cost of every recorded program."""
        return MappingProxyType({key: recording.cost for key, recording in self._recordings.items()})

    def run(self, program: Program, calls: int) -> None:
        recording = self.record(program)
        set_budget(program, calls)
        for _ in range(calls):
            recording.launch()

    def drop(self, predicate: Callable[[Hashable], bool]) -> None:
        """Forget the recordings whose key fits, and let go of their programs and memory."""
        self._recordings = {key: kept for key, kept in self._recordings.items() if not predicate(key)}
        self._leave_empty_pool()

    def clear(self) -> None:
        self.drop(lambda key: True)

    def record(self, program: Program) -> Recording:
        """The recording of a program, captured if its key is new; leaves `program.state` as it was.

        Raises:
            RuntimeError: the key belongs to a program over other tensors.
        """
        key, addresses = program.key, tuple(tensor.data_ptr() for tensor in changed_by(program))
        known = self._recordings.get(key)
        if known is None:
            try:
                known = self._recordings[key] = self._capture(program, addresses)
            except Exception as error:
                self._given_pool = self._pool = None  # torch may still be recording into it
                error.add_note(f"while capturing the decode program {key!r}")
                raise
        if known.addresses != addresses:
            raise RuntimeError(
                f"the decode program {key!r} was captured over other tensors; a replay would write to those: "
                "give it another key, or drop() the old one first"
            )
        return known

    def _capture(self, program: Program, addresses: tuple[int, ...]) -> Recording:
        begin = time.perf_counter()
        with torch.cuda.device(program.running.device):
            here = torch.cuda.current_stream()
            side = self._side_stream(program.running.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            before = [(tensor, tensor.clone()) for tensor in changed_by(program)]
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP_CALLS):
                        set_budget(program, 1)
                        program()
                        restore(before)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # `graph` does it too; done here, it is not taken off the count
                reserved = torch.cuda.memory_reserved()
                graph = self._new_graph()
                # Other threads go on allocating while this one captures.
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    program()
                size = torch.cuda.memory_reserved() - reserved
            finally:
                torch.cuda.set_stream(here)  # a failed capture leaves the side stream current
                here.wait_stream(side)
                restore(before)
            launch = self._launcher(graph, program)
        return Recording(program, addresses, launch, Captured(size, time.perf_counter() - begin))

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        # One for warm-up and every capture: library workspaces, and the free blocks of a pool, belong to a stream.
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        return self._streams[device]

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()

    def _launcher(self, graph: torch.cuda.CUDAGraph, program: Program) -> Callable[[], None]:
        return graph.replay

    def _leave_empty_pool(self) -> None:
        # torch refuses to capture into a pool whose last graph is gone.
        if not self._recordings:
            self._pool = self._given_pool


class LoopTier(GraphTier):
    """Captures each program once, and has the device repeat it: one launch runs until `program.running` is 0.

    The first call is made whatever `running` says, as in the other tiers. The host learns nothing until the launch has
    ended: no streaming, no admission and no cancelling in between. `calls` bounds it, through the program's budget.
    """

    name = "loop"

    def run(self, program: Program, calls: int) -> None:
        recording = self.record(program)
        set_budget(program, calls)
        if calls:
            recording.launch()

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph(keep_graph=True)

    def _launcher(self, graph: torch.cuda.CUDAGraph, program: Program) -> Callable[[], None]:
        return DeviceLoop(graph, program.running).launch


class DeviceLoop:
    """A captured graph, repeated on the device until `running` is 0 (`csrc/device_loop.cu`).

    Args:
        graph: captured with `keep_graph=True`. Kept, because the loop uses its memory.
        running: `(1,)` int32, written by the graph.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, running: torch.Tensor):
        self.graph, self.running = graph, running
        self.handle = loop_operators().device_loop_create(graph.raw_cuda_graph(), running)
        self.close = weakref.finalize(self, loop_operators().device_loop_destroy, self.handle)
        self.close.atexit = False  # the process takes everything with it; the driver may be gone by then

    def launch(self) -> None:
        """Start the loop on the current stream of its device."""
        loop_operators().device_loop_launch(self.handle, self.running)


def available_tiers(device: torch.device | str) -> dict[str, str | None]:
    """For every tier, None where it can run on `device`, else why it cannot, in one line."""
    no_graph = why_no_graph(torch.device(device))
    return {"eager": None, "graph": no_graph, "loop": no_graph or why_no_loop()}


def choose_tier(name: str, device: torch.device | str) -> Tier:
    """The tier of a name; `"auto"` takes `graph` where it runs, else `eager`, and logs which, once per process.

    `"auto"` never takes `loop`: it gives up streaming, and letting rows in and out between steps, for the last
    microseconds of launching. It is for whole answers whose tokens nobody waits for.

    Raises:
        ConfigError: an unknown name, or a tier that cannot run on `device`.
    """
    if name == "auto":
        name = automatic(device)
        if name not in _announced:
            _announced.add(name)
            reason = available_tiers(device)["graph"]
            logger.info("decode tier: %s", f"{reason}: {name}" if reason else name)
    if name not in TIERS:
        raise ConfigError(f"tier: expected one of {('auto', *TIERS)}, got {name!r}")
    refuse_unusable(name, device)
    if name == "eager":
        return EagerTier()
    return GraphTier(device=device) if name == "graph" else LoopTier(device=device)


def tier_report(device: torch.device | str | None = None) -> dict[str, str]:
    """Lines for `vreflection info`: each tier, whether it runs on `device` (default: the GPU, if any), why not."""
    device = "cuda" if device is None else device
    told = {}
    for name, reason in available_tiers(device).items():
        taken = "chosen by auto" if name == automatic(device) else "on request"
        told[f"decode tier {name}"] = f"no: {reason}" if reason else f"usable, {taken}"
    return told


def automatic(device: torch.device | str) -> str:
    return "eager" if why_no_graph(torch.device(device)) else "graph"


def refuse_unusable(name: str, device: torch.device | str) -> None:
    reasons = available_tiers(device)
    if reasons[name] is not None:
        usable = ", ".join(tier for tier in TIERS if reasons[tier] is None)
        raise ConfigError(
            f'tier="{name}" cannot run on {device}: {reasons[name]}; usable there: {usable} '
            f'(tier="auto" takes {automatic(device)})'
        )


def why_no_graph(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "graphs need CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    for name in ("CUDAGraph", "graph", "graph_pool_handle"):
        if not hasattr(torch.cuda, name):
            return f"torch {torch.__version__} has no torch.cuda.{name}"
    return None


def why_no_loop() -> str | None:
    """What a loop needs beyond a graph."""
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return f"torch {torch.__version__} has no CUDAGraph.raw_cuda_graph"
    missing = why_no_loop_operators()
    if missing:
        return f"the CUDA part of the extension is not built or does not load: {missing}"
    driver = loop_operators().device_loop_support()
    if not driver:
        return "the extension was built with CUDA older than 12.4, or newer than the driver runs"
    if driver < LOOP_DRIVER:
        return f"driver {version_text(driver)} is older than {version_text(LOOP_DRIVER)}"
    if getattr(torch.cuda, "get_allocator_backend", lambda: "native")() != "native":
        return "only graphs captured with torch's native allocator can be looped (PYTORCH_CUDA_ALLOC_CONF=backend:)"
    return None


def why_no_loop_operators() -> str:
    from ..ops import dispatch

    if dispatch.CUDA_MISSING:
        return dispatch.CUDA_MISSING
    return "" if hasattr(loop_operators(), "device_loop_create") else "it is of an older build"


def loop_operators() -> Any:
    return torch.ops.vreflection


def version_text(number: int) -> str:
    """`12040` as `12.4`."""
    return f"{number // 1000}.{number % 1000 // 10}"


@torch.inference_mode()  # the tensors may be inference tensors, which may be written in this mode only
def set_budget(program: Program, calls: int) -> None:
    if calls < 0:
        raise ValueError(f"calls: expected at least 0, got {calls}")
    program.budget.fill_(calls * program.steps)


def changed_by(program: Program) -> list[torch.Tensor]:
    return [program.running, program.budget, *program.state]


@torch.inference_mode()
def restore(saved: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, value in saved:
        tensor.copy_(value)
