"""lmms-eval's own evaluator on a task of ours and a tiny model. Needs lmms-eval, which is no dependency."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vreflection.errors import ConfigError

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval not installed")

TASK = """
task: vreflection_fake
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_visual: !function fake.visual
doc_to_text: !function fake.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 5, temperature: 0, until: ["\\n\\n"]}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata: [{{version: 0.0}}]
"""
FUNCTIONS = """
from PIL import Image
def visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
"""
JOB = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
found = simple_evaluate(
    model="vreflection", model_args="pretrained=" + sys.argv[1] + ",force_latent=True", tasks=["vreflection_fake"],
    task_manager=TaskManager(include_path=sys.argv[2]), batch_size=2, device="cpu", log_samples=True, bootstrap_iters=0,
)
rows = [(s["doc"]["question"], s["filtered_resps"]) for s in found["samples"]["vreflection_fake"]]
open(sys.argv[3], "w").write(json.dumps({"results": found["results"]["vreflection_fake"], "rows": rows}, default=str))
"""


@pytest.fixture
def task(tmp_path):
    """Three questions on images of their own, as a task folder of the harness."""
    rng, rows = np.random.default_rng(0), []
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        rows.append({"image": str(tmp_path / f"{n}.png"), "question": "which? " * (n + 1), "answer": "A"})
    folder = tmp_path / "task"
    folder.mkdir()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (folder / "fake.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    (folder / "fake.py").write_text(FUNCTIONS)
    return folder, rows


@needs_harness
def test_the_harness_gets_what_the_decoder_says(task, checkpoint, tmp_path):
    folder, rows = task
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(checkpoint), str(folder), str(tmp_path / "out.json")],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    from vreflection.harnesses.answering import ChatAnswerer, ChatQuestion

    answerer = ChatAnswerer(str(checkpoint), batch_size=1, force_latent=True, device="cpu")
    expected = {}
    for row in rows:
        question = ChatQuestion([Image.open(row["image"]), row["question"]], {"max_new_tokens": 5}, ("\n\n",))
        answer = answerer.answers([question])[0]
        assert answer.latent_steps == 3 and answer.tokens <= 5  # latent positions count towards nothing
        expected[row["question"]] = answer.text
    assert {question: responses[0] for question, responses in found["rows"]} == expected


@needs_harness
def test_the_entry_point_is_found_without_torch():
    code = """
import sys
from importlib.metadata import entry_points
(found,) = [e for e in entry_points(group="lmms_eval.models") if e.name == "vreflection"]
made = found.load()
assert "torch" not in sys.modules
print(made().chat_class_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "vreflection.harnesses.lmms_eval_model.VReflectionChat", done.stderr


@needs_harness
def test_what_the_harness_cannot_ask_is_said(checkpoint):
    from vreflection.harnesses.lmms_eval_model import VReflectionChat, segments_of

    with pytest.raises(ConfigError, match=r"model_args: unknown \['colour'\]"):
        VReflectionChat(str(checkpoint), colour=1)
    text = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    assert segments_of([text]) == ["q"]
    with pytest.raises(ConfigError, match="expected one user turn .* got system, user"):
        segments_of([{"role": "system", "content": []}, text])
    with pytest.raises(ConfigError, match="expected text and images, got video"):
        segments_of([{"role": "user", "content": [{"type": "video", "url": "x"}]}])
