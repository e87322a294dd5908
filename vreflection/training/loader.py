"""From rows to the batches of a run: what is usable, what is held out, and the plan that every process follows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ..data.atomic import atomic_write
from ..data.collate import Collator, PackedCollator
from ..data.encode import LatentDataset
from ..data.lengths import measure_lengths
from ..data.packing import BatchPlan, RankBatches, packing_report
from ..data.visual_cot import ReadReport
from ..errors import DataError
from .parallel import is_main_process
from .settings import DataSettings

logger = logging.getLogger(__name__)


@dataclass
class TrainData:
    """The data set, the plan of its batches, and what became of the rows.

    `held_out` are positions of rows that no batch contains.
    """

    dataset: LatentDataset
    plan: BatchPlan
    held_out: list[int]
    report: ReadReport
    packed: bool

    def loader(self, count: int, shift: int, rank: int, world: int, workers: int, pad: int, pin: bool) -> DataLoader:
        """This process's `count` micro-batches, in order, the first of all processes being number `shift`."""
        collate = PackedCollator(keep_sources=True) if self.packed else Collator(pad, keep_sources=True)
        return DataLoader(
            self.dataset,
            batch_sampler=RankBatches(self.plan, count, rank, world, shift),  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin,
            # Of its own, so that starting workers draws nothing from the generator that training uses.
            generator=torch.Generator().manual_seed(self.plan.seed),
        )

    def batches_per_epoch(self) -> float:
        """Micro-batches that hold every row once."""
        if not self.packed:
            return len(self.plan.indices) / self.plan.batch_size
        return sum(1 for _ in takewhile(lambda batch: batch[0] == 1, self.plan.batches()))


def plan_data(
    dataset: LatentDataset,
    settings: DataSettings,
    batch_size: int,
    seed: int,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainData:
    """Measure the rows and plan the batches.

    Args:
        dataset: all rows.
        batch_size: samples per micro-batch where samples are not packed.
        folder: where measured lengths are kept for the next start.

    Raises:
        DataError: no usable row. ConfigError: the budget is below the longest sample, or too many rows are held out.
    """
    measured = measure_lengths(dataset, settings.workers, folder / "lengths.npz", on_progress)
    report = ReadReport(kept=len(measured.usable), clamped=measured.clamped)
    for error in measured.dropped:
        report.drop(error)
    if measured.dropped and is_main_process():
        file = folder / "dropped_rows.jsonl"
        write_dropped(measured.dropped, file)
        logger.warning("rows left out of training: %s; each with its reason in %s", report.summary(), file)
    if not len(measured.usable):
        raise DataError("no-rows", f"none of the {len(dataset)} samples is usable: {report.summary()}")
    usable = measured.usable
    held_out: list[int] = []
    if isinstance(settings.held_out, int) and settings.held_out:
        held_out = choose_held_out(usable, settings.held_out, seed)
        usable = np.setdiff1d(usable, held_out)
    plan = BatchPlan(usable, seed, batch_size, settings.pack_tokens, measured.tokens[usable], settings.shuffle)
    dataset.stand_ins = plan.indices
    if settings.pack_tokens is not None:
        logger.info(packing_report(plan).summary())
    return TrainData(dataset, plan, held_out, report, settings.pack_tokens is not None)


def write_dropped(dropped: Sequence[DataError], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        for error in dropped:
            row = {"row": error.source, "reason": error.reason, "message": error.message}
            out.write((json.dumps(row) + "\n").encode())


def choose_held_out(usable: Sequence[int] | np.ndarray, count: int, seed: int) -> list[int]:
    """`count` rows to keep out of training; the same ones for the same rows and seed."""
    if count >= len(usable):
        raise DataError(
            "no-rows", f"data.held_out: expected fewer than the {len(usable)} usable rows, got {count}; lower it"
        )
    order = np.random.default_rng((seed, 0x4E1D)).permutation(len(usable))
    return sorted(int(usable[i]) for i in order[:count])


def run_length(data: TrainData, args: TrainingArguments) -> int:
    """Optimizer steps: `max_steps`, or as many as `num_train_epochs` needs."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.gradient_accumulation_steps * args.world_size
    return max(1, round(args.num_train_epochs * data.batches_per_epoch() / per_step))
