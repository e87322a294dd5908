"""The engine on a real GPU: every step and tier gives the CPU's tokens, without waiting, in flat memory."""

import gc

import pytest
import torch

import vreflection as vr
from vreflection.decoding.tiers import available_tiers
from vreflection.engine.choice import choose_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = ("fused", "torch", "model")


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def tiers():
    return [name for name, reason in available_tiers("cuda").items() if reason is None]


def make(model, step, tier, **settings):
    return vr.LatentDecoder(model, step=step, tier=tier, **{"max_batch_size": 4, "max_length": 256, **settings})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["clean", "parity"])
def test_every_tier_gives_the_cpus_tokens(lab, step, mode):
    model = lab.lively()
    prompts = [lab.prompt(n, opened=n % 3 == 0) for n in range(lab.count)] * 2
    settings = {"max_new_tokens": 20}
    on_cpu = vr.LatentDecoder(model, max_batch_size=4, max_length=256, step="torch", latent_mode=mode)
    expected = on_cpu.generate(prompts, return_latents=True, **settings)
    model.cuda()
    for tier in tiers():
        decoder = make(model, step, tier, latent_mode=mode)
        for _ in range(2):  # the second call replays what the first has recorded
            answers = decoder.generate(prompts, return_latents=True, **settings)
            for answer, own in zip(answers, expected, strict=True):
                assert answer.tokens == own.tokens and answer.finish_reason == own.finish_reason, (tier, step)
                torch.testing.assert_close(answer.latents.cpu(), own.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", STEPS)
def test_every_way_to_pick_on_every_tier(lab, step):
    model = lab.lively()
    kinds = [
        {}, {"repetition_penalty": 1.5}, {"do_sample": True, "temperature": 2.0}, {"force_latent": True},
        {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_p": 0.6, "repetition_penalty": 0.8},
    ]  # fmt: skip
    results = []
    for place, names in (("cpu", ["eager"]), ("cuda", tiers())):
        model.to(place)
        for tier in names:
            decoder = make(model, "torch" if place == "cpu" else step, tier)
            requests = [
                decoder.request(lab.prompt(n), seed=n, max_new_tokens=12, **kind) for n, kind in enumerate(kinds)
            ]
            results.append([a.tokens for a in decoder.generate(requests)])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("step", STEPS)
def test_steps_do_not_wait_for_the_device(lab, step):
    model = lab.lively().cuda()
    for tier in tiers():
        decoder = make(model, step, tier)
        for n in range(4):
            decoder.submit(decoder.request(lab.prompt(n), max_new_tokens=100, eos_token_id=300))
        for _ in range(3):
            decoder.advance(8)  # admits and records
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                decoder.launch(8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for ticket in list(decoder.by_ticket):
            decoder.cancel(ticket)
        while decoder.busy:
            decoder.advance(8)


def test_a_latent_span_is_one_graph(lab):
    model = lab.lively().cuda()
    decoder = make(model, "fused", "graph")
    decoder.generate([lab.prompt(n, opened=True) for n in range(4)], max_new_tokens=6)
    spans = [key for key in decoder.tier.captured if not key.text]
    assert spans and all(key.steps == model.config.num_latent_tokens for key in spans)


def test_recordings_are_reused_and_memory_stays_flat(lab):
    model = lab.lively().cuda()
    decoder = make(model, "fused", "graph")
    prompts = [lab.prompt(n) for n in range(lab.count)]
    for _ in range(5):
        decoder.generate(prompts, max_new_tokens=6)
    torch.cuda.synchronize()
    gc.collect()
    recorded, before = set(decoder.tier.captured), torch.cuda.memory_allocated()
    for _ in range(200):
        decoder.generate(prompts, max_new_tokens=6)
    torch.cuda.synchronize()
    gc.collect()
    assert set(decoder.tier.captured) == recorded and torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errors(lab, tiny, dtype):
    """Fed the same inputs, the fused step's error is at most twice that of the host's forward in the same dtype."""
    states = {}
    for name, kind, step in (("truth", torch.float64, "torch"), ("host", dtype, "model"), ("ours", dtype, "fused")):
        model = lab.lively().to("cuda", kind)
        decoder = make(model, step if step == "fused" else "model", "eager")
        if step == "torch":
            decoder.step = choose_step("torch", model, decoder.cache)
        with torch.inference_mode():
            prompt = lab.prompt(3)
            prompt["pixel_values"] = prompt["pixel_values"].to(kind)
            embeds, positions = decoder.prefill.inputs([decoder.prompt(prompt)])[0]
            decoder.step.prefill(embeds[None], positions[:, None], [0], [len(embeds) - 1])
            out = []
            for n, token in enumerate((7, 8, 3, 4, 5, 6, 9, 10)):
                at = torch.tensor([len(embeds) + n], device="cuda")
                out.append(decoder.step.forward(decoder.step.embed(torch.tensor([token], device="cuda")), at, at, 256))
        states[name] = torch.cat(out).double()
    errors = {name: (states[name] - states["truth"]).abs() for name in ("host", "ours")}
    for measure in (torch.max, torch.mean):
        assert measure(errors["ours"]) <= 2 * measure(errors["host"])


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_allocated(lab):
    model = lab.lively().cuda()
    before = torch.cuda.memory_allocated()
    with pytest.raises(vr.ConfigError, match="GiB to give"):
        vr.LatentDecoder(model, max_batch_size=4096, max_length=2**24)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("step", STEPS)
def test_latents_of_each_span_on_every_tier(lab, tiny, step):
    """Warm-up calls and replays count the consumed latents as single steps do."""
    model = lab.lively()
    states = torch.randn(3, tiny.SLOTS, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    kinds = [{"latents": states}, {}, {"latents": [None, states[1]]}, {"latents": states[2]}, {"latents": states[:2]}]
    limit = {"max_new_tokens": 16, "force_latent": True, "eos_token_id": 300, "return_latents": True}
    results = []
    for place, names in (("cpu", ["eager"]), ("cuda", tiers())):
        model.to(place)
        for tier in names:
            decoder = make(model, "torch" if place == "cpu" else step, tier)
            requests = [decoder.request(lab.prompt(n), **limit, **kind) for n, kind in enumerate(kinds)]
            for _ in range(2):
                results.append(decoder.generate(requests))
    assert min(len(answer.latents) for answer in results[0]) >= 3
    for answers in results[1:]:
        for answer, own in zip(answers, results[0], strict=True):
            assert answer.tokens == own.tokens
            torch.testing.assert_close(answer.latents.cpu(), own.latents, rtol=1e-3, atol=1e-3)
