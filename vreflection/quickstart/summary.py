"""The quickstart's numbers as the report wants them, and plain sentences made from those numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..data.boxes import box_mask
from ..data.visual_cot import Sample
from ..visualization.hop_charts import hops_text
from .settings import REPORTED_ARM, QuickstartSettings
from .tasks import Task

CHANCE = 0.1
TITLES = {
    "follow_the_notes": "V-Reflection quickstart: follow the notes",
    "one_hop": "V-Reflection quickstart: one hop",
}

# (label, note) of the arms of the shipped settings; an arm of another name is shown under that name.
ARMS: dict[str, tuple[str, str | None]] = {
    "stage1": ("Latents, stage 1", "one span per note; the model's own states are fed back"),
    "stage2": ("Latents, stage 2", "stage-1 steps included"),
    "filler_aligned": ("Same supervision, no feedback", "filler tokens in the slots, trained on the same boxes"),
    "filler": ("Filler tokens", "as many extra positions, no feedback and no box"),
    "boundary": ("Boundary tokens", "the spans' two marks, nothing between them"),
    "sft": ("Answer only", "plain fine-tuning"),
    "sft_long": ("Answer only, trained longer", None),
    "sft_curriculum": ("Answer only, hops one by one", "shorter questions first"),
    "filler_curriculum": ("Filler tokens, hops one by one", "shorter questions first"),
    "chain": ("Text chain", "spells out every note in words before the answer"),
}
INTERVENTIONS = {
    "teacher_forced": ("Teacher's latents", "an oracle: told the boxes, and the right text so far"),
    "swapped": ("Another image's latents", "taken from a question with as many hops and another answer"),
    "swapped_follows_partner": ("… answered for that other image", "how often the answer is the other image's"),
    "removed": ("No latent steps", "spans are opened and closed, nothing between"),
}


def label_of(name: str) -> str:
    return ARMS.get(name, (name, None))[0]


def guess_in_image(task: Task) -> float:
    """Naming the digit of a random note of the image: the right note, or another that carries the same digit."""
    return 1 / task.notes + (1 - 1 / task.notes) * CHANCE


def group_of(result: Mapping[str, Any]) -> str:
    """`latent`, `text` (a chain in words) or `control`."""
    if result["stage"] in ("stage1", "stage2"):
        return "latent"
    return "text" if result["rows"] == "chain" else "control"


def build_metrics(
    settings: QuickstartSettings,
    results: Mapping[str, dict],
    shown: list[dict],
    test: Sequence[Sample],
    timings: Mapping[str, float],
    environment: dict[str, Any],
    credits: list[dict[str, str]],
) -> dict[str, Any]:
    """Everything `metrics.json` holds except the date."""
    task, data = settings.the_task, settings.data
    boxes = [box for sample in test for box in sample.boxes]
    metrics: dict[str, Any] = {
        "schema": 2,
        "title": TITLES[task.name],
        "environment": environment,
        "settings": asdict(settings),
        "task": {
            "name": task.name,
            "question": task.question.format(colour="…", hops="…"),
            "hops": list(task.hops),
            "chance": CHANCE,
            "guess_in_image": guess_in_image(task),
            "uniform_mass": sum(float(box_mask(box, 8, 8).mean()) for box in boxes) / len(boxes),
            "visual_tokens": 64,
            "train_images": data.train,
            "train_questions": data.train * min(data.questions_per_image, len(task.hops)),
            "test_questions": len(test),
        },
        "arms": [arm_row(name, result, results) for name, result in results.items()],
        "interventions": intervention_rows(results.get(REPORTED_ARM)),
        "looks": look_rows(results),
        "gauges": [gauge_row(name, r) for name, r in results.items() if "gauges" in r],
        "curves": {name: result["curve"] for name, result in results.items()},
        "timings": [{"phase": phase, "seconds": seconds} for phase, seconds in timings.items()],
        "examples": shown,
        "attributions": credits,
        "results": {name: {k: v for k, v in r.items() if k != "curve"} for name, r in results.items()},
    }
    metrics["findings"] = findings(task, results, metrics["task"]["uniform_mass"])
    return metrics


def arm_row(name: str, result: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    label, note = ARMS.get(name, (name, None))
    cheapest = min(other["seconds_per_step"] for other in results.values())
    return {
        "key": name,
        "label": label,
        "note": note,
        "group": group_of(result),
        "steps": result["total_steps"],
        "seconds_per_step": result["seconds_per_step"],
        "relative_step_cost": result["seconds_per_step"] / cheapest,
        "accuracy": result["accuracy"],
        "by_hops": result["accuracy_by_hops"],
    }


def intervention_rows(result: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What becomes of the reported arm's answers when its latents are changed."""
    if result is None or "swapped" not in result:
        return []
    rows = [{"key": "own", "label": "Own latents", "note": "decoding freely", "by_hops": result["accuracy_by_hops"]}]
    rows[0]["accuracy"] = result["accuracy"]
    return rows + [
        {"key": key, "label": label, "note": note, "accuracy": result[key], "by_hops": result[f"{key}_by_hops"]}
        for key, (label, note) in INTERVENTIONS.items()
    ]


def look_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, result in results.items():
        for how, words in (("free_running", "decoding freely"), ("teacher_forced", "with the teacher's latents")):
            looks = result.get("looks", {}).get(how, {})
            if "mass" in looks:
                rows.append({"key": f"{name}_{how}", "label": f"{label_of(name)}, {words}", **looks})
    return rows


def gauge_row(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "label": label_of(name),
        "std_over_samples": result["gauges"].get("std_over_samples"),
        "query_diversity": result["gauges"].get("query_diversity"),
        "lvr_end_rate": result["lvr_end_rate"],
        "trigger_rate": result["one_span_per_note"],
        "cosine_to_teacher": result["cosine_to_teacher"],
    }


# Sentences


def percent(proportion: Mapping[str, float]) -> str:
    return f"{100 * proportion['value']:.0f} % ({100 * proportion['low']:.0f}–{100 * proportion['high']:.0f})"


def compare(first: Mapping[str, float], second: Mapping[str, float]) -> str:
    """How two proportions stand to each other, by whether their intervals overlap."""
    if first["low"] > second["high"]:
        return "higher than"
    if first["high"] < second["low"]:
        return "lower than"
    return "not clearly different from (intervals overlap)"


def findings(task: Task, results: Mapping[str, Mapping[str, Any]], uniform: float) -> list[str]:
    """What the numbers of this run say, favourable or not. One run of one seed: see the docs for several."""
    latent = results.get(REPORTED_ARM) or results.get("stage1")
    sentences = []
    if latent is not None:
        sentences.append(accuracy_sentence(latent))
        sentences += control_sentences(task, latent, results)
        if "swapped" in latent:
            sentences.append(
                f"With another image's latents {percent(latent['swapped'])} of the answers are right, and "
                f"{percent(latent['swapped_follows_partner'])} are the other image's: the latents {causal(latent)}."
            )
        looks = latent.get("looks", {}).get("free_running")
        if looks and "mass" in looks:
            sentences.append(
                f"While decoding freely the student puts {100 * looks['mass']:.0f} % of its attention on the note of "
                f"the hop; even attention would put {100 * uniform:.0f} % there."
            )
    sentences.append(
        "This is one run on one small synthetic task: it shows what latents do here, not that they help in general."
    )
    return sentences


def accuracy_sentence(latent: Mapping[str, Any]) -> str:
    rows = latent["accuracy_by_hops"]
    if len(rows) == 1:
        return f"Decoding freely on held-out images, the latent model answers {percent(latent['accuracy'])} right."
    worst = min(rows, key=lambda row: row["value"])
    return (
        f"Decoding freely on held-out images, the latent model answers {percent(latent['accuracy'])} right, and at no "
        f"number of hops fewer than {percent(worst)}."
    )


def control_sentences(task: Task, latent: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How each other arm compares: on questions with hops where the task has them, else on all."""
    sentences = []
    for name, control in results.items():
        if group_of(control) == "latent":
            continue
        if len(task.hops) == 1:
            sentences.append(
                f"{label_of(name)}: {percent(control['accuracy'])} after {control['total_steps']} steps. Latents "
                f"({latent['total_steps']} steps) are {compare(latent['accuracy'], control['accuracy'])} that."
            )
            continue
        pairs = list(zip(latent["accuracy_by_hops"], control["accuracy_by_hops"], strict=True))
        better = [own["hops"] for own, other in pairs if compare(own, other) == "higher than"]
        worse = [own["hops"] for own, other in pairs if compare(own, other) == "lower than"]
        shares = ", ".join(f"{100 * row['value']:.0f}" for row in control["accuracy_by_hops"])
        over = f"0 to {hops_text(task.hops[-1])}"
        verdict = f"latents are higher at {hop_list(better)}" if better else "latents are nowhere clearly higher"
        verdict += f", lower at {hop_list(worse)}" if worse else ""
        sentences.append(f"{label_of(name)} ({control['total_steps']} steps): {shares} % at {over}; {verdict}.")
    return sentences


def hop_list(hops: Sequence[int]) -> str:
    return ", ".join([*map(str, hops[:-1]), hops_text(hops[-1])])


def causal(latent: Mapping[str, Any]) -> str:
    if latent["swapped"]["high"] < latent["accuracy"]["low"]:
        return "decide the answer, they are not ignored"
    return "make no clear difference to the answer in this run"
