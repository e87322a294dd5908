"""`forward` of both stages against a straightforward re-implementation, one box and one sample at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from vreflection.losses import stochastic_side

TOLERANCE = 2e-5


@pytest.fixture
def rows(tiny):
    """Two spans on one image; text only; two images with a box in each, in reverse order; an image without box."""
    return [
        tiny.row([(2, 3)], [((0.1, 0.1, 0.45, 0.9), 0), ((0.3, 0.55, 0.95, 1.0), 0)]),
        tiny.row(question=(3, 4), answer=(5,)),
        tiny.row([(4, 2), (3, 4)], [((0.3, 0.2, 0.9, 0.6), 1), ((0.0, 0.4, 1.0, 0.7), 0)], question=(9,)),
        tiny.row([(1, 2)], answer=(13, 14, 15)),
    ]


def window_tokens(box, grid):
    """Token indices of a box by the window rule, written out for one box."""
    (x0, y0, x1, y1), (h, w) = box, grid
    columns = range(math.floor(x0 * 2 * w) // 2, (math.ceil(x1 * 2 * w) + 1) // 2)
    lines = range(math.floor(y0 * 2 * h) // 2, (math.ceil(y1 * 2 * h) + 1) // 2)
    return [y * w + x for y in lines for x in columns]


def roi_map(box, grid, cells, ratio):
    """RoI-Align as a dense (cells * cells, h * w) matrix: `grid_sample` of the one-hot images."""
    (x0, y0, x1, y1), (h, w) = box, grid
    centres = (torch.arange(cells * ratio) + 0.5) / (cells * ratio)
    rows, columns = (low * size - 0.5 + (high - low) * size * centres for low, high, size in ((y0, y1, h), (x0, x1, w)))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    scaled = torch.stack([2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1], dim=-1).float()
    images = torch.eye(h * w).view(1, h * w, h, w)
    samples = F.grid_sample(images, scaled[None], padding_mode="border", align_corners=True)
    return F.avg_pool2d(samples, ratio)[0].flatten(1).T


def attend(module, queries, keys):
    """Stock cross-attention and layer norm: latents (Q, D) and head-averaged weights (Q, n)."""
    stock = nn.MultiheadAttention(keys.shape[1], module.num_heads, batch_first=True)
    parameters = dict(module.cross_attn.named_parameters())
    out, weights = torch.func.functional_call(stock, parameters, (queries[None], keys[None], keys[None]))
    norm = module.output_norm
    return F.layer_norm(out[0], keys.shape[1:], norm.weight, norm.bias, 1e-6), weights[0]


def reference(tiny, model, rows, batch, alignment_weight=0.5, distillation_weight=1.0, kl_per_query=False):
    """Loss parts, the weighted total, and the pieces they are made of."""
    stage, config = model.config.stage, model.config
    images = [grid for r in rows for grid in r.images]
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    features = [f.detach() for f in features]
    embeds = model.get_input_embeddings()(batch["input_ids"]).clone()
    boxes, teachers, maps, slots = [], [], [], []
    for n, r in enumerate(rows):
        first_image = sum(len(other.images) for other in rows[:n])
        where = [i for i, token in enumerate(r.ids) if token == tiny.IMAGE]
        if where:
            embeds[n, where] = torch.cat(features[first_image : first_image + len(r.images)])
        spans = [i for i, token in enumerate(r.ids) if token == tiny.LVR]
        for number, (box, image) in enumerate(r.boxes):
            tokens, grid = features[first_image + image], images[first_image + image]
            teacher = model.box_feature_resampler
            if config.region == "window":
                inside = window_tokens(box, grid)
                latents, weights = attend(teacher, teacher.queries[0], tokens[inside])
                whole = torch.zeros(len(weights), len(tokens)).index_copy(1, torch.tensor(inside), weights)
            else:
                sampling = roi_map(box, grid, config.roi_output_size, config.roi_sampling_ratio)
                latents, weights = attend(teacher, teacher.queries[0], sampling @ tokens)
                whole = weights @ sampling
            if stage == "stage2":
                latents, whole = latents.detach(), whole.detach()
            at = spans[number * tiny.SLOTS : (number + 1) * tiny.SLOTS]
            embeds[n, at] = latents.detach()
            boxes.append((n, at, tokens))
            teachers.append(latents)
            maps.append(whole)
            slots.append([(n, i) for i in at])
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    output = Qwen2_5_VLForConditionalGeneration.forward(
        model, inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions,
        output_hidden_states=True, use_cache=False,
    )  # fmt: skip
    hidden = output.hidden_states[-1]
    labels = batch["labels"].clone()
    if stage == "stage2":
        labels[labels == tiny.LVR] = -100
    parts = {"cross_entropy": F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}
    total = parts["cross_entropy"]
    if stage == "stage1":
        own = torch.stack([hidden[n, [i - 1 for i in at]] for n, at, _ in boxes])
        z = torch.stack(teachers)
        parts["latent_alignment"] = 0.5 * F.mse_loss(own.detach(), z) + 0.5 * F.mse_loss(own, z.detach())
        total = total + alignment_weight * parts["latent_alignment"]
    else:
        square = kl = 0.0
        for (n, at, tokens), z, teacher_map in zip(boxes, teachers, maps):
            latents, student_map = attend(model.student_resampler, hidden[n, at], tokens)
            square = square + (latents - z).square().sum()
            inside = teacher_map > 0
            ratio = torch.log(teacher_map[inside]) - torch.log(student_map[inside] + 1e-9)
            kl = kl + (teacher_map[inside] * ratio).sum()
        parts["latent_mse"] = square / torch.stack(teachers).numel()
        parts["attention_kl"] = kl / len(boxes) / (tiny.SLOTS if kl_per_query else 1)
        total = total + distillation_weight * (parts["latent_mse"] + parts["attention_kl"])
    return total, parts, hidden, output.logits, labels


def compare(model, twin, output, expected):
    total, parts = expected[:2]
    assert set(output.losses) == set(parts)
    for name, value in parts.items():
        torch.testing.assert_close(output.losses[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    torch.testing.assert_close(output.loss, total, rtol=TOLERANCE, atol=TOLERANCE)
    output.loss.backward()
    total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("region", ["window", "roi_align"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_losses_and_gradients_equal_the_reimplementation(tiny, rows, stage, region):
    model = tiny.model(stage, region=region)
    twin, batch = copy.deepcopy(model), tiny.batch(rows)
    output = model(**batch)
    expected = reference(tiny, twin, rows, batch)
    supervised = expected[4][:, 1:] != -100
    torch.testing.assert_close(output.logits, expected[3][:, :-1][supervised], rtol=1e-4, atol=1e-4)
    compare(model, twin, output, expected)
    assert output.teacher_latents.shape == (4, tiny.SLOTS, tiny.WIDTH)


def test_weights_and_reductions_of_the_objective(tiny, rows):
    for stage, settings, changes in (
        ("stage1", {"alignment_weight": 3.0}, {"alignment_weight": 3.0}),
        ("stage2", {"distillation_weight": 0.5, "kl_reduction": "mean_queries"},
         {"distillation_weight": 0.5, "kl_per_query": True}),
    ):  # fmt: skip
        model, batch = tiny.model(stage), tiny.batch(rows)
        model.objective = type(model.objective).for_stage(stage, **settings)
        twin = copy.deepcopy(model)
        compare(model, twin, model(**batch), reference(tiny, twin, rows, batch, **changes))


def test_stage_2_keeps_the_alignment_when_asked(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    plain = model(**batch)
    model.objective = type(model.objective).for_stage("stage2", alignment_weight=2.0)
    kept = model(**batch)
    hidden, slots = plain.last_hidden_state, batch["input_ids"] == tiny.LVR
    own = hidden.roll(1, dims=1)[slots].view_as(plain.teacher_latents)
    alignment = F.mse_loss(own, plain.teacher_latents)
    torch.testing.assert_close(kept.losses["latent_alignment"], alignment)
    torch.testing.assert_close(kept.loss, plain.loss + 2.0 * alignment)


def test_the_alignment_looks_one_before_the_slot_and_the_probes_at_it(tiny, rows):
    for stage, name, field in (
        ("stage1", "latent_alignment", "alignment_offset"),
        ("stage2", "latent_mse", "probe_offset"),
    ):
        model, batch = tiny.model(stage), tiny.batch(rows)
        default = model(**batch).losses[name]
        explicit = {"alignment_offset": -1, "probe_offset": 0}[field]
        values = {}
        for offset in (-1, 0):
            model.objective = type(model.objective).for_stage(stage, **{field: offset})
            values[offset] = model(**batch).losses[name]
        assert default == values[explicit] and abs(values[-1] - values[0]) > 1e-3


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_which_parameters_train(tiny):
    part = lambda names: {n.split(".")[0] if not n.startswith("model.") else ".".join(n.split(".")[:2]) for n in names}  # noqa: E731
    language = {"model.language_model", "lm_head"}
    assert part(trained(tiny.model("stage1"))) == language | {"box_feature_resampler"}
    assert part(trained(tiny.model("stage2"))) == language | {"student_resampler"}
    assert part(trained(tiny.model("sft"))) == part(trained(tiny.model("filler"))) == language
    everything = {n for n, _ in tiny.model("stage1").named_parameters()}
    assert everything - trained(tiny.model("stage1")) == {n for n in everything if "visual" in n}


def test_the_vision_tower_gets_no_gradient_even_when_the_teacher_learns(tiny, rows):
    model = tiny.model("stage1")
    model(**tiny.batch(rows)).loss.backward()
    got = tiny.gradients(model)
    assert set(got) == trained(model)
    assert not any("visual" in name for name in got)
    assert all(float(g.abs().sum()) > 0 for g in got.values() if g is not None and g.dim() > 1)


def test_stage_2_teacher_has_no_graph(tiny, rows):
    model = tiny.model("stage2")
    model.box_feature_resampler.requires_grad_(True)  # even when someone forgets to freeze it
    output = model(**tiny.batch(rows))
    assert not output.teacher_latents.requires_grad
    output.loss.backward()
    assert not any(name.startswith("box_feature_resampler") for name in tiny.gradients(model))


def test_filled_slots_pass_no_gradient_to_the_teacher(tiny, rows):
    """Cross-entropy alone must not reach the teacher: slots hold sg(Z)."""
    model = tiny.model("stage1")
    model(**tiny.batch(rows)).losses["cross_entropy"].backward()
    assert not any(name.startswith("box_feature_resampler") for name in tiny.gradients(model))
    # Nor the embedding of <|lvr|> as an input: its row only serves the tied or separate head.
    assert float(model.get_input_embeddings().weight.grad[tiny.LVR].abs().sum()) == 0


@pytest.mark.parametrize(
    ("mode", "teacher", "language"),
    [("symmetric", True, True), ("llm_only", False, True), ("bcm_only", True, False)],
)
def test_alignment_modes_send_gradient_where_they_say(tiny, rows, mode, teacher, language):
    model = tiny.model("stage1")
    model.objective = type(model.objective).for_stage("stage1", alignment=mode)
    loss = model(**tiny.batch(rows)).losses["latent_alignment"]
    loss.backward()
    got = tiny.gradients(model)
    assert any(n.startswith("box_feature_resampler") for n in got) == teacher
    assert any(n.startswith("model.language_model") for n in got) == language


def test_stochastic_alignment_follows_the_step(tiny, rows):
    model, batch = tiny.model("stage1"), tiny.batch(rows)
    model.objective = type(model.objective).for_stage(
        "stage1", alignment="stochastic", stochastic_probability=0.5, alignment_seed=5
    )
    sides = [stochastic_side(5, step, 0.5) for step in range(8)]
    assert len(set(sides)) == 2
    for step, language in enumerate(sides):
        model.zero_grad()
        model(**batch, alignment_step=step).losses["latent_alignment"].backward()
        assert any(n.startswith("box_feature_resampler") for n in tiny.gradients(model)) != language


def targets_of(model, batch):
    """Supervised token ids, from the loss's own view of the batch."""
    from vreflection.model.layout import BatchLayout

    layout = BatchLayout.from_batch(
        model.config,
        *(batch.get(k) for k in ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image")),
        ce_on_latent_slots=model.objective.ce_on_latent_slots,
    )  # fmt: skip
    return layout.targets_S.tolist()


def test_labels_of_slots_per_stage(tiny):
    rows = [tiny.row([(2, 2)], [((0, 0, 1, 1), 0)], answer=(11,))]
    inside = [tiny.LVR_START, *[tiny.LVR] * tiny.SLOTS, tiny.LVR_END, 11, tiny.EOS]
    outside = [token for token in inside if token != tiny.LVR]
    batch = tiny.batch(rows)
    assert targets_of(tiny.model("stage1"), batch) == inside
    assert targets_of(tiny.model("stage2"), batch) == outside
    filler = tiny.model("filler")
    assert targets_of(filler, batch) == outside
    assert targets_of(filler, {k: v for k, v in batch.items() if not k.startswith("box")}) == outside
    for stage, expected in (("stage1", outside), ("stage2", inside)):
        model = tiny.model(stage)
        model.objective = type(model.objective).for_stage(stage, ce_on_latent_slots=stage == "stage2")
        assert targets_of(model, batch) == expected
        loss = model(**batch).losses["cross_entropy"]
        output = model(**batch, all_logits=True)
        index = [i - 1 for i, token in enumerate(rows[0].ids) if rows[0].labels[i] != -100 and token in expected]
        torch.testing.assert_close(loss, F.cross_entropy(output.logits[0, index], torch.tensor(expected)))


def test_filler_slots_keep_their_embedding(tiny):
    rows = [tiny.row([(2, 2)], [((0, 0, 1, 1), 0)])]
    model, batch = tiny.model("filler"), tiny.batch(rows)
    output = model(**batch)
    plain = Qwen2_5_VLForConditionalGeneration.forward(
        model,
        **{k: v for k, v in batch.items() if not k.startswith("box") and k != "labels"},
        output_hidden_states=True,
    )
    torch.testing.assert_close(output.last_hidden_state, plain.hidden_states[-1], rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert float(model.get_input_embeddings().weight.grad[tiny.LVR].abs().sum()) > 0


@pytest.mark.parametrize(("stage", "module"), [("stage1", "box_feature_resampler"), ("stage2", "student_resampler")])
def test_a_text_only_batch_reaches_every_trainable_parameter(tiny, stage, module):
    model = tiny.model(stage)
    output = model(**tiny.batch([tiny.row(), tiny.row(question=(1, 2))]))
    assert output.loss.isfinite() and set(output.losses) > {"cross_entropy"}
    assert all(value == 0 for name, value in output.losses.items() if name != "cross_entropy")
    torch.testing.assert_close(output.loss, output.losses["cross_entropy"])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if name.startswith(module):
                assert parameter.grad.abs().max() == 0, name


def test_an_image_without_boxes_reaches_every_trainable_parameter(tiny):
    for stage in ("stage1", "stage2"):
        model = tiny.model(stage)
        model(**tiny.batch([tiny.row([(2, 2)])])).loss.backward()
        assert set(tiny.gradients(model)) == trained(model)


def test_nothing_supervised_gives_a_connected_zero(tiny):
    model, batch = tiny.model("sft"), tiny.batch([tiny.row()])
    batch["labels"].fill_(-100)
    loss = model(**batch).loss
    loss.backward()
    assert loss == 0 and tiny.gradients(model)


def test_supervised_logits_are_the_full_logits_there(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows)
    few, full = model(**batch), model(**batch, all_logits=True)
    assert full.logits.shape == (*batch["input_ids"].shape, tiny.VOCABULARY)
    wanted = (batch["labels"] != -100) & (batch["labels"] != tiny.LVR)
    torch.testing.assert_close(few.logits, full.logits[:, :-1][wanted[:, 1:]], rtol=1e-5, atol=1e-5)
    assert len(few.logits) == int(wanted.sum())
    assert few.loss == full.loss


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_gradient_checkpointing_changes_nothing(tiny, rows, stage):
    plain = tiny.model(stage).train()
    saved, batch = copy.deepcopy(plain), tiny.batch(rows)
    saved.gradient_checkpointing_enable()
    results = []
    for model in (plain, saved):
        output = model(**batch)
        output.loss.backward()
        results.append((output, tiny.gradients(model)))
    (a, left), (b, right) = results
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.teacher_latents, b.teacher_latents)
    if stage == "stage2":
        torch.testing.assert_close(a.student_latents, b.student_latents)
    assert set(left) == set(right) == trained(plain)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6, msg=name)


def packed(tiny, model, rows):
    """The same samples end to end in one row."""
    parts = []
    for r in rows:
        single = tiny.batch([r])
        positions, _ = model.model.get_rope_index(
            single["input_ids"], single["mm_token_type_ids"], single.get("image_grid_thw")
        )
        parts.append(positions)
    whole = tiny.batch(rows)
    together = {
        k: v for k, v in whole.items() if k not in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
    }
    bounds = torch.tensor([0, *[len(r.ids) for r in rows]]).cumsum(0)
    return together | {
        "input_ids": torch.tensor([[token for r in rows for token in r.ids]]),
        "labels": torch.tensor([[token for r in rows for token in r.labels]]),
        "position_ids": torch.cat(parts, dim=2),
        "cu_seqlens": bounds,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_packed_row_equals_separate_rows(tiny, rows, stage, attention):
    model = tiny.model(stage)
    model.set_attn_implementation(attention)
    twin = copy.deepcopy(model)
    separate, together = model(**tiny.batch(rows)), twin(**packed(tiny, twin, rows))
    assert set(separate.losses) == set(together.losses)
    for name, value in separate.losses.items():
        torch.testing.assert_close(together.losses[name], value, rtol=1e-5, atol=1e-5, msg=name)
    separate.loss.backward()
    together.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters()):
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_one_packed_sample_does_not_see_its_neighbours(tiny, rows):
    model = tiny.model("stage2")
    batch = packed(tiny, model, rows)
    before = model(**batch).last_hidden_state
    batch["input_ids"][0, 1] = 77  # in the first sample
    after = model(**batch).last_hidden_state
    first = len(rows[0].ids)
    assert (before[0, :first] - after[0, :first]).abs().max() > 1e-2
    torch.testing.assert_close(before[0, first:], after[0, first:], rtol=0, atol=1e-6)


def test_packing_needs_positions(tiny, rows):
    model = tiny.model("stage1")
    batch = packed(tiny, model, rows)
    del batch["position_ids"]
    with pytest.raises(ValueError, match=r"cu_seqlens\) needs position_ids \(3, 1, L\)"):
        model(**batch)


def test_right_padding_changes_nothing(tiny, rows):
    for stage in ("stage1", "stage2"):
        model, batch = tiny.model(stage), tiny.batch(rows)
        longer = dict(batch)
        for name, fill in (("input_ids", 99), ("attention_mask", 0), ("labels", -100), ("mm_token_type_ids", 0)):
            longer[name] = F.pad(batch[name], (0, 7), value=fill)
        short, long = model(**batch), model(**longer)
        for name, value in short.losses.items():
            torch.testing.assert_close(long.losses[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_left_padding_changes_nothing(tiny, rows):
    model = tiny.model("stage2")
    right, left = model(**tiny.batch(rows)), model(**tiny.batch(rows, padding="left"))
    for name, value in right.losses.items():
        torch.testing.assert_close(left.losses[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_batch_is_the_mean_of_its_samples(tiny, rows):
    """Latent losses average over boxes, cross-entropy over supervised tokens: no sample leaks into another."""
    model = tiny.model("stage2")
    whole = model(**tiny.batch(rows))
    latents, cross, tokens = [], 0.0, 0
    images = 0
    for r in rows:
        single = tiny.batch([r])
        if r.images:  # the same pixels as in the batch
            patches = [4 * h * w for h, w in (g for other in rows for g in other.images)]
            start = sum(patches[:images])
            single["pixel_values"] = tiny.batch(rows)["pixel_values"][
                start : start + sum(patches[images : images + len(r.images)])
            ]
            images += len(r.images)
        output = model(**single)
        cross, tokens = cross + output.losses["cross_entropy"] * len(output.logits), tokens + len(output.logits)
        latents += [output.losses["latent_mse"]] * len(r.boxes)
    torch.testing.assert_close(whole.losses["cross_entropy"], cross / tokens)
    torch.testing.assert_close(whole.losses["latent_mse"], torch.stack(latents).mean())


def test_cached_features_equal_pixels(tiny, rows):
    for stage in ("stage1", "stage2"):
        model, batch = tiny.model(stage), tiny.batch(rows)
        cached = {k: v for k, v in batch.items() if k != "pixel_values"}
        cached["image_features"] = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
        pixels, features = model(**batch), model(**cached)
        for name, value in pixels.losses.items():
            torch.testing.assert_close(features.losses[name], value, msg=name)
        with pytest.raises(ValueError, match="expected pixel_values or image_features, got both"):
            model(**cached, pixel_values=batch["pixel_values"])
        cached["image_features"] = cached["image_features"][:, :5]
        with pytest.raises(ValueError, match=r"image_features: expected \(T, 64\), got \(\d+, 5\)"):
            model(**cached)


def test_free_running_rows_take_the_given_states(tiny, rows):
    model, batch = tiny.model("stage1"), tiny.batch(rows)
    plain = model(**batch)
    given = torch.randn(4, tiny.SLOTS, tiny.WIDTH)
    free = torch.tensor([False, False, True, True])  # both boxes of the third sample
    mixed = model(**batch, slot_inputs=given, free_running=free)
    torch.testing.assert_close(mixed.last_hidden_state[:2], plain.last_hidden_state[:2])
    assert (mixed.last_hidden_state[2] - plain.last_hidden_state[2]).abs().max() > 1e-2
    own = plain.teacher_latents.detach()
    same = model(**batch, slot_inputs=own, free_running=torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(same.loss, plain.loss)


def test_without_labels_it_is_the_host_model(tiny, rows):
    model, batch = tiny.model("stage2"), tiny.batch(rows[1:2])
    host = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = Qwen2_5_VLForConditionalGeneration.forward(model, **host).logits
    torch.testing.assert_close(model(**host).logits, expected)


def test_images_need_token_types_or_positions(tiny, rows):
    model, batch = tiny.model("stage1"), tiny.batch(rows)
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="images need mm_token_type_ids"):
        model(**batch)
    with pytest.raises(ValueError, match="needs input_ids, got None"):
        model(labels=batch["labels"])
