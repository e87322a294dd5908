"""Decoding the quickstart-size model: ours against the host library's `generate`. `pytest bench/bench_decode.py -s`."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.quickstart.base import base_dir

NEW_TOKENS = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("batch", [1, 8])
def test_tokens_per_second_without_latents(interleaved, batch):
    ours = VReflectionForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32).eval().to(DEVICE)
    host = Qwen2_5_VLForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32).eval().to(DEVICE)
    ids = torch.randint(0, 256, (batch, 60), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": 400, "pad_token_id": 352}

    def run(model):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    # No token has the end-of-sequence id, so both write all of them.
    assert torch.equal(run(ours), run(host))
    interleaved({"ours": lambda: run(ours), "host generate": lambda: run(host)}, "host generate", rounds=5)
