"""The quickstart's numbers as the report wants them, and plain sentences made from those numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.boxes import box_mask
from ..data.visual_cot import Sample
from .notes import NOTES_PER_IMAGE, QUESTION

CHANCE = 0.1
# Naming the digit of a random note of the image: right note, or another note that carries the same digit.
GUESS_IN_IMAGE = 1 / NOTES_PER_IMAGE + (1 - 1 / NOTES_PER_IMAGE) * CHANCE

ARM_LABELS = {
    "sft": "No latents (plain fine-tuning)",
    "boundary": "Boundary tokens only",
    "filler": "Filler tokens",
    "stage1": "Latents after stage 1",
    "stage2": "Latents after stage 2",
    "sft_long": "No latents, trained longer",
}
ARM_NOTES = {
    "boundary": "the span's two marks, nothing between them",
    "filler": "as many extra positions as latents, no feedback and no box",
    "stage2": "stage-1 steps included",
}
INTERVENTIONS = {
    "teacher_forced": ("teacher-forced", "an oracle: told the box, and the right text so far"),
    "swapped": ("swapped", "another question's latents in the slots"),
    "removed": ("removed", "no latent step after the opening mark"),
}


def build_metrics(
    results: Mapping[str, dict],
    shown: list[dict],
    splits: Mapping[str, Sequence[Sample]],
    timings: Mapping[str, float],
    settings: dict[str, Any],
    environment: dict[str, Any],
    credits: list[dict[str, str]],
) -> dict[str, Any]:
    """Everything `metrics.json` holds except the date."""
    test = splits["test"]
    step_cost = results["sft"]["seconds_per_step"] if "sft" in results else None
    metrics = {
        "schema": 1,
        "title": "V-Reflection quickstart",
        "environment": environment,
        "settings": settings,
        "task": {
            "question": QUESTION.format(colour="…"),
            "chance": CHANCE,
            "guess_in_image": GUESS_IN_IMAGE,
            "uniform_mass": sum(float(box_mask(s.boxes[0], 8, 8).mean()) for s in test) / len(test),
            "visual_tokens": 64,
            "train_images": len(splits["train"]),
            "test_questions": len(test),
        },
        "rows": accuracy_rows(results, step_cost),
        "grounding": grounding_rows(results),
        "gauges": [gauge_row(name, results[name]) for name in ("stage1", "stage2")],
        "curves": {name: result["curve"] for name, result in results.items()},
        "timings": [{"phase": phase, "seconds": seconds} for phase, seconds in timings.items()],
        "examples": shown,
        "attributions": credits,
        "results": {name: {k: v for k, v in r.items() if k != "curve"} for name, r in results.items()},
    }
    metrics["findings"] = findings(results, metrics["task"]["uniform_mass"])
    return metrics


def accuracy_rows(results: Mapping[str, dict], step_cost: float | None) -> list[dict[str, Any]]:
    rows = []
    for name, result in results.items():
        shared = {
            "steps": result["total_steps"],
            "seconds_per_step": result["seconds_per_step"],
            "relative_step_cost": result["seconds_per_step"] / step_cost if step_cost else None,
        }
        group = "latent" if name.startswith("stage") else "control"
        label = ARM_LABELS.get(name, name)
        rows.append(
            {"key": name, "label": label, "group": group, **shared, "accuracy": result["accuracy"],
             "note": ARM_NOTES.get(name)}
        )  # fmt: skip
        for key, (what, note) in INTERVENTIONS.items():
            if key in result:
                row = {"key": f"{name}_{key}", "label": f"{label}, {what}", "group": "intervention", **shared}
                rows.append({**row, "accuracy": result[key], "note": note})
    return rows


def grounding_rows(results: Mapping[str, dict]) -> list[dict[str, Any]]:
    stage2, rows = results["stage2"], []
    for when, key in (("before stage 2", "grounding_before"), ("after stage 2", "grounding")):
        for how, label in (("teacher_forced", "teacher-forced"), ("free_running", "free-running")):
            found = stage2.get(key, {}).get(how)
            if found:
                rows.append({"key": f"{key}_{how}", "label": f"Student {when}, {label}", **found})
    return rows


def gauge_row(name: str, result: dict) -> dict[str, Any]:
    return {
        "label": ARM_LABELS[name],
        "std_over_samples": result["gauges"].get("std_over_samples"),
        "query_diversity": result["gauges"].get("query_diversity"),
        "lvr_end_rate": result["lvr_end_rate"],
        "trigger_rate": result["trigger_rate"],
        "cosine_to_teacher": result["cosine_to_teacher"],
    }


def percent(proportion: Mapping[str, float]) -> str:
    return f"{100 * proportion['value']:.1f} % ({100 * proportion['low']:.1f}–{100 * proportion['high']:.1f})"


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> str:
    """How two proportions stand to each other, by whether their intervals overlap."""
    if first["low"] > second["high"]:
        return "higher than"
    if first["high"] < second["low"]:
        return "lower than"
    return "not clearly different from (intervals overlap)"


def findings(results: Mapping[str, dict], uniform: float) -> list[str]:
    """What the numbers of this run say, favourable or not. One run of one seed: see the docs for several."""
    stage1, stage2 = results["stage1"], results["stage2"]
    sentences = [
        f"Decoding freely on held-out images, the latent model answers {percent(stage2['accuracy'])} right after "
        f"stage 2 and {percent(stage1['accuracy'])} after stage 1."
    ]
    for name in ("sft", "boundary", "filler"):
        if name in results:
            control, verdict = results[name], compare(stage1["accuracy"], results[name]["accuracy"])
            sentences.append(
                f"{ARM_LABELS[name]}: {percent(control['accuracy'])} after {control['total_steps']} steps. Latents "
                f"after stage 1 ({stage1['total_steps']} steps) are {verdict} that."
            )
    sentences.append(
        f"With another question's latents accuracy is {percent(stage2['swapped'])}, and "
        f"{percent(stage2['swapped_follows_partner'])} of the answers are the other question's: the latents "
        f"{causal(stage2)}."
    )
    free = stage2.get("grounding", {}).get("free_running")
    if free:
        before = stage2["grounding_before"].get("free_running", {}).get("mass")
        earlier = "" if before is None else f", {100 * before:.0f} % before stage 2"
        sentences.append(
            f"While decoding freely the student puts {100 * free['mass']:.0f} % of its attention in the asked box"
            f"{earlier}; even attention would put {100 * uniform:.0f} % there."
        )
    sentences.append(
        "This is one run on one small synthetic task: it shows that the pipeline works, not that latents help in "
        "general."
    )
    return sentences


def causal(stage2: Mapping[str, Any]) -> str:
    if stage2["swapped"]["high"] < stage2["accuracy"]["low"]:
        return "decide the answer, they are not ignored"
    return "make no clear difference to the answer in this run"
