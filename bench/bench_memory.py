"""Peak memory of the student's step, forward and backward, beyond parameters, inputs and gradients.

`pytest bench/bench_memory.py -s`. Over tokens and over boxes, 7B width, beside what is predicted.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import memory_case as case

from vreflection.benchmarking.prediction import projected_extra_bytes, resampler_extra_bytes

CUDA = torch.cuda.is_available()
# (boxes, each with an image of its own; tokens of an image)
SWEEPS = {
    "tokens": [(1, count) for count in ((256, 1024, 5120, 16384) if CUDA else (256, 1024, 5120))],
    "boxes": [(boxes, 1024) for boxes in ((1, 4, 16, 64) if CUDA else (1, 4, 16))],
}
CASES = {f"{axis}-{sizes[axis == 'tokens']}": (axis, *sizes) for axis, found in SWEEPS.items() for sizes in found}


def in_a_process(which: str, boxes: int, count: int) -> int:
    command = [sys.executable, case.__file__, which, str(boxes), str(count)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def on_the_gpu(which: str, boxes: int, count: int) -> int:
    step, leaves = case.make_step(which, boxes, "cuda", torch.bfloat16)
    tokens = torch.randn(boxes, count, case.WIDTH, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the first one makes workspaces
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(tokens)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - case.gradient_bytes(leaves)


@pytest.mark.parametrize("name", list(CASES))
def test_extra_peak(benchmark, lab, name):
    axis, boxes, count = CASES[name]
    measure = on_the_gpu if CUDA else in_a_process
    extra = {which: measure(which, boxes, count) for which in ("ours", "stock")}
    itemsize = 2 if CUDA else 4
    predicted = {
        "ours": resampler_extra_bytes(boxes, boxes * count, case.WIDTH, itemsize),
        "stock": projected_extra_bytes(boxes * count, case.WIDTH, itemsize),
    }
    sweep = {"figure": "memory", "axis": axis, "value": count if axis == "tokens" else boxes}
    row = {"extra_peak_bytes": extra, "predicted_bytes": predicted, "sweep": sweep}
    benchmark.extra_info.update(row | lab.versions())
    benchmark.pedantic(lambda: None, rounds=1)
    shown = ", ".join(f"{which} {size / 2**20:,.1f} MiB" for which, size in extra.items())
    print(f"\n{benchmark.name}: {shown}, ratio {extra['ours'] / extra['stock']:.3f}")
