"""Rolled-out slots are the model's own fed-back states, as decoding would feed them."""

import pytest
import torch

from vreflection.model.layout import BatchLayout
from vreflection.training.free_running import choose_samples, roll_out, rounds_needed
from vreflection.training.gauges import latent_gauges


def test_the_share_is_kept_over_steps_and_the_draw_is_a_function_of_its_arguments():
    for batch, share in ((4, 0.25), (3, 0.5), (1, 0.3), (8, 0.05)):
        draws = torch.stack([choose_samples(batch, share, 0, step) for step in range(3000)])
        assert abs(draws.float().mean().item() - share) < 0.03
        # Everyone's turn comes equally often, and the count is never further off than one.
        assert (draws.float().mean(0) - share).abs().max() < 0.05
        assert {*draws.sum(1).tolist()} <= {int(batch * share), int(batch * share) + 1}
    assert torch.equal(choose_samples(8, 0.5, 3, 7), choose_samples(8, 0.5, 3, 7))
    others = [choose_samples(64, 0.5, *key) for key in ((3, 8), (4, 7))]
    assert not any(torch.equal(other, choose_samples(64, 0.5, 3, 7)) for other in others)
    assert choose_samples(5, 1.0, 0, 0).all() and not choose_samples(5, 0.0, 0, 0).any()


@pytest.fixture
def rows(tiny):
    return [
        tiny.row([(2, 3)], [((0.1, 0.1, 0.6, 0.9), 0), ((0.0, 0.0, 1.0, 1.0), 0)]),
        tiny.row(question=(5,)),
        tiny.row([(1, 2), (3, 2)], [((0.2, 0.2, 0.8, 0.7), 1)], question=(3, 4)),
        tiny.row([(2, 2)], [((0.0, 0.0, 0.5, 0.5), 0)], question=(6, 7, 8, 9)),
    ]


def rolled(model, batch, chosen):
    layout = BatchLayout.from_batch(
        model.config,
        *(batch[k] for k in ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image")),
    )
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    tokens = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    return roll_out(model, batch["input_ids"], positions, tokens, layout, torch.tensor(chosen))


def test_first_spans_equal_generate(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    states, free = rolled(model, batch, [True] * 4)
    assert free.all() and states.shape == (4, tiny.SLOTS, tiny.WIDTH)
    prompts = [tiny.row(r.images, r.boxes) for r in rows]
    for r, p in zip(rows, prompts):
        p.ids, p.labels = r.ids[: r.prompt], r.labels[: r.prompt]
        p.boxes = []
    inputs = tiny.batch(prompts, padding="left")
    inputs.pop("labels")
    output = model.generate(
        **inputs, force_latent=True, max_new_tokens=2, eos_token_id=300, pad_token_id=tiny.PAD,
        return_dict_in_generate=True, return_latents=True,
    )  # fmt: skip
    for span, row in ((0, 0), (2, 2), (3, 3)):
        torch.testing.assert_close(states[span], output.latents[row][0], rtol=1e-4, atol=1e-4)


def test_every_span_feeds_on_itself_and_on_the_spans_before_it(tiny, rows):
    """In one parallel pass, the state before each slot is what the slot holds."""
    model, batch = tiny.model("stage1"), tiny.batch(rows)
    states, free = rolled(model, batch, [True] * 4)
    hidden = model(**batch, slot_inputs=states, free_running=free).last_hidden_state
    before = hidden.roll(1, dims=1)[batch["input_ids"] == tiny.LVR].view_as(states)
    torch.testing.assert_close(before, states, rtol=1e-4, atol=1e-4)


def test_only_chosen_samples_are_rolled_out(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    whole, _ = rolled(model, batch, [True] * 4)
    states, free = rolled(model, batch, [True, True, False, False])
    assert free.tolist() == [True, True, False, False] and (states[2:] == 0).all()
    torch.testing.assert_close(states[:2], whole[:2], rtol=1e-4, atol=1e-4)
    states, free = rolled(model, batch, [False, True, False, True])
    assert free.tolist() == [False, False, False, True] and (states[:3] == 0).all()
    torch.testing.assert_close(states[3], whole[3], rtol=1e-4, atol=1e-4)


def test_packed_samples_roll_out_as_they_would_in_rows_of_their_own(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    expected, _ = rolled(model, batch, [True] * 4)
    lengths = batch["attention_mask"].sum(1)
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    kept = batch["attention_mask"].bool()
    keys = ("image_grid_thw", "boxes", "box_sample", "box_image")
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    layout = BatchLayout.from_batch(
        model.config, batch["input_ids"][kept][None], None, *(batch[k] for k in keys), cu_seqlens=bounds
    )
    tokens = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    states, free = roll_out(
        model, batch["input_ids"][kept][None], positions[:, kept][:, None], tokens, layout, torch.ones(4).bool()
    )
    assert free.all()
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_rounds_run_along_with_others_change_nothing(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    layout = BatchLayout.from_batch(
        model.config,
        *(batch[k] for k in ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image")),
    )
    chosen = torch.tensor([False, True, True, False])
    assert rounds_needed(layout, chosen) == 1 and rounds_needed(layout, torch.ones(4).bool()) == 2
    assert rounds_needed(layout, torch.tensor([False, True, False, False])) == 0
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    tokens = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    alone, _ = roll_out(model, batch["input_ids"], positions, tokens, layout, chosen)
    along, _ = roll_out(model, batch["input_ids"], positions, tokens, layout, chosen, rounds=3)
    torch.testing.assert_close(alone, along)
    assert len(calls) == (1 + 3) * tiny.SLOTS


def test_rolling_out_during_training_changes_nothing_else(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    expected, _ = rolled(model, batch, [True] * 4)
    model.train()
    model.gradient_checkpointing_enable()
    states, _ = rolled(model, batch, [True] * 4)
    assert model.training and not states.requires_grad and not tiny.gradients(model)
    torch.testing.assert_close(states, expected)


def test_rolling_out_under_autocast(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    expected, free = rolled(model, batch, [True] * 4)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = rolled(model, batch, [True] * 4)
        loss = model(**batch, slot_inputs=states, free_running=free).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.nn.functional.cosine_similarity(states.float(), expected, dim=-1).min() > 0.98


def test_gauges():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 3, 5, generator=generator)
    gauges = latent_gauges(latents)
    torch.testing.assert_close(gauges["std_over_samples"], latents.std(0).mean())
    torch.testing.assert_close(gauges["query_diversity"], latents.std(1).mean())
    assert latent_gauges(latents[:1].expand(6, -1, -1))["std_over_samples"] == 0
    assert latent_gauges(latents[:, :1].expand(-1, 3, -1))["query_diversity"] < 1e-6
    assert latent_gauges(latents[:1]) == {} and set(latent_gauges(latents[:, :1])) == {"std_over_samples"}
