"""Biases, penalties, least lengths, log probabilities and grammars: on every step, against one full pass per answer."""

import json
import math

import pytest

import vreflection as vr
from vreflection.engine.grammar import Grammars
from vreflection.errors import ConfigError
from vreflection.evaluation.forced import ForcedScorer, GivenAnswer
from vreflection.ops import dispatch

STEPS = ["torch", "model", *([] if dispatch.CPP_MISSING else ["cpp"])]
LIMIT = {"max_new_tokens": 16, "return_latents": True}


def make(model, **settings):
    return vr.LatentDecoder(model, **{"max_batch_size": 3, "max_length": 256, **settings})


def ask(decoder, prompt, **settings):
    return decoder.generate([decoder.request(prompt, **LIMIT | settings)])[0]


def replayed(model, decoder, prompt, answer, wishes):
    """The tokens that greedy decoding picks from one full pass over the answer, wishes applied one token at a time."""
    request = decoder.request(prompt, **LIMIT)
    states = answer.latents.flatten(0, 1)
    whole = GivenAnswer(answer.tokens, answer.latent, states, False)
    (hidden,) = ForcedScorer(model).hidden(request.prompt, [whole])
    logits, counts, picks = model.lm_head(hidden).detach().float(), {}, []
    for place, (token, latent) in enumerate(zip(answer.tokens, answer.latent)):
        if latent:
            continue
        row = logits[place].clone()
        for wish in wishes:
            wish(row, counts, len(picks))
        picks.append(int(row.argmax()))
        counts[token] = counts.get(token, 0) + 1
    return picks, logits


def bias(values):
    def apply(row, counts, picked):
        for token, value in values.items():
            row[token] += value

    return apply


def penalties(frequency=0.0, presence=0.0):
    def apply(row, counts, picked):
        for token, count in counts.items():
            row[token] -= frequency * count + presence

    return apply


def not_before(least, ends):
    def apply(row, counts, picked):
        if picked < least:
            row[list(ends)] = -math.inf

    return apply


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["bias", "frequency", "presence", "all"])
def test_each_wish_is_what_the_definition_says(lab, tiny, step, name):
    model, prompt = lab.lively(), lab.prompt(3)
    decoder = make(model, step=step)
    own = ask(decoder, prompt)
    first = own.tokens[0]
    settings, wishes = {
        "bias": ({"logit_bias": {first: -100.0, 5: 0.4}}, [bias({first: -100.0, 5: 0.4})]),
        "frequency": ({"frequency_penalty": 0.7}, [penalties(frequency=0.7)]),
        "presence": ({"presence_penalty": 1.5}, [penalties(presence=1.5)]),
        "all": (
            {
                "logit_bias": {tiny.EOS: 2.0},
                "frequency_penalty": -0.3,
                "presence_penalty": 0.9,
                "min_new_tokens": 6,
            },
            [bias({tiny.EOS: 2.0}), penalties(-0.3, 0.9), not_before(6, [tiny.EOS])],
        ),
    }[name]
    answer = ask(decoder, prompt, **settings)
    picks, _ = replayed(model, decoder, prompt, answer, wishes)
    assert picks == [token for token, latent in zip(answer.tokens, answer.latent) if not latent]
    assert answer.tokens != own.tokens
    if name == "all":
        assert len(picks) >= 6
    # Rows that ask for nothing, in the same batch, are as alone; and the row as alone too, in any place.
    requests = [decoder.request(prompt, **LIMIT), decoder.request(prompt, **LIMIT | settings)]
    together = decoder.generate([requests[1], *requests])
    assert [a.tokens for a in together] == [answer.tokens, own.tokens, answer.tokens]
    assert ask(decoder, prompt).tokens == own.tokens


def test_least_length_and_end_ids(lab, tiny):
    model, prompt = lab.lively(), lab.prompt(1)
    decoder = make(model)
    ends = {"eos_token_id": [tiny.EOS, 3, 4, 5]}
    for least in (0, 1, 5, 16):
        answer = ask(decoder, prompt, **ends, min_new_tokens=least, latent_steps=0, allow_other_latent_steps=True)
        assert not set(answer.tokens[:least]) & {tiny.EOS, 3, 4, 5}, answer.tokens
        assert len(answer.tokens) >= least


@pytest.mark.parametrize("step", STEPS)
def test_log_probabilities_are_the_models(lab, step):
    model, prompt = lab.lively(), lab.prompt(3)
    decoder = make(model, step=step)
    plain = ask(decoder, prompt)
    answer = ask(decoder, prompt, logprobs=3, frequency_penalty=0.5, logit_bias={4: 1.0})
    _, logits = replayed(model, decoder, prompt, answer, [])
    expected = logits.log_softmax(-1)
    assert len(answer.logprobs) == len(answer.tokens)
    for place, (token, latent, entries) in enumerate(zip(answer.tokens, answer.latent, answer.logprobs)):
        if latent:
            assert entries is None
            continue
        assert entries[0][0] == token and len(entries) == 4
        for number, value in entries:
            assert value == pytest.approx(float(expected[place, number]), abs=1e-4)
        top = expected[place].topk(3).values.tolist()
        assert [value for _, value in entries[1:]] == pytest.approx(top, abs=1e-4)
    assert ask(decoder, prompt, logprobs=0).tokens == plain.tokens
    streamed = list(decoder.stream([decoder.request(prompt, **LIMIT, logprobs=0)]))
    assert [e.logprobs is None for e in streamed] == [e.latent for e in streamed]
    assert not ask(decoder, prompt).logprobs


def test_min_p_keeps_what_is_likely_enough(lab):
    model, prompt = lab.lively(), lab.prompt(3)
    decoder = make(model)
    greedy = ask(decoder, prompt)
    sampled = [ask(decoder, prompt, do_sample=True, temperature=2.0, min_p=1.0, seed=n).tokens for n in range(4)]
    assert sampled == [greedy.tokens] * 4
    free = {tuple(ask(decoder, prompt, do_sample=True, temperature=2.0, seed=n).tokens) for n in range(4)}
    assert len(free) > 1


SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def spelling(lab, tiny):
    """A model in whose vocabulary every byte has a say, and its grammars."""
    model = tiny.model("stage2", seed=3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = tiny.EOS, tiny.PAD
    return model, tiny.tokenizer(), Grammars(tiny.tokenizer(), tiny.VOCABULARY, [tiny.EOS])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_an_answer_is_json_of_the_schema_after_its_spans(lab, tiny, spelling, step, force, sample):
    model, tokenizer, grammars = spelling
    decoder = make(model, step=step)
    grammar = grammars.json_schema(SCHEMA)
    settings = {"max_new_tokens": 120, "grammar": grammar, "force_latent": force, "do_sample": sample, "seed": 5}
    requests = [decoder.request(lab.prompt(n), **settings) for n in range(4)]
    free = decoder.request(lab.prompt(0), max_new_tokens=20)
    alone = decoder.generate([free])[0]
    answers = decoder.generate([*requests, free])
    for answer in answers[:4]:
        text = tokenizer.decode(
            [token for token, latent in zip(answer.tokens, answer.latent) if not latent], skip_special_tokens=True
        )
        value = json.loads(text)
        assert set(value) == {"digit", "sure"} and 0 <= value["digit"] <= 9 and isinstance(value["sure"], bool)
        assert answer.finish_reason == "eos" and not (force and not any(answer.latent))
        visible = [t for t, latent in zip(answer.tokens, answer.latent) if not latent]
        after = [visible[place + 1] for place, token in enumerate(visible) if token == tiny.LVR_START]
        assert set(after) <= {tiny.LVR_END}
        body = [place for place, token in enumerate(visible) if token not in (tiny.LVR_START, tiny.LVR_END)]
        assert body == list(range(body[0], len(visible))), "no span inside the JSON"
    assert answers[4].tokens == alone.tokens


def test_grammars_that_cannot_be_are_refused(lab, tiny, spelling):
    model, _, grammars = spelling
    decoder = make(model)
    with pytest.raises(ConfigError, match="grammar"):
        grammars.json_schema({"type": "no-such-type"})
    with pytest.raises(ConfigError, match="grammar"):
        grammars.regex("(")
    with pytest.raises(ConfigError, match="grammar: expected one that an answer can follow") as refusal:
        grammars.json_schema({"$ref": "#"})
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="got false"):
        grammars.json_schema(False)
    assert grammars.json_schema(True) == grammars.json_schema({})
    grammar = grammars.regex("[0-9]{3}")
    with pytest.raises(ConfigError, match="min_new_tokens: a grammar"):
        decoder.request(lab.prompt(0), grammar=grammar, min_new_tokens=3)
    with pytest.raises(ConfigError, match="clean"):
        make(model, latent_mode="parity").request(lab.prompt(0), grammar=grammar)
    with pytest.raises(ConfigError, match=r"logit_bias: expected token ids in \[0, "):
        decoder.request(lab.prompt(0), logit_bias={tiny.VOCABULARY: 1.0})
    answer = ask(decoder, lab.prompt(1), grammar=grammar)
    visible = [t for t, latent in zip(answer.tokens, answer.latent) if not latent]
    assert tiny.tokenizer().decode(visible, skip_special_tokens=True).isdigit()


def test_a_literal_that_spells_a_special_token_never_ends_an_answer(lab, spelling):
    """`<|im_end|>` inside a literal is one token for the tokenizer: the one that ends answers."""
    model, tokenizer, grammars = spelling
    decoder = make(model)
    grammar = grammars.regex(r"x<\|im_end\|>|yz")
    settings = {"logit_bias": {tokenizer.encode("x")[0]: 90.0}}
    request = decoder.request(lab.prompt(0), max_new_tokens=40, grammar=grammar, **settings)
    with pytest.raises(ConfigError, match="no ordinary token"):
        decoder.generate([request])


def test_a_grammar_that_the_tokenizer_cannot_spell_fails_that_answer_alone(lab, tiny, spelling):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {letter: number for number, letter in enumerate(["a", "b", "{"])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    poor = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    model = spelling[0]
    decoder = make(model)
    unspeakable = Grammars(poor, len(poor), [poor.eos_token_id]).json_schema(SCHEMA)
    requests = [
        decoder.request(lab.prompt(0), max_new_tokens=40, grammar=unspeakable),
        decoder.request(lab.prompt(1), max_new_tokens=8),
    ]
    with pytest.raises(ConfigError, match="grammar"):
        decoder.generate(requests)
    assert decoder.generate([requests[1]])[0].tokens
