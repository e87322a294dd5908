"""DeepSpeed's ZeRO: what it needs to give the numbers of one process, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

logger = logging.getLogger(__name__)

CHECKPOINT = "latest"  # names the folder of DeepSpeed's own state inside a checkpoint
UNKNOWN_ZERO3 = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def check_deepspeed_config(config: Mapping[str, Any], parallel: str) -> None:
    """Refuse a DeepSpeed configuration whose training is not known to be right.

    Raises:
        ConfigError: another ZeRO stage than `parallel`, offloading, quantisation, or float16.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if parallel != f"zero{stage}":
        raise ConfigError(f"parallel: expected zero{stage} as in DeepSpeed's configuration, got {parallel!r}")
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") != "none":
            raise ConfigError(f"deepspeed: {key}: offloading is not supported; remove it, or use parallel=fsdp2")
    if stage == 3:
        check_zero3(zero)
    if config.get("fp16", {}).get("enabled", False) is True:
        raise ConfigError("deepspeed: fp16 is not supported; use trainer.bf16=true")
    if config.get("bf16", {}).get("check_grad_overflow", True) is not True:
        raise ConfigError(
            "deepspeed: bf16.check_grad_overflow: expected true: it is what skips steps that are not finite"
        )


def check_zero3(zero: Mapping[str, Any]) -> None:
    if zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            "deepspeed: stage3_gather_16bit_weights_on_model_save: expected true: the trained weights are saved whole"
        )
    asked = [key for key in UNKNOWN_ZERO3 if zero.get(key)]
    if asked or zero.get("zero_hpz_partition_size", 1) > 1:
        raise ConfigError(
            f"deepspeed: {asked or ['zero_hpz_partition_size']} is not supported with ZeRO-3; leave it out"
        )


def launched_config() -> str | None:
    """The DeepSpeed configuration file of `accelerate launch`, `"none"` without a file, or `None` without DeepSpeed.

    The host trainer sets the first variable too, but none of the others.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ:
        return "none"
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")


def launched_zero() -> str:
    """`zero1`, `zero2` or `zero3`, as `accelerate launch` was configured.

    Raises:
        ConfigError: see `check_deepspeed_config`.
    """
    file = launched_config()
    if file is None or file == "none":
        raise ConfigError(
            "accelerate: expected a DeepSpeed configuration file (deepspeed_config_file), got single keys; see "
            "configs/accelerate/zero2.yaml"
        )
    config = read_deepspeed_config(file)
    parallel = f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    check_deepspeed_config(config, parallel)
    return parallel


def read_deepspeed_config(file: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(file, Mapping):
        return file
    try:
        return json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {file}: expected a JSON file ({error})") from error


class GradientOrder:
    """Hands gradients to DeepSpeed in one order on every process.

    DeepSpeed fills its buckets in the order in which gradients appear and adds up the processes' buckets as they are.
    That order follows the graph, and a batch without boxes has another graph: unlike parameters would be added up.
    A gradient that comes early waits for its turn here.

    Args:
        optimizer: DeepSpeed's.
        model: whose trainable parameters it shards.

    Raises:
        ConfigError: this version of DeepSpeed takes gradients elsewhere.
    """

    # Where DeepSpeed's optimizers take a parameter whose gradient is complete: of stages 1 and 2, of stage 3.
    TAKES = ("process_gradients", "reduce_ready_partitions_and_remove_grads")

    def __init__(self, optimizer: Any, model: nn.Module):
        name = next((name for name in self.TAKES if callable(getattr(optimizer, name, None))), None)
        if name is None or (name == self.TAKES[1] and not hasattr(optimizer, "persistent_parameters")):
            raise ConfigError(
                f"parallel: DeepSpeed's {type(optimizer).__name__} does not let gradients be ordered; use DeepSpeed "
                "0.19 (and, for zero1, no data_types.grad_accum_dtype), or parallel=fsdp2"
            )
        self.order = gradient_order(model)
        self.hand_over = getattr(optimizer, name)
        self.waiting: dict[int, tuple[Any, ...]] = {}
        self.next = 0
        setattr(optimizer, name, self)

    def __call__(self, parameter: nn.Parameter, *group: int) -> None:
        self.waiting[id(parameter)] = (parameter, *group)
        while self.next < len(self.order) and self.order[self.next] in self.waiting:
            self.hand_over(*self.waiting.pop(self.order[self.next]))
            self.next += 1
        if self.next == len(self.order):
            self.next = 0

    def check_empty(self) -> None:
        """After a backward pass: every parameter had its turn.

        Raises:
            RuntimeError: some had no gradient, so that those after them were not added up.
        """
        if self.next or self.waiting:
            raise RuntimeError(f"backward gave {self.next + len(self.waiting)} of {len(self.order)} gradients")


def gradient_order(model: nn.Module) -> list[int]:
    """Ids of trainable parameters about as gradients come: the language model backwards, compression modules last."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    backwards = [(name.split(".")[0] in ("model", "lm_head"), id(parameter)) for name, parameter in reversed(named)]
    return [key for main in (True, False) for own, key in backwards if own is main]


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """`loss`, or, where it is not finite, one whose gradients are all NaN.

    DeepSpeed skips a step by the norm of the summed gradients, the same on every process; an infinite loss may have
    finite ones.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
