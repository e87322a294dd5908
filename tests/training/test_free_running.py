"""Rolled-out slots are the model's own fed-back states, as decoding would feed them."""

from types import SimpleNamespace

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


def laid_out(model, batch):
    """What `roll_out` takes besides the model and the choice: ids, rope positions, visual tokens, layout."""
    layout = BatchLayout.from_batch(
        model.config,
        *(batch[k] for k in ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image")),
    )
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    tokens = model.visual_tokens(batch["pixel_values"].to(model.dtype), batch["image_grid_thw"])
    return batch["input_ids"], positions, tokens, layout


def rolled(model, batch, chosen, **settings):
    return roll_out(model, *laid_out(model, batch), torch.tensor(chosen), **settings)


def packed(model, batch):
    """The same as one packed row."""
    ids, positions, tokens, _ = laid_out(model, batch)
    kept = batch["attention_mask"].bool()
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), kept.sum(1).cumsum(0)])
    keys = ("image_grid_thw", "boxes", "box_sample", "box_image")
    layout = BatchLayout.from_batch(model.config, ids[kept][None], None, *(batch[k] for k in keys), cu_seqlens=bounds)
    return ids[kept][None], positions[:, kept][:, None], tokens, layout


@pytest.fixture
def talking(tiny):
    """Up to four spans a row, over several images, with texts of different lengths between them."""

    def row(images, boxes, gaps, question):
        one = tiny.row(images, boxes, question)
        ids = one.ids[: one.prompt]
        for gap in gaps:
            ids = ids + tiny.span() + [20 + gap + place for place in range(gap)]
        ids.append(tiny.EOS)
        labels = [-100] * one.prompt + ids[one.prompt :]
        return SimpleNamespace(ids=ids, labels=labels, images=images, boxes=boxes, prompt=one.prompt)

    box, other = (0.1, 0.1, 0.6, 0.9), (0.0, 0.3, 1.0, 1.0)
    return [
        row([(2, 3)], [(box, 0), (other, 0), (box, 0)], (0, 5, 1), (7, 8)),
        row([(1, 2), (3, 2)], [(box, 1), (other, 0)], (3, 2), (3,)),
        row([(2, 2)], [], (), (5, 6)),
        row([(2, 2)], [(box, 0)] * 4, (0, 0, 0, 4), (6, 7, 8, 9)),
        row([(3, 3)], [(other, 0)], (2,), (4,)),
    ]


def step_by_step(model, ids, positions, tokens, layout):
    """The definition: every slot holds the state before it, and the whole prefix is computed for each of them."""
    flat = list(model.embed(ids, tokens, layout).flatten(0, 1).unbind())
    positions, slots = positions[-3:].flatten(1), layout.slot_index_BQ.tolist()
    for sample, span in zip(layout.box_sample.tolist(), slots):
        start = int(layout.starts[sample])
        for slot in span:
            prefix = torch.stack(flat[start:slot])[None]
            flat[slot] = model.model.language_model(
                inputs_embeds=prefix, position_ids=positions[:, None, start:slot], use_cache=False
            ).last_hidden_state[0, -1]
    return torch.stack([torch.stack([flat[slot] for slot in span]) for span in slots])


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_states_are_those_of_the_prefix_computed_again_for_every_slot(tiny, talking, way):
    model = tiny.model("stage2").double()
    inputs = (laid_out if way == "padded" else packed)(model, tiny.batch(talking))
    with torch.no_grad():
        expected = step_by_step(model, *inputs)
    states, free = roll_out(model, *inputs, torch.ones(5).bool())
    assert free.all() and len(states) == 10 and not states.requires_grad
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)
    single = tiny.model("stage2")
    states, _ = roll_out(single, *(laid_out if way == "padded" else packed)(single, tiny.batch(talking)),
                         torch.ones(5).bool())  # fmt: skip
    torch.testing.assert_close(states.double(), expected, rtol=1e-5, atol=1e-5)


def test_each_token_is_computed_once(tiny, talking):
    """A prefix once, then the texts between spans and the slots, in one call per text whatever its length."""
    model, batch = tiny.model("stage2"), tiny.batch(talking)
    inputs, lengths = laid_out(model, batch), []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    roll_out(model, *inputs, torch.ones(5).bool())
    prompts = [r.prompt + 1 for r in talking if r.boxes]
    # After the last slot's state: <|lvr_end|>, the text, <|lvr_start|>.
    rounds = [(4, max(prompts)), (3, 3 + 3), (2, 3 + 5), (1, 3)]
    assert lengths == [call for rows, columns in rounds for call in [(rows, columns), (rows, 1), (rows, 1)]]


def test_the_training_pass_has_the_gradient_through_the_fed_back_states(tiny, talking):
    """Against a loop in which every slot's state is computed, in the graph, from those before it."""
    model = tiny.model("stage1").double()
    batch = tiny.batch(talking)
    batch["pixel_values"] = batch["pixel_values"].double()
    inputs = laid_out(model, batch)
    everything = torch.ones(len(inputs[3].boxes)).bool()

    def loss_and_gradients(states):
        model.zero_grad()
        loss = model(**batch, slot_inputs=states, free_running=everything).loss
        loss.backward()
        return loss.detach(), tiny.gradients(model)

    loss, expected = loss_and_gradients(step_by_step(model, *inputs))
    states, _ = roll_out(model, *inputs, torch.ones(5).bool(), backpropagate=True)
    same_loss, gradients = loss_and_gradients(states)
    torch.testing.assert_close(same_loss, loss, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # The host's norms round to float32 inside, whatever the model's dtype.
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-6 * float(expected[name].abs().max()), msg=name
        )
    fixed, _ = roll_out(model, *inputs, torch.ones(5).bool())
    without = loss_and_gradients(fixed)[1]
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(without[name], expected[name], rtol=1e-2)


def test_rows_that_are_not_rolled_out_have_no_part_in_the_chain(tiny, talking):
    model, batch = tiny.model("stage1"), tiny.batch(talking)
    states, free = rolled(model, batch, [False, True, False, False, True], backpropagate=True)
    assert free.tolist() == [False] * 3 + [True] * 2 + [False] * 4 + [True]
    assert states.requires_grad and (states[~free] == 0).all() and (states[free].abs().amax((1, 2)) > 0).all()


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
    states, free = roll_out(model, *packed(model, batch), torch.ones(4).bool())
    assert free.all()
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_rounds_run_along_with_others_change_nothing(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    inputs = laid_out(model, batch)
    layout, chosen = inputs[-1], torch.tensor([False, True, True, False])
    assert rounds_needed(layout, chosen) == 1 and rounds_needed(layout, torch.ones(4).bool()) == 2
    nobody = torch.tensor([False, True, False, False])
    assert rounds_needed(layout, nobody) == 0
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    alone, _ = roll_out(model, *inputs, chosen)
    along, _ = roll_out(model, *inputs, chosen, rounds=3)
    torch.testing.assert_close(alone, along)
    none, free = roll_out(model, *inputs, nobody, rounds=2)
    assert not none.any() and not free.any()
    assert len(calls) == (1 + 3 + 2) * tiny.SLOTS


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


def test_the_gradient_through_the_states_under_autocast(tiny, talking):
    model, batch = tiny.model("stage1"), tiny.batch(talking)
    inputs, gradients = laid_out(model, batch), []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states, free = roll_out(model, *inputs, torch.ones(5).bool(), backpropagate=True)
            loss = model(**batch, slot_inputs=states, free_running=free).loss
        loss.backward()
        gradients.append(torch.cat([gradient.flatten() for gradient in tiny.gradients(model).values()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_gauges():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 3, 5, generator=generator)
    gauges = latent_gauges(latents)
    torch.testing.assert_close(gauges["std_over_samples"], latents.std(0).mean())
    torch.testing.assert_close(gauges["query_diversity"], latents.std(1).mean())
    assert latent_gauges(latents[:1].expand(6, -1, -1))["std_over_samples"] == 0
    assert latent_gauges(latents[:, :1].expand(-1, 3, -1))["query_diversity"] < 1e-6
    assert latent_gauges(latents[:1]) == {} and set(latent_gauges(latents[:, :1])) == {"std_over_samples"}
