"""Shared by the operator tests: which implementations run here, and ragged inputs."""

import os
from types import SimpleNamespace

import pytest
import torch

from vreflection.ops import AttentionWeights, dispatch, image_plan, roi_plan, window_plan

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# (grids, boxes, box_image): the shapes that break kernels.
SHAPES = {
    "one token": ([[1, 1]], [[0.0, 0.0, 1.0, 1.0]], [0]),
    "one box": ([[5, 7]], [[0.2, 0.1, 0.8, 0.9]], [0]),
    "a box of one token": ([[4, 6]], [[0.01, 0.01, 0.02, 0.02]], [0]),
    "one row": ([[1, 13]], [[0.0, 0.0, 0.5, 1.0], [0.4, 0.0, 1.0, 1.0]], [0, 0]),
    "five boxes on one image": (
        [[9, 8]],
        [[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75], [0.5, 0, 1, 0.3], [0.1, 0.1, 0.9, 0.95]],
        [0] * 5,
    ),
    "images of very different size": (
        [[1, 1], [31, 33], [2, 3]],
        [[0, 0, 1, 1], [0.1, 0.2, 0.9, 0.7], [0.5, 0, 1, 1], [0, 0, 1, 1]],
        [0, 1, 2, 1],
    ),
    "boxes out of image order": ([[3, 4], [4, 3]], [[0, 0, 0.6, 1], [0.3, 0.3, 1, 1], [0, 0, 1, 0.2]], [1, 0, 1]),
}


def plan(kind, shape, dtype=torch.float64):
    grids, boxes, box_image = shape
    count = sum(h * w for h, w in grids)
    if kind == "image":
        return image_plan(count, grids, box_image)
    if kind == "window":
        return window_plan(count, grids, boxes, box_image)
    return roi_plan(count, grids, boxes, box_image, 3, dtype=torch.promote_types(dtype, torch.float32))


def weights(width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return AttentionWeights(
        draw(3 * width, width) / width**0.5, draw(3 * width), draw(width, width) / width**0.5, draw(width)
    )


def runnable(op, impl, dtype):
    """Skip what this machine cannot run, with the library's own reason; triton runs in the interpreter's process."""
    if impl == "triton" and not INTERPRETING:
        pytest.skip("run with TRITON_INTERPRET=1 python -m pytest -m interpreter")
    reason = dispatch.why_not(op, impl, "cpu", dtype)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ragged():
    """Builders of this file."""
    return SimpleNamespace(SHAPES=SHAPES, plan=plan, weights=weights, runnable=runnable)
