"""A tiny byte-level tokenizer, the PIL image processor and image files: everything real, nothing downloaded."""

import json

import numpy as np
import pytest
from PIL import Image

from vreflection.data.template import LATENT_TOKENS
from vreflection.model.processor import VReflectionProcessor, _pil_image_processor_class

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def byte_tokenizer(latent_tokens=LATENT_TOKENS):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*QWEN_TOKENS, *latent_tokens)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def processor():
    image_processor = _pil_image_processor_class()(size={"shortest_edge": 4 * 784, "longest_edge": 24 * 784})
    return VReflectionProcessor(byte_tokenizer(), image_processor)


@pytest.fixture
def image_folder(tmp_path):
    """Root with notes/a.png (4 x 3 visual tokens) and notes/b.png (2 x 5)."""
    folder = tmp_path / "images" / "notes"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (h, w) in {"a.png": (4, 3), "b.png": (2, 5)}.items():
        Image.fromarray(rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8)).save(folder / name)
    return folder.parent


def make_row(**changes):
    """A good row; `changes` replace keys, and the value ... removes one."""
    row = {
        "dataset": "notes",
        "split": "train",
        "question_id": 7,
        "image": "notes/a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": "<lvr>\n<answer> red </answer>"},
        ],
        "bboxes": [[0.1, 0.2, 0.6, 0.7]],
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


@pytest.fixture
def row():
    return make_row


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="rows.json"):
        path = tmp_path / name
        text = "\n".join(json.dumps(r) for r in rows) if name.endswith(".jsonl") else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write
