"""Settings files: known keys only, right types only, overridable from the command line."""

import dataclasses

import pytest
import yaml

from vreflection.errors import ConfigError
from vreflection.training.config import apply_override, config_file, load_settings
from vreflection.training.settings import FreeRunningSettings, TrainSettings
from vreflection.training.values import build


@pytest.fixture
def load(tmp_path):
    def loaded(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_settings(path, list(overrides))

    return loaded


def test_a_whole_file(load):
    settings = load(
        """
        stage: stage2
        model: stage1-folder
        data: {train: rows.json, max_length: 100}
        latent: {region: roi_align, resampler_num_heads: null}
        objective: {distillation_weight: 0.5, kl_reduction: mean_queries}
        free_running: {maximum: 1, end: 0.75}
        optimizer: {learning_rate: 1e-4, student_learning_rate: 2e-3}
        trainer: {max_steps: 7}
        """
    )
    assert (settings.stage, settings.model, settings.data.max_length) == ("stage2", "stage1-folder", 100)
    assert settings.latent.given() == {"region": "roi_align"}
    assert settings.free_running == FreeRunningSettings(1.0, 0.1, 0.75)
    assert settings.optimizer.teacher_learning_rate is None and settings.trainer == {"max_steps": 7}
    objective = settings.latent_objective()
    assert (objective.distillation_weight, objective.kl_reduction, objective.alignment_weight) == (
        0.5,
        "mean_queries",
        None,
    )


def test_numbers_that_yaml_reads_as_text(load):
    settings = load("optimizer: {learning_rate: 1e-5, weight_decay: 0}", "optimizer.student_learning_rate=3e-4")
    assert yaml.safe_load("1e-5") == "1e-5"  # or this test shows nothing
    assert settings.optimizer.learning_rate == 1e-5 and settings.optimizer.student_learning_rate == 3e-4
    assert isinstance(settings.optimizer.weight_decay, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: stage1", r"run.yaml: unknown keys \['stages'\]; known: .*'stage'"),
        ("data: {trains: x}", r"run.yaml: data: unknown keys \['trains'\]; known: .*'train'"),
        ("optimizer: {lr: 1}", r"optimizer: unknown keys \['lr'\]"),
        ("data: rows.json", "data: expected a group of settings, got 'rows.json'"),
        ("seed: one", r"run.yaml: seed: expected int, got 'one' \(str\)"),
        ("seed: true", r"seed: expected int, got True \(bool\)"),
        ("seed: 1.5", r"seed: expected int, got 1.5"),
        ("resume: 1", r"resume: expected bool, got 1"),
        ("optimizer: {learning_rate: fast}", "learning_rate: expected float, got 'fast'"),
        ("optimizer: {learning_rate: true}", "learning_rate: expected float, got True"),
        ("optimizer: {learning_rate: null}", "learning_rate: expected float, got None"),
        ("latent: {region: 3}", "region: expected str or NoneType, got 3"),
        ("trainer: [1]", r"trainer: expected dict.*, got \[1\]"),
        ("stage: stage3", "stage: expected one of .*stage2.*, got 'stage3'"),
        ("stage: base", "stage: expected one of .*, got 'base'"),
        ("objective: {lamda: 1}", r"objective: unknown objective settings \['lamda'\]"),
        ("objective: {alignment: both}", "objective: alignment: expected one of"),
        ("free_running: {maximum: 2}", "free_running: expected 0 <= maximum <= 1"),
        ("free_running: {start: 0.6, end: 0.5}", "free_running: expected .* start <= end"),
        ("- a", "must hold a mapping, got list"),
        ("", "must hold a mapping, got NoneType"),
        ("a: [", "is not readable YAML"),
    ],
)
def test_bad_files_are_named(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml does not exist"):
        load_settings(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_settings(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_settings(tmp_path)


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stage1_7b", "stage1_7b.yaml"):
        (tmp_path / name).mkdir()
        assert load_settings(name).trainer["max_steps"] == 2500
    (tmp_path / "sft_7b").write_text("seed: 5")
    assert load_settings("sft_7b").seed == 5
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_settings(".")


def test_a_file_extends_one_beside_it_or_a_shipped_one(load, tmp_path):
    settings = load("{extends: stage1_7b.yaml, seed: 3}")
    assert (settings.seed, settings.trainer["max_steps"], settings.data.held_out) == (3, 2500, 64)
    (tmp_path / "stage1_7b.yaml").write_text("trainer: {max_steps: 7}")
    assert load("{extends: stage1_7b.yaml, seed: 3}").trainer == {"max_steps": 7}
    with pytest.raises(ConfigError, match="other.yaml does not exist, neither here nor among the files shipped"):
        load("extends: other.yaml")
    with pytest.raises(ConfigError, match="elsewhere/stage1_7b.yaml does not exist"):
        load("extends: elsewhere/stage1_7b.yaml")


SHIPPED = sorted(
    path.stem for path in config_file("stage1_7b.yaml").parent.glob("*.yaml") if not path.stem.startswith("quickstart")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_a_whole_run(name):
    settings = load_settings(name)
    assert settings.output == f"runs/{name}" and settings.model and settings.trainer["max_steps"] == 2500
    assert settings.stage == name.replace("_multibox", "").replace("_lora", "").rpartition("_")[0]
    assert bool(settings.lora.rank) == name.endswith("lora")
    rows = settings.trainer["gradient_accumulation_steps"] * (8 if settings.parallel == "fsdp2" else 1)
    assert rows == 64  # tokens of a step are the recipe's on one GPU and on eight


@pytest.mark.parametrize("name", [name for name in SHIPPED if "multibox" in name])
def test_shipped_settings_for_several_boxes_freeze_the_teacher(name):
    settings, plain = load_settings(name), load_settings(name.replace("_multibox", ""))
    objective = settings.latent_objective()
    assert (objective.alignment, objective.alignment_weight, objective.ce_on_latent_slots) == ("llm_only", 0.5, False)
    assert settings.free_running.maximum == 0.5 and not settings.free_running.backpropagate
    assert settings.data == plain.data and settings.trainer == plain.trainer
    if settings.stage == "stage2":
        # Latent settings are the stage-1 checkpoint's, which is the sibling's.
        assert settings.model == f"runs/{name.replace('stage2', 'stage1')}" and settings.latent.given() == {}
        assert settings.free_running.share(0.0) == 0.5
    else:
        assert settings.latent.given() == {"num_latent_tokens": 2, "query_init_std": 1.0}
        assert settings.free_running.share(0.4) == 0.0


def test_shipped_stage_2_settings_can_keep_the_alignment():
    for name in ("stage2_7b", "stage2_3b", "stage2_7b_lora"):
        assert load_settings(name).latent_objective().alignment_weight is None
        kept = load_settings(name, ["objective.keep_alignment=true"]).latent_objective()
        assert (kept.alignment_weight, kept.distillation_weight) == (0.5, 1.0)


def test_overrides_make_groups_and_win(load):
    settings = load("seed: 1", "seed=2", "trainer.max_steps=5", "data.train=a=b.json", "objective.alignment=llm_only")
    assert settings.seed == 2 and settings.trainer == {"max_steps": 5} and settings.data.train == "a=b.json"
    assert settings.latent_objective().alignment == "llm_only"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set: expected key=value, got 'seed'"),
        ("=3", "--set: expected key=value, got '=3'"),
        ("seed.x=3", "--set seed.x=3: 'seed' is a single value, not a group"),
        ("seed=[", r"--set seed=\[: the value is not YAML"),
        ("seeds=3", r"unknown keys \['seeds'\]"),
        ("data.trains=3", r"data: unknown keys \['trains'\]"),
    ],
)
def test_bad_overrides_are_named(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load("seed: 1", override)


def test_overrides_nest_without_losing_neighbours():
    values = {"data": {"train": "x"}}
    apply_override(values, "data.max_length=5")
    assert values == {"data": {"train": "x", "max_length": 5}}


def test_settings_survive_being_written_down():
    settings = build(TrainSettings, {"stage": "stage2", "objective": {"alignment": "llm_only"}, "seed": 3}, "here")
    again = build(TrainSettings, yaml.safe_load(yaml.safe_dump(dataclasses.asdict(settings))), "there")
    assert again == settings


def test_the_alignment_draws_from_the_runs_seed():
    assert TrainSettings(seed=5).latent_objective().alignment_seed == 5
    assert TrainSettings(seed=5, objective={"alignment_seed": 9}).latent_objective().alignment_seed == 9


def test_free_running_schedule():
    ramp = FreeRunningSettings(maximum=0.8, start=0.25, end=0.75)
    expected = {0.0: 0.0, 0.25: 0.0, 0.375: 0.2, 0.5: 0.4, 0.75: 0.8, 0.9: 0.8, 1.0: 0.8}
    assert {p: pytest.approx(ramp.share(p)) for p in expected} == expected
    jump = FreeRunningSettings(maximum=1.0, start=0.5, end=0.5)
    assert (jump.share(0.5), jump.share(0.5001), jump.share(1.0)) == (1.0, 1.0, 1.0)
    assert jump.share(0.4999) == 0.0 and FreeRunningSettings(maximum=1.0, start=0.0, end=0.0).share(0.0) == 1.0
    assert all(FreeRunningSettings().share(p / 10) == 0 for p in range(11))
