"""The plan's arithmetic against reality: parameters of the real shapes, what autograd keeps, and what must follow."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vreflection.errors import ConfigError
from vreflection.model.config import VReflectionConfig
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.training.memory_plan import (
    GIB,
    Plan,
    all_parameters,
    describe,
    format_plan,
    memory_row,
    plan_of,
    plan_table,
    saved_bytes,
    static_bytes,
    trained_parameters,
    usual_plans,
    weight_copies,
)
from vreflection.training.model_shape import NAMED, model_shape, shape_from_config
from vreflection.training.settings import TrainSettings
from vreflection.training.step_time import GPUS, UTILISATION, micro_batch_flops, step_time

REAL = {  # (text settings, tied)
    "7b": ((3584, 18944, 28, 28, 4, 152064), False),
    "3b": ((2048, 11008, 36, 16, 2, 151936), True),
}
TEXT_NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip


def real_config(name):
    from transformers import Qwen2_5_VLConfig

    sizes, tied = REAL[name]
    text = dict(zip(TEXT_NAMES, sizes, strict=True))
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": sizes[0],
        "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied
    )


@pytest.mark.parametrize(("name", "published"), [("7b", 8_292_166_656), ("3b", 3_754_622_976)])
@pytest.mark.parametrize("stage", ["base", "stage1", "stage2"])
def test_parameters_of_the_real_models_are_exact(name, published, stage):
    config = VReflectionConfig.from_base_config(real_config(name), stage)
    with torch.device("meta"):
        model = VReflectionForConditionalGeneration(config)
    model.freeze_for_stage()
    shape, plan = NAMED[name], Plan(stage=stage)
    assert shape_from_config(json.loads(config.to_json_string())) == shape
    assert shape.vision == sum(p.numel() for p in model.model.visual.parameters())
    assert all_parameters(shape, plan) == sum(p.numel() for p in model.parameters())
    assert trained_parameters(shape, plan) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.language + shape.vision == published
    if (name, stage) == ("7b", "stage2"):
        assert (shape.teacher, shape.student) == (51_430_400, 51_401_728)


def test_adapters_are_counted_as_peft_builds_them():
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        model = VReflectionForConditionalGeneration(VReflectionConfig.from_base_config(real_config("3b"), "base"))
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(r=16, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"),
        )
    built = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert NAMED["3b"].adapters(16) == built + 4 * 2048  # and the latent tokens' rows


def small_model(tiny, stage="stage1"):
    base = tiny.host_config()
    text = base.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 96, 256, 6
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 6, 2, ["full_attention"] * 6
    base.vision_config.out_hidden_size = 96
    config = VReflectionConfig.from_base_config(base, stage, **tiny.LATENT_SETTINGS)
    model = VReflectionForConditionalGeneration(config)
    model.freeze_for_stage()
    return model.train()


def kept_by_autograd(model, batch, autocast):
    """Bytes of everything autograd keeps for the backward pass, parameters aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_activations_are_what_autograd_keeps(tiny, precision, checkpointing):
    model = small_model(tiny)
    batch = tiny.batch([tiny.row([(16, 24)], [((0.1, 0.1, 0.4, 0.4), 0)], answer=tuple(range(10, 40)))])
    if precision == "bfloat16":
        model = model.bfloat16()
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable()
    shape = shape_from_config(json.loads(model.config.to_json_string()))
    plan = Plan(
        parallel="ddp", world=1, precision=precision, tokens=batch["input_ids"].numel(), checkpointing=checkpointing,
        repeated_keys=False,
    )  # fmt: skip
    measured = kept_by_autograd(model, batch, precision == "mixed")
    log_probabilities = 4 * int((batch["labels"] != -100).sum()) * shape.vocabulary
    copies = weight_copies(shape, plan)
    if checkpointing and copies:
        copies -= 2 * shape.layers * shape.layer_matrices  # autograd makes them again; the cast cache is not seen here
    predicted = saved_bytes(shape, plan) + copies + log_probabilities
    assert predicted == pytest.approx(measured, rel=0.12 if checkpointing else 0.06)


def test_sharding_divides_exactly_what_it_shards():
    shape = NAMED["7b"]
    trained, everything = (count(shape, Plan()) for count in (trained_parameters, all_parameters))
    whole = static_bytes(shape, Plan(parallel="ddp", world=1))
    assert (
        whole["weights"] == 4 * everything and whole["gradients"] == 4 * trained and whole["optimizer"] == 8 * trained
    )
    eighth = static_bytes(shape, Plan(parallel="fsdp2", world=8))
    for name in ("weights", "gradients", "optimizer"):
        assert eighth[name] == whole[name] / 8
    zero = {kind: static_bytes(shape, Plan(parallel=kind, world=8)) for kind in ("zero1", "zero2", "zero3")}
    assert zero["zero1"]["optimizer"] == 12 * trained / 8 and zero["zero1"]["gradients"] == 2 * trained
    assert zero["zero2"]["gradients"] == 2 * trained / 8 and zero["zero2"]["weights"] == 2 * everything
    resident = shape.vision + shape.teacher  # some processes run them and others do not: whole everywhere
    assert zero["zero3"]["weights"] == pytest.approx(2 * (everything - resident) / 8 + 2 * resident)
    pure = static_bytes(shape, Plan(parallel="ddp", world=1, precision="bfloat16"))
    assert sum(pure.values()) == 8 * trained + 2 * (everything - trained)
    # Published rule of thumb: 16 bytes per trained parameter, whatever the split.
    assert (
        sum(whole[name] for name in ("weights", "gradients", "optimizer")) - 4 * (everything - trained) == 16 * trained
    )


def test_frozen_weights_are_copied_layer_by_layer():
    shape, plan = NAMED["7b"], Plan(parallel="ddp", world=1, stage="sft")
    assert weight_copies(shape, plan) == 2 * (28 * shape.layer_matrices + shape.embedding)
    adapted = replace(plan, lora_rank=8)
    assert weight_copies(shape, adapted) == 2 * (shape.layer_matrices + shape.embedding)
    assert weight_copies(shape, replace(adapted, checkpointing=False)) == weight_copies(shape, plan)
    assert weight_copies(shape, replace(plan, precision="bfloat16")) == 0


def test_savings_save():
    shape, plan = NAMED["7b"], Plan(checkpointing=False)
    base = memory_row(shape, plan)
    for change, part in (
        ({"checkpointing": True}, "activations"),
        ({"feature_cache": True}, "vision pass"),
        ({"fused_cross_entropy": True}, "logits"),
        ({"lora_rank": 16}, "optimizer"),
    ):
        assert memory_row(shape, replace(plan, **change)).parts[part] < base.parts[part], part
    naive = memory_row(shape, replace(plan, all_positions=True))
    assert naive.parts["logits"] == pytest.approx(base.parts["logits"] / plan.supervised_share, rel=1e-3)
    totals = [memory_row(shape, replace(plan, world=world)).total for world in (1, 2, 4, 8, 16, 32, 64)]
    assert totals[1:] == sorted(totals[1:], reverse=True)
    assert memory_row(shape, replace(plan, tokens=32768)).total > base.total


def test_what_fits():
    rows = {row.plan: row for row in plan_table("7b")}
    full = rows[Plan(parallel="ddp", world=1)]
    assert full.fits == () or min(full.fits) == 192  # 7B in full with float32 masters fits no smaller single GPU
    adapters = rows[Plan(parallel="ddp", world=1, precision="bfloat16", lora_rank=64)]
    assert min(adapters.fits) == 40 and 80 in adapters.fits
    assert 80 in rows[Plan(parallel="fsdp2", world=8)].fits
    for row in rows.values():
        parts = dict(row.parts)
        vision = parts.pop("vision pass")
        passing = sum(parts[name] for name in ("activations", "logits", "visual tokens"))
        assert row.total == pytest.approx(sum(parts.values()) + max(0, vision - passing))


def test_flops_follow_the_rule_of_six():
    shape = NAMED["7b"]
    plan = Plan(feature_cache=True, all_positions=True, sample_tokens=1, checkpointing=False)
    model, done = micro_batch_flops(shape, plan)
    matrices = shape.layers * shape.layer_matrices + shape.embedding
    assert model == done == pytest.approx(6 * matrices * plan.tokens, rel=1e-3)
    layers_only = replace(plan, supervised_share=1e-9, all_positions=False)
    model, _ = micro_batch_flops(shape, layers_only)
    _, recomputed = micro_batch_flops(shape, replace(layers_only, checkpointing=True))
    assert recomputed / model == pytest.approx(4 / 3, rel=1e-4)
    _, adapted = micro_batch_flops(shape, replace(layers_only, lora_rank=8))
    assert adapted / model == pytest.approx(2 / 3, rel=1e-4)
    seen, _ = micro_batch_flops(shape, replace(layers_only, feature_cache=False))
    vision = (
        2 * (shape.vision - shape.merger_matrices) * plan.visual_tokens * 4
        + 2 * shape.merger_matrices * plan.visual_tokens
    )
    assert seen - model == pytest.approx(vision, rel=0.02)


def test_step_time_takes_the_longer_of_work_and_traffic():
    shape = NAMED["7b"]
    alone = step_time(shape, Plan(world=1, parallel="ddp"), "H100")
    assert alone.communicate == 0 and alone.seconds == alone.compute
    assert alone.utilisation < UTILISATION  # recomputation is work, not the model's
    assert step_time(shape, Plan(world=1, parallel="ddp", checkpointing=False), "H100").utilisation == pytest.approx(
        UTILISATION
    )
    wide = step_time(shape, Plan(world=64, tokens=1024), "B200")
    assert wide.seconds == wide.communicate > wide.compute
    reduce = step_time(shape, Plan(world=8, parallel="ddp"), "A100").communicate
    trained = trained_parameters(shape, Plan())
    assert reduce == pytest.approx(2 * 7 / 8 * 4 * trained / (0.7 * 300e9))
    speeds = [step_time(shape, Plan(), name).tokens_per_second for name in GPUS]
    assert speeds == sorted(speeds)


def test_names_and_folders(tmp_path, tiny):
    assert model_shape("Qwen/Qwen2.5-VL-7B-Instruct") == NAMED["7b"] == model_shape("7b")
    assert model_shape("Qwen/Qwen2.5-VL-3B-Instruct").tied
    for bad in ("runs/stage1", "Qwen/Qwen2.5-VL-72B-Instruct"):
        with pytest.raises(ConfigError, match=r"expected a checkpoint folder or a name with \['3b', '7b'\]"):
            model_shape(bad)
    with pytest.raises(ConfigError, match="expected the config.json of a checkpoint"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="expected the settings of a Qwen2.5-VL, got none for 'hidden_size'"):
        model_shape(tmp_path)
    config = VReflectionConfig.from_base_config(real_config("3b"), "stage1")
    config.save_pretrained(tmp_path)
    assert model_shape(tmp_path) == NAMED["3b"]


def test_settings_become_a_plan():
    settings = TrainSettings(
        stage="stage2", model="x", parallel="fsdp2",
        trainer={"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 4},
    )  # fmt: skip
    settings = replace(settings, data=replace(settings.data, pack_tokens=4096, feature_store="f"))
    plan = plan_of(settings, world=8, sample_tokens=300)
    assert plan == Plan(
        stage="stage2", parallel="fsdp2", world=8, precision="mixed", tokens=4096, sample_tokens=300,
        feature_cache=True, accumulation=4,
    )  # fmt: skip
    adapters = replace(settings, dtype="bfloat16", parallel="ddp", lora=replace(settings.lora, rank=64))
    assert plan_of(adapters) == replace(
        plan, parallel="ddp", world=1, precision="bfloat16", lora_rank=64, sample_tokens=1024
    )
    plain = TrainSettings(stage="sft", trainer={"per_device_train_batch_size": 2}, dtype="bfloat16")
    plan = plan_of(plain)
    assert (plan.tokens, plan.precision, plan.checkpointing, plan.world) == (2 * 16384, "bfloat16", False, 1)


def test_bad_plans():
    for changes, message in (
        ({"parallel": "pipeline"}, "parallel: expected one of"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"world": 0}, "world: expected at least 1"),
        ({"parallel": "zero2", "precision": "bfloat16"}, "precision: expected 'mixed', as DeepSpeed"),
    ):
        with pytest.raises(ConfigError, match=message):
            Plan(**changes)


def test_the_table_says_what_it_holds():
    rows = plan_table("3b", gpus=("H100",))
    text = format_plan(rows).splitlines()
    assert len(text) == len(usual_plans()) + 3 and "H100 tok/s (s/step)" in text[0]
    row = rows[0]
    assert f"{row.total / GIB:.1f}" in text[2] and text[2].startswith("ddp x1 mixed")
    assert "16,384 tokens per micro-batch x 8" in text[-1]
    assert format_plan([]) == "no plans"


def test_planning_loads_no_torch():
    code = "import sys, vreflection.training.memory_plan as m; m.plan_table('7b'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def documented_lines():
    """The 7B table of docs/memory.md, as the plan has it."""
    for row in plan_table("7b", gpus=("A100", "H100", "B200")):
        parts = row.parts
        held = [parts[name] for name in ("weights", "gradients", "optimizer")]
        besides = parts["weight copies"] + parts["communication"]
        cells = [*held, besides, parts["activations"], parts["logits"], row.total]
        fits = f"{min(row.fits)}" if row.fits else "none"
        seconds = " / ".join(f"{time.seconds:.1f}" for time in row.times.values())
        yield (
            f"| {describe(row.plan)} | "
            + " | ".join(f"{cell / GIB:.1f}" for cell in cells)
            + f" | {fits} | {seconds} |"
        )


def test_the_documented_table_is_the_plan():
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    for line in documented_lines():
        assert line in text.splitlines(), f"docs/memory.md: expected the row {line}"
