"""Latents that a request brings: span by span, in every step, beside requests that bring none."""

import pytest
import torch

import vreflection as vr
from vreflection.evaluation.forced import ForcedScorer, GivenAnswer
from vreflection.ops import dispatch

STEPS = ["torch", "model", *([] if dispatch.CPP_MISSING else ["cpp"])]
LIMIT = {"max_new_tokens": 14, "return_latents": True, "force_latent": True, "eos_token_id": 300}


def make(model, **settings):
    return vr.LatentDecoder(model, **{"max_batch_size": 3, "max_length": 256, **settings})


def noise(tiny, *shape, seed=0):
    return torch.randn(*shape, tiny.SLOTS, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


def ask(decoder, prompt, **settings):
    return decoder.generate([decoder.request(prompt, **LIMIT | settings)])[0]


def check_consumed(model, request, answer):
    """The hidden states are those of one pass in which the slots hold the latents that the answer reports."""
    states = answer.latents.flatten(0, 1)
    slots = [place for place, inside in enumerate(answer.latent) if inside]
    end = len(answer.tokens) if len(slots) == len(states) else slots[len(states)]  # a span may be cut short
    whole = GivenAnswer(answer.tokens[:end], answer.latent[:end], states, False)
    (hidden,) = ForcedScorer(model).hidden(request.prompt, [whole])
    torch.testing.assert_close(answer.step_hidden[:end], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_one_span_is_replaced_and_the_others_are_not(lab, tiny, step, mode):
    model, prompt = lab.lively(), lab.prompt(3)
    decoder, more = make(model, step=step, latent_mode=mode), {"max_new_tokens": 14 if mode == "clean" else 28}
    own = ask(decoder, prompt, **more)
    count = len(own.latents)
    assert count >= 3
    same = ask(decoder, prompt, latents=own.latents, **more)
    assert same.tokens == own.tokens and torch.equal(same.latents, own.latents)
    torch.testing.assert_close(same.step_hidden, own.step_hidden, rtol=1e-5, atol=1e-5)
    starts = [place for place, inside in enumerate(own.latent) if inside and not own.latent[place - 1]]
    for span in range(3):
        states = own.latents.clone()
        states[span] = noise(tiny, seed=span)
        for latents in (states, [states[span] if number == span else None for number in range(100)]):
            request = decoder.request(prompt, **LIMIT | more | {"latents": latents})
            answer = decoder.generate([request])[0]
            before = starts[span] + 1  # the step that consumes the span's first latent comes next
            assert answer.tokens[:before] == own.tokens[:before]
            torch.testing.assert_close(answer.step_hidden[:before], own.step_hidden[:before], rtol=1e-5, atol=1e-5)
            assert (answer.step_hidden[before] - own.step_hidden[before]).abs().max() > 1e-2
            assert torch.equal(answer.latents[span], states[span])
            torch.testing.assert_close(answer.latents[:span], own.latents[:span], rtol=1e-5, atol=1e-5)
            later = answer.latents[span + 1 :]
            if isinstance(latents, list):
                assert all((mine - theirs).abs().max() > 1e-2 for mine, theirs in zip(later, own.latents[span + 1 :]))
            else:
                wrapped = [own.latents[n] if n != span else states[span] for n in range(count)]
                expected = [wrapped[number % count] for number in range(span + 1, len(answer.latents))]
                assert torch.equal(later, torch.stack(expected) if expected else later[:0])
            check_consumed(model, request, answer)


@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_more_spans_than_latents_begin_again(lab, tiny, mode):
    model, two = lab.lively(), noise(tiny, 2)
    decoder = make(model, latent_mode=mode)
    answer = ask(decoder, lab.prompt(3), latents=two, max_new_tokens=28)
    assert len(answer.latents) >= 3
    for number, states in enumerate(answer.latents):
        assert torch.equal(states, two[number % 2])
    every = ask(decoder, lab.prompt(3), latents=two[1])
    stacked = ask(decoder, lab.prompt(3), latents=two[1:])
    assert every.tokens == stacked.tokens and torch.equal(every.step_hidden, stacked.step_hidden)
    assert all(torch.equal(states, two[1]) for states in every.latents)


@pytest.mark.parametrize("step", STEPS)
def test_rows_with_and_without_latents_share_a_batch(lab, tiny, step):
    """More requests than rows: places are used again, and the buffer grows while others are in their spans."""
    model = lab.lively()
    kinds = [
        {}, {"latents": noise(tiny)}, {"latents": noise(tiny, 3)}, {}, {"latents": [None, noise(tiny, seed=1)]},
        {"latents": noise(tiny, 5), "force_latent": False}, {"force_latent": False}, {"latents": [None]},
        {"latents": noise(tiny, 2), "max_new_tokens": 5}, {},
    ]  # fmt: skip
    alone = [ask(make(model, step=step), lab.prompt(n % lab.count), **kind) for n, kind in enumerate(kinds)]
    decoder = make(model, step=step)
    requests = [decoder.request(lab.prompt(n % lab.count), **LIMIT | kind) for n, kind in enumerate(kinds)]
    for _ in range(2):
        for request, answer, expected in zip(requests, decoder.generate(requests), alone, strict=True):
            assert answer.tokens == expected.tokens and answer.latent == expected.latent
            torch.testing.assert_close(answer.latents, expected.latents, rtol=1e-4, atol=1e-4)
            check_consumed(model, request, answer)
    streamed = [e.generation for e in decoder.stream(requests) if e.generation is not None]
    assert {a.index: a.tokens for a in streamed} == dict(enumerate(a.tokens for a in alone))


def test_generate_takes_a_batch_of_them(lab, tiny):
    model, states = lab.lively(), noise(tiny, 2)
    batch = tiny.batch([tiny.row([(2, 3)], []), tiny.row([(2, 3)], [], (20, 21))], padding="left")
    batch.pop("labels")
    settings = {"return_dict_in_generate": True, **LIMIT}
    by_row = model.generate(**batch, latents=states[:, None].expand(-1, 3, -1, -1), **settings)
    plain = model.generate(**batch, latents=states, **settings)
    assert torch.equal(by_row.sequences, plain.sequences)
    listed = model.generate(**batch, latents=[None, [None, states[1]]], **settings)
    own = model.generate(**batch, **settings)
    assert torch.equal(listed.latents[0], own.latents[0]) and torch.equal(listed.latents[1][0], own.latents[1][0])
    assert torch.equal(listed.latents[1][1], states[1])


def test_a_filler_models_own_states_are_its_embedding(lab, tiny):
    model = lab.lively("filler")
    answer = ask(make(model), lab.prompt(3), latents=[noise(tiny), None])
    embedding = model.get_input_embeddings().weight[tiny.LVR].detach()
    assert torch.equal(answer.latents[0], noise(tiny)) and torch.equal(answer.latents[1], embedding.expand(3, -1))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(4, 64), r"expected \(3, 64\) for every span, or \(spans, 3, 64\), got \(4, 64\)"),
        (torch.zeros(2, 3, 63), r"or \(spans, 3, 64\), got \(2, 3, 63\)"),
        (torch.zeros(0, 3, 64), r"got \(0, 3, 64\)"),
        (torch.zeros(1, 1, 3, 64), r"got \(1, 1, 3, 64\)"),
        (torch.zeros(64), r"got \(64,\)"),
        ([], r"expected \(3, 64\) or None for each span, got \[\]"),
        (torch.full((3, 64), float("nan")), "expected finite numbers, got NaN or infinity"),
        ([None, torch.zeros(2, 64)], r"expected \(3, 64\) or None for each span, got \[None, \(2, 64\)\]"),
    ],
)
def test_other_shapes_and_numbers_are_refused(lab, latents, message):
    with pytest.raises(ValueError, match="latents: .*" + message):
        make(lab.lively()).request(lab.prompt(1), latents=latents)


def test_other_batches_are_refused(lab, tiny):
    model, prompt = lab.lively(), lab.prompt(1)
    for latents, message in (
        (torch.zeros(2, 5, 3, 64), r"expected \(1, 3, 64\) or \(1, spans, 3, 64\), got \(2, 5, 3, 64\)"),
        ([None, None], "expected 1 entries, one per prompt, got 2"),
        ([torch.zeros(2, 64)], r"expected \(3, 64\) for every span"),
    ):
        with pytest.raises(ValueError, match="latents: .*" + message):
            model.generate(**prompt, latents=latents)
