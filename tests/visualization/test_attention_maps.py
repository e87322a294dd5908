"""Maps are the attention they claim to be: the student's, the host's own eager weights, and rollout by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.data.boxes import box_mask
from vreflection.engine.decoder import LatentDecoder
from vreflection.engine.requests import Generation, Prompt
from vreflection.errors import ConfigError, DataError
from vreflection.visualization import attention_record
from vreflection.visualization.attention_maps import (
    Attention,
    checked_box,
    finished_slots,
    look,
    maps_of,
    prompt_inputs,
    share_in_box,
    with_features,
)

BOX = (0.1, 0.2, 0.6, 0.9)


def photo(width=112, height=84, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def lab(tiny):
    """A tiny stage-2 model, two images' prompt, and its answer with a forced span."""
    model, processor = tiny.model("stage2", seed=3), tiny.processor()
    images = [photo(), photo(56, 140, seed=1)]
    prompt = with_features(model, Prompt.of(processor([images], "where?", return_position_ids=True)))
    decoder = LatentDecoder(model, max_batch_size=1)
    answer = decoder.generate(
        [decoder.request(prompt, force_latent=True, return_latents=True, max_new_tokens=9, do_sample=False)]
    )[0]
    assert len(answer.latents) >= 1
    return model, processor, prompt, answer


def eager_weights(model, prompt, answer):
    """Every layer's attention `(layers, H, L, L)` of the host's own eager forward over prompt and answer."""
    embeds, positions = prompt_inputs(model, prompt)
    slots = finished_slots(answer)
    count = slots[-1] + 1
    ids = torch.tensor(answer.tokens[:count])
    own = model.get_input_embeddings()(ids).detach()
    own[torch.tensor(slots)] = answer.latents.flatten(0, 1)
    later = (positions.max() + 1 + torch.arange(count)).expand(3, -1)
    decoder = model.model.language_model
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    try:
        out = decoder(
            inputs_embeds=torch.cat([embeds, own])[None],
            position_ids=torch.cat([positions, later], 1)[:, None],
            output_attentions=True,
            use_cache=False,
        )
    finally:
        decoder.config._attn_implementation = before
    image = torch.nonzero(prompt.input_ids == model.config.image_token_id)[:, 0]
    return torch.cat(out.attentions).detach(), len(prompt) + torch.tensor(slots), image


@pytest.mark.parametrize(
    ("layers", "heads"), [(None, None), ((1,), None), ((0,), (2,)), ((0, 1), (0, 3)), (None, (1,))]
)
def test_language_model_maps_are_the_hosts_eager_weights(lab, layers, heads):
    model, _, prompt, answer = lab
    found = maps_of(model, prompt, answer, attention=Attention("language-model", layers, heads))
    weights, rows, image = eager_weights(model, prompt, answer)
    kept = weights[list(layers) if layers else slice(None)][:, list(heads) if heads else slice(None)]
    expected = kept.mean((0, 1))[rows][:, image]
    parts = expected.split([one[0].numel() for one in found.maps], dim=1)
    for one, mass, part in zip(found.maps, found.image_mass, parts, strict=True):
        torch.testing.assert_close(mass, part.sum(1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.flatten(1), part / part.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert found.steps == len(rows) == len(found.latents)


@pytest.mark.parametrize("chunk", [attention_record.CHUNK, 700])
def test_rollout_is_the_matrix_product(lab, monkeypatch, chunk):
    monkeypatch.setattr(attention_record, "CHUNK", chunk)  # the small one cuts the sequence into rows of a few
    model, _, prompt, answer = lab
    found = maps_of(model, prompt, answer, attention=Attention(rollout=True))
    weights, rows, image = eager_weights(model, prompt, answer)
    product = torch.eye(weights.shape[-1])
    for layer in weights.mean(1):
        product = (layer + torch.eye(len(layer))) / 2 @ product
    parts = product[rows][:, image].split([one[0].numel() for one in found.maps], dim=1)
    for one, part in zip(found.maps, parts, strict=True):
        torch.testing.assert_close(one.flatten(1), part / part.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert found.attention.title == "language model, rollout"


@pytest.mark.parametrize("offset", [0, -1])
def test_student_maps_start_from_the_trained_positions(lab, offset):
    model, _, prompt, answer = lab
    kept = model.objective
    model.objective = replace(kept, probe_offset=offset)
    try:
        found = maps_of(model, prompt, answer)
    finally:
        model.objective = kept
    probes = answer.probes if offset == 0 else answer.latents  # the state before a slot is what the slot consumes
    start = 0
    for one, grid in zip(found.maps, prompt.image_grid_thw.tolist(), strict=True):
        h, w = grid[1] // 2, grid[2] // 2
        tokens, start = prompt.image_features[start : start + h * w], start + h * w
        for span, states in enumerate(probes):
            _, maps = model.student_resampler(states[None], tokens, [[h, w]], [0], return_attention=True)
            mine = one[[step for step, number in enumerate(found.span) if number == span]]
            torch.testing.assert_close(mine, maps[0].detach())
        assert one.shape == (found.steps, h, w)
    assert found.attention.title == "student" and found.image_mass is None


@pytest.mark.parametrize("source", ["student", "language-model"])
@pytest.mark.parametrize("size", [(28, 28), (40, 160), (160, 40), (112, 84)])
def test_maps_sum_to_one_whatever_the_image(tiny, source, size):
    model = tiny.model("stage2", seed=3)
    found = look(
        model, tiny.processor(), [photo(*size)], "where?", attention=Attention(source), boxes=[BOX],
        force_latent=True, max_new_tokens=4,
    )  # fmt: skip
    (maps,), (teacher,) = found.maps, found.teacher
    assert len(maps) == tiny.SLOTS == len(teacher) and maps.shape[1:] == teacher.shape[1:]
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(tiny.SLOTS))
    torch.testing.assert_close(teacher.sum((1, 2)), torch.ones(tiny.SLOTS))
    assert (maps.shape[1] > maps.shape[2]) == (size[1] > size[0])
    outside = ~torch.from_numpy(box_mask(BOX, *teacher.shape[1:]))
    assert float(teacher[:, outside].abs().sum()) == 0.0


def test_share_in_a_box_by_hand():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1], maps[0, 3, 3] = 0.75, 0.25
    maps[1, 0, 0], maps[1, 2, 2] = 0.5, 0.5
    assert box_mask((0.25, 0.25, 0.75, 0.75), 4, 4).nonzero()[0].tolist() == [1, 1, 2, 2]
    assert share_in_box(maps, (0.25, 0.25, 0.75, 0.75)) == [0.75, 0.5]


def test_several_spans_and_an_unfinished_one(tiny):
    hidden = torch.zeros(11, 4)
    inside = [False, True, True, False, True, True, False, False, True, True]
    answer = Generation(0, 5, tokens=[1] * 10, latent=inside, latents=torch.zeros(2, 2, 4), step_hidden=hidden)
    assert finished_slots(answer) == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="return_latents=True"):
        finished_slots(replace(answer, latents=None))
    assert finished_slots(Generation(0, 5, tokens=[1], latent=[False])) == []


def test_the_model_is_left_as_it_was(lab):
    model, _, prompt, answer = lab
    config = model.model.language_model.config
    before = config._attn_implementation
    maps_of(model, prompt, answer, attention=Attention("language-model"))
    assert config._attn_implementation == before
    again = LatentDecoder(model, max_batch_size=1)
    request = again.request(prompt, force_latent=True, return_latents=True, max_new_tokens=9, do_sample=False)
    assert again.generate([request])[0].tokens == answer.tokens


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (Attention("eyes"), "auto, student, language-model"),
        (Attention(layers=(2,)), "layers: expected numbers from 0 to 1, got \\[2\\]"),
        (Attention(heads=(-1,)), "heads: expected numbers from 0 to 3"),
        (Attention(layers=()), "layers: expected numbers"),
        (Attention(rollout=True, heads=(0,)), "rollout: expected no layers or heads"),
        (Attention("student", layers=(0,)), "use source=language-model"),
    ],
)
def test_an_attention_the_model_lacks(lab, attention, words):
    with pytest.raises(ConfigError, match=words):
        attention.resolve(lab[0])


def test_checkpoints_without_student_or_latents(tiny):
    stage1 = tiny.model("stage1")
    assert Attention().resolve(stage1).source == "language-model"
    with pytest.raises(ConfigError, match="stage1.*use language-model"):
        Attention("student").resolve(stage1)
    with pytest.raises(ConfigError, match="latent steps.*got stage 'sft'"):
        look(tiny.model("sft"), tiny.processor(), [photo()], "where?")


@pytest.mark.parametrize(
    "box", [(0, 0, 1.2, 1), (0.5, 0, 0.5, 1), (0.6, 0, 0.2, 1), (0, 0, 1), (float("nan"), 0, 1, 1)]
)
def test_boxes_that_are_none(box):
    with pytest.raises(DataError, match="as fractions of the image"):
        checked_box(box)


def test_layers_that_were_not_seen_are_noticed(lab):
    """As when another thread changes the model's attention in the middle of the forward."""
    model, _, prompt, answer = lab
    config = model.model.language_model.config
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: setattr(config, "_attn_implementation", "sdpa"))
    try:
        with pytest.raises(RuntimeError, match="expected to see 2 layers, saw 1"):
            maps_of(model, prompt, answer, attention=Attention("language-model"))
    finally:
        handle.remove()
