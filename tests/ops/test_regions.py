import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.ops import image_plan, roi_align, roi_plan, window_plan

unit = st.floats(0, 1, allow_nan=False)


def test_window_plan_indexes_the_boxes_own_image():
    grids = [[2, 3], [4, 2]]
    boxes = [[0.0, 0.0, 1 / 3, 0.5], [0.5, 0.25, 1.0, 0.75]]
    plan = window_plan(14, grids, boxes, [0, 1])
    assert plan.key_tokens().tolist() == [0, 6 + 3, 6 + 5]
    assert plan.key_box_S.tolist() == [0, 1, 1]
    whole = image_plan(14, grids, [0, 1])
    assert plan.keys_in(whole).tolist() == [0, 6 + 3, 6 + 5]


def test_image_plan_covers_each_image_once_and_no_neighbour():
    plan = image_plan(10, [[2, 3], [1, 4]], [1, 0, 1])
    assert plan.key_tokens().tolist() == [*range(6, 10), *range(6), *range(6, 10)]
    assert plan.key_box_S.tolist() == [0] * 4 + [1] * 6 + [2] * 4


def test_image_maps_place_each_box_on_its_image():
    grids, boxes, box_image = [[2, 3], [4, 2]], [[0.5, 0.25, 1.0, 0.75], [0.0, 0.0, 1.0, 1.0]], [1, 0]
    plan = window_plan(14, grids, boxes, box_image)
    maps_SQ = torch.arange(1.0, 17.0).view(8, 2)
    window, whole = plan.image_maps(maps_SQ)
    assert window.tolist() == [[[0, 0], [0, 1], [0, 3], [0, 0]], [[0, 0], [0, 2], [0, 4], [0, 0]]]
    assert whole.shape == (2, 2, 3) and whole[0].flatten().tolist() == [5, 7, 9, 11, 13, 15]
    assert whole.data_ptr() == maps_SQ[2:].data_ptr()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.tuples(unit, unit, unit, unit), st.integers(1, 5), st.integers(0, 3))
def test_roi_cells_are_averages_of_their_own_support(h, w, corners, cells, ratio):
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    plan = roi_plan(h * w, [[h, w]], [[x0, y0, x1, y1]], [0], cells, ratio, dtype=torch.float64)
    total = plan.tap_weight.sum(-1)
    # An adaptive grid takes no sample of a box without extent, as in torchvision.
    if ratio > 0 or min(x1 - x0, y1 - y0) > 1e-6:
        torch.testing.assert_close(total, torch.ones_like(total))
    _, _, height, width, _ = plan.spans_host[0]
    assert plan.tap_index[0].max() < height and plan.tap_index[1].max() < width and plan.tap_index.min() >= 0
    assert plan.num_keys == height * width


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.tuples(unit, unit, unit, unit), min_size=1, max_size=3))
def test_roi_align_equals_its_definition(h, w, corners):
    boxes = [[min(a, b), min(c, d), max(a, b), max(c, d)] for a, b, c, d in corners]
    tokens = torch.randn(2 * h * w, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    args = (tokens, [[h, w], [h, w]], boxes, np.arange(len(boxes)) % 2, 3)
    torch.testing.assert_close(roi_align(*args), roi_align(*args, impl="reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("boxes", [[], [[0.8, 0.8, 0.2, 0.2]]])
def test_cells_that_read_nothing_are_zero_and_connected(impl, boxes):
    """No box, or in an adaptive grid a box without extent and so without samples."""
    tokens = torch.full((6, 4), float("nan"), requires_grad=True)
    cells = roi_align(tokens, [[2, 3]], boxes, [0] * len(boxes), 2, sampling_ratio=0, impl=impl)
    cells.sum().backward()
    assert cells.shape == (len(boxes), 4, 4) and (impl != "reference" or not cells.any())
    assert tokens.grad.shape == tokens.shape and not tokens.grad.any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("box", "ratio"), [([0, 0, 1e308, 1], 2), ([-1e300, 0, 1, 1], 0), ([0, 0, 1e9, 1], 0)])
def test_boxes_too_large_to_sample_are_named(impl, box, ratio):
    with pytest.raises(ValueError, match=r"boxes \[1\] are too large to sample: .* normalised coordinates"):
        roi_align(torch.ones(6, 4), [[2, 3]], [[0, 0, 1, 1], box], [0, 0], 2, ratio, impl=impl)


def test_roi_align_without_boxes():
    assert roi_align(torch.randn(6, 4), [[2, 3]], torch.zeros(0, 4), [], 7).shape == (0, 49, 4)
    assert roi_align(torch.randn(6, 4), [[2, 3]], torch.zeros(0, 4), [], 7, impl="reference").shape == (0, 49, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_plan(7, [[2, 3]], [[0, 0, 1, 1]], [0]), "need 6 packed rows, got 7"),
        (lambda: window_plan(6, [[2, 3]], [[0, 0, 1, 1]], [1]), r"expected values in \[0, 1\)"),
        (lambda: window_plan(6, [[2, 3]], [[0, 0, 1, 1]] * 2, [0]), "2 boxes, 1 image indices"),
        (lambda: window_plan(6, [[2, 3]], [[0.5, 0.5, 0.2, 0.9]], [0]), r"boxes \[0\] cover no visual token"),
        (lambda: window_plan(6, [[2, 3]], [[float("nan"), 0, 1, 1]], [0]), r"boxes \[0\] are not finite"),
        (lambda: window_plan(6, [[2, 3]], [[0, 0, 10**400, 1]], [0]), r"boxes \[0\] are not finite.*0, inf, 1"),
        (lambda: roi_plan(6, [[2, 3]], [[-(10**400), 0, 1, 1]], [0], 2), r"boxes \[0\] are not finite.*-inf, 0"),
        (lambda: roi_align(torch.randn(6, 2), [[2, 3]], [[0, 0, 1, 10**400]], [0], 2), r"boxes \[0\] are not finite"),
        (lambda: window_plan(6, [[2, 10**30]], [], []), "grids: expected whole numbers that int64 holds"),
        (lambda: window_plan(6, [[0, 3]], [], []), "expected positive"),
        (lambda: window_plan(6, [[2, 3]], [[0, 0, 1]], [0]), r"expected shape \(n, 4\)"),
        (lambda: roi_plan(6, [[2, 3]], [[0, 0, 1, 1]], [0], 0), "output_size: expected a whole number of at least 1"),
        (lambda: roi_plan(6, [[2, 3]], [[0, 0, 1, 1]], [0], 2, -1), "sampling_ratio: expected samples per cell"),
        (lambda: window_plan(6, [[2.5, 3]], [], []), "grids: expected whole numbers"),
        (lambda: image_plan(6, [[2, 3]], [0.5]), "box_image: expected whole numbers"),
        (lambda: roi_align(torch.randn(6, 2), [[2, 3]], [[0, 0, 1, 1]], [0], 2, impl="cuda"), "impl: expected one of"),
    ],
)
def test_bad_geometry_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
