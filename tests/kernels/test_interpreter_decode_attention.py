"""Rotary embedding, cache write and split attention of a decode step in the interpreter against a float64 oracle."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# key heads, queries per key head, head width, columns, keys already there
CASES = {
    "one_row_empty": (1, 1, 16, 5, [0]),
    "one_row_full": (2, 7, 16, 37, [36]),
    "mixed": (2, 3, 32, 70, [0, 69, 16, 15, 33]),
    "padded_head": (1, 7, 20, 40, [7, 31, 39]),
    "many_queries": (1, 20, 16, 33, [32, 1]),
    "seventeen_rows": (2, 1, 16, 20, [*range(17)]),
    "past_the_end": (2, 2, 16, 19, [19, 25, 3]),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def plain_attention(case, inputs, kind):
    """Row by row with plain operators in one precision: output, and the new key and value of each row."""
    kv_heads, group, width, columns, lengths = case
    qkv, cos, sin, keys, values = (t.to(kind) for t in inputs)
    outputs, new_keys, new_values = [], [], []
    for b, length in enumerate(lengths):
        length = min(length, columns - 1)
        heads = qkv[b].unflatten(0, (-1, width))
        q, k, v = heads.split([kv_heads * group, kv_heads, kv_heads])
        q, k = rotate(q, cos[b], sin[b]), rotate(k, cos[b], sin[b])
        new_keys.append(k)
        new_values.append(v)
        all_keys = torch.cat([keys[b, :, :length], k[:, None]], 1).repeat_interleave(group, 0)
        all_values = torch.cat([values[b, :, :length], v[:, None]], 1).repeat_interleave(group, 0)
        scores = (q[:, None] @ all_keys.mT) * width**-0.5
        wide = torch.promote_types(kind, torch.float32)
        weights = scores.to(wide).softmax(-1).to(kind)
        outputs.append((weights @ all_values).flatten())
    return torch.stack(outputs), torch.stack(new_keys), torch.stack(new_values)


def make_inputs(case, dtype, rope_dtype=None):
    kv_heads, group, width, columns, lengths = case
    rows = len(lengths)
    angle = 3 * draw(rows, width // 2, seed=5).repeat(1, 2)
    rope_dtype = rope_dtype or torch.promote_types(dtype, torch.float32)
    cache = [draw(rows, kv_heads, columns, width, seed=seed).to(dtype) for seed in (1, 2)]
    qkv = (2 * draw(rows, (group + 2) * kv_heads * width)).to(dtype)
    return [qkv, angle.cos().to(rope_dtype), angle.sin().to(rope_dtype), *cache]


def strided_cache(oracle, cache, lengths, order):
    """The cached columns inside a larger NaN buffer, dimensions stored in another order; the rest is stale NaN."""
    cache = cache.clone()
    for b, length in enumerate(lengths):
        cache[b, :, min(length, cache.shape[2] - 1) :] = float("nan")
    inverse = [order.index(axis) for axis in range(4)]
    return oracle.poisoned(cache.permute(order), row_gap=3).permute(inverse)


def run(oracle, case, dtype, splits=None, keys_per_step=16, order=(0, 1, 2, 3), rope_dtype=None, extent=None):
    kv_heads, group, width, columns, lengths = case
    rows = len(lengths)
    inputs = make_inputs(case, dtype, rope_dtype)
    qkv, cos, sin, *caches = inputs
    views = [strided_cache(oracle, cache, lengths, order) for cache in caches]
    before = [view.clone() for view in views]
    out = oracle.poisoned(torch.zeros(rows, kv_heads * group * width, dtype=dtype), row_gap=5)
    launch = oracle.kernel_module("decode_launch")
    config = splits and launch.DecodeAttentionConfig(keys_per_step, splits, 4, 2)
    oracle.kernel_module("decode_attention").rope_attention(
        oracle.poisoned(qkv, row_gap=7), oracle.poisoned(cos), oracle.poisoned(sin), torch.tensor(lengths), *views, out,
        scale=width**-0.5, extent=extent or min(max(lengths) + 1, columns), config=config,
    )  # fmt: skip
    got = out.clone()
    oracle.assert_written_inside(out)
    new = []
    for view, old in zip(views, before):
        written = []
        for b, length in enumerate(lengths):
            at = min(length, columns - 1)
            written.append(view[b, :, at].clone())
            view[b, :, at] = old[b, :, at]
        assert torch.equal(view.nan_to_num(7e4), old.nan_to_num(7e4)), "a column other than the new one changed"
        oracle.assert_written_inside(view)
        new.append(torch.stack(written))
    return (got, *new), lambda kind: plain_attention(case, inputs, kind)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", [None, 1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(oracle, guarded_outputs, name, splits, dtype):
    got, plain = run(oracle, CASES[name], dtype, splits)
    guarded_outputs()
    for value, exact, label in zip(got, plain(torch.float64), ("out", "key", "value")):
        oracle.assert_close(value, exact, TOLERANCE[dtype], label)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)])
def test_caches_may_be_stored_in_any_order(oracle, order):
    got, plain = run(oracle, CASES["mixed"], torch.float32, 2, order=order)
    oracle.assert_close(got[0], plain(torch.float64)[0], 1e-5)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rope_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["mixed", "padded_head", "one_row_full"])
def test_half_precision_error_stays_within_twice_the_plain_path(oracle, name, rope_dtype, splits):
    got, plain = run(oracle, CASES[name], torch.float16, splits, rope_dtype=rope_dtype)
    for value, exact, budget in zip(got, plain(torch.float64), plain(torch.float16)):
        oracle.assert_within_budget(exact, value, budget, name)


@pytest.mark.parametrize("extent", [1, 17, 70, 4096])
def test_the_extent_only_sizes_the_splits(oracle, extent):
    got, plain = run(oracle, CASES["mixed"], torch.float32, 3, extent=extent)
    oracle.assert_close(got[0], plain(torch.float64)[0], 1e-5)


def test_splits_past_a_row_return_at_once(oracle, monkeypatch):
    """Row by row, only the splits that begin at or before the new column leave a sum and its statistics."""
    workspaces, plain_empty = [], torch.empty

    def empty(*shape, **options):
        workspaces.append(plain_empty(*shape, **options).fill_(123.0))
        return workspaces[-1]

    monkeypatch.setattr(torch, "empty", empty)
    kv_heads, group, width, _, lengths = CASES["mixed"]
    run(oracle, CASES["mixed"], torch.float32, 5, extent=70)
    used = torch.tensor([[split * 16 <= length for split in range(5)] for length in lengths])
    for workspace in workspaces[-2:]:
        written = (workspace != 123.0).view(len(lengths), kv_heads * group, 5, -1)
        assert torch.equal(written.all(-1), used[:, None].expand(-1, kv_heads * group, -1))
        assert torch.equal(written.any(-1), written.all(-1))


def test_steps_of_a_row_grow_the_cache(oracle):
    """Three tokens in a row: each sees those before it, as a causal attention over all of them would."""
    kernels = oracle.kernel_module("decode_attention")
    case = (2, 2, 16, 4, [0, 0])
    keys, values = (torch.full((2, 2, 4, 16), float("nan")) for _ in range(2))
    known_keys, known_values = torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 4, 16)
    for step in range(4):
        qkv, cos, sin = draw(2, 8 * 16, seed=step).float(), *(draw(2, 8, seed=9 + step).repeat(1, 2).float(),) * 2
        out, length = torch.zeros(2, 64), torch.tensor([step, step])
        kernels.rope_attention(qkv, cos, sin, length, keys, values, out, scale=0.25, extent=4)
        inputs = (qkv, cos, sin, known_keys, known_values)
        expected, new_keys, new_values = plain_attention((*case[:4], [step, step]), inputs, torch.float64)
        oracle.assert_close(out, expected, 1e-5, f"step {step}")
        known_keys[:, :, step], known_values[:, :, step] = new_keys.float(), new_values.float()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_scores_do_not_become_nan(oracle):
    """A cached key of -inf score is ignored like a softmax would, also where a whole split has only such keys."""
    kernels, launch = oracle.kernel_module("decode_attention"), oracle.kernel_module("decode_launch")
    keys, values = torch.zeros(1, 1, 40, 16), draw(1, 1, 40, 16).float()
    keys[0, 0, :32, 0] = float("-inf")
    qkv = torch.zeros(1, 48)
    qkv[:, 0], qkv[:, 32:] = 1.0, 2.0
    ones, zeros = torch.ones(1, 16), torch.zeros(1, 16)
    for splits in (1, 2):
        out = torch.zeros(1, 16)
        config = launch.DecodeAttentionConfig(16, splits, 4, 2)
        kernels.rope_attention(
            qkv, ones, zeros, torch.tensor([36]), keys.clone(), values.clone(), out, scale=1.0, extent=37, config=config
        )
        expected = (values[0, 0, 32:36].sum(0) + 2.0) / 5
        oracle.assert_close(out[0], expected, 1e-6)


def test_cache_offsets_past_2_31_elements(oracle):
    """Column 3 starts at element 3 * 2^30; the untouched memory between the columns is never committed."""
    kernels = oracle.kernel_module("decode_attention")
    try:
        caches = [torch.empty(3 * 2**30 + 16, dtype=torch.float16) for _ in range(2)]
    except RuntimeError:
        pytest.skip("cannot reserve 12 GB of address space")
    case = (1, 2, 16, 4, [3])
    inputs = make_inputs(case, torch.float16)
    far = [cache.as_strided((1, 1, 4, 16), (0, 0, 2**30, 1)).copy_(near) for cache, near in zip(caches, inputs[3:])]
    out, near_out = torch.zeros(1, 32).half(), torch.zeros(1, 32).half()
    for result, *cache in ((out, *far), (near_out, *inputs[3:])):
        kernels.rope_attention(*inputs[:3], torch.tensor([3]), *cache, result, scale=0.25, extent=4)
    assert torch.equal(out, near_out)
    assert torch.equal(far[0][0, 0, 3], inputs[3][0, 0, 3])
    oracle.assert_close(out, plain_attention(case, inputs, torch.float64)[0], 1e-2)


def test_refusals_name_the_fix(oracle):
    kernels = oracle.kernel_module("decode_attention")
    case = (2, 2, 16, 4, [0, 1])
    qkv, cos, sin, keys, values = make_inputs(case, torch.float32)
    length, out = torch.tensor(case[4]), torch.zeros(2, 64)

    def call(**changed):
        given = {"qkv_BN": qkv, "cos_BE": cos, "sin_BE": sin, "length_B": length, "keys_BKCE": keys}
        given |= {"values_BKCE": values, "out_BN": out, "scale": 0.25, "extent": 4}
        return kernels.rope_attention(**(given | changed))

    call()
    for changed, match in (
        ({"keys_BKCE": keys.mT.contiguous().mT, "values_BKCE": values}, "change the cache's layout"),
        ({"values_BKCE": values[:, :, :3]}, "expected keys and values"),
        ({"out_BN": torch.zeros(2, 48)}, "multiple of the 2 key heads"),
        ({"qkv_BN": qkv[:, :96]}, "expected qkv_BN"),
        ({"length_B": length.int()}, "expected length_B"),
        ({"cos_BE": cos.double(), "sin_BE": sin.double()}, "convert both alike"),
        ({"extent": 0}, "extent >= 1"),
        ({"values_BKCE": values.half()}, "expected values_BKCE"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**changed)
