"""Real kills and real full disks: nothing half-written, and a run that goes on as if nothing had happened."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vreflection.errors import CheckpointError, TrainingError
from vreflection.training.checkpoints import checkpoints_in
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build

JOBS = Path(__file__).with_name("jobs.py")
# Everything that draws: shuffles, stochastic alignment, free running, adapters' dropout.
DRAWS = {
    "objective": {"alignment": "stochastic"},
    "free_running": {"maximum": 0.5, "start": 0.0, "end": 0.5},
    "lora": {"rank": 2, "dropout": 0.2},
    "optimizer": {"learning_rate": 1e-3, "teacher_learning_rate": 1e-2},
}
TWENTY = {"max_steps": 20, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 3}


def train(values):
    return run_training(build(TrainSettings, values, "test"))


def start(job, root):
    file = root / f"{job['name']}-jobs.json"
    file.write_text(json.dumps([job]))
    return subprocess.Popen(
        [sys.executable, str(JOBS), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(process, step):
    for line in process.stdout:
        if line.endswith(f"step {step}\n"):
            return
    raise AssertionError(f"ended with {process.wait()} before step {step}")


def logged(result):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in result.history if "loss" in row]


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_killed_at_a_random_moment_and_resumed_every_loss_is_the_same_bit_for_bit(mixed, kind):
    changes = {**DRAWS, "trainer": TWENTY, "data": {"pack_tokens": 120}}
    if kind == "full":
        changes["lora"] = {}
    whole = train(mixed.settings(f"whole-{kind}", **changes))
    values = mixed.settings(f"killed-{kind}", **changes)
    root = mixed.root / f"killed-{kind}"
    process = start({"name": f"killed-{kind}", "settings": values, "pause": 0.02}, mixed.root)
    draw = random.Random(time.time_ns())
    step, delay = draw.randint(4, 16), draw.random() * 0.2
    wait_for_step(process, step)
    time.sleep(delay)  # between steps, or in the middle of one, or of a checkpoint
    process.kill()
    assert process.wait() == -signal.SIGKILL
    moment = f"killed {delay:.3f} s after step {step}"
    assert checkpoints_in(root), moment
    resumed = train({**values, "resume": True})
    assert logged(resumed) == logged(whole), moment
    assert [row[0] for row in logged(whole)] == list(range(1, 21))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), (name, moment)
    assert not list(root.glob(".checkpoint*")), moment


def test_sigterm_saves_and_ends_well(mixed):
    command = mixed.settings("term", trainer={**TWENTY, "max_steps": 2000, "save_steps": 1000})
    file = mixed.root / "term.yaml"
    file.write_text(json.dumps(command))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, "-m", "vreflection", "train", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if "packing fills" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    (saved,) = checkpoints_in(mixed.root / "term")
    step = int(saved.name.partition("-")[2])
    assert 0 < step < 2000
    assert f"stopped at step {step}; the same command with --resume goes on from there" in rest
    assert not (mixed.root / "term" / "model.safetensors").exists()  # not a finished run
    more = mixed.settings("term", trainer={**TWENTY, "max_steps": step + 1, "save_strategy": "no"}, resume=True)
    assert [row[0] for row in logged(train(more))][-2:] == [step, step + 1]


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(mixed, caplog):
    """A limit on file size stands in for the disk: writes fail half way, as they do on a full one."""
    from transformers import TrainerCallback

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            full = state.global_step in (3, 4, 5)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else before[0], before[1]))

    values = mixed.settings("disk", trainer={**TWENTY, "max_steps": 8, "save_steps": 2, "save_total_limit": 3})
    try:
        result = run_training(build(TrainSettings, values, "test"), callbacks=[FillDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in checkpoints_in(mixed.root / "disk")] == [
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
    ]
    (line,) = [record.getMessage() for record in caplog.records if "could not be saved" in record.getMessage()]
    assert "checkpoint-4 could not be saved" in line and "Kept: ['checkpoint-2']" in line and "GiB free" in line
    assert not list((mixed.root / "disk").glob(".*")) and len(logged(result)) == 8
    again = train({**values, "resume": True})  # finished already: nothing left to do, and nothing lost
    assert logged(again) == logged(result)


def test_old_checkpoints_go_only_when_a_new_one_is_whole(mixed):
    train(mixed.settings("keep", trainer={**TWENTY, "max_steps": 9, "save_steps": 2, "save_total_limit": 2}))
    assert [path.name for path in checkpoints_in(mixed.root / "keep")] == ["checkpoint-8", "checkpoint-9"]


def test_a_checkpoint_is_a_model_of_its_own(mixed):
    from vreflection.model.modeling import VReflectionForConditionalGeneration
    from vreflection.model.processor import VReflectionProcessor

    trainer = {**TWENTY, "max_steps": 2, "save_steps": 2, "save_only_model": True}
    result = train(mixed.settings("light", trainer=trainer))
    folder = mixed.root / "light" / "checkpoint-2"
    model = VReflectionForConditionalGeneration.from_pretrained(folder, expect_stage="stage1")
    for name, value in model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name])
    assert VReflectionProcessor.from_pretrained(folder).token_ids.lvr == model.config.lvr_id
    assert not (folder / "optimizer").exists()
    with pytest.raises(CheckpointError, match=r"lacks \['scheduler.pt', 'optimizer'\]; was it copied in part"):
        train(mixed.settings("light", trainer=trainer, resume=True))


def test_a_result_that_cannot_be_saved_leaves_what_was_there(mixed):
    values = mixed.settings("result", trainer={**TWENTY, "max_steps": 2, "save_strategy": "no"})
    train(values)
    before = (mixed.root / "result" / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match="its result could not be saved.*no checkpoint was asked for"):
            train({**values, "seed": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (mixed.root / "result" / "model.safetensors").read_bytes() == before
