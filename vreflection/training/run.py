"""One training run from settings: model, data, trainer, checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from ..data.encode import EncodedSample, ImageTokens, LatentDataset
from ..data.feature_store import FeatureStore
from ..data.pixels import checked_view
from ..data.rows import Rows, open_rows
from ..data.visual_cot import ReadReport, Sample
from ..errors import CheckpointError, ConfigError, DataError, TrainingError
from ..model.checkpoint import local_folder
from ..model.config import STAGES
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.packed_attention import PACKED_ATTENTION
from ..model.processor import VReflectionProcessor
from .acceleration import accelerate_model
from .adapters import add_adapters, has_adapters, load_adapters, merge_adapters
from .arguments import training_arguments
from .checkpoints import checkpoints_in, newest_checkpoint
from .config import settings_dict
from .features import feature_key, fill_feature_store
from .folder import check_new_run, check_resumed_settings, claimed, read_progress, write_progress
from .loader import TrainData, plan_data, run_length
from .map_logging import DrawMaps, MapLogger, samples_with_boxes
from .parallel import is_main_process, lost_peers_explained, resolve_parallel
from .probe import HeldOutProbe
from .settings import TrainSettings
from .trainer import LatentTrainer
from .zero3 import whole_model

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """A finished run: the model, its log rows, seconds per step, and what became of the data rows.

    `stopped_at` is the step at which a signal ended it; then `output` holds a trainer checkpoint, not the final model.
    """

    model: VReflectionForConditionalGeneration
    processor: VReflectionProcessor
    history: list[dict[str, Any]]
    seconds_per_step: float
    report: ReadReport | None
    stopped_at: int | None = None
    stop_signal: int | None = None


class StepProgress(TrainerCallback):
    """Reports optimizer steps."""

    def __init__(self, on_step: Callable[[int, int], None]):
        self.report = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)


def check_start(settings: TrainSettings, parallel: str) -> None:
    """What can be refused before anything is loaded."""
    if not settings.model and settings.stage == "stage2":
        raise CheckpointError("model: stage 2 starts from a stage-1 checkpoint, got none; --set model=<stage-1 folder>")
    if not settings.model:
        raise ConfigError("model: expected a base model folder or hub id, got none; --set model=<folder or hub id>")
    if not settings.output:
        raise ConfigError("output: expected a folder for the checkpoint, got none; --set output=<folder>")
    if settings.lora.rank and parallel != "ddp":
        raise ConfigError(f"lora: expected parallel=ddp (the base model is not sharded), got {parallel!r}")
    if settings.lora.rank and settings.dtype == "bfloat16" and not settings.trainer.get("bf16"):
        raise ConfigError("lora: adapters over bfloat16 weights need mixed precision; --set trainer.bf16=true")
    if settings.free_running.backpropagate:
        check_backpropagation(settings, parallel)
    if settings.gauges.every and not settings.data.held_out:
        raise ConfigError("gauges.every: needs held-out rows; --set data.held_out=64, or a file of such rows")
    if settings.gauges.maps_every and not (settings.data.held_out and STAGES[settings.stage].teacher):
        raise ConfigError(
            "gauges.maps_every: needs held-out rows (--set data.held_out=64, or a file of such rows) and a stage with "
            f"the teacher, got data.held_out={settings.data.held_out!r} and stage {settings.stage!r}"
        )


def check_backpropagation(settings: TrainSettings, parallel: str) -> None:
    """The roll-out keeps a cache and all its activations, outside the wrapped model's own forward."""
    if parallel != "ddp":
        raise ConfigError(
            f"free_running.backpropagate: expected parallel=ddp (a sharded model gathers its weights in its own "
            f"forward and backward only), got {parallel!r}; --set free_running.backpropagate=false, or train on one GPU"
        )
    if settings.trainer.get("gradient_checkpointing"):
        raise ConfigError(
            "free_running.backpropagate: the roll-out feeds on its cache, which gradient checkpointing drops; "
            "--set trainer.gradient_checkpointing=false, or --set free_running.backpropagate=false"
        )


def check_image_folder(settings: TrainSettings) -> str | None:
    folder = settings.data.image_folder
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"data.image_folder: expected a folder, got {folder!r}; --set data.image_folder=<folder of the images>"
        )
    return folder


def open_training_rows(settings: TrainSettings, path: str) -> Rows:
    view = checked_view(settings.data.image_view, "data.image_view")
    return open_rows(path, check_image_folder(settings), image_view=view)


def load_processor(settings: TrainSettings, folder: Path) -> VReflectionProcessor:
    return VReflectionProcessor.from_pretrained(
        folder, settings.data.min_visual_tokens, settings.data.max_visual_tokens
    )


def load_model(
    settings: TrainSettings, processor: VReflectionProcessor, folder: Path, resume_from: Path | None
) -> VReflectionForConditionalGeneration:
    """The stage's model: new from the base in `folder`, or with the weights of the checkpoint to go on from."""
    options = {"dtype": getattr(torch, settings.dtype), "attn_implementation": attention(settings)}
    if resume_from is not None and not settings.lora.rank:
        model = VReflectionForConditionalGeneration.from_pretrained(
            resume_from, expect_stage=settings.stage, **options
        )  # fmt: skip
    else:
        ids = processor.token_ids
        token_ids = {
            "lvr_start_id": ids.lvr_start,
            "lvr_id": ids.lvr,
            "lvr_latent_end_id": ids.lvr_latent_end,
            "lvr_end_id": ids.lvr_end,
        }
        base = VReflectionForConditionalGeneration.from_pretrained(folder, **options)
        latent = settings.latent.given()
        model = VReflectionForConditionalGeneration.from_base(base, settings.stage, **token_ids, **latent)
    model.objective = settings.latent_objective()
    model.freeze_for_stage()
    if settings.lora.rank:
        add_adapters(model, settings.lora)
        if resume_from is not None:
            load_adapters(model, resume_from)
    return model


def attention(settings: TrainSettings) -> str | dict[str, str] | None:
    """Packed rows need an attention that keeps samples apart; flash attention does so by itself."""
    asked = settings.attn_implementation
    if settings.data.pack_tokens is None or (asked or "").startswith("flash_attention"):
        return asked
    return {"": asked or "sdpa", "text_config": PACKED_ATTENTION}


def run_training(
    settings: TrainSettings,
    *,
    samples: Sequence[Sample] | None = None,
    feature_cache: Mapping[str, ImageTokens] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    handle_signals: bool = True,
    draw_maps: DrawMaps | None = None,
) -> TrainResult:
    """Train one stage or control arm and save it to `settings.output`.

    Args:
        samples: rows already read; otherwise `settings.data.train` is opened, and unusable rows are counted.
        feature_cache: visual tokens by image path, so that the frozen vision tower does not run again.
        on_step: called as `on_step(done, total)` after every optimizer step.
        draw_maps: makes the figures of `gauges.maps_every`; see `map_logging.DrawMaps`.
        handle_signals: SIGTERM and the first Ctrl-C save a checkpoint after the current step and end the run.

    Raises:
        ConfigError, CheckpointError, DataError: before any step, with what to change.
        TrainingError: the run had to end, or its result could not be saved.
    """
    parallel = resolve_parallel(settings)
    check_start(settings, parallel)
    if samples is None and not settings.data.train:
        raise ConfigError("data.train: expected a training file, got none; --set data.train=<file>")
    if settings.gauges.maps_every and draw_maps is None:
        raise ConfigError(
            "gauges.maps_every: expected draw_maps with it, got none; vreflection train brings its own, from Python "
            "pass vreflection.visualization.look_figures.training_figure"
        )
    if parallel != "ddp" and "RANK" not in os.environ:
        raise ConfigError(
            f"parallel: {parallel} shares the work among processes; start with torchrun --nproc-per-node <GPUs> "
            "-m vreflection train …, or --set parallel=ddp for one GPU"
        )
    check_new_run(settings)
    resume_from = newest_checkpoint(settings.output, parallel) if settings.resume else None
    if resume_from is not None:
        check_resumed_settings(resume_from, settings)
    args = training_arguments(settings, parallel)
    if args.n_gpu > 1:
        raise ConfigError(
            f"expected one GPU per process, got one process that sees {args.n_gpu}; start with torchrun "
            f"--nproc-per-node {args.n_gpu} -m vreflection train …, or show it one: CUDA_VISIBLE_DEVICES=0"
        )
    with claimed(Path(settings.output), is_main_process()):
        return run_claimed(
            settings, args, parallel, resume_from, samples, feature_cache, on_step, callbacks, handle_signals, draw_maps
        )  # fmt: skip


def run_claimed(
    settings: TrainSettings,
    args: TrainingArguments,
    parallel: str,
    resume_from: Path | None,
    samples: Sequence[Sample] | None,
    feature_cache: Mapping[str, ImageTokens] | None,
    on_step: Callable[[int, int], None] | None,
    callbacks: list[TrainerCallback] | None,
    handle_signals: bool,
    draw_maps: DrawMaps | None = None,
) -> TrainResult:
    """`run_training` after what can be checked at once."""
    _ = args.device  # joins the other processes; what loads the model may already need to know them
    # Before the model: initial queries and projections are drawn from this seed.
    set_seed(settings.seed)
    report = ReadReport() if samples is None else None
    samples = open_training_rows(settings, settings.data.train) if samples is None else samples
    folder = local_folder(settings.model)
    processor = load_processor(settings, folder)
    with whole_model():
        model = load_model(settings, processor, folder, resume_from)
    dataset = LatentDataset(
        samples,
        processor,
        STAGES[settings.stage].slot_style,  # pyright: ignore[reportArgumentType]
        num_latents=model.config.num_latent_tokens,
        max_length=settings.data.max_length,
        feature_cache=feature_cache,
        skip_unusable=True,
    )
    batch_size = args.per_device_train_batch_size
    with args.main_process_first(desc="measuring rows"):
        data = plan_data(dataset, settings.data, batch_size, settings.seed, Path(settings.output))
    if settings.data.feature_store is not None:
        use_feature_store(settings.data.feature_store, data, model, processor, args)
    args.max_steps = run_length(data, args)
    accelerate_model(model, settings, args.device)
    trainer = LatentTrainer(
        model, args, settings, data, parallel, processor.token_ids.pad,
        callbacks=[*(callbacks or []), *([] if on_step is None else [StepProgress(on_step)])],
    )  # fmt: skip
    if settings.gauges.every:
        trainer.add_callback(HeldOutProbe(trainer, held_out_samples(dataset, data, settings), settings.gauges.every))
    if settings.gauges.maps_every and draw_maps is not None:
        held, chosen = held_out_rows(dataset, data, settings)
        picked = samples_with_boxes(held.samples, chosen, held.usable, settings.gauges.maps_samples)
        trainer.add_callback(MapLogger(trainer, picked, settings.gauges.maps_every, draw_maps))

    def extras(folder: Path) -> None:
        save_extras(folder, processor, settings)
        write_progress(folder, trainer.micro_batches_used, data.plan, trainer.guard.counts())

    trainer.save_extras = extras
    if on_step is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    first_step = 0 if resume_from is None else int(resume_from.name.rpartition("-")[2])
    if resume_from is not None:
        used, counts = read_progress(resume_from, data.plan)
        trainer.goes_on_from(first_step, used)
        trainer.guard.goes_on_from(counts)
    # Signals wait until the result is saved as well.
    with lost_peers_explained(Path(settings.output)), trainer.stop.listening(handle_signals):
        outcome = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        if not trainer.stopping:
            save_result(trainer, processor, settings)
    steps = max(trainer.state.global_step - first_step, 1)
    if report is not None:
        report.merge(data.report)
        # Loader workers keep their own tally; what they drop is in the log.
        report.kept -= len(dataset.dropped)
        for error in dataset.dropped.values():
            report.drop(error)
    result = TrainResult(
        model, processor, trainer.state.log_history, outcome.metrics["train_runtime"] / steps, report
    )  # fmt: skip
    return stopped(result, trainer, settings) if trainer.stopping else result


def held_out_samples(dataset: LatentDataset, data: TrainData, settings: TrainSettings) -> list[EncodedSample]:
    """The gauges' rows, encoded once; unusable ones are left out."""
    held, chosen = held_out_rows(dataset, data, settings)
    encoded = held.usable(chosen)
    if not encoded:
        raise DataError("no-rows", "data.held_out: none of the held-out rows is usable; the log says why for each")
    return encoded


def held_out_rows(
    dataset: LatentDataset, data: TrainData, settings: TrainSettings
) -> tuple[LatentDataset, Sequence[int]]:
    """Where the gauges' rows are, and which."""
    if isinstance(settings.data.held_out, str):
        rows = open_training_rows(settings, settings.data.held_out)
        return dataset.with_samples(rows), range(len(rows))
    return dataset, data.held_out


def use_feature_store(
    folder: str, data: TrainData, model: VReflectionForConditionalGeneration, processor: VReflectionProcessor, args
) -> None:
    """Compute the visual tokens that the store lacks, shared among the processes, and read them from then on."""
    model.model.visual.to(args.device)
    rows = [*data.plan.indices.tolist(), *data.held_out]
    image_view = data.dataset.samples[rows[0]].image_view  # that of all rows: a setting of the run
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        store = FeatureStore(folder, feature_key(model, processor, image_view))
        paths = {path for row in rows for path in data.dataset.samples[row].image_paths}
        report = fill_feature_store(
            store, paths, model, processor, rank=args.process_index, world=args.world_size, image_view=image_view
        )
    for error in report.unusable:
        logger.warning("image left out (%s): %s", error.reason, error)
    logger.info("feature store %s: %d images found, %d computed", folder, report.present, report.computed)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    data.dataset.feature_cache = store


def stopped(result: TrainResult, trainer: LatentTrainer, settings: TrainSettings) -> TrainResult:
    step = trainer.state.global_step
    if not (Path(settings.output) / f"checkpoint-{step}").is_dir():
        raise TrainingError(f"stopped at step {step}, and its checkpoint could not be saved; the log says why")
    return replace(result, stopped_at=step, stop_signal=trainer.stop.received)


def save_extras(folder: Path, processor: VReflectionProcessor, settings: TrainSettings) -> None:
    processor.save_pretrained(folder)
    (folder / "train_settings.yaml").write_text(yaml.safe_dump(settings_dict(settings), sort_keys=False))


def save_result(trainer: LatentTrainer, processor: VReflectionProcessor, settings: TrainSettings) -> None:
    """The trained model as a folder of its own: adapters merged, weights only.

    Raises:
        TrainingError: it could not be written; what was there before is untouched.
    """
    weights, model = trainer.full_weights(), trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed)
    if has_adapters(model):
        merge_adapters(model)
        weights = model.state_dict()
    if settings.data.pack_tokens is not None:
        model.set_attn_implementation({"text_config": settings.attn_implementation or "sdpa"})
    if not is_main_process() or weights is None:
        return
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    output = Path(settings.output)
    try:
        model.save_pretrained(output, state_dict=weights)
        save_extras(output, processor, settings)
    except (CheckpointError, OSError) as error:
        saved = checkpoints_in(output)
        kept = f"{saved[-1].name} is kept: --resume goes on from there" if saved else "no checkpoint was asked for"
        raise TrainingError(f"training ended, and its result could not be saved: {error} ({kept})") from error
