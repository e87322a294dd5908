"""One decode step at the sizes of Qwen2.5-VL 3B and 7B, random weights: steps, tiers, the host library's `generate`.

`pytest bench/bench_decode_shapes.py -s`. A row is one call of several steps; time per step and tokens per second are
in its extra info. Speed of light: every weight and every cached key and value read once. Without a GPU a tiny model
shows that the suite runs, and nothing else. ALL_VARIANTS=1 adds overlapped launches, which are known to be slower.
"""

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

sys.path.insert(0, str(Path(__file__).parent))
from random_model import RESERVED, SLOTS, random_model

from vreflection.benchmarking.prediction import decode_work
from vreflection.decoding.tiers import available_tiers, choose_tier
from vreflection.engine.timing import TimedSteps
from vreflection.errors import ConfigError
from vreflection.training.model_shape import NAMED, ModelShape

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
ALL = os.environ.get("ALL_VARIANTS", "") not in ("", "0")
STEP_NAMES = ("fused", *["fused, overlapped"] * ALL, "model") if CUDA else ("cpp", "torch", "model")
SPAN = SLOTS  # text steps of a call, too
SLACK = 64  # free cache columns past the context


# A vision tower that no decode step meets.
NO_VISION = {"vision_width": 32, "vision_mlp": 48, "vision_layers": 1, "full_layers": 1}
SIZES = {name: replace(shape, **NO_VISION) for name, shape in NAMED.items()}
SIZES["tiny"] = ModelShape(64, 96, 2, 4, 2, 320, tied=False, **NO_VISION)
if CUDA:
    CONTEXTS, SIZE_NAMES, BATCHES = {"1k": 1000, "5k": 5000, "16k": 16000}, ("7b", "3b"), (1, 32, 4, 16)
else:
    CONTEXTS, SIZE_NAMES, BATCHES = {"40": 40}, ("tiny",), (1, 3)
FIRST = next(iter(CONTEXTS))


def cases():
    """Of each size what matters most first: the time may run out. A point's kinds share its decoders and its cache."""
    for size in SIZE_NAMES:
        for context in CONTEXTS:
            for batch in BATCHES:
                yield from ((size, batch, context, kind) for kind in ("text", "latent", "span"))
        yield size, 1, FIRST, "compiled"


class HostGenerate:
    """The host's `generate` on a cache of random content, so that no prompt has to be consumed."""

    def __init__(self, host, size: ModelShape, batch: int, context: int, static: bool):
        text = host.config.get_text_config()
        self.host, self.context = host, context
        self.ids = torch.randint(0, size.vocabulary - RESERVED, (batch, context + 1), device=DEVICE)
        self.cache = StaticCache(config=text, max_cache_len=context + SLACK) if static else DynamicCache(config=text)
        shape = (batch, size.kv_heads, context, size.width // size.heads)
        for layer in range(size.layers):
            self.cache.update(*(torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)), layer)

    def rewind(self) -> None:
        for layer in self.cache.layers:
            if isinstance(self.cache, StaticCache):
                layer.cumulative_length.fill_(self.context)
            else:
                layer.keys, layer.values = (t[:, :, : self.context] for t in (layer.keys, layer.values))

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.host.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, do_sample=False,
            max_new_tokens=SPAN, min_new_tokens=SPAN, pad_token_id=0,
        )  # fmt: skip


class Bench:
    """The model, and the decoders of one batch and context: one of each at a time, because they are large."""

    def __init__(self):
        self.size, self.point, self.decoders = None, None, {}

    def load(self, name: str) -> None:
        if self.size != name:
            self.unload()
            self.host, self.model = random_model(SIZES[name], DEVICE, DTYPE, heads=1)
            self.host.eval()
            self.size = name

    def unload(self) -> None:
        self.point, self.decoders = None, {}
        self.size = self.host = self.model = None
        release()

    def at(self, batch: int, context: int) -> dict:
        """`{step name: (decoder, {tier name: tier})}`."""
        from vreflection import LatentDecoder

        if self.point != (batch, context):
            self.decoders = {}
            release()
            usable = [tier for tier, reason in available_tiers(DEVICE).items() if reason is None]
            for step in STEP_NAMES:
                try:
                    decoder = LatentDecoder(
                        self.model,
                        max_batch_size=batch,
                        max_length=context + SLACK,
                        step=step.split(",")[0],
                        tier=usable[-1],
                    )
                    if "overlapped" in step:
                        decoder.step.overlap = True
                except ConfigError as error:
                    print(f"\nno {step} step: {error}")
                    continue
                # One cache for all tiers of a step.
                self.decoders[step] = decoder, {tier: choose_tier(tier, DEVICE) for tier in usable}
            self.point = batch, context
        return self.decoders


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def bench():
    made = Bench()
    yield made
    made.unload()


def timed_variants(bench, batch: int, context: int, steps: int, latent: bool, eager: bool) -> tuple[dict, dict]:
    """Name to call, and to what comes before it untimed: the same rows and lengths, whatever ran last."""
    calls, before = {}, {}

    def add(name, decoder, tier):
        timed = TimedSteps(decoder)

        def prepare():
            decoder.tier = tier
            timed.start([context] * batch)

        calls[name], before[name] = lambda: timed.run(steps, latent=latent), prepare

    for step, (decoder, tiers) in bench.at(batch, context).items():
        for tier in ("graph", "loop", "eager"):
            if tier in tiers and (tier != "eager" or eager):
                add(f"{step} {tier}", decoder, tiers[tier])
    return calls, before


def tell(benchmark, medians: dict[str, float], batch: int, context: int, steps: int) -> None:
    """Time per step and tokens per second, beside the fixture's own numbers."""
    told = {name: {"step_ms": 1e3 * s / steps, "tokens_per_s": batch * steps / s} for name, s in medians.items()}
    benchmark.extra_info.update({"batch": batch, "context": context, "steps": steps, "per_step": told})
    light = 1e3 * benchmark.extra_info["speed_of_light_s"] / steps
    shown = [f"{name} {t['step_ms']:.3g} ms, {t['tokens_per_s']:.0f}/s" for name, t in told.items()]
    print(f"  per step of {batch} x {context}: {'; '.join(shown)}; speed of light {light:.3g} ms")


@pytest.mark.parametrize(("size", "batch", "context", "kind"), list(cases()))
def test_decode_step(interleaved, benchmark, bench, size, batch, context, kind):
    """`text`: steps that pick a token. `latent`: single steps that do not. `span`: a whole span in one go.

    `compiled`: text again, against the host's fastest, a static cache that it compiles where there is a GPU.
    """
    bench.load(size)
    length, steps, text = CONTEXTS[context], 1 if kind == "latent" else SPAN, kind in ("text", "compiled")
    # Eager steps wait for Python, whatever the batch: two points tell all. So do the host's.
    eager = not CUDA or (context == FIRST and batch in (1, 32))
    calls, before = timed_variants(bench, batch, length, steps, not text, eager and not (CUDA and kind == "compiled"))
    base = list(calls)[-1]
    if text and eager:
        static = kind == "compiled"
        base = "host generate" + (", static and compiled" if CUDA else ", static") * static
        host = HostGenerate(bench.host, SIZES[size], batch, length, static)
        assert host().shape == (batch, length + 1 + SPAN)
        calls[base], before[base] = host, host.rewind
    work = decode_work(SIZES[size], batch, length, text, DTYPE.itemsize).times(steps)
    sweep = {"figure": "decode", "axis": "batch", "value": batch, "steps": steps}
    sweep = sweep if CUDA and kind == "text" and context == FIRST and size == SIZE_NAMES[0] else None
    medians = interleaved(calls, base, 5, work, DTYPE, before, sweep=sweep, kept=not CUDA)
    tell(benchmark, medians, batch, length, steps)
