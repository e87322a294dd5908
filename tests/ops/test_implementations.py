"""Every implementation of every operator against `impl="reference"`: values and all gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vreflection.ops import (
    AttentionWeights,
    absorb_queries,
    image_plan,
    probe_attention,
    project_context,
    region_attention,
    resample,
    roi_plan,
)
from vreflection.ops import roi_align as roi_align_op
from vreflection.ops.projected import resample_projected

IMPLS = ["torch", "cpp", pytest.param("triton", marks=pytest.mark.interpreter)]
KINDS = ["window", "image", "roi"]
WIDTH, QUERIES, HEADS = 12, 3, 2


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outcome(function, leaves, seed=9):
    """Results and gradients of a random projection of all of them, in float64."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o * draw(*o.shape, seed=seed + i, dtype=o.dtype)).sum() for i, o in enumerate(out))
    return [t.detach().double() for t in (*out, *torch.autograd.grad(loss, leaves))]


def assert_equal(got, expected, atol=1e-11):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ["one token", "one box", "five boxes on one image", "boxes out of image order"])
def test_region_attention(ragged, impl, kind, shared, shape):
    ragged.runnable("region_attention", impl, torch.float64)
    plan = ragged.plan(kind, ragged.SHAPES[shape])
    rows = draw(*([] if shared else [plan.num_boxes]), HEADS * QUERIES, WIDTH, seed=1)
    leaves = [rows, draw(plan.num_tokens, WIDTH)]
    results = [
        outcome(lambda r, t, how=how: region_attention(r, t, plan, HEADS, how), leaves) for how in (impl, "reference")
    ]
    assert_equal(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ["a box of one token", "one row", "images of very different size"])
def test_resample(ragged, impl, kind, shape):
    ragged.runnable("resample", impl, torch.float64)
    plan = ragged.plan(kind, ragged.SHAPES[shape])
    for queries in (draw(QUERIES, WIDTH, seed=1), draw(plan.num_boxes, QUERIES, WIDTH, seed=1)):
        leaves = [queries, draw(plan.num_tokens, WIDTH), *ragged.weights(WIDTH)]

        def run(how, leaves=leaves):
            return outcome(lambda q, t, *w: resample(q, t, plan, AttentionWeights(*w), HEADS, True, how), leaves)

        assert_equal(run(impl), run("reference"))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("wanted", range(6))
def test_gradients_asked_for_one_at_a_time(ragged, impl, wanted):
    ragged.runnable("resample", impl, torch.float64)
    plan = ragged.plan("window", ragged.SHAPES["five boxes on one image"])
    leaves = [draw(QUERIES, WIDTH, seed=1), draw(plan.num_tokens, WIDTH), *ragged.weights(WIDTH)]

    def gradient(how, asked):
        given_ = [leaf.clone().requires_grad_(i in asked) for i, leaf in enumerate(leaves)]
        out = resample(given_[0], given_[1], plan, AttentionWeights(*given_[2:]), HEADS, impl=how)
        return torch.autograd.grad(out.square().sum(), given_[wanted])[0]

    torch.testing.assert_close(gradient(impl, [wanted]), gradient("reference", range(6)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["one token", "one box", "five boxes on one image", "images of very different size"])
def test_projected_form(ragged, kind, shape):
    plan = ragged.plan(kind, ragged.SHAPES[shape])
    for count in (1, plan.num_boxes):
        leaves = [draw(count, QUERIES, WIDTH, seed=1), draw(plan.num_tokens, WIDTH), *ragged.weights(WIDTH)]

        def stock(q, t, *w):
            return resample(q, t, plan, AttentionWeights(*w), HEADS, True, "reference")

        def projected(q, t, *w):
            return resample_projected(q, t, plan, AttentionWeights(*w), HEADS)

        assert_equal(outcome(projected, leaves), outcome(stock, leaves))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ["one token", "five boxes on one image", "images of very different size"])
def test_roi_align(ragged, impl, shape):
    ragged.runnable("roi_align", impl, torch.float64)
    grids, boxes, box_image = ragged.SHAPES[shape]
    tokens = draw(sum(h * w for h, w in grids), WIDTH)
    for sampling in ((2, True), (0, True), (3, False)):

        def run(how, sampling=sampling):
            return outcome(lambda t: roi_align_op(t, grids, boxes, box_image, 3, *sampling, how), [tokens])

        assert_equal(run(impl), run("reference"))


unit = st.floats(0, 1, allow_nan=False)
image = st.tuples(st.integers(1, 7), st.integers(1, 7))
corner = st.tuples(unit, unit, unit, unit)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(image, min_size=1, max_size=3),
    corners=st.lists(st.tuples(corner, st.integers(0, 2)), max_size=4),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 4, 17]),
    rows=st.integers(1, 5),
    shared=st.booleans(),
)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_any_ragged_shape(ragged, impl, images, corners, kind, width, rows, shared):
    ragged.runnable("region_attention", impl, torch.float64)
    boxes = [[min(a, b), min(c, d), max(a, b) + 0.01, max(c, d) + 0.01] for (a, b, c, d), _ in corners]
    plan = ragged.plan(kind, (images, boxes, [i % len(images) for _, i in corners]))
    leaves = [draw(*([] if shared else [plan.num_boxes]), rows, width, seed=1), draw(plan.num_tokens, width)]
    if not plan.num_boxes:
        assert region_attention(*leaves, plan, impl=impl).shape == (0, rows, width)
        return
    results = [
        outcome(lambda r, t, how=how: region_attention(r, t, plan, 1, how), leaves) for how in (impl, "reference")
    ]
    assert_equal(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_outside_a_region_is_read(ragged, impl, kind):
    """Tokens embedded in a buffer of NaN, every token outside the boxes NaN too: values and gradients stay finite."""
    ragged.runnable("region_attention", impl, torch.float64)
    plan = ragged.plan(kind, ([[6, 7], [4, 5]], [[0.2, 0.2, 0.7, 0.6], [0.0, 0.0, 0.3, 0.3]], [0, 0]))
    clean = draw(plan.num_tokens, WIDTH)
    buffer = torch.full((plan.num_tokens + 10, WIDTH + 6), float("nan"), dtype=torch.float64)
    inside = torch.zeros(plan.num_tokens, dtype=torch.bool)
    inside[plan.key_tokens()] = True
    buffer[5:-5, 2:-4][inside] = clean[inside]
    rows = draw(plan.num_boxes, HEADS, WIDTH, seed=1)
    expected = outcome(lambda r, t: region_attention(r, t, plan, HEADS, "reference"), [rows, clean])
    leaf = buffer.requires_grad_()
    query = rows.clone().requires_grad_()
    out = region_attention(query, leaf[5:-5, 2:-4], plan, HEADS, impl)
    loss = sum((o * draw(*o.shape, seed=9 + i)).sum() for i, o in enumerate(out))
    grads = torch.autograd.grad(loss, [query, leaf])
    assert_equal([*out, grads[0], grads[1][5:-5, 2:-4]], expected)
    assert grads[1][:5].abs().sum() == 0 and grads[1][:, :2].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_inside_one_box_stays_there(ragged, impl, kind):
    ragged.runnable("resample", impl, torch.float64)
    plan = ragged.plan(kind, ([[4, 5], [3, 3], [2, 6]], [[0, 0, 1, 1]] * 3, [0, 1, 2]))
    tokens = draw(plan.num_tokens, WIDTH)
    poisoned = tokens.clone()
    poisoned[20:29] = float("nan")
    queries = draw(3, QUERIES, WIDTH, seed=1).requires_grad_()
    clean, got = (resample(queries, t, plan, ragged.weights(WIDTH), HEADS, impl=impl) for t in (tokens, poisoned))
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-13)
    (gradient,) = torch.autograd.grad(got[[0, 2]].square().sum(), queries)
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("impl", "dtype"), [("cpp", torch.bfloat16), ("cpp", torch.float32), ("torch", torch.bfloat16),
    ("torch", torch.float16), pytest.param("triton", torch.float16, marks=pytest.mark.interpreter)])  # fmt: skip
def test_error_against_float64_stays_within_twice_the_stock_path(ragged, impl, dtype, kind):
    """Max and mean error of outputs and gradients, at a width where rounding shows."""
    ragged.runnable("resample", impl, dtype)
    width, heads = 128, 2
    shape = ([[12, 11], [7, 20]], [[0.1, 0.1, 0.9, 0.8], [0, 0, 1, 1], [0.3, 0.2, 0.6, 0.9]], [0, 1, 1])

    def run(how, precision):
        plan = ragged.plan(kind, shape, precision)
        leaves = [draw(3, 8, width, seed=1), draw(plan.num_tokens, width), *ragged.weights(width)]
        # Every path starts from the values that the low precision can hold.
        leaves = [leaf.to(dtype).to(precision) for leaf in leaves]
        return outcome(lambda q, t, *w: resample(q, t, plan, AttentionWeights(*w), heads, impl=how), leaves)

    truth, ours, stock = run("reference", torch.float64), run(impl, dtype), run("reference", dtype)
    for index, (exact, got, budget) in enumerate(zip(truth, ours, stock, strict=True)):
        floor = torch.finfo(dtype).eps * exact.abs().max()
        for measure in (torch.max, torch.mean):
            error, allowed = measure((got - exact).abs()), 2 * measure((budget - exact).abs()) + floor
            assert error <= allowed, f"tensor {index}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(ragged, impl, kind):
    ragged.runnable("resample", impl, torch.float64)
    plan = ragged.plan(kind, ragged.SHAPES["boxes out of image order"])
    leaves = [draw(QUERIES, 4, seed=1), draw(plan.num_tokens, 4), *ragged.weights(4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(q, t, *w):
        return resample(q, t, plan, AttentionWeights(*w), 2, True, impl)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_second_derivatives_are_refused_rather_than_wrong(ragged, impl):
    ragged.runnable("resample", impl, torch.float64)
    plan = ragged.plan("image", ragged.SHAPES["one box"])
    tokens = draw(plan.num_tokens, WIDTH).requires_grad_()
    out = resample(draw(QUERIES, WIDTH), tokens, plan, ragged.weights(WIDTH), HEADS, impl=impl)
    (gradient,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_no_keys_values_or_cells_are_kept_for_the_backward(ragged, impl, kind):
    """Beyond inputs and parameters, a step keeps less than an eighth of what the tokens take."""
    ragged.runnable("resample", impl, torch.float32)
    width, heads, queries = 512, 4, 2
    plan = ragged.plan(kind, ([[40, 50]], [[0, 0, 1, 1]], [0]), torch.float32)
    tokens, w = draw(2000, width, dtype=torch.float32), ragged.weights(width, torch.float32)
    given = [tokens, draw(queries, width, dtype=torch.float32), *w]
    inputs = [*given, *(tensor for tensor in plan.geometry if tensor is not None)]
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = [leaf.requires_grad_() for leaf in given[1:]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        resample(leaves[0], tokens, plan, AttentionWeights(*leaves[1:]), heads, True, impl)
    assert 0 < sum(kept.values()) < tokens.numel() * tokens.element_size() / 8


def test_pieces_compose_to_the_whole(ragged):
    """What a user builds from the small operators is what `resample` computes."""
    grids, _, box_image = ragged.SHAPES["boxes out of image order"]
    plan = ragged.plan("image", ragged.SHAPES["boxes out of image order"])
    tokens, queries, w = draw(plan.num_tokens, WIDTH), draw(3, QUERIES, WIDTH, seed=1), ragged.weights(WIDTH)
    rows = absorb_queries(queries, w.in_proj_weight, w.in_proj_bias, HEADS)
    context, maps = probe_attention(rows, tokens, grids, box_image, HEADS)
    values = project_context(context, w.in_proj_weight, w.in_proj_bias, HEADS)
    out = torch.nn.functional.linear(values, w.out_proj_weight, w.out_proj_bias)
    expected, expected_maps = resample(queries, tokens, plan, w, HEADS, True, "reference")
    assert_equal([out, maps], [expected, expected_maps])


def test_autocast_matches_the_stock_dtypes(ragged):
    plan = ragged.plan("window", ragged.SHAPES["one box"], torch.float32)
    w = ragged.weights(WIDTH, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (draw(QUERIES, WIDTH, dtype=torch.float32), *w)]
    tokens = draw(plan.num_tokens, WIDTH, dtype=torch.float32)
    for impl in ("auto", "torch", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = resample(leaves[0], tokens, plan, AttentionWeights(*leaves[1:]), HEADS, impl=impl)
        assert out.dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("impl", ["auto", "torch", "cpp", "reference"])
def test_attention_under_autocast_and_its_backward(ragged, impl):
    """Autocast casts the inputs, as for a product; a backward inside or outside of it gives the same."""
    ragged.runnable("region_attention", impl if impl != "auto" else "torch", torch.bfloat16)
    plan = ragged.plan("roi", ragged.SHAPES["one box"], torch.float32)
    rows, tokens = draw(6, WIDTH, seed=1, dtype=torch.float32), draw(plan.num_tokens, WIDTH, dtype=torch.float32)

    def run(inside):
        leaves = [rows.clone().requires_grad_(), tokens.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            context, _ = region_attention(*leaves, plan, HEADS, impl)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            grads = torch.autograd.grad(context.float().square().sum(), leaves)
        return context, *grads

    assert run(True)[0].dtype == torch.bfloat16
    if impl != "reference":
        for inside, outside in zip(run(True), run(False), strict=True):
            assert torch.equal(inside, outside)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, t, p: region_attention(r[..., :4], t, p), r"query_rows: expected \(R, 12\) or \(1, R, 12\)"),
        (lambda r, t, p: region_attention(r.expand(2, -1, -1), t, p), r"query_rows: expected"),
        (lambda r, t, p: region_attention(r.float(), t, p), "one dtype"),
        (lambda r, t, p: region_attention(r, t, p, 4), "map_heads: expected a divisor of 6"),
        (lambda r, t, p: region_attention(r, t[:3], p), "made for 35 packed rows, got 3"),
        (lambda r, t, p: region_attention(r, t.long(), p), "expected floating point"),
        (lambda r, t, p: region_attention(r, t, p, impl="fast"), "impl: expected one of"),
        (lambda r, t, p: resample(r, t, p, None, 2), "weights: expected AttentionWeights"),
        (
            lambda r, t, p: resample(r, t, p, AttentionWeights(None, None, t, None), 2),
            "expected four tensors, got none for",
        ),
        (
            lambda r, t, p: resample(r, t, p, AttentionWeights(*[torch.zeros(12, 12)] * 4), 2),
            r"in_proj_weight: expected \(36, 12\), got \(12, 12\)",
        ),
        (lambda r, t, p: region_attention(r, t, p.geometry), "plan: expected a RegionPlan"),
        (
            lambda r, t, p: region_attention(r, t, roi_plan(35, [[5, 7]], [[0, 0, 1, 1]], [0], 3)),
            "need torch.float64 sampling weights, got torch.float32",
        ),
    ],
)
def test_bad_arguments_are_named(ragged, call, message):
    plan = ragged.plan("image", ragged.SHAPES["one box"])
    with pytest.raises(ValueError, match=message):
        call(draw(6, WIDTH), draw(plan.num_tokens, WIDTH), plan)


def test_plan_of_int64_offsets():
    """A pack of more than 2^31 values is planned without overflow; the plan itself is small."""
    plan = image_plan(2**31 + 4, [[2**15, 2**16], [2, 2]], [1])
    assert plan.spans_B5.tolist() == [[2**31, 2, 2, 2, 0]]
    assert plan.key_tokens().tolist() == [2**31, 2**31 + 1, 2**31 + 2, 2**31 + 3]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_regions_past_two_to_the_31_elements(ragged, impl):
    """The last image of a pack of 2.2e9 values; only its own pages are ever touched."""
    ragged.runnable("region_attention", impl, torch.bfloat16)
    width, first = 3584, 800 * 770
    pack = torch.empty(first + 12, width, dtype=torch.bfloat16)
    assert pack[first:].storage_offset() > 2**31
    pack[first:] = draw(12, width, dtype=torch.bfloat16)
    rows = draw(6, width, seed=1, dtype=torch.bfloat16) / width**0.5
    far, near = image_plan(first + 12, [[800, 770], [3, 4]], [1]), image_plan(12, [[3, 4]], [0])

    def run(tokens, plan):
        query = rows.clone().requires_grad_()
        context = region_attention(query, tokens, plan, impl=impl)
        return context.detach(), *torch.autograd.grad(context.float().square().sum(), query)

    for got, expected in zip(run(pack, far), run(pack[first:].clone(), near), strict=True):
        assert torch.equal(got, expected)
