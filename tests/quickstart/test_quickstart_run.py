import json
from pathlib import Path

import pytest

from vreflection.errors import ConfigError
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.quickstart.run import Quickstart, start_over
from vreflection.quickstart.settings import load_quickstart, merge
from vreflection.quickstart.study import run_study
from vreflection.quickstart.summary import findings

ARMS = ("sft", "boundary", "filler", "stage1", "stage2", "sft_long")
TINY = ["data.train=12", "data.test=8", "examples=2", "shared.trainer.per_device_train_batch_size=4"]
TINY += [f"arms.{arm}.trainer.max_steps=2" for arm in ARMS]


def ignore(phase, done, total):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    seen: dict[str, tuple[int, int]] = {}
    run = Quickstart(
        load_quickstart(None, TINY), folder, lambda phase, done, total: seen.update({phase: (done, total)})
    )
    return folder, run.run(), seen, run


def test_every_part_is_there_and_named_in_the_metrics(finished):
    folder, metrics, seen, run = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    page = (folder / "report.html").read_text()
    assert metrics["findings"][0].split("%")[0] in page
    assert {row["key"] for row in metrics["rows"]} >= {
        *ARMS,
        "stage2_swapped",
        "stage2_removed",
        "stage2_teacher_forced",
    }
    assert set(metrics["curves"]) == set(ARMS)
    assert [row["steps"] for row in metrics["rows"] if row["key"] in ("stage1", "stage2")] == [2, 4]
    assert {row["label"] for row in metrics["gauges"]} == {"Latents after stage 1", "Latents after stage 2"}
    assert any(row["key"] == "grounding_before_teacher_forced" for row in metrics["grounding"])
    assert 0.04 < metrics["task"]["uniform_mass"] < 0.15
    assert str(folder) not in json.dumps(metrics)
    assert all(done == total for done, total in seen.values())
    assert {phase for phase, _ in run.phases()} == set(seen)
    stage2 = VReflectionForConditionalGeneration.from_pretrained(folder / "arms" / "stage2", expect_stage="stage2")
    assert stage2.config.num_latent_tokens == 8


def test_running_again_keeps_finished_parts_and_redoes_what_changed(finished):
    folder, metrics, _, _ = finished
    before = {arm: (folder / "arms" / arm / "model.safetensors").stat().st_mtime_ns for arm in ARMS}
    again = Quickstart(load_quickstart(None, [*TINY, "arms.stage2.objective.distillation_weight=0.25"]), folder, ignore)
    assert again.run()["rows"][0] == metrics["rows"][0]
    after = {arm: (folder / "arms" / arm / "model.safetensors").stat().st_mtime_ns for arm in ARMS}
    assert {arm for arm in ARMS if before[arm] != after[arm]} == {"stage2"}


def test_an_interrupted_run_goes_on_and_leaves_nothing_broken(tmp_path):
    settings = load_quickstart(None, TINY)

    def interrupt(phase, done, total):
        if phase == "train filler" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quickstart(settings, tmp_path, interrupt).run()
    assert {p.stem for p in (tmp_path / "results").iterdir()} == {"sft", "boundary"}
    assert not (tmp_path / "metrics.json").exists()
    phases = []
    short = load_quickstart(None, TINY)
    for arm in ("sft_long",):
        short.arms.pop(arm)
    Quickstart(short, tmp_path, lambda phase, done, total: phases.append((phase, done, total))).run()
    assert ("train sft", 1, 1) in phases and ("train filler", 2, 2) in phases
    assert (tmp_path / "report.html").exists()


def test_from_scratch_trains_on_a_base_of_its_own(tmp_path, monkeypatch):
    from vreflection.quickstart import pretrain, run

    small = pretrain.PretrainSettings(
        vision_steps=1, caption_steps=1, batch_size=2, caption_images=2, validation_images=2
    )
    original = pretrain.pretrain_base
    monkeypatch.setattr(run, "pretrain_base", lambda *arguments: original(*arguments, settings=small))
    settings = load_quickstart(None, TINY)
    for arm in ("boundary", "filler", "sft_long"):
        settings.arms.pop(arm)
    seen = []
    quickstart = Quickstart(settings, tmp_path, lambda phase, done, total: seen.append(phase), from_scratch=True)
    quickstart.run()
    assert "pre-training" in seen and "pre-training" in dict(quickstart.phases())
    assert (tmp_path / "base" / "training_log.json").exists()
    trained = (tmp_path / "arms" / "sft" / "train_settings.yaml").read_text()
    assert f"model: {tmp_path / 'base'}" in trained


def test_starting_over_removes_only_its_own_files(tmp_path):
    for name in ("arms/sft/config.json", "results/sft.json", "data/test.json", "metrics.json", "mine.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    start_over(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_study_shares_the_data_and_tabulates_every_seed(finished, tmp_path):
    settings = load_quickstart(None, TINY)
    for arm in ("boundary", "filler", "sft_long"):
        settings.arms.pop(arm)
    study = run_study(settings, tmp_path, [0, 1], lambda *_: None)
    assert (tmp_path / "data" / "train.json").exists() and not (tmp_path / "seed-0" / "data").exists()
    table = (tmp_path / "study.md").read_text().splitlines()
    assert table[0] == "| measured | mean | s.d. | seed 0 | seed 1 |"
    assert len(table) == 2 + len(study["rows"])
    row = next(row for row in study["rows"] if row["label"] == "Latents after stage 2: accuracy")
    runs = [json.loads((tmp_path / f"seed-{s}" / "metrics.json").read_text()) for s in (0, 1)]
    assert row["values"] == [run["results"]["stage2"]["accuracy"]["value"] for run in runs]


def proportion(value, half=0.02):
    return {"value": value, "low": value - half, "high": value + half}


def results(latent, control, swapped):
    arm = {"accuracy": proportion(latent), "total_steps": 100, "swapped": proportion(swapped)}
    arm |= {"swapped_follows_partner": proportion(0.4)}
    return {"stage1": arm, "stage2": arm, "filler": {"accuracy": proportion(control), "total_steps": 100}}


@pytest.mark.parametrize(
    ("latent", "control", "swapped", "expected"),
    [
        (0.80, 0.90, 0.20, ["lower than", "decide the answer"]),
        (0.80, 0.70, 0.79, ["higher than", "make no clear difference"]),
        (0.80, 0.81, 0.20, ["not clearly different", "decide the answer"]),
    ],
)
def test_findings_say_what_the_numbers_say(latent, control, swapped, expected):
    text = " ".join(findings(results(latent, control, swapped), 0.08))
    for phrase in expected:
        assert phrase in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms.stage2.start=stage3", "start must be 'base' or an earlier arm, got 'stage3'"),
        ("arms.stage1.objective.lambda=4", "unknown objective settings"),
        ("arms.stage1.optimizer.rate=4", "unknown keys"),
        ("data.training=4", r"unknown keys \['training'\]"),
        ("arms.stage1.stage=stage9", "stage: expected one of"),
        ("nonsense", "expected key=value"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_quickstart(None, [override])


def test_settings_merge_group_by_group_and_missing_files_are_named():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}
    with pytest.raises(ConfigError, match="cannot read"):
        load_quickstart(Path("nowhere.yaml"))
