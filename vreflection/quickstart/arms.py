"""One quickstart arm: train it, then measure it on held-out questions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.encode import ImageTokens
from ..data.visual_cot import Sample
from ..evaluation.latents import (
    cosine_to_teacher,
    free_running_maps,
    grounding,
    stack_latents,
    swap_partners,
)
from ..evaluation.questions import Decoded, TeacherForced, decode_answers, expected_answer, teacher_forced
from ..evaluation.statistics import wilson
from ..model.modeling import VReflectionForConditionalGeneration
from ..training.gauges import latent_gauges
from ..training.run import TrainResult, run_training
from ..training.settings import TrainSettings

Progress = Callable[[int, int], None]
Cache = Mapping[str, ImageTokens]


def train_arm(settings: TrainSettings, samples: Sequence[Sample], cache: Cache, on_progress: Progress) -> TrainResult:
    return run_training(settings, samples=samples, feature_cache=cache, on_step=on_progress, handle_signals=False)


def curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Logged rows with a loss, numbers only."""
    rows = [row for row in history if "loss" in row]
    return [{k: float(v) for k, v in row.items() if isinstance(v, (int, float))} for row in rows]


def first_boxes(samples: Sequence[Sample]) -> list[list[float]]:
    return [sample.boxes[0].tolist() for sample in samples]


def accuracy(correct: int, samples: Sequence[Sample]) -> dict[str, float]:
    return wilson(correct, len(samples)).as_dict()


def measure_arm(result: TrainResult, validation: Sequence[Sample], test: Sequence[Sample], cache: Cache) -> dict:
    """Accuracy by real decoding; for latent arms also interventions, grounding and gauges."""
    model, processor = result.model, result.processor
    decoded = decode_answers(model, processor, test, cache)
    measured: dict[str, Any] = {
        "seconds_per_step": result.seconds_per_step,
        "accuracy": accuracy(decoded.correct(test), test),
        "trigger_rate": float(np.mean(decoded.triggered)),
        "curve": curve(result.history),
    }
    if validation:
        correct = decode_answers(model, processor, validation, cache).correct(validation)
        measured["validation"] = accuracy(correct, validation)
    if model.config.traits.slot_input == "latents":
        measured |= measure_latents(model, processor, decoded, test, cache)
    return measured


def measure_latents(model, processor, decoded: Decoded, test: Sequence[Sample], cache: Cache) -> dict[str, Any]:
    forced = teacher_forced(model, processor, test, cache)
    own = stack_latents(decoded, forced.latents[0])
    partners = swap_partners(test)
    swapped = decode_answers(model, processor, test, cache, latents=own[partners])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="decoding with 0 latent steps")  # removing them is the point
        removed = decode_answers(model, processor, test, cache, latent_steps=0, allow_other_latent_steps=True)
    followed = sum(a == expected_answer(test[p]) for a, p in zip(swapped.answers, partners))
    gauges = {name: float(value) for name, value in latent_gauges(torch.stack(forced.latents)).items()}
    measured: dict[str, Any] = {
        "swapped": accuracy(swapped.correct(test), test),
        "swapped_follows_partner": accuracy(followed, test),
        "removed": accuracy(removed.correct(test), test),
        "teacher_forced": accuracy(sum(forced.correct), test),
        "lvr_end_rate": float(np.mean(decoded.closed)),
        "cosine_to_teacher": cosine_to_teacher(decoded, forced.latents),
        "gauges": gauges,
    }
    if model.config.traits.student:
        measured["grounding"] = measure_grounding(model, decoded, forced, test, cache)
    return measured


def measure_grounding(model, decoded: Decoded, forced: TeacherForced, test, cache: Cache) -> dict[str, Any]:
    boxes = first_boxes(test)
    free = [(m, b) for m, b in zip(free_running_maps(model, decoded, test, cache), boxes) if m is not None]
    measured = {"teacher_forced": grounding(forced.student_maps, boxes)}
    if free:
        maps, free_boxes = zip(*free)
        measured["free_running"] = grounding(maps, free_boxes)
    return measured


def untrained_student_grounding(stage1: Path, processor, test: Sequence[Sample], cache: Cache) -> dict[str, Any]:
    """Grounding of a fresh student on the stage-1 model: the "before" of stage 2."""
    torch.manual_seed(0)
    base = VReflectionForConditionalGeneration.from_pretrained(stage1, dtype=torch.float32)
    model = VReflectionForConditionalGeneration.from_base(base, "stage2")
    decoded = decode_answers(model, processor, test, cache)
    return measure_grounding(model, decoded, teacher_forced(model, processor, test, cache), test, cache)


def examples(model, processor, test: Sequence[Sample], cache: Cache, count: int) -> list[dict[str, Any]]:
    """What each of the first questions looks at, step by step, during real decoding; right or wrong as they come."""
    shown = list(test[:count])
    decoded = decode_answers(model, processor, shown, cache)
    forced = teacher_forced(model, processor, shown, cache)
    swapped: list[str | None] = [None] * len(shown)
    if len({expected_answer(sample) for sample in shown}) > 1:
        latents = stack_latents(decoded, forced.latents[0])[swap_partners(shown)]
        swapped = decode_answers(model, processor, shown, cache, latents=latents).answers
    maps = free_running_maps(model, decoded, shown, cache)
    rows = []
    for i, sample in enumerate(shown):
        own = maps[i]
        steps = [] if own is None else own.tolist()
        boxes = [sample.boxes[0].tolist()]
        mass = [] if own is None else [grounding([step[None]], boxes)["mass"] for step in own]
        rows.append(
            {
                "id": str(sample.question_id),
                "question": sample.conversations[0].text.replace("<image>", "").strip(),
                "expected": expected_answer(sample),
                "predicted": decoded.answers[i] or decoded.texts[i],
                "correct": decoded.answers[i] == expected_answer(sample),
                "predicted_swapped": swapped[i],
                "box": boxes[0],
                "image": sample.image_paths[0],
                "step_maps": steps,
                "teacher_map": forced.teacher_maps[i].mean(0).tolist(),
                "student_map": forced.student_maps[i].mean(0).tolist() if forced.student_maps else None,
                "mass_in_box": mass,
            }
        )
    return rows
