"""Two real processes give what one gives, whatever shares the work; what goes wrong in one is decided by both."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build

SAVING = {"save_strategy": "steps", "save_steps": 2}
FREE = {"maximum": 0.6, "start": 0.0, "end": 0.0}
THROUGH = {"maximum": 0.6, "start": 0.0, "end": 0.0, "backpropagate": True}
JOBS = Path(__file__).with_name("jobs.py")


def launch(jobs, root, name, processes=2):
    """Start processes that share the jobs."""
    file = root / f"{name}-jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, str(JOBS), str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def outcome(root, name, rank=0):
    return json.loads((root / f"{name}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def hops(mixed):
    """Rows with none to four boxes, and text between some spans."""
    rows = json.loads((mixed.root / "rows.json").read_text())
    for number, row in enumerate(rows):
        count = len(row.get("bboxes", [])) * (1 + number % 4)
        if count:
            row["bboxes"] = [[0.1 * place, 0.2, 0.6, 0.7] for place in range(count)]
            spans = "".join("<lvr>" + "so " * (place % 2) for place in range(count))
            row["conversations"][1]["value"] = f"{spans}\n<answer> {number} </answer>"
    (mixed.root / "hops.json").write_text(json.dumps(rows))
    return {"train": str(mixed.root / "hops.json"), "held_out": str(mixed.root / "hops.json")}


@pytest.fixture(scope="module")
def one(mixed, hops):
    """One process: four micro-batches a step."""
    plain = run_training(build(TrainSettings, mixed.settings("one", trainer=SAVING), "one"))
    free = run_training(build(TrainSettings, mixed.settings("one-free", free_running=FREE), "one"))
    several = {
        name: run_training(
            build(
                TrainSettings,
                mixed.settings(f"one-{name}", data=hops, free_running=settings, gauges={"every": every}),
                "one",
            )
        )
        for name, settings, every in (("hops", FREE, 2), ("through", THROUGH, 0))
    }
    return {"plain": plain, "free": free, **several}


@pytest.fixture(scope="module")
def two(mixed, hops, one):
    """Two processes: two micro-batches a step each. Returns the names of their jobs."""
    half = {"gradient_accumulation_steps": 2}
    jobs = {"ddp-through": mixed.settings("ddp-through", data=hops, trainer=half, free_running=THROUGH)}
    for way in ("ddp", "fsdp2"):
        jobs[way] = mixed.settings(way, parallel=way, trainer=half | SAVING)
        jobs[f"{way}-free"] = mixed.settings(
            f"{way}-free", parallel=way, free_running=FREE, trainer=half | {"gradient_checkpointing": True}
        )
        jobs[f"{way}-hops"] = mixed.settings(
            f"{way}-hops", parallel=way, data=hops, trainer=half, free_running=FREE, gauges={"every": 2}
        )
    jobs["stage2"] = mixed.settings(
        "stage2", stage="stage2", model=str(mixed.root / "one"), latent={}, parallel="fsdp2", trainer=half
    )
    listed = [{"name": name, "settings": settings} for name, settings in jobs.items()]
    # Each goes on from the other's checkpoint, and the fsdp2 one from a single process's.
    for name, source, way in (("to-fsdp2", "ddp", "fsdp2"), ("to-ddp", "fsdp2", "ddp"), ("from-one", "one", "fsdp2")):
        settings = mixed.settings(name, parallel=way, trainer=half | SAVING, resume=True)
        listed.append({"name": name, "settings": settings, "from": f"{source}/checkpoint-2"})
    image = str((mixed.root / "images" / "5.png").resolve())
    for name, most in (("nan", 5), ("nan-abort", 1)):
        settings = mixed.settings(name, trainer=half | {"max_steps": 5}, safety={"max_bad_steps": most})
        listed.append({"name": name, "settings": settings, "broken_image": image})
    process = launch(listed, mixed.root, "two")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return listed


def compare(one, root, name):
    expected = [row["loss"] for row in one.history if "loss" in row]
    assert outcome(root, name).get("error") is None
    assert outcome(root, name)["losses"] == pytest.approx(expected, rel=1e-5)
    stored, weights = load_file(root / name / "model.safetensors"), one.model.state_dict()
    for key, value in stored.items():
        torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_equal_one(one, two, mixed, way):
    compare(one["plain"], mixed.root, way)
    logged = outcome(mixed.root, way)["rows"]
    for row, alone in zip(logged, (row for row in one["plain"].history if "loss" in row)):
        assert row["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-5)
        assert row["latent_alignment"] == pytest.approx(alone["latent_alignment"], rel=1e-5)
    assert json.loads((mixed.root / way / "config.json").read_text())["architectures"] == [
        "VReflectionForConditionalGeneration"
    ]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_free_running_with_checkpointed_layers(one, two, mixed, way):
    compare(one["free"], mixed.root, f"{way}-free")
    assert one["free"].history[2]["loss"] != one["plain"].history[2]["loss"]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_free_running_over_rows_with_different_numbers_of_spans(one, two, mixed, way):
    compare(one["hops"], mixed.root, f"{way}-hops")
    alone = [row for row in one["hops"].history if "eval_answer_loss" in row]
    gauges = outcome(mixed.root, f"{way}-hops")["gauges"]
    assert [row["step"] for row in gauges] == [row["step"] for row in alone] == [0, 2, 4]
    for row, expected in zip(gauges, alone):
        assert row.keys() == expected.keys() and "eval_swapped_accuracy_3_spans" in row
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_gradient_through_fed_back_states_over_two_processes(one, two, mixed):
    compare(one["through"], mixed.root, "ddp-through")
    norms = [next(row for row in one[n].history if "loss" in row)["grad_norm"] for n in ("through", "hops")]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("name", ["to-fsdp2", "to-ddp", "from-one"])
def test_a_checkpoint_of_one_layout_goes_on_under_another(one, two, mixed, name):
    compare(one["plain"], mixed.root, name)


def test_stage_2_over_two_processes(one, two, mixed):
    settings = mixed.settings("stage2-one", stage="stage2", model=str(mixed.root / "one"), latent={})
    compare(run_training(build(TrainSettings, settings, "test")), mixed.root, "stage2")


def test_a_value_that_is_not_finite_on_one_process_skips_the_step_on_both(two, mixed):
    logs = [outcome(mixed.root, "nan", rank)["log"] for rank in range(2)]
    named = [line for log in logs for line in log if "skipped: the loss is not finite" in line]
    assert named and all("rows.json:6" in line for line in named)
    weights = load_file(mixed.root / "nan" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    rows = outcome(mixed.root, "nan")["rows"]
    # A skipped step's row has no loss.
    assert max(row.get("skipped_steps", 0) for row in rows) == len(named) == sum("loss" not in row for row in rows) < 5


def test_the_run_ends_after_too_many_of_them(two, mixed):
    for rank in range(2):
        error = outcome(mixed.root, "nan-abort", rank)["error"]
        assert error.startswith("TrainingError: 1 steps in a row had a loss or gradient that is not finite")


def test_a_killed_process_ends_the_job_with_a_clear_message(mixed):
    settings = mixed.settings(
        "killed",
        trainer={"gradient_accumulation_steps": 2, "max_steps": 500, "save_strategy": "steps", "save_steps": 3},
    )
    process = launch([{"name": "killed", "settings": settings, "pause": 0.05}], mixed.root, "killed")
    victim, seen = None, []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("pid") and line.endswith("step 5\n"):
            victim = int(line.split()[1])
            break
    assert victim is not None, "".join(seen)[-3000:]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    rest, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "Signal 9 (SIGKILL)" in rest
    assert (mixed.root / "killed" / "checkpoint-3").is_dir()
    survivor = list(mixed.root.glob("killed.?.json"))
    if survivor:  # unless the launcher ended it before it noticed
        error = json.loads(survivor[0].read_text())["error"]
        assert "another process of this job ended" in error and "go on with --resume" in error
