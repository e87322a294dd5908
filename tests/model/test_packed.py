"""A packed row gives each of its samples what it would get alone: losses, gradients and hidden states."""

import pytest
import torch

from vreflection.data.collate import PackedCollator
from vreflection.data.encode import EncodedSample
from vreflection.data.positions import mrope_positions
from vreflection.model.packed_attention import PACKED_ATTENTION, packed_attention
from vreflection.model.packed_vision import packed_vision

BOX_A, BOX_B = [0.1, 0.2, 0.6, 0.7], [0.4, 0.0, 0.95, 0.5]


@pytest.fixture(scope="module")
def rows(tiny):
    return [
        tiny.row([(3, 4)], [(BOX_A, 0)]),
        tiny.row(answer=(21, 22, 23)),  # text only
        tiny.row([(2, 2), (4, 3)], [(BOX_B, 1), (BOX_A, 0)], question=(5,) * 7),
        tiny.row([(3, 4)], [(BOX_B, 0)], question=(9, 8, 7)),  # the first one's length
        tiny.row([(5, 2)], question=(4,)),  # an image, no box
    ]


def samples_of(tiny, rows):
    made = []
    for number, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        grids = [(1, 2 * h, 2 * w) for h, w in row.images]
        made.append(
            EncodedSample(
                input_ids=ids,
                labels=torch.tensor(row.labels),
                mm_token_type_ids=(ids == tiny.IMAGE).long(),
                position_ids=torch.from_numpy(mrope_positions(ids, tiny.IMAGE, grids)),
                boxes=torch.tensor([box for box, _ in row.boxes], dtype=torch.float64).reshape(-1, 4),
                box_images=torch.tensor([image for _, image in row.boxes], dtype=torch.int64),
                image_grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
                pixel_values=tiny.pixels(row.images, seed=number) if row.images else None,
            )
        )
    return made


def run(model, batch, attention, **kwargs):
    model.set_attn_implementation({"text_config": attention})
    model.zero_grad()
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output


@pytest.mark.parametrize("attention", [PACKED_ATTENTION, "sdpa", "eager"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "filler_aligned", "sft"])
def test_packed_equals_one_by_one(tiny, rows, stage, attention):
    model = tiny.model(stage)
    if stage == "sft":
        rows = [tiny.row(row.images) for row in rows]
    samples = samples_of(tiny, rows)
    whole = [PackedCollator()([sample]) for sample in samples]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in whole]
    if not model.objective.ce_on_latent_slots:
        tokens = [t - int((b["labels"] == tiny.LVR).sum()) for t, b in zip(tokens, whole)]
    boxes = [len(b["boxes"]) for b in whole]
    singles = {}
    total, states = 0.0, []
    for batch, n, b in zip(whole, tokens, boxes):
        shares = torch.tensor([n / sum(tokens), b / max(sum(boxes), 1)])
        output = run(model, batch, "sdpa", loss_shares=shares)
        total += float(output.loss.detach())
        states.append(output.last_hidden_state[0].detach())
        for name, gradient in tiny.gradients(model).items():
            singles[name] = singles.get(name, 0) + gradient
    packed = run(model, PackedCollator()(samples), attention)
    torch.testing.assert_close(packed.last_hidden_state[0], torch.cat(states), rtol=1e-5, atol=1e-5)
    assert float(packed.loss.detach()) == pytest.approx(total, rel=1e-5)
    gradients = tiny.gradients(model)
    assert set(gradients) == set(singles) and len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, singles[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_gradient_checkpointing_changes_nothing(tiny, rows, stage):
    batch = PackedCollator()(samples_of(tiny, rows))
    model = tiny.model(stage).train()
    plain = run(model, batch, PACKED_ATTENTION)
    expected = tiny.gradients(model)
    model.gradient_checkpointing_enable()
    output = run(model, batch, PACKED_ATTENTION)
    assert float(output.loss.detach()) == float(plain.loss.detach())
    assert {k: v.item() for k, v in output.losses.items()} == {k: v.item() for k, v in plain.losses.items()}
    torch.testing.assert_close(tiny.gradients(model), expected, rtol=1e-6, atol=1e-7)


def test_samples_of_a_pack_do_not_see_each_other(tiny, rows):
    model = tiny.model("stage2")
    samples = samples_of(tiny, rows)
    batch = PackedCollator()(samples)
    before = run(model, batch, PACKED_ATTENTION).last_hidden_state
    start, end = batch["cu_seqlens"][2:4].tolist()
    samples[2].pixel_values = samples[2].pixel_values + 1
    after = run(model, PackedCollator()(samples), PACKED_ATTENTION).last_hidden_state
    moved = (before != after).any(-1)[0]
    assert moved[start + 4 : end].all() and not moved[:start].any() and not moved[end:].any()


def test_the_kernel_against_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 1, 5, 9)
    query = torch.randn(1, 6, 20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    out = packed_attention(query, key, value, lengths, 0.3)
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    allowed = (sample[:, None] == sample) & torch.ones(20, 20, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(3, 1).transpose(2, 3) * 0.3
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_without_packing_it_is_the_hosts_sdpa(tiny, rows):
    model = tiny.model("stage1")
    batch = tiny.batch(rows)
    expected = run(model, batch, "sdpa").last_hidden_state
    torch.testing.assert_close(run(model, batch, PACKED_ATTENTION).last_hidden_state, expected)


def test_shares_weigh_the_parts(tiny, rows):
    model = tiny.model("stage1")
    batch = PackedCollator()(samples_of(tiny, rows))
    output = run(model, batch, PACKED_ATTENTION, loss_shares=torch.tensor([0.25, 3.0]))
    parts = output.losses
    expected = 0.25 * parts["cross_entropy"] + 3.0 * 0.5 * parts["latent_alignment"]
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("alignment", ["llm_only", "bcm_only", "symmetric"])
def test_every_trainable_parameter_gets_a_gradient_whatever_the_side(tiny, rows, alignment):
    """Otherwise ranks that reduce gradients would wait for one another."""
    from dataclasses import replace

    model = tiny.model("stage1")
    model.objective = replace(model.objective, alignment=alignment)
    for chosen in (rows, rows[1:2]):
        run(model, PackedCollator()(samples_of(tiny, chosen)), PACKED_ATTENTION)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    queries = model.box_feature_resampler.queries.grad
    assert (queries == 0).all()  # the last batch had no box


@pytest.mark.parametrize("windows", [True, False], ids=["windowed blocks", "full attention only"])
def test_the_vision_towers_windows_in_one_call_each_length(tiny, windows):
    model = tiny.model("stage1")
    visual = model.model.visual
    if not windows:
        visual.fullatt_block_indexes = list(range(len(visual.blocks)))
    images = [(3, 4), (8, 8), (5, 2), (6, 9), (8, 8)]
    pixels, grids = tiny.pixels(images), torch.tensor([[1, 2 * h, 2 * w] for h, w in images])
    model.model.visual.requires_grad_(True)  # what is to be trained takes the host's way
    expected = model.visual_tokens(pixels, grids).detach()
    model.model.visual.requires_grad_(False)
    state = set(model.state_dict())
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        found = model.visual_tokens(pixels, grids)
        packed_calls = len(calls)
        model.model.get_image_features(pixels, grids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert 0 < packed_calls < len(calls) - packed_calls
    assert set(model.state_dict()) == state and not any("forward" in part.__dict__ for part in visual.modules())


def test_a_vision_tower_that_somebody_changed_is_left_alone(tiny):
    model = tiny.model("stage1").eval()
    model.freeze_for_stage()
    visual = model.model.visual
    pixels, grids = tiny.pixels([(4, 4)]), torch.tensor([[1, 8, 8]])
    plain, seen = visual.blocks[0].attn.forward, []
    visual.blocks[0].attn.forward = lambda *args, **kwargs: (seen.append(1), plain(*args, **kwargs))[1]
    model.visual_tokens(pixels, grids)
    assert seen == [1] and "forward" in visual.blocks[0].attn.__dict__
    del visual.blocks[0].attn.forward
    model.set_attn_implementation("eager")
    with packed_vision(visual):
        assert not any("forward" in part.__dict__ for part in visual.modules())
