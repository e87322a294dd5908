"""Shared by all suites: interleaved timing, so that a ratio holds when the machine's speed drifts; measured ceilings.

Every row gets, besides the benchmark's own numbers, p20/p50/p80 of each variant, ratios to the base, and, where the
case states its work (vreflection.benchmarking.prediction), the speed of light (the larger of bytes over bandwidth and
flops over matrix peak, both measured around the same rounds) and each variant's share of it.

BENCH_SECONDS: no case of a suite (a file) starts once the suite has run this long; 60 by default, BENCH_FULL=1 takes
the bound away. BENCH_ROWS: a file to which each row is appended as soon as it is measured, for runs that may be
killed.
"""

import functools
import json
import os
import statistics
import subprocess
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from vreflection.benchmarking.prediction import Device, Work
from vreflection.quickstart.base import base_dir

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MIB = 2**20
FULL = os.environ.get("BENCH_FULL", "") not in ("", "0")
SUITE_SECONDS = float("inf") if FULL else float(os.environ.get("BENCH_SECONDS", "60"))


def synchronise():
    if CUDA:
        torch.cuda.synchronize()


def cold_cache():
    """On a GPU, write more than the second-level cache holds, so that inputs come from memory as they do in a step."""
    if CUDA:
        torch.empty(256 * MIB, dtype=torch.int8, device="cuda").zero_()


def seconds_of(function) -> float:
    cold_cache()
    synchronise()
    if CUDA:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Work queued ahead hides the host's launch time, which is measured apart in bench_boundary.py.
        torch.cuda._sleep(20_000_000)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Ceilings:
    """What this device reaches in bytes and flops per second, timed before and after a row's rounds.

    Not within them: it would leave the next variant, always the same one, a cold cache.

    Bandwidth is the better of copying (bytes read plus written) and, on a CPU, summing; `kept` takes as much as stays
    in a processor's cache. The matrix product is in `dtype`.
    """

    def __init__(self, dtype, kept: bool):
        size = 256 * MIB if CUDA else (MIB if kept else 64 * MIB)
        source = torch.randn(size, device=DEVICE)
        target = torch.empty_like(source)
        side = 8192 if CUDA else 1536
        left, right = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        ours = CUDA and hasattr(torch.ops.vreflection, "measure_copy")
        copy = (lambda: torch.ops.vreflection.measure_copy(target, source)) if ours else (lambda: target.copy_(source))
        self.calls = {"copy": copy, "matrix": lambda: left @ right}
        self.amounts = {"copy": 2 * 4 * size, "matrix": 2 * side**3}
        if not CUDA:
            self.calls["sum"], self.amounts["sum"] = source.sum, 4 * size
        self.best: dict[str, float] = {}

    def measure(self, times: int = 4) -> None:
        for name, call in self.calls.items():
            call()  # what ran before may have emptied the cache
            taken = min(seconds_of(call) for _ in range(times))
            self.best[name] = min(self.best.get(name, taken), taken)

    def device(self) -> Device:
        rate = {name: self.amounts[name] / seconds for name, seconds in self.best.items()}
        return Device(max(rate["copy"], rate.get("sum", 0.0)), rate["matrix"])


@pytest.fixture(scope="session")
def ceilings():
    """`ceilings(dtype, kept)`; buffers live as long as the session."""
    return functools.cache(Ceilings)


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "commit": commit}
    found["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    return found


def timed_row(seconds: dict[str, list[float]], base: str, baselines=None, sweep=None) -> dict:
    """What every timed row says of its variants' rounds."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "median_s": medians,
        "p20_s": {name: percentile(values, 0.2) for name, values in seconds.items()},
        "p80_s": {name: percentile(values, 0.8) for name, values in seconds.items()},
        "speedup_over": base,
        "speedup": {name: medians[base] / value for name, value in medians.items()},
        "raw_s": seconds,
        "baselines": list(baselines or [base]),
        **({"sweep": sweep} if sweep else {}),
        **versions(),
    }


@pytest.fixture
def interleaved(benchmark, ceilings):
    """`interleaved({"ours": f, "reference": g}, base="reference")` times the functions in turn in one run.

    The first function is the benchmark's own row. `work` of one call of it and `dtype` add the speed of light; `kept`
    says that the work's bytes stay in a CPU's cache from one call to the next.
    `before` holds what to do, untimed, before each call of a function. `baselines` are what the first function is
    judged against (default: the base alone); `sweep` makes the row a point of a figure. Nothing is asserted about time.
    """

    def run(
        functions: dict, base: str, rounds: int = 7, work: Work | None = None, dtype=torch.float32, before=None,
        baselines=None, sweep=None, kept: bool = False,
    ) -> dict[str, float]:  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        ceiling = ceilings(dtype, kept) if work is not None else None
        if ceiling is not None and not CUDA:
            ceiling.best = {}  # this machine's speed drifts; a GPU that is ours alone is measured once
        if ceiling is not None and not ceiling.best:
            ceiling.measure()
        names = list(functions)
        for turn in range(rounds + 1):
            # Each round begins with another: what comes first finds the cache of what came last.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if before is not None:
                    before[name]()
                taken = seconds_of(functions[name])
                if turn:  # the first turn warms up
                    seconds[name].append(taken)
        row = timed_row(seconds, base, baselines, sweep) | {"dtype": str(dtype).removeprefix("torch.")}
        medians, ratios = row["median_s"], row["speedup"]
        shown = [f"{name} {1e3 * s:.3g} ms ({ratios[name]:.2f}x)" for name, s in medians.items()]
        if work is not None and ceiling is not None:
            if not CUDA:
                ceiling.measure()
            reached = ceiling.device()
            light = work.seconds(reached)
            row |= {"bytes": work.bytes, "flops": work.flops, "speed_of_light_s": light, "ceilings": asdict(reached)}
            row["share_of_light"] = {name: light / s for name, s in medians.items()}
            first = next(iter(functions))
            shown.append(f"speed of light {1e3 * light:.3g} ms, {first} at {100 * row['share_of_light'][first]:.0f} %")
        benchmark.extra_info.update(row)
        benchmark.pedantic(next(iter(functions.values())), rounds=1)
        print(f"\n{benchmark.name}: {', '.join(shown)}")
        return medians

    return run


@pytest.fixture(autouse=True)
def _threads():
    """A case that sets the number of threads sets it for itself."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _kept(request):
    """Appends the row of a finished case to BENCH_ROWS."""
    timed = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    place = os.environ.get("BENCH_ROWS")
    if place and timed is not None and timed.extra_info:
        row = {"name": request.node.name, "fullname": request.node.nodeid, "extra_info": timed.extra_info}
        with open(place, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


_begun: dict[str, float] = {}


@pytest.fixture(autouse=True)
def _bounded(request):
    """Skips a case once its suite has used up its time; what is left out is listed at the end of the run."""
    begun = _begun.setdefault(request.module.__name__, time.perf_counter())
    if time.perf_counter() - begun > SUITE_SECONDS:
        pytest.skip(f"the suite's {SUITE_SECONDS:g} s are used up (BENCH_SECONDS, BENCH_FULL=1)")


def agree(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """Correctness gate before any timing."""
    allowed = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}[dtype] * right.float().abs().max()
    error = (left.float() - right.float()).abs().max()
    assert error < allowed, f"error {error:.2e}, allowed {allowed:.2e}"


class StockResampler(torch.nn.Module):
    """What a user would write: stock attention over padded keys, then LayerNorm. No attention weights are asked for."""

    def __init__(self, module):
        super().__init__()
        self.attention, self.norm = module.cross_attn, module.output_norm

    def forward(self, queries_BQD, keys_BND):
        return self.norm(self.attention(queries_BQD, keys_BND, keys_BND, need_weights=False)[0])


class ProjectedAttention(torch.nn.Module):
    """The same with the least around it: keys and values projected, fused attention (flash where it is), projection.

    Equal numbers of keys per query set, so no mask.
    """

    def __init__(self, module):
        super().__init__()
        self.attention, self.norm = module.cross_attn, module.output_norm

    def forward(self, queries_BQD, keys_BND):
        inner, heads = self.attention, self.attention.num_heads
        weights, biases = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
        split = [
            torch.nn.functional.linear(rows, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for weight, bias, rows in zip(weights, biases, (queries_BQD, keys_BND, keys_BND))
        ]
        attended = torch.nn.functional.scaled_dot_product_attention(*split)
        return self.norm(inner.out_proj(attended.transpose(1, 2).flatten(2)))


def compiled_too() -> bool:
    """Whether to time compiled baselines: on a GPU, and on request (BENCH_COMPILE=1), as compiling takes longer."""
    return CUDA or os.environ.get("BENCH_COMPILE", "") not in ("", "0")


def timed_step(module, call, direction: str, leaves=()):
    """A closure that runs `call()` forward only, or forward and backward with gradients dropped afterwards."""

    def forward():
        with torch.no_grad():
            call()

    def both():
        call().sum().backward()
        module.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None

    return forward if direction == "forward" else both


@pytest.fixture(scope="session")
def lab():
    """The helpers above, for suites."""
    modules = (StockResampler, ProjectedAttention)
    functions = (*modules, agree, compiled_too, timed_step, timed_row, versions, seconds_of)
    return SimpleNamespace(CUDA=CUDA, DEVICE=DEVICE, **{function.__name__: function for function in functions})


@pytest.fixture(scope="module")
def ours():
    """The quickstart's base model with latent steps."""
    from vreflection.model.modeling import VReflectionForConditionalGeneration

    return VReflectionForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32).eval().to(DEVICE)


@pytest.fixture(scope="module")
def host():
    """The same weights in the host library's class."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32).eval().to(DEVICE)


def pytest_generate_tests(metafunc):
    """`dtype`: what the device is used with."""
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16]
        metafunc.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
