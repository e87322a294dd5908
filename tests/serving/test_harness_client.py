"""lmms-eval's OpenAI back-end, asking our server. Needs lmms-eval, which is no dependency."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval not installed")

JOB = """
import json, sys
from PIL import Image
from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.openai import OpenAICompatible

model = OpenAICompatible(model_version="tiny", base_url=sys.argv[1], api_key="none", timeout=30, max_retries=1)
docs = json.loads(sys.argv[2])
model.task_dict = {"t": {"test": docs}}

def messages(doc):
    image = {"type": "image", "url": Image.open(doc["image"]).convert("RGB")}
    return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

requests = [
    Instance(
        request_type="generate_until", idx=0, metadata={"task": "t", "doc_id": n, "repeats": 1},
        arguments=("", messages, {"max_new_tokens": 6, "temperature": 0}, n, "t", "test"),
    )
    for n in range(len(docs))
]
print("ANSWERS", json.dumps([getattr(a, "text", a) for a in model.generate_until(requests)]))
"""


@needs_harness
def test_lmms_evals_openai_back_end(serve, tools, tmp_path):
    docs, expected = [], []
    with serve() as server:
        for n in range(3):
            pixels = np.random.default_rng(n).integers(0, 256, (56, 84, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{n}.png")
            docs.append({"image": str(tmp_path / f"{n}.png"), "question": "which? " * (n + 1)})
            message = tools.user(docs[-1]["question"], tools.picture(n))
            body = {"model": "tiny", "messages": [message], "max_tokens": 6}
            answer = httpx.post(f"{server.base}/chat/completions", json=body).json()
            expected.append(answer["choices"][0]["message"]["content"])
        done = subprocess.run(
            [sys.executable, "-c", JOB, server.base, json.dumps(docs)], capture_output=True, text=True, timeout=200,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert json.loads(line[8:]) == expected
