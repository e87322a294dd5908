"""One training run from settings: model, data, trainer, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.collate import Collator
from ..data.encode import ImageTokens, LatentDataset
from ..data.visual_cot import ReadReport, Sample, read_visual_cot
from ..errors import CheckpointError, ConfigError, DataError
from ..model.checkpoint import local_folder
from ..model.config import STAGES
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from .config import TrainSettings, settings_dict
from .trainer import LatentTrainer, training_arguments


@dataclass
class TrainResult:
    """A finished run: the model, its log rows, seconds per step, and what became of the data rows."""

    model: VReflectionForConditionalGeneration
    processor: VReflectionProcessor
    history: list[dict[str, Any]]
    seconds_per_step: float
    report: ReadReport | None


class StepProgress(TrainerCallback):
    """Reports optimizer steps."""

    def __init__(self, on_step: Callable[[int, int], None]):
        self.report = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


def check_start(settings: TrainSettings) -> None:
    """What can be refused before anything is loaded."""
    if not settings.model and settings.stage == "stage2":
        raise CheckpointError("model: stage 2 starts from a stage-1 checkpoint, got none; --set model=<stage-1 folder>")
    if not settings.model:
        raise ConfigError("model: expected a base model folder or hub id, got none; --set model=<folder or hub id>")
    if not settings.output:
        raise ConfigError("output: expected a folder for the checkpoint, got none; --set output=<folder>")


def check_image_folder(settings: TrainSettings) -> str | None:
    folder = settings.data.image_folder
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"data.image_folder: expected a folder, got {folder!r}; --set data.image_folder=<folder of the images>"
        )
    return folder


def resume_point(settings: TrainSettings) -> str | None:
    """The newest trainer checkpoint in `output`, or `None` when not resuming."""
    if not settings.resume:
        return None
    found = get_last_checkpoint(settings.output) if Path(settings.output).is_dir() else None
    if found is None:
        raise CheckpointError(
            f"resume: expected a trainer checkpoint (checkpoint-<step>) in {settings.output!r}, found none; "
            "start without resume, and save some with trainer.save_strategy=steps"
        )
    return found


def load_model(settings: TrainSettings) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    folder = local_folder(settings.model)
    processor = VReflectionProcessor.from_pretrained(
        folder, settings.data.min_visual_tokens, settings.data.max_visual_tokens
    )
    ids = processor.token_ids
    token_ids = {
        "lvr_start_id": ids.lvr_start,
        "lvr_id": ids.lvr,
        "lvr_latent_end_id": ids.lvr_latent_end,
        "lvr_end_id": ids.lvr_end,
    }
    base = VReflectionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=settings.attn_implementation
    )
    model = VReflectionForConditionalGeneration.from_base(base, settings.stage, **token_ids, **settings.latent.given())
    model.objective = settings.latent_objective()
    model.freeze_for_stage()
    return model, processor


def run_training(
    settings: TrainSettings,
    *,
    samples: Sequence[Sample] | None = None,
    feature_cache: Mapping[str, ImageTokens] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainResult:
    """Train one stage or control arm and save it to `settings.output`.

    Args:
        samples: rows already read; otherwise `settings.data.train` is read, and unusable rows are counted.
        feature_cache: visual tokens by image path, so that the frozen vision tower does not run again.
        on_step: called as `on_step(done, total)` after every optimizer step.

    Raises:
        ConfigError, CheckpointError, DataError: before any step, with what to change.
    """
    check_start(settings)
    resume_from = resume_point(settings)
    # Before the model: initial queries and projections are drawn from this seed.
    set_seed(settings.seed)
    report = None
    if samples is None:
        if not settings.data.train:
            raise ConfigError("data.train: expected a training file, got none; --set data.train=<file>")
        samples, report = read_visual_cot(settings.data.train, check_image_folder(settings))
        if not samples:
            raise DataError("no-rows", f"no usable training row: {report.summary()}", settings.data.train)
    model, processor = load_model(settings)
    dataset = LatentDataset(
        samples,
        processor,
        STAGES[settings.stage].slot_style,  # pyright: ignore[reportArgumentType]
        num_latents=model.config.num_latent_tokens,
        max_length=settings.data.max_length,
        feature_cache=feature_cache,
        skip_unusable=True,
    )
    trainer = LatentTrainer(
        model,
        training_arguments(settings),
        settings.optimizer,
        settings.free_running,
        train_dataset=dataset,
        data_collator=Collator(processor.token_ids.pad),
        callbacks=[*(callbacks or []), *([] if on_step is None else [StepProgress(on_step)])],
    )
    if on_step is not None:
        trainer.remove_callback(PrinterCallback)
    outcome = trainer.train(resume_from_checkpoint=resume_from)
    steps = max(trainer.state.global_step, 1)
    if report is not None:
        # Loader workers keep their own tally; what they drop is in the log.
        report.kept -= len(dataset.dropped)
        for error in dataset.dropped.values():
            report.drop(error)
    output = Path(settings.output)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    (output / "train_settings.yaml").write_text(yaml.safe_dump(settings_dict(settings), sort_keys=False))
    return TrainResult(model, processor, trainer.state.log_history, outcome.metrics["train_runtime"] / steps, report)
