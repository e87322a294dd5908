"""What a training run needs per GPU, before it is started: plain arithmetic on the model's sizes.

Every formula is stated in docs/memory.md; parameters are exact, activations follow what autograd keeps (tested), the
rest is an estimate. Bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .model_shape import ModelShape, model_shape
from .step_time import StepTime, step_time

if TYPE_CHECKING:
    from .settings import TrainSettings

GIB = 2**30
PARALLEL = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = ("mixed", "bfloat16", "float32")
# Nominal size in GB -> GiB a process sees.
GPU_GIB = {24: 23.5, 40: 39.4, 80: 79.1, 96: 94.9, 141: 139.8, 192: 178.3}
CONTEXT = 1.5 * GIB  # CUDA context, library workspaces, communicator
FRAGMENTATION = 0.08  # of everything that comes and goes within a step
BUCKET = 2 * 500_000_000 * 2  # DeepSpeed's default: two buckets of 5e8 bfloat16 elements


@dataclass(frozen=True)
class Plan:
    """One way to run a stage.

    Attributes:
        parallel: one of `PARALLEL`; `world`: GPUs.
        precision: `mixed` (float32 weights, bfloat16 compute), `bfloat16` (all but adapters, which stay float32),
            `float32`.
        tokens: packed tokens per micro-batch and GPU; `sample_tokens` of them in an average sample.
        visual_share, supervised_share: of the tokens.
        checkpointing: keep only every decoder layer's input. feature_cache: the vision tower does not run.
        fused_cross_entropy: logits in chunks. all_positions: logits everywhere, as a naive step has them.
        lora_rank: 0 trains all of the language model. accumulation: micro-batches per optimizer step.
        repeated_keys: attention keeps as many key heads as query heads, as the packed kernel on GPUs does.
    """

    stage: str = "stage1"
    parallel: str = "fsdp2"
    world: int = 8
    precision: str = "mixed"
    tokens: int = 16384
    sample_tokens: int = 1024
    visual_share: float = 0.75
    supervised_share: float = 0.1
    checkpointing: bool = True
    feature_cache: bool = False
    fused_cross_entropy: bool = False
    all_positions: bool = False
    lora_rank: int = 0
    accumulation: int = 8
    repeated_keys: bool = True

    def __post_init__(self):
        for name, known in (("parallel", PARALLEL), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("world", "tokens", "sample_tokens", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.parallel.startswith("zero") and self.precision != "mixed":
            raise ConfigError(
                f"precision: expected 'mixed', as DeepSpeed keeps float32 masters of bfloat16 weights, got "
                f"{self.precision!r}"
            )

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what the layers compute."""
        return 4 if self.precision == "float32" else 2

    @property
    def autocasts(self) -> bool:
        """Whether weights stay float32 on every GPU and are cast per step."""
        return self.precision == "mixed" and self.parallel == "ddp"

    @property
    def supervised(self) -> int:
        return self.tokens if self.all_positions else math.ceil(self.tokens * self.supervised_share)

    @property
    def visual_tokens(self) -> int:
        return int(self.tokens * self.visual_share)


@dataclass(frozen=True)
class PlanRow:
    """Bytes per GPU by part, and the time of a step per GPU model.

    `total` counts the larger of what the vision tower and the language model need for their passes, not both.
    """

    plan: Plan
    parts: dict[str, float]
    total: float
    fits: tuple[int, ...]
    times: dict[str, StepTime] = field(default_factory=dict)


def trained_parameters(shape: ModelShape, plan: Plan) -> int:
    """Parameters with a gradient: the language model (or its adapters), and the stage's compression module."""
    language = shape.adapters(plan.lora_rank) if plan.lora_rank else shape.language
    return language + {"stage1": shape.teacher, "filler_aligned": shape.teacher, "stage2": shape.student}.get(
        plan.stage, 0
    )


def all_parameters(shape: ModelShape, plan: Plan) -> int:
    adapters = shape.adapters(plan.lora_rank) if plan.lora_rank else 0
    return shape.language + resident_parameters(shape, plan) + adapters


def resident_parameters(shape: ModelShape, plan: Plan) -> int:
    """Vision tower and compression modules: what ZeRO-3 keeps whole on every GPU (see `zero3.ResidentParts`)."""
    modules = {"stage1": shape.teacher, "filler_aligned": shape.teacher, "stage2": shape.teacher + shape.student}
    return shape.vision + modules.get(plan.stage, 0)


def static_bytes(shape: ModelShape, plan: Plan) -> dict[str, float]:
    """Weights, gradients, optimizer states, and what communication and casting hold besides."""
    trained = trained_parameters(shape, plan)
    frozen = all_parameters(shape, plan) - trained
    # Bytes per element: weights of trained and of frozen parameters, gradients, optimizer states.
    if plan.precision == "bfloat16":
        own, other, gradient, states = (4, 2, 4, 8) if plan.lora_rank else (2, 2, 2, 4)
    elif plan.precision == "float32":
        own, other, gradient, states = 4, 4, 4, 8
    elif plan.parallel.startswith("zero"):
        own, other, gradient, states = 2, 2, 2, 12
    else:
        own, other, gradient, states = 4, 4, 4, 8
    sharded = {"ddp": "", "zero1": "s", "zero2": "sg", "zero3": "sgw", "fsdp2": "sgw"}[plan.parallel]
    part = {kind: plan.world if kind in sharded else 1 for kind in "sgw"}
    weights = own * trained + other * frozen
    whole = other * resident_parameters(shape, plan) if plan.parallel == "zero3" else 0
    return {
        "weights": whole + (weights - whole) / part["w"],
        "gradients": gradient * trained / part["g"],
        "optimizer": states * trained / part["s"],
        "weight copies": weight_copies(shape, plan),
        "communication": communication_bytes(shape, plan, gradient * trained),
    }


def weight_copies(shape: ModelShape, plan: Plan) -> float:
    """Autocast's bfloat16 copies: of every trained matrix, kept until the backward pass is over.

    Frozen matrices under adapters are not remembered: with checkpointing those of one layer exist at a time.
    """
    if not plan.autocasts:
        return 0
    layers = 1 if plan.lora_rank and plan.checkpointing else shape.layers
    module = {"stage1": shape.teacher, "filler_aligned": shape.teacher, "stage2": shape.student}.get(plan.stage, 0)
    return 2 * (layers * shape.layer_matrices + shape.embedding + module)


def communication_bytes(shape: ModelShape, plan: Plan, gradients: float) -> float:
    """Reduction buckets, and the layers a sharded run gathers: two at a time, and all that belongs to no layer."""
    if plan.world == 1:
        return 0
    if plan.parallel == "ddp":
        return gradients
    if plan.parallel in ("zero1", "zero2"):
        return BUCKET
    width = plan.compute_bytes
    if plan.parallel == "zero3":
        return width * (2 * shape.layer + max(shape.embedding, shape.head)) + BUCKET
    outside = shape.embedding + shape.head + shape.width
    gathered = width * (2 * shape.layer + outside)
    whole_gradients = 0 if plan.lora_rank else width * max(outside, 2 * shape.layer)
    return gathered + whole_gradients


def layer_activations(shape: ModelShape, plan: Plan) -> int:
    """What autograd keeps per token of one decoder layer.

    Norm inputs and outputs, the inputs of all products, queries, keys, values and output of attention, its row sums.
    """
    width, mlp = shape.width, shape.mlp
    keys = 2 * (width if plan.repeated_keys and plan.compute_bytes == 2 else shape.kv_width)
    rows = 4 * shape.heads + 8
    if plan.compute_bytes == 4:
        return 4 * (8 * width + 4 * mlp + keys) + rows
    if plan.autocasts:
        # float32 residual stream and norms, and one bfloat16 copy of its input per product.
        return 4 * 4 * width + 2 * (7 * width + 4 * mlp + keys) + rows
    return 4 * 2 * width + 2 * (6 * width + 4 * mlp + keys) + rows


def saved_bytes(shape: ModelShape, plan: Plan) -> float:
    """What autograd keeps between the decoder's forward and backward pass, logits aside."""
    residual = 4 if plan.autocasts else plan.compute_bytes
    per_layer = residual * shape.width if plan.checkpointing else layer_activations(shape, plan)
    final_norm = (8 if residual == 4 else 6) * shape.width + 4
    return plan.tokens * (shape.layers * per_layer + final_norm)


def activation_bytes(shape: ModelShape, plan: Plan) -> float:
    """Kept activations of the decoder, and the working set of one layer's backward pass."""
    recomputed = layer_activations(shape, plan) if plan.checkpointing else 0
    # Gradients of the MLP's three products and of the residual stream.
    working = plan.compute_bytes * (3 * shape.mlp + 4 * shape.width)
    return saved_bytes(shape, plan) + plan.tokens * (recomputed + working)


def logit_bytes(shape: ModelShape, plan: Plan) -> float:
    """Logits, log-probabilities and their gradients; in chunks with a fused cross-entropy."""
    rows, width = plan.supervised, plan.compute_bytes
    if plan.fused_cross_entropy:
        chunks = math.ceil(shape.vocabulary / shape.width)
        return math.ceil(rows / chunks) * shape.vocabulary * (width + 4) + width * shape.embedding
    # float32: logits, log-probabilities, two gradients of the loss. bfloat16: the last three, and logits and their
    # gradient in two bytes. Sixteen bytes either way.
    return rows * shape.vocabulary * 16


def vision_bytes(shape: ModelShape, plan: Plan) -> float:
    """Pixels, and one layer of the vision tower in flight: nothing is kept for a backward pass."""
    if plan.feature_cache:
        return 0
    patches = plan.visual_tokens * shape.merge**2
    width, compute = shape.vision_width, plan.compute_bytes
    attention = compute * 7 * width + 4 * 2 * width
    mlp = compute * (2 * width + 3 * shape.vision_mlp)
    return patches * (4 * shape.patch_width + max(attention, mlp))


def memory_row(shape: ModelShape, plan: Plan, gpus: Iterable[str] = ()) -> PlanRow:
    """All parts of one plan, per GPU."""
    parts = static_bytes(shape, plan)
    passing = {
        "activations": activation_bytes(shape, plan),
        "logits": logit_bytes(shape, plan),
        "visual tokens": plan.compute_bytes * 2 * plan.visual_tokens * shape.width,
    }
    vision = vision_bytes(shape, plan)
    peak = max(sum(passing.values()), vision)
    margin = CONTEXT + FRAGMENTATION * peak
    total = sum(parts.values()) + peak + margin
    fits = tuple(size for size, gib in GPU_GIB.items() if total <= gib * GIB)
    times = {name: step_time(shape, plan, name) for name in gpus}
    return PlanRow(plan, {**parts, **passing, "vision pass": vision, "margin": margin}, total, fits, times)


def plan_table(
    model: str = "7b", plans: Iterable[Plan] | None = None, gpus: Iterable[str] = ("A100", "H100", "H200", "B200")
) -> list[PlanRow]:
    """Rows for a model by name or folder; by default the usual ways to train it."""
    shape = model_shape(model)
    gpus = tuple(gpus)
    return [memory_row(shape, plan, gpus) for plan in (usual_plans() if plans is None else plans)]


def usual_plans(base: Plan | None = None) -> list[Plan]:
    """Every kind of parallelism at the world sizes where it is used, and one-GPU adapters."""
    base = base or Plan()
    plans = [replace(base, parallel="ddp", world=1, precision=p, lora_rank=0) for p in ("mixed", "bfloat16")]
    plans += [replace(base, parallel="ddp", world=1, precision="bfloat16", lora_rank=base.lora_rank or 64)]
    plans += [replace(base, parallel="ddp", world=8, precision=p, lora_rank=0) for p in ("mixed", "bfloat16")]
    for kind in ("zero1", "zero2", "zero3", "fsdp2"):
        worlds = (2, 8, 64) if kind == "fsdp2" else (8,)
        plans += [replace(base, parallel=kind, world=world, precision="mixed", lora_rank=0) for world in worlds]
    plans += [replace(base, parallel="fsdp2", world=8, precision="bfloat16", lora_rank=0)]
    return plans


def plan_of(settings: TrainSettings, world: int = 1, **changes) -> Plan:
    """The plan a settings file asks for, on `world` GPUs.

    Args:
        changes: fields of `Plan` to set otherwise, such as `sample_tokens`.
    """
    trainer = settings.trainer
    batch = int(trainer.get("per_device_train_batch_size", 8))
    tokens = settings.data.pack_tokens or batch * settings.data.max_length
    half = bool(trainer.get("bf16", False))
    # DeepSpeed computes in bfloat16 over float32 masters whatever the settings' weights are.
    mixed = settings.parallel.startswith("zero") or (half and settings.dtype == "float32")
    values = {
        "stage": settings.stage,
        "parallel": settings.parallel,
        "world": world,
        "precision": "mixed" if mixed else settings.dtype,
        "tokens": tokens,
        "checkpointing": bool(trainer.get("gradient_checkpointing", False)),
        "feature_cache": settings.data.feature_store is not None,
        "fused_cross_entropy": settings.fused_cross_entropy == "liger",
        "lora_rank": settings.lora.rank,
        "accumulation": int(trainer.get("gradient_accumulation_steps", 1)),
    }
    return Plan(**{**values, **changes})


def settings_plan(settings: TrainSettings) -> list[PlanRow]:
    """Rows for a settings file's own choices on 1 to 64 GPUs, then for the usual ways to train its model.

    Raises:
        ConfigError: no model named.
    """
    if not settings.model:
        raise ConfigError("model: expected a model to plan for, got none; --set model=7b, 3b, or a checkpoint folder")
    worlds = (1, 2, 4, 8, 16, 32, 64)
    own = [plan_of(settings, world) for world in worlds if settings.parallel == "ddp" or world > 1]
    return plan_table(settings.model, [*own, *(plan for plan in usual_plans(own[0]) if plan not in own)])


def format_plan(rows: list[PlanRow]) -> str:
    """A plain-text table: GiB per GPU by part, which GPUs hold it, and predicted steps."""
    if not rows:
        return "no plans"
    names = list(rows[0].parts)
    gpus = list(rows[0].times)
    header = ["run", *names, "total", "fits (GB)", *(f"{gpu} tok/s (s/step)" for gpu in gpus)]
    lines = [header]
    for row in rows:
        times = [f"{t.tokens_per_second:,.0f} ({t.seconds:.1f})" for t in row.times.values()]
        sizes = [f"{row.parts[name] / GIB:.1f}" for name in names]
        fits = f"{min(row.fits)}+" if row.fits else "none"
        lines.append([describe(row.plan), *sizes, f"{row.total / GIB:.1f}", fits, *times])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    plan = rows[0].plan
    text.append(
        f"GiB per GPU, {plan.stage}, {plan.tokens:,} tokens per micro-batch x {plan.accumulation}, samples of "
        f"{plan.sample_tokens:,}, {plan.visual_share:.0%} visual, {plan.supervised_share:.0%} supervised; "
        "tok/s of the whole run. Formulas and assumptions: docs/memory.md"
    )
    return "\n".join(text)


def describe(plan: Plan) -> str:
    words = [plan.parallel, f"x{plan.world}", f"LoRA {plan.lora_rank}" if plan.lora_rank else plan.precision]
    words += [] if plan.checkpointing else ["no checkpointing"]
    words += ["cached features"] if plan.feature_cache else []
    words += ["fused CE"] if plan.fused_cross_entropy else []
    words += ["all logits"] if plan.all_positions else []
    return " ".join(words)
