"""Checkpoints of a running training: written whole or not at all, one format for every way of sharing the work.

A checkpoint folder `checkpoint-<step>` is a model folder like any other (weights, configuration, processor), plus the
optimizer's state by parameter name (`optimizer/`, torch's distributed format, whose pieces any number of processes can
read), the schedule, each process's random state, and the host trainer's state.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..errors import CheckpointError
from ..model.checkpoint import flush
from .adapters import has_adapters, save_adapters
from .guard import any_rank
from .zero import CHECKPOINT as ZERO

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

logger = logging.getLogger(__name__)

NAME = re.compile(r"^checkpoint-(\d+)$")
OPTIMIZER, SCHEDULE, STATE = "optimizer", "scheduler.pt", "trainer_state.json"
LAYOUT = "deepspeed_layout.txt"


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if NAME.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def newest_checkpoint(folder: str | Path, parallel: str = "ddp") -> Path:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: none there, or the newest lacks files (a copy that was cut short), or only DeepSpeed, or only
            another layout of DeepSpeed, can go on from it.
    """
    found = checkpoints_in(folder)
    if not found:
        raise CheckpointError(
            f"resume: expected a trainer checkpoint (checkpoint-<step>) in {str(folder)!r}, found none; "
            "start without resume, and save some with trainer.save_strategy=steps"
        )
    check_layout(found[-1], parallel)
    state = ZERO if parallel.startswith("zero") else OPTIMIZER
    missing = [name for name in (STATE, SCHEDULE, state) if not (found[-1] / name).exists()]
    if missing:
        raise CheckpointError(
            f"{found[-1]}: expected a whole checkpoint, it lacks {missing}; was it copied in part, or saved with "
            "save_only_model? Copy it again, or remove it to go on from an earlier one"
        )
    return found[-1]


def check_layout(checkpoint: Path, parallel: str) -> None:
    """DeepSpeed's state is read by as many processes of the same ZeRO stage; every other way shares one format."""
    layout, zero = checkpoint / LAYOUT, parallel.startswith("zero")
    made = layout.read_text().strip() if layout.is_file() else None
    here = f"{parallel} over {os.environ.get('WORLD_SIZE', '1')} processes"
    if zero and made is None and (checkpoint / OPTIMIZER).exists():
        raise CheckpointError(
            f"{checkpoint}: made without DeepSpeed, and {parallel} cannot read its optimizer's state; resume with "
            "parallel=ddp or fsdp2"
        )
    if made is not None and made != here:
        raise CheckpointError(
            f"{checkpoint}: expected {made}, as it was made (DeepSpeed's state is read by the same layout only), got "
            f"{here}; its weights alone are a model folder like any other"
        )


class CheckpointingTrainer(Base):
    """The saving and loading half of `LatentTrainer`.

    A checkpoint that cannot be written (a full disk) is reported and removed; earlier ones stay and training goes on.
    """

    save_extras: Callable[[Path], None] | None = None
    failed_saves = 0
    stopping = False
    parallel = "ddp"

    def _save_checkpoint(self, model, trial) -> None:
        root = Path(self.args.output_dir)
        final = root / f"checkpoint-{self.state.global_step}"
        partial = root / f".{final.name}.partial"
        self.store_flos()
        error = self._attempt([lambda: self._fresh(partial)])
        if not error:
            tasks = self._deepspeed_tasks(partial) if self.is_deepspeed_enabled else self._tasks(partial)
            error = self._attempt(tasks)
        if not error:
            error = self._attempt([lambda: publish(partial, final)] if self.args.should_save else [])
        if error:
            self.failed_saves += 1
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                kept = [path.name for path in checkpoints_in(root)]
                free = shutil.disk_usage(root).free / 2**30 if root.exists() else 0.0
                logger.error(
                    "%s could not be saved: %s (%.1f GiB free). Kept: %s. Training goes on; free some space, the next "
                    "save is tried as planned", final, error, free, kept or "none",
                )  # fmt: skip
            return
        if self.args.should_save and self.args.save_total_limit:
            for old in checkpoints_in(root)[: -self.args.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)

    def _fresh(self, partial: Path) -> None:
        if self.args.should_save:
            for left in partial.parent.glob(".checkpoint-*.partial"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)

    def _attempt(self, tasks: list[Callable[[], Any]]) -> str:
        """Do every task on every process, whatever fails on one; what went wrong, or "" when nothing did anywhere."""
        error = ""
        for task in tasks:
            try:
                task()
            # Full disks come as OSError, SafetensorError, RuntimeError or torch's own, depending on the writer.
            except (Exception, CheckpointException) as failure:
                error = error or f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
        failed = any_rank(torch.tensor([bool(error)], device=self.args.device))[0]
        return (error or "another process could not write its part") if failed else ""

    def _tasks(self, folder: Path) -> list[Callable[[], Any]]:
        tasks: list[Callable[[], Any]] = [lambda: self._save_weights(folder)]
        # What a signal ends must be able to go on.
        if not self.args.save_only_model or self.stopping:
            tasks += [lambda: self._save_optimizer(folder), lambda: self._save_rng_state(str(folder))]
            tasks += [lambda: self._save_scaler(str(folder))]
        if self.args.should_save:
            tasks += [lambda: self._save_state(folder)]
        return tasks

    def _deepspeed_tasks(self, folder: Path) -> list[Callable[[], Any]]:
        tasks: list[Callable[[], Any]] = [lambda: self.save_model(str(folder), _internal_call=True)]
        if not self.args.save_only_model or self.stopping:
            tasks += [lambda: self._save_optimizer_and_scheduler(str(folder))]
            tasks += [lambda: self._save_rng_state(str(folder))]
        if self.args.should_save:
            layout = f"{self.parallel} over {self.args.world_size} processes"
            tasks += [lambda: (folder / LAYOUT).write_text(layout + "\n"), lambda: self._save_state(folder)]
        return tasks

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Whole weights on the host, gathered from all processes; on the main process only."""
        model = self.accelerator.unwrap_model(self.model)
        if not type(model).__name__.startswith("FSDP"):
            return model.state_dict() if self.args.should_save else None
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return weights if self.args.should_save else None

    def _save_weights(self, folder: Path) -> None:
        weights = self.full_weights()
        if weights is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        if has_adapters(model):
            save_adapters(model, weights, folder)
        else:
            if model.config.tie_word_embeddings:
                weights.pop("lm_head.weight", None)
            model.save_pretrained(folder, state_dict=weights)

    def _save_optimizer(self, folder: Path) -> None:
        state = get_optimizer_state_dict(self._core(), self._plain_optimizer())
        with one_process_is_meant() as options:
            dcp.save({"optimizer": state}, checkpoint_id=folder / OPTIMIZER, **options)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULE)

    def _save_state(self, folder: Path) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / STATE))
        if self.save_extras is not None:
            self.save_extras(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Nothing: the model was built from the checkpoint's weights."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        model, optimizer = self._core(), self._plain_optimizer()
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        try:
            with one_process_is_meant() as options:
                dcp.load(state, checkpoint_id=Path(checkpoint) / OPTIMIZER, **options)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"{checkpoint}: the optimizer's state does not load ({error}); was it made with other trainable parts?"
            ) from error
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULE, weights_only=True))
        return None

    def _core(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # pyright: ignore[reportReturnType]


def publish(partial: Path, final: Path) -> None:
    """Make sure everything is on the disk, then give the folder its name: a kill leaves the one or the other."""
    for path in sorted(partial.rglob("*"), reverse=True):
        flush(path)
    flush(partial)
    replaced = final.with_name(f".{final.name}.replaced.partial")
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def one_process_is_meant() -> Iterator[dict[str, bool]]:
    """Options of torch's distributed format; a run of one process is not worth its warning."""
    if dist.is_available() and dist.is_initialized():
        yield {}
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": True}
