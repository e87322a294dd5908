"""Answering benchmark questions with the quickstart-size model: the run loop against one question at a time.

`pytest bench/bench_evaluation.py -s`. The benchmarks in miniature, written for the occasion; images are opened and
processed in every round. Equal answers are the gate before any timing.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from vreflection.engine.decoder import LatentDecoder
from vreflection.evaluation.asking import Prompts, load_processor
from vreflection.evaluation.benchmarks import load_benchmark
from vreflection.evaluation.protocol import load_protocol
from vreflection.evaluation.raw_files import Shard, done_ids
from vreflection.evaluation.run import Counted, EvalReport, EvalSettings, answer_items, load_model
from vreflection.quickstart.base import base_dir

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUESTIONS, SIZE = 12, (448, 336)


class Forgetful(Prompts):
    """Opens the images of every question anew."""

    def of(self, item):
        self.kept = {}
        return super().of(item)


@pytest.fixture(scope="module")
def demo():
    path = Path(__file__).parents[1] / "tests" / "evaluation" / "demo_bench.py"
    spec = importlib.util.spec_from_file_location("demo_bench", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_items_per_second(interleaved, benchmark, demo, tmp_path):
    """Four rotations of each question, batches of eight, against batches of one that share nothing."""
    demo.write_hrbench(tmp_path, "4k", rows=list(demo.hrbench_rows(QUESTIONS, SIZE)))
    items = load_benchmark("hrbench4k", tmp_path, allow_other_counts=True).items
    settings = EvalSettings(str(base_dir()), ("hrbench4k",), tmp_path / "run", dtype="float32", device=DEVICE)
    model, protocol = load_model(base_dir(), settings), load_protocol("lmms-eval")
    processor = load_processor(base_dir(), protocol)

    def ask(decoder, kind):
        shutil.rmtree(settings.out, ignore_errors=True)
        report = EvalReport({})
        answer_items(
            decoder, kind(processor, protocol), items, settings, Shard(), Counted(items, set(), None), report
        )  # fmt: skip
        decoder.forget()

    def answers(call):
        call()
        assert len(done_ids(settings.out, "hrbench4k")) == len(items)
        return sorted((settings.out / "raw" / "hrbench4k.jsonl").read_bytes().splitlines())

    together = LatentDecoder(model, max_batch_size=8)
    single = LatentDecoder(model, max_batch_size=1, image_cache=0, share_prefixes=False)
    calls = {
        "run loop, batches of 8": lambda: ask(together, Prompts),
        "one at a time": lambda: ask(single, Forgetful),
    }
    first, second = (answers(call) for call in calls.values())
    assert first == second
    medians = interleaved(calls, "one at a time", rounds=3)
    rate = {name: len(items) / seconds for name, seconds in medians.items()}
    benchmark.extra_info["items_per_s"] = rate
    print("  items/s: " + ", ".join(f"{name} {value:.1f}" for name, value in rate.items()))
