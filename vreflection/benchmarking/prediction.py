"""How fast operators, decode steps and training steps can be: fewest bytes and flops, over what a device reaches.

docs/performance.md derives the formulas and compares them with what was measured.

Symbols: B boxes, Q queries, H heads, R = Q·H rows, K keys of all boxes together, T tokens read, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..training.memory_plan import Plan, activation_bytes, all_parameters, logit_bytes, trained_parameters
from ..training.model_shape import ModelShape
from ..training.step_time import GPUS, language_flops, micro_batch_flops, vision_flops

QUERIES = HEADS = 8
HALF = 2  # bytes of a bfloat16
# What one H200 reached of its nominal figures: 4.3 of 4.8 TB/s in a device-to-device copy, 769 to 798 of 989.5
# TFLOP/s in a bfloat16 product of 8192. The others are assumed to reach as much.
COPY_SHARE, MATRIX_SHARE = 0.9, 0.79
BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12}


@dataclass(frozen=True)
class Device:
    """Bytes and dense flops per second that a device reaches."""

    bytes_per_s: float
    flops_per_s: float


DEVICES = {
    name: Device(bandwidth * COPY_SHARE, GPUS[name].peak * MATRIX_SHARE) for name, bandwidth in BANDWIDTH.items()
}


@dataclass(frozen=True)
class Work:
    """Fewest bytes moved and flops done by one call."""

    bytes: float
    flops: float

    def seconds(self, device: Device) -> float:
        """Speed of light: the larger of moving and computing, which overlap at best."""
        return max(self.bytes / device.bytes_per_s, self.flops / device.flops_per_s)

    def bound(self, device: Device) -> str:
        """`memory` or `compute`, whichever takes longer."""
        return "memory" if self.bytes / device.bytes_per_s >= self.flops / device.flops_per_s else "compute"

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> Work:
        return Work(count * self.bytes, count * self.flops)


def resampler_work(
    boxes: int, keys: int, tokens: int, width: int, itemsize: int = HALF, backward: bool = False, shared: bool = False
) -> Work:
    """Ours: four D × D weights and the tokens once; 8·B·Q·D² for the projections, 4·R·K·D for the attention.

    Args:
        keys: K, of all boxes together. tokens: T, different ones among them. shared: all boxes have the same queries.
        backward: forward and backward; it reads the weights again, writes their gradients, reads the tokens again.
    """
    vectors = (QUERIES if shared else boxes * QUERIES) + boxes * QUERIES
    weights, region = 4 * width * width * itemsize, tokens * width * itemsize
    flops = 4 * vectors * width * width + 4 * HEADS * QUERIES * keys * width
    return Work(3 * weights + 2 * region, 3 * flops) if backward else Work(weights + region, flops)


def projected_work(boxes: int, keys: int, width: int, itemsize: int = HALF, backward: bool = False) -> Work:
    """Stock attention: keys and values made per token (4·K·D²), written and read; keys as one padded tensor."""
    weights, rows = 4 * width * width * itemsize, keys * width * itemsize
    flops = 4 * boxes * QUERIES * width * width + 4 * keys * width * width + 4 * QUERIES * keys * width
    # Backward: keys and values again, their gradients written and read; weights again, their gradients.
    moved = weights + rows + 4 * rows
    return Work(3 * weights + 2 * rows + 12 * rows, 3 * flops) if backward else Work(moved, flops)


def resampler_extra_bytes(boxes: int, keys: int, width: int, itemsize: int = HALF) -> int:
    """Peak memory of ours, forward and backward, beyond inputs, weights and gradients: 4·B·R·D + 2·R·K elements.

    Folded queries, context, attention, and the gradients of all three.
    """
    rows = QUERIES * HEADS
    return (4 * boxes * rows * width + 2 * rows * keys) * itemsize


def projected_extra_bytes(keys: int, width: int, itemsize: int = HALF) -> int:
    """The same of stock attention: the larger of two moments of its backward pass, in elements.

    6·K·D less 3·D²: gradients of keys and values, each put into zeros for both, while three of the four weight
    gradients are still to come. 3·D²: the packed input projection's gradient is put together from parts.
    """
    return max(6 * keys * width - 3 * width * width, 3 * width * width) * itemsize


def roi_align_work(
    boxes: int, cells: int, covered: int, tokens: int, width: int, itemsize: int, backward: bool
) -> Work:
    """RoI-Align alone: tokens under each box read, cells² × D written; each cell takes 16 taps.

    Args:
        cells: per side. covered: tokens under the boxes, counted per box. tokens: of the whole map, whose gradient a
            backward pass writes.
    """
    moved, flops = (covered + boxes * cells**2) * width * itemsize, 2 * boxes * cells**2 * 16 * width
    return Work(2 * moved + tokens * width * itemsize, 2 * flops) if backward else Work(moved, flops)


def distillation_work(latents: int, student: int, teacher: int, itemsize: int, backward: bool) -> Work:
    """Squared error and KL on packed attention: elements read where the teacher has keys; a gradient of all of them."""
    read = itemsize * (2 * latents + 2 * teacher)
    return Work(2 * read + itemsize * (latents + student), 0.0) if backward else Work(read, 0.0)


def cross_entropy_work(supervised: int, width: int, vocabulary: int, itemsize: int = HALF) -> Work:
    """Forward and backward at supervised rows: the head read for logits and both gradients, its own written."""
    head = width * vocabulary * itemsize
    return Work(4 * head + 2 * supervised * width * itemsize, 6 * supervised * width * vocabulary)


def decode_work(shape: ModelShape, batch: int, context: int, text: bool, itemsize: int = HALF) -> Work:
    """One step of `batch` rows: all weights of the layers once, for text the head too, and each row's cache once."""
    weights = shape.layers * shape.layer + shape.width + (shape.embedding if text else 0)
    cache = batch * context * 2 * shape.kv_width * shape.layers
    flops = 2 * batch * weights + 4 * batch * context * shape.width * shape.layers
    return Work(itemsize * (weights + cache), flops)


def prefill_work(
    shape: ModelShape, prompts: int, tokens: int, length: int, visual: int = 0, itemsize: int = HALF
) -> Work:
    """Prompts up to their first logits: every weight once, products of all tokens, the head at one row per prompt.

    Args:
        tokens: computed, of all prompts together (shared beginnings once). length: of one prompt. visual: tokens that
            the vision tower makes.
    """
    plan = Plan(tokens=tokens, sample_tokens=length, visual_share=visual / tokens, supervised_share=prompts / tokens)
    layers, head = language_flops(shape, plan)
    weights = shape.layers * shape.layer + shape.width + shape.embedding + (shape.vision if visual else 0)
    return Work(itemsize * weights, layers + head + vision_flops(shape, plan))


def generation_work(shape: ModelShape, batch: int, prompt: int, new_tokens: int, itemsize: int = HALF) -> Work:
    """Prompts of text in, `new_tokens` each out: one prefill and a text step for every token but the first."""
    total = prefill_work(shape, batch, batch * prompt, prompt, itemsize=itemsize)
    for step in range(1, new_tokens):
        total += decode_work(shape, batch, prompt + step, True, itemsize)
    return total


def training_extra_bytes(shape: ModelShape, plan: Plan) -> float:
    """Peak memory of a step beyond weights and optimizer states: gradients, activations, logits, visual tokens."""
    tokens = 2 * plan.visual_tokens * shape.width
    gradients = plan.compute_bytes * (trained_parameters(shape, plan) + tokens)
    return gradients + activation_bytes(shape, plan) + logit_bytes(shape, plan)


def training_work(shape: ModelShape, plan: Plan) -> Work:
    """An optimizer step on one device: `memory_plan`'s flops; weights three times per micro-batch, gradients, AdamW.

    AdamW reads weight, gradient and two moments of what is trained and writes three of them. Activations are left out.
    """
    trained, vision = trained_parameters(shape, plan), 0 if plan.feature_cache else shape.vision
    passes = 3 * (all_parameters(shape, plan) - shape.vision) + vision + 2 * trained
    moved = plan.compute_bytes * (plan.accumulation * passes + 7 * trained)
    return Work(moved, plan.accumulation * micro_batch_flops(shape, plan)[1])
