"""The quickstart over several training seeds: one table of means and spreads."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .run import Quickstart, write_json
from .settings import QuickstartSettings
from .summary import ARM_LABELS, INTERVENTIONS

Progress = Callable[[int, str, int, int], None]


def run_study(
    settings: QuickstartSettings, folder: Path, seeds: Iterable[int], on_progress: Progress
) -> dict[str, Any]:
    """Run every seed in `folder/seed-<n>` on one shared data set; writes `study.json` and `study.md`.

    Seeds change initialisation, data order and the free-running draws; images and questions stay the same.
    """
    runs = {}
    for seed in seeds:
        report = lambda phase, done, total, seed=seed: on_progress(seed, phase, done, total)  # noqa: E731
        quickstart = Quickstart(
            replace(settings, seed=seed), folder / f"seed-{seed}", report, data_folder=folder / "data"
        )
        runs[seed] = quickstart.run()
    study = {"rows": study_rows(runs), "seeds": list(runs), "environment": next(iter(runs.values()))["environment"]}
    write_json(folder / "study.json", study)
    (folder / "study.md").write_text(study_table(study))
    return study


def study_rows(runs: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Label and one value per seed of everything the table shows."""
    first = next(iter(runs.values()))["results"]
    rows = []

    def add(label: str, read: Callable[[dict[str, Any]], float | None]) -> None:
        values = [read(run["results"]) for run in runs.values()]
        if all(value is not None for value in values):
            rows.append({"label": label, "values": values})

    for name in first:
        label = ARM_LABELS.get(name, name)
        add(f"{label}: accuracy", lambda r, n=name: r[n]["accuracy"]["value"])
        for key, (what, _) in INTERVENTIONS.items():
            if key in first[name]:
                add(f"{label}, {what}: accuracy", lambda r, n=name, k=key: r[n][k]["value"])
        if "swapped_follows_partner" in first[name]:
            add(
                f"{label}, swapped: answers the other question",
                lambda r, n=name: r[n]["swapped_follows_partner"]["value"],
            )
            add(f"{label}: <|lvr_end|> after the span", lambda r, n=name: r[n]["lvr_end_rate"])
            add(f"{label}: cosine of fed-back states to the teacher", lambda r, n=name: r[n]["cosine_to_teacher"])
            add(f"{label}: std of teacher latents over images", lambda r, n=name: r[n]["gauges"]["std_over_samples"])
    for key, when in (("grounding_before", "before"), ("grounding", "after")):
        for how, label in (("teacher_forced", "teacher-forced"), ("free_running", "free-running")):
            add(
                f"Student attention in the box {when} stage 2, {label}",
                lambda r, k=key, h=how: r["stage2"][k].get(h, {}).get("mass"),
            )
    for name in first:
        add(f"{ARM_LABELS.get(name, name)}: seconds per step", lambda r, n=name: r[n]["seconds_per_step"])
    return rows


def study_table(study: dict[str, Any]) -> str:
    """The study as a Markdown table: mean, standard deviation over seeds, and every value."""
    seeds = study["seeds"]
    head = ["measured", "mean", "s.d.", *(f"seed {seed}" for seed in seeds)]
    lines = [head, ["---"] * len(head)]
    for row in study["rows"]:
        values = row["values"]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        lines.append([row["label"], *(f"{value:.3f}" for value in (statistics.fmean(values), spread, *values))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
