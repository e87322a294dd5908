"""`roi_align` and its transpose in Triton's interpreter against a dense float64 oracle."""

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
GRIDS = [(3, 5), (1, 9), (12, 13), (1, 1)]
BOXES = [(2, 1, 11, 2, 12), (0, 0, 3, 0, 5), (2, 3, 4, 4, 5), (1, 0, 1, 2, 7), (3, 0, 1, 0, 1)]


def build(oracle, side, taps, depth, dtype):
    generator = torch.Generator().manual_seed(0)
    spans, _, num_tokens = oracle.geometry(GRIDS, BOXES)
    index, weight = oracle.random_taps(spans, side, taps, generator, torch.promote_types(dtype, torch.float32))
    tokens = torch.randn(num_tokens, depth, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(len(spans), side * side, depth, generator=generator, dtype=torch.float64).to(dtype)
    return spans, index, weight, tokens, grad


def dense(oracle, kind, spans, index, weight, tokens, grad):
    leaf = tokens.to(kind).requires_grad_()
    cells = oracle.dense_roi_align(leaf, spans, index, weight.to(kind))
    (cells * grad.to(kind)).sum().backward()
    return cells.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side, taps, depth", [(3, 4, 48), (7, 2, 37), (1, 1, 130), (2, 5, 1)])
def test_matches_the_dense_oracle(oracle, guarded_outputs, side, taps, depth, dtype):
    spans, index, weight, tokens, grad = build(oracle, side, taps, depth, dtype)
    cells, grad_tokens = dense(oracle, torch.float64, spans, index, weight, tokens, grad)
    # A token that no tap reads may hold anything.
    unread = grad_tokens.abs().sum(1) == 0
    given = oracle.poisoned(tokens.masked_fill(unread[:, None], float("nan")), row_gap=3)
    kernels = oracle.kernel_module("roi_align")
    geometry = (spans, index, oracle.poisoned(weight))
    got = kernels.roi_align(given, *geometry)
    got_grad = kernels.roi_align_backward(oracle.poisoned(grad), *geometry, len(tokens))
    guarded_outputs()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    oracle.assert_close(got, cells, tolerance, "cells")
    oracle.assert_close(got_grad, grad_tokens, tolerance, "grad_tokens")


def test_half_precision_error_stays_within_twice_the_plain_path(oracle):
    spans, index, weight, tokens, grad = build(oracle, 3, 4, 48, torch.float16)
    kernels = oracle.kernel_module("roi_align")
    got = (
        kernels.roi_align(tokens, spans, index, weight),
        kernels.roi_align_backward(grad, spans, index, weight, len(tokens)),
    )
    exact = dense(oracle, torch.float64, spans, index, weight, tokens, grad)
    plain = dense(oracle, torch.float16, spans, index, weight, tokens, grad)
    for ours, truth, budget in zip(got, exact, plain):
        floor = torch.finfo(torch.float16).eps * truth.abs().max()
        for measure in (torch.max, torch.mean):
            error = measure((ours.double() - truth).abs())
            assert error <= 2 * measure((budget.double() - truth).abs()) + floor


def test_a_broken_region_and_gradient_stay_in_their_box(oracle):
    kernels, generator = oracle.kernel_module("roi_align"), torch.Generator().manual_seed(1)
    spans, _, num_tokens = oracle.geometry([(6, 8)], [(0, 0, 6, 0, 4), (0, 0, 2, 5, 8)])
    index, weight = oracle.random_taps(spans, 2, 3, generator)
    tokens, grad = torch.randn(num_tokens, 20, generator=generator), torch.randn(2, 4, 20, generator=generator)
    mine = oracle.token_ids(spans[0])
    others = torch.ones(num_tokens, dtype=torch.bool)
    others[mine] = False
    clean = kernels.roi_align(tokens, spans, index, weight)
    clean_grad = kernels.roi_align_backward(grad, spans, index, weight, num_tokens)
    tokens[mine], grad[0] = float("nan"), float("nan")
    assert torch.equal(kernels.roi_align(tokens, spans, index, weight)[1], clean[1])
    broken_grad = kernels.roi_align_backward(grad, spans, index, weight, num_tokens)
    assert torch.equal(broken_grad[others], clean_grad[others])


def test_no_boxes_and_no_tokens(oracle):
    spans, index, weight, tokens, grad = build(oracle, 2, 2, 8, torch.float32)
    kernels = oracle.kernel_module("roi_align")
    nothing = (spans[:0], index[:, :0], weight[:, :0])
    assert kernels.roi_align(tokens, *nothing).shape == (0, 4, 8)
    assert not kernels.roi_align_backward(grad[:0], *nothing, 5).any()
    assert kernels.roi_align_backward(grad, spans, index, weight, 0).shape == (0, 8)


def test_too_many_cells_are_refused(oracle):
    spans, index, weight, tokens, _ = build(oracle, 65, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="at most 64 cells per side, got 65"):
        oracle.kernel_module("roi_align").roi_align(tokens, spans, index, weight)
