"""RoI-Align of wide tokens, against torchvision's where it is installed: `pytest bench/bench_roi_align.py -s`."""

import contextlib

import pytest
import torch

from vreflection.benchmarking.prediction import roi_align_work
from vreflection.ops import roi_align

WIDTH, SIDE = 3584, 72
FOUR = torch.tensor([[0.0, 0.0, 0.44, 0.44], [0.5, 0.0, 0.94, 0.44], [0.0, 0.5, 0.44, 0.94], [0.5, 0.5, 0.94, 0.94]])


def dense(tokens, matrix_BCT):
    """The map as a dense matrix over the whole image: what a batched product makes of it."""
    return matrix_BCT @ tokens


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("cells", [7, 14])
def test_roi_align(interleaved, lab, dtype, cells, direction):
    device = lab.DEVICE
    tokens = torch.randn(SIDE * SIDE, WIDTH, device=device, dtype=dtype, requires_grad=True)
    geometry = (torch.tensor([[SIDE, SIDE]]), FOUR, torch.zeros(4, dtype=torch.long))
    one_hot = torch.eye(SIDE * SIDE, device=device)
    matrix = roi_align(one_hot, *geometry, cells, impl="torch").to(dtype)
    calls = {
        "auto": lambda: roi_align(tokens, *geometry, cells),
        "torch": lambda: roi_align(tokens, *geometry, cells, impl="torch"),
        "dense": lambda: dense(tokens, matrix),
    }
    with contextlib.suppress(ImportError):
        from torchvision.ops import roi_align as theirs

        corners = (FOUR * SIDE).to(device, dtype)
        # Channels first and image-shaped, as it takes them: a view, no copy.
        shape = (1, SIDE, SIDE, WIDTH)
        calls["torchvision"] = lambda: (
            theirs(tokens.view(shape).permute(0, 3, 1, 2), [corners], cells, 1.0, 2, aligned=True)
            .flatten(2).transpose(1, 2)
        )  # fmt: skip
    with torch.no_grad():
        expected = calls["dense"]()
        for call in calls.values():
            lab.agree(call(), expected, dtype)

    def step(call):
        def both():
            tokens.grad = None
            call().sum().backward()

        def forward():
            with torch.no_grad():
                call()

        return forward if direction == "forward" else both

    covered = 4 * 32 * 32  # tokens under the boxes
    work = roi_align_work(4, cells, covered, SIDE * SIDE, WIDTH, tokens.element_size(), direction != "forward")
    steps = {name: step(call) for name, call in calls.items()}
    rounds = 30 if lab.CUDA else 9
    others = [name for name in calls if name != "auto"]
    interleaved(steps, "dense", rounds, work, dtype, baselines=others)
