"""Real, tiny training runs of every stage, from a Visual-CoT file to a checkpoint that loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.errors import CheckpointError, ConfigError, DataError
from vreflection.losses import stochastic_side
from vreflection.model.modeling import VReflectionForConditionalGeneration as Model
from vreflection.model.processor import VReflectionProcessor
from vreflection.training.arguments import parameter_groups, training_arguments
from vreflection.training.run import run_training
from vreflection.training.settings import OptimizerSettings, TrainSettings
from vreflection.training.values import build

COLOURS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory):
    """A base model with its processor, four images, and rows with one and two spans."""
    root = tmp_path_factory.mktemp("training")
    tiny.host_model().save_pretrained(root / "base")
    tiny.processor().save_pretrained(root / "base")
    (root / "images" / "notes").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for number, colour in enumerate(COLOURS):
        pixels = rng.integers(0, 256, (56, 28 * (2 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / "notes" / f"{number}.png")
        spans = 1 + number % 2
        rows.append(
            {
                "dataset": "notes",
                "question_id": number,
                "image": f"notes/{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nq?"},
                    {"from": "gpt", "value": "<lvr>\n" * spans + f"<answer> {colour} </answer>"},
                ],
                "bboxes": [[0.1, 0.2, 0.6, 0.7], [0.5, 0.0, 1.0, 0.5]][:spans],
            }
        )
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def settings(workplace):
    def make(stage, folder, **changes):
        values = {
            "stage": stage,
            "model": str(workplace / "base"),
            "output": str(workplace / folder),
            "data": {"train": str(workplace / "rows.json"), "image_folder": str(workplace / "images")},
            "latent": {"num_latent_tokens": 3, "resampler_num_heads": 2, "query_init_std": 0.5},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
            "trainer": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
        return build(TrainSettings, values, "test")

    return make


@pytest.fixture(scope="module")
def stage1(settings):
    return run_training(settings("stage1", "one"))


@pytest.fixture(scope="module")
def stage2(settings, stage1, workplace):
    return run_training(settings("stage2", "two", model=str(workplace / "one"), latent={}))


def logged(result):
    return [row for row in result.history if "loss" in row]


def equal_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def changed(before, after):
    after = after.state_dict()
    return {
        name for name, value in before.state_dict().items() if name in after and not torch.equal(value, after[name])
    }


def test_stage_1(stage1, workplace):
    rows = logged(stage1)
    assert len(rows) == 3 and stage1.report.kept == 4 and stage1.seconds_per_step > 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["latent_alignment"], abs=2e-3)
        assert row["teacher_std_over_samples"] > 0 and row["teacher_query_diversity"] > 0
        assert "latent_mse" not in row and "student_std_over_samples" not in row
    assert rows[2]["loss"] < rows[0]["loss"]
    loaded = Model.from_pretrained(workplace / "one", expect_stage="stage1")
    assert equal_weights(loaded, stage1.model) and loaded.config.num_latent_tokens == 3
    base = Model.from_pretrained(workplace / "base")
    moved = changed(base, loaded)
    assert "lm_head.weight" in moved and "model.language_model.embed_tokens.weight" in moved
    assert not any("visual" in name for name in moved)


def test_stage_2(stage1, stage2, workplace):
    for row in logged(stage2):
        total = row["cross_entropy"] + row["latent_mse"] + row["attention_kl"]
        assert row["loss"] == pytest.approx(total, abs=2e-3)
        assert row["teacher_std_over_samples"] > 0 and row["student_std_over_samples"] > 0
    loaded = Model.from_pretrained(workplace / "two", expect_stage="stage2")
    assert equal_weights(loaded, stage2.model)
    moved = changed(Model.from_pretrained(workplace / "one"), loaded)
    assert moved and not any(name.startswith("box_feature_resampler") or "visual" in name for name in moved)


def test_what_is_saved_can_be_used_alone(stage2, workplace, tiny):
    processor = VReflectionProcessor.from_pretrained(workplace / "two")
    model = Model.from_pretrained(workplace / "two").eval()
    assert processor.token_ids.lvr == model.config.lvr_id == tiny.LVR
    batch = processor([Image.open(workplace / "images" / "notes" / "0.png")], ["q?"])
    output = model.generate(
        **batch, force_latent=True, max_new_tokens=3, return_dict_in_generate=True, return_latents=True
    )
    assert output.latents[0].shape[1:] == (3, tiny.WIDTH)
    written = (workplace / "two" / "train_settings.yaml").read_text()
    assert "stage: stage2" in written and str(workplace / "one") in written


@pytest.mark.parametrize("stage", ["sft", "boundary", "filler"])
def test_control_arms(settings, workplace, stage):
    result = run_training(settings(stage, f"arm-{stage}"))
    for row in logged(result):
        assert row["loss"] == pytest.approx(row["cross_entropy"], abs=1e-4)
        assert not any(name.startswith(("latent", "teacher", "student", "attention")) for name in row)
    assert logged(result)[-1]["loss"] < logged(result)[0]["loss"]
    assert equal_weights(Model.from_pretrained(workplace / f"arm-{stage}", expect_stage=stage), result.model)


def test_the_same_seed_gives_the_same_weights(settings, stage1, workplace):
    again = run_training(settings("stage1", "again"))
    assert equal_weights(stage1.model, again.model)
    assert [row["loss"] for row in logged(again)] == [row["loss"] for row in logged(stage1)]
    other = run_training(settings("stage1", "other", seed=1, trainer={"max_steps": 1}))
    assert not torch.equal(other.model.box_feature_resampler.queries, again.model.box_feature_resampler.queries)


def test_resuming_gives_the_weights_of_one_run(settings, workplace):
    steps = {
        "trainer": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        "free_running": {"maximum": 0.5, "start": 0},
    }
    whole = run_training(settings("stage1", "whole", **steps))
    assert (workplace / "whole" / "checkpoint-2").is_dir()
    (workplace / "half").mkdir()
    shutil.copytree(workplace / "whole" / "checkpoint-2", workplace / "half" / "checkpoint-2")
    resumed = run_training(settings("stage1", "half", resume=True, **steps))
    assert equal_weights(whole.model, resumed.model)


def test_free_running_takes_part(settings, stage1):
    free = run_training(settings("stage1", "free", free_running={"maximum": 1.0, "start": 0.0, "end": 0.0}))
    late = run_training(settings("stage1", "late", free_running={"maximum": 1.0, "start": 0.2, "end": 0.2}))
    first, second, third = (logged(result)[:2] for result in (free, late, stage1))
    assert first[0]["loss"] != third[0]["loss"] and second[0]["loss"] == third[0]["loss"]
    assert second[1]["loss"] != third[1]["loss"]
    assert not equal_weights(free.model, stage1.model)
    filler = settings("filler", "filler-free", free_running={"maximum": 1.0, "start": 0.0, "end": 0.0})
    assert run_training(filler).history  # no states to feed: the curriculum stays off


def test_feedback_without_supervision_of_the_boxes(settings):
    """Free from the first step and no alignment: only the gradient through the states reaches what makes them."""
    change = {"objective": {"alignment_weight": 0.0}, "trainer": {"max_steps": 2}}
    chain = {"maximum": 1.0, "start": 0.0, "end": 0.0, "backpropagate": True}
    through = run_training(settings("stage1", "chain", free_running=chain, **change))
    fixed = run_training(settings("stage1", "no_chain", free_running={**chain, "backpropagate": False}, **change))
    rows = [logged(result) for result in (through, fixed)]
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"]) == pytest.approx(rows[0][0]["cross_entropy"])
    assert rows[0][0]["grad_norm"] != pytest.approx(rows[1][0]["grad_norm"], rel=1e-3)
    assert not equal_weights(through.model, fixed.model)
    teachers = [result.model.box_feature_resampler.queries for result in (through, fixed)]
    assert torch.equal(*teachers)  # which takes no part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": "fsdp2"}, "free_running.backpropagate: expected parallel=ddp .* got 'fsdp2'"),
        ({"trainer": {"gradient_checkpointing": True}}, "free_running.backpropagate: .* gradient checkpointing drops"),
    ],
)
def test_backpropagation_is_refused_where_it_cannot_work(settings, change, message):
    free = {"maximum": 1.0, "start": 0.0, "end": 0.0, "backpropagate": True}
    with pytest.raises(ConfigError, match=message):
        run_training(settings("stage1", "refused", free_running=free, **change))


def test_gradient_checkpointing_trains_the_same(settings, stage1):
    saved = run_training(settings("stage1", "saved", trainer={"gradient_checkpointing": True}))
    for ours, theirs in zip(saved.model.parameters(), stage1.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_cached_features_train_the_same(settings, stage1, workplace):
    from vreflection.data.images import open_image
    from vreflection.data.visual_cot import read_visual_cot

    samples, _ = read_visual_cot(workplace / "rows.json", workplace / "images")
    processor = VReflectionProcessor.from_pretrained(workplace / "base")
    base, cache = Model.from_pretrained(workplace / "base"), {}
    for sample in samples:
        made = processor.process_images([open_image(sample.image_paths[0])])
        with torch.no_grad():
            cache[sample.image_paths[0]] = (base.visual_tokens(**made), made["image_grid_thw"][0])
    for path in (workplace / "images").rglob("*.png"):
        assert str(path) in cache
    cached = run_training(settings("stage1", "cached"), samples=samples, feature_cache=cache)
    assert cached.report is None
    assert [r["loss"] for r in logged(cached)] == pytest.approx([r["loss"] for r in logged(stage1)], abs=1e-4)


def test_one_step_per_call_of_the_callback(settings):
    heard = []
    run_training(
        settings("sft", "heard", trainer={"max_steps": 2}), on_step=lambda done, total: heard.append((done, total))
    )
    assert heard == [(1, 2), (2, 2)]


def test_stage_2_needs_a_stage_1_checkpoint(settings, workplace, stage1):
    with pytest.raises(CheckpointError, match="stage 2 starts from a stage-1 checkpoint, got none; --set model="):
        run_training(settings("stage2", "x", model=""))
    run_training(settings("sft", "sft-start", trainer={"max_steps": 1}))
    for start, stage in (("base", "base"), ("sft-start", "sft")):
        with pytest.raises(CheckpointError, match=f"got one of stage '{stage}'.*--set model=<stage-1 folder>"):
            run_training(settings("stage2", "x", model=str(workplace / start)))
    with pytest.raises(ConfigError, match="num_latent_tokens: the stage-1 teacher was trained with 3, got 4"):
        run_training(settings("stage2", "x", model=str(workplace / "one"), latent={"num_latent_tokens": 4}))
    assert not (workplace / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model: expected a base model folder or hub id"),
        ({"output": ""}, "output: expected a folder"),
        ({"data": {"train": ""}}, "data.train: expected a training file"),
    ],
)
def test_what_is_missing_is_named_with_its_flag(settings, change, message):
    with pytest.raises(ConfigError, match=f"{message}.*--set {message.split(':')[0]}=<"):
        run_training(settings("stage1", "x", **change))


def test_rows_that_are_all_unusable(settings, workplace):
    rows = json.loads((workplace / "rows.json").read_text())
    rows[0]["bboxes"] = [[0.5, 0.5, 0.2, 0.9]]
    rows[1]["bboxes"] = []
    (workplace / "bad.json").write_text(json.dumps(rows[:2]))
    with pytest.raises(
        DataError,
        match=r"none of the 2 samples is usable: 0 rows kept, 2 dropped(.|\n)*box-count: 1(.|\n)*box-inverted: 1",
    ):
        run_training(settings("stage1", "x", data={"train": str(workplace / "bad.json")}))
    rows[2]["bboxes"] = rows[2]["bboxes"][:1]
    (workplace / "bad.json").write_text(json.dumps(rows))
    result = run_training(
        settings("stage1", "some", data={"train": str(workplace / "bad.json")}, trainer={"max_steps": 1})
    )
    assert result.report.kept == 2 and result.report.num_dropped == 2


def test_rates_and_decay_per_parameter(tiny):
    model = tiny.model("stage2", tie=True)
    model.box_feature_resampler.requires_grad_(True)
    rates = OptimizerSettings(1.0, teacher_learning_rate=2.0, student_learning_rate=3.0, weight_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in parameter_groups(model, rates) for p in g["params"]}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        expected = {"box_feature_resampler": 2.0, "student_resampler": 3.0}.get(name.split(".")[0], 1.0)
        assert rate == expected, name
        plain = name.endswith(("bias", "queries")) or "norm" in name
        assert decay == (0.0 if plain else 0.5), name
    assert found["box_feature_resampler.queries"] == (2.0, 0.0)
    assert found["box_feature_resampler.cross_attn.in_proj_weight"] == (2.0, 0.5)
    assert found["student_resampler.cross_attn.in_proj_bias"] == (3.0, 0.0)
    same = parameter_groups(model, OptimizerSettings(1.0, teacher_learning_rate=0.0))
    assert {g["lr"] for g in same} == {0.0, 1.0}  # zero is a rate, not "none given"


def test_trainer_arguments(settings):
    made = training_arguments(settings("stage1", "x", seed=7, trainer={"adam_beta2": 0.95}))
    assert (made.seed, made.learning_rate, made.weight_decay, made.adam_beta2) == (7, 1e-3, 0.01, 0.95)
    assert made.remove_unused_columns is False and made.label_names == ["labels"]
    with pytest.raises(ConfigError, match=r"trainer: unknown keys \['max_step'\]"):
        training_arguments(settings("stage1", "x", trainer={"max_step": 3}))
    with pytest.raises(ConfigError, match=r"\['seed'\] have another home: `seed` and `output` at the top level"):
        training_arguments(settings("stage1", "x", trainer={"seed": 3}))


def test_stochastic_alignment_goes_by_the_step(settings, workplace):
    seed = next(n for n in range(99) if [stochastic_side(n, step, 0.5) for step in range(3)] == [True, True, False])
    teachers = []
    for steps in (1, 2, 3):  # only the third step's gradient goes to the teacher
        torch.manual_seed(0)
        change = {"objective": {"alignment": "stochastic", "alignment_seed": seed}, "trainer": {"max_steps": steps}}
        teachers.append(run_training(settings("stage1", "stochastic", **change)).model.box_feature_resampler.queries)
    assert torch.equal(teachers[0], teachers[1]) and not torch.equal(teachers[1], teachers[2])


def test_free_running_encodes_each_image_once_a_step(settings, monkeypatch):
    calls, original = [], Model.visual_tokens
    monkeypatch.setattr(Model, "visual_tokens", lambda self, *args: calls.append(1) or original(self, *args))
    run_training(settings("stage1", "encode_once", free_running={"maximum": 1.0, "start": 0.0, "end": 0.0}))
    assert len(calls) == 3
