"""The Triton operators on a real GPU: what interpreter and ahead-of-time compilation cannot show. `pytest -m gpu`."""

import itertools

import pytest
import torch

from vreflection.ops import (
    AttentionWeights,
    distillation_loss,
    image_plan,
    region_attention,
    resample,
    roi_align,
    roi_plan,
    window_plan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GRIDS = [[31, 33], [9, 40], [1, 1], [64, 80]]
BOXES = [
    [0.1, 0.1, 0.9, 0.6],
    [0.3, 0.0, 0.31, 1.0],
    [0.0, 0.0, 1.0, 1.0],
    [0.5, 0.5, 0.9, 0.99],
    [0.0, 0.0, 1.0, 1.0],
    [0.2, 0.3, 0.4, 0.9],
]
BOX_IMAGE = [0, 1, 2, 0, 3, 3]
TOKENS = sum(h * w for h, w in GRIDS)


def plan(kind, device, dtype=torch.float32):
    if kind == "image":
        return image_plan(TOKENS, GRIDS, BOX_IMAGE, device)
    if kind == "window":
        return window_plan(TOKENS, GRIDS, BOXES, BOX_IMAGE, device)
    wide = torch.promote_types(dtype, torch.float32)
    return roi_plan(TOKENS, GRIDS, BOXES, BOX_IMAGE, 7, device=device, dtype=wide)


def draw(*size, seed=0, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bf16(*size, seed=0, scale=1.0):
    return draw(*size, seed=seed, scale=scale).to("cuda", torch.bfloat16)


def outcome(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o * draw(*o.shape, seed=9 + i).to(o)).sum() for i, o in enumerate(out))
    return [t.detach().double().cpu() for t in (*out, *torch.autograd.grad(loss, leaves))]


def within_budget(truth, ours, stock, dtype):
    """Error at most twice that of the stock path in the same precision, largest and mean."""
    for index, (exact, got, budget) in enumerate(zip(truth, ours, stock, strict=True)):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        for measure in (torch.max, torch.mean):
            error, allowed = measure((got - exact).abs()), 2 * measure((budget - exact).abs()) + floor
            assert error <= allowed, f"tensor {index}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("width", [1023, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["window", "image", "roi"])
def test_region_attention_within_twice_the_plain_error(kind, dtype, width):
    rows, tokens = draw(len(BOXES), 64, width, seed=1, scale=width**-0.5), draw(TOKENS, width)
    low = [t.to(dtype) for t in (rows, tokens)]

    def run(impl, device, precision):
        at = plan(kind, device, precision)
        return outcome(lambda r, t: region_attention(r, t, at, 8, impl), [t.to(device, precision) for t in low])

    stock = run("reference", "cuda", dtype)
    within_budget(run("reference", "cpu", torch.float64), run("triton", "cuda", dtype), stock, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
def test_resample_at_the_7b_width(shared, dtype):
    width, heads = 3584, 8
    queries = draw(*([] if shared else [len(BOXES)]), 8, width, seed=1)
    leaves = [queries, draw(TOKENS, width), draw(3 * width, width, seed=2, scale=width**-0.5), draw(3 * width, seed=3),
              draw(width, width, seed=4, scale=width**-0.5), draw(width, seed=5)]  # fmt: skip
    low = [t.to(dtype) for t in leaves]

    def run(impl, device, precision):
        at = plan("window", device, precision)
        given = [t.to(device, precision) for t in low]
        return outcome(lambda q, t, *w: resample(q, t, at, AttentionWeights(*w), heads, True, impl), given)

    stock = run("reference", "cuda", dtype)
    within_budget(run("reference", "cuda", torch.float64), run("triton", "cuda", dtype), stock, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(dtype, ratio):
    tokens = draw(TOKENS, 515).to(dtype)

    def run(impl, device, precision):
        return outcome(
            lambda t: roi_align(t, GRIDS, BOXES, BOX_IMAGE, 7, ratio, impl=impl), [tokens.to(device, precision)]
        )

    within_budget(run("torch", "cpu", torch.float64), run("triton", "cuda", dtype), run("torch", "cuda", dtype), dtype)


def test_distillation_loss():
    student_plan, teacher_plan = plan("image", "cuda"), plan("window", "cuda")
    latents, targets = draw(6, 8, 1024), draw(6, 8, 1024, seed=1)
    student, teacher = (draw(p.num_keys, 8, seed=2).softmax(0) for p in (student_plan, teacher_plan))
    index = teacher_plan.keys_in(student_plan)

    def run(impl, dtype):
        leaves = [t.to("cuda", dtype) for t in (latents, targets, student)]
        return outcome(lambda z, y, a: distillation_loss(z, y, a, teacher.to(a), index, impl=impl), leaves)

    for got, exact in zip(run("triton", torch.float32), run("torch", torch.float64), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def attention_configs():
    """Every shipped tile of every kernel of the attention, with and without splits."""
    from vreflection.kernels import launch

    shipped = launch.shipped_configs()
    for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
        families = [shipped[f"{name}/{bits}"] for name in ("scores", "context", "token_gradient")]
        for scores, context, gradient in itertools.product(*families):
            for splits, chunk in ((1, 2**20 // context.tokens * context.tokens), (3, 4 * context.tokens)):
                yield dtype, launch.AttentionConfig(scores, context, gradient, splits, chunk)


@pytest.mark.parametrize("number", range(8))
def test_every_shipped_configuration(number):
    from vreflection.kernels.region_attention import attend, attend_backward

    configs = list(attention_configs())
    assert len(configs) <= 8, "raise the range above"
    if number >= len(configs):
        pytest.skip("fewer configurations are shipped")
    dtype, config = configs[number]
    at = plan("window", "cuda")
    rows, tokens = draw(6, 64, 512, seed=1, scale=512**-0.5).to("cuda", dtype), draw(TOKENS, 512).to("cuda", dtype)
    results = []
    for launch, module in ((config, True), (None, False)):
        extra = {"config": launch} if module else {}
        context, weights, cells, maps = attend(rows, tokens, *at.geometry, 8, **extra)
        grads = attend_backward(context, maps, rows, tokens, weights, cells, *at.geometry, 8, True, True, **extra)
        results.append([context, weights, maps, *grads])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for forced, chosen in zip(*results, strict=True):
        scale = chosen.float().abs().max()
        assert (forced.float() - chosen.float()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("kind", ["window", "roi"])
def test_runs_are_bit_equal(kind):
    """No atomics and no unordered sums: a race would show as a moving result."""
    at = plan(kind, "cuda")
    leaves = [bf16(64, 1024, seed=1, scale=1024**-0.5), bf16(TOKENS, 1024)]
    torch.use_deterministic_algorithms(True)
    try:
        first = outcome(lambda r, t: region_attention(r, t, at, 8, "triton"), leaves)
        for _ in range(5):
            again = outcome(lambda r, t: region_attention(r, t, at, 8, "triton"), leaves)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["window", "roi"])
def test_forward_and_backward_can_be_captured_and_replayed(kind):
    from vreflection.ops import dispatch

    at = plan(kind, "cuda")
    rows, tokens = bf16(1, 64, 512, seed=1, scale=0.05), bf16(TOKENS, 512)
    forward, backward = (dispatch.operator(name, "triton", "cuda") for name in ("attend", "attend_backward"))

    def step():
        context, weights, cells, maps = forward(rows, tokens, *at.geometry, 8)
        return context, *backward(context, maps, rows, tokens, weights, cells, *at.geometry, 8, True, True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tokens.copy_(draw(TOKENS, 512, seed=7))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_offsets_past_two_to_the_31():
    width, first = 3584, 640_000  # 640,000 x 3584 elements lie before the second image
    tokens = torch.zeros(first + 60, width, device="cuda", dtype=torch.bfloat16)
    tokens[first:] = draw(60, width).to(tokens)
    rows = bf16(64, width, seed=1, scale=width**-0.5)
    far = image_plan(first + 60, [[800, 800], [6, 10]], [1], "cuda")
    near = image_plan(60, [[6, 10]], [0], "cuda")
    expected = region_attention(rows, tokens[first:], near, 8, "triton")
    for got, want in zip(region_attention(rows, tokens, far, 8, "triton"), expected, strict=True):
        assert torch.equal(got, want)


def test_nothing_outside_the_regions_is_read():
    at = plan("window", "cuda")
    tokens = torch.full((TOKENS, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    inside = at.key_tokens().unique()
    tokens[inside] = draw(len(inside), 512).to(tokens)
    rows = bf16(64, 512, seed=1, scale=0.05).requires_grad_()
    leaf = tokens.requires_grad_()
    context, maps = region_attention(rows, leaf, at, 8, "triton")
    grads = torch.autograd.grad(context.float().sum() + maps.square().sum(), [rows, leaf])
    assert all(t.isfinite().all() for t in (context, maps, *grads))


def test_inductor_compiles_in_one_graph():
    torch._dynamo.reset()
    width = 512
    sizes = ((3 * width, width), (3 * width,), (width, width), (width,))
    weights = AttentionWeights(*(bf16(*size, scale=0.05) for size in sizes))
    tokens, queries = bf16(TOKENS, width), bf16(8, width, seed=1)
    geometry = [torch.tensor(g) for g in (GRIDS, BOXES, BOX_IMAGE)]

    def call(q, t, grids, boxes, box_image):
        return resample(q, t, window_plan(t.shape[0], grids, boxes, box_image, t.device), weights, 8, True)

    compiled = torch.compile(call, fullgraph=True)
    for got, expected in zip(compiled(queries, tokens, *geometry), call(queries, tokens, *geometry), strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)
