"""The benchmarks in miniature, shared through `demo`, and a tiny checkpoint on disk that answers them."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo():
    """What demo_bench.py defines."""
    spec = importlib.util.spec_from_file_location("demo_bench", Path(__file__).with_name("demo_bench.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_root(demo, tmp_path_factory):
    """All six, written once; not to be changed."""
    return demo.write_all(tmp_path_factory.mktemp("demo") / "bench")


SHORT = """
name: short
version: 1
images_first: true
min_pixels: null
max_pixels: null
max_new_tokens: {default: 12, vstar: 9}
label_revision: original
extractor: strict
prompt:
  default: {question: "{question}", options: "\\nOptions:", option: "\\n{letter}. {text}", ask: "\\nAnswer."}
headline: {}
"""


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """A protocol file with short answers."""
    path = tmp_path_factory.mktemp("protocol") / "short.yaml"
    path.write_text(SHORT)
    return path


@pytest.fixture
def evaluate(command_line, checkpoint, demo_root, short):
    """`vreflection eval` in this process on the tiny checkpoint; a keyword of `False` leaves a default option out."""

    def call(out, *flags, **options):
        defaults = {"model": checkpoint, "data_root": demo_root, "protocol": short, "benchmarks": "mmvp,hrbench4k"}
        words = ["eval", "--out", str(out), "--allow-other-counts", *flags]
        for name, value in {**defaults, **options}.items():
            words += [] if value is False else [f"--{name.replace('_', '-')}", str(value)]
        return command_line(*words)

    return call
