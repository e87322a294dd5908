"""Low-rank adapters: only they and the modules train; they merge into a plain checkpoint; they resume."""

import pytest
import torch

from vreflection.errors import CheckpointError, ConfigError
from vreflection.model.modeling import VReflectionForConditionalGeneration as Model
from vreflection.training.adapters import add_adapters, merge_adapters
from vreflection.training.run import run_training
from vreflection.training.settings import LoraSettings, TrainSettings
from vreflection.training.values import build


def train(values):
    return run_training(build(TrainSettings, values, "test"))


@pytest.mark.parametrize("tie", [False, True])
def test_what_trains_and_what_merging_leaves(tiny, tie):
    model = tiny.model("stage1", tie=tie)
    batch = tiny.batch([tiny.row([(3, 4)], [([0.1, 0.2, 0.6, 0.7], 0)])])
    names = set(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = model(**batch).loss.detach()
    add_adapters(model, LoraSettings(rank=4))
    torch.testing.assert_close(model(**batch).loss.detach(), start)  # adapters begin as nothing
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and not any("visual" in name for name in trainable)
    assert all("lora_" in n or "trainable_tokens" in n or n.startswith("box_feature_resampler") for n in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    trained = model(**batch).loss.detach()
    assert trained < start
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(**batch).loss.detach(), trained, rtol=1e-5, atol=1e-5)
    rows = [i for i in range(tiny.VOCABULARY) if not tiny.LVR_START <= i <= tiny.LVR_END]
    weights = model.get_input_embeddings().weight
    assert torch.equal(weights[rows], before["model.language_model.embed_tokens.weight"][rows])
    assert not torch.equal(weights[tiny.LVR], before["model.language_model.embed_tokens.weight"][tiny.LVR])
    if tie:
        assert model.lm_head.weight is weights


def test_a_run_with_adapters_ends_in_a_plain_checkpoint(mixed):
    result = train(mixed.settings("lora", lora={"rank": 4}, trainer={"save_strategy": "steps", "save_steps": 2}))
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < losses[0]
    loaded = Model.from_pretrained(mixed.root / "lora", expect_stage="stage1")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    stored = mixed.root / "lora" / "checkpoint-2"
    assert (stored / "adapters.safetensors").exists() and not (stored / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds adapters of an unfinished run.*--resume"):
        Model.from_pretrained(stored)


def test_wrong_ways_to_use_them_are_refused(mixed):
    steps = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ConfigError, match="lora: expected parallel=ddp"):
        train(mixed.settings("x", lora={"rank": 2}, parallel="zero2"))
    with pytest.raises(ConfigError, match="rank >= 0, alpha > 0"):
        build(TrainSettings, mixed.settings("x", lora={"rank": -1}), "test")
    with pytest.raises(ConfigError, match="need mixed precision; --set trainer.bf16=true"):
        train(mixed.settings("x", lora={"rank": 2}, dtype="bfloat16"))
    train(mixed.settings("full", trainer=steps))
    with pytest.raises(CheckpointError, match="lora.rank: 0 then, 2 now"):
        train(mixed.settings("full", lora={"rank": 2}, trainer=steps, resume=True))
    train(mixed.settings("other", lora={"rank": 2}, trainer=steps))
    with pytest.raises(CheckpointError, match="lora.rank: 2 then, 4 now"):
        train(mixed.settings("other", lora={"rank": 4}, trainer=steps, resume=True))
