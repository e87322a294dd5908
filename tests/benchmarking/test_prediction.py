import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vreflection.benchmarking.prediction import (
    BANDWIDTH,
    COPY_SHARE,
    DEVICES,
    MATRIX_SHARE,
    Device,
    Work,
    cross_entropy_work,
    decode_work,
    distillation_work,
    generation_work,
    prefill_work,
    projected_extra_bytes,
    projected_work,
    resampler_extra_bytes,
    resampler_work,
    roi_align_work,
    training_extra_bytes,
    training_work,
)
from vreflection.training.memory_plan import Plan
from vreflection.training.model_shape import NAMED, ModelShape

ROOT = Path(__file__).parents[2]
TINY = ModelShape(16, 32, 2, 4, 2, 50, tied=True, vision_width=8, vision_mlp=12, vision_layers=1, full_layers=1)


def test_the_longer_of_moving_and_computing():
    device = Device(100.0, 1000.0)
    moving, computing = Work(90.0, 1.0), Work(1.0, 790.0)
    assert moving.seconds(device) == 0.9 and moving.bound(device) == "memory"
    assert computing.seconds(device) == 0.79 and computing.bound(device) == "compute"
    assert moving + computing == Work(91.0, 791.0) and moving.times(3) == Work(270.0, 3.0)


def test_devices_reach_a_share_of_their_nominal_figures():
    assert DEVICES["H200"] == Device(4.8e12 * COPY_SHARE, 989.5e12 * MATRIX_SHARE)
    assert set(DEVICES) == set(BANDWIDTH) == {"A100", "H100", "H200", "B200"}


def test_a_resampler_counted_by_hand():
    """One box, 8 queries, 8 heads, 3 tokens of width 16, every product written out."""
    rows, width, tokens = 8, 16, 3
    projections = 4 * 2 * rows * width * width  # queries, keys folded in, values and output taken out
    attention = 2 * 2 * (8 * rows) * tokens * width  # scores and context of 64 rows
    work = resampler_work(1, tokens, tokens, width)
    assert work.flops == projections + attention and work.bytes == 2 * (4 * width * width + tokens * width)
    both = resampler_work(1, tokens, tokens, width, backward=True)
    assert both.flops == 3 * work.flops and both.bytes == 2 * (12 * width * width + 2 * tokens * width)


def test_per_token_flops_fall_by_what_the_algebra_says():
    width = 3584

    def per_token(work):
        return work(10_001).flops - work(10_000).flops

    ours = per_token(lambda n: resampler_work(1, n, n, width))
    stock = per_token(lambda n: projected_work(1, n, width))
    assert ours == 4 * 64 * width and stock == 4 * width * width + 4 * 8 * width
    assert (stock - 4 * 8 * width) / ours == 56


def test_extra_memory():
    assert resampler_extra_bytes(2, 100, 16, 4) == 4 * (4 * 2 * 64 * 16 + 2 * 64 * 100)
    assert projected_extra_bytes(100, 16, 4) == 4 * (6 * 100 * 16 - 3 * 16 * 16)
    assert projected_extra_bytes(10, 16, 4) == 4 * 3 * 16 * 16
    plan = Plan("stage1", "ddp", world=1, precision="float32", checkpointing=False, tokens=100, accumulation=1)
    assert training_extra_bytes(TINY, plan) > training_extra_bytes(TINY, replace(plan, checkpointing=True))
    more = training_extra_bytes(TINY, replace(plan, supervised_share=0.2)) - training_extra_bytes(TINY, plan)
    assert more == 10 * 50 * 16  # ten further rows of logits


def test_small_operators():
    assert roi_align_work(2, 7, 100, 400, 16, 4, False) == Work(4 * 16 * (100 + 98), 2 * 98 * 16 * 16)
    both = roi_align_work(2, 7, 100, 400, 16, 4, True)
    assert both == Work(2 * 4 * 16 * (100 + 98) + 4 * 16 * 400, 2 * 2 * 98 * 16 * 16)
    assert distillation_work(10, 40, 5, 4, False) == Work(4 * 30, 0)
    assert distillation_work(10, 40, 5, 4, True) == Work(2 * 4 * 30 + 4 * 50, 0)
    work = cross_entropy_work(10, 4, 100)
    assert work.flops == 3 * 2 * 10 * 4 * 100 and work.bytes == 2 * (4 * 400 + 2 * 40)


def test_decode_steps_are_bound_by_the_weights():
    text, latent = (decode_work(NAMED["7b"], 1, 1000, text) for text in (True, False))
    assert latent.bytes == pytest.approx(13.1e9, rel=0.01) and text.bytes - latent.bytes == 2 * 152064 * 3584
    assert text.bound(DEVICES["H200"]) == "memory"
    assert text.seconds(DEVICES["H200"]) == pytest.approx(3.3e-3, rel=0.02)
    per_token = decode_work(NAMED["7b"], 1, 1001, True).bytes - text.bytes
    assert per_token == 2 * 2 * 28 * 4 * 128  # keys and values of 4 heads of 128 in 28 layers: 57 KB


def test_decode_weights_are_those_of_the_model():
    """Everything of a real (tiny) model but its embedding is read once per step."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from random_model import random_model
    finally:
        sys.path.remove(str(ROOT / "bench"))
    shape = ModelShape(64, 96, 2, 4, 2, 320, False, vision_width=32, vision_mlp=48, vision_layers=1, full_layers=1)
    host, _ = random_model(shape, "cpu", torch.float32, heads=1)
    decoder = host.model.language_model
    read = [*decoder.layers.parameters(), *decoder.norm.parameters(), host.lm_head.weight]
    assert decode_work(shape, 1, 0, True, 4).bytes == sum(p.nbytes for p in read)


def test_prefill_and_generation():
    one, two = prefill_work(TINY, 1, 10, 10), prefill_work(TINY, 2, 20, 10)
    assert one.bytes == two.bytes and two.flops == 2 * one.flops  # weights once, twice the tokens
    assert prefill_work(TINY, 1, 10, 10, visual=4).flops > one.flops
    first = 2 * TINY.layers * TINY.layer_matrices * 10 + TINY.layers * 2 * 16 * 10 * 10 + 2 * TINY.embedding
    assert one.flops == first
    assert generation_work(TINY, 1, 10, 1) == one
    assert generation_work(TINY, 1, 10, 3) == one + decode_work(TINY, 1, 11, True) + decode_work(TINY, 1, 12, True)


def test_a_training_step():
    plan = Plan("stage1", "ddp", world=1, precision="float32", tokens=100, sample_tokens=50, accumulation=1)
    once, twice = (training_work(TINY, plan), training_work(TINY, replace(plan, accumulation=2)))
    assert twice.flops == 2 * once.flops and once.bytes < twice.bytes < 2 * once.bytes  # one optimizer step
    cached = training_work(TINY, replace(plan, feature_cache=True))
    assert once.bytes - cached.bytes == 4 * TINY.vision and cached.flops < once.flops
    adapters = training_work(TINY, replace(plan, lora_rank=2))
    assert adapters.bytes < once.bytes and adapters.flops < once.flops


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import performance_tables

        yield performance_tables
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_the_page_of_predictions_is_up_to_date(tables):
    written = (ROOT / "bench" / "predictions.md").read_text().splitlines()
    assert written == tables.page(), "python bench/performance_tables.py > bench/predictions.md"


def test_the_performance_model_names_its_functions():
    """Every function that docs/performance.md gives a formula for exists, and every one here is explained there."""
    import vreflection.benchmarking.prediction as prediction

    text = (ROOT / "docs" / "performance.md").read_text()
    functions = {name for name in dir(prediction) if name.endswith(("_work", "_extra_bytes"))}
    explained = set(re.findall(r"`(\w+(?:_work|_extra_bytes))`", text))
    assert explained <= functions and functions - explained <= {"generation_work"}
