"""`LatentDecoder`: whoever shares the batch, whenever rows come and go, every row is what it is alone."""

import random

import pytest
import torch

import vreflection as vr
from vreflection.engine import prefill
from vreflection.errors import ConfigError
from vreflection.ops import dispatch

STEPS = ("torch", "model")


def make(model, **settings):
    return vr.LatentDecoder(model, **{"max_batch_size": 3, "max_length": 128, **settings})


def check(answer, expected, hidden=True):
    assert answer.tokens == expected.tokens and answer.latent == expected.latent
    if hidden:
        for ours, theirs in (
            (answer.step_hidden, expected.hidden), (answer.latents, expected.latents), (answer.probes, expected.probes),
        ):  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["clean", "parity"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_answer_is_the_prompts_own(lab, step, mode, rows):
    """More prompts than rows, mixed starts and ends."""
    model = lab.lively()
    prompts = [lab.prompt(n, opened=n % 3 == 0) for n in range(lab.count)] * 2
    settings = {"max_new_tokens": 12}
    expected = [lab.alone(model, p, latent_mode=mode, **settings) for p in prompts[: lab.count]] * 2
    decoder = make(model, max_batch_size=rows, step=step, latent_mode=mode)
    answers = decoder.generate(prompts, return_latents=True, **settings)
    assert [a.index for a in answers] == list(range(len(prompts)))
    for answer, own in zip(answers, expected, strict=True):
        check(answer, own)
    # Otherwise nothing was tested.
    assert len({len(e.tokens) for e in expected}) > 1 and len({len(e.latents) for e in expected}) > 1


def test_the_model_step_and_our_own_agree(lab):
    model = lab.lively(seed=4)
    prompts = [lab.prompt(n) for n in range(lab.count)]
    ours, hosts = (make(model, step=step).generate(prompts, max_new_tokens=20, return_latents=True) for step in STEPS)
    for a, b in zip(ours, hosts, strict=True):
        assert a.tokens == b.tokens and a.finish_reason == b.finish_reason
        torch.testing.assert_close(a.step_hidden, b.step_hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_attention_the_host_uses(lab, implementation):
    model = lab.lively()
    prompts = [lab.prompt(n) for n in range(lab.count)]
    expected = [a.tokens for a in make(model, step="torch").generate(prompts, max_new_tokens=10)]
    model.set_attn_implementation(implementation)
    decoder = make(model, step="model")
    assert [a.tokens for a in decoder.generate(prompts, max_new_tokens=10)] == expected
    assert model.model.language_model.config._attn_implementation == implementation


def test_requests_of_every_kind_in_one_batch(lab, tiny):
    model = lab.lively()
    given = torch.randn(tiny.SLOTS, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    kinds = [
        {}, {"force_latent": True}, {"latents": given, "force_latent": True}, {"repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 2.0}, {"do_sample": True, "top_k": 3, "temperature": 3.0},
        {"do_sample": True, "top_p": 0.6, "repetition_penalty": 0.8}, {"max_new_tokens": 3},
        {"eos_token_id": [5, tiny.EOS]}, {"latent_steps": 0, "allow_other_latent_steps": True},
        {"latent_steps": 5, "allow_other_latent_steps": True},
    ]  # fmt: skip
    limit = {"max_new_tokens": 9}
    with pytest.warns(UserWarning, match="decoding with"):
        decoder = make(model, max_batch_size=4)
        requests = [
            decoder.request(lab.prompt(n % lab.count), seed=n, return_latents=n % 2 == 0, **limit | kind)
            for n, kind in enumerate(kinds)
        ]
        together = decoder.generate(requests)
        for n, (kind, answer) in enumerate(zip(kinds, together, strict=True)):
            if "latents" in kind:
                kind = {**kind, "latents": given[None]}
            expected = lab.alone(model, lab.prompt(n % lab.count), seed=n, **limit | kind)
            check(answer, expected, hidden=n % 2 == 0)
            assert (answer.latents is None) == (n % 2 == 1)


def test_draws_depend_on_the_seed_alone(lab):
    model = lab.lively()
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}
    prompts = [lab.prompt(n) for n in range(lab.count)]
    first = [a.tokens for a in make(model).generate(prompts, seed=5, **settings)]
    assert first == [a.tokens for a in make(model, max_batch_size=6).generate(prompts, seed=5, **settings)]
    assert first != [a.tokens for a in make(model).generate(prompts, seed=6, **settings)]
    one = make(model).request(prompts[2], seed=7, **settings)
    assert make(model).generate([*prompts[:2], one], **settings)[2].tokens == first[2]
    torch.manual_seed(0)
    drawn = [a.tokens for a in make(model).generate(prompts, **settings)]
    torch.manual_seed(0)
    assert drawn == [a.tokens for a in make(model).generate(prompts, **settings)]


def test_streaming(lab):
    model = lab.lively()
    prompts = [lab.prompt(n) for n in range(lab.count)]
    expected = make(model).generate(prompts, max_new_tokens=10)
    tokens, latent = ({n: [] for n in range(lab.count)} for _ in range(2))
    done, order = {}, []
    for event in make(model).stream(prompts, max_new_tokens=10):
        tokens[event.index].append(event.token)
        latent[event.index].append(event.latent)
        order.append(event.index)
        if event.generation is not None:
            done[event.index] = event.generation
    for n, answer in enumerate(expected):
        assert tokens[n] == answer.tokens == done[n].tokens and latent[n] == answer.latent
    # Rows speak in turn, not one after the other.
    assert order != sorted(order)


def test_a_stream_given_up_frees_the_decoder(lab):
    model = lab.lively()
    decoder = make(model)
    prompts = [lab.prompt(n) for n in range(lab.count)]
    stream = decoder.stream(prompts, max_new_tokens=30, eos_token_id=300)
    for _ in range(5):
        next(stream)
    with pytest.raises(RuntimeError, match="busy with another call"):
        decoder.generate(prompts, max_new_tokens=8)
    stream.close()
    assert not decoder.busy
    expected = [a.tokens for a in make(model).generate(prompts, max_new_tokens=8)]
    assert [a.tokens for a in decoder.generate(prompts, max_new_tokens=8)] == expected


def test_cancelling(lab):
    model = lab.lively()
    settings = {"max_new_tokens": 25, "eos_token_id": 300}
    decoder = make(model, max_batch_size=2)
    requests = [decoder.request(lab.prompt(n), **settings) for n in range(5)]
    expected = make(model).generate(requests)
    tickets = [decoder.submit(request) for request in requests]
    answers, cut = {}, None
    for turn in range(1000):
        for event in decoder.advance():
            if event.generation is not None:
                answers[event.index] = event.generation
        if turn == 3:
            decoder.cancel(tickets[0])  # running
            decoder.cancel(tickets[4])  # queued
            decoder.cancel(999)
            cut = turn
        if not decoder.busy:
            break
    assert cut == 3 and set(answers) == set(tickets)
    for n in (0, 4):
        assert answers[tickets[n]].finish_reason == "cancelled"
        assert answers[tickets[n]].tokens == expected[n].tokens[: len(answers[tickets[n]].tokens)]
    assert 0 < len(answers[tickets[0]].tokens) < 12 and not answers[tickets[4]].tokens
    for n in (1, 2, 3):
        assert answers[tickets[n]].tokens == expected[n].tokens
        assert answers[tickets[n]].finish_reason == "max_new_tokens"
    decoder.cancel(tickets[1])
    assert decoder.advance() == []


def test_why_an_answer_ended(lab, tiny):
    model = lab.lively()
    reasons = {
        a.finish_reason for a in make(model).generate([lab.prompt(n) for n in range(lab.count)], max_new_tokens=9)
    }
    assert reasons == {"eos", "max_new_tokens"}
    # The cache is full: inside a span, or at any other place.
    prompt = lab.prompt(1, opened=True)
    length = prompt["input_ids"].shape[1]
    whole = lab.alone(model, prompt, max_new_tokens=30, eos_token_id=300)
    for room in range(1, 20):
        decoder = make(model, max_batch_size=1)
        request = decoder.request(prompt, max_new_tokens=30, eos_token_id=300)
        decoder.max_length = length + room
        decoder.check_length = lambda _: None
        answer = decoder.generate([request])[0]
        assert answer.tokens == whole.tokens[: room + 1]
        assert answer.finish_reason == "max_length" and answer.latent == whole.latent[: room + 1]


def test_a_cache_filled_to_its_last_column(lab, tiny):
    model, prompt = lab.lively("sft"), lab.prompt(1)
    length = prompt["input_ids"].shape[1]
    settings = {"max_new_tokens": 64 - length, "eos_token_id": 300}
    for step in STEPS:
        answer = make(model, max_length=64, step=step).generate([prompt], return_latents=True, **settings)[0]
        expected = make(model, max_length=256, step=step).generate([prompt], return_latents=True, **settings)[0]
        assert len(answer.tokens) == 64 - length and answer.finish_reason == "max_new_tokens"
        torch.testing.assert_close(answer.step_hidden, expected.step_hidden, rtol=1e-4, atol=1e-4)


def test_leftovers_of_an_earlier_prompt_do_not_matter(lab):
    """Not even NaN, in columns that the new prompt does not reach."""
    model = lab.lively()
    for step in STEPS:
        decoder = make(model, max_batch_size=1, step=step)
        expected = [a.tokens for a in make(model, step=step).generate([lab.prompt(1)], max_new_tokens=20)]
        decoder.generate([lab.prompt(3)], max_new_tokens=40, eos_token_id=300)
        for tensor in (*decoder.cache.keys, *decoder.cache.values):
            assert tensor[0, :, 50].any()
            with torch.inference_mode():
                tensor[0, :, : decoder.prefill.dirty[0]] = float("nan")
        decoder.prefill.held.clear()
        assert [a.tokens for a in decoder.generate([lab.prompt(1)], max_new_tokens=20)] == expected


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_prompts_that_begin_alike_share_their_beginning(lab, tiny, monkeypatch, rows):
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model, computed = lab.lively(), []
    questions = [(7, 8, 9), (7, 8, 10, 11), (60,), (7, 8, 9), (7, 8)]
    prompts = [lab.prompt(3, question=question) for question in questions]
    expected = [a.tokens for a in make(model, share_prefixes=False).generate(prompts, max_new_tokens=10)]
    decoder = make(model, max_batch_size=rows)
    plain = decoder.step.prefill
    decoder.step.prefill = lambda embeds, *rest: (computed.append(embeds.shape[:2].numel()), plain(embeds, *rest))[1]
    assert [a.tokens for a in decoder.generate(prompts, max_new_tokens=10)] == expected
    whole = sum(p["input_ids"].shape[1] for p in prompts)
    assert sum(computed) < whole - 3 * 16  # all but the first skip the image
    assert decoder.prefill.features.encoded == 1
    # Another image with the same ids shares nothing but the tokens before it.
    other = lab.prompt(3, question=(7, 8, 9))
    other["pixel_values"] = other["pixel_values"].flip(0)
    expected = [a.tokens for a in make(model, share_prefixes=False).generate([other], max_new_tokens=10)]
    assert [a.tokens for a in decoder.generate([other], max_new_tokens=10)] == expected
    assert decoder.prefill.features.encoded == 2


def test_images_are_encoded_once(lab, monkeypatch):
    model, calls = lab.lively(), []
    plain = type(model).visual_tokens
    monkeypatch.setattr(
        type(model), "visual_tokens", lambda self, *a: (calls.append(a[1].tolist()), plain(self, *a))[1]
    )
    prompts = [
        lab.prompt(3, question=(7, 8)),
        lab.prompt(0),
        lab.prompt(3, question=(9,)),
        lab.prompt(2),
        lab.prompt(0),
    ]
    decoder = make(model, max_batch_size=2)
    decoder.generate(prompts, max_new_tokens=4)
    assert sorted(map(str, [grid for grids in calls for grid in grids])) == sorted(
        map(str, [[1, 8, 8], [1, 4, 6], [1, 2, 4], [1, 6, 4]])
    )
    # A key of the caller's own is trusted; and only the last images are kept.
    small = make(model, max_batch_size=1, image_cache=1)
    for n in (0, 3, 0):
        small.generate([{**lab.prompt(n), "image_keys": [f"file {n}"]}], max_new_tokens=2)
    assert small.prefill.features.encoded == 3


def test_admission_in_the_midst_of_spans(lab):
    """A prompt admitted while others are anywhere in their spans."""
    model = lab.lively()
    requests = [make(model).request(lab.prompt(n), max_new_tokens=14) for n in range(lab.count)]
    expected = [a.tokens for a in make(model).generate(requests)]
    for seed in range(6):
        order, decoder, answers = random.Random(seed), make(model, max_batch_size=4), {}
        coming, tickets = list(range(lab.count)), {}
        while coming or decoder.busy:
            if coming and order.random() < 0.4:
                n = coming.pop(0)
                tickets[decoder.submit(requests[n])] = n
            for event in decoder.advance(order.choice([1, 2, 5])):
                if event.generation is not None:
                    answers[tickets[event.index]] = event.generation.tokens
        assert [answers[n] for n in range(lab.count)] == expected


def test_an_iterable_is_read_as_rows_become_free(lab):
    model, read = lab.lively(), []
    decoder = make(model, max_batch_size=2)

    def prompts():
        for n in range(lab.count):
            read.append(n)
            yield lab.prompt(n)

    ahead = []
    for event in decoder.stream(prompts(), max_new_tokens=5):
        if event.generation is not None:
            ahead.append(len(read))
    assert ahead[0] == 2 and ahead[-1] == lab.count


def test_a_processor_takes_questions_and_gives_text(tiny, lab):
    from PIL import Image

    model, processor = lab.lively(), tiny.processor()
    decoder = make(model, max_length=256, processor=processor)
    image = Image.new("RGB", (60, 80), (200, 30, 30))
    answers = decoder.generate([("what", image), "no image", ("two", [image, image])], max_new_tokens=6)
    for answer, (question, images) in zip(answers, (("what", image), ("no image", None), ("two", [image, image]))):
        batch = processor(None if images is None else [images], question)
        expected = lab.alone(model, batch, max_new_tokens=6)
        assert answer.tokens == expected.tokens
        shown = [t for t, latent in zip(expected.tokens, expected.latent) if not latent]
        assert answer.text == processor.decode(shown)
    with pytest.raises(ValueError, match="needs a decoder with a processor"):
        make(model).generate(["no image"])


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"max_batch_size": 0}, ConfigError, "max_batch_size: expected at least 1, got 0"),
        ({"max_length": 1}, ConfigError, "max_length: expected at least 2, got 1"),
        ({"step": "quick"}, ConfigError, "step: expected one of .*, got 'quick'"),
        ({"step": "fused"}, ConfigError, 'step="fused": .*CUDA.*; use step="auto"'),
        ({"tier": "graph"}, ConfigError, "graph"),
        ({"latent_mode": "both"}, ValueError, "latent_mode: expected one of"),
        ({"max_batch_size": 4096, "max_length": 2**24}, ConfigError, r"max_batch_size=4096 times max_length=16777216 "
         r"needs \d+\.\d\d GiB, cpu has .* GiB to give; with this batch size lengths up to \d+ fit, at this length up"),
    ],
)  # fmt: skip
def test_what_a_decoder_cannot_be(lab, settings, kind, message):
    with pytest.raises(kind, match=message):
        make(lab.lively(), **settings)


def test_what_a_request_cannot_be(lab, tiny):
    decoder = make(lab.lively(), max_length=64)
    prompt = lab.prompt(3)
    length = prompt["input_ids"].shape[1]
    two = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    too_long = f"prompt's {length} tokens, 50 new ones and 3 latents need {length + 53}"
    one_patch_short = {**prompt, "pixel_values": prompt["pixel_values"][:-1]}
    for given, settings, kind, message in (
        (prompt, {"max_new_tokens": 50}, ConfigError, too_long),
        (prompt, {"max_tokens": 6}, ConfigError, r"unsupported settings \['max_tokens'\]"),
        (prompt, {"latent_steps": 4}, ConfigError, "was trained with 3, got 4"),
        (prompt, {"eos_token_id": list(range(9))}, ConfigError, "eos_token_id: expected at most 8 ids, got 9"),
        (prompt, {"latents": torch.zeros(2, 5)}, ValueError, r"latents: expected \(3, 64\) for every span"),
        (two, {}, ValueError, r"input_ids: expected one prompt, .* got \(2, 5\); pass a list"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, {}, ValueError, "at least one token"),
        (one_patch_short, {}, ValueError, "pixel_values: expected 64 rows .* got 63"),
        ({**prompt, "pixel_values": None}, {}, ValueError, "image_grid_thw without pixel_values"),
        (17, {}, ValueError, "prompt: expected a processor's output .* got int"),
    ):  # fmt: skip
        # The first prompt is fine; nothing is started all the same.
        with pytest.raises(kind, match=message):
            decoder.generate([lab.prompt(1), given], **{"max_new_tokens": 9, **settings})
        assert not decoder.busy
    with pytest.raises(ValueError, match="16 image tokens in input_ids"):
        decoder.generate(
            max_new_tokens=3, prompts=[{k: v for k, v in prompt.items() if k not in ("pixel_values", "image_grid_thw")}]
        )
    assert not decoder.busy and decoder.generate([lab.prompt(1)], max_new_tokens=3)[0].tokens


def test_grown_caches_are_checked_too(lab, monkeypatch):
    from vreflection.engine import memory

    decoder = make(lab.lively(), max_length=None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="needs 0.0. GiB"):
        decoder.generate([{"input_ids": torch.full((1, 600), 7)}], max_new_tokens=3)
    assert not decoder.busy


def test_the_choice_is_said_once(lab, caplog):
    from vreflection.engine import choice

    choice._said.clear()
    with caplog.at_level("INFO", logger="vreflection"):
        make(lab.lively())
        make(lab.lively())
    said = [r.message for r in caplog.records if r.message.startswith("decode step")]
    assert len(said) == 1 and "fused: " in said[0]


def test_models_our_step_does_not_know_fall_back_to_the_hosts_forward(lab):
    from vreflection.engine.steps import why_not_qwen

    class Adapter(torch.nn.Linear):
        pass

    model = lab.lively()
    linear = model.model.language_model.layers[1].mlp.up_proj
    linear.__class__ = Adapter
    assert "layer 1's mlp.up_proj to be nn.Linear, got Adapter" in why_not_qwen(model)
    assert make(model).step.name == "model"
    with pytest.raises(ConfigError, match='step="torch": .*Adapter'):
        make(model, step="torch")
    linear.__class__ = torch.nn.Linear
    model.model.language_model.rotary_emb.rope_type = "dynamic"
    assert "rope_type='dynamic'" in why_not_qwen(model)


@pytest.mark.parametrize("seed", range(3))
def test_parameters_changed_in_place_are_seen(lab, seed, monkeypatch):
    """What was computed with the old ones, images and shared beginnings, is forgotten."""
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model = lab.lively(seed=seed)
    decoder = make(model)
    decoder.generate([lab.prompt(3)], max_new_tokens=5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(0.7)
    fresh = make(model).generate([lab.prompt(3)], max_new_tokens=9, return_latents=True)[0]
    again = decoder.generate([lab.prompt(3)], max_new_tokens=9, return_latents=True)[0]
    assert again.tokens == fresh.tokens
    torch.testing.assert_close(again.step_hidden, fresh.step_hidden, rtol=1e-4, atol=1e-4)


def test_sliding_windows_are_refused(lab, monkeypatch):
    model = lab.lively()
    config = model.model.language_model.config
    monkeypatch.setattr(config, "layer_types", ["full_attention", "sliding_attention"])
    with pytest.raises(ConfigError, match="no decoder step can run this model here: .*model: the cache holds full"):
        make(model)


@pytest.mark.parametrize("step", [*STEPS, "cpp"])
def test_hidden_images_are_as_if_masked_after_the_prompt(lab, tiny, step):
    """Beside rows that see theirs, with prompts that begin alike before and after."""
    from vreflection.engine.requests import Prompt
    from vreflection.evaluation.forced import ForcedScorer, GivenAnswer

    if step == "cpp" and dispatch.CPP_MISSING:
        pytest.skip(dispatch.CPP_MISSING)
    model = lab.lively()
    decoder = make(model, step=step, max_batch_size=4)
    seen = decoder.generate([lab.prompt(0)], max_new_tokens=8, return_latents=True)[0]
    requests = [
        decoder.request(lab.prompt(n), hide_images=hide, force_latent=True, return_latents=True, max_new_tokens=8)
        for n, hide in ((0, True), (0, False), (2, True), (1, True), (0, True), (0, False))
    ]
    answers = decoder.generate(requests)
    scorer = ForcedScorer(model)
    for request, answer in zip(requests, answers, strict=True):
        given = GivenAnswer(answer.tokens, answer.latent, answer.latents.flatten(0, 1), request.hide_images)
        blind = GivenAnswer(answer.tokens, answer.latent, answer.latents.flatten(0, 1), True)
        same, hidden = scorer.hidden(request.prompt, [given, blind])
        torch.testing.assert_close(answer.step_hidden, same, rtol=1e-4, atol=1e-4)
        if request.prompt.image_grid_thw is not None and not request.hide_images:
            assert (same - hidden).abs().max() > 1e-2  # seeing is not the same
    assert answers[0].tokens == answers[4].tokens and answers[1].tokens == answers[5].tokens
    again = decoder.generate([lab.prompt(0)], max_new_tokens=8, return_latents=True)[0]
    assert again.tokens == seen.tokens
    torch.testing.assert_close(again.step_hidden, seen.step_hidden, rtol=1e-4, atol=1e-4)
    assert Prompt.of(lab.prompt(1)).image_grid_thw is None  # one of them has nothing to hide
