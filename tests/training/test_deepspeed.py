"""DeepSpeed's ZeRO gives what one process gives, or is refused. Needs DeepSpeed, which is no dependency."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vreflection.errors import ConfigError
from vreflection.training.parallel import resolve_parallel
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build
from vreflection.training.zero import GradientOrder, check_deepspeed_config, poisoned

JOBS = Path(__file__).with_name("jobs.py")
CONFIGS = Path(__file__).parents[2] / "configs"
SAVING = {"save_strategy": "steps", "save_steps": 2}
WAYS = ("zero1", "zero2", "zero3")
HALF = {"gradient_accumulation_steps": 2}
FREE = {"maximum": 0.6, "start": 0.0, "end": 0.0}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed not installed")


def launch(jobs, root, name):
    file = root / f"{name}-jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(JOBS), str(file)], capture_output=True, text=True, env=environment, timeout=400
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def outcome(root, name, rank=0):
    return json.loads((root / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def one(mixed):
    plain = run_training(build(TrainSettings, mixed.settings("one", trainer=SAVING), "one"))
    free = run_training(build(TrainSettings, mixed.settings("one-free", free_running=FREE), "one"))
    return {"plain": plain, "free": free}


@pytest.fixture(scope="module")
def two(mixed, one):
    listed = []

    def job(name, way, trainer=None, source=None, broken=False, plain_fused=False, **changes):
        trainer = {**HALF, **({"deepspeed": nothing_kept} if way == "zero3" else {}), **(trainer or {})}
        settings = mixed.settings(name, parallel=way, trainer=trainer, **changes)
        listed.append({"name": name, "settings": settings, "plain_fused": plain_fused})
        if source:
            listed[-1]["from"] = source
        if broken:
            listed[-1]["broken_image"] = str((mixed.root / "images" / "5.png").resolve())

    # Else every weight of so small a model is below the size from which DeepSpeed shards.
    nothing_kept = json.loads((CONFIGS / "deepspeed" / "zero3.json").read_text())
    nothing_kept["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 20000}
    buckets = json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text())
    # Many small buckets: which parameters share one matters too.
    buckets["zero_optimization"] |= {"reduce_bucket_size": 20000, "allgather_bucket_size": 20000}
    for way in WAYS:
        job(way, way, SAVING)
        job(f"{way}-free", way, {"gradient_checkpointing": True}, free_running=FREE)
        job(f"{way}-again", way, SAVING, source=f"{way}/checkpoint-2", resume=True)
        job(f"{way}-nan", way, {"max_steps": 5}, broken=True)
        job(f"{way}-bf16", way, {"bf16": True})
        job(f"{way}-bf16-nan", way, {"max_steps": 5, "bf16": True}, broken=True)
    job("zero3-fused", "zero3", plain_fused=True)
    job("buckets", "zero2", {"deepspeed": buckets})
    for way in ("zero2", "zero3"):
        job(f"{way}-stage2", way, stage="stage2", model=str(mixed.root / "one"), latent={})
    job("abort", "zero2", broken=True, safety={"max_bad_steps": 1})
    job("other-stage", "zero2", SAVING, source="zero1/checkpoint-2", resume=True)
    job("from-one", "zero2", SAVING, source="one/checkpoint-2", resume=True)
    launch(listed, mixed.root, "zero")


def compare(one, root, name):
    assert outcome(root, name).get("error") is None
    expected = [row["loss"] for row in one.history if "loss" in row]
    assert outcome(root, name)["losses"] == pytest.approx(expected, rel=1e-5)
    stored, weights = load_file(root / name / "model.safetensors"), one.model.state_dict()
    for key, value in stored.items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("name", [*WAYS, "buckets", "zero3-fused", *(f"{way}-again" for way in WAYS)])
def test_two_processes_equal_one(one, two, mixed, name):
    compare(one["plain"], mixed.root, name)


@needs_deepspeed
@pytest.mark.parametrize("name", WAYS)
def test_weights_are_sharded_where_the_stage_shards_them(two, mixed, name):
    """And what only some processes run is whole on all."""
    for rank in range(2):
        held = outcome(mixed.root, name, rank)["held"]
        assert held["layers"] == (0.0 if name == "zero3" else 1.0)
        assert held["visual"] == held["box_feature_resampler"] == 1.0


@needs_deepspeed
@pytest.mark.parametrize("way", WAYS)
def test_free_running_with_checkpointed_layers(one, two, mixed, way):
    compare(one["free"], mixed.root, f"{way}-free")


@needs_deepspeed
@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_stage_2(one, two, mixed, way):
    settings = mixed.settings(f"{way}-stage2-one", stage="stage2", model=str(mixed.root / "one"), latent={})
    compare(run_training(build(TrainSettings, settings, "test")), mixed.root, f"{way}-stage2")


@needs_deepspeed
@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_stays_close(one, two, mixed, way):
    expected = [row["loss"] for row in one["plain"].history if "loss" in row]
    assert outcome(mixed.root, f"{way}-bf16")["losses"] == pytest.approx(expected, rel=0.03)


@needs_deepspeed
@pytest.mark.parametrize("name", [f"{way}{kind}" for way in WAYS for kind in ("-nan", "-bf16-nan")])
def test_a_value_that_is_not_finite_on_one_process_skips_the_step_on_both(two, mixed, name):
    outcomes = [outcome(mixed.root, name, rank) for rank in range(2)]
    named = [line for found in outcomes for line in found["log"] if "skipped: the loss is not finite" in line]
    assert named and all("rows.json:6" in line for line in named)
    weights = load_file(mixed.root / name / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    rows = outcomes[0]["rows"]
    assert max(row.get("skipped_steps", 0) for row in rows) == len(named) < 5
    losses = [row["loss"] for row in rows if "loss" in row]  # a skipped step's row has none
    assert 0 < losses[-1] < losses[0]
    # The schedule counts skipped steps, as it does without DeepSpeed.
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


@needs_deepspeed
def test_what_cannot_go_on_is_refused(two, mixed):
    assert "expected zero1 over 2 processes" in outcome(mixed.root, "other-stage")["error"]
    assert "made without DeepSpeed" in outcome(mixed.root, "from-one")["error"]


@needs_deepspeed
def test_too_many_skipped_steps_end_the_run(two, mixed):
    for rank in range(2):
        error = outcome(mixed.root, "abort", rank)["error"]
        assert error.startswith("TrainingError: 1 steps in a row had a loss or gradient that is not finite")


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    weight = torch.ones(2, requires_grad=True)
    poisoned(weight.sum()).backward()
    assert weight.grad.tolist() == [1.0, 1.0]
    poisoned(weight.sum() + math.inf).backward()
    assert weight.grad.isnan().all()


class Recorder:
    def __init__(self):
        self.taken = []

    def process_gradients(self, parameter, group):
        self.taken.append(parameter)


def test_gradients_are_handed_over_in_one_order():
    model = torch.nn.Module()
    model.model, model.box_feature_resampler = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    weight, bias, teacher = *model.model.parameters(), model.box_feature_resampler.weight
    for arrival in ([weight, bias, teacher], [teacher, weight, bias], [bias, teacher, weight]):
        recorder = Recorder()
        order = GradientOrder(recorder, model)
        for _ in range(2):
            for parameter in arrival:
                recorder.process_gradients(parameter, 0)
            order.check_empty()
        assert [id(p) for p in recorder.taken] == [id(p) for p in (bias, weight, teacher)] * 2
    recorder.process_gradients(teacher, 0)
    with pytest.raises(RuntimeError, match="1 of 3"):
        order.check_empty()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "expected zero3"),
        ({"zero_optimization": {"stage": 1}}, "expected zero1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offloading"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow"),
    ],
)
def test_other_configurations_are_refused(changes, message):
    config = json.loads((CONFIGS / "deepspeed" / "zero2.json").read_text())
    check_deepspeed_config(config, "zero2")
    with pytest.raises(ConfigError, match=message):
        check_deepspeed_config({**config, **changes}, "zero2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage3_gather_16bit_weights_on_model_save": False}, "saved whole"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size"),
        ({"offload_param": {"device": "cpu"}}, "offloading"),
    ],
)
def test_other_zero3_configurations_are_refused(changes, message):
    config = json.loads((CONFIGS / "deepspeed" / "zero3.json").read_text())
    check_deepspeed_config(config, "zero3")
    config["zero_optimization"] |= changes
    with pytest.raises(ConfigError, match=message):
        check_deepspeed_config(config, "zero3")


def test_the_launchers_configuration_decides(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(CONFIGS / "deepspeed" / "zero1.json"))
    assert resolve_parallel(TrainSettings()) == "zero1"
    with pytest.raises(ConfigError, match="expected zero1"):
        resolve_parallel(TrainSettings(parallel="zero2"))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert resolve_parallel(TrainSettings(parallel="zero3")) == "zero3"
