"""A tiny model whose answers differ in length and number of spans, and prompts for it; shared through `lab`."""

from types import SimpleNamespace

import pytest
import torch

IMAGES = ([(2, 3)], [], [(1, 2), (3, 2)], [(4, 4)], [(2, 3)], [])
QUESTIONS = ((7, 8, 9, 10, 11), (20, 21), (30, 31, 32), (40,), (12, 13), (50, 51, 52, 53))


@pytest.fixture(scope="session")
def lab(tiny):
    from transformers import GenerationConfig

    def lively(stage="stage2", seed=0, **settings):
        """Few tokens have a say: spans open again and again, answers end now and then."""
        model = tiny.model(stage, seed=seed, **settings)
        with torch.no_grad():
            keep = torch.zeros(tiny.VOCABULARY, 1)
            keep[[tiny.LVR_START, tiny.EOS, *range(3, 11)]] = 1.0
            keep[tiny.LVR_START] = 2.0
            model.lm_head.weight.mul_(keep)
        model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
        return model

    def prompt(n, opened=False, question=None):
        """One prompt, unpadded, as a processor gives it."""
        row = tiny.row(IMAGES[n], [], QUESTIONS[n] if question is None else question)
        ids = row.ids[: row.prompt] + ([tiny.LVR_START] if opened else [])
        row.ids, row.labels = ids, [-100] * len(ids)
        batch = tiny.batch([row], padding="left")
        batch.pop("labels")
        if "pixel_values" in batch:
            batch["pixel_values"] = tiny.pixels(IMAGES[n], seed=n)
        return batch

    def alone(model, given, **settings):
        """What the public `generate` says of one prompt."""
        output = model.generate(**given, return_dict_in_generate=True, return_latents=True, **settings)
        return SimpleNamespace(
            tokens=output.sequences[0, given["input_ids"].shape[1] :].tolist(),
            latent=output.latent_mask[0].tolist(),
            latents=output.latents[0],
            probes=output.probes[0],
            hidden=output.step_hidden[0],
        )

    return SimpleNamespace(lively=lively, prompt=prompt, alone=alone, count=len(IMAGES))
