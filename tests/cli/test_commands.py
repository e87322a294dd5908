import json
import subprocess
import sys
from pathlib import Path

import pytest

from vreflection.training.config import load_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, command_line):
    monkeypatch.chdir(ROOT)
    return command_line


def test_as_a_module_in_its_own_process():
    done = subprocess.run([sys.executable, "-m", "vreflection", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "quickstart" in done.stdout


def test_info_names_versions_and_choices(run):
    done = run("info", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["versions"]["torch"].startswith("2.")
    for op in ("roi_align", "region_attention", "probe_attention", "resample", "distillation_loss"):
        assert found["choices"][op].split(";")[0] in ("torch", "cpp", "triton")
        assert "not triton: " in found["choices"][op] or found["choices"][op].startswith("triton;")
    plain = run("info")
    assert plain.returncode == 0 and "transformers" in plain.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--config", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("train", "--config", "configs/stage1_7b.yaml", "--set", "optimiser.learning_rate=1"), "unknown keys"),
        (
            ("train", "--config", "configs/stage1_7b.yaml", "--set", "model=''"),
            "expected a base model folder or hub id",
        ),
        (("train", "--config", "configs/stage2_7b.yaml", "--set", "model=''"), "--set model=<stage-1 folder>"),
        (("train", "--config", "configs/stage1_7b.yaml"), "data.train: expected a training file"),
        (("quickstart", "--set", "data.trian=3"), "unknown keys ['trian']"),
        (("quickstart", "--seeds", "one"), "expected numbers separated by commas"),
        (("quickstart", "--seeds", "1,1"), "expected different numbers from 0 on"),
        (("quickstart", "--seeds", "1", "--from-scratch"), "--from-scratch: is for a single run"),
        (("quickstart", "--out", "/dev/null/here", "--fresh"), "expected a folder that can be made"),
    ],
)
def test_bad_input_exits_2_with_one_clear_line(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["stage1_3b", "stage1_7b", "stage2_3b", "stage2_7b"])
def test_shipped_settings_load(run, name):
    settings = load_settings(ROOT / "configs" / f"{name}.yaml")
    assert settings.stage == name.split("_")[0]
    assert settings.latent_objective().alignment_weight == (0.5 if settings.stage == "stage1" else None)
    done = run("train", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--check", "--json")
    assert json.loads(done.stdout)["stage"] == settings.stage


def test_train_command_trains_from_files(run, tmp_path):
    from vreflection.quickstart.base import base_dir
    from vreflection.quickstart.tasks import TASKS, write_dataset

    rows = write_dataset(tmp_path / "data", TASKS["one_hop"], "train", 4)
    content = json.loads(rows.read_text())
    content[3]["bboxes"] = [[0.5, 0.5, 0.2, 0.9]]
    rows.write_text(json.dumps(content))
    settings = tmp_path / "stage1.yaml"
    settings.write_text(
        f"stage: stage1\nmodel: {base_dir()}\noutput: {tmp_path / 'out'}\n"
        f"data: {{train: {rows}, image_folder: {tmp_path / 'data' / 'images'}}}\n"
        "trainer: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}\n"
    )
    done = run("train", "--config", str(settings), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows_dropped"] == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    refused = run("train", "--config", str(settings), "--set", f"model={tmp_path / 'nowhere'}")
    assert refused.returncode == 2 and "expected a checkpoint folder" in refused.stderr


def test_help_keeps_square_brackets(command_line, monkeypatch):
    """Extras and described defaults look like the markup of some help formatters."""
    monkeypatch.setenv("COLUMNS", "200")
    for words, texts in {
        ("serve",): ["vreflection[serve]", "[default: the folder's]", "[default: as stored]"],
        ("bench", "report"): ["vreflection[bench]"],
    }.items():
        ended = command_line(*words, "--help")
        assert ended.returncode == 0
        for text in texts:
            assert text in " ".join(ended.stdout.split()), (words, text)
