"""Vocabulary projection and choice of a token in the interpreter against a float64 oracle and plain-Python noise."""

import math
import os

import pytest
import torch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
]
WORD = 2**64
KEPT = -5  # a token no kernel writes
# rows, width, vocabulary
SHAPES = [(1, 60, 50), (2, 64, 301), (3, 60, 130), (5, 192, 64), (17, 60, 301), (32, 64, 95), (35, 16, 70)]


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(x):
    """SplitMix64's finaliser on Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def gumbel(key, v):
    u = ((mixed((key + (v + 1) * 0x9E3779B97F4A7C15) % WORD) >> 41) + 0.5) * 2.0**-23
    return -math.log(-math.log(u))


def noise(keys, vocabulary):
    return torch.tensor([[gumbel(key % WORD, v) for v in range(vocabulary)] for key in keys.tolist()]).double()


def keys_for(rows, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def everyone(rows, value=True):
    return torch.full((rows,), value)


def kept(rows):
    return torch.full((rows,), KEPT)


def problem(oracle, rows, width, vocabulary, dtype=torch.float32, seed=0):
    """Rounded hidden rows and weights inside NaN, and the exact scores."""
    hidden = draw(rows, width, seed=seed).to(dtype)
    weight = draw(vocabulary, width, seed=seed + 1, scale=width**-0.5).to(dtype)
    return oracle.poisoned(hidden, row_gap=5), oracle.poisoned(weight), hidden.double() @ weight.double().T


def assert_best(scores, tokens, tolerance):
    """Each token scores as the best does, but for rounding."""
    assert ((tokens >= 0) & (tokens < scores.shape[1])).all()
    chosen = scores.gather(1, tokens[:, None])[:, 0]
    assert (scores.max(1).values - chosen <= tolerance * scores.abs().max()).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 0), (torch.float16, 1e-5)])
@pytest.mark.parametrize("rows, width, vocabulary", SHAPES)
def test_the_best_token_and_all_logits(oracle, rows, width, vocabulary, dtype, tolerance):
    kernels = oracle.kernel_module("decode_pick")
    hidden, weight, scores = problem(oracle, rows, width, vocabulary, dtype)
    token = kept(rows)
    assert kernels.lm_head_pick(hidden, weight, everyone(rows), token) is token
    assert_best(scores, token, tolerance)
    wide = torch.promote_types(dtype, torch.float32)
    logits = oracle.poisoned(torch.zeros(rows, vocabulary, dtype=wide), row_gap=3)
    got = kernels.lm_head_logits(hidden, weight, everyone(rows), logits).clone()
    oracle.assert_written_inside(logits)
    oracle.assert_close(got, scores, 1e-12 if dtype == torch.float64 else 1e-5)
    if dtype != torch.float16:
        assert torch.equal(token, got.argmax(1))


@pytest.mark.parametrize("form", [(8, 32, 1), (16, 32, 2), (16, 16, 16), (32, 16, 32)])
def test_every_form_serves_every_batch(oracle, guarded_outputs, form):
    kernels = oracle.kernel_module("decode_pick")
    config = oracle.kernel_module("decode_launch").ProductConfig(*form, num_warps=4, num_stages=2)
    for rows in (1, 5):
        hidden, weight, scores = problem(oracle, rows, 60, 75)
        token = kernels.lm_head_pick(hidden, weight, everyone(rows), kept(rows), config=config)
        assert_best(scores, token, 1e-5)
    guarded_outputs()


def test_many_tiles_are_reduced_in_steps(oracle, monkeypatch):
    """More tiles than one step of the reduction holds, the best in any of them, ties across steps."""
    kernels = oracle.kernel_module("decode_pick")
    monkeypatch.setattr(kernels, "_REDUCE_STEP", 4)
    config = oracle.kernel_module("decode_launch").ProductConfig(2, 1, 1, 4, 1)
    for best in ([0], [7], [8], [20, 3], [19, 9], [6, 7, 8], [18, 10, 2]):
        weight = torch.zeros(21, 1)
        weight[best] = 1.0
        token = kernels.lm_head_pick(torch.ones(1, 1), weight, everyone(1), kept(1), config=config)
        assert token.item() == min(best)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_lowest_index_wins_ties(oracle, rows):
    kernels = oracle.kernel_module("decode_pick")
    weight = draw(140, 16, seed=1).float()
    hidden = torch.ones(rows, 16)
    for first, *others in ((3, 4, 100), (0, 139), (31, 32, 33), (64, 65)):
        tied = weight.clone()
        tied[[first, *others]] = 3.0
        assert kernels.lm_head_pick(hidden, tied, everyone(rows), kept(rows)).tolist() == [first] * rows
    equal = kernels.lm_head_pick(hidden, torch.zeros(140, 16), everyone(rows), kept(rows))
    assert equal.tolist() == [0] * rows


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_that_need_nothing_keep_their_token(oracle, rows):
    kernels = oracle.kernel_module("decode_pick")
    hidden, weight, scores = problem(oracle, rows, 32, 75)
    needed = torch.arange(rows) % 2 == 0
    token = kernels.lm_head_pick(hidden, weight, needed, kept(rows))
    assert (token[~needed] == KEPT).all()
    assert_best(scores[needed], token[needed], 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 35])
def test_nothing_is_read_where_no_row_is_needed(oracle, monkeypatch, rows):
    kernels = oracle.kernel_module("decode_pick")
    workspaces, plain_empty = [], torch.empty

    def empty(*shape, **options):
        workspaces.append(plain_empty(*shape, **options).fill_(123.0))
        return workspaces[-1]

    nothing = torch.full((75, 32), float("nan"))
    token, logits = kept(rows), torch.full((rows, 75), 123.0)
    monkeypatch.setattr(torch, "empty", empty)
    kernels.lm_head_pick(nothing[:1].expand(rows, 32).clone(), nothing, everyone(rows, False), token)
    kernels.lm_head_logits(nothing[:1].expand(rows, 32).clone(), nothing, everyone(rows, False), logits)
    assert workspaces
    for written in (*workspaces, logits):
        assert (written == 123.0).all()
    assert (token == KEPT).all()


def test_nan_scores_give_a_token_of_the_vocabulary(oracle):
    kernels = oracle.kernel_module("decode_pick")
    for rows in (1, 3):
        hidden, weight, scores = problem(oracle, rows, 32, 75)
        hidden[-1] = float("nan")
        weight[[0, 40]] = float("nan")
        token = kernels.lm_head_pick(hidden, weight, everyone(rows), kept(rows))
        assert token[-1] == 0
        scores[:, [0, 40]] = float("-inf")
        assert torch.equal(token[:-1], scores[:-1].argmax(1))
    infinite = torch.zeros(4, 1)
    infinite[2] = float("inf")
    assert kernels.lm_head_pick(torch.ones(1, 1), infinite, everyone(1), kept(1)).item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, width, vocabulary", SHAPES[:5])
def test_penalty_of_seen_tokens(oracle, rows, width, vocabulary, dtype):
    kernels = oracle.kernel_module("decode_pick")
    hidden, weight, scores = problem(oracle, rows, width, vocabulary, dtype)
    seen = torch.rand(rows, vocabulary + 3, generator=torch.Generator().manual_seed(3))[:, :vocabulary] < 0.5
    seen.scatter_(1, scores.argmax(1, keepdim=True), True)
    penalty = torch.linspace(1.05, 3.0, rows, dtype=dtype)
    factor = penalty.double()[:, None]
    expected = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    token = kernels.lm_head_pick(hidden, weight, everyone(rows), kept(rows), seen_BV=seen, penalty_B=penalty)
    assert_best(expected, token, 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 17])
def test_the_noise_is_that_of_the_counter(oracle, rows):
    """Equal scores: the choice is the arg-max of the noise alone, computed here with Python's integers."""
    kernels = oracle.kernel_module("decode_pick")
    vocabulary, keys = 150, keys_for(rows)
    keys[0] = -1
    token = kernels.lm_head_pick(
        torch.zeros(rows, 16), torch.zeros(vocabulary, 16), everyone(rows), kept(rows),
        temperature_B=torch.ones(rows), sample_B=everyone(rows), key_B=keys,
    )  # fmt: skip
    assert_best(noise(keys, vocabulary), token, 1e-6)
    assert rows == 1 or len(set(token.tolist())) > 1


def test_the_host_draws_the_same(oracle):
    from vreflection.decoding.sampling import gumbel_noise

    keys = keys_for(40, seed=6)
    expected = gumbel_noise(keys, 150)
    token = oracle.kernel_module("decode_pick").lm_head_pick(
        torch.zeros(40, 16), torch.zeros(150, 16), everyone(40), kept(40),
        temperature_B=torch.ones(40), sample_B=everyone(40), key_B=keys,
    )  # fmt: skip
    assert torch.equal(token, expected.argmax(1))


def test_only_rows_that_sample_are_tempered(oracle):
    kernels = oracle.kernel_module("decode_pick")
    rows, vocabulary = 5, 130
    hidden, weight, scores = problem(oracle, rows, 60, vocabulary)
    seen = torch.rand(rows, vocabulary, generator=torch.Generator().manual_seed(3)) < 0.3
    penalty, keys = torch.full((rows,), 1.5), keys_for(rows, seed=4)
    sample = torch.tensor([True, False, True, True, False])
    temperature = torch.tensor([0.5, 0.0, 1.0, 2.0, float("nan")])  # not used where nothing is drawn
    expected = torch.where(seen, torch.where(scores < 0, scores * 1.5, scores / 1.5), scores)
    noisy = expected / temperature.double()[:, None] + noise(keys, vocabulary)
    expected = torch.where(sample[:, None], noisy, expected)
    token = kernels.lm_head_pick(
        hidden, weight, everyone(rows), kept(rows), seen_BV=seen, penalty_B=penalty, temperature_B=temperature,
        sample_B=sample, key_B=keys,
    )  # fmt: skip
    assert_best(expected, token, 1e-6)


def test_draws_follow_the_softmax(oracle):
    """Frequencies of 1500 draws from five tokens, within five standard deviations."""
    kernels = oracle.kernel_module("decode_pick")
    rows, temperature = 1500, 0.7
    weight = torch.tensor([[0.0], [1.0], [2.0], [-1.0], [0.5]])
    token = kernels.lm_head_pick(
        torch.ones(rows, 1), weight, everyone(rows), kept(rows), temperature_B=torch.full((rows,), temperature),
        sample_B=everyone(rows), key_B=keys_for(rows),
    )  # fmt: skip
    share = (weight[:, 0] / temperature).softmax(0)
    deviation = (share * (1 - share) / rows).sqrt()
    assert ((torch.bincount(token, minlength=5) / rows - share).abs() <= 5 * deviation).all()


def test_refusals_name_the_fix(oracle):
    kernels = oracle.kernel_module("decode_pick")
    hidden, weight, needed, token = torch.zeros(2, 8), torch.zeros(9, 8), everyone(2), kept(2)
    with pytest.raises(ValueError, match="together or none, got no temperature_B, sample_B"):
        kernels.lm_head_pick(hidden, weight, needed, token, key_B=keys_for(2))
    with pytest.raises(ValueError, match="together or none, got no penalty_B"):
        kernels.lm_head_pick(hidden, weight, needed, token, seen_BV=torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected needed_B"):
        kernels.lm_head_pick(hidden, weight, needed.int(), token)
    with pytest.raises(ValueError, match="expected token_B"):
        kernels.lm_head_pick(hidden, weight, needed, token.int())
    with pytest.raises(ValueError, match="expected a vocabulary"):
        kernels.lm_head_pick(hidden, weight[:0], needed, token)
    with pytest.raises(ValueError, match=r"expected logits_BV \(2, 9\) of torch.float32"):
        kernels.lm_head_logits(hidden, weight, needed, torch.zeros(2, 9).half())
