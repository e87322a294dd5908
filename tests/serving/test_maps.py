"""What the server says of where an answer looks."""

import numpy as np
import pytest
from PIL import Image

from vreflection.engine.decoder import LatentDecoder
from vreflection.serving.launch import answer_maps
from vreflection.visualization.attention_maps import maps_of


@pytest.mark.parametrize(("stage", "source"), [("stage2", "student"), ("stage1", "language-model")])
def test_maps_sum_to_one_and_come_with_the_images_share(tiny, parts, stage, source):
    model = tiny.model(stage)
    model.generation_config.eos_token_id = None
    prompt = parts[1](random_image(), "which?", return_position_ids=True)
    engine = LatentDecoder(model, max_batch_size=1)
    request = engine.request(prompt, max_new_tokens=8, force_latent=True, return_latents=True)
    (answer,) = engine.generate([request])
    maps = answer_maps(model)(request.prompt, answer, [], 0)
    (image,) = maps["images"]
    assert maps["source"] == source and len(image["steps"]) == answer.latent_steps_taken > 0
    assert all(sum(step) == pytest.approx(1, abs=1e-4) for step in image["steps"])
    if source == "student":
        assert image["mass"] is None
    else:
        expected = maps_of(model, request.prompt, answer, teacher=False).image_mass[0].tolist()
        assert image["mass"] == pytest.approx(expected, abs=1e-5) and all(0 < mass <= 1 for mass in image["mass"])


def random_image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
