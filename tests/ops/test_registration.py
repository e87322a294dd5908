"""The registered operators keep their contract: schema, shape rules, tracing of the public functions in one graph."""

import pytest
import torch

from vreflection.ops import (
    AttentionWeights,
    dispatch,
    distillation_loss,
    image_plan,
    probe_attention,
    region_attention,
    resample,
    roi_align,
    roi_plan,
    window_plan,
)

WIDTH, HEADS, QUERIES = 12, 2, 3
IMPLS = ["torch", "auto"]
CHECKS = ("test_schema", "test_faketensor")


def operator(name, impl):
    if impl == "cpp" and dispatch.CPP_MISSING:
        pytest.skip(dispatch.CPP_MISSING)
    return getattr(torch.ops.vreflection, name if impl == "cpp" else f"{name}_torch").default


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["window", "roi"])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_attend_passes_opcheck(ragged, impl, kind, shared):
    plan = ragged.plan(kind, ragged.SHAPES["boxes out of image order"], torch.float32)
    tokens, rows = torch.randn(24, WIDTH), torch.randn(1 if shared else 3, HEADS * QUERIES, WIDTH)
    attend, backward = operator("attend", impl), operator("attend_backward", impl)
    for map_heads in (0, HEADS):
        torch.library.opcheck(attend, (rows, tokens, *plan.geometry, map_heads), test_utils=CHECKS)
        context, weights, cells, maps = attend(rows, tokens, *plan.geometry, map_heads)
        for wanted in ((True, True), (True, False), (False, True)):
            arguments = (
                torch.randn_like(context), torch.randn_like(maps) if map_heads else None, rows, tokens, weights, cells,
                *plan.geometry, map_heads, *wanted,
            )  # fmt: skip
            torch.library.opcheck(backward, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_roi_align_passes_opcheck(ragged, impl):
    plan = ragged.plan("roi", ragged.SHAPES["boxes out of image order"], torch.float32)
    spans, _, index, weight = plan.geometry
    tokens = torch.randn(24, WIDTH)
    torch.library.opcheck(operator("roi_align", impl), (tokens, spans, index, weight), test_utils=CHECKS)
    grad = torch.randn(3, 9, WIDTH)
    backward = operator("roi_align_backward", impl)
    torch.library.opcheck(backward, (grad, spans, index, weight, 24), test_utils=CHECKS)


def test_skinny_products_pass_opcheck():
    if dispatch.CPP_MISSING:
        pytest.skip(dispatch.CPP_MISSING)
    x, y, w = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    for name, arguments in (("skinny_nt", (x, w)), ("skinny_nn", (y, w)), ("skinny_tn", (torch.zeros(2, 4, 5), y, x))):
        torch.library.opcheck(getattr(torch.ops.vreflection, name).default, arguments, test_utils=CHECKS)


def inputs(h, seed):
    generator = torch.Generator().manual_seed(seed)
    grids = torch.tensor([[h, 5], [3, 7]])
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.6], [0.3, 0.0, 0.5, 1.0]])
    tokens = torch.randn(h * 5 + 21, WIDTH, generator=generator, requires_grad=True)
    queries = torch.randn(QUERIES, WIDTH, generator=generator, requires_grad=True)
    return tokens, queries, grids, boxes, torch.tensor([0, 1])


def calls(impl):
    torch.manual_seed(0)
    # Small enough that no attention weight underflows to zero, where the teacher's side of the KL has no gradient.
    sizes = ((3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
    w = AttentionWeights(*(0.3 * torch.randn(size) for size in sizes))
    w = AttentionWeights(*(p.requires_grad_() for p in w))

    def distill(t, q, g, b, i):
        teacher_plan, plan = window_plan(t.shape[0], g, b, i, t.device), image_plan(t.shape[0], g, i, t.device)
        student = resample(q, t, plan, w, HEADS, True, impl)
        teacher = resample(q.detach() * 2, t.detach(), teacher_plan, w, HEADS, True, impl)
        return distillation_loss(student[0], teacher[0], student[1], teacher[1], teacher_plan.keys_in(plan))

    return w, {
        "roi_align": lambda t, q, g, b, i: roi_align(t, g, b, i, 3, impl=impl),
        "region_attention": lambda t, q, g, b, i: region_attention(
            q, t, window_plan(t.shape[0], g, b, i, t.device), 1, impl
        ),
        "probe_attention": lambda t, q, g, b, i: probe_attention(q, t, g, i, 1, impl),
        "resample, window": lambda t, q, g, b, i: resample(
            q, t, window_plan(t.shape[0], g, b, i, t.device), w, HEADS, True, impl
        ),
        "resample, RoI cells": lambda t, q, g, b, i: resample(
            q, t, roi_plan(t.shape[0], g, b, i, 3, device=t.device), w, HEADS, True, impl
        ),
        "resample, adaptive RoI": lambda t, q, g, b, i: resample(
            q, t, roi_plan(t.shape[0], g, b, i, 3, 0, device=t.device), w, HEADS, False, impl
        ),
        "distillation_loss": distill,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", list(calls("torch")[1]))
def test_public_functions_compile_in_one_graph(name, impl):
    """Two packs of different size through one compiled function: values and gradients are the eager ones."""
    torch._dynamo.reset()
    weights, functions = calls(impl)
    compiled = torch.compile(functions[name], fullgraph=True, backend="aot_eager", dynamic=True)
    for h, seed in ((4, 0), (8, 1)):
        results = []
        for function in (functions[name], compiled):
            arguments = inputs(h, seed)
            out = function(*arguments)
            out = out if isinstance(out, tuple) else (out,)
            leaves = [*arguments[:2], *weights]
            grads = torch.autograd.grad(sum(o.square().sum() for o in out), leaves, allow_unused=True)
            results.append([*out, *(g for g in grads if g is not None)])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_modules_compile_in_one_graph():
    from vreflection.modules import BoxGuidedCompression, DynamicAutoregressiveCompression

    torch._dynamo.reset()
    tokens, queries, grids, boxes, box_image = inputs(4, 0)
    teacher = BoxGuidedCompression(WIDTH, QUERIES, HEADS)
    student = DynamicAutoregressiveCompression(WIDTH, HEADS)
    cases = [
        (teacher, (tokens, grids, boxes, box_image)),
        (student, (queries.expand(2, -1, -1), tokens, grids, box_image)),
    ]
    for module, arguments in cases:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), module(*arguments))


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_compilation_that_breaks_the_graph_still_works(impl):
    """Lists as geometry, then no box at all: bodies of operators are not traced where the graph breaks."""
    from vreflection.modules import BoxGuidedCompression

    torch._dynamo.reset()
    tokens, _, grids, boxes, box_image = inputs(4, 0)
    module = BoxGuidedCompression(WIDTH, QUERIES, HEADS, impl=impl)
    compiled = torch.compile(module, backend="aot_eager")
    expected = module(tokens, grids, boxes, box_image)
    torch.testing.assert_close(compiled(tokens, grids.tolist(), boxes.tolist(), box_image.tolist()), expected)
    torch.testing.assert_close(compiled(tokens, grids, boxes, box_image), expected)
    assert compiled(tokens, grids, boxes[:0], box_image[:0]).shape == (0, QUERIES, WIDTH)
    maps, expected_maps = (m(tokens, grids, boxes, box_image, return_attention=True)[1] for m in (compiled, module))
    for got, wanted in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(got, wanted)


def test_meta_tensors_of_a_pack_past_two_to_the_31():
    """Shape rules hold where offsets no longer fit 32 bits; nothing is allocated."""
    spans = torch.empty(1, 5, dtype=torch.int64, device="meta")
    keys = torch.empty(700_000, dtype=torch.int32, device="meta")
    tokens, rows = torch.empty(700_000, 3584, device="meta"), torch.empty(1, 64, 3584, device="meta")
    context, weights, _, maps = torch.ops.vreflection.attend_torch(rows, tokens, spans, keys, None, None, 8)
    assert context.shape == (1, 64, 3584) and weights.shape == (700_000, 64) and maps.shape == (700_000, 8)
