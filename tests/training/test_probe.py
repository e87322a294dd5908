"""The held-out probe tells a working model from collapsed ones, and leaves training alone."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from vreflection.training.probe import by_spans, collapse_signs, first_spread, other_images
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build

GOOD = {
    "answer_loss": 0.2, "answer_accuracy": 0.9, "free_running_loss": 0.3, "free_running_accuracy": 0.85,
    "swapped_loss": 2.5, "swapped_accuracy": 0.2, "swap_cost": 2.2, "lvr_end_rate": 1.0, "std_over_samples": 0.9,
    "query_diversity": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"std_over_samples": 0.09}, "hardly differ between images"),
        ({"query_diversity": 0.01}, "all alike"),
        ({"swap_cost": 0.01}, "are not used"),
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


def test_a_fall_of_the_spread_is_a_sign_whatever_its_level():
    """Values of rows with one to five boxes: the symmetric loss unlearnt the hops while the spread fell so far."""
    (sign,) = collapse_signs({**GOOD, "std_over_samples": 0.24}, 0.1, first=0.91)
    assert "spread 0.91 at first, 0.24 now" in sign
    assert "objective.alignment: llm_only" in sign and "optimizer.teacher_learning_rate" in sign
    assert collapse_signs({**GOOD, "std_over_samples": 0.24}) == []  # without a first value it is not known
    assert collapse_signs({**GOOD, "std_over_samples": 0.69}, first=0.87) == []  # the working quickstart
    assert collapse_signs({**GOOD, "std_over_samples": 0.24}, first=0.25) == []
    (sign,) = collapse_signs({**GOOD, "std_over_samples": 0.05}, first=0.87)
    assert "hardly differ between images (spread 0.05)" in sign and "llm_only" in sign
    history = [{"loss": 1.0}, {"eval_std_over_samples": 0.9, "step": 0}, {"eval_std_over_samples": 0.3, "step": 5}]
    assert first_spread(history) == 0.9 and first_spread(history[:1]) is None


def train(values):
    return run_training(build(TrainSettings, values, "test"))


def test_it_measures_on_rows_kept_out_and_changes_no_step(mixed, caplog):
    changes = {"data": {"held_out": 6}, "optimizer": {"learning_rate": 1e-2}}
    with caplog.at_level(logging.WARNING, logger="vreflection"):
        probed = train(mixed.settings("probed", gauges={"every": 3}, **changes))
    plain = train(mixed.settings("unprobed", **changes))
    rows = [row for row in probed.history if "eval_answer_loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 4]
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


def test_a_teacher_that_trains_too_fast_is_noticed_and_a_frozen_one_keeps_its_spread(mixed, caplog, monkeypatch):
    """The symmetric loss draws the teacher's latents together; `llm_only` leaves them alone."""
    monkeypatch.setattr("vreflection.training.probe.LEAST_SPREAD", 0.0)  # the fall alone gives it away
    changes = {
        "data": {"held_out": 6}, "gauges": {"every": 10},
        "trainer": {"max_steps": 20, "gradient_accumulation_steps": 2},
        "optimizer": {"learning_rate": 1e-4, "teacher_learning_rate": 3e-2},
    }  # fmt: skip
    spreads = {}
    for alignment in ("symmetric", "llm_only"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vreflection"):
            result = train(
                mixed.settings(
                    f"fast-{alignment}", objective={"alignment": alignment, "alignment_weight": 8.0}, **changes
                )
            )
        spreads[alignment] = [r["eval_std_over_samples"] for r in result.history if "eval_std_over_samples" in r]
        assert ("tells images apart (spread 0.26 at first" in caplog.text) == (alignment == "symmetric"), spreads
    assert spreads["symmetric"][-1] < 0.5 * spreads["symmetric"][0]
    assert len(set(spreads["llm_only"])) == 1  # weight decay leaves it alone, too


def test_a_resumed_run_compares_with_its_first_value(mixed, caplog):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings = {"data": {"held_out": 6}, "gauges": {"every": 2}}
    first = train(mixed.settings("went-on", trainer=saving, **settings))
    again = train(mixed.settings("went-on", trainer={**saving, "max_steps": 4}, resume=True, **settings))
    rows = [row for row in again.history if "eval_std_over_samples" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert first_spread(again.history) == first_spread(first.history) == rows[0]["eval_std_over_samples"]


@pytest.fixture(scope="module")
def chains(mixed):
    """A file of rows with one to three boxes, and one of text only."""
    rows = json.loads((mixed.root / "rows.json").read_text())
    for number, row in enumerate(rows):
        count = len(row.get("bboxes", [])) * (1 + number % 3)
        if count:
            row["bboxes"] = [[0.1 * place, 0.2, 0.5 + 0.1 * place, 0.7] for place in range(count)]
            row["conversations"][1]["value"] = "<lvr>" * count + f"\n<answer> {number} </answer>"
    (mixed.root / "chains.json").write_text(json.dumps(rows))
    return str(mixed.root / "chains.json")


def test_rows_with_several_spans_are_measured_over_all_of_them_and_by_their_number(mixed, chains):
    settings = mixed.settings("chains", data={"held_out": chains, "train": chains}, gauges={"every": 4})
    result = train(settings)
    row = [row for row in result.history if "eval_answer_loss" in row][-1]
    for kind in ("answer", "free_running", "swapped"):
        counts = {n for n in range(4) if f"eval_{kind}_accuracy_{n}_spans" in row}
        assert counts == ({0, 1, 2, 3} if kind == "answer" else {1, 2, 3})
        weights = {0: 6, 1: 6, 2: 6, 3: 6}
        mean = sum(weights[n] * row[f"eval_{kind}_accuracy_{n}_spans"] for n in counts) / sum(
            weights[n] for n in counts
        )
        assert row[f"eval_{kind}_accuracy"] == pytest.approx(mean)
    assert row["eval_swap_cost"] == pytest.approx(row["eval_swapped_loss"] - row["eval_free_running_loss"], abs=1e-5)


def test_partners_are_other_images_with_as_many_spans(tiny, mixed, chains, monkeypatch):
    """What the slots of a swapped row hold is what another image's row holds, span by span."""
    from vreflection.model.modeling import VReflectionForConditionalGeneration as Model

    fed, forward = [], Model.forward

    def noted(self, *args, **kwargs):
        if kwargs.get("slot_inputs") is not None:
            fed.append((kwargs["layout"].box_sample.tolist(), kwargs["slot_inputs"].clone()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", noted)
    train(mixed.settings("partners", data={"held_out": chains, "train": chains}, gauges={"every": 9},
                         trainer={"max_steps": 1}))  # fmt: skip
    assert len(fed) == 2 * 2 * 3  # own and swapped, before and after, per number of spans
    for (samples, own), (_, swapped) in zip(fed[::2], fed[1::2]):
        rows = samples[-1] + 1
        own, swapped = own.unflatten(0, (rows, -1)), swapped.unflatten(0, (rows, -1))
        for row in range(rows):
            (partner,) = [n for n in range(rows) if torch.equal(own[n], swapped[row])]
            assert partner == (row + 1) % rows


def test_rows_on_one_image_are_no_partners():
    def row(image, boxes):
        return SimpleNamespace(pixel_values=torch.full((4, 2), image), image_features=None, boxes=[0] * boxes)

    rows = [row(1.0, 1), row(1.0, 2), row(2.0, 1), row(1.0, 1)]
    assert other_images(rows) == [2, 2, 3, 2] and other_images(rows[:2]) == [None, None]
    assert {spans: len(group) for spans, group in by_spans(rows).items()} == {1: 3, 2: 1}


@pytest.mark.parametrize("stage", ["sft", "filler", "filler_aligned", "boundary"])
def test_controls_have_answers_only(mixed, stage):
    result = train(mixed.settings(f"probe-{stage}", stage=stage, data={"held_out": 6}, gauges={"every": 4}))
    _, row = [row for row in result.history if "eval_answer_loss" in row]
    assert not any("free_running" in name or "swapped" in name for name in row)


def test_rows_of_another_file(mixed):
    held_out = str(mixed.root / "rows.json")
    result = train(mixed.settings("held-file", data={"held_out": held_out}, gauges={"every": 4}))
    assert any("eval_answer_loss" in row for row in result.history)
