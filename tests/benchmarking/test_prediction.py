from pathlib import Path

import pytest

from vreflection.benchmarking.prediction import (
    COPY_SHARE,
    DEVICES,
    MATRIX_SHARE,
    Device,
    Work,
    cross_entropy_work,
    decode_work,
    operator_table,
    projected_work,
    resampler_work,
    training_table,
)
from vreflection.training.model_shape import NAMED

DOC = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_longer_of_moving_and_computing():
    device = Device(100.0, 1000.0)
    assert (
        Work(90.0, 1.0).seconds(device) == pytest.approx(0.9 / COPY_SHARE) and Work(90.0, 1.0).bound(device) == "memory"
    )
    assert Work(1.0, 790.0).seconds(device) == pytest.approx(0.79 / MATRIX_SHARE)
    assert Work(1.0, 790.0).bound(device) == "compute"


def test_a_resampler_counted_by_hand():
    """One box, 8 queries, 8 heads, 3 tokens of width 16, every product written out."""
    rows, width, tokens = 8, 16, 3
    projections = 4 * 2 * rows * width * width  # queries, keys folded in, values and output taken out
    attention = 2 * 2 * (8 * rows) * tokens * width  # scores and context of 64 rows
    work = resampler_work(1, tokens, tokens, width)
    assert work.flops == projections + attention and work.bytes == 2 * (4 * width * width + tokens * width)
    both = resampler_work(1, tokens, tokens, width, backward=True)
    assert both.flops == 3 * work.flops and both.bytes == 2 * (12 * width * width + 2 * tokens * width)


def test_per_token_flops_fall_by_what_the_algebra_says():
    width = 3584

    def per_token(work):
        return work(10_001).flops - work(10_000).flops

    ours = per_token(lambda n: resampler_work(1, n, n, width))
    stock = per_token(lambda n: projected_work(1, n, width))
    assert ours == 4 * 64 * width and stock == 4 * width * width + 4 * 8 * width
    assert (stock - 4 * 8 * width) / ours == 56


def test_the_suites_count_the_same(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_conftest", DOC.parents[1] / "bench" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for shared in (False, True):
        for backward in (False, True):
            work = resampler_work(4, 4000, 3000, 3584, 4, backward, shared)
            assert module.resampler_work(4, 4000, 3000, 3584, 4, backward, shared) == (work.bytes, work.flops)


def test_decode_steps_are_bound_by_the_weights():
    text, latent = (decode_work(NAMED["7b"], 1, 1000, text) for text in (True, False))
    assert latent.bytes == pytest.approx(13.1e9, rel=0.01) and text.bytes - latent.bytes == 2 * 152064 * 3584
    assert text.bound(DEVICES["H200"]) == "memory"
    assert text.seconds(DEVICES["H200"]) == pytest.approx(3.3e-3, rel=0.02)
    per_token = decode_work(NAMED["7b"], 1, 1001, True).bytes - text.bytes
    assert per_token == 2 * 2 * 28 * 4 * 128  # keys and values of 4 heads of 128 in 28 layers: 57 KB


def test_cross_entropy():
    work = cross_entropy_work(10, 4, 100)
    assert work.flops == 3 * 2 * 10 * 4 * 100 and work.bytes == 2 * (4 * 400 + 2 * 40)


@pytest.mark.parametrize("table", [operator_table, training_table])
def test_the_document_shows_these_tables(table):
    written = DOC.read_text().splitlines()
    for line in table():
        assert line in written, f"docs/performance.md: expected the row {line}"
