"""Decoding the quickstart-size model: the engine against the host library's `generate`, and where a step's time goes.

`pytest bench/bench_decode.py -s`. Text only and without end of sequence, so that all write the same number of tokens;
identical tokens are the gate before any timing.
"""

import pytest
import torch

import vreflection as vr
from vreflection.benchmarking.prediction import decode_work, generation_work
from vreflection.decoding import DecodeProgram, ProgramKey, advance, plan_transition
from vreflection.engine.timing import TimedSteps
from vreflection.training.model_shape import shape_from_config

NEW_TOKENS, PROMPT = 48, 60
FLOAT = 4  # bytes
SETTINGS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": 400, "pad_token_id": 352}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = ("auto", "torch", "model")


def prompts(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, PROMPT), generator=torch.Generator().manual_seed(0))


def host_generate(model, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.to(DEVICE)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **SETTINGS)[:, PROMPT:].cpu()


@pytest.mark.parametrize("batch", [1, 8, 4, 2])
def test_tokens_per_second(interleaved, benchmark, ours, host, batch):
    """Prompts in, tokens out; the host one prompt at a time, which is its fastest way at these sizes per call."""
    ids = prompts(batch)
    given = [{"input_ids": row} for row in ids]
    decoders = {
        step: vr.LatentDecoder(ours, max_batch_size=batch, max_length=128, step=step, share_prefixes=False)
        for step in STEPS
    }
    calls = {
        f"engine, {name} step": lambda decoder=decoder: decoder.generate(given, **SETTINGS)
        for name, decoder in decoders.items()
    }
    calls["our generate"] = lambda: ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **SETTINGS)
    calls["host generate, batched"] = lambda: host_generate(host, ids)
    calls["host generate, one by one"] = lambda: [host_generate(host, row[None]) for row in ids]
    expected = torch.cat(calls["host generate, one by one"]()).tolist()
    for decoder in decoders.values():
        assert [answer.tokens for answer in decoder.generate(given, **SETTINGS)] == expected
    assert calls["our generate"]()[:, PROMPT:].tolist() == expected
    sweep = {"figure": "decode", "axis": "batch", "value": batch, "steps": NEW_TOKENS}
    hosts = [name for name in calls if name.startswith("host")]
    shape = shape_from_config(ours.config.to_dict())
    work = generation_work(shape, batch, PROMPT, NEW_TOKENS, FLOAT)
    medians = interleaved(
        calls, "host generate, one by one", 15, work, baselines=hosts, sweep=sweep, kept=DEVICE == "cpu"
    )
    tokens = {name: batch * NEW_TOKENS / seconds for name, seconds in medians.items()}
    benchmark.extra_info["tokens_per_s"] = tokens
    print("  tokens/s: " + ", ".join(f"{name} {value:.0f}" for name, value in tokens.items()))


@pytest.mark.parametrize("batch", [1, 8])
def test_latent_against_text_steps(interleaved, benchmark, ours, batch):
    """Thirty-two steps without a pick against as many with one."""
    decoder = vr.LatentDecoder(ours, max_batch_size=batch, max_length=128)
    count = 32

    timed = TimedSteps(decoder)

    def run(latent):
        timed.start([PROMPT] * batch)
        timed.run(count, latent=latent)

    shape = shape_from_config(ours.config.to_dict())
    work = decode_work(shape, batch, PROMPT + count // 2, False, FLOAT).times(count)
    calls = {"latent": lambda: run(True), "text": lambda: run(False)}
    medians = interleaved(calls, "text", 15, work, kept=DEVICE == "cpu")
    benchmark.extra_info["ms_per_step"] = {name: 1e3 * seconds / count for name, seconds in medians.items()}


@pytest.mark.parametrize("step", ["auto", "torch"])
def test_where_a_steps_time_goes(interleaved, benchmark, ours, step):
    """The parts of one text step of one row, each by itself, many times."""
    decoder = vr.LatentDecoder(ours, max_batch_size=1, max_length=128, step=step)
    TimedSteps(decoder).start([PROMPT])
    buffers, rules, times = decoder.buffers, decoder.rules, 50
    program = DecodeProgram(decoder.step, buffers, rules, ProgramKey(1, 128))
    rows, cut = program.rows, buffers.state
    with torch.inference_mode():
        inputs = decoder.step.embed(rows.last_token)
        hidden = decoder.step.forward(inputs, rows.position, rows.length, 128)
        needed, picked = ~rows.finished, torch.zeros_like(rows.last_token)
        transition = plan_transition(rows, rules)

    def whole():
        buffers.cursor.zero_()
        cut.length.fill_(PROMPT)
        program()

    parts = {
        "whole step": whole,
        "input": lambda: torch.where(rows.mode[:, None], rows.z, decoder.step.embed(rows.last_token)),
        "layers": lambda: decoder.step.forward(inputs, rows.position, rows.length, 128),
        "vocabulary and pick": lambda: decoder.step.pick(hidden, needed, program.sampling, program.key.plan, rows),
        "state machine, plain": lambda: advance(rows, rules, hidden, picked, transition),
    }

    def repeated(part):
        def run():
            with torch.inference_mode():
                for _ in range(times):
                    part()

        return run

    medians = interleaved({name: repeated(part) for name, part in parts.items()}, "whole step", rounds=15)
    benchmark.extra_info["us_per_step"] = {name: 1e6 * seconds / times for name, seconds in medians.items()}
    shown = ", ".join(f"{name} {1e6 * seconds / times:.0f} us" for name, seconds in medians.items())
    print(f"  {decoder.step.name}: {shown}")
