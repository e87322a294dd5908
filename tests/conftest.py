"""A tiny random Qwen2.5-VL with latent steps, its byte tokenizer, and hand-made batches; shared through `tiny`."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from vreflection.data.template import LATENT_TOKENS

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Ids of the byte tokenizer below: 256 bytes, Qwen's markers, then the latent tokens.
PAD, TURN_START, EOS, VISION_START, VISION_END, IMAGE, VIDEO, LVR_START, LVR, LATENT_END, LVR_END = range(256, 267)
VOCABULARY, WIDTH, SLOTS, PATCH_WIDTH = 320, 64, 3, 3 * 2 * 14 * 14


@pytest.fixture
def command_line(monkeypatch, capsys):
    """`command_line("info", "--json")` in this process: a new one takes seconds to import its libraries."""
    from vreflection.cli import main

    def call(*words) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["vreflection", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=captured.out, stderr=captured.err)

    return call


def host_config(tie=False):
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3], "rope_type": "default"},
            "tie_word_embeddings": tie,
            "bos_token_id": PAD,
            "eos_token_id": EOS,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": WIDTH,
        },
        tie_word_embeddings=tie,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


LATENT_SETTINGS = {
    "num_latent_tokens": SLOTS,
    "resampler_num_heads": 2,
    "roi_output_size": 3,
    "lvr_start_id": LVR_START,
    "lvr_id": LVR,
    "lvr_latent_end_id": LATENT_END,
    "lvr_end_id": LVR_END,
}


def randomise(model, seed=0):
    """Weights large enough that every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                scale = 1.0 if "embed_tokens" in name or "queries" in name else 1.3 / math.sqrt(parameter[0].numel())
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def host_model(tie=False, seed=0):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return randomise(Qwen2_5_VLForConditionalGeneration(host_config(tie)), seed).eval()


def model(stage, tie=False, seed=0, **settings):
    """A model of a stage with random weights, frozen as its stage asks, in eval mode."""
    from vreflection.model.config import VReflectionConfig
    from vreflection.model.modeling import VReflectionForConditionalGeneration

    config = VReflectionConfig.from_base_config(host_config(tie), stage, **{**LATENT_SETTINGS, **settings})
    built = randomise(VReflectionForConditionalGeneration(config), seed).eval()
    built.freeze_for_stage()
    return built


def span(slots=SLOTS):
    return [LVR_START, *[LVR] * slots, LVR_END]


def row(images=(), boxes=(), question=(7, 8, 9), answer=(11, 12), slots=SLOTS):
    """One sample: image blocks, question, then per box a span and answer tokens; all after the question supervised.

    Args:
        images: token grids (h, w). boxes: (box, which of the sample's images).
    """
    ids = [TURN_START, 1, 2]
    for h, w in images:
        ids += [VISION_START, *[IMAGE] * (h * w), VISION_END]
    ids += list(question)
    prompt = len(ids)
    for index in range(max(len(boxes), 1)):
        ids += (span(slots) if boxes else []) + [value + index for value in answer]
    ids += [EOS]
    labels = [-100] * prompt + ids[prompt:]
    return SimpleNamespace(ids=ids, labels=labels, images=list(images), boxes=list(boxes), prompt=prompt)


def pixels(images, seed=0):
    """Patches of images given by token grids; each image's patches depend on its own index and the seed only."""
    parts = [
        torch.randn(4 * h * w, PATCH_WIDTH, generator=torch.Generator().manual_seed(1000 * seed + index))
        for index, (h, w) in enumerate(images)
    ]
    return torch.cat(parts)


def batch(rows, padding="right", seed=0):
    """Everything `forward` takes, from `row`s; text-only batches carry no image keys."""
    longest = max(len(r.ids) for r in rows)

    def padded(values, fill):
        gap = [fill] * (longest - len(values))
        return values + gap if padding == "right" else gap + values

    ids = torch.tensor([padded(r.ids, PAD) for r in rows])
    images = [grid for r in rows for grid in r.images]
    made = {
        "input_ids": ids,
        "attention_mask": torch.tensor([padded([1] * len(r.ids), 0) for r in rows]),
        "labels": torch.tensor([padded(r.labels, -100) for r in rows]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
    if images:
        made["image_grid_thw"] = torch.tensor([[1, 2 * h, 2 * w] for h, w in images])
        made["pixel_values"] = pixels(images, seed)
    boxes = [
        (box, n, sum(len(other.images) for other in rows[:n]) + i) for n, r in enumerate(rows) for box, i in r.boxes
    ]
    if boxes:
        made["boxes"] = torch.tensor([box for box, _, _ in boxes], dtype=torch.float64)
        made["box_sample"] = torch.tensor([n for _, n, _ in boxes])
        made["box_image"] = torch.tensor([i for _, _, i in boxes])
    return made


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*QWEN_TOKENS, *LATENT_TOKENS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def processor():
    from vreflection.model.image_settings import pil_image_processor_class
    from vreflection.model.processor import VReflectionProcessor

    size = {"shortest_edge": 4 * 784, "longest_edge": 24 * 784}
    return VReflectionProcessor(tokenizer(), pil_image_processor_class()(size=size))


@pytest.fixture(scope="session")
def tiny():
    """Builders and ids of this file."""
    torch.set_num_threads(1)
    return SimpleNamespace(**{name: value for name, value in globals().items() if name[0] not in "_@"})


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
