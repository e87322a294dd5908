"""A training step against the straightforward one (naive_training.py): same weights, same samples, same losses.

`pytest bench/bench_training.py -s`. 16 samples of mixed length, float32, two threads; a step is losses, backward pass,
gradient norm and AdamW; the 0.1-billion model takes the 16 in four micro-batches, in every variant. Ours: packed rows,
logits at supervised positions, compression over ragged regions, one teacher pass; with cached features no vision tower.
TRAINING_SIZES=0.1b (or BENCH_FULL=1) runs the larger size, which takes many minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_case as case

from vreflection.benchmarking.prediction import training_extra_bytes, training_work
from vreflection.training.memory_plan import Plan
from vreflection.training.model_shape import ModelShape, shape_from_config

FULL = os.environ.get("BENCH_FULL", "") not in ("", "0")
SIZES = os.environ.get("TRAINING_SIZES", "quickstart,0.1b" if FULL else "quickstart").split(",")
ROUNDS = {"quickstart": 7, "0.1b": 2}
STAGES = ("stage1", "stage2")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(case.THREADS)
    yield
    torch.set_num_threads(before)


def results(model, samples, variant):
    model.zero_grad(set_to_none=True)
    (batch,) = case.batches_of(model, samples, variant, len(samples))
    parts = case.losses(model, batch, variant)
    parts["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: float(value.detach()) for name, value in parts.items()}, gradients


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_the_baseline_computes_the_same(two_threads, size, stage):
    """Losses and every gradient of all variants agree to 1e-4: the comparison is fair."""
    model = case.build(size, stage)
    samples = case.make_samples(model.config, 16 if size == "quickstart" else 4)
    expected, wanted = results(model, samples, "naive")
    for variant in case.VARIANTS:
        found, gradients = results(model, samples, variant)
        assert found.keys() == expected.keys() and gradients.keys() == wanted.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (variant, name)
        for name, gradient in wanted.items():
            error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4 or gradient.norm() < 1e-7, (variant, name, float(error))


def plan_of(model, samples, size: str, stage: str) -> tuple[ModelShape, Plan]:
    """The measured step as `vreflection.training.memory_plan` sees it."""
    parts = len(samples) // case.MICRO_BATCH[size]
    plan = Plan(stage, "ddp", world=1, precision="float32", checkpointing=False, accumulation=parts)
    return shape_from_config(model.config.to_dict()), case.described(plan, samples, model.config, parts)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_samples_per_second(two_threads, interleaved, benchmark, size, stage):
    model = case.build(size, stage)
    samples = case.make_samples(model.config)
    optimizer = case.make_optimizer(model)
    steps = {
        variant: case.stepper(
            model, case.batches_of(model, samples, variant, case.MICRO_BATCH[size]), variant, optimizer
        )
        for variant in case.VARIANTS
    }
    work = training_work(*plan_of(model, samples, size, stage))
    sweep = {"figure": "training", "axis": size, "value": stage, "count": len(samples)}
    medians = interleaved(steps, "naive", ROUNDS[size], work, sweep=sweep, kept=size == "quickstart")
    rates = {variant: len(samples) / seconds for variant, seconds in medians.items()}
    benchmark.extra_info["samples_per_s"] = rates
    print(f"  samples/s: {', '.join(f'{variant} {rate:.2f}' for variant, rate in rates.items())}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_peak_memory(benchmark, lab, size, stage):
    """Peak resident memory of one step, each variant in a process of its own."""
    found = {}
    for variant in case.VARIANTS:
        command = [sys.executable, str(Path(case.__file__)), size, stage, variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = json.loads(done.stdout)
    model = case.build(size, stage)
    predicted = training_extra_bytes(*plan_of(model, case.make_samples(model.config), size, stage))
    row = {
        "extra_peak_bytes": {variant: one["peak"] - one["before"] for variant, one in found.items()},
        "predicted_bytes": {"ours": predicted},
        "process_bytes": found,
    }
    benchmark.extra_info.update(row | lab.versions())
    benchmark.pedantic(lambda: None, rounds=1)
    base = found["naive"]
    for variant, row in found.items():
        grown, whole = (r["peak"] - r["before"] for r in (row, base))
        print(
            f"\n{benchmark.name}: {variant}: {grown / 2**20:.0f} MiB beyond weights and optimizer "
            f"({grown / whole:.2f} of naive), of which gradients {row['gradients'] / 2**20:.0f}; "
            f"whole process {row['peak'] / 2**20:.0f} MiB ({row['peak'] / base['peak']:.2f})",
            end="",
        )
