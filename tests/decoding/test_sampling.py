"""Picking a token against the host library's processors, and as a distribution."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vreflection.decoding import SamplingSettings

ROWS, VOCABULARY = 16, 40


@pytest.fixture
def logits():
    return 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.7), (0, 0.05), (8, 0.9), (99, 0.5)])
def test_scores_equal_the_host_librarys(logits, penalty, temperature, top_k, top_p):
    ids = torch.randint(0, VOCABULARY, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    chain = LogitsProcessorList()
    if penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    ours = SamplingSettings(True, temperature, top_k, top_p, penalty).scores(logits, seen)
    expected = chain(ids, logits)
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_greedy_ignores_everything_but_the_penalty(logits):
    greedy = SamplingSettings(False, temperature=0.01, top_k=3, top_p=0.1)
    assert torch.equal(greedy.scores(logits), logits) and torch.equal(greedy.pick(logits), logits.argmax(-1))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(-1, keepdim=True), True)
    penalised = SamplingSettings(repetition_penalty=100.0)
    assert (penalised.pick(logits, seen) != logits.argmax(-1)).all()
    assert torch.equal(penalised.pick(logits), logits.argmax(-1))


def test_half_precision_logits_are_widened(logits):
    assert SamplingSettings(True, 0.7, 5, 0.9, 1.1).scores(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_draws_follow_the_scores(settings):
    sampling = SamplingSettings(do_sample=True, **settings)
    one = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 1.5]])
    draws = sampling.pick(one.expand(40_000, -1), None, torch.Generator().manual_seed(3))
    frequency = torch.bincount(draws, minlength=6) / len(draws)
    expected = sampling.scores(one)[0].softmax(-1)
    assert (frequency - expected).abs().max() < 0.01
    assert (frequency[expected == 0] == 0).all()


def test_rows_are_drawn_independently_and_seeds_repeat(logits):
    sampling = SamplingSettings(do_sample=True, temperature=3.0)
    draw = lambda seed: sampling.pick(logits, None, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    same = sampling.pick(logits[:1].expand(200, -1), None, torch.Generator().manual_seed(0))
    assert len(same.unique()) > 3


def test_a_near_zero_temperature_is_greedy(logits):
    sampling = SamplingSettings(do_sample=True, temperature=1e-6)
    assert torch.equal(sampling.pick(logits, None, torch.Generator().manual_seed(0)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0; greedy is do_sample=False"),
        ({"temperature": float("nan")}, "temperature: expected > 0"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p: expected in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected > 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**settings)
