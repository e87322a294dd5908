"""How several processes share one run: sharding by FSDP2, and what the launcher's environment asks for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError, TrainingError
from .checkpoints import checkpoints_in
from .settings import TrainSettings
from .zero import launched_config, launched_zero

logger = logging.getLogger(__name__)

# How gloo and NCCL say that the other side is gone.
LOST_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out",
    "remote process exited", "Socket Timeout",
)  # fmt: skip


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def resolve_parallel(settings: TrainSettings) -> str:
    """`parallel`, or what `accelerate launch` was configured for.

    Sharding is done here and not by accelerate, so that one rule, and one kind of checkpoint, serves every launcher.

    Raises:
        ConfigError: the launcher asks for something else than the settings, or for what is not supported.
    """
    asked = settings.parallel
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if (
            os.environ.get("FSDP_VERSION", "2") != "2"
            or os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
        ):
            raise ConfigError(
                "accelerate: expected FSDP version 2 without offloading; see configs/accelerate/fsdp2.yaml"
            )
        if asked not in ("ddp", "fsdp2"):
            raise ConfigError(f"parallel: expected fsdp2 as in accelerate's configuration, got {asked!r}")
        # Otherwise accelerate would shard a second time.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        asked = "fsdp2"
    if launched_config() is not None:
        launched = launched_zero()
        if asked not in ("ddp", launched):
            raise ConfigError(f"parallel: expected {launched} as in accelerate's configuration, got {asked!r}")
        asked = launched
    return asked


def shard_model(model: nn.Module, device: torch.device, half: bool) -> None:
    """Shard weights, gradients and optimizer states over all processes, in place (FSDP2).

    Each decoder layer is gathered on its own. Everything else (embeddings, head, compression modules, and the vision
    tower, which a process whose batch has no image never runs) belongs to the model itself and is gathered with it, so
    that processes with and without images call the same collectives.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)
    for layer in model.model.language_model.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def bind_forward_method(model: nn.Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a method that may run parts of a possibly sharded model: gathered before, like `forward`."""
    setattr(model, name, MethodType(function, model))
    if type(model).__name__.startswith("FSDP"):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, name)
    return getattr(model, name)


@contextmanager
def lost_peers_explained(output: Path) -> Iterator[None]:
    """Say what happened when another process of the job died, instead of what its silence broke here.

    Raises:
        TrainingError: a collective failed because a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(sign in str(error) for sign in LOST_PEER):
            raise
        saved = checkpoints_in(output)
        kept = f"the newest checkpoint is {saved[-1].name}; go on with --resume" if saved else "nothing was saved yet"
        first = str(error).splitlines()[0][:200]
        raise TrainingError(
            f"another process of this job ended (its own log says why), and rank {os.environ.get('RANK')} cannot go on "
            f"without it: {kept}. [{first}]"
        ) from error


def agreed_maximum(value: int, device: torch.device) -> int:
    """The largest value of any process."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    held = torch.tensor(value, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)
