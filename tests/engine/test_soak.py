"""Thousands of short decodes with random lengths, cancellations and batch mixes."""

import gc
import random

import pytest
import torch

import vreflection as vr

DECODES = 10_000
KINDS = 24


def resident_bytes() -> int:
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * 4096


@pytest.mark.slow
def test_ten_thousand_decodes(lab, tiny):
    """Memory flat, nothing lost, every row equal to its result alone."""
    try:
        resident_bytes()
    except OSError:
        pytest.skip("needs /proc/self/statm")
    draw = random.Random(0)
    model = lab.lively()
    decoder = vr.LatentDecoder(model, max_batch_size=8, max_length=96)
    requests, expected = [], []
    for kind in range(KINDS):
        settings = {"max_new_tokens": draw.randint(1, 6), "seed": kind}
        settings |= draw.choice([{}, {"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.3}])
        settings |= draw.choice([{}, {}, {"force_latent": True}])
        prompt = lab.prompt(kind % lab.count, opened=draw.random() < 0.2)
        requests.append(decoder.request(prompt, **settings))
        expected.append(vr.LatentDecoder(model, max_batch_size=1, max_length=96).generate([requests[-1]])[0].tokens)
    running, done, cancelled, before = {}, 0, 0, None
    while done < DECODES:
        while len(decoder.waiting) < 4 and done + len(running) < DECODES:
            kind = draw.randrange(KINDS)
            running[decoder.submit(requests[kind])] = kind
        if running and draw.random() < 0.05:
            decoder.cancel(draw.choice(list(running)))
        for event in decoder.advance(draw.choice([1, 2, 4])):
            answer = event.generation
            if answer is None:
                continue
            own = expected[running.pop(event.index)]
            done += 1
            if answer.finish_reason == "cancelled":
                cancelled += 1
                assert answer.tokens == own[: len(answer.tokens)]
            else:
                assert answer.tokens == own
        if before is None and done > DECODES // 4:
            gc.collect()
            before = resident_bytes()
    assert not running and not decoder.busy and not decoder.by_ticket and not decoder.rows
    assert cancelled > DECODES // 200
    gc.collect()
    assert resident_bytes() - before < 16 * 2**20
    assert len(decoder.programs) < 1000 and torch.isfinite(decoder.buffers.state.z).all()
