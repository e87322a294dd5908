"""The quickstart over seeds, arms, depths and training lengths: raw rows, one table, and what the figures show.

A study is a list of groups; a group is some arms of the quickstart's settings, with changes, over training seeds. All
groups share images, questions and visual tokens. Finished arms are kept, so a study can be run group by group.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from ..data.atomic import atomic_write
from ..data.folders import make_folder
from ..errors import ConfigError, DataError
from ..training.config import apply_override, config_file, merge, read_values
from ..training.values import convert
from ..visualization.hop_charts import hops_chart, hops_text, standalone, steps_chart, steps_to_reach
from .arms import Arm, do_arm, read_json
from .run import STAMP, BaseModel, Quickstart, environment, start_over, train_base, write_json
from .settings import QuickstartSettings, check_groups, quickstart_settings
from .summary import guess_in_image
from .tasks import task_named
from .workers import run_jobs

Progress = Callable[[str, int, int], None]
STUDY_FILE = "quickstart_study.yaml"
ROWS_FILE = "rows.jsonl"
STUDY_FILES = (ROWS_FILE, "study.json", "study.md", "published.json")
LEVEL = 0.8  # of validation questions, for the steps that a hop costs


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed and arm only.

    Attributes:
        seeds: of initialisation, data order and free-running draws. arms: of the settings. change: settings that differ
            from the study's own.
    """

    seeds: list
    arms: list
    change: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Settings of one (group, seed) pair, by `<group>/seed-<n>`, in the order they run."""

    runs: dict[str, QuickstartSettings]
    groups: dict[str, Group]


def load_study(path: Path | None = None, overrides: Sequence[str] = (), only: Iterable[str] | None = None) -> Study:
    """A study from its file (default: the shipped one) and `key=value` overrides.

    Args:
        only: names of the groups to keep.

    Raises:
        ConfigError: unknown keys, groups or arms, or values of the wrong type.
    """
    path = config_file(STUDY_FILE) if path is None else path
    values = read_values(path)
    for override in overrides:
        apply_override(values, override)
    groups = {
        name: convert(Group, group, f"{path}: groups.{name}")
        for name, group in check_groups(values.pop("groups", None), f"{path}: groups").items()
        if group is not None
    }
    if only is not None:
        wanted = list(only)
        unknown = [name for name in wanted if name not in groups]
        if unknown:
            raise ConfigError(f"groups: expected some of {', '.join(groups)}, got {', '.join(unknown)}")
        groups = {name: groups[name] for name in wanted}
    return Study(study_runs(values, groups, str(path)), groups)


def seeds_study(settings_values: Mapping[str, Any], seeds: Sequence[int], where: str) -> Study:
    """Every arm of a settings file over some seeds."""
    arms = check_groups(settings_values.get("arms"), f"{where}: arms")
    groups = {"seeds": Group(list(seeds), [name for name, arm in arms.items() if arm is not None])}
    return Study(study_runs(dict(settings_values), groups, where), groups)


def study_runs(values: dict[str, Any], groups: Mapping[str, Group], where: str) -> dict[str, QuickstartSettings]:
    bodies = {}
    for name, group in groups.items():
        changed = merge(values, group.change)
        arms = check_groups(changed.get("arms"), f"{where}: arms")
        missing = [arm for arm in group.arms if arm not in arms]
        if missing:
            raise ConfigError(f"{where}: groups.{name}: unknown arms {missing}; known: {list(arms)}")
        changed["arms"] = {arm: arms[arm] for arm in arms if arm in group.arms}
        bodies[name] = changed
    # Seed by seed, so that a study that is cut short has something of every group.
    runs = {
        f"{name}/seed-{seed}": quickstart_settings({**bodies[name], "seed": seed}, f"{where}: groups.{name}")
        for seed in sorted({seed for group in groups.values() for seed in group.seeds})
        for name, group in groups.items()
        if seed in group.seeds
    }
    if not runs:
        raise ConfigError(f"{where}: expected at least one group with a seed, got none")
    return runs


def do_job(job: Arm | BaseModel, on_progress: Progress) -> dict[str, Any] | None:
    return train_base(job, on_progress) if isinstance(job, BaseModel) else do_arm(job, on_progress)


def phases(study: Study, folder: Path) -> list[tuple[str, float]]:
    """Phases and their expected seconds, for an overall progress bar."""
    plan: dict[str, float] = {}
    for run, settings in study.runs.items():
        for phase, seconds in Quickstart(settings, folder, lambda *_: None).phases():
            if phase != "report":
                shared = phase in ("data", "visual tokens", "pre-training")
                plan[phase if shared else f"{run}: {phase}"] = seconds
    return list(plan.items())


def run_study(study: Study, folder: Path, on_progress: Progress) -> dict[str, Any]:
    """Run what is not done yet; writes `rows.jsonl`, `study.md` and `study.json`, and returns what is in the last.

    A study of the main task also leaves its figures, and `published.json`, which the quickstart's report shows once it
    lies in the package's `assets/study.json`.

    Rows of groups that ran earlier in the same folder and are not part of this call stay in. A `rows.jsonl` alone, such
    as one kept from another machine, counts as finished arms too.
    """
    make_folder(folder)
    check_data_set(folder, study)
    restore_results(folder)
    runs = {
        name: Quickstart(settings, folder / name, on_progress, shared_folder=folder)
        for name, settings in study.runs.items()
    }
    first = next(iter(runs.values()))
    first.prepare_data()
    features = first.prepare_visual_tokens()
    jobs: dict[str, Arm | BaseModel] = {}
    after: dict[str, str | None] = {}
    for name, run in runs.items():
        base = run.base_model()
        base_name = None
        if base is not None:
            base_name = f"base of {base.settings.layers} layers"
            jobs[base_name], after[base_name] = base, None
        for arm in run.settings.arms:
            start = run.settings.start_of(arm)
            jobs[f"{name}/{arm}"] = arm_job(run, arm, features, f"{name}: ")
            after[f"{name}/{arm}"] = base_name if start == "base" else f"{name}/{start}"
    workers = first.settings.worker_count

    def keep(_: str, result: Any) -> None:
        if result is not None:
            publish(folder)

    run_jobs(do_job, jobs, after, workers, on_progress, keep)
    return publish(folder)


def check_data_set(folder: Path, study: Study) -> None:
    """All rows of a study are about the same questions."""
    wanted = next(iter(study.runs.values())).data_set
    present = read_json(folder / "data" / STAMP)
    differing = [key for key, value in wanted.items() if present is not None and present.get(key) != value]
    if present is not None and differing:
        words = ", ".join(f"{key} {present.get(key)}, not {wanted[key]}" for key in differing)
        told = f"holds a study of other questions ({words}); choose another, or add --fresh"
        raise ConfigError(f"out: {str(folder)!r} {told}")


def start_study_over(folder: Path) -> None:
    """Remove what earlier studies left in `folder`: only what a study itself writes there."""
    start_over(folder)
    for run in folder.glob("*/seed-*"):
        start_over(run)
        for empty in (run, run.parent):
            with suppress(OSError):  # holds something else
                empty.rmdir()
    for name in STUDY_FILES:
        (folder / name).unlink(missing_ok=True)
    for figure in FIGURES:
        for file in (folder / "figures").glob(f"{figure}.svg"):
            file.unlink()


def arm_job(run: Quickstart, name: str, features: Path, prefix: str) -> Arm:
    """An arm of a study: its checkpoint is needed only by arms that are not finished."""
    followers = [other for other in run.settings.arms if run.settings.start_of(other) == name]
    waiting = [other for other in followers if arm_job(run, other, features, prefix).finished() is None]
    return replace(run.job(name, features, prefix), keep_checkpoint=bool(waiting))


def restore_results(folder: Path) -> None:
    """Result files from the rows of an earlier study, where they are missing."""
    if not (folder / ROWS_FILE).exists():
        return
    for number, line in enumerate((folder / ROWS_FILE).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            group, seed, arm = (row.pop(key) for key in ("group", "seed", "arm"))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            source = f"{folder / ROWS_FILE}:{number}"
            told = "expected a row of a study as JSON, got something else; remove the line and its arm is trained again"
            raise DataError("row", told, source) from error
        file = folder / group / f"seed-{seed}" / "results" / f"{arm}.json"
        if read_json(file) is None:
            write_json(file, row)


def publish(folder: Path) -> dict[str, Any]:
    """Write the files of a study from the results that are there."""
    rows = collect_rows(folder)
    with atomic_write(folder / ROWS_FILE) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    study = {"environment": environment(), "rows": summarize(rows)}
    write_json(folder / "study.json", study)
    text = f"{accuracy_table(study['rows'])}\n{table(study['rows'])}"
    (folder / "study.md").write_text(text, encoding="utf-8")
    if any((row["group"], row["arm"]) == MAIN_LINES[0][1:3] for row in rows):
        for_report = published(rows, date.today().isoformat(), "vreflection quickstart --study")
        write_json(folder / "published.json", for_report)
        write_figures(for_report, folder / "figures")
    return study


def collect_rows(folder: Path) -> list[dict[str, Any]]:
    """One raw row per finished arm: `<group>/seed-<n>/results/<arm>.json` without its loss curve.

    Damaged files are left out: their arms are not finished.
    """
    rows = []
    for file in sorted(folder.glob("*/seed-*/results/*.json")):
        result, seed = read_json(file), file.parts[-3].removeprefix("seed-")
        if result is not None and seed.isdecimal():
            result.pop("curve", None)
            rows.append({"group": file.parts[-4], "seed": int(seed), "arm": file.stem, **result})
    return sorted(rows, key=lambda row: (row["group"], row["arm"], row["seed"]))


# What rows become


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of a share over seeds, standard deviation, and 95 % interval (Student's t) within [0, 1].

    One seed has no deviation and no interval.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"value": mean, "sd": None, "low": mean, "high": mean, "n": len(values)}
    from scipy.stats import t

    sd = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return {"value": mean, "sd": sd, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "n": len(values)}


def over_seeds(rows: Sequence[Mapping[str, Any]], key: str = "accuracy_by_hops") -> list[dict[str, Any]]:
    """`mean_interval` per number of hops. A single seed gets its interval over questions instead."""
    if len(rows) == 1:
        return [{**point, "sd": None, "seeds": 1} for point in rows[0][key]]
    points = []
    for place, point in enumerate(rows[0][key]):
        spread = mean_interval([row[key][place]["value"] for row in rows])
        points.append({"hops": point["hops"], **spread, "seeds": len(rows)})
    return points


KEYS = ("accuracy", "swapped", "swapped_follows_partner", "removed", "teacher_forced")


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per group and arm: every measured share by hops, over its seeds."""
    summary = []
    for group, arm in dict.fromkeys((row["group"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["group"], row["arm"]) == (group, arm)]
        entry: dict[str, Any] = {"group": group, "arm": arm, "steps": mine[0]["total_steps"], "seeds": len(mine)}
        for key in KEYS:
            if all(f"{key}_by_hops" in row for row in mine):
                entry[key] = over_seeds(mine, f"{key}_by_hops")
        looks = [row["looks"]["free_running"] for row in mine if "mass" in row.get("looks", {}).get("free_running", {})]
        if looks:
            entry["looks"] = [
                {"hop": hop, **mean_interval([look["by_hop"][hop]["mass"] for look in looks])}
                for hop in range(min(len(look["by_hop"]) for look in looks))
            ]
        spreads = [row["gauges"]["std_over_samples"] for row in mine if "gauges" in row]
        if spreads:
            entry["teacher_spread"] = statistics.fmean(spreads)
        summary.append(entry)
    return summary


def accuracy_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy by hops of every group and arm as a Markdown table: mean over seeds ± standard deviation."""
    hops = [point["hops"] for point in summary[0]["accuracy"]]
    head = ["group", "arm", "steps", "seeds", *map(hops_text, hops)]
    lines = [head, ["---"] * len(head)]
    for entry in summary:
        cells = [f"{p['value']:.2f}" + ("" if p["sd"] is None else f" ± {p['sd']:.2f}") for p in entry["accuracy"]]
        lines.append([entry["group"], f"`{entry['arm']}`", f"{entry['steps']:,}", str(entry["seeds"]), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Everything measured, with means over seeds, standard deviations and intervals, as a Markdown table."""
    hops = sorted({point["hops"] for entry in summary for point in entry["accuracy"]})
    head = ["group", "arm", "steps", "seeds", "measured", *map(hops_text, hops)]
    lines = [head, ["---"] * len(head)]
    for entry in summary:
        for key in (*KEYS, "looks"):
            if key not in entry:
                continue
            name = {"looks": "student's attention on the note of each look"}.get(key, key.replace("_", " "))
            cells = [cell(point) for point in entry[key]]
            cells += [""] * (len(hops) - len(cells))
            lines.append([entry["group"], entry["arm"], str(entry["steps"]), str(entry["seeds"]), name, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def cell(point: Mapping[str, Any]) -> str:
    interval = f"({point['low']:.2f}–{point['high']:.2f})"
    sd = "" if point["sd"] is None else f" ± {point['sd']:.3f}"
    return f"{point['value']:.3f}{sd} {interval}"


# What the figures show

# (label, group, arm, style) of the lines of the main figure; those that a study does not have are left out.
MAIN_LINES = (
    ("Latents", "main", "stage2", "s0"),
    ("Same supervision, no feedback", "fairest", "filler_aligned_x3", "s1"),
    ("Same supervision, no feedback", "long", "filler_aligned_long", "s8"),
    ("Text chain", "chain", "chain", "s2"),
    ("Filler tokens", "plain", "filler_x3", "s3"),
    ("Boundary tokens", "plain", "boundary_x3", "s4"),
    ("Answer only", "plain", "sft_x3", "s5"),
    ("Answer only, hops one by one", "curricula", "sft_curriculum_x3", "s6"),
    ("Filler, hops one by one", "curricula", "filler_curriculum_x3", "s7"),
)
# Per number of layers (group, arm) with feedback and without.
DEPTHS = {
    2: (("layers_2", "stage1"), ("layers_2", "filler_aligned_x3")),
    4: (("main", "stage1"), ("fairest", "filler_aligned_x3")),
    8: (("layers_8", "stage1"), ("layers_8", "filler_aligned")),
}
FIGURES = ("accuracy-over-hops", "steps-per-hop", "depth-*")
STEP_LINES = (
    ("With feedback", "main", "stage1", "s0"),
    ("Without feedback", "long", "filler_aligned_long", "s1"),
)


def published(rows: Sequence[Mapping[str, Any]], created: str, command: str) -> dict[str, Any]:
    """What the report and the docs show of a study of "follow the notes": lines, depths, steps per hop, sentences."""
    by_arm: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault((row["group"], row["arm"]), []).append(row)

    def line(label: str, group: str, arm: str, style: str) -> dict[str, Any] | None:
        mine = by_arm.get((group, arm))
        if not mine:
            return None
        steps = mine[0]["total_steps"]
        points = [{k: v for k, v in point.items() if k != "sd"} for point in over_seeds(mine, "accuracy_by_hops")]
        return {
            "name": label,
            "label": f"{label} ({steps:,})",
            "style": style,
            "by_hops": points,
            "steps": steps,
            "seeds": len(mine),
        }

    lines = [one for one in (line(*entry) for entry in MAIN_LINES) if one]
    depth = []
    for layers, (with_feedback, without) in DEPTHS.items():
        series = [
            line("With feedback", *with_feedback, "s0"),
            line("Without feedback", *without, "s1"),
        ]
        if all(series):
            depth.append({"title": f"{layers} layers", "layers": layers, "series": series})
    step_lines = [
        {"label": label, "style": style, "steps": steps_per_hop(by_arm[group, arm])}
        for label, group, arm, style in STEP_LINES
        if (group, arm) in by_arm
    ]
    study = {
        "created": created,
        "command": command,
        "seeds": max((one["seeds"] for one in lines), default=0),
        "guess_in_image": guess_in_image(task_named("follow_the_notes")),
        "arms": lines,
        "depth": depth,
        "steps": {"level": LEVEL, "series": step_lines},
    }
    return {**study, "sentences": sentences(study)}


def steps_per_hop(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median over seeds of the step from which on `LEVEL` of the validation questions are answered, per hop.

    None where more than half of the seeds do not get there.
    """
    hops = [point["hops"] for point in rows[0]["decoded_during_training"][0]["by_hops"]]
    table = []
    for count in hops:
        reached = [steps_to_reach(row["decoded_during_training"], count, LEVEL) for row in rows]
        order = sorted(math.inf if step is None else step for step in reached)
        middle = order[len(order) // 2]
        step = None if math.isinf(middle) else int(middle)
        table.append({"hops": count, "reached": step, "trained": rows[0]["total_steps"], "seeds": len(rows)})
    return table


def sentences(study: Mapping[str, Any]) -> list[str]:
    """What the study's numbers say, in words made from them alone."""
    words = []
    for one in study["arms"]:
        shares = ", ".join(f"{100 * point['value']:.0f}" for point in one["by_hops"])
        seeds = f"mean of {one['seeds']} seeds" if one["seeds"] > 1 else "one seed"
        words.append(
            f"{one['name']}, {one['steps']:,} steps: {shares} % at 0 to {one['by_hops'][-1]['hops']} hops ({seeds})."
        )
    for one in study["steps"]["series"]:
        parts = [f"{row['reached']:,}" if row["reached"] else f"not within {row['trained']:,}" for row in one["steps"]]
        words.append(
            f"{one['label']}: training steps until {100 * study['steps']['level']:.0f} % of the questions are "
            f"answered, for 0 to {one['steps'][-1]['hops']} hops: {', '.join(parts)}."
        )
    return words


def write_figures(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """The study's figures as SVG files that follow a reader's light or dark theme."""
    guess = study["guess_in_image"]
    drawings = {"accuracy-over-hops": hops_chart(study["arms"], guess, "hops", "Accuracy over hops")}
    if study["steps"]["series"]:
        title = "Training steps that a hop costs"
        drawings["steps-per-hop"] = steps_chart(study["steps"]["series"], study["steps"]["level"], "steps", title)
    for panel in study["depth"]:
        drawings[f"depth-{panel['layers']}"] = hops_chart(
            panel["series"], guess, f"depth-{panel['layers']}", panel["title"], (560, 300)
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        with atomic_write(folder / f"{name}.svg") as file:
            file.write(standalone(drawing).encode())
    return [folder / f"{name}.svg" for name in drawings]
