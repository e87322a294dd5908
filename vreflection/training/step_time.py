"""How long a training step should take: flops over peak, bytes over the links. Assumptions are the constants below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .model_shape import ModelShape

if TYPE_CHECKING:
    from .memory_plan import Plan

UTILISATION = 0.45  # of the dense bfloat16 peak, recomputation counted as work
LINK_SHARE = 0.7  # of a link's one-way bandwidth that collectives reach
NODE = 8  # GPUs joined by the fast link


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 flops per second; bytes per second and direction within a node and between nodes, per GPU."""

    peak: float
    link: float
    network: float


GPUS = {
    "A100": Gpu(312e12, 300e9, 25e9),
    "H100": Gpu(989.5e12, 450e9, 50e9),
    "H200": Gpu(989.5e12, 450e9, 50e9),
    "B200": Gpu(2250e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class StepTime:
    """One optimizer step: seconds of computing, of communicating, and of both overlapped as far as they can be.

    `model_flops` per GPU leave recomputation out; `utilisation` is theirs over peak and time.
    """

    compute: float
    communicate: float
    seconds: float
    tokens_per_second: float
    model_flops: float
    utilisation: float


def language_flops(shape: ModelShape, plan: Plan) -> tuple[float, float]:
    """Forward flops of a micro-batch in the decoder layers, and in the head."""
    products = 2 * shape.layer_matrices * plan.tokens
    # Causal: a token sees half of its sample on average; two products of `width` per pair.
    attention = 2 * 2 * shape.width * plan.tokens * min(plan.sample_tokens, plan.tokens) / 2
    return shape.layers * (products + attention), 2 * shape.embedding * plan.supervised


def vision_flops(shape: ModelShape, plan: Plan) -> float:
    """Forward flops of the vision tower for a micro-batch; nothing with cached features."""
    if plan.feature_cache:
        return 0.0
    patches = plan.visual_tokens * shape.merge**2
    image = min(plan.sample_tokens, plan.tokens) * plan.visual_share * shape.merge**2
    window = min((shape.window // shape.patch) ** 2, image)
    seen = shape.full_layers * image + (shape.vision_layers - shape.full_layers) * window
    products = shape.vision_layers * shape.vision_layer_matrices + shape.patch_width * shape.vision_width
    return patches * (2 * products + 4 * shape.vision_width * seen) + 2 * plan.visual_tokens * shape.merger_matrices


def micro_batch_flops(shape: ModelShape, plan: Plan) -> tuple[float, float]:
    """Flops of a micro-batch: the model's, and those done (with recomputation)."""
    layers, head = language_flops(shape, plan)
    # Backward: gradients of inputs and of weights; frozen weights under adapters need the former only.
    passes = 2 if plan.lora_rank else 3
    model = passes * (layers + head) + vision_flops(shape, plan)
    return model, model + (layers if plan.checkpointing else 0)


def traffic(shape: ModelShape, plan: Plan) -> float:
    """Bytes a GPU sends per optimizer step, as rings do it."""
    from .memory_plan import all_parameters, resident_parameters, trained_parameters

    if plan.world == 1:
        return 0.0
    share = (plan.world - 1) / plan.world
    trained, everything = trained_parameters(shape, plan), all_parameters(shape, plan)
    width = plan.compute_bytes
    if plan.parallel == "ddp":
        gradient = 2 if plan.precision == "bfloat16" else 4
        return 2 * share * gradient * trained  # once per step: accumulation does not reduce
    if plan.parallel == "zero1":
        return share * width * trained * 2  # gradients once, updated weights once
    if plan.parallel == "zero2":
        return share * width * trained * (plan.accumulation + 1)
    if plan.parallel == "zero3":
        resident = resident_parameters(shape, plan)  # gathered once per step
        per_batch = 2 * (everything - resident) + trained
        return share * width * (plan.accumulation * per_batch + resident)
    gathers = 2 * everything  # for the forward and for the backward pass, of every micro-batch
    return share * width * plan.accumulation * (gathers + trained)


def step_time(shape: ModelShape, plan: Plan, gpu: str) -> StepTime:
    """Prediction for a GPU of `GPUS`. Communication hides behind computing; what is longer counts."""
    device = GPUS[gpu]
    model, done = (plan.accumulation * flops for flops in micro_batch_flops(shape, plan))
    compute = done / (device.peak * UTILISATION)
    bandwidth = LINK_SHARE * (device.link if plan.world <= NODE else device.network)
    communicate = traffic(shape, plan) / bandwidth
    seconds = max(compute, communicate)
    tokens = plan.tokens * plan.accumulation * plan.world
    return StepTime(compute, communicate, seconds, tokens / seconds, model, model / (device.peak * seconds))
