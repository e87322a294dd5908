"""The decode kernels on a real GPU: low-precision error at real shapes, graphs, every shipped tile. `pytest -m gpu`."""

import itertools

import pytest
import torch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
EPS = 1e-6
# Model width, intermediate width, query heads, key heads, head width, vocabulary.
DECODERS = {"7b": (3584, 18944, 28, 4, 128, 152064), "3b": (2048, 11008, 16, 2, 128, 151936)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCHES = [1, 2, 3, 8, 16, 17, 32]


def draw(*size, seed=0, scale=1.0, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(size, generator=generator, device=DEVICE)).to(dtype)


def within_budget(exact, got, plain, name=""):
    """Error at most twice that of the plain path in the same precision, largest and mean."""
    floor = torch.finfo(got.dtype).eps * exact.abs().max()
    for measure in (torch.max, torch.mean):
        error, allowed = measure((got.double() - exact).abs()), 2 * measure((plain.double() - exact).abs()) + floor
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def double(value):
    """The same arguments in float64; integers and masks as they are."""
    if isinstance(value, (list, tuple)):
        return [double(item) for item in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def plain_norm(x, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    return weight * (x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_norm_linear(x, norm, weights, biases):
    y = plain_norm(x, norm)
    return torch.cat([F.linear(y, weight, bias) for weight, bias in zip(weights, biases)], dim=1)


def plain_gate_up(x, norm, gate, up):
    y = plain_norm(x, norm)
    return F.silu(F.linear(y, gate)) * F.linear(y, up)


def plain_linear_add(x, weight, residual):
    return residual + F.linear(x, weight)


def norm_linear(*given, config=None):
    from vreflection.kernels.decode_linear import norm_linear

    x, norm, weights, biases = given
    out = x.new_empty(x.shape[0], sum(len(weight) for weight in weights))
    return norm_linear(x, norm, EPS, weights, biases, out, config=config)


def gate_up(x, norm, gate, up, config=None):
    from vreflection.kernels.decode_linear import norm_gate_up

    return norm_gate_up(x, norm, EPS, gate, up, x.new_empty(x.shape[0], len(gate)), config=config)


def linear_add(x, weight, residual, config=None):
    from vreflection.kernels.decode_linear import linear_add

    return linear_add(x, weight, residual.clone(), config=config)


def norm_linear_inputs(rows, width, sizes, dtype):
    x, norm = draw(rows, width, scale=2.0, dtype=dtype), 1 + draw(width, seed=1, scale=0.1, dtype=dtype)
    weights = [draw(size, width, seed=2 + i, scale=width**-0.5, dtype=dtype) for i, size in enumerate(sizes)]
    return x, norm, weights, [draw(size, seed=7, dtype=dtype) for size in sizes]


def gate_up_inputs(rows, width, columns, dtype):
    weights = [draw(columns, width, seed=seed, scale=width**-0.5, dtype=dtype) for seed in (2, 3)]
    return *norm_linear_inputs(rows, width, [], dtype)[:2], *weights


def linear_add_inputs(rows, width, columns, dtype):
    weight = draw(columns, width, seed=2, scale=width**-0.5, dtype=dtype)
    return draw(rows, width, dtype=dtype), weight, draw(rows, columns, seed=3, dtype=dtype)


def linear_layers(name, rows, dtype):
    """(label, ours, plain, inputs) of the four products of a layer."""
    width, intermediate, heads, kv_heads, head, _ = DECODERS[name]
    sizes = [heads * head, kv_heads * head, kv_heads * head]
    yield "qkv", norm_linear, plain_norm_linear, norm_linear_inputs(rows, width, sizes, dtype)
    yield "out", linear_add, plain_linear_add, linear_add_inputs(rows, heads * head, width, dtype)
    yield "gate_up", gate_up, plain_gate_up, gate_up_inputs(rows, width, intermediate, dtype)
    yield "down", linear_add, plain_linear_add, linear_add_inputs(rows, intermediate, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_linear_layers_within_twice_the_plain_error(name, dtype):
    for rows in BATCHES:
        for label, ours, plain, inputs in linear_layers(name, rows, dtype):
            within_budget(plain(*double(inputs)), ours(*inputs), plain(*inputs), f"{label}, {rows} rows")


def every_product_tile():
    from vreflection.kernels.decode_launch import PRODUCT_TILES

    for (family, bits), tiles in PRODUCT_TILES.items():
        for tile in tiles:
            yield family, torch.float32 if bits == "32" else torch.bfloat16, tile


@pytest.mark.parametrize("family", ["linear", "pair", "vocabulary"])
def test_every_shipped_tile(family):
    """Also with rows and widths that fill no tile, and more rows than one program takes."""
    for _, dtype, tile in (case for case in every_product_tile() if case[0] == family):
        for rows, width in itertools.product((1, tile.rows, tile.rows + 1), (60, 3584)):
            runs = {
                "linear": [
                    (norm_linear, plain_norm_linear, norm_linear_inputs(rows, width, [520, 24, 7], dtype)),
                    (linear_add, plain_linear_add, linear_add_inputs(rows, width, 520, dtype)),
                ],
                "pair": [(gate_up, plain_gate_up, gate_up_inputs(rows, width, 520, dtype))],
                "vocabulary": [(logits, plain_logits, logits_inputs(rows, width, 5003, dtype))],
            }[family]
            for ours, plain, inputs in runs:
                got = ours(*inputs, config=tile)
                assert torch.equal(got, ours(*inputs, config=tile)), "two runs differ"
                within_budget(plain(*double(inputs)), got, plain(*inputs), f"{tile}, {rows} rows, width {width}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    from vreflection.kernels.decode_linear import rms_norm

    for rows, width in itertools.product((1, 32), (60, 2048, 3584)):
        x, norm = norm_linear_inputs(rows, width, [], dtype)[:2]
        within_budget(plain_norm(*double((x, norm))), rms_norm(x, norm, EPS, torch.empty_like(x)), plain_norm(x, norm))


# --- attention


def rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], dim=-1) * sin.to(x.dtype)


def plain_attention(qkv, cos, sin, lengths, keys, values):
    """Row by row; leaves the caches alone."""
    kv_heads, head = keys.shape[1], keys.shape[3]
    outputs = []
    for b, length in enumerate(lengths.tolist()):
        parts = qkv[b].unflatten(0, (-1, head))
        q, k, v = parts.split([len(parts) - 2 * kv_heads, kv_heads, kv_heads])
        q, k = rotate(q, cos[b], sin[b]), rotate(k, cos[b], sin[b])
        group = len(q) // kv_heads
        all_keys = torch.cat([keys[b, :, :length], k[:, None]], 1).repeat_interleave(group, 0)
        all_values = torch.cat([values[b, :, :length], v[:, None]], 1).repeat_interleave(group, 0)
        scores = (q[:, None] @ all_keys.mT) * head**-0.5
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(scores.dtype)
        outputs.append((weights @ all_values).flatten())
    return torch.stack(outputs)


def attention_inputs(name, lengths, columns, dtype):
    """Caches whose columns beyond each row's length are NaN."""
    _, _, heads, kv_heads, head, _ = DECODERS[name]
    rows = len(lengths)
    angle = draw(rows, head // 2, seed=5, scale=3.0, dtype=torch.float32).repeat(1, 2)
    caches = [draw(rows, kv_heads, columns, head, seed=seed, dtype=dtype) for seed in (1, 2)]
    for cache, (b, length) in itertools.product(caches, enumerate(lengths)):
        cache[b, :, length:] = float("nan")
    qkv = draw(rows, (heads + 2 * kv_heads) * head, scale=1.5, dtype=dtype)
    return qkv, angle.cos(), angle.sin(), torch.tensor(lengths, device=DEVICE), *caches


def attention(qkv, cos, sin, lengths, keys, values, extent=None, config=None):
    from vreflection.kernels.decode_attention import rope_attention

    head, kv_heads = keys.shape[3], keys.shape[1]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * kv_heads * head)
    return rope_attention(
        qkv, cos, sin, lengths, keys, values, out, scale=head**-0.5, extent=extent or keys.shape[2], config=config
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_attention_within_twice_the_plain_error(name, dtype):
    for rows, columns in ((1, 1), (1, 300), (1, 5000), (3, 2048), (8, 1025), (32, 700)):
        lengths = [(columns - 1) * (b + 1) // rows if b else columns - 1 for b in range(rows)]
        if rows > 1:
            lengths[1] = 0
        inputs = attention_inputs(name, lengths, columns, dtype)
        exact, plain = plain_attention(*double(inputs)), plain_attention(*inputs)
        got = attention(*inputs)
        within_budget(exact, got, plain, f"{rows} rows, {columns} columns")
        keys, values = inputs[4:]
        for b, length in enumerate(lengths):
            assert keys[b, :, : length + 1].isfinite().all() and keys[b, :, length + 1 :].isnan().all()
            head = keys.shape[3]
            assert torch.equal(values[b, :, length].flatten(), inputs[0][b, -values.shape[1] * head :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_splits_agree_and_do_not_move(dtype):
    from vreflection.kernels.decode_launch import ATTENTION_TILES, DecodeAttentionConfig

    keys, warps, stages = ATTENTION_TILES["32" if dtype == torch.float32 else "16"]
    inputs = attention_inputs("7b", [1999, 0, 64, 777], 2000, dtype)
    exact, plain = plain_attention(*double(inputs)), plain_attention(*inputs)
    for splits in (1, 2, 5, 31):
        config = DecodeAttentionConfig(keys, splits, warps, stages)
        got = attention(*inputs, config=config)
        within_budget(exact, got, plain, f"{splits} splits")
        for _ in range(5):
            assert torch.equal(got, attention(*inputs, config=config)), "a run differs from the one before"


# --- vocabulary


def plain_logits(hidden, weight):
    return F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))


def logits_inputs(rows, width, vocabulary, dtype):
    return draw(rows, width, dtype=dtype), draw(vocabulary, width, seed=1, scale=width**-0.5, dtype=dtype)


def everyone(rows):
    return torch.ones(rows, dtype=torch.bool, device=DEVICE)


def logits(hidden, weight, config=None):
    from vreflection.kernels.decode_pick import lm_head_logits

    out = torch.empty(len(hidden), len(weight), device=DEVICE)
    return lm_head_logits(hidden, weight, everyone(len(hidden)), out, config=config)


def pick(hidden, weight, needed=None, **options):
    from vreflection.kernels.decode_pick import lm_head_pick

    token = torch.full((len(hidden),), -5, device=DEVICE)
    return lm_head_pick(hidden, weight, everyone(len(hidden)) if needed is None else needed, token, **options)


def sampling(rows):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return {
        "temperature_B": torch.full((rows,), 0.7, device=DEVICE),
        "sample_B": torch.arange(rows, device=DEVICE) % 2 == 0,
        "key_B": keys.to(DEVICE),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_vocabulary_within_twice_the_plain_error(name, dtype):
    width, *_, vocabulary = DECODERS[name]
    for rows in (1, 2, 5, 32):
        inputs = logits_inputs(rows, width, vocabulary, dtype)
        exact = plain_logits(*double(inputs))
        got = logits(*inputs)
        within_budget(exact, got, plain_logits(*inputs), f"{rows} rows")
        assert torch.equal(pick(*inputs), got.argmax(1))


def test_choices_are_those_of_the_scores_they_come_from():
    """Penalty, temperature and noise applied in torch to the kernel's own logits give the kernel's own choice."""
    from vreflection.decoding.sampling import gumbel_noise

    for rows in (1, 2, 7, 32):
        inputs = logits_inputs(rows, 2048, 151936, torch.bfloat16)
        given = sampling(rows)
        seen = torch.rand(rows, 151936, device=DEVICE) < 0.3
        penalty = torch.full((rows,), 1.3, device=DEVICE)
        scores = logits(*inputs)
        scores = torch.where(seen, torch.where(scores < 0, scores * 1.3, scores / 1.3), scores)
        noisy = scores / given["temperature_B"][:, None] + gumbel_noise(given["key_B"], 151936)
        scores = torch.where(given["sample_B"][:, None], noisy, scores)
        token = pick(*inputs, seen_BV=seen, penalty_B=penalty, **given)
        chosen = scores.gather(1, token[:, None])[:, 0]
        assert (scores.max(1).values - chosen <= 1e-5).all()


def test_rows_that_need_nothing_and_nan():
    hidden, weight = logits_inputs(4, 1024, 5003, torch.bfloat16)
    needed = torch.tensor([True, False, True, False], device=DEVICE)
    token = pick(hidden, weight, needed)
    assert (token[~needed] == -5).all() and torch.equal(token[needed], logits(hidden, weight).argmax(1)[needed])
    assert (pick(hidden, weight, torch.zeros_like(needed)) == -5).all()
    hidden[2] = float("nan")
    token = pick(hidden, weight)
    assert ((token >= 0) & (token < 5003)).all() and token[2] == 0


# --- CUDA graphs


def launches(rows):
    """Each launcher as a call on fixed tensors, the tensor to change before the replay, and what it writes."""
    from vreflection.kernels import decode_attention, decode_linear, decode_pick

    x, norm, weights, biases = norm_linear_inputs(rows, 512, [512, 128, 128], torch.bfloat16)
    narrow, wide = x.new_empty(rows, 512), x.new_empty(rows, 768)
    yield "norm_linear", lambda: decode_linear.norm_linear(x, norm, EPS, weights, biases, wide), x
    yield "norm_gate_up", lambda: decode_linear.norm_gate_up(x, norm, EPS, weights[0], weights[0], narrow), x
    yield "rms_norm", lambda: decode_linear.rms_norm(x, norm, EPS, narrow), x
    residual = x.new_zeros(rows, 512)
    yield "linear_add", lambda: decode_linear.linear_add(x, weights[0], residual.zero_()), x
    for columns in (200, 3000):
        inputs = attention_inputs("3b", [columns // 2] * rows, columns, torch.bfloat16)
        out = x.new_empty(rows, 2048)
        yield (
            f"rope_attention of {columns}",
            lambda inputs=inputs, out=out, columns=columns: decode_attention.rope_attention(
                *inputs, out, scale=0.1, extent=columns
            ),
            inputs[0],
        )
    weight, token = draw(5003, 512, seed=8), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    needed, given, scores = everyone(rows), sampling(rows), torch.empty(rows, 5003, device=DEVICE)
    yield "lm_head_pick", lambda: decode_pick.lm_head_pick(x, weight, needed, token, **given), x
    yield "lm_head_logits", lambda: decode_pick.lm_head_logits(x, weight, needed, scores), x


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_every_launcher_can_be_captured_and_replayed(rows):
    for name, call, changed in launches(rows):
        call()  # compiles: a module cannot be loaded during capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        changed.copy_(draw(*changed.shape, seed=11))
        graph.replay()
        replayed = out.clone()
        out.zero_()
        assert torch.equal(call(), replayed), name
        assert not torch.equal(out, torch.zeros_like(out)), name


def test_overlapped_launches_change_nothing():
    """Three layers and a choice with programmatic dependent launches, plain and captured, bit for bit as without."""
    from vreflection.kernels import decode_attention, decode_linear, decode_pick

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    rows, width, columns = 2, 2048, 700
    x, norm, weights, biases = norm_linear_inputs(rows, width, [2048, 256, 256], torch.bfloat16)
    gate, up = (draw(11008, width, seed=seed, scale=width**-0.5) for seed in (4, 5))
    down, vocabulary = draw(width, 11008, seed=6, scale=0.01), draw(30011, width, seed=8)
    attended = attention_inputs("3b", [600, 13], columns, torch.bfloat16)
    qkv, context = torch.empty_like(attended[0]), x.new_empty(rows, 2048)
    hidden, final, wide = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, 11008)
    needed, given, token = everyone(rows), sampling(rows), torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def step(overlap):
        hidden.copy_(x)
        for _ in range(3):
            decode_linear.norm_linear(hidden, norm, EPS, weights, biases, qkv, overlap=overlap)
            decode_attention.rope_attention(qkv, *attended[1:], context, scale=0.1, extent=columns, overlap=overlap)
            decode_linear.linear_add(context, weights[0], hidden, overlap=overlap)
            decode_linear.norm_gate_up(hidden, norm, EPS, gate, up, wide, overlap=overlap)
            decode_linear.linear_add(wide, down, hidden, overlap=overlap)
        decode_linear.rms_norm(hidden, norm, EPS, final, overlap=overlap)
        decode_pick.lm_head_pick(final, vocabulary, needed, token, **given, overlap=overlap)
        return [t.clone() for t in (hidden, final, token)]

    expected = step(False)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(expected, step(True)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(True)
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured))


def test_a_latent_step_in_a_graph_skips_the_vocabulary():
    """The same graph with no row needed: the token stays, and the launch takes a fraction of the time."""
    hidden, weight = logits_inputs(1, 3584, 152064, torch.bfloat16)
    from vreflection.kernels.decode_pick import lm_head_pick

    needed, token = everyone(1), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lm_head_pick(hidden, weight, needed, token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            lm_head_pick(hidden, weight, needed, token)
    times = {}
    for wanted in (True, False, True, False):
        needed.fill_(wanted)
        token.fill_(-5)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times[wanted] = start.elapsed_time(end)
        assert (token.item() == -5) == (not wanted)
    assert times[False] < times[True] / 4, times


def test_cache_offsets_past_two_to_the_31():
    cache = torch.zeros(2**31 + 2**20, device=DEVICE, dtype=torch.bfloat16)
    inputs = attention_inputs("3b", [63, 12], 64, torch.bfloat16)
    row = 2 * 64 * 128
    far = [
        cache[at:].as_strided((2, 2, 64, 128), (2**31 + at, 64 * 128, 128, 1)).copy_(near)
        for at, near in zip((0, 2 * row), inputs[4:])
    ]
    expected = attention(*inputs)
    assert torch.equal(attention(*inputs[:4], *far), expected)
    assert torch.equal(far[0].nan_to_num(7.0), inputs[4].nan_to_num(7.0))
