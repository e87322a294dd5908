"""A training step at the real sizes, random weights: 7B with adapters and 3B in full, 16,384 packed tokens, bfloat16.

`pytest bench/bench_training_shapes.py -s`: one step after one that warms up, its peak memory, and both beside what
`vreflection.training.memory_plan` predicts. tests/benchmarking/test_training_shapes.py runs the same at a tiny size.
"""

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_case as case
import training_shapes as shapes

CUDA = torch.cuda.is_available()
NAMES = [name for name in shapes.RUNS if not name.startswith("tiny")]


def measured(lab, run: shapes.Run) -> dict:
    """One step after one that warms up, and what was predicted of it."""
    model = shapes.build(run, "cuda", torch.bfloat16)
    batch, samples = shapes.packed_batch(model.config, run.tokens, "cuda")
    step = shapes.step_of(model, batch, fused=True)
    losses = [step()]
    assert torch.isfinite(torch.tensor(losses[0]))
    torch.cuda.reset_peak_memory_stats()
    seconds = lab.seconds_of(lambda: losses.append(step()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # the same batch and, nearly, the same weights
    plan = case.described(run.plan, samples, model.config)
    row = shapes.predicted(run, plan)
    return {
        "tokens": plan.tokens, "step_s": seconds, "tokens_per_s": plan.tokens / seconds,
        "predicted_step_s": {gpu: time.seconds for gpu, time in row.times.items()},
        "predicted_peak_bytes": row.total, "predicted_parts": row.parts, "dtype": "bfloat16",
        "peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, lab, name):
    if not CUDA:
        pytest.skip("real sizes: on a GPU only")
    run = shapes.RUNS[name]
    if run.lora_rank:
        pytest.importorskip("peft")
    told = measured(lab, run)
    gc.collect()  # the next model needs the room
    torch.cuda.empty_cache()
    benchmark.extra_info.update({**told, **lab.versions()})
    benchmark.pedantic(lambda: None, rounds=1)
    print(
        f"\n{benchmark.name}: {told['tokens']:,} tokens in {told['step_s']:.3g} s, "
        f"peak {told['peak_bytes'] / 2**30:.1f} GiB; predicted {told['predicted_peak_bytes'] / 2**30:.1f} GiB, "
        f"on an H200 {told['predicted_step_s']['H200']:.3g} s"
    )
