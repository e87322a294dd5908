"""Shared by all suites: interleaved timing, so that a ratio holds when the machine's speed drifts."""

import statistics
import time

import pytest
import torch


@pytest.fixture
def interleaved(benchmark):
    """`interleaved({"ours": f, "reference": g}, base="reference")` times the functions in turn in one run.

    The first function is the benchmark's own row; medians and ratios of all go to `extra_info`, and the ratios are
    printed. Nothing is asserted about time.
    """

    def run(functions: dict, base: str, rounds: int = 7) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds + 1):
            for name, function in functions.items():
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = {name: medians[base] / value for name, value in medians.items()}
        benchmark.extra_info.update({"median_s": medians, "speedup_over": base, "speedup": ratios, "raw_s": seconds})
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.pedantic(next(iter(functions.values())), rounds=1)
        shown = ", ".join(f"{name} {1e3 * s:.2f} ms ({ratios[name]:.2f}x)" for name, s in medians.items())
        print(f"\n{benchmark.name}: {shown}")
        return medians

    return run
