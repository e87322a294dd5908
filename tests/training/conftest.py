"""A workplace for real training runs: a base model, images, rows with and without them, and settings."""

import json

import numpy as np
import pytest
from PIL import Image

ROWS = 24


@pytest.fixture(scope="session")
def mixed(tiny, tmp_path_factory):
    """`mixed.root`, and `mixed.settings(output, **changes)` as plain values; every fourth row is text only."""
    from types import SimpleNamespace

    root = tmp_path_factory.mktemp("mixed")
    tiny.host_model().save_pretrained(root / "base")
    tiny.processor().save_pretrained(root / "base")
    (root / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(ROWS):
        text = number % 4 == 3
        question = ("" if text else "<image>\n") + "q?" + "x" * (number % 5)
        answer = ("" if text else "<lvr>\n") + f"<answer> {number} </answer>"
        row = {"dataset": "any", "question_id": number}
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if not text:
            pixels = rng.integers(0, 256, (56, 28 * (2 + number % 3), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            row |= {"image": f"{number}.png", "bboxes": [[0.1, 0.2, 0.6, 0.7]]}
        rows.append(row)
    (root / "rows.json").write_text(json.dumps(rows))

    def settings(output, **changes):
        values = {
            "stage": "stage1",
            "model": str(root / "base"),
            "output": str(root / output),
            "data": {
                "train": str(root / "rows.json"),
                "image_folder": str(root / "images"),
                "pack_tokens": 300,
            },
            "latent": {"num_latent_tokens": 3, "resampler_num_heads": 2, "query_init_std": 0.5},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
            "trainer": {
                "max_steps": 4,
                "gradient_accumulation_steps": 4,
                "logging_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
            },
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
        return values

    return SimpleNamespace(root=root, settings=settings)
