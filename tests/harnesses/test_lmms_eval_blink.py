"""The command `lmms-eval` with our plug-in on its own BLINK task, prompt and scorer; the rows are ours."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-harnesses")

ROWS, RIGHT = 24, 16
# The task reads the data set `BLINK-Benchmark/BLINK`: here a folder of that name, described as the hub's card does.
CARD = """---
dataset_info:
  config_name: Counting
  features:
  - {name: idx, dtype: string}
  - {name: question, dtype: string}
  - {name: sub_task, dtype: string}
  - {name: image_1, dtype: image}
  - {name: image_2, dtype: image}
  - {name: image_3, dtype: image}
  - {name: image_4, dtype: image}
  - {name: choices, sequence: string}
  - {name: answer, dtype: string}
  - {name: prompt, dtype: string}
configs:
- config_name: Counting
  data_files:
  - {split: val, path: Counting/val-*}
---
"""


def rows():
    """Two images each; the right letter is B in two of three rows."""
    generator = np.random.default_rng(4)
    for number in range(ROWS):
        row = {
            "idx": f"val_Counting_{number + 1}", "question": "How many?", "sub_task": "Counting",
            "choices": ["0", "3", "2", "1"], "answer": "(B)" if number % 3 else f"({'ACD'[number // 3 % 3]})",
            "prompt": "How many?\nSelect from the following choices.\n(A) 0\n(B) 3\n(C) 2\n(D) 1",
        }  # fmt: skip
        for place in range(1, 5):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(file, "PNG")
            row[f"image_{place}"] = {"bytes": file.getvalue(), "path": f"{number}.png"} if place < 3 else None
        yield row


@pytest.fixture
def data(tmp_path):
    """The folder to start the harness in."""
    folder = tmp_path / "BLINK-Benchmark" / "BLINK"
    (folder / "Counting").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = [(name, pa.string()) for name in ("idx", "question", "sub_task", "answer", "prompt")]
    images = [(f"image_{place}", image) for place in range(1, 5)]
    schema = pa.schema([*texts, *images, ("choices", pa.list_(pa.string()))])
    parquet.write_table(pa.Table.from_pylist(list(rows()), schema), folder / "Counting" / "val-00000-of-00001.parquet")
    return tmp_path


@pytest.mark.parametrize(("pieces", "right"), [(("\n<answer>", " B", " </answer>"), RIGHT), (("(C)",), 3)])
def test_their_scorer_counts_our_answers(saying, data, pieces, right):
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "vreflection", "--tasks", "blink_counting", "--batch_size", "8",
        "--model_args", f"pretrained={saying(*pieces)}", "--device", "cpu", "--output_path", "out", "--log_samples",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(data / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = data.glob("out/**/*_results.json")
    scores = json.loads(file.read_text())["results"]["blink_counting"]
    assert scores["blink_acc,none"] == pytest.approx(right / ROWS)
    (samples,) = data.glob("out/**/*_samples_blink_counting.jsonl")
    answers = {json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()}
    assert answers == {pieces[len(pieces) > 1].strip()}
