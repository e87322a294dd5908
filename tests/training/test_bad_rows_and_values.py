"""What a user gets wrong in rows and settings, beyond unknown keys."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from vreflection.data.encode import LatentDataset
from vreflection.data.rows import open_rows
from vreflection.errors import CheckpointError, ConfigError, DataError
from vreflection.training.arguments import training_arguments
from vreflection.training.loader import plan_data
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build


@pytest.fixture
def settings(tiny, tmp_path):
    """Stage-1 settings over four rows; row 2 has a truncated image, row 3 a text far too long."""
    tiny.host_model().save_pretrained(tmp_path / "base")
    tiny.processor().save_pretrained(tmp_path / "base")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        path = tmp_path / "images" / f"{number}.png"
        Image.fromarray(pixels).save(path)
        if number == 1:
            path.write_bytes(path.read_bytes()[:200])
        turns = [{"from": "human", "value": "<image>\nq?" + "x" * 600 * (number == 2)}]
        turns.append({"from": "gpt", "value": "<lvr>\n<answer> a </answer>"})
        row = {"dataset": "any", "question_id": number, "image": f"{number}.png", "conversations": turns}
        rows.append({**row, "bboxes": [[0.1, 0.2, 0.6, 0.7]]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def make(**changes):
        values = {
            "stage": "stage1",
            "model": str(tmp_path / "base"),
            "output": str(tmp_path / "out"),
            "data": {
                "train": str(tmp_path / "rows.json"),
                "image_folder": str(tmp_path / "images"),
                "max_length": 300,
            },
            "latent": {"num_latent_tokens": 2},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
        return build(TrainSettings, values, "test")

    return make


def test_unusable_samples_are_dropped_named_and_counted_not_fatal(settings, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        result = run_training(settings())
    assert result.report is not None and result.report.kept == 2 and result.report.num_dropped == 2
    assert sorted(source.rsplit(":", 1)[1] for rows in result.report.dropped.values() for source in rows) == ["2", "3"]
    assert "too-long: 1" in caplog.text and "rows.json:3" in caplog.text  # found before training
    assert "row dropped (image-corrupt)" in caplog.text and "rows.json:2" in caplog.text  # only when decoded
    written = (tmp_path / "out" / "dropped_rows.jsonl").read_text()
    assert '"reason": "too-long"' in written and "rows.json:3" in written


def test_no_usable_sample_at_all(settings):
    with pytest.raises(DataError, match="none of the 4 samples is usable"):
        run_training(settings(data={"max_length": 5}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"alignment_weight": "heavy"}}, "objective.alignment_weight: expected float or NoneType"),
        ({"objective": {"stochastic_probability": "3"}}, "expected 0..1, got 3.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: expected a finite number"),
        ({"optimizer": {"learning_rate": -1.0}}, "at least 0, got -1.0"),
        ({"data": {"max_length": 0}}, "data.max_length: expected at least 1"),
        ({"data": {"image_view": "upright"}}, "data.image_view: expected shown or stored, got 'upright'"),
        ({1: 2}, "unknown keys"),
    ],
)
def test_values_are_checked_when_settings_are_built(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes) if all(isinstance(k, str) for k in changes) else build(TrainSettings, changes, "test")


def test_numbers_written_as_text_become_numbers(settings):
    made = settings(objective={"alignment_weight": "5e-1"}, trainer={"max_grad_norm": "1e-1"})
    assert made.latent_objective().alignment_weight == 0.5
    assert training_arguments(made).max_grad_norm == 0.1


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"learning_rate": 1e-3}, "under `optimizer`"),
        ({"output_dir": "x"}, "`seed` and `output` at the top level"),
        ({"max_steps": "ten"}, "max_steps: expected an integer, got 'ten'"),
        ({"lr_scheduler_type": "sideways"}, "trainer: .*sideways"),
    ],
)
def test_trainer_values_with_another_home_or_type(settings, trainer, message):
    with pytest.raises(ConfigError, match=message):
        training_arguments(settings(trainer=trainer))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optim", "adafactor", r"expected AdamW \(adamw_torch, adamw_torch_fused\), got 'adafactor'"),
        ("label_smoothing_factor", 0.1, "the loss has no smoothing"),
        ("resume_from_checkpoint", "folder", "set `resume: true`"),
        ("data_seed", 0, "set `seed`"),
        ("dataloader_drop_last", True, "every batch is planned"),
        ("neftune_noise_alpha", 5, "embeddings get no noise"),
        ("group_by_length", True, "set `data.pack_tokens`"),
        ("train_sampling_strategy", "group_by_length", "set `data.pack_tokens`"),
        ("eval_strategy", "steps", "gauges.every"),
        ("eval_steps", 5, "gauges.every"),
        ("do_eval", True, "gauges.every"),
        ("load_best_model_at_end", True, "gauges.every"),
        ("auto_find_batch_size", True, "train --plan"),
        ("torch_compile", True, "set `compile`"),
        ("torch_compile_backend", "inductor", "set `compile`"),
        ("use_liger_kernel", True, "set `fused_cross_entropy`"),
        ("fp16", True, "set `bf16: true`"),
        ("save_strategy", "epoch", "expected steps or no, got 'epoch'"),
        ("save_strategy", "best", "use steps with save_steps"),
        ("fsdp", "full_shard", "set `parallel`"),
        ("fsdp_config", {"x": 1}, "set `parallel`"),
        ("push_to_hub", True, "upload the output folder"),
    ],
)
def test_trainer_values_without_effect_are_refused(settings, name, value, message):
    with pytest.raises(ConfigError, match=f"trainer: {name}.*{message}"):
        training_arguments(settings(trainer={name: value}))


def test_trainer_values_that_say_what_is_so_anyway(settings):
    said = {"optim": "adamw_torch", "fp16": False, "eval_strategy": False, "save_strategy": False, "data_seed": None}
    said |= {"label_smoothing_factor": 0, "report_to": None, "disable_tqdm": False}
    made = training_arguments(settings(trainer=said))
    assert (made.save_strategy, made.eval_strategy, made.report_to, made.disable_tqdm) == ("no", "no", [], False)


def test_one_progress_bar(settings):
    plain = settings()
    del plain.trainer["disable_tqdm"]
    assert training_arguments(plain).disable_tqdm is True


def test_a_held_out_row_never_stands_in_for_an_empty_batch(tiny, settings, tmp_path):
    made = settings(data={"held_out": 1, "max_length": 3000})
    rows = open_rows(made.data.train, made.data.image_folder)
    dataset = LatentDataset(rows, tiny.processor(), num_latents=2, max_length=3000, skip_unusable=True)
    data = plan_data(dataset, made.data, 1, 0, tmp_path / "out")
    trained = data.plan.indices.tolist()
    assert len(trained) == 3 and not set(trained) & set(data.held_out)
    for row in trained:
        (tmp_path / "images" / f"{row}.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 3 samples is usable"):
        dataset.__getitems__([trained[0]])


def test_resume_and_image_folder_name_their_flags(settings):
    with pytest.raises(CheckpointError, match="resume: expected a trainer checkpoint"):
        run_training(settings(resume=True))
    with pytest.raises(ConfigError, match="--set data.image_folder="):
        run_training(settings(data={"image_folder": "nowhere"}))
