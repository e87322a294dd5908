"""What a run does to its output folder, and what it takes to go on in one."""

import fcntl
import json
import logging
import os
import signal
from itertools import islice

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from vreflection.data.check import check_rows, write_check
from vreflection.data.packing import RankBatches
from vreflection.data.rows import open_rows
from vreflection.errors import CheckpointError, ConfigError, DataError
from vreflection.training.checkpoints import checkpoints_in
from vreflection.training.config import settings_dict
from vreflection.training.folder import check_resumed_settings
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build

SAVING = {"save_strategy": "steps", "save_steps": 2}


def train(values, **kwargs):
    return run_training(build(TrainSettings, values, "test"), **kwargs)


def names(mixed, folder):
    return [path.name for path in checkpoints_in(mixed.root / folder)]


@pytest.fixture(scope="module")
def finished(mixed):
    train(mixed.settings("finished", trainer=SAVING))
    return "finished"


def test_a_new_run_does_not_mix_with_an_earlier_ones_checkpoints(mixed, finished):
    with pytest.raises(ConfigError, match="holds checkpoint-2, checkpoint-4 of an earlier run; go on with --resume"):
        train(mixed.settings(finished, trainer={**SAVING, "max_steps": 2}))
    assert names(mixed, finished) == ["checkpoint-2", "checkpoint-4"]


def test_the_model_to_start_from_is_not_the_place_to_write_to(mixed):
    with pytest.raises(ConfigError, match="another folder than the model's"):
        train(mixed.settings("base"))


def test_a_file_in_the_folders_place_is_named(mixed):
    (mixed.root / "taken").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: expected a folder .*taken.* \(a file of that name is in the way\)"):
        train(mixed.settings("taken"))


def test_two_runs_do_not_share_a_folder(mixed):
    folder = mixed.root / "busy"
    folder.mkdir()
    with open(folder / ".run.lock", "w") as other:
        other.write("process 123 on node")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another run \(process 123 on node\) is writing"):
            train(mixed.settings("busy"))
    train(mixed.settings("busy", trainer={"max_steps": 1}))
    assert not (folder / ".run.lock").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "seed: 0 then, 7 now"),
        ({"data": {"pack_tokens": 600}}, "data.pack_tokens: 300 then, 600 now"),
        ({"data": {"shuffle": False}}, "data.shuffle: True then, False now"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate: 0.001 then, 0.5 now"),
        ({"latent": {"region": "roi_align"}}, "latent.region: None then, 'roi_align' now"),
    ],
)
def test_a_resumed_run_is_the_same_run(mixed, finished, changes, named):
    with pytest.raises(CheckpointError, match=named):
        train(mixed.settings(finished, trainer=SAVING, resume=True, **changes))


def test_other_changes_are_named_and_taken(mixed, finished, caplog):
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        result = train(mixed.settings(finished, trainer={**SAVING, "max_steps": 5}, resume=True))
    assert "another setting: trainer.max_steps: 4 then, 5 now" in caplog.text
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4, 5]


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(mixed, tmp_path):
    settings = build(TrainSettings, mixed.settings("newer"), "test")
    older = settings_dict(settings)
    del older["data"]["shuffle"]
    (tmp_path / "train_settings.yaml").write_text(yaml.safe_dump(older))
    check_resumed_settings(tmp_path, settings)
    changed = build(TrainSettings, mixed.settings("newer", data={"shuffle": False}), "test")
    with pytest.raises(CheckpointError, match="data.shuffle: True then, False now"):
        check_resumed_settings(tmp_path, changed)


def test_rows_in_file_order(mixed, monkeypatch):
    taken = []
    batches = RankBatches.__iter__
    monkeypatch.setattr(RankBatches, "__iter__", lambda self: (taken.append(b) or b for b in batches(self)))
    train(mixed.settings("in-order", data={"shuffle": False}, trainer={"max_steps": 1}))
    rows = [row for batch in taken for row in batch]
    assert len(rows) > 8 and rows[:24] == list(range(min(len(rows), 24)))


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_with_another_accumulation_no_row_comes_twice_or_never(mixed, accumulation, monkeypatch):
    """The stream of micro-batches goes on where it was left."""
    folder = f"accumulation-{accumulation}"
    train(mixed.settings(folder, trainer={**SAVING, "max_steps": 2}))
    taken = []
    batches = RankBatches.__iter__

    def noted(self):
        for batch in batches(self):
            taken.append(batch)
            yield batch

    monkeypatch.setattr(RankBatches, "__iter__", noted)
    more = {**SAVING, "max_steps": 4, "gradient_accumulation_steps": accumulation}
    train(mixed.settings(folder, trainer=more, resume=True))
    monkeypatch.undo()
    skipped, new = taken[: 2 * accumulation], taken[2 * accumulation :]
    assert len(skipped) + len(new) == 4 * accumulation
    whole = json.loads((mixed.root / folder / "checkpoint-4" / "progress.json").read_text())
    assert whole["micro_batches"] == 2 * 4 + 2 * accumulation
    plan = captured_plan(mixed, folder)
    assert new == [batch for _, batch in islice(plan.batches(), 8, 8 + 2 * accumulation)]


def captured_plan(mixed, folder):
    """The plan such a run follows."""
    from vreflection.training import run as module

    plans = []
    original = module.plan_data

    def noted(*args, **kwargs):
        data = original(*args, **kwargs)
        plans.append(data.plan)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_data", noted)
        train(mixed.settings(f"{folder}-plan", trainer={"max_steps": 1}))
    return plans[0]


def test_changed_rows_are_noticed(mixed, caplog):
    values = mixed.settings("rows", trainer=SAVING)
    rows = json.loads((mixed.root / "rows.json").read_text())
    own = mixed.root / "own.json"
    own.write_text(json.dumps(rows))
    values["data"]["train"] = str(own)
    train(values)
    own.write_text(json.dumps(rows[:-1]))
    values["trainer"]["max_steps"] = 5
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        train({**values, "resume": True})
    assert "the usable rows are others than when" in caplog.text and "(24 then, 23 now)" in caplog.text


def test_a_signal_after_the_last_step_still_leaves_the_result(mixed):
    def last(done, total):
        if done == total:
            os.kill(os.getpid(), signal.SIGTERM)

    values = mixed.settings("late", trainer={"max_steps": 2})
    result = train(values, on_step=last)
    assert result.stopped_at is None and (mixed.root / "late" / "model.safetensors").exists()


def test_a_stopped_run_can_go_on_even_if_it_saves_models_only(mixed):
    def stop(done, total):
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    only = {**SAVING, "save_only_model": True}
    stopped = train(mixed.settings("only", trainer=only), on_step=stop)
    assert stopped.stopped_at == 2 and stopped.stop_signal == signal.SIGTERM
    resumed = train(mixed.settings("only", trainer=only, resume=True))
    assert [row["step"] for row in resumed.history if "loss" in row] == [1, 2, 3, 4]


def test_skipped_steps_have_no_loss_and_epochs_are_the_datas(mixed):
    objective = {"alignment_weight": 1e39}
    result = train(mixed.settings("inf", objective=objective, trainer={"max_steps": 3}))
    rows = [row for row in result.history if "skipped_steps" in row]
    assert rows[-1]["skipped_steps"] == 3 and not any("loss" in row for row in rows)
    epochs = train(mixed.settings("epochs", trainer={"max_steps": 4})).history
    seen = [row["epoch"] for row in epochs if "loss" in row]
    # Twelve micro-batches of these rows are an epoch or so, and a step takes four.
    assert seen[3] == pytest.approx(4 * seen[0]) and seen[3] > 1


def test_settings_of_a_checkpoint_are_readable(mixed, finished):
    written = yaml.safe_load((mixed.root / finished / "checkpoint-4" / "train_settings.yaml").read_text())
    assert written["stage"] == "stage1" and written["data"]["pack_tokens"] == 300


def test_skipped_steps_go_on_counting_after_a_resume(mixed):
    train(mixed.settings("counts", trainer={**SAVING, "max_steps": 2}))
    file = mixed.root / "counts" / "checkpoint-2" / "progress.json"
    progress = json.loads(file.read_text())
    assert progress["guard"] == {"skipped": 0, "bad_in_a_row": 0}
    file.write_text(json.dumps({**progress, "guard": {"skipped": 3, "bad_in_a_row": 1}}))
    result = train(mixed.settings("counts", trainer={**SAVING, "max_steps": 3}, resume=True))
    assert [row.get("skipped_steps") for row in result.history if "loss" in row] == [None, None, 3]
    after = json.loads((mixed.root / "counts" / "checkpoint-3" / "progress.json").read_text())
    assert after["guard"] == {"skipped": 3, "bad_in_a_row": 0}


@pytest.mark.parametrize(("view", "grid"), [("stored", [1, 4, 8]), ("shown", [1, 8, 4])])
def test_the_view_of_images_is_a_setting_that_the_run_keeps(mixed, view, grid):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.effect_noise((112, 56), 60).convert("RGB").save(mixed.root / "images" / "side.jpg", exif=tags)
    turns = [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "<lvr>\n<answer> 1 </answer>"}]
    row = {"image": "side.jpg", "conversations": turns, "bboxes": [[0.1, 0.2, 0.6, 0.7]]}
    (mixed.root / "side.json").write_text(json.dumps([row] * 2))
    rows = open_rows(mixed.root / "side.json", mixed.root / "images", image_view=view)
    clean, store = mixed.root / f"{view}.clean", mixed.root / f"store-{view}"
    write_check(clean, check_rows(rows), rows, mixed.root / "images")
    data = {"train": str(clean), "feature_store": str(store), "image_view": view}
    train(mixed.settings(f"run-{view}", data=data, trainer={"max_steps": 1}))
    (place,) = store.glob("*/*/*.safetensors")
    assert load_file(place)["grid_thw"].tolist() == grid
    (kept,) = (yaml.safe_load(path.read_text()) for path in (mixed.root / f"run-{view}").glob("*.yaml"))
    assert kept["data"]["image_view"] == view
    other = {**data, "image_view": "shown" if view == "stored" else "stored"}
    with pytest.raises(DataError, match=rf"expected images read as they were checked \({view}\)"):
        train(mixed.settings(f"other-{view}", data=other))
