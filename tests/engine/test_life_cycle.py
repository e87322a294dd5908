"""What goes wrong stays where it went wrong: failures, weights that are not numbers, foreign calls."""

import copy
import pickle
import threading

import pytest
import torch

import vreflection as vr
from vreflection.engine import prefill
from vreflection.engine.requests import Prompt
from vreflection.engine.timing import TimedSteps
from vreflection.errors import ConfigError


def make(model, **settings):
    return vr.LatentDecoder(model, **{"max_batch_size": 3, "max_length": 128, **settings})


def tokens(answers):
    return [answer.tokens for answer in answers]


def serve(decoder, tickets, look_every=2, turns=2000):
    """What a server does: answers by ticket."""
    answers = {}
    for _ in range(turns):
        for event in decoder.advance(look_every):
            if event.generation is not None:
                assert event.index not in answers, "answered twice"
                answers[event.index] = event.generation
        if not decoder.busy:
            break
    assert set(answers) == set(tickets)
    return answers


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_decoder_is_not_copied(lab, duplicate):
    with pytest.raises(TypeError, match=r"LatentDecoder cannot be copied or pickled.*LatentDecoder\(decoder.model"):
        duplicate(make(lab.lively()))


def test_prompts_whose_positions_come_in_different_forms(lab, monkeypatch):
    """A later one in the place of an earlier one, and both in one call."""
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 2)
    model, plain = lab.lively(), lab.prompt(3)
    _, positions = model.prompt_inputs(
        **{name: plain[name] for name in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids")}
    )
    placed = {**{k: v for k, v in plain.items() if k != "mm_token_type_ids"}, "position_ids": positions}
    expected = tokens(make(model).generate([plain], max_new_tokens=9)) * 2
    decoder = make(model, max_batch_size=1)
    first, second = (decoder.generate([prompt], max_new_tokens=9)[0].tokens for prompt in (plain, placed))
    assert [first, second] == expected
    assert tokens(decoder.generate([plain, placed], max_new_tokens=9)) == expected
    assert tokens(make(model).generate([placed, plain], max_new_tokens=9)) == expected


def break_weights(model, part):
    with torch.no_grad():
        weight = model.lm_head.weight if part == "head" else model.model.language_model.layers[1].mlp.up_proj.weight
        weight.fill_(float("nan"))


@pytest.mark.parametrize("part", ["layer", "head"])
@pytest.mark.parametrize("step", ["auto", "torch", "model"])
def test_weights_that_are_not_numbers_are_said_and_counted(lab, part, step):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(2)]
    expected = tokens(make(model).generate(prompts, max_new_tokens=6))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    break_weights(model, part)
    decoder = make(model, step=step)
    for run in (decoder.generate, lambda *a, **s: [event.generation for event in decoder.stream(*a, **s)]):
        with pytest.warns(
            UserWarning, match="an answer was cut short: .*got NaN or infinity after 0 tokens.*check the weights"
        ):
            answers = run(prompts, max_new_tokens=6, return_latents=True)
        assert [answer.finish_reason for answer in answers] == ["not_finite"] * 2
        assert tokens(answers) == [[], []] and all(isinstance(a.error, FloatingPointError) for a in answers)
    with pytest.warns(UserWarning, match="got NaN or infinity"):
        output = model.generate(**prompts[0], max_new_tokens=6, return_dict_in_generate=True, return_latents=True)
    assert torch.equal(output.sequences, prompts[0]["input_ids"])
    answers = serve(decoder, [decoder.submit(decoder.request(prompt, max_new_tokens=6)) for prompt in prompts])
    assert [answer.finish_reason for answer in answers.values()] == ["not_finite"] * 2
    model.load_state_dict(saved)
    assert tokens(decoder.generate(prompts, max_new_tokens=6)) == expected


@pytest.mark.parametrize("look_every", [1, 4])
def test_a_row_that_breaks_down_ends_alone(lab, monkeypatch, look_every):
    """Its neighbour goes on, and nothing of it is handed to later prompts."""
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model = lab.lively()
    decoder = make(model, max_batch_size=2, step="torch")
    requests = [decoder.request(lab.prompt(n), max_new_tokens=12, eos_token_id=300) for n in (0, 3)]
    expected = tokens(make(model).generate(requests))
    plain, calls = decoder.step.forward, []

    def forward(inputs_BD, *rest):
        calls.append(1)
        if len(calls) == 3:
            inputs_BD = inputs_BD.clone()
            inputs_BD[1] = float("nan")
        return plain(inputs_BD, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(decoder.step, "forward", forward)
        answers = serve(decoder, tickets := [decoder.submit(request) for request in requests], look_every)
    assert answers[tickets[0]].tokens == expected[0]
    failed = answers[tickets[1]]
    assert failed.finish_reason == "not_finite" and isinstance(failed.error, FloatingPointError)
    assert failed.tokens == expected[1][: len(failed.tokens)] and len(failed.tokens) <= 3
    assert tokens(decoder.generate(requests)) == expected


def test_a_model_that_an_explicit_step_no_longer_fits_is_refused_until_it_does(lab):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(3)]
    decoder = make(model, step="torch")
    expected = tokens(decoder.generate(prompts, max_new_tokens=6))
    handle = model.model.language_model.layers[0].mlp.register_forward_hook(lambda m, i, out: 1.5 * out)
    for _ in range(2):
        with pytest.raises(ConfigError, match="pass over the hooks"):
            decoder.generate(prompts, max_new_tokens=6)
        answers = serve(decoder, [decoder.submit(decoder.request(prompts[0], max_new_tokens=6))])
        assert [answer.finish_reason for answer in answers.values()] == ["error"]
    handle.remove()
    assert tokens(decoder.generate(prompts, max_new_tokens=6)) == expected


@pytest.mark.parametrize("step", ["auto", "model"])
def test_parts_of_a_model_in_training_mode(lab, step):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(2)]
    expected = tokens(make(model, step=step).generate(prompts, max_new_tokens=6))
    model.gradient_checkpointing_enable()
    model.model.language_model.layers.train()
    assert not model.training
    assert tokens(make(model, step=step).generate(prompts, max_new_tokens=6)) == expected
    assert model.model.language_model.layers[0].training


def test_under_autocast_and_with_a_model_made_in_inference_mode(lab):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(2)]
    expected = tokens(make(model).generate(prompts, max_new_tokens=6))
    with torch.autocast("cpu", torch.bfloat16):
        assert tokens(make(model, step="model").generate(prompts, max_new_tokens=6)) == expected
    with torch.inference_mode():
        other = lab.lively()
    assert tokens(make(other).generate(prompts, max_new_tokens=6)) == expected


def test_equal_ids_at_other_positions_share_nothing(lab, monkeypatch):
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 2)
    model, ids = lab.lively(), torch.arange(3, 15)
    prompts = [{"input_ids": ids, "position_ids": (torch.arange(12) * by).expand(3, -1)} for by in (1, 3)]
    expected = [make(model).generate([prompt], max_new_tokens=5, return_latents=True)[0] for prompt in prompts]
    for answer, own in zip(make(model).generate(prompts, max_new_tokens=5, return_latents=True), expected):
        torch.testing.assert_close(answer.step_hidden, own.step_hidden, rtol=1e-4, atol=1e-4)


def test_a_request_that_cannot_be_admitted_fails_alone(lab, monkeypatch):
    model = lab.lively()
    decoder = make(model)
    requests = [decoder.request(lab.prompt(n), max_new_tokens=8) for n in range(5)]
    expected = tokens(make(model).generate(requests))
    bad = requests[1].prompt
    plain = decoder.prefill.inputs

    def inputs(prompts):
        if any(prompt is bad for prompt in prompts):
            raise ValueError("this one is broken")
        return plain(prompts)

    monkeypatch.setattr(decoder.prefill, "inputs", inputs)
    tickets = [decoder.submit(request) for request in requests]
    answers = serve(decoder, tickets)
    for n, ticket in enumerate(tickets):
        if n == 1:
            assert answers[ticket].finish_reason == "error" and "broken" in str(answers[ticket].error)
        else:
            assert answers[ticket].tokens == expected[n] and answers[ticket].error is None
    with pytest.raises(ValueError, match="this one is broken"):
        decoder.generate(requests)
    assert not decoder.busy
    assert tokens(decoder.generate(requests[2:])) == expected[2:]


def test_a_failed_step_fails_its_requests_and_not_the_decoder(lab, monkeypatch):
    model = lab.lively()
    decoder = make(model)
    requests = [decoder.request(lab.prompt(n), max_new_tokens=12, eos_token_id=300) for n in range(6)]
    expected = tokens(make(model).generate(requests))
    plain, calls = decoder.step.forward, []

    def forward(*args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the device fell over")
        return plain(*args)

    monkeypatch.setattr(decoder.step, "forward", forward)
    answers = serve(decoder, [decoder.submit(request) for request in requests], look_every=4)
    failed = [n for n, answer in answers.items() if answer.finish_reason == "error"]
    assert failed == [0, 1, 2] and all("fell over" in str(answers[n].error) for n in failed)
    for n in (3, 4, 5):
        assert answers[n].tokens == expected[n]
    calls.clear()
    with pytest.raises(RuntimeError, match="fell over"):
        decoder.generate(requests)
    assert tokens(decoder.generate(requests)) == expected


def test_text_that_cannot_be_made_fails_its_answer_alone(lab, tiny):
    model = lab.lively()

    class Processor:
        spoken = 0

        def decode(self, ids):
            self.spoken += 1
            if self.spoken == 2:
                raise UnicodeError("no text")
            return "text"

    decoder = make(model, processor=Processor())
    requests = [decoder.request(lab.prompt(n), max_new_tokens=6) for n in range(5)]
    expected = tokens(make(model).generate(requests))
    answers = serve(decoder, [decoder.submit(request) for request in requests])
    assert [answers[n].tokens for n in range(5)] == expected
    assert sum(answer.error is not None for answer in answers.values()) == 1


def test_a_failed_admission_leaves_no_beginning_to_share(lab, monkeypatch):
    monkeypatch.setattr(prefill, "SHORTEST_SHARED", 4)
    model = lab.lively()
    decoder = make(model, max_batch_size=2)
    expected = tokens(make(model).generate([lab.prompt(3)], max_new_tokens=8))
    running = decoder.submit(decoder.request(lab.prompt(1), max_new_tokens=40, eos_token_id=300))
    decoder.advance()
    with monkeypatch.context() as broken:
        broken.setattr(decoder, "first_picks", lambda *_: 1 / 0)
        bad = decoder.submit(decoder.request(lab.prompt(3), max_new_tokens=8))
        events = decoder.advance(8)
    assert [e.index for e in events if e.generation is not None] == [bad]
    decoder.advance(8)
    good = decoder.submit(decoder.request(lab.prompt(3), max_new_tokens=8))
    assert serve(decoder, [running, good])[good].tokens == expected[0]


def test_an_interrupt_during_admission_loses_nothing(lab, monkeypatch):
    model = lab.lively()
    decoder = make(model)
    requests = [decoder.request(lab.prompt(n), max_new_tokens=6) for n in range(4)]
    expected = tokens(make(model).generate(requests))
    tickets = [decoder.submit(request) for request in requests]
    decoder.cancel(tickets[3])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(decoder.prefill, "fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.advance()
    answers = serve(decoder, tickets)
    assert [answers[ticket].tokens for ticket in tickets] == [*expected[:3], []]
    assert answers[tickets[3]].finish_reason == "cancelled"


def test_an_interrupt_while_reading_ends_the_running_requests(lab, monkeypatch):
    model = lab.lively()
    decoder = make(model)
    requests = [decoder.request(lab.prompt(n), max_new_tokens=9, eos_token_id=300) for n in range(4)]
    expected = tokens(make(model).generate(requests))
    tickets = [decoder.submit(request) for request in requests]
    answers = {}
    with monkeypatch.context() as broken:
        notes, plain = [], decoder.note

        def note(*arguments):
            notes.append(arguments[0])
            if len(notes) == 6:
                raise KeyboardInterrupt
            plain(*arguments)

        broken.setattr(decoder, "note", note)
        with pytest.raises(KeyboardInterrupt):
            decoder.advance(8)
    answers = serve(decoder, tickets)
    assert [answers[n].finish_reason for n in range(4)] == ["error"] * 3 + ["max_new_tokens"]
    assert answers[3].tokens == expected[3]


def test_submitting_from_threads(lab):
    model = lab.lively()
    decoder, kinds = make(model), 4
    requests = [decoder.request(lab.prompt(n), max_new_tokens=3) for n in range(kinds)]
    expected = tokens(make(model).generate(requests))
    tickets, each = {}, 40

    def client(which):
        for n in range(each):
            ticket = decoder.submit(requests[(n + which) % kinds])
            tickets[ticket] = (n + which) % kinds
            if n % 5 == 0:
                decoder.cancel(ticket)

    threads = [threading.Thread(target=client, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    answers = {}
    while any(thread.is_alive() for thread in threads) or decoder.busy:
        for event in decoder.advance(2):
            if event.generation is not None:
                answers[event.index] = event.generation
    assert len(answers) == len(tickets) == 4 * each
    for ticket, answer in answers.items():
        if answer.finish_reason != "cancelled":
            assert answer.tokens == expected[tickets[ticket]]


def test_submitting_while_a_call_runs_is_refused(lab):
    model = lab.lively()
    decoder = make(model)
    request = decoder.request(lab.prompt(0), max_new_tokens=3)
    stream = decoder.stream([lab.prompt(1)], max_new_tokens=9)
    next(stream)
    with pytest.raises(RuntimeError, match="busy with generate or stream"):
        decoder.submit(request)
    stream.close()
    assert serve(decoder, [decoder.submit(request)])


def test_cancelling_a_long_queue_is_quick_and_complete(lab):
    decoder = make(lab.lively(), max_batch_size=1)
    request = decoder.request(lab.prompt(1), max_new_tokens=1)
    tickets = [decoder.submit(request) for _ in range(20_000)]
    for ticket in tickets:
        decoder.cancel(ticket)
    answers = serve(decoder, tickets, turns=3)
    assert all(answer.finish_reason == "cancelled" for answer in answers.values())


def test_a_callback_or_an_iterator_that_fails_leaves_the_decoder_usable(lab):
    model = lab.lively()
    decoder, prompts = make(model), [lab.prompt(n) for n in range(lab.count)]
    expected = tokens(make(model).generate(prompts, max_new_tokens=6))

    def broken():
        yield from prompts[:4]
        raise OSError("the disk is gone")

    heard = []
    with pytest.raises(OSError, match="the disk is gone"):
        decoder.generate(broken(), max_new_tokens=6, on_answer=heard.append)
    assert heard and not decoder.busy
    try:
        decoder.generate(prompts, max_new_tokens=6, on_answer=lambda _: 1 / 0)
    except ZeroDivisionError:  # while its traceback is alive
        assert not decoder.busy and tokens(decoder.generate(prompts, max_new_tokens=6)) == expected
    else:
        raise AssertionError("the callback's error was lost")
    assert tokens(decoder.generate(prompts, max_new_tokens=6)) == expected


def test_one_prompt_instead_of_a_list_is_refused(lab, tiny):
    decoder = make(lab.lively(), processor=tiny.processor())
    for given in (lab.prompt(1), "a question ?", ("a question ?", "photo.jpg"), Prompt(torch.tensor([5]))):
        with pytest.raises(ValueError, match=r"prompts: expected a list of prompts, got one .*; pass \[prompt\]"):
            decoder.generate(given)


def test_tensors_that_do_not_fit_a_prompt(lab):
    decoder = make(lab.lively())
    good = lab.prompt(1)
    length = good["input_ids"].shape[1]
    for change, message in (
        ({"input_ids": torch.full((1, length), 320)}, r"input_ids: expected ids in \[0, 320\), got 320"),
        ({"input_ids": torch.full((1, length), -1)}, "got -1 to -1"),
        ({"position_ids": torch.zeros(3, length + 1)}, rf"position_ids: expected \(3, {length}\)"),
        ({"position_ids": torch.zeros(4, 1, length)}, r"position_ids: expected"),
        (
            {"mm_token_type_ids": torch.zeros(1, length + 2)},
            f"mm_token_type_ids: expected {length} .* got {length + 2}",
        ),
        ({"image_keys": ["a"]}, r"image_keys: expected one per image \(0\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.request({**good, **change})
    for settings, message in (
        ({"seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"max_new_tokens": 2**40}, "below 2\\^31"),
        ({"do_sample": True, "temperature": 1e-30}, "temperature: expected > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.request(good, **settings)
    with pytest.raises(ConfigError, match="image_cache: expected at least 0"):
        make(lab.lively(), image_cache=-1)


def test_generation_configs_that_cannot_be_honoured(lab, tiny):
    from transformers import GenerationConfig

    model = lab.lively()
    for setting in (
        {"num_beams": 4},
        {"bad_words_ids": [[5]]},
        {"min_length": 3},
        {"do_sample": True, "typical_p": 0.1},
        {"encoder_repetition_penalty": 2.0},
        {"dola_layers": "high"},
        {"max_time": 1e-9},
        {"output_scores": True},
        {"output_hidden_states": True},
    ):
        name = list(setting)[-1]
        config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, **setting)
        with pytest.raises(ConfigError, match=f"generation config: {name}=.* is not supported"):
            make(model).request(lab.prompt(1), generation_config=config, max_new_tokens=2)
        with pytest.raises(ConfigError, match=name):
            make(model).request(lab.prompt(1), **setting, max_new_tokens=2)
    config = GenerationConfig(eos_token_id=tiny.EOS, max_length=30)
    with pytest.raises(ConfigError, match="max_length=30 is not supported by latent decoding; set max_new_tokens"):
        make(model).request(lab.prompt(1), generation_config=config)
    # Where both are given, the number of new tokens goes first, as in the host library.
    assert make(model).request(lab.prompt(1), generation_config=config, max_new_tokens=4).max_new_tokens == 4
    config = GenerationConfig(eos_token_id=torch.tensor([tiny.EOS, 5]), max_new_tokens=3)
    assert make(model).request(lab.prompt(1), generation_config=config).eos_token_ids == (tiny.EOS, 5)


def test_a_host_model_is_refused_with_the_way_out(tiny):
    with pytest.raises(ConfigError, match="expected a VReflectionForConditionalGeneration, got Qwen2_5_VL.*from_base"):
        vr.LatentDecoder(tiny.host_model())


def test_many_questions_on_one_image_hold_its_pixels_once(lab):
    decoder = make(lab.lively())
    requests = decoder.requests([lab.prompt(3, question=(n,)) for n in range(5)], None, {"max_new_tokens": 2})
    assert len({request.prompt.pixel_values.data_ptr() for request in requests}) == 1


def test_timing_leaves_a_decoder_as_it_was(lab):
    model, prompts = lab.lively(), [lab.prompt(n) for n in range(lab.count)]
    decoder = make(model)
    expected = tokens(decoder.generate(prompts, max_new_tokens=6))
    timed = TimedSteps(decoder)
    for latent in (False, True):
        timed.start([40, 30])
        before = decoder.buffers.state.length.tolist()
        timed.run(5, latent=latent)
        after = decoder.buffers.state.length.tolist()
        assert [b - a for a, b in zip(before, after)] == [5, 5, 0]
    with pytest.raises(ValueError, match="count: expected 1 to 64 steps, got 65"):
        timed.run(65)
    timed.close()
    assert tokens(decoder.generate(prompts, max_new_tokens=6)) == expected


def test_steps_stay_narrow(lab):
    """One request at a time uses the first row again and again."""
    decoder = make(lab.lively(), max_batch_size=16)
    for n in range(6):
        decoder.generate([lab.prompt(n)], max_new_tokens=3)
    assert {key.rows for key in decoder.programs} == {1}
