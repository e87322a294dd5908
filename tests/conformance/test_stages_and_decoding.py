import pytest
import torch

from vreflection.model.config import VReflectionConfig
from vreflection.model.modeling import VReflectionForConditionalGeneration


def build(meta, numbers):
    ids = meta["token_ids"]
    config = VReflectionConfig(
        text_config=dict(meta["text_config"]),
        vision_config=meta["vision_config"],
        tie_word_embeddings=meta["text_config"]["tie_word_embeddings"],
        stage=f"stage{meta['stage']}",
        num_latent_tokens=meta["num_latent_tokens"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        lvr_start_id=ids["lvr_start"],
        lvr_id=ids["lvr"],
        lvr_latent_end_id=ids["lvr_latent_end"],
        lvr_end_id=ids["lvr_end"],
    )
    model = VReflectionForConditionalGeneration(config)
    state = {name.removeprefix("state."): v for name, v in numbers.items() if name.startswith("state.")}
    model.load_state_dict(state, strict=True)
    model.freeze_for_stage()
    return model


def relative(got, expected):
    return abs(float(got) - expected) / max(abs(expected), 1e-12)


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_losses_logits_and_gradients(golden, stage):
    meta, numbers = golden(f"stage{stage}.json"), golden(f"stage{stage}.safetensors")
    model = build(meta, numbers)
    weight = "alignment_weight" if stage == 1 else "distillation_weight"
    settings = {weight: meta["latent_loss_weight"], "attention_kl_weight": meta["attention_kl_weight"]}
    model.objective = type(model.objective).for_stage(f"stage{stage}", **settings)
    batch = {name.removeprefix("in."): value for name, value in numbers.items() if name.startswith("in.")}
    rows = torch.arange(len(batch["input_ids"]))
    image_tokens = (batch["input_ids"] == model.config.image_token_id).int()
    output = model(**batch, mm_token_type_ids=image_tokens, box_sample=rows, box_image=rows, all_logits=True)

    real = batch["attention_mask"].bool()
    assert (output.last_hidden_state - numbers["out.last_hidden"])[real].abs().max() < 1e-4
    assert (output.logits - numbers["out.logits"])[real].abs().max() < 1e-4
    assert relative(output.loss, meta["loss"]) < 1e-5
    assert relative(output.losses["cross_entropy"], meta["cross_entropy"]) < 1e-5
    if stage == 1:
        assert relative(output.losses["latent_alignment"], meta["latent_mse"]) < 1e-5
    else:
        assert relative(output.losses["latent_mse"], meta["latent_mse"]) < 1e-5
        assert relative(output.losses["attention_kl"], meta["attention_kl"]) < 1e-5
        mixed = output.losses["latent_mse"] + meta["attention_kl_weight"] * output.losses["attention_kl"]
        assert relative(mixed, meta["latent_loss"]) < 1e-5

    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(meta["grad_norms"])
    for name, norm in meta["grad_norms"].items():
        assert relative(gradients[name].norm(), norm) < 1e-4, name
    for name, expected in numbers.items():
        if name.startswith("grad."):
            got = gradients[name.removeprefix("grad.")]
            assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max())), name


def test_decoding_in_parity_mode(golden):
    meta, numbers, hidden = golden("stage2.json"), golden("stage2.safetensors"), golden("decode_hidden.safetensors")
    model = build(meta, numbers).eval()
    grids = numbers["in.image_grid_thw"]
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), grids.prod(dim=1).cumsum(0)])
    cases = golden("decode.json")
    assert {case["name"] for case in cases} == set(hidden)
    for case in cases:
        ids = torch.tensor(case["input_ids"])
        pixels = torch.cat([numbers["in.pixel_values"][bounds[s] : bounds[s + 1]] for s in case["samples"]])
        result = model.generate(
            ids,
            torch.tensor(case["attention_mask"]),
            pixels,
            grids[case["samples"]],
            (ids == model.config.image_token_id).int(),
            latent_steps=case["latent_steps"],
            allow_other_latent_steps=True,
            latent_mode="parity",
            repetition_penalty=case["repetition_penalty"],
            max_new_tokens=len(case["new_tokens"][0]),
            eos_token_id=case["eos"],
            pad_token_id=case["pad"],
            return_dict_in_generate=True,
            return_latents=True,
        )
        assert result.sequences[:, ids.shape[1] :].tolist() == case["new_tokens"], case["name"]
        expected = hidden[case["name"]]
        assert result.step_hidden.shape == expected.shape
        assert (result.step_hidden - expected).abs().max() < 1e-4, case["name"]
