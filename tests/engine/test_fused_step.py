"""The Triton step against the plain ones, interpreted. On a GPU: tests/test_gpu_decode.py."""

import pytest
import torch

import vreflection as vr
from vreflection.errors import ConfigError

pytestmark = pytest.mark.interpreter


def decoders(model, rows=3, dtype=torch.float32, **settings):
    return {
        step: vr.LatentDecoder(model, max_batch_size=rows, max_length=128, step=step, **settings)
        for step in ("fused", "torch")
    }


@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_whole_answers(lab, mode):
    """More prompts than rows: spans, ends, admissions; tokens and states."""
    model = lab.lively()
    prompts = [lab.prompt(n, opened=n % 3 == 0) for n in range(lab.count)]
    answers = [
        d.generate(prompts, max_new_tokens=3, return_latents=True) for d in decoders(model, latent_mode=mode).values()
    ]
    for fused, plain in zip(*answers, strict=True):
        assert fused.tokens == plain.tokens and fused.latent == plain.latent
        torch.testing.assert_close(fused.step_hidden, plain.step_hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.latents, plain.latents, rtol=1e-4, atol=1e-4)


def test_every_way_to_pick(lab):
    model = lab.lively()
    kinds = [
        {}, {"repetition_penalty": 1.5}, {"do_sample": True, "temperature": 2.0},
        {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_p": 0.6, "repetition_penalty": 0.8},
    ]  # fmt: skip
    for chosen in (kinds[:2], kinds[:3], kinds[2:]):
        answers = []
        for decoder in decoders(model, rows=5).values():
            requests = [
                decoder.request(lab.prompt(n), seed=n, max_new_tokens=3, **kind) for n, kind in enumerate(chosen)
            ]
            answers.append([a.tokens for a in decoder.generate(requests)])
        assert answers[0] == answers[1]


def test_latent_steps_do_not_touch_the_vocabulary(lab):
    """Neither in a span program nor where a step finds all rows inside spans."""
    from vreflection.decoding import DecodeProgram, ProgramKey

    model = lab.lively()
    decoder = decoders(model)["fused"]
    for n in range(3):
        decoder.submit(decoder.request(lab.prompt(n, opened=True), max_new_tokens=6))
    with torch.inference_mode():
        decoder.admit()
        decoder.buffers.rewind()
        weight = model.lm_head.weight.data
        kept = weight.clone()
        weight.fill_(float("nan"))
        for text in (False, True):
            DecodeProgram(decoder.step, decoder.buffers, decoder.rules, ProgramKey(3, 64, text=text))()
        assert (decoder.buffers.state.last_token == model.config.lvr_id).all()
        weight.copy_(kept)


def test_half_precision(lab):
    """Forced into a span, so that both consume the same inputs for a while."""
    model = lab.lively().half()
    settings = {"max_new_tokens": 2, "return_latents": True, "force_latent": True}
    fused, plain = (d.generate([lab.prompt(1)], **settings)[0] for d in decoders(model).values())
    # The first state is the prefill's; the next four are the step's.
    assert fused.tokens[:4] == plain.tokens[:4]
    torch.testing.assert_close(fused.step_hidden[1:5], plain.step_hidden[1:5], rtol=2e-2, atol=2e-2)


def test_auto_never_takes_the_interpreter(lab):
    assert vr.LatentDecoder(lab.lively(), max_batch_size=1, max_length=64).step.name != "fused"


def test_bfloat16_is_refused_by_the_interpreter(lab):
    with pytest.raises(ConfigError, match="interpreter computes bfloat16 wrongly"):
        decoders(lab.lively().bfloat16())
