import json
import math
import shutil
import statistics
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vreflection.errors import ConfigError, DataError
from vreflection.quickstart.run import STUDY
from vreflection.quickstart.settings import quickstart_values
from vreflection.quickstart.study import (
    accuracy_table,
    collect_rows,
    load_study,
    mean_interval,
    over_seeds,
    published,
    run_study,
    seeds_study,
    sentences,
    start_study_over,
    steps_per_hop,
    summarize,
    write_figures,
)
from vreflection.quickstart.workers import run_jobs

SMALL = ["data.train=12", "data.validation=2", "data.test=4", "interventions=2", "decode_every=1", "workers=1"]
SMALL += ["shared.trainer.per_device_train_batch_size=4", "groups.main.seeds=[0, 1]"]
SMALL += [f"arms.{arm}.trainer.max_steps=1" for arm in ("stage1", "stage2", "filler_aligned_x3")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = load_study(None, [*SMALL, "groups.fairest.seeds=[0]"], ["main", "fairest"])
    return folder, run_study(study, folder, lambda *_: None)


def test_groups_share_data_and_every_run_is_a_raw_row(finished):
    folder, study = finished
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert rows == collect_rows(folder)
    assert [(row["group"], row["arm"], row["seed"]) for row in rows] == [
        ("fairest", "filler_aligned_x3", 0),
        *(("main", arm, seed) for arm in ("stage1", "stage2") for seed in (0, 1)),
    ]
    assert (folder / "data" / "train.json").exists() and not (folder / "main" / "seed-0" / "data").exists()
    own = [json.loads((folder / "main" / f"seed-{seed}" / "results" / "stage2.json").read_text()) for seed in (0, 1)]
    (entry,) = [entry for entry in study["rows"] if entry["arm"] == "stage2"]
    for place, point in enumerate(entry["accuracy"]):
        assert point["value"] == statistics.fmean(result["accuracy_by_hops"][place]["value"] for result in own)
    table = (folder / "study.md").read_text().splitlines()
    assert table[0] == "| group | arm | steps | seeds | 0 hops | 1 hop | 2 hops | 3 hops | 4 hops |"
    assert any(line.startswith("| main | `stage2` | 2 | 2 | ") for line in table)
    assert "| group | arm | steps | seeds | measured | 0 hops | 1 hop | 2 hops | 3 hops | 4 hops |" in table
    assert sum("| stage2 |" in line for line in table) >= 5


def test_a_study_can_grow_group_by_group(finished, tmp_path_factory):
    folder, _ = finished
    before = (folder / "main" / "seed-0" / "arms" / "stage1" / "model.safetensors").stat().st_mtime_ns
    more = load_study(None, [*SMALL, "groups.chain.seeds=[0]", "arms.chain.trainer.max_steps=1"], ["chain"])
    study = run_study(more, folder, lambda *_: None)
    assert {entry["group"] for entry in study["rows"]} == {"main", "fairest", "chain"}
    assert (folder / "main" / "seed-0" / "arms" / "stage1" / "model.safetensors").stat().st_mtime_ns == before


def test_rows_from_another_machine_count_as_finished(finished, tmp_path):
    folder, _ = finished
    kept = [row for row in collect_rows(folder) if row["group"] in ("main", "fairest")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    study = load_study(None, [*SMALL, "groups.fairest.seeds=[0]"], ["main", "fairest"])
    run_study(study, tmp_path, lambda *_: None)
    assert collect_rows(tmp_path) == kept and not list(tmp_path.glob("*/seed-*/arms"))
    # Other settings of stage 2 alone: stage 1 is needed again, and only then.
    again = load_study(None, [*SMALL, "groups.main.seeds=[0]", "arms.stage2.trainer.max_steps=2"], ["main"])
    run_study(again, tmp_path, lambda *_: None)
    assert [path.name for path in sorted(tmp_path.glob("main/seed-0/arms/*"))] == ["stage1", "stage2"]


def test_what_is_damaged_is_taken_from_the_rows_and_damaged_rows_are_named(finished, tmp_path):
    folder, _ = finished
    kept = [row for row in collect_rows(folder) if row["arm"] == "filler_aligned_x3"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = tmp_path / "fairest" / "seed-0" / "results" / "filler_aligned_x3.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"accuracy": ')
    (tmp_path / "fairest" / "seed-old" / "results").mkdir(parents=True)
    (tmp_path / "fairest" / "seed-old" / "results" / "mine.json").write_text("{}")
    study = load_study(None, [*SMALL, "groups.fairest.seeds=[0]"], ["fairest"])
    run_study(study, tmp_path, lambda *_: None)
    assert collect_rows(tmp_path) == kept and not (tmp_path / "fairest" / "seed-0" / "arms").exists()
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('{"group": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected a row of a study"):
        run_study(study, tmp_path, lambda *_: None)


def test_a_folder_holds_one_set_of_questions_until_it_is_started_over(finished, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(finished[0], folder)
    (folder / "mine.txt").write_text("mine")
    other = load_study(None, [*SMALL, "data.test=5"], ["main"])
    with pytest.raises(ConfigError, match=r"holds a study of other questions \(test 4, not 5\)"):
        run_study(other, folder, lambda *_: None)
    start_study_over(folder)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mine.txt"]


def test_the_figures_and_what_the_report_shows_are_left_with_it(finished):
    folder, _ = finished
    shown = json.loads((folder / "published.json").read_text())
    assert shown["arms"][0]["label"] == "Latents (2)" and shown["arms"][0]["seeds"] == 2
    for name in ("accuracy-over-hops", "steps-per-hop"):
        root = ET.fromstring((folder / "figures" / f"{name}.svg").read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in root.find("{http://www.w3.org/2000/svg}style").text


def test_seeds_of_any_settings_make_a_study():
    values, where = quickstart_values(None, [], "one_hop")
    study = seeds_study(values, [3, 5], where)
    assert list(study.runs) == ["seeds/seed-3", "seeds/seed-5"]
    assert {settings.seed for settings in study.runs.values()} == {3, 5}
    assert all(list(settings.arms) == list(values["arms"]) for settings in study.runs.values())
    for arms, message in ((None, "expected at least one arm"), ([1], "expected groups of settings by name")):
        with pytest.raises(ConfigError, match=message):
            seeds_study({**values, "arms": arms}, [3], where)


def test_the_shipped_study_names_arms_that_exist_and_changes_what_it_says():
    study = load_study()
    assert study.runs["layers_2/seed-0"].layers == 2 and study.runs["main/seed-0"].layers == 4
    assert study.runs["latents_4/seed-0"].arms["stage1"]["latent"]["num_latent_tokens"] == 4
    assert study.runs["main/seed-0"].arms["stage1"]["latent"]["num_latent_tokens"] == 2
    assert all(list(study.runs[f"{name}/seed-{group.seeds[0]}"].arms) for name, group in study.groups.items())


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        ([], ["mains"], "groups: expected some of main, .*got mains"),
        (["groups.main.arms=[stage9]"], None, r"groups.main: unknown arms \['stage9'\]"),
        (["groups.main.seed=[1]"], None, "unknown keys"),
        (["groups=3"], None, "groups: expected groups of settings by name, got 3"),
        (["groups.main.seeds=[]"], ["main"], "expected at least one group with a seed"),
    ],
)
def test_bad_studies_are_refused_with_what_to_change(overrides, only, message):
    with pytest.raises(ConfigError, match=message):
        load_study(None, overrides, only)


def test_interval_over_seeds_is_students():
    values = [0.90, 0.92, 0.88]
    interval = mean_interval(values)
    assert interval["value"] == pytest.approx(0.90)
    # t(0.975, 2) = 4.3027, s.d. 0.02
    assert interval["high"] - interval["value"] == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-4)
    assert mean_interval([0.5])["sd"] is None
    one = {"accuracy_by_hops": [{"hops": 0, "value": 0.9, "low": 0.86, "high": 0.93, "n": 200}]}
    assert over_seeds([one])[0] == {
        **one["accuracy_by_hops"][0],
        "sd": None,
        "seeds": 1,
    }


def run(seed, *curve, steps=300):
    points = [{"step": step, "by_hops": [{"hops": h, "value": v} for h, v in enumerate(vs)]} for step, *vs in curve]
    return {"seed": seed, "total_steps": steps, "decoded_during_training": points}


def test_steps_of_a_hop_are_the_median_over_seeds_and_none_where_most_do_not_get_there():
    rows = [run(0, (100, 0.9, 0.2), (200, 0.9, 0.9)), run(1, (100, 0.2, 0.2), (200, 0.9, 0.3))]
    rows.append(run(2, (100, 0.2, 0.2), (200, 0.9, 0.3)))
    assert [(row["reached"], row["seeds"]) for row in steps_per_hop(rows)] == [(200, 3), (None, 3)]
    assert [row["reached"] for row in steps_per_hop(rows[:1])] == [100, 200]


def measured(group, arm, seed, values, steps, curve=()):
    points = [{"hops": h, "value": v, "low": v - 0.03, "high": v + 0.03, "n": 512} for h, v in enumerate(values)]
    return {"group": group, "arm": arm, "accuracy_by_hops": points, **run(seed, *curve, steps=steps)}


def test_what_is_published_says_what_the_rows_say(tmp_path):
    rows = [measured("main", "stage2", s, [0.92, 0.9], 380) for s in range(3)]
    rows += [measured("main", "stage1", s, [0.9, 0.9], 300, [(25, 0.9, 0.1), (50, 0.9, 0.9)]) for s in range(3)]
    rows += [measured("fairest", "filler_aligned_x3", 0, [0.9, 0.3], 900)]
    rows += [measured("long", "filler_aligned_long", 0, [0.9, 0.5], 6000, [(250, 0.9, 0.1), (6000, 0.9, 0.5)])]
    shown = published(rows, "2025-01-01", "command")
    assert [line["label"] for line in shown["arms"]] == [
        "Latents (380)",
        "Same supervision, no feedback (900)",
        "Same supervision, no feedback (6,000)",
    ]
    assert [(panel["layers"], len(panel["series"])) for panel in shown["depth"]] == [(4, 2)]
    text = " ".join(sentences(shown))
    assert "Latents, 380 steps: 92, 90 % at 0 to 1 hops (mean of 3 seeds)." in text
    assert (
        "Without feedback: training steps until 80 % of the questions are answered, for 0 to 1 hops: 250, not within"
        in text
    )
    assert {path.stem for path in write_figures(shown, tmp_path)} == {"accuracy-over-hops", "steps-per-hop", "depth-4"}
    for path in tmp_path.iterdir():
        ET.parse(path)


# Workers


def times_ten(number, on_progress):
    on_progress("work", number, number)
    if number == 13:
        raise ValueError("unlucky")
    return 10 * number


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_in_their_order_and_report(workers):
    events, results = [], []
    jobs = {"a": 1, "b": 2, "c": 3}
    done = run_jobs(
        times_ten, jobs, {"b": "c"}, workers, lambda *event: events.append(event), lambda *r: results.append(r)
    )
    assert done == {"a": 10, "b": 20, "c": 30}
    assert results.index(("c", 30)) < results.index(("b", 20))
    assert sorted(events) == [("work", n, n) for n in (1, 2, 3)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_is_raised_here(workers):
    with pytest.raises(ValueError, match="unlucky"):
        run_jobs(times_ten, {"a": 13, "b": 2}, {"b": "a"}, workers, lambda *_: None)


def sleep(seconds, on_progress):
    time.sleep(seconds)


def test_an_interrupt_waits_for_no_job():
    def interrupt(name, result):
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(sleep, {"short": 0, "long": 120}, {}, 2, lambda *_: None, interrupt)
    assert time.monotonic() - started < 60


# What was published

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cpu" / "follow_the_notes"


@pytest.mark.skipif(not RESULTS.exists(), reason="the raw rows are part of a checkout only")
def test_docs_and_report_say_what_the_raw_rows_say():
    rows = [json.loads(line) for line in (RESULTS / "rows.jsonl").read_text().splitlines()]
    shown = json.loads(STUDY.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(published(rows, shown["created"], shown["command"]))) == shown
    page = (RESULTS.parents[3] / "docs" / "when-latents-help.md").read_text(encoding="utf-8")
    assert accuracy_table(summarize(rows)) in page
    figure = (RESULTS.parents[3] / "docs" / "images" / "accuracy-over-hops.svg").read_text(encoding="utf-8")
    assert all(line["label"] in figure for line in shown["arms"])


def test_the_quickstarts_page_says_what_its_five_seeds_say():
    rows = [json.loads(line) for line in (RESULTS / "quickstart_seeds.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in rows} == set(range(5))
    page = (RESULTS.parents[3] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    table = accuracy_table(summarize(rows))
    assert table.strip() in page and table in (RESULTS / "quickstart_seeds.md").read_text(encoding="utf-8")
