"""The held-out probe tells a working model from collapsed ones, and leaves training alone."""

import logging

import pytest
import torch

from vreflection.training.probe import collapse_signs
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build

GOOD = {
    "answer_loss": 0.2, "answer_accuracy": 0.9, "free_running_loss": 0.3, "free_running_accuracy": 0.85,
    "swapped_loss": 2.5, "swapped_accuracy": 0.2, "lvr_end_rate": 1.0, "std_over_samples": 0.9, "query_diversity": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"std_over_samples": 0.09}, "hardly differ between images"),
        ({"query_diversity": 0.01}, "all alike"),
        ({"swapped_loss": 0.3}, "are not used"),
        ({"free_running_accuracy": 0.4}, "50% fewer rows than with the teacher's"),
        ({"lvr_end_rate": 0.5}, "closes only 50% of the spans"),
    ],
)
def test_signs(change, sign):
    assert collapse_signs(GOOD) == []
    (found,) = collapse_signs({**GOOD, **change})
    assert sign in found
    early = collapse_signs({**GOOD, **change}, progress=0.1)
    assert bool(early) == ("std" in next(iter(change)) or "diversity" in next(iter(change)))


def train(values):
    return run_training(build(TrainSettings, values, "test"))


def test_it_measures_on_rows_kept_out_and_changes_no_step(mixed, caplog):
    changes = {"data": {"held_out": 6}, "optimizer": {"learning_rate": 1e-2}}
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        probed = train(mixed.settings("probed", gauges={"every": 3}, **changes))
    plain = train(mixed.settings("unprobed", **changes))
    rows = [row for row in probed.history if "eval_answer_loss" in row]
    assert [row["step"] for row in rows] == [3, 4]
    names = {f"eval_{name}" for name in GOOD}
    assert names <= set(rows[0])
    losses = [[row["loss"] for row in result.history if "loss" in row] for result in (probed, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, probed.model.state_dict()[name])


def test_a_teacher_made_to_collapse_is_noticed(mixed, caplog):
    latent = {"num_latent_tokens": 3, "resampler_num_heads": 2, "query_init_std": 1e-6}
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        train(mixed.settings("collapsed", latent=latent, data={"held_out": 6}, gauges={"every": 2}))
    assert "the latents of a box are all alike" in caplog.text


@pytest.mark.parametrize("stage", ["sft", "filler", "filler_aligned", "boundary"])
def test_controls_have_answers_only(mixed, stage):
    result = train(mixed.settings(f"probe-{stage}", stage=stage, data={"held_out": 6}, gauges={"every": 4}))
    (row,) = [row for row in result.history if "eval_answer_loss" in row]
    assert not any("free_running" in name or "swapped" in name for name in row)


def test_rows_of_another_file(mixed):
    held_out = str(mixed.root / "rows.json")
    result = train(mixed.settings("held-file", data={"held_out": held_out}, gauges={"every": 4}))
    assert any("eval_answer_loss" in row for row in result.history)
