"""Prefill: questions about one image, from prompts to first tokens, shared and apart, and by the host's forward.

`pytest bench/bench_prefill.py -s`. The quickstart-size model with images of many visual tokens; equal first tokens are
the gate before any timing. Images are processed beforehand; the vision tower is part of what is timed.
"""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import vreflection as vr
from vreflection.benchmarking.prediction import Work, prefill_work
from vreflection.quickstart.base import base_dir
from vreflection.training.model_shape import shape_from_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = {"64 visual tokens": 224, "400 visual tokens": 560}


def prompts(count: int, side: int) -> list[dict]:
    """`count` questions about one image of random pixels."""
    processor = vr.VReflectionProcessor.from_pretrained(base_dir())
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    colours = ("red", "blue", "green", "yellow", "white", "black", "grey", "pink")
    image = Image.fromarray(pixels)
    questions = [f"what digit is on the {colour} note ?" for colour in colours[:count]]
    return [processor([[image]], question, return_position_ids=True) for question in questions]


def shared_work(model, given: list[dict]) -> Work:
    """What all prompts begin with counted once, then every prompt's own tokens."""
    ids = [prompt["input_ids"].flatten().tolist() for prompt in given]
    common = len(os.path.commonprefix(ids)) if len(ids) > 1 else 0
    total = common + sum(len(one) - common for one in ids)
    visual = ids[0].count(model.config.image_token_id)
    return prefill_work(shape_from_config(model.config.to_dict()), len(ids), total, max(map(len, ids)), visual, 4)


@pytest.mark.parametrize("size", list(SIDES))
@pytest.mark.parametrize("count", [1, 8])
def test_first_tokens(interleaved, benchmark, ours, host, count, size):
    given = prompts(count, SIDES[size])
    length = max(prompt["input_ids"].shape[-1] for prompt in given) + 16
    decoders = {
        "engine, shared": vr.LatentDecoder(ours, max_batch_size=count, max_length=length),
        "engine, apart": vr.LatentDecoder(
            ours, max_batch_size=count, max_length=length, share_prefixes=False, image_cache=0
        ),
    }
    settings = {"max_new_tokens": 1, "do_sample": False}

    def first(decoder):
        return [answer.tokens[0] for answer in decoder.generate(given, **settings)]

    @torch.inference_mode()
    def by_the_host():
        kept = ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids", "position_ids")
        found = []
        for prompt in given:
            inputs = {name: prompt[name].to(DEVICE) for name in kept if name in prompt}
            found.append(int(host(**inputs, use_cache=True, logits_to_keep=1).logits[0, -1].argmax()))
        return found

    calls = {name: lambda decoder=decoder: first(decoder) for name, decoder in decoders.items()}
    calls["host forward, one by one"] = by_the_host
    expected = by_the_host()
    for name, decoder in decoders.items():
        assert first(decoder) == expected, name
        decoder.forget()
    # What a decoder remembers of the last round's image would be no prefill.
    before = {name: decoder.forget for name, decoder in decoders.items()} | {"host forward, one by one": lambda: None}
    work = shared_work(ours, given)
    medians = interleaved(calls, "host forward, one by one", 9, work, before=before, kept=DEVICE == "cpu")
    benchmark.extra_info["prompts_per_s"] = {name: count / seconds for name, seconds in medians.items()}
