"""Qwen2.5-VL at its real sizes with random weights, a packed micro-batch, a training step, for the suite of that name.

The same code path at `tiny` runs on a CPU, which is how it is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import training_case as case
from random_model import random_model

from vreflection.data.collate import PackedCollator
from vreflection.data.encode import EncodedSample
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.packed_attention import PACKED_ATTENTION
from vreflection.training.adapters import add_adapters
from vreflection.training.memory_plan import Plan, PlanRow, memory_row
from vreflection.training.model_shape import NAMED, ModelShape
from vreflection.training.settings import LoraSettings

TINY = ModelShape(
    width=64, mlp=96, layers=2, heads=4, kv_heads=2, vocabulary=512, tied=False, vision_width=32, vision_mlp=48,
    vision_layers=2, full_layers=1,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A model size, what is trained of it (`lora_rank` 0: the whole language model), and tokens per micro-batch."""

    shape: ModelShape
    lora_rank: int
    tokens: int

    @property
    def plan(self) -> Plan:
        """The same run for `memory_plan`, in bfloat16 on one GPU; what the samples are is filled in by `described`."""
        return Plan(
            "stage1", "ddp", world=1, precision="bfloat16", tokens=self.tokens, lora_rank=self.lora_rank,
            accumulation=1,
        )  # fmt: skip


RUNS = {
    "7b LoRA": Run(NAMED["7b"], 64, 16384),
    "3b full": Run(NAMED["3b"], 0, 16384),
    "tiny LoRA": Run(TINY, 4, 1024),
    "tiny full": Run(TINY, 0, 1024),
}


def build(run: Run, device: str, dtype: torch.dtype) -> VReflectionForConditionalGeneration:
    """A model in training, made on `device`, as `vreflection train` prepares it: packed attention, recomputation."""
    _, model = random_model(run.shape, device, dtype)
    model.set_attn_implementation({"": "sdpa", "text_config": PACKED_ATTENTION})
    model.freeze_for_stage()
    if run.lora_rank:
        add_adapters(model, LoraSettings(rank=run.lora_rank))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def packed_batch(config, tokens: int, device: str) -> tuple[dict, list[EncodedSample]]:
    """One packed row of at most `tokens` tokens, as full as whole samples make it, and its samples."""
    samples, filled = [], 0
    for sample in case.make_samples(config, 1 + tokens // 100):
        if filled + len(sample.input_ids) <= tokens:
            samples.append(sample)
            filled += len(sample.input_ids)
    host = ("boxes", "box_sample", "box_image")  # as in the trainer
    batch = PackedCollator()(samples)
    moved = {k: v.to(device) if k not in host and isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return moved, samples


def predicted(run: Run, plan: Plan) -> PlanRow:
    return memory_row(run.shape, plan, ("A100", "H100", "H200", "B200"))


def step_of(model, batch: dict, fused: bool):
    """A whole step: losses, backward pass, clipped gradient, AdamW; on a GPU under autocast, as the trainer's `bf16`.

    Returns the loss.
    """
    device = batch["input_ids"].device.type
    trained = [p for p in model.parameters() if p.requires_grad]
    # So small a rate that weights, and so the work, stay what they are.
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=fused)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = case.losses(model, batch, "ours")["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
