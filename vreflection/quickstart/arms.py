"""One quickstart arm: train it, then measure it on held-out questions, by number of hops."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..data.atomic import atomic_write
from ..data.encode import ImageTokens
from ..data.visual_cot import Sample, read_visual_cot
from ..errors import ConfigError
from ..evaluation.latents import (
    cosine_to_teacher,
    free_running_maps,
    grounding,
    hop_grounding,
    partners_latents,
    sample_partners,
    swap_partners,
)
from ..evaluation.questions import Decoded, TeacherForced, decode_answers, expected_answer, teacher_forced
from ..evaluation.statistics import grouped_wilson, wilson
from ..model.processor import VReflectionProcessor
from ..training.gauges import latent_gauges
from ..training.run import TrainResult, run_training
from .pretrain import autocast_bf16
from .settings import QuickstartSettings
from .tasks import hops_of

Progress = Callable[[str, int, int], None]
Cache = Mapping[str, ImageTokens]
GRID_THW = (1, 16, 16)  # of a 224x224 image
MAX_NEW_TOKENS = 48
# Share of the steps after which a curriculum adds the first hop, and each further one.
FIRST_HOP, FURTHER_HOP = 0.2, 0.15


@dataclass(frozen=True)
class Arm:
    """One arm of a run: what a worker needs to know.

    Attributes:
        base: folder of the base model. folder: of the run. data, features: see `Quickstart`. prefix: of the phases
            that it reports. keep_checkpoint: whether something else needs the trained model; a result alone is then not
            enough to call the arm finished.
    """

    name: str
    settings: QuickstartSettings
    base: Path
    folder: Path
    data: Path
    features: Path
    prefix: str = ""
    keep_checkpoint: bool = True

    @property
    def model(self) -> Path:
        """Folder that it starts from."""
        start = self.settings.start_of(self.name)
        return self.base if start == "base" else self.folder / "arms" / start

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the result."""
        return self.settings.fingerprint(self.name, file_hash(self.base / "model.safetensors"))

    @property
    def output(self) -> Path:
        return self.folder / "arms" / self.name

    @property
    def result_file(self) -> Path:
        return self.folder / "results" / f"{self.name}.json"

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run with the same settings."""
        checkpoint = (self.output / "config.json").exists() or not self.keep_checkpoint
        result = read_json(self.result_file) if checkpoint else None
        return result if result is not None and result.get("fingerprint") == self.fingerprint else None

    def rows(self, file: str) -> list[Sample]:
        return read_visual_cot(self.data / f"{file}.json", self.data / "images", "raise")[0]


def do_arm(arm: Arm, on_progress: Progress) -> dict[str, Any]:
    """Result of one arm: kept from an earlier run if its settings are unchanged, else trained and measured."""
    training, measuring = f"{arm.prefix}train {arm.name}", f"{arm.prefix}measure {arm.name}"
    result = arm.finished()
    if result is not None:
        on_progress(training, 1, 1)
        on_progress(measuring, 1, 1)
        return result
    arm.result_file.unlink(missing_ok=True)
    cache = image_tokens(arm.features, arm.data)
    started = time.perf_counter()
    trained, curve = train_arm(arm, cache, lambda done, total: on_progress(training, done, total))
    measured_from = time.perf_counter()
    on_progress(measuring, 0, 1)
    result = measure_arm(arm, trained, cache)
    on_progress(measuring, 1, 1)
    result |= {
        "fingerprint": arm.fingerprint,
        "stage": trained.model.config.stage,
        "rows": arm.settings.rows_of(arm.name),
        "curriculum": arm.settings.has_curriculum(arm.name),
        "decoded_during_training": curve,
        "steps": arm.settings.steps_of(arm.name),
        "total_steps": arm.settings.total_steps(arm.name),
        "timings": {
            f"train {arm.name}": measured_from - started,
            f"measure {arm.name}": time.perf_counter() - measured_from,
        },
    }
    arm.result_file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arm.result_file) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def image_tokens(features: Path, data: Path) -> Cache:
    """Visual tokens by image path, as the trainer and the decoder take them."""
    grid, images = torch.tensor(GRID_THW), (data / "images").resolve()  # as the reader names them
    return {str(images / name): (tokens, grid) for name, tokens in load_file(features).items()}


# Training


def train_arm(arm: Arm, cache: Cache, on_step: Callable[[int, int], None]) -> tuple[TrainResult, list[dict[str, Any]]]:
    """The trained arm, and its accuracy on validation questions while it trained."""
    settings = arm.settings.arm(arm.name, arm.model, arm.output, autocast_bf16())
    samples = arm.rows("train" if arm.settings.rows_of(arm.name) == "latent" else "train_chain")
    if arm.settings.has_curriculum(arm.name):
        batch = int(settings.trainer.get("per_device_train_batch_size", 8))
        samples = curriculum(samples, arm.settings.steps_of(arm.name), batch, arm.settings.seed)
    watch = None
    if arm.settings.decode_every:
        processor = VReflectionProcessor.from_pretrained(arm.model)
        watch = DecodeCurve(arm.settings.decode_every, arm.rows("validation"), processor, cache)
    trained = run_training(
        settings, samples=samples, feature_cache=cache, on_step=on_step, handle_signals=False,
        callbacks=None if watch is None else [watch],
    )  # fmt: skip
    return trained, [] if watch is None else watch.points


def curriculum(samples: Sequence[Sample], steps: int, batch: int, seed: int) -> list[Sample]:
    """The rows of a whole run in the order of training, one more hop at a time.

    The first fifth of the steps asks for no hop; every 15 % adds one, so that all are asked from 65 % on.
    """
    rng = np.random.default_rng([seed, 15])
    hops = np.array([hops_of(sample) for sample in samples])
    order: list[Sample] = []
    if hops.min() > 0:
        raise ConfigError("curriculum: expected questions without a hop to start with, got none; raise data.train")
    for step in range(steps):
        progress = step / steps
        limit = 0 if progress < FIRST_HOP else 1 + int((progress - FIRST_HOP) / FURTHER_HOP)
        order += [samples[index] for index in rng.choice(np.flatnonzero(hops <= limit), batch)]
    return order


class DecodeCurve(TrainerCallback):
    """Answers validation questions by real decoding every so many steps, and after the last one."""

    def __init__(self, every: int, questions: Sequence[Sample], processor: VReflectionProcessor, cache: Cache):
        self.every, self.questions, self.processor, self.cache = every, questions, processor, cache
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        assert model is not None
        training = model.training
        decoded = decode_answers(
            model.eval(), self.processor, self.questions, self.cache, max_new_tokens=MAX_NEW_TOKENS
        )
        model.train(training)
        self.points.append(
            {"step": state.global_step, "by_hops": by_hops(right(decoded.answers, self.questions), self.questions)}
        )


# Measuring


def right(answers: Sequence[str | None], samples: Sequence[Sample], wanted: Sequence[str] | None = None) -> np.ndarray:
    """Per question, whether the answer is the row's own, or the one of `wanted`."""
    wanted = [expected_answer(sample) for sample in samples] if wanted is None else wanted
    return np.array([answer == text for answer, text in zip(answers, wanted, strict=True)])


def by_hops(correct: np.ndarray, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Proportion with its 95 % interval per number of hops."""
    hops = np.array([hops_of(sample) for sample in samples])
    return [
        {"hops": int(count), **wilson(int(correct[hops == count].sum()), int((hops == count).sum())).as_dict()}
        for count in np.unique(hops)
    ]


def overall(correct: np.ndarray, samples: Sequence[Sample]) -> dict[str, Any]:
    """Proportion over all questions; its interval knows that several questions share an image."""
    _, image = np.unique([sample.image_paths[0] for sample in samples], return_inverse=True)
    return grouped_wilson(np.bincount(image, weights=correct).astype(int), np.bincount(image)).as_dict()


def scored(name: str, correct: np.ndarray, samples: Sequence[Sample]) -> dict[str, Any]:
    return {name: overall(correct, samples), f"{name}_by_hops": by_hops(correct, samples)}


def loss_curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Logged rows with a loss, finite numbers only."""
    rows = [row for row in history if "loss" in row]
    return [{k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)} for row in rows]


def measure_arm(arm: Arm, result: TrainResult, cache: Cache) -> dict[str, Any]:
    """Accuracy by real decoding; for latent arms also interventions, looks and gauges."""
    model, processor, test = result.model.eval(), result.processor, arm.rows("test")
    decoded = decode_answers(model, processor, test, cache, max_new_tokens=MAX_NEW_TOKENS)
    measured: dict[str, Any] = {
        "seconds_per_step": result.seconds_per_step,
        **scored("accuracy", right(decoded.answers, test), test),
        "curve": loss_curve(result.history),
    }
    if model.config.traits.slot_style != "none":
        measured["one_span_per_note"] = float(np.mean([s == len(row.boxes) for s, row in zip(decoded.spans, test)]))
    if model.config.traits.slot_input == "latents":
        measured |= measure_latents(model, processor, decoded, test, cache, arm.settings.interventions)
    return measured


def measure_latents(model, processor, decoded: Decoded, test: Sequence[Sample], cache: Cache, images: int):
    """What the latents do and hold.

    Interventions and teacher forcing on those questions of the first `images` images whose latents can be swapped.
    """
    first = set(list(dict.fromkeys(sample.image_paths[0] for sample in test))[:images])
    part = [place for place, sample in enumerate(test) if sample.image_paths[0] in first]
    partners = sample_partners([test[place] for place in part])
    part = [place for place, partner in zip(part, partners) if partner is not None]
    questions, latents = [test[place] for place in part], [decoded.latents[place] for place in part]
    closed = [closed for closed, spans in zip(decoded.closed, decoded.spans) if spans]
    measured: dict[str, Any] = {"lvr_end_rate": float(np.mean(closed)) if closed else None}
    if not questions:
        return measured
    own, partners = Decoded(latents=latents), swap_partners(questions)
    swapped = decode_answers(
        model,
        processor,
        questions,
        cache,
        latents=[latents[partner] for partner in partners],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="decoding with 0 latent steps")  # removing them is the point
        removed = decode_answers(
            model,
            processor,
            questions,
            cache,
            latent_steps=0,
            allow_other_latent_steps=True,
            max_new_tokens=MAX_NEW_TOKENS,
        )
    forced = teacher_forced(model, processor, questions, cache)
    partners_answers = [expected_answer(questions[partner]) for partner in partners]
    for name, correct in (
        ("swapped", right(swapped.answers, questions)),
        ("swapped_follows_partner", right(swapped.answers, questions, partners_answers)),
        ("removed", right(removed.answers, questions)),
        ("teacher_forced", np.array(forced.correct)),
    ):
        measured |= scored(name, correct, questions)
    teacher = torch.cat(list(forced.latents))
    measured |= {
        "cosine_to_teacher": cosine_to_teacher(own, forced.latents),
        "gauges": {name: float(value) for name, value in latent_gauges(teacher).items()},
        "state_at_right_note": states_at_right_note(latents, forced),
    }
    if model.config.traits.student:
        measured["looks"] = measure_looks(model, decoded, part, questions, forced, cache)
    return measured


def states_at_right_note(latents: Sequence[torch.Tensor | None], forced: TeacherForced) -> list[dict[str, Any]]:
    """Per hop, how often the state fed back is nearer (cosine) to the teacher's latents of that hop's note than to
    those of any other note of the path."""
    hits: dict[int, list[bool]] = {}
    for own, teacher in zip(latents, forced.latents, strict=True):
        if own is None or len(own) != len(teacher) or len(teacher) < 2:
            continue
        unit = torch.nn.functional.normalize
        nearest = (unit(own.float().flatten(1), dim=-1) @ unit(teacher.float().flatten(1), dim=-1).T).argmax(1)
        for hop, place in enumerate(nearest.tolist()):
            hits.setdefault(hop, []).append(place == hop)
    return [{"hop": hop, **wilson(sum(hit), len(hit)).as_dict()} for hop, hit in sorted(hits.items())]


def finite_maps(maps: Sequence[list[torch.Tensor] | None]) -> list[list[torch.Tensor] | None]:
    """Attention per question; None also where an arm that diverged has no numbers, which a JSON file cannot hold."""
    return [spans if spans is not None and all(span.isfinite().all() for span in spans) else None for spans in maps]


def longest_path(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Per image, the boxes of all the notes that its questions lead to, in order."""
    paths: dict[str, np.ndarray] = {}
    for sample in samples:
        if len(sample.boxes) > len(paths.get(sample.image_paths[0], ())):
            paths[sample.image_paths[0]] = sample.boxes
    return paths


def measure_looks(
    model, decoded: Decoded, part: Sequence[int], test: Sequence[Sample], forced: TeacherForced, cache: Cache
) -> dict[str, Any]:
    """Where the student looks at each hop, decoding freely and with the teacher's latents in the slots."""
    own = Decoded(probes=[decoded.probes[place] for place in part])
    paths = longest_path(test)
    boxes, candidates = [s.boxes.tolist() for s in test], [paths[s.image_paths[0]].tolist() for s in test]
    measured = {}
    for name, maps in (
        ("free_running", finite_maps(free_running_maps(model, own, test, cache))),
        ("teacher_forced", finite_maps(forced.student_maps)),
    ):
        measured[name] = {"by_hop": hop_grounding(maps, boxes, candidates)}
        looked = [(spans, own_boxes) for spans, own_boxes in zip(maps, boxes) if spans is not None]
        if looked:
            measured[name] |= grounding(*zip(*looked))
    return measured


# Examples


def chosen_examples(test: Sequence[Sample], count: int) -> list[Sample]:
    """The first images' longest questions, then shorter ones: as they come, not by how they were answered."""
    most = max(hops_of(sample) for sample in test)
    by_image: dict[str, dict[int, Sample]] = {}
    for sample in test:
        by_image.setdefault(sample.image_paths[0], {})[hops_of(sample)] = sample
    wanted = [most - (place % 3 if most > 2 else 0) for place in range(count)]
    return [of[hops] for of, hops in zip(by_image.values(), wanted) if hops in of]


def examples(model, processor, test: Sequence[Sample], cache: Cache, count: int) -> list[dict[str, Any]]:
    """What each of a few questions looks at, hop by hop, during real decoding; right or wrong as they come."""
    shown = chosen_examples(test, count)
    decode = functools.partial(decode_answers, model.eval(), processor, shown, cache, max_new_tokens=MAX_NEW_TOKENS)
    decoded = decode()
    # Latents of another image of the same number of hops; from all questions, as a few may have no partner.
    pool = [*shown, *(s for s in test if s not in shown)][: 16 * max(count, 1)]
    partners = sample_partners(pool)[: len(shown)]
    others = {place: pool[partner] for place, partner in enumerate(partners) if partner is not None}
    theirs = decode_answers(model, processor, list(others.values()), cache, max_new_tokens=MAX_NEW_TOKENS)
    number = {place: index for index, place in enumerate(others)}
    swapped = decode(latents=partners_latents(theirs, [number.get(place) for place in range(len(shown))]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="decoding with 0 latent steps")
        removed = decode(latent_steps=0, allow_other_latent_steps=True)
    student = model.config.traits.student
    maps = finite_maps(free_running_maps(model, decoded, shown, cache)) if student else [None] * len(shown)
    rows = []
    for place, sample in enumerate(shown):
        boxes = sample.boxes.tolist()
        spans = maps[place] or []
        rows.append(
            {
                "id": str(sample.question_id),
                "hops": hops_of(sample),
                "question": sample.conversations[0].text.replace("<image>", "").strip(),
                "expected": expected_answer(sample),
                "predicted": decoded.answers[place] or decoded.texts[place],
                "correct": decoded.answers[place] == expected_answer(sample),
                "predicted_swapped": (swapped.answers[place] or "no answer") if place in others else None,
                "partner_answer": expected_answer(others[place]) if place in others else None,
                "predicted_removed": removed.answers[place] or "no answer",
                "boxes": boxes,
                "image": sample.image_paths[0],
                "spans": [span.tolist() for span in spans],
                "mass_in_box": [grounding([span], [box])["mass"] for span, box in zip(spans, boxes)],
            }
        )
    return rows
