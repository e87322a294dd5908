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

from vreflection.decoding import PickPlan, SamplingRows, SamplingSettings, pick_tokens
from vreflection.decoding.sampling import draw_keys, final_scores, gumbel_noise

ROWS, VOCABULARY = 16, 40
MASK = 2**64 - 1


def scores_of(settings, logits, seen=None):
    plan = PickPlan.of([settings])
    return final_scores(logits, SamplingRows.of([settings] * len(logits), [0] * len(logits)), plan, seen)


def pick(settings, logits, seen=None, seeds=None, picked=None):
    count = len(logits)
    rows = SamplingRows.of([settings] * count, seeds or list(range(count)))
    picked = torch.zeros(count, dtype=torch.int64) if picked is None else picked
    return pick_tokens(logits, rows, PickPlan.of([settings]), picked, seen)


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
    ours = scores_of(SamplingSettings(True, temperature, top_k, top_p, penalty), logits, seen)
    expected = chain(ids, logits)
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_greedy_ignores_everything_but_the_penalty(logits):
    greedy = SamplingSettings(False, temperature=0.01, top_k=3, top_p=0.1)
    assert torch.equal(scores_of(greedy, logits), logits) and torch.equal(pick(greedy, logits), logits.argmax(-1))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.argmax(-1, keepdim=True), True)
    penalised = SamplingSettings(repetition_penalty=100.0)
    assert (pick(penalised, logits, seen) != logits.argmax(-1)).all()
    assert torch.equal(pick(penalised, logits), logits.argmax(-1))


def test_half_precision_logits_are_widened(logits):
    assert scores_of(SamplingSettings(True, 0.7, 5, 0.9, 1.1), logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_draws_follow_the_scores(settings):
    sampling = SamplingSettings(do_sample=True, **settings)
    one = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5, 1.5]])
    for seeds, picked in ((None, None), ([7] * 40_000, torch.arange(40_000))):  # over seeds, and along one row
        draws = pick(sampling, one.expand(40_000, -1), None, seeds, picked)
        frequency = torch.bincount(draws, minlength=6) / len(draws)
        expected = scores_of(sampling, one)[0].softmax(-1)
        assert (frequency - expected).abs().max() < 0.01
        assert (frequency[expected == 0] == 0).all()


def test_noise_is_standard_gumbel_and_uncorrelated():
    noise = gumbel_noise(draw_keys(torch.arange(200), torch.zeros(200, dtype=torch.int64)), 5000).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772157) < 0.01 and abs(noise.var() - 3.14159265**2 / 6) < 0.02
    rows = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
    correlation = (rows @ rows.T / 5000).fill_diagonal_(0)
    assert correlation.abs().max() < 0.08  # 5.7 standard deviations over 20,000 pairs


def test_noise_is_the_documented_function():
    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    for seed, count in ((0, 0), (3, 7), (2**64 - 5, 1), (2**63 + 11, 99)):
        key = mixed((mixed(seed) + (count + 1) * 0x9E3779B97F4A7C15) & MASK)
        rows = SamplingRows.of([SamplingSettings(True)], [seed])
        got_key = draw_keys(rows.seed, torch.tensor([count]))
        assert int(got_key) & MASK == key
        bits = [mixed((key + (v + 1) * 0x9E3779B97F4A7C15) & MASK) >> 41 for v in range(50)]
        expected = -(-((torch.tensor(bits).double() + 0.5) * 2.0**-23).log()).log()
        torch.testing.assert_close(gumbel_noise(got_key, 50)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_seeds_repeat_and_rows_do_not_depend_on_each_other(logits):
    sampling, seeds = SamplingSettings(do_sample=True, temperature=3.0), list(range(100, 100 + ROWS))
    together = pick(sampling, logits, None, seeds)
    assert torch.equal(together, pick(sampling, logits, None, seeds))
    assert not torch.equal(together, pick(sampling, logits, None, list(range(ROWS))))
    for row in range(ROWS):
        assert pick(sampling, logits[row : row + 1], None, [seeds[row]]) == together[row]
    assert len(pick(sampling, logits[:1].expand(200, -1), None, list(range(200))).unique()) > 3


def test_rows_of_different_settings_are_picked_as_if_alone(logits):
    kinds = [
        SamplingSettings(), SamplingSettings(repetition_penalty=2.0), SamplingSettings(True, 2.0),
        SamplingSettings(True, top_k=3), SamplingSettings(True, 1.5, top_p=0.5, repetition_penalty=0.7),
    ]  # fmt: skip
    settings = [kinds[row % len(kinds)] for row in range(ROWS)]
    seen = torch.rand(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2)) < 0.4
    picked = torch.arange(ROWS)
    rows = SamplingRows.of(settings, list(range(ROWS)))
    together = pick_tokens(logits, rows, PickPlan.of(settings), picked, seen)
    for row, own in enumerate(settings):
        one = slice(row, row + 1)
        assert pick(own, logits[one], seen[one], [row], picked[one]) == together[row]


def test_a_near_zero_temperature_is_greedy(logits):
    sampling = SamplingSettings(do_sample=True, temperature=1e-6)
    assert torch.equal(pick(sampling, logits), logits.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature: expected > 0 \(at least 1e-07\), got 0.0; greedy is do_sample=False"),
        ({"temperature": 1e-30}, "temperature: expected > 0 .* got 1e-30"),
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
