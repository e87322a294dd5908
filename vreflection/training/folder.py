"""The output folder of a run: one run at a time, nothing of another one overwritten, and resumed as what it was."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data.folders import make_folder
from ..data.packing import BatchPlan
from ..errors import CheckpointError, ConfigError
from .checkpoints import checkpoints_in
from .config import settings_dict
from .settings import TrainSettings

logger = logging.getLogger(__name__)

LOCK, PROGRESS, SETTINGS = ".run.lock", "progress.json", "train_settings.yaml"
# What the checkpoint's own state decides, or what would make its data order or parameters another's.
FIXED = (
    "stage", "seed", "dtype", "latent", "lora", "optimizer", "data.pack_tokens", "data.max_length", "data.shuffle",
    "data.min_visual_tokens", "data.max_visual_tokens", "data.held_out", "trainer.per_device_train_batch_size",
    "trainer.lr_scheduler_type", "trainer.adam_beta1", "trainer.adam_beta2", "trainer.adam_epsilon",
)  # fmt: skip
# What changes nothing that is computed.
FREE = ("resume", "output", "model", "parallel", "data.workers", "data.feature_store", "gauges", "safety")


@contextmanager
def claimed(folder: Path, main_process: bool) -> Iterator[None]:
    """Keep other runs out of an output folder while the block runs.

    Raises:
        ConfigError: another run is writing there.
    """
    if not main_process:
        yield
        return
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    made = not folder.exists()
    make_folder(folder, "output")
    with open(folder / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"output: another run ({lock.read().strip() or 'unknown'}) is writing to {str(folder)!r}; wait for it, "
                "stop it, or choose another output folder"
            ) from None
        except OSError as error:  # a file system without locks
            logger.info("output: %s cannot be locked (%s); start one run at a time there", folder, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if made:  # a run that was refused leaves nothing
                with suppress(OSError):
                    folder.rmdir()


def check_new_run(settings: TrainSettings) -> None:
    """A run that is not resumed must not mix with what is in its output folder.

    Raises:
        ConfigError: checkpoints of an earlier run, or the model to start from, are there.
    """
    output = Path(settings.output)
    if Path(settings.model).is_dir() and output.resolve() == Path(settings.model).resolve():
        raise ConfigError(f"output: expected another folder than the model's, got {settings.output!r} for both")
    found = checkpoints_in(output)
    if found and not settings.resume:
        raise ConfigError(
            f"output: {settings.output!r} holds {', '.join(path.name for path in found)} of an earlier run; go on with "
            "--resume, choose another output, or remove them"
        )


def check_resumed_settings(checkpoint: Path, settings: TrainSettings) -> None:
    """A resumed run goes on as what it was; other changes are named in the log.

    Raises:
        CheckpointError: a setting differs that the checkpoint decides.
    """
    try:
        before = flat(yaml.safe_load((checkpoint / SETTINGS).read_text()))
    except (OSError, yaml.YAMLError, AttributeError):
        logger.warning("%s: no readable %s; whether it was made with these settings is not known", checkpoint, SETTINGS)
        return
    now = flat(settings_dict(settings))
    # A key that is newer than the checkpoint had its default's effect then.
    before = flat(settings_dict(TrainSettings())) | before
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    refused = [f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed if under(key, FIXED)]
    if refused:
        raise CheckpointError(
            f"{checkpoint}: expected the settings it was made with, got {'; '.join(refused)}; set them back, or start "
            "a new run from its weights (--set model=<checkpoint folder>)"
        )
    for key in changed:
        if not under(key, FREE):
            logger.warning("resumed with another setting: %s: %r then, %r now", key, before.get(key), now.get(key))


def under(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


def write_progress(checkpoint: Path, micro_batches: int, plan: BatchPlan, counts: Mapping[str, int]) -> None:
    """How much of the run's stream of micro-batches is used up, which stream it was, and the step guard's counts."""
    progress = {"micro_batches": micro_batches, "rows": len(plan.indices), "order": order_key(plan), "guard": counts}
    (checkpoint / PROGRESS).write_text(json.dumps(progress))


def read_progress(checkpoint: Path, plan: BatchPlan) -> tuple[int, dict[str, int]]:
    """Micro-batches used up when a checkpoint was made, and the step guard's counts.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text())
        used, counts = int(progress["micro_batches"]), dict(progress.get("guard", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: expected a readable {PROGRESS}, got {error}; copy it again") from error
    if progress.get("order") != order_key(plan):
        logger.warning(
            "the usable rows are others than when %s was made (%s then, %d now): another order goes on at its place",
            checkpoint, progress.get("rows"), len(plan.indices),
        )  # fmt: skip
    return used, counts


def order_key(plan: BatchPlan) -> str:
    import hashlib

    parts = [np.ascontiguousarray(part).tobytes() for part in (plan.indices, plan.lengths) if part is not None]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
