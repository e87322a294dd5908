import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vreflection.data.visual_cot import read_visual_cot
from vreflection.errors import ConfigError
from vreflection.evaluation.latents import sample_partners
from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.quickstart import arms as arms_module
from vreflection.quickstart.arms import by_hops, curriculum, overall
from vreflection.quickstart.run import Quickstart, start_over
from vreflection.quickstart.settings import load_quickstart, merge, quickstart_values
from vreflection.quickstart.summary import hop_list
from vreflection.quickstart.tasks import TASKS, hops_of, write_dataset
from vreflection.training.folder import claimed

ARMS = ("stage1", "stage2", "filler_aligned", "sft_curriculum", "chain")
TINY = ["data.train=12", "data.test=6", "interventions=3", "examples=2", "workers=1"]
TINY += ["shared.trainer.per_device_train_batch_size=4", *(f"arms.{arm}.trainer.max_steps=2" for arm in ARMS)]
TWO = [*TINY, *(f"arms.{arm}=null" for arm in ARMS if arm not in ("filler_aligned", "sft_curriculum"))]


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
    assert tuple(arm["key"] for arm in metrics["arms"]) == ARMS == tuple(metrics["curves"])
    assert [arm["steps"] for arm in metrics["arms"][:3]] == [2, 4, 2]
    assert all([point["hops"] for point in arm["by_hops"]] == [0, 1, 2, 3, 4] for arm in metrics["arms"])
    keys = ["own", "teacher_forced", "swapped", "swapped_follows_partner", "removed"]
    assert [row["key"] for row in metrics["interventions"]] == keys
    assert {row["label"] for row in metrics["gauges"]} == {"Latents, stage 1", "Latents, stage 2"}
    assert [(row["hops"], len(row["boxes"])) for row in metrics["examples"]] == [(4, 5), (3, 4)]
    assert 0.04 < metrics["task"]["uniform_mass"] < 0.15
    assert str(folder) not in json.dumps(metrics)
    assert all(done == total for done, total in seen.values())
    assert {phase for phase, _ in run.phases()} == set(seen)
    stage2 = VReflectionForConditionalGeneration.from_pretrained(folder / "arms" / "stage2", expect_stage="stage2")
    assert stage2.config.num_latent_tokens == 2


def weights(folder, names=ARMS):
    return {name: (folder / "arms" / name / "model.safetensors").stat().st_mtime_ns for name in names}


def test_running_again_keeps_finished_parts_and_redoes_what_changed(finished):
    folder, metrics, _, _ = finished
    before = weights(folder)
    again = Quickstart(load_quickstart(None, [*TINY, "arms.stage2.objective.distillation_weight=0.25"]), folder, ignore)
    assert again.run()["arms"][0] == metrics["arms"][0]
    after = weights(folder)
    assert {arm for arm in ARMS if before[arm] != after[arm]} == {"stage2"}


def test_an_interrupted_run_resumes_and_leaves_nothing_broken(tmp_path):
    settings = load_quickstart(None, TWO)

    def interrupt(phase, done, total):
        if phase == "train sft_curriculum" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quickstart(settings, tmp_path, interrupt).run()
    assert {p.stem for p in (tmp_path / "results").iterdir()} == {"filler_aligned"}
    assert not (tmp_path / "metrics.json").exists()
    phases = []
    Quickstart(settings, tmp_path, lambda phase, done, total: phases.append((phase, done, total))).run()
    assert ("train filler_aligned", 1, 1) in phases and ("train sft_curriculum", 2, 2) in phases
    assert (tmp_path / "report.html").exists()


def test_arms_side_by_side_are_those_of_one_process(finished, tmp_path):
    """In processes of their own, and stage 2 only once stage 1 is done."""
    settings = load_quickstart(None, [*TINY, "workers=2", *(f"arms.{arm}=null" for arm in ARMS[3:])])
    results = Quickstart(settings, tmp_path, ignore, shared_folder=finished[0]).run_arms()
    assert list(results) == list(ARMS[:3])
    for name, result in results.items():
        alone = finished[1]["results"][name]
        assert result["accuracy_by_hops"] == alone["accuracy_by_hops"] and result["stage"] == alone["stage"]
        losses = [point["loss"] for point in result["curve"]]
        assert losses == pytest.approx([point["loss"] for point in finished[1]["curves"][name]], rel=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as on Unix")
def test_a_killed_run_leaves_no_worker_behind(finished, tmp_path):
    command = [sys.executable, "-m", "vreflection", "quickstart", "--out", str(tmp_path), "--json"]
    for override in [
        *TWO,
        "workers=2",
        "arms.sft_curriculum.trainer.max_steps=2000",
        "arms.filler_aligned.trainer.max_steps=2000",
    ]:
        command += ["--set", override]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(children := workers_of(run.pid)) < 2 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.5)
        assert len(children) == 2
        run.send_signal(signal.SIGKILL)
        run.wait()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def workers_of(pid):
    """Ids of the worker processes of a process; its resource tracker is none."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in task.read_text().split()]
    return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_from_scratch_trains_on_a_base_of_its_own(tmp_path, monkeypatch):
    from vreflection.quickstart import pretrain, run

    small = pretrain.PretrainSettings(
        vision_steps=1, caption_steps=1, batch_size=2, caption_images=8, validation_images=2
    )
    original = pretrain.pretrain_base
    monkeypatch.setattr(run, "pretrain_base", lambda folder, seed, report, _: original(folder, seed, report, small))
    seen = []
    quickstart = Quickstart(
        load_quickstart(None, TWO), tmp_path, lambda phase, done, total: seen.append(phase), from_scratch=True
    )
    quickstart.run()
    assert "pre-training" in seen and "pre-training" in dict(quickstart.phases())
    assert (tmp_path / "base" / "training_log.json").exists()
    trained = (tmp_path / "arms" / "sft_curriculum" / "train_settings.yaml").read_text()
    assert f"model: {tmp_path / 'base'}" in trained


def test_the_one_hop_task_runs_through(tmp_path):
    names = ("sft", "boundary", "filler", "stage1", "stage2", "sft_long")
    overrides = [o for o in TINY if not o.startswith("arms.")] + [f"arms.{arm}.trainer.max_steps=1" for arm in names]
    metrics = Quickstart(load_quickstart(None, overrides, "one_hop"), tmp_path, ignore).run()
    assert metrics["task"]["hops"] == [0] and [arm["key"] for arm in metrics["arms"]] == list(names)
    page = (tmp_path / "report.html").read_text()
    assert "One look is enough" in page and 'class="bars"' in page
    assert len(metrics["examples"]) == 2


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_quickstart(None, [*TWO, "arms.filler_aligned=null"])
    assert "sft_curriculum" in Quickstart(settings, Path("runs/here"), ignore).run_arms()


def test_what_is_damaged_or_missing_is_made_again(tmp_path):
    settings = load_quickstart(None, [*TWO, "arms.sft_curriculum=null"])
    first = Quickstart(settings, tmp_path, ignore).run_arms()["filler_aligned"]
    (tokens,) = tmp_path.glob("visual_tokens-*")
    whole = tokens.read_bytes()
    for name, content in (
        ("results/filler_aligned.json", b'{"accuracy": '),
        ("results/filler_aligned.json", b"[]"),
        ("data/written.json", b"{"),
        ("data/train.json", None),
        (tokens.name, b"damaged"),
    ):
        damaged = tmp_path / name
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        again = Quickstart(settings, tmp_path, ignore).run_arms()["filler_aligned"]
        assert again["accuracy_by_hops"] == first["accuracy_by_hops"], name
        assert damaged.exists() and damaged.read_bytes() != content
    assert tokens.read_bytes() == whole


def test_few_questions_and_visual_tokens_of_other_data_still_make_a_report(tmp_path):
    """One test image has no other one to take latents from."""
    for number in range(8):
        save_file({"notes/test_00000.jpg": torch.zeros(1)}, tmp_path / f"visual_tokens-{number}-0.safetensors")
    small = [*TINY, "data.test=1", "examples=9", *(f"arms.{arm}=null" for arm in ARMS[2:])]
    metrics = Quickstart(load_quickstart(None, small), tmp_path, ignore).run()
    assert metrics["interventions"] == [] and len(metrics["examples"]) == 1
    assert metrics["examples"][0]["predicted_swapped"] is None
    assert "With another image’s latents" not in (tmp_path / "report.html").read_text()


def test_an_arm_that_diverged_leaves_json_that_every_reader_takes(tmp_path):
    wild = ["arms.stage1.optimizer.learning_rate=1e30", "arms.stage1.trainer.max_grad_norm=0"]
    wild += ["arms.stage1.trainer.max_steps=4", *(f"arms.{arm}=null" for arm in ARMS[2:])]
    Quickstart(load_quickstart(None, [*TINY, *wild]), tmp_path, ignore).run()
    for file in (tmp_path / "metrics.json", *(tmp_path / "results").iterdir()):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_questions_without_a_partner_are_left_out_of_the_swaps(finished):
    test = finished[3].rows("test")
    lonely = [sample for sample in test if hops_of(sample) < 4] + [test[4]]
    partners = sample_partners(lonely)
    assert partners[-1] is None and None not in partners[:-1]
    assert len(lonely) - 1 not in partners


def test_two_runs_do_not_share_a_folder(finished):
    folder, _, _, run = finished
    with (
        claimed(folder, main_process=True),
        pytest.raises(ConfigError, match="another run .* is writing to"),
    ):
        run.run(fresh=True)
    assert (folder / "metrics.json").exists()


def test_starting_over_removes_only_its_own_files(tmp_path):
    own = ("arms/sft/train_settings.yaml", "results/sft.json", "data/written.json", "data/images/notes/test_00000.jpg")
    own += ("metrics.json", "base-2-layers/training_log.json", "visual_tokens-1-2.safetensors")
    for name in own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"fingerprint": ""}')
    (tmp_path / "mine.txt").write_text("mine")
    start_over(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_starting_over_spares_folders_of_the_same_names(tmp_path):
    mine = {"arms/own/config.json", "results/own.json", "data/photo.jpg", "base/config.json"}
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    start_over(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == mine


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    listing = write_dataset(folder, TASKS["follow_the_notes"], "train", 20, questions_per_image=5)
    return read_visual_cot(listing, folder / "images", "raise")[0]


def test_a_curriculum_adds_one_hop_at_a_time(samples):
    order = curriculum(samples, 100, 8, seed=1)
    hops = np.array([hops_of(sample) for sample in order]).reshape(100, 8)
    for first, last, limit in ((0, 20, 0), (20, 35, 1), (35, 50, 2), (50, 65, 3), (65, 100, 4)):
        assert hops[first:last].max() == limit and hops[first:last].min() == 0
    assert [s.source for s in order] == [s.source for s in curriculum(samples, 100, 8, seed=1)]
    assert [s.source for s in order] != [s.source for s in curriculum(samples, 100, 8, seed=2)]


def test_a_curriculum_arm_trains_in_that_order(samples):
    settings = load_quickstart(None, TINY)
    assert settings.arm("sft_curriculum", Path("m"), Path("o"), False).data.shuffle is False
    assert settings.arm("filler_aligned", Path("m"), Path("o"), False).data.shuffle is True


def test_a_curriculum_needs_a_question_to_start_with(samples):
    with pytest.raises(ConfigError, match="expected questions without a hop"):
        curriculum([sample for sample in samples if hops_of(sample)], 10, 2, seed=1)


@pytest.mark.parametrize(("hops", "words"), [([1], "1 hop"), ([3], "3 hops"), ([1, 2, 4], "1, 2, 4 hops")])
def test_hops_are_listed_in_english(hops, words):
    assert hop_list(hops) == words


def test_accuracy_is_counted_by_hops_and_its_interval_knows_about_shared_images(samples):
    by_image = np.array([int(s.source.rpartition(":")[2]) <= 50 for s in samples])  # all questions of half the images
    assert [(row["hops"], row["correct"], row["n"]) for row in by_hops(by_image, samples)] == [
        (hops, 10, 20) for hops in range(5)
    ]
    whole = overall(by_image, samples)
    assert (whole["correct"], whole["n"], whole["groups"]) == (50, 100, 20)
    assert whole["high"] - whole["low"] > 0.35  # as of 20 images, not of 100 questions


def test_validation_is_decoded_while_an_arm_trains(finished, tmp_path):
    settings = load_quickstart(None, [*TWO, "data.validation=2", "decode_every=1", "arms.sft_curriculum=null"])
    result = Quickstart(settings, tmp_path, ignore).run_arms()["filler_aligned"]
    assert [point["step"] for point in result["decoded_during_training"]] == [1, 2]
    assert [row["n"] for row in result["decoded_during_training"][0]["by_hops"]] == [2] * 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms.stage2.start=stage3", "start must be 'base' or an earlier arm, got 'stage3'"),
        ("arms.stage1.objective.lambda=4", "unknown objective settings"),
        ("arms.stage1.optimizer.rate=4", "unknown keys"),
        ("data.training=4", r"unknown keys \['training'\]"),
        ("arms.stage1.stage=stage9", "stage: expected one of"),
        ("arms.chain.rows=words", "rows: expected one of"),
        ("task=two_hops", "task: expected one of"),
        ("decode_every=5", "needs validation questions"),
        ("workers=-1", "workers: expected at least 0"),
        ("seed=-1", "seed: expected at least 0"),
        ("data.train=0", "data.train: expected at least 1"),
        ("data.test=0", "data.test: expected at least 1"),
        ("data.questions_per_image=0", "data.questions_per_image: expected at least 1"),
        ("arms=[1]", "arms: expected groups of settings by name"),
        ("arms.stage1=3", "arms.stage1: expected a group of settings, got 3"),
        ("arms.stage1.model=mine", "model cannot be set per arm"),
        ("arms.stage1.rows=chain", "rows: chain is for stage sft, as it has no spans, got stage1"),
        ("arms.chain.curriculum=maybe", "curriculum: expected true or false, got 'maybe'"),
        ("arms.stage1.trainer.max_steps=0", "trainer.max_steps: expected a whole number of at least 1, got 0"),
        ("arms.stage1.trainer.max_steps=few", "trainer.max_steps: expected a whole number"),
        ("arms.a/b.stage=sft", "a name becomes a folder"),
        ("nonsense", "expected key=value"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_quickstart(None, [override])


def test_settings_of_one_task_are_not_taken_for_another():
    path = Path(arms_module.__file__).parents[2] / "configs" / "quickstart_one_hop.yaml"
    with pytest.raises(ConfigError, match="is for the task 'one_hop', got --task follow_the_notes"):
        quickstart_values(path, [], "follow_the_notes")


def test_settings_merge_group_by_group_and_missing_files_are_named():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}
    with pytest.raises(ConfigError, match="does not exist"):
        load_quickstart(Path("nowhere.yaml"))


def test_workers_are_one_per_core_and_two_at_most(monkeypatch):
    settings = load_quickstart(None, [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert settings.worker_count == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert settings.worker_count == 1
