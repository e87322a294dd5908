"""The benchmarks in miniature, shared through `demo`, and a tiny checkpoint on disk that answers them."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def demo():
    """What demo_bench.py defines."""
    spec = importlib.util.spec_from_file_location("demo_bench", Path(__file__).with_name("demo_bench.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_root(demo, tmp_path_factory):
    """All six, written once; not to be changed."""
    return demo.write_all(tmp_path_factory.mktemp("demo") / "bench")


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory):
    """A tiny random model with its processor, whose answers open spans and are of different lengths."""
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = tiny.model("stage2", seed=11)  # a seed whose answers differ between images
    with torch.no_grad():
        keep = torch.zeros(tiny.VOCABULARY, 1)
        keep[[tiny.LVR_END, tiny.EOS, *tiny.tokenizer().convert_tokens_to_ids(list("ABCDE"))]] = 1.0
        keep[tiny.LVR_START] = 1.5
        model.lm_head.weight.mul_(keep)
    model.generation_config = GenerationConfig(eos_token_id=tiny.EOS, pad_token_id=tiny.PAD, repetition_penalty=1.05)
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder
