import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.data.boxes import CLAMP_TOLERANCE, MIN_BOX_SIDE, box_to_token_indices, check_boxes, window_token_rects
from vreflection.errors import DataError

coordinate = st.floats(-CLAMP_TOLERANCE, 1 + CLAMP_TOLERANCE, allow_nan=False)
side = st.integers(1, 80).map(lambda tokens: 2 * tokens)


@settings(max_examples=300, deadline=None)
@given(st.tuples(coordinate, coordinate, coordinate, coordinate), side, side)
def test_accepted_boxes_are_clamped_ordered_and_cover_tokens_of_the_grid(corners, grid_h, grid_w):
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    raw = [x0, y0, x1, y1]
    try:
        boxes, clamped = check_boxes([raw])
    except DataError as error:
        inside = np.clip(raw, 0, 1)
        assert error.reason == "box-empty"
        assert min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_BOX_SIDE
        return
    assert boxes.dtype == np.float64
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert clamped == int(boxes.tolist() != [raw])
    ty0, ty1, tx0, tx1 = window_token_rects(boxes, [grid_h, grid_w])[0].tolist()
    h, w = grid_h // 2, grid_w // 2
    assert 0 <= ty0 < ty1 <= h and 0 <= tx0 < tx1 <= w
    # The rectangle contains the box, and no token more than one patch away from it.
    assert tx0 / w <= boxes[0, 0] + 1e-9 and tx1 / w >= boxes[0, 2] - 1e-9
    assert tx0 / w > boxes[0, 0] - 1 / w - 1e-9 and tx1 / w < boxes[0, 2] + 1 / w + 1e-9
    assert ty0 / h <= boxes[0, 1] + 1e-9 and ty1 / h >= boxes[0, 3] - 1e-9
    assert box_to_token_indices(boxes[0], (1, grid_h, grid_w)) == [
        row * w + column for row in range(ty0, ty1) for column in range(tx0, tx1)
    ]


def test_window_rule_by_hand():
    # 10 x 6 patches = 5 x 3 tokens. x: floor(1.8)=1..ceil(3.6)=4 -> columns 0..1; y: 3..8 -> rows 1..3.
    assert box_to_token_indices([0.3, 0.35, 0.6, 0.75], (1, 10, 6)) == [3, 4, 6, 7, 9, 10]
    assert box_to_token_indices([0, 0, 1, 1], (1, 4, 6)) == list(range(6))
    assert box_to_token_indices([-0.2, -0.2, 1.4, 1.4], (1, 4, 6)) == list(range(6))
    assert box_to_token_indices([0.9, 0.9, 0.1, 0.1], (1, 64, 116)) == []
    assert box_to_token_indices([math.nan, 0, 1, 1], (1, 4, 4)) == []
    assert box_to_token_indices([0, 0, math.inf, 1], (1, 4, 4)) == []


def test_rects_take_one_grid_per_box_or_one_for_all():
    boxes = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    assert window_token_rects(boxes, [[4, 8], [8, 4]]).tolist() == [[0, 1, 0, 2], [2, 4, 1, 2]]
    assert window_token_rects(boxes, [[1, 4, 8], [1, 8, 4]]).tolist() == [[0, 1, 0, 2], [2, 4, 1, 2]]
    assert window_token_rects(boxes, [4, 8]).tolist() == [[0, 1, 0, 2], [1, 2, 2, 4]]
    assert window_token_rects(np.zeros((0, 4)), [4, 8]).shape == (0, 4)


@pytest.mark.parametrize(
    "boxes, grid, message",
    [
        ([0, 0, 1, 1], (4, 4), r"expected boxes of shape \(B, 4\), got \(4,\); wrap"),
        ([[0, 0, 1, 1]], (4, 5), r"multiples of 2, got \[\[4, 5\]\]; pass H, W in 14-px patches"),
        ([[0, 0, 1, 1]], (0, 4), "positive multiples"),
        ([[0, 0, 1, 1]], (4,), "expected grids of shape"),
    ],
)
def test_wrong_arguments_of_the_window_rule(boxes, grid, message):
    with pytest.raises(ValueError, match=message):
        window_token_rects(boxes, grid)


def test_window_rule_is_for_still_images():
    with pytest.raises(ValueError, match="expected one frame"):
        box_to_token_indices([0, 0, 1, 1], (2, 4, 4))


@pytest.mark.parametrize(
    "boxes, reason, got, fix",
    [
        ([[0.5, 0.1, 0.5, 0.4]], "box-empty", "[0.5, 0.1, 0.5, 0.4]", "drop the row"),
        ([[1.0, 0.1, 1.04, 0.4]], "box-empty", "[1.0, 0.1, 1.04, 0.4]", "drop the row"),
        ([[0.6, 0.1, 0.5, 0.4]], "box-inverted", "[0.6, 0.1, 0.5, 0.4]", "x0 < x1"),
        ([[0.1, 0.4, 0.5, 0.2]], "box-inverted", "box 0", "y0 < y1"),
        ([[0, 0, 1, 1], [0.1, math.nan, 0.5, 0.4]], "box-nan", "box 1", "annotate"),
        ([[0.1, 0.1, math.inf, 0.4]], "box-nan", "inf", "drop the row"),
        ([[12, 30, 200, 220]], "box-outside", "[12.0, 30.0, 200.0, 220.0]", "divide pixel coordinates"),
        ([[-0.051, 0, 1, 1]], "box-outside", "-0.051", "tolerance 0.05"),
        ([[0.1, 0.2, 0.3]], "box-shape", "(1, 3)", "x0, y0, x1, y1"),
        ([0.1, 0.2, 0.3, 0.4], "box-shape", "(4,)", "x0, y0, x1, y1"),
        ([[0.1, 0.2, 0.3, "a"]], "box-shape", "'a'", "x0, y0, x1, y1"),
        ([[0.1, 0.2], [0.3, 0.4, 0.5, 0.6]], "box-shape", "0.1", "x0, y0, x1, y1"),
        (None, "box-shape", "()", "x0, y0, x1, y1"),
    ],
)
def test_bad_boxes_name_expected_got_fix_and_source(boxes, reason, got, fix):
    with pytest.raises(DataError) as caught:
        check_boxes(boxes, "rows.json:3")
    assert caught.value.reason == reason
    assert caught.value.source == "rows.json:3"
    message = str(caught.value)
    assert message.startswith("rows.json:3: expected") and got in message and fix in message


def test_slightly_outside_is_clamped_and_counted():
    boxes, clamped = check_boxes([[-0.05, 0, 1.05, 1], [0, 0, 1, 1], [0.2, -0.01, 0.4, 0.5]])
    assert clamped == 2
    assert boxes.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0.2, 0, 0.4, 0.5]]
    given = np.array([[-0.01, 0, 1, 1]])
    check_boxes(given)
    assert given[0, 0] == -0.01
    none, clamped = check_boxes([])
    assert none.shape == (0, 4) and clamped == 0
