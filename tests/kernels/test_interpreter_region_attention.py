"""`attend` and its gradients in Triton's interpreter against a dense float64 oracle."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run with TRITON_INTERPRET=1 python -m pytest -m interpreter"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# Five boxes on one image, overlapping, next to images of very different size and one of a single row.
GRIDS = [(3, 5), (1, 9), (12, 13), (1, 1)]
MIXED = [(2, 1, 11, 2, 12), (0, 0, 3, 0, 5), (2, 3, 4, 4, 5), (1, 0, 1, 2, 7), (3, 0, 1, 0, 1)]
FIVE_ON_ONE = [(2, 0, 12, 0, 13), (2, 1, 11, 2, 12), (2, 3, 4, 4, 5), (2, 0, 1, 0, 13), (2, 5, 12, 6, 7)]
# name: grids, boxes, R, D, heads, shared rows, (P, K) taps
CASES = {
    "mixed": (GRIDS, MIXED, 6, 48, 3, True, None),
    "mixed_per_box": (GRIDS, MIXED, 6, 37, 2, False, None),
    "mixed_roi": (GRIDS, MIXED, 6, 48, 3, True, (3, 4)),
    "mixed_roi_per_box": (GRIDS, MIXED, 10, 37, 2, False, (7, 2)),
    "five_on_one": (GRIDS, FIVE_ON_ONE, 3, 130, 1, True, None),
    "one_token": ([(1, 1)], [(0, 0, 1, 0, 1)], 1, 48, 1, True, None),
    "one_token_roi": ([(1, 1)], [(0, 0, 1, 0, 1)], 1, 16, 0, False, (2, 1)),
    "one_box_1023": ([(31, 33)], [(0, 0, 31, 0, 33)], 3, 16, 3, True, None),
    "one_row": ([(1, 70)], [(0, 0, 1, 0, 70), (0, 0, 1, 3, 67)], 64, 16, 8, False, None),
    "rows_65": ([(5, 5)], [(0, 1, 5, 0, 3), (0, 0, 2, 0, 5)], 65, 33, 5, True, None),
    "rows_130": ([(5, 5)], [(0, 1, 5, 0, 3), (0, 0, 2, 0, 5)], 130, 17, 10, False, (2, 2)),
}


def build(oracle, case, dtype, config=None):
    """Run the kernels and the oracle on the same rounded inputs; returns two dicts of tensors.

    Tokens outside every region, the ends of every input and the gaps between token rows are NaN for the kernels.
    """
    grids, rects, count, depth, heads, shared, taps = case
    generator = torch.Generator().manual_seed(0)
    spans, key_box, num_tokens = oracle.geometry(grids, rects)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape, scale=1.0, kind=dtype):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(kind)

    tokens = draw(num_tokens, depth)
    rows = draw(1 if shared else len(spans), count, depth, scale=depth**-0.5)
    tap_index, tap_weight = oracle.random_taps(spans, *taps, generator, wide) if taps else (None, None)
    grad_context = draw(len(spans), count, depth)
    grad_maps = draw(len(key_box), count // heads, kind=wide) if heads else None
    covered = torch.zeros(num_tokens, dtype=torch.bool)
    for span in spans:
        covered[oracle.token_ids(span)] = True

    def dense(kind):
        r, x = rows.to(kind).requires_grad_(), tokens.to(kind).requires_grad_()
        weight = None if tap_weight is None else tap_weight.to(kind)
        out = oracle.dense_attend(r, x, spans, tap_index, weight, heads)
        loss = (out[0] * grad_context.to(kind)).sum()
        if heads:
            loss = loss + (out[3] * grad_maps.to(kind)).sum()
        loss.backward()
        return named(*out, r.grad, x.grad)

    kernels = oracle.kernel_module("region_attention")
    kernel_tokens = oracle.poisoned(tokens.masked_fill(~covered[:, None], float("nan")), row_gap=5)
    geometry = (spans, key_box, tap_index, None if tap_weight is None else oracle.poisoned(tap_weight))
    kernel_rows = oracle.poisoned(rows)
    out = kernels.attend(kernel_rows, kernel_tokens, *geometry, heads, config=config)
    gradients = kernels.attend_backward(
        oracle.poisoned(grad_context), None if grad_maps is None else oracle.poisoned(grad_maps), kernel_rows,
        kernel_tokens, oracle.poisoned(out[1]), oracle.poisoned(out[2]), *geometry, heads, True, True, config=config,
    )  # fmt: skip
    return named(*out, *gradients), dense


def named(*tensors):
    return dict(zip(("context", "weights", "cells", "maps", "grad_rows", "grad_tokens"), (t.detach() for t in tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_dense_oracle(oracle, guarded_outputs, name, dtype):
    got, dense = build(oracle, CASES[name], dtype)
    guarded_outputs()
    for key, expected in dense(torch.float64).items():
        assert got[key].dtype == dtype
        oracle.assert_close(got[key], expected, 1e-5 if dtype == torch.float32 else 1e-12, key)


@pytest.mark.parametrize("name", ["mixed", "mixed_per_box", "mixed_roi_per_box", "rows_65"])
@pytest.mark.parametrize("splits", [(2, 64), (4, 32)])
def test_splits_do_not_change_the_result(oracle, guarded_outputs, name, splits):
    _, _, count, depth, *_ = CASES[name]
    config = oracle.kernel_module("launch").AttentionConfig.from_shape(200, count, depth, 4).with_splits(*splits)
    got, dense = build(oracle, CASES[name], torch.float32, config)
    guarded_outputs()
    for key, expected in dense(torch.float64).items():
        oracle.assert_close(got[key], expected, 1e-5, key)


@pytest.mark.parametrize("name", ["mixed", "mixed_roi_per_box", "one_row"])
def test_half_precision_error_stays_within_twice_the_plain_path(oracle, name):
    got, dense = build(oracle, CASES[name], torch.float16)
    exact, plain = dense(torch.float64), dense(torch.float16)
    for key, truth in exact.items():
        floor = torch.finfo(torch.float16).eps * truth.abs().max() if truth.numel() else 0
        for measure in (torch.max, torch.mean):
            if truth.numel():
                error = measure((got[key].double() - truth).abs())
                allowed = 2 * measure((plain[key].double() - truth).abs()) + floor
                assert error <= allowed, f"{key}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("taps", [None, (3, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_broken_region_stays_in_its_box(oracle, taps, shared):
    kernels, generator = oracle.kernel_module("region_attention"), torch.Generator().manual_seed(1)
    # Boxes 0 and 2 interleave on the same rows, so their tokens share tiles.
    spans, key_box, num_tokens = oracle.geometry([(6, 8)], [(0, 0, 6, 0, 4), (0, 0, 2, 5, 8), (0, 2, 6, 4, 8)])
    tokens = torch.randn(num_tokens, 20, generator=generator)
    rows = torch.randn(1 if shared else 3, 5, 20, generator=generator)
    clean_grad = torch.randn(3, 5, 20, generator=generator)
    broken_grad = clean_grad.clone()
    broken_grad[0] = float("nan")  # what a loss makes of the broken context
    geometry = (spans, key_box, *(oracle.random_taps(spans, *taps, generator) if taps else (None, None)))
    mine = oracle.token_ids(spans[0])

    def results(tokens, grad):
        context, weights, cells, maps = kernels.attend(rows, tokens, *geometry, 5)
        grad_rows, grad_tokens = kernels.attend_backward(
            grad, None, rows, tokens, weights, cells, *geometry, 5, True, True
        )
        keep = torch.ones(num_tokens, dtype=torch.bool)
        keep[mine] = False
        others = [context[1:], weights[key_box > 0], maps[key_box > 0], grad_tokens[keep]]
        return others + ([] if shared else [grad_rows[1:]]), context[0]

    clean, _ = results(tokens, clean_grad)
    broken_tokens = tokens.clone()
    broken_tokens[mine] = float("nan")
    broken, own = results(broken_tokens, broken_grad)
    assert own.isnan().all()
    for expected, got in zip(clean, broken):
        assert torch.equal(expected, got)


def test_infinite_scores_match_softmax(oracle):
    kernels = oracle.kernel_module("region_attention")
    spans, key_box, _ = oracle.geometry([(1, 70)], [(0, 0, 1, 0, 70)])
    tokens = torch.zeros(70, 2)
    tokens[:64, 0], tokens[64:, 0] = float("-inf"), 1.0  # a whole tile of -inf before finite scores
    rows = torch.tensor([[[1.0, 0.0]]])
    weights = kernels.attend(rows, tokens, spans, key_box, None, None, 0)[1]
    assert torch.equal(weights[:, 0], (tokens[:, 0]).softmax(0))


def test_unwanted_gradients_and_no_boxes_are_empty(oracle):
    kernels = oracle.kernel_module("region_attention")
    spans, key_box, num_tokens = oracle.geometry([(2, 2)], [(0, 0, 2, 0, 2)])
    rows, tokens = torch.randn(1, 2, 8), torch.randn(num_tokens, 8)
    context, weights, cells, _ = kernels.attend(rows, tokens, spans, key_box, None, None, 0)
    arguments = (context, None, rows, tokens, weights, cells, spans, key_box, None, None, 0)
    assert [g.shape for g in kernels.attend_backward(*arguments, False, False)] == [(0,), (0,)]
    none = kernels.attend(rows, tokens, spans[:0], key_box[:0], None, None, 2)
    assert [x.shape for x in none] == [(0, 2, 8), (0, 2), (0,), (0, 1)]


def test_refusals_name_the_fix(oracle):
    kernels = oracle.kernel_module("region_attention")
    spans, key_box, num_tokens = oracle.geometry([(2, 2)], [(0, 0, 2, 0, 2)])
    rows, tokens = torch.randn(1, 2, 8), torch.randn(num_tokens, 8)
    with pytest.raises(ValueError, match="use float32 or float16"):
        kernels.attend(rows.bfloat16(), tokens.bfloat16(), spans, key_box, None, None, 0)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.attend(rows, tokens.T.contiguous().T, spans, key_box, None, None, 0)
    with pytest.raises(ValueError, match="does not divide"):
        kernels.attend(rows, tokens, spans, key_box, None, None, 3)
    with pytest.raises(ValueError, match="expected rows"):
        kernels.attend(rows[..., :4], tokens, spans, key_box, None, None, 0)


def test_token_offsets_past_2_31_elements(oracle):
    """Token 3 starts at element 3 * 2^30; the untouched memory between the rows is never committed."""
    kernels = oracle.kernel_module("region_attention")
    try:
        tokens = torch.empty(3 * 2**30 + 16, dtype=torch.float16).as_strided((4, 16), (2**30, 1))
    except RuntimeError:
        pytest.skip("cannot reserve 6 GB of address space")
    generator = torch.Generator().manual_seed(0)
    tokens.copy_(torch.randn(4, 16, generator=generator))
    rows = torch.randn(1, 2, 16, generator=generator).half()
    spans, key_box, _ = oracle.geometry([(2, 2)], [(0, 0, 2, 0, 2)])
    got = kernels.attend(rows, tokens, spans, key_box, None, None, 1)
    near = kernels.attend(rows, tokens.contiguous(), spans, key_box, None, None, 1)
    assert torch.equal(got[0], near[0])
    oracle.assert_close(got[1], oracle.dense_attend(rows.double(), tokens.double(), spans, None, None, 1)[1], 1e-3)


def test_ragged_shapes_drawn_by_hypothesis(oracle):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @st.composite
    def cases(draw):
        grids = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
        rects = []
        for _ in range(draw(st.integers(1, 4))):
            image = draw(st.integers(0, len(grids) - 1))
            sides = []
            for size in grids[image]:
                low = draw(st.integers(0, size - 1))
                sides += [low, draw(st.integers(low + 1, size))]
            rects.append((image, *sides))
        heads = draw(st.integers(1, 3))
        taps = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
        return grids, rects, heads * draw(st.integers(1, 4)), draw(st.integers(1, 40)), heads, draw(st.booleans()), taps

    @hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
    @hypothesis.given(cases())
    def check(case):
        got, dense = build(oracle, case, torch.float64)
        for key, expected in dense(torch.float64).items():
            oracle.assert_close(got[key], expected, 1e-11, key)

    check()
