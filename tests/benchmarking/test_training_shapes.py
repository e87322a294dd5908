"""What the GPU suite trains at 7B and 3B, as far as a CPU can tell: sizes, packing, the step at a tiny size."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def shapes():
    sys.path.insert(0, str(BENCH))
    try:
        import training_shapes

        yield training_shapes
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize(("name", "parameters"), [("7b LoRA", 8_292_166_656), ("3b full", 3_754_622_976)])
def test_the_real_sizes_have_the_real_number_of_parameters(shapes, name, parameters):
    import random_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        host = Qwen2_5_VLForConditionalGeneration(random_model.host_config(shapes.RUNS[name].shape))
    assert sum(p.numel() for p in host.parameters()) == parameters
    assert host.config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    assert host.config.vision_config.num_heads == 16
    text = host.config.get_text_config()
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2 == 64


def test_a_pack_is_full_and_described_as_it_is(shapes):
    run = shapes.RUNS["7b LoRA"]
    config = shapes.build(shapes.RUNS["tiny full"], "cpu", torch.float32).config
    batch, samples = shapes.packed_batch(config, run.tokens, "cpu")
    assert 0.98 * run.tokens < batch["input_ids"].numel() <= run.tokens
    plan = shapes.case.described(run.plan, samples, config)
    assert plan.tokens == batch["input_ids"].numel() and plan.lora_rank == 64
    assert plan.visual_share * plan.tokens == pytest.approx(int((batch["input_ids"] == config.image_token_id).sum()))
    assert plan.supervised_share * plan.tokens == pytest.approx(int((batch["labels"] != -100).sum()))


@pytest.mark.parametrize("name", ["tiny LoRA", "tiny full"])
def test_a_step_trains_what_it_should(shapes, name):
    run = shapes.RUNS[name]
    if run.lora_rank:
        pytest.importorskip("peft")
    model = shapes.build(run, "cpu", torch.float32)
    assert model.is_gradient_checkpointing
    batch, _ = shapes.packed_batch(model.config, 400, "cpu")
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any("lora_" in n for n in trained) == bool(run.lora_rank)
    assert not any("visual" in n for n in trained)
    step = shapes.step_of(model, batch, fused=False)
    first, second = step(), step()
    assert first > 0 and second == pytest.approx(first, rel=1e-3)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert sum(not torch.equal(now[n], p) for n, p in trained.items()) > len(trained) / 2
