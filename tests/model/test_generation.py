"""`generate` on a tiny model: batches, caches, the host library's own decoding, and everything returned."""

import warnings

import pytest
import torch
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

from vreflection.engine import batch as engine
from vreflection.engine.cache import KVCache
from vreflection.errors import ConfigError

IMAGES = ([(2, 3)], [], [(1, 2), (3, 2)], [(4, 4)])
QUESTIONS = ((7, 8, 9, 10, 11), (20, 21), (30, 31, 32), (40,))


def lively(tiny, stage, seed=0, **settings):
    """A model that keeps opening spans and ends now and then: only few tokens have a say."""
    model = tiny.model(stage, seed=seed, **settings)
    few = [tiny.LVR_START, tiny.EOS, *range(3, 11)]
    with torch.no_grad():
        keep = torch.zeros(tiny.VOCABULARY, 1)
        keep[few] = 1.0
        keep[tiny.LVR_START] = 2.0
        model.lm_head.weight.mul_(keep)
    model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    return model


def prompt(tiny, which, opened=()):
    """Left-padded prompts; `opened` ones end with the start token. Pixels belong to the prompt alone."""
    rows = []
    for n in which:
        r = tiny.row(IMAGES[n], [], QUESTIONS[n])
        r.ids, r.labels = r.ids[: r.prompt], r.labels[: r.prompt]
        if n in opened:
            r.ids, r.labels = [*r.ids, tiny.LVR_START], [*r.labels, -100]
        rows.append(r)
    batch = tiny.batch(rows, padding="left")
    batch.pop("labels")
    if "pixel_values" in batch:
        batch["pixel_values"] = torch.cat([tiny.pixels(IMAGES[n], seed=n) for n in which if IMAGES[n]])
    return batch


def full(model, batch, **settings):
    return model.generate(
        **batch, return_dict_in_generate=True, return_latents=True, **{"max_new_tokens": 12, **settings}
    )


def new_tokens(output, batch):
    return output.sequences[:, batch["input_ids"].shape[1] :]


def check_alone(tiny, model, which, together, settings, opened=()):
    lengths = []
    for row, n in enumerate(which):
        single = prompt(tiny, [n], opened)
        alone = full(model, single, **settings)
        got, expected = new_tokens(together, prompt(tiny, which, opened))[row], new_tokens(alone, single)[0]
        count = len(expected)
        assert got.tolist() == expected.tolist() + [tiny.PAD] * (len(got) - count)
        assert torch.equal(together.latent_mask[row, :count], alone.latent_mask[0])
        assert not together.latent_mask[row, count:].any()
        for ours, theirs in (
            (together.step_hidden[row, :count], alone.step_hidden[0]),
            (together.latents[row], alone.latents[0]),
            (together.probes[row], alone.probes[0]),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        lengths.append((count, len(alone.latents[0])))
    return lengths


@pytest.mark.parametrize("mode", ["clean", "parity"])
@pytest.mark.parametrize("which", [[0], [0, 1], [0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_batch_equals_each_prompt_alone(tiny, which, mode):
    model = lively(tiny, "stage2")
    seen = []
    for settings in ({}, {"repetition_penalty": 1.3}):
        settings = {"latent_mode": mode, **settings}
        together = full(model, prompt(tiny, which), **settings)
        seen += check_alone(tiny, model, which, together, settings)
    if len(which) == 4:
        # Otherwise nothing was tested: rows end at different times, with different numbers of spans.
        assert len({count for count, _ in seen}) > 1 and len({spans for _, spans in seen}) > 1


@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_mixed_starts_in_one_batch(tiny, mode):
    model, which, opened = lively(tiny, "stage1", seed=3), [0, 1, 2, 3], (1, 3)
    together = full(model, prompt(tiny, which, opened), latent_mode=mode)
    assert together.latent_mask[:, 0].tolist() == [False, True, False, True]
    check_alone(tiny, model, which, together, {"latent_mode": mode}, opened)


def test_padding_is_not_penalised(tiny):
    """Whatever id fills the gap; a token that the prompt does hold is penalised even if it is also the padding."""
    model, settings = lively(tiny, "sft"), {"repetition_penalty": 3.0, "max_new_tokens": 8, "eos_token_id": 300}
    single = prompt(tiny, [1])
    alone = new_tokens(full(model, single, **settings), single)[0].tolist()
    for padding in {*alone, 20}:
        batch = prompt(tiny, [0, 1])
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], padding)
        assert new_tokens(full(model, batch, **settings), batch)[1].tolist() == alone


def host_of(tiny, model):
    host = Qwen2_5_VLForConditionalGeneration(tiny.host_config()).eval()
    host.load_state_dict(model.state_dict(), strict=False)
    host.generation_config = model.generation_config
    return host


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}])
@pytest.mark.parametrize("stage", ["stage2", "sft", "boundary"])
def test_without_spans_it_is_the_host_librarys_generate(tiny, stage, settings):
    model = lively(tiny, stage, seed=1)
    if stage == "stage2":
        with torch.no_grad():  # never the arg-max
            model.lm_head.weight[tiny.LVR_START] = 0
    host = host_of(tiny, model)
    for n in range(4):
        batch = prompt(tiny, [n])
        ours = model.generate(**batch, max_new_tokens=20, **settings)
        theirs = host.generate(**batch, max_new_tokens=20, do_sample=False, **settings)
        assert torch.equal(ours, theirs), n
    together = prompt(tiny, [0, 1, 2, 3])
    if not settings:  # the host penalises padding ids too
        theirs = host.generate(**together, max_new_tokens=20, do_sample=False)
        assert torch.equal(model.generate(**together, max_new_tokens=20), theirs)


def replay(model, batch, output, row=0):
    """Hidden states of the whole sequence in one pass without a cache, latents put in as inputs."""
    ids = output.sequences[row : row + 1]
    prompt_length = batch["input_ids"].shape[1]
    embeds = model.get_input_embeddings()(ids).clone()
    if "pixel_values" in batch:
        features = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
        embeds[ids == model.config.image_token_id] = features
    latent = torch.cat([torch.zeros(prompt_length, dtype=torch.bool), output.latent_mask[row]])
    embeds[0, latent] = output.latents[row].flatten(0, 1)
    positions, deltas = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch.get("image_grid_thw")
    )
    after = torch.arange(prompt_length, ids.shape[1]) + deltas
    positions = torch.cat([positions, after.expand(3, 1, -1)], dim=2)
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return hidden[0], latent


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_one_pass_over_the_whole_sequence_gives_the_same_states(tiny, n):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [n], opened=(n,))
    output = full(model, batch)
    hidden, latent = replay(model, batch, output)
    new = output.step_hidden.shape[1]
    torch.testing.assert_close(output.step_hidden[0], hidden[-new - 1 : -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.probes[0].flatten(0, 1), hidden[latent], rtol=1e-4, atol=1e-4)
    # A latent is the state one position before its slot.
    before = latent.roll(-1)
    torch.testing.assert_close(output.latents[0].flatten(0, 1), hidden[before], rtol=1e-4, atol=1e-4)
    tokens = model.lm_head(hidden).argmax(-1)[-new - 1 : -1]
    mask = output.latent_mask[0]
    assert torch.equal(tokens[~mask], new_tokens(output, batch)[0][~mask])


def test_training_on_the_decoded_sequence_sees_the_same_probes(tiny):
    """Slots of the training forward filled with the fed-back states reproduce decoding: positions, offsets, order."""
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0], opened=(0,))
    output = full(model, batch)
    spans = len(output.latents[0])
    assert spans >= 2
    ids = output.sequences
    train = {
        **{k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")},
        "input_ids": ids,
        "labels": ids,
        "mm_token_type_ids": (ids == tiny.IMAGE).long(),
        "boxes": [[0, 0, 1, 1]] * spans,
        "box_sample": [0] * spans,
        "box_image": [0] * spans,
    }
    everything = torch.ones(spans, dtype=torch.bool)
    trained = model(**train, slot_inputs=output.latents[0], free_running=everything)
    slots = trained.last_hidden_state[ids == tiny.LVR].view(spans, tiny.SLOTS, -1)
    torch.testing.assert_close(slots, output.probes[0], rtol=1e-4, atol=1e-4)


def test_growing_the_cache_changes_nothing(tiny, monkeypatch):
    model, batch = lively(tiny, "stage2", seed=0), prompt(tiny, [0, 1, 2, 3], opened=(0,))
    lengths = []
    grow = KVCache.grow
    monkeypatch.setattr(KVCache, "grow", lambda cache, n: (lengths.append(n), grow(cache, n))[1])
    results, grown = [], []
    for step in (1, 4, 1024):
        lengths.clear()
        monkeypatch.setattr(engine, "COLUMN_STEP", step)
        results.append(full(model, batch, max_new_tokens=25))
        grown.append(len(lengths))
    assert grown[0] > 2 and grown[1] > 1 and grown[2] == 0
    for other in results[:2]:
        assert torch.equal(other.sequences, results[2].sequences)
        torch.testing.assert_close(other.step_hidden, results[2].step_hidden, rtol=1e-4, atol=1e-4)


def test_clean_is_parity_with_the_ghosts_hidden(tiny):
    model = lively(tiny, "stage2")
    for n in range(4):
        batch = prompt(tiny, [n], opened=(n,))
        clean, parity = (
            full(model, batch, max_new_tokens=10),
            full(model, batch, max_new_tokens=60, latent_mode="parity"),
        )
        shown, ghosts = new_tokens(clean, batch)[0], new_tokens(parity, batch)[0]
        both = min(len(shown), len(ghosts))
        mask = parity.latent_mask[0, :both]
        assert torch.equal(clean.latent_mask[0, : both - 1], mask[: both - 1])
        assert torch.equal(shown[:both], torch.where(mask, tiny.LVR, ghosts[:both]))
        assert (ghosts[:both][mask] != tiny.LVR).all()
        torch.testing.assert_close(clean.step_hidden[:, :both], parity.step_hidden[:, :both])
        # Clean counts only what it shows, parity every ghost.
        ended = tiny.EOS in shown.tolist()
        assert ended or int((~clean.latent_mask).sum()) == 10
        assert tiny.EOS in ghosts.tolist() or len(ghosts) == 60


def test_returned_latents_consumed_again_give_the_same_answer(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1, 2, 3], opened=(0, 1, 2, 3))
    limit = 4
    first = full(model, batch, max_new_tokens=limit, eos_token_id=300)
    own = torch.stack([spans[0] for spans in first.latents])
    with torch.no_grad():  # one span only, so that the first span's latents are all there are
        model.lm_head.weight[tiny.LVR_START] = 0
    first = full(model, batch, max_new_tokens=limit, eos_token_id=300)
    again = full(model, batch, max_new_tokens=limit, eos_token_id=300, latents=own)
    assert torch.equal(again.sequences, first.sequences)
    torch.testing.assert_close(again.step_hidden, first.step_hidden, rtol=1e-4, atol=1e-4)
    swapped = full(model, batch, max_new_tokens=limit, eos_token_id=300, latents=own.roll(1, 0))
    torch.testing.assert_close(torch.stack([s[0] for s in swapped.latents]), own.roll(1, 0))
    assert (swapped.step_hidden - first.step_hidden)[:, tiny.SLOTS + 1 :].abs().max() > 1e-2
    torch.testing.assert_close(swapped.step_hidden[:, :1], first.step_hidden[:, :1])


def test_probes_are_taken_where_the_checkpoint_was_trained(tiny):
    """Also of spans that consume other latents: the probes are the model's own states."""
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1], opened=(0, 1))
    other = torch.randn(2, tiny.SLOTS, tiny.WIDTH)
    for settings in ({}, {"latents": other}):
        model.objective = type(model.objective).for_stage("stage2")
        at_slots = full(model, batch, **settings)
        model.objective = type(model.objective).for_stage("stage2", probe_offset=-1)
        before = full(model, batch, **settings)
        for row in range(2):
            states, first = before.step_hidden[row], before.probes[row][0]
            torch.testing.assert_close(first, states[: tiny.SLOTS])
            torch.testing.assert_close(at_slots.probes[row][0], states[1 : tiny.SLOTS + 1])


def test_shapes_of_what_is_returned(tiny):
    model, batch = lively(tiny, "stage1"), prompt(tiny, [0, 1], opened=(1,))
    output = full(model, batch)
    rows, new = new_tokens(output, batch).shape
    assert torch.equal(output.sequences[:, :-new], batch["input_ids"])
    assert output.step_hidden.shape == (rows, new, tiny.WIDTH) and output.latent_mask.shape == (rows, new)
    for row in range(rows):
        spans = int(output.latent_mask[row].sum()) // tiny.SLOTS
        assert output.latents[row].shape == output.probes[row].shape == (spans, tiny.SLOTS, tiny.WIDTH)
    plain = model.generate(**batch, max_new_tokens=12)
    assert torch.equal(plain, output.sequences)
    light = model.generate(**batch, max_new_tokens=12, return_dict_in_generate=True)
    assert light.latents is None and light.step_hidden is None and torch.equal(light.latent_mask, output.latent_mask)


def test_a_span_cut_off_by_the_limit_is_not_returned(tiny):
    model, batch = lively(tiny, "stage1"), prompt(tiny, [0], opened=(0,))
    output = full(model, batch, max_new_tokens=2, latent_mode="parity")
    assert output.latents[0].shape == (0, tiny.SLOTS, tiny.WIDTH)
    single = full(model, batch, max_new_tokens=1, latent_mode="parity")
    assert (
        single.latents[0].shape == (0, tiny.SLOTS, tiny.WIDTH)
        and single.sequences.shape[1] == batch["input_ids"].shape[1] + 1
    )


def test_filler_slots_consume_the_slot_embedding(tiny):
    model, batch = lively(tiny, "filler"), prompt(tiny, [0, 1], opened=(0, 1))
    output = full(model, batch, max_new_tokens=4)
    embedding = model.get_input_embeddings().weight[tiny.LVR]
    for row in range(2):
        assert len(output.latents[row]) >= 1
        assert torch.equal(output.latents[row], embedding.expand_as(output.latents[row]))
    ids = output.sequences[1:, batch["attention_mask"][1].argmax() :]
    plain = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids), use_cache=False
    ).last_hidden_state
    new = output.step_hidden.shape[1]
    own = new_tokens(output, batch)[1].tolist().index(tiny.PAD)
    assert own < new and not output.step_hidden[1, own:].any()
    expected = plain[0, -new - 1 : -1][:own]
    torch.testing.assert_close(output.step_hidden[1, :own], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", ["boundary", "sft", "base"])
def test_stages_without_slots_open_no_span(tiny, stage):
    model, batch = lively(tiny, stage), prompt(tiny, [0], opened=(0,))
    output = full(model, batch, max_new_tokens=20, eos_token_id=300)
    assert not output.latent_mask.any() and tiny.LVR_START in new_tokens(output, batch)[0].tolist()
    assert output.latents[0].numel() == 0 and new_tokens(output, batch).shape[1] == 20


def test_another_number_of_latents_needs_the_flag(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0], opened=(0,))
    with pytest.raises(ConfigError, match="was trained with 3, got 2; .* allow_other_latent_steps=True"):
        model.generate(**batch, latent_steps=2, max_new_tokens=4)
    with pytest.raises(ConfigError, match="was trained with 0, got 3"):
        lively(tiny, "sft").generate(**batch, latent_steps=3, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**batch, latent_steps=3, max_new_tokens=4)
    for steps in (0, 1, 5):
        with pytest.warns(UserWarning, match=f"decoding with {steps} latent steps, trained with 3") as caught:
            output = full(model, batch, latent_steps=steps, allow_other_latent_steps=True, max_new_tokens=2)
        assert caught[0].filename == __file__
        assert output.latent_mask[0, : steps + 1].tolist() == [True] * steps + [False]


def test_force_latent(tiny):
    model = lively(tiny, "stage2")
    closed = prompt(tiny, [0, 1, 2, 3])
    output = full(model, closed, force_latent=True)
    forced = new_tokens(output, closed)
    assert (forced[:, 0] == tiny.LVR_START).all()
    assert output.latent_mask[:, :4].tolist() == [[False, True, True, True]] * 4
    # The same as a prompt that already ends with the start token, which is then not repeated.
    opened = prompt(tiny, [0, 1, 2, 3], opened=(0, 1, 2, 3))
    for force in (False, True):
        other = full(model, opened, max_new_tokens=11, force_latent=force)
        count = min(other.step_hidden.shape[1], forced.shape[1] - 1)
        assert torch.equal(new_tokens(other, opened)[:, :count], forced[:, 1 : count + 1])


def test_force_latent_opens_the_rows_that_need_it(tiny):
    model, which = lively(tiny, "stage2"), [0, 1, 2, 3]
    for steps, mode in ((3, "clean"), (3, "parity"), (0, "clean")):
        settings = {"force_latent": True, "latent_mode": mode, "latent_steps": steps, "allow_other_latent_steps": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            together = full(model, prompt(tiny, which, (1, 3)), **settings)
            check_alone(tiny, model, which, together, settings, (1, 3))


def test_sampling_repeats_with_its_seed(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1])
    draw = lambda seed: model.generate(**batch, do_sample=True, temperature=2.0, max_new_tokens=16, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert len({str(draw(seed).tolist()) for seed in range(4)}) > 1


def test_settings_come_from_the_generation_config(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [1])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1e-6, top_k=1, repetition_penalty=1.3, eos_token_id=[tiny.EOS, 5],
        pad_token_id=tiny.PAD, max_new_tokens=7,
    )  # fmt: skip
    explicit = model.generate(
        **batch, do_sample=False, repetition_penalty=1.3, eos_token_id=[5, tiny.EOS], max_new_tokens=7
    )
    assert torch.equal(model.generate(**batch), explicit)
    other = GenerationConfig(eos_token_id=tiny.EOS, max_new_tokens=3)
    explicit = model.generate(**batch, do_sample=False, repetition_penalty=1.0, max_new_tokens=3)
    assert torch.equal(model.generate(**batch, generation_config=other), explicit)
    other.return_dict_in_generate = True
    assert torch.equal(model.generate(**batch, generation_config=other).sequences, explicit)
    assert torch.equal(model.generate(**batch, generation_config=other, return_dict_in_generate=False), explicit)


class Streamer:
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, ids):
        self.heard.append(ids)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_streaming(tiny, mode):
    model, batch, streamer = lively(tiny, "stage2"), prompt(tiny, [0], opened=(0,)), Streamer()
    output = full(model, batch, latent_mode=mode, streamer=streamer)
    new = new_tokens(output, batch)[0]
    assert torch.equal(streamer.heard[0], batch["input_ids"]) and streamer.ended
    expected = new if mode == "parity" else new[~output.latent_mask[0]]
    assert torch.cat(streamer.heard[1:]).tolist() == expected.tolist()
    assert mode == "parity" or tiny.LVR not in expected.tolist()
    with pytest.raises(ConfigError, match="streamer: expected one prompt, got a batch of 2"):
        model.generate(**prompt(tiny, [0, 1]), streamer=Streamer())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"num_beams": 2}, ConfigError, "num_beams: latent decoding supports 1, got 2"),
        ({"num_return_sequences": 3}, ConfigError, "num_return_sequences: latent decoding supports 1"),
        ({"max_tokens": 3}, ConfigError, r"unsupported settings \['max_tokens'\]; supported: .*max_new_tokens"),
        ({"top_h": 0.1, "typical_p": 1.0}, ConfigError, r"\['top_h', 'typical_p'\]"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens: expected at least 1 .*, got 0"),
        ({"latent_mode": "both"}, ValueError, "latent_mode: expected one of"),
        ({"latent_steps": -1, "allow_other_latent_steps": True}, ValueError, "expected at least 0, got -1"),
        ({"latents": torch.zeros(2, 3, 64)}, ValueError, r"expected \(1, 3, 64\) or .*, got \(2, 3, 64\)"),
        ({"latents": torch.zeros(1, 3, 32)}, ValueError, r"latents: expected \(1, 3, 64\)"),
        ({"latents": torch.zeros(3, 64)}, ValueError, r"latents: expected \(1, 3, 64\) .*, got \(3, 64\)"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature: expected > 0"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask: expected"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ValueError, "expected .* with L >= 1"),
        ({"image_grid_thw": None}, ValueError, "6 image tokens in input_ids"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, ValueError, "6 image tokens in input_ids, .* need 4"),
        ({"pixel_values": None}, ValueError, "image_grid_thw without pixel_values or image_features"),
        ({"mm_token_type_ids": None}, ValueError, "images need mm_token_type_ids"),
        ({"pixel_values": None, "image_features": torch.zeros(5, 64)}, ValueError, "expected 6 .*, got 5"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:decoding with")
def test_what_cannot_be_done_is_named(tiny, change, kind, message):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0])
    with pytest.raises(kind, match=message):
        model.generate(**{**batch, **change})


def test_right_padded_prompts_are_refused(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1])
    batch = {k: v.flip(1) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    with pytest.raises(ValueError, match="must be left-padded for decoding"):
        model.generate(**batch)


def test_cached_features_and_given_positions(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1, 2])
    expected = full(model, batch)
    features = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    cached = {k: batch[k] for k in ("input_ids", "attention_mask", "image_grid_thw")}
    output = full(model, cached, image_features=features, position_ids=positions)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.step_hidden, expected.step_hidden, rtol=1e-4, atol=1e-4)


def test_earlier_spans_in_the_prompt_need_no_box(tiny):
    model = lively(tiny, "stage2")
    r = tiny.row([(2, 2)], [((0, 0, 1, 1), 0)])
    batch = tiny.batch([r])
    inputs = {
        k: batch[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    }
    assert full(model, inputs, force_latent=True).latents[0].shape[0] >= 1


def test_decoding_leaves_nothing_behind_for_training(tiny):
    rows = [tiny.row([(2, 3)], [((0.1, 0.1, 0.6, 0.9), 0)]), tiny.row()]
    model, batch = lively(tiny, "stage2"), tiny.batch(rows)
    fresh = model(**batch).losses
    other = prompt(tiny, [3, 1])
    expected = model.generate(**other, max_new_tokens=8)
    for name, value in model(**batch).losses.items():
        assert torch.equal(value, fresh[name]), name
    # Nor does the host's own forward, which remembers rope offsets, disturb decoding or training.
    model(**prompt(tiny, [0, 2]))
    assert torch.equal(model.generate(**other, max_new_tokens=8), expected)
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    for name, value in model(**batch).losses.items():
        assert torch.equal(value, fresh[name]), name


def test_a_model_in_training_mode_with_checkpointing_decodes_the_same(tiny):
    model, batch = lively(tiny, "stage2"), prompt(tiny, [0, 1], opened=(0,))
    expected = full(model, batch)
    model.train()
    model.gradient_checkpointing_enable()
    output = full(model, batch)
    assert torch.equal(output.sequences, expected.sequences) and model.training
    assert model.model.language_model.training and model.lm_head.weight.requires_grad
