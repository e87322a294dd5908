"""Models, batches and step variants of bench_training.py; one variant's peak memory: `python training_case.py …`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import torch
from naive_training import naive_losses

from vreflection.data.collate import Collator, PackedCollator
from vreflection.data.encode import EncodedSample
from vreflection.data.positions import mrope_positions
from vreflection.model.layout import BatchLayout
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.packed_attention import PACKED_ATTENTION
from vreflection.training.memory_plan import Plan

THREADS = 2
SLOTS = 8
IGNORE = -100
# Visual tokens (rows, columns) of 16 images between 64 and 504 tokens, and text tokens around them; in no order.
GRIDS = [(16, 16), (8, 8), (18, 24), (12, 12), (9, 12), (24, 21), (14, 16), (10, 12),
         (20, 20), (8, 10), (16, 22), (12, 14), (10, 20), (18, 18), (22, 21), (14, 20)]  # fmt: skip
TEXT = [24, 90, 40, 60, 33, 120, 28, 52, 75, 30, 44, 38, 64, 26, 100, 48]
# Samples per micro-batch: 16 padded rows of logits over the real vocabulary would not fit in 16 GB.
MICRO_BATCH = {"quickstart": 16, "0.1b": 4}
VARIANTS = ("ours", "naive", "ours, cached features")


def quickstart_model() -> VReflectionForConditionalGeneration:
    """The quickstart's base, 2.97 million parameters, vocabulary 384."""
    from vreflection.quickstart.base import load_base

    base, _ = load_base()
    return base


def random_model() -> VReflectionForConditionalGeneration:
    """0.1 billion parameters at the real vocabulary: 8 layers of 512, tied head, vision tower of 8 x 256."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e6,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 8, "hidden_size": 256, "intermediate_size": 768, "num_heads": 8, "out_hidden_size": 512,
            "window_size": 112, "fullatt_block_indexes": [1, 3, 5, 7],
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


MODELS = {"quickstart": quickstart_model, "0.1b": random_model}


def build(size: str, stage: str) -> VReflectionForConditionalGeneration:
    """A model in training, frozen as its stage asks, with the attention `run_training` packs with."""
    torch.manual_seed(0)
    base = MODELS[size]()
    ids = ("lvr_start_id", "lvr_id", "lvr_latent_end_id", "lvr_end_id")
    known = {name: getattr(base.config, name) for name in ids if hasattr(base.config, name)}
    model = VReflectionForConditionalGeneration.from_base(base, "stage1", num_latent_tokens=SLOTS, **known)
    if stage == "stage2":
        model = VReflectionForConditionalGeneration.from_base(model, "stage2")
    model.set_attn_implementation({"": "sdpa", "text_config": PACKED_ATTENTION})
    model.freeze_for_stage()
    return model.train()


def make_samples(config, count: int = 16, seed: int = 0) -> list[EncodedSample]:
    """Samples of one image, one or two boxes and a text of random ids; what is supervised comes last."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        (h, w), text = GRIDS[number % len(GRIDS)], TEXT[number % len(TEXT)]
        boxes = 1 + number % 2
        words = rng.integers(10, 250, text).tolist()
        question, answer = words[: text // 2], words[text // 2 :]
        span = [config.lvr_start_id, *[config.lvr_id] * SLOTS, config.lvr_end_id]
        prompt = [
            config.vision_start_token_id,
            *[config.image_token_id] * (h * w),
            config.vision_end_token_id,
            *question,
        ]
        ids = prompt + span * boxes + answer
        corner, far = rng.uniform(0, 0.6, (boxes, 2)), rng.uniform(0.15, 0.4, (boxes, 2))
        grid = torch.tensor([[1, 2 * h, 2 * w]])
        samples.append(
            EncodedSample(
                input_ids=torch.tensor(ids),
                labels=torch.tensor([IGNORE] * len(prompt) + ids[len(prompt) :]),
                mm_token_type_ids=torch.tensor([int(token == config.image_token_id) for token in ids]),
                position_ids=torch.from_numpy(mrope_positions(ids, config.image_token_id, grid.tolist())),
                boxes=torch.from_numpy(np.concatenate([corner, corner + far], axis=1)),
                box_images=torch.zeros(boxes, dtype=torch.int64),
                image_grid_thw=grid,
                pixel_values=torch.from_numpy(rng.standard_normal((4 * h * w, 1176), dtype=np.float32)),
            )
        )
    return samples


def described(plan: Plan, samples: list[EncodedSample], config, micro_batches: int = 1) -> Plan:
    """`plan` with the tokens and shares of these samples, spread over so many micro-batches."""
    tokens = sum(len(sample.input_ids) for sample in samples)
    visual = sum(int((sample.input_ids == config.image_token_id).sum()) for sample in samples)
    supervised = sum(int((sample.labels != IGNORE).sum()) for sample in samples)
    return replace(
        plan, tokens=tokens // micro_batches, sample_tokens=math.ceil(tokens / len(samples)),
        visual_share=visual / tokens, supervised_share=supervised / tokens,
    )  # fmt: skip


def cached(model, samples: list[EncodedSample]) -> list[EncodedSample]:
    """The same samples with the frozen vision tower's output in place of pixels."""
    with torch.no_grad():
        return [
            replace(
                s, pixel_values=None, image_features=model.visual_tokens(s.pixel_values, s.image_grid_thw).clone()
            )
            for s in samples
        ]  # fmt: skip


def batches_of(model, samples: list[EncodedSample], variant: str, size: int) -> list[dict]:
    """What the loader hands to a variant's step: micro-batches of `size` samples."""
    if "cached" in variant:
        samples = cached(model, samples)
    collate = Collator(pad_token_id=0) if variant == "naive" else PackedCollator()
    return [collate(samples[start : start + size]) for start in range(0, len(samples), size)]


def losses(model, batch: dict, variant: str) -> dict[str, torch.Tensor]:
    """Loss parts and `loss`; ours with the host-side check of the batch that the trainer makes in every step."""
    if variant == "naive":
        return naive_losses(model, batch)
    host = ("boxes", "box_sample", "box_image", "cu_seqlens")
    layout = BatchLayout.from_batch(
        model.config, batch["input_ids"], batch["labels"], batch["image_grid_thw"],
        *(batch[name] for name in host), ce_on_latent_slots=model.objective.ce_on_latent_slots,
    )  # fmt: skip
    kept = {name: value for name, value in batch.items() if name not in host[:3]}
    output = model(**kept, layout=layout)
    return {**output.losses, "loss": output.loss}


def stepper(model, batches: list[dict], variant: str, optimizer):
    """A whole step: losses and backward pass of every micro-batch, clipped gradient, AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        for batch in batches:
            (losses(model, batch, variant)["loss"] / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_optimizer(model):
    # So small a rate that the weights, and so the work, stay what they are.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_memory(size: str, stage: str, variant: str) -> dict[str, int]:
    """Resident bytes of this process: before a step (weights, optimizer states), and at the peak of one.

    A step of two samples comes first: libraries load their code, the optimizer makes its states.
    """
    torch.set_num_threads(THREADS)
    model = build(size, stage)
    samples = make_samples(model.config)
    optimizer = make_optimizer(model)
    stepper(model, batches_of(model, samples[1:3], variant, 2), variant, optimizer)()
    step = stepper(model, batches_of(model, samples, variant, MICRO_BATCH[size]), variant, optimizer)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    step()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"before": before, "peak": resident("VmHWM"), "gradients": gradients}


if __name__ == "__main__":
    print(json.dumps(peak_memory(*sys.argv[1:4])))
