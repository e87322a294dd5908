import pytest
import torch

from vreflection.ops import image_plan, roi_plan, window_plan
from vreflection.ops.cost_model import absorbed_cost, prefers_projected, projected_cost

WIDE = {"queries": 8, "heads": 8, "width": 3584, "itemsize": 4}


def ratio(boxes, keys, shared=False, impl="torch", **shape):
    shape = WIDE | shape
    return projected_cost(boxes, shared, keys=keys, **shape) / absorbed_cost(
        boxes, shared, keys=keys, impl=impl, **shape
    )


def test_absorbing_pays_more_the_more_tokens_there_are():
    ratios = [ratio(1, keys) for keys in (64, 256, 1024, 5120)]
    assert ratios == sorted(ratios) and ratios[-1] > 20
    # One box of few tokens: either form reads the four weights, and that is the cost; ours reads them faster.
    assert ratio(1, keys=1) == pytest.approx(1, abs=0.01)
    assert ratio(1, keys=1, impl="cpp") > 1.5
    # In 16 bits the library is as fast.
    assert ratio(1, keys=1, impl="cpp", itemsize=2) == pytest.approx(1, abs=0.01)


def test_many_boxes_of_one_token_are_projected_and_large_ones_never():
    assert ratio(64, keys=64) < 1
    assert ratio(64, keys=64 * 1024) > 5


def test_more_queries_than_head_width_do_not_pay():
    assert ratio(1, 1024, queries=512) < 1


@pytest.mark.parametrize(("side", "projected"), [(1, True), (64, False)])
def test_plans_are_read_for_their_shape(side, projected):
    boxes = 64
    queries = torch.empty(boxes, 8, 3584, device="meta")
    plan = image_plan(boxes * side * side, [[side, side]] * boxes, list(range(boxes)))
    assert prefers_projected(plan, queries, 8, "cpp") is projected


def test_roi_cells_count_not_tokens():
    """One whole image of 4,096 tokens seen through a single cell: projecting that cell is all the stock form does."""
    queries = torch.empty(64, 8, 3584, device="meta")
    whole = [[0.0, 0.0, 1.0, 1.0]] * 64
    grids, box_image = [[64, 64]], [0] * 64
    assert prefers_projected(roi_plan(4096, grids, whole, box_image, 1), queries, 8, "cpp")
    assert not prefers_projected(window_plan(4096, grids, whole, box_image), queries, 8, "cpp")
