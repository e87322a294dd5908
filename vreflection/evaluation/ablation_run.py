"""`vreflection ablate`: from settings to questions, an ablation, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.atomic import atomic_write
from ..data.folders import make_folder
from ..data.pixels import ImageView
from ..data.rows import Rows, open_rows
from ..data.template import extract_answer
from ..data.visual_cot import Sample
from ..engine.requests import Prompt
from ..errors import ConfigError, DataError
from ..model.checkpoint import checkpoint_tensors, load_config, local_folder, weight_files
from ..model.processor import VReflectionProcessor
from .ablation import Ablation, Progress, Question
from .ablation_summary import markdown, sentences, summarize
from .asking import Prompts, load_processor
from .benchmarks import load_benchmark
from .benchmarks.pictures import IMAGE_VIEW
from .extraction import EXTRACTORS
from .fingerprints import file_digest, joined_digest
from .interventions import chosen_interventions
from .manifests import differences
from .protocol import Protocol, load_protocol
from .questions import expected_answer, prompt_of
from .records import Item
from .run import EvalSettings, check_settings, limited, load_model, units

SETTINGS = "ablate.json"
SCHEMA = 2
ROW_TOKENS = 64  # limit of an answer to a row of one's own


@dataclass(frozen=True)
class AblationSettings:
    """What to ablate.

    Attributes:
        evaluation: model, benchmark (one, or none with `rows`), folder, protocol, limit and devices as for a run.
        rows, image_folder: training rows with an `<answer>` to ask instead of a benchmark.
        image_view: of the rows; None is that of a clean index, else `stored`. See `open_rows`.
        interventions, steps: see `chosen_interventions`. seed: of the noise.
    """

    evaluation: EvalSettings
    rows: Path | None = None
    image_folder: Path | None = None
    image_view: ImageView | None = None
    interventions: Sequence[str] | None = None
    steps: Sequence[int] | None = None
    seed: int = 0


def run_ablation(settings: AblationSettings, on_progress: Progress | None = None) -> dict[str, Any]:
    """Ablate; what came of it is also in `ablation.json` and `ablation.md` of the folder.

    Raises:
        ConfigError, DataError, CheckpointError: bad settings, files or checkpoint, or another ablation in the folder.
    """
    asked = settings.evaluation
    check_source(settings)
    protocol = load_protocol(asked.protocol)
    folder = local_folder(asked.model)
    config = load_config(folder, {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()})
    interventions = chosen_interventions(settings.interventions, settings.steps, config)
    if asked.force_latent and config.traits.slot_input == "none":
        raise ConfigError(f"force_latent: a checkpoint of stage {config.stage!r} has no latent steps; leave it out")
    if settings.rows is not None:
        processor = VReflectionProcessor.from_pretrained(folder)
        rows = open_rows(str(settings.rows), settings.image_folder, image_view=settings.image_view)
        questions, view = row_questions(rows, settings, processor), rows.image_view
    else:
        processor = load_processor(folder, protocol)
        questions, view = benchmark_questions(asked, protocol, processor), IMAGE_VIEW
    about = {
        "schema": SCHEMA,
        "model": asked.model,
        "digest": joined_digest({path.name: file_digest(path) for path in weight_files(folder)}),
        "stage": config.stage,
        "trained_steps": 0 if config.traits.slot_input == "none" else config.num_latent_tokens,
        "source": str(settings.rows) if settings.rows is not None else asked.benchmarks[0],
        "protocol": None if settings.rows is not None else protocol.tag,
        "questions": joined_digest({f"{i}": f"{q.id}|{q.gold}" for i, q in enumerate(questions)}),
        "image_view": view,
        "interventions": [one.name for one in interventions],
        "forced": asked.force_latent,
        "batch_size": asked.batch_size,
        "seed": settings.seed,
        "dtype": asked.dtype,
        "versions": {"vreflection": __version__, "torch": torch.__version__},
    }
    settle(asked.out, about)
    model = load_model(folder, asked)
    own, changed, latents = Ablation(
        model, processor, questions, interventions, asked.out, asked.batch_size, asked.force_latent, settings.seed,
        on_progress,
    ).run()  # fmt: skip
    summary = summarize(own, changed, interventions, latents, lambda token: processor.decode([token], False))
    result = {**about, "summary": summary, "sentences": sentences(summary)}
    write(asked.out / "ablation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write(asked.out / "ablation.md", markdown(summary, f"Ablation of {Path(asked.model).name} on {about['source']}"))
    return result


def check_source(settings: AblationSettings) -> None:
    asked = settings.evaluation
    if settings.rows is None:
        check_settings(asked)
        if len(asked.benchmarks) > 1:
            raise ConfigError(f"benchmark: expected one, got {', '.join(asked.benchmarks)}")
    elif asked.benchmarks:
        raise ConfigError("rows: expected a benchmark or rows to ask, got both")
    if asked.latent_mode != "clean":
        raise ConfigError(f"latent_mode: ablations decode in clean mode, got {asked.latent_mode!r}")
    if asked.limit is not None and asked.limit < 1:
        raise ConfigError(f"limit: expected at least 1, got {asked.limit}")


def settle(out: Path, about: Mapping[str, Any]) -> None:
    """Write the settings of a new ablation, or check that they are those of the one that is there."""
    path = out / SETTINGS
    wanted = json.loads(json.dumps(about))
    if not path.exists():
        if (out / "run.json").exists():
            raise ConfigError(f"out: {str(out)!r} holds a run of vreflection eval; choose another folder")
        make_folder(out)
        write(path, json.dumps(wanted, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("raw-damaged", f"expected JSON, got {error}; choose another --out", str(path)) from None
    before.setdefault("image_view", "stored")  # ablations from before it was written down
    found = [f"{key}: {change}" for key, change in differences(before, wanted) if key != "model"]
    if found:
        raise ConfigError(
            f"out: {str(out)!r} holds an ablation with other settings: {'; '.join(found[:8])}. Set them back to go on "
            "with it, or choose another --out"
        )


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def benchmark_questions(asked: EvalSettings, protocol: Protocol, processor: VReflectionProcessor) -> list[Question]:
    benchmark = load_benchmark(
        asked.benchmarks[0], asked.data_root, hub=asked.hub, allow_other_counts=asked.allow_other_counts
    )
    prompts, extract = Prompts(processor, protocol), EXTRACTORS[protocol.extractor]

    def question(item: Item) -> Question:
        def prompt() -> Prompt:
            made = prompts.of(item)
            if made.prompt is None:
                raise made.error or DataError("items-unanswered", "no prompt", item.id)
            return made.prompt

        return Question(
            id=item.id,
            group=item.group,
            image="|".join(item.image_keys),
            gold=item.gold.get(protocol.label_revision, item.gold["original"]),
            boxes=item.boxes,
            prompt=prompt,
            read=lambda text: extract(text, item.options, item.benchmark),
            max_new_tokens=protocol.answer_tokens(item.benchmark),
        )

    return [question(item) for part in limited(units(benchmark.items), asked.limit) for item in part]


def row_questions(rows: Rows, settings: AblationSettings, processor: VReflectionProcessor) -> list[Question]:
    """The first question of each row; right is the text of its `<answer>`, and box j belongs to span j."""
    return [row_question(sample, processor) for sample in islice(rows, settings.evaluation.limit)]


def row_question(sample: Sample, processor: VReflectionProcessor) -> Question:
    return Question(
        id=sample.source or sample.question_id,
        group=sample.source or sample.question_id,
        image="|".join(map(str, sample.image_paths)),
        gold=expected_answer(sample),
        boxes=tuple(tuple(map(float, box)) for box in sample.boxes),  # pyright: ignore[reportArgumentType]
        box_images=tuple(map(int, sample.box_images)),
        prompt=lambda: replace(
            Prompt.of(prompt_of(sample, processor, None)), image_keys=tuple(map(str, sample.image_paths))
        ),
        read=extract_answer,
        max_new_tokens=ROW_TOKENS,
    )
