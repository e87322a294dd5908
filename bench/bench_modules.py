"""Both modules at the 7B width, absorbed form against the stock attention: `pytest bench/bench_modules.py -s`."""

import pytest
import torch

from vreflection.modules import BoxGuidedCompression, DynamicAutoregressiveCompression

WIDTH, QUERIES = 3584, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def pair(kind, **settings):
    torch.manual_seed(0)
    ours = kind(WIDTH, impl="torch", **settings)
    reference = kind(WIDTH, impl="reference", **settings)
    reference.load_state_dict(ours.state_dict())
    return ours.to(DEVICE, DTYPE), reference.to(DEVICE, DTYPE)


def agree(left, right):
    """Correctness gate before any timing."""
    allowed = (2e-2 if torch.bfloat16 == DTYPE else 1e-4) * right.float().abs().max()
    error = (left.float() - right.float()).abs().max()
    assert error < allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("side", [32, 72])
def test_student_on_one_image(interleaved, side, direction):
    ours, reference = pair(DynamicAutoregressiveCompression)
    tokens = torch.randn(side * side, WIDTH, device=DEVICE, dtype=DTYPE)
    probes = torch.randn(1, QUERIES, WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True)
    grids, box_image = torch.tensor([[side, side]]), torch.tensor([0])
    agree(ours(probes, tokens, grids, box_image), reference(probes, tokens, grids, box_image))

    def step(module):
        if direction == "forward":
            with torch.no_grad():
                module(probes, tokens, grids, box_image)
            return
        module(probes, tokens, grids, box_image).sum().backward()
        module.zero_grad()

    interleaved({"absorbed": lambda: step(ours), "reference": lambda: step(reference)}, "reference", rounds=3)


@pytest.mark.parametrize("region", ["window", "roi_align"])
def test_teacher_on_four_boxes(interleaved, region):
    ours, reference = pair(BoxGuidedCompression, region=region, output_size=14)
    side = 72
    tokens = torch.randn(side * side, WIDTH, device=DEVICE, dtype=DTYPE)
    boxes = torch.tensor(
        [[0.0, 0.0, 0.44, 0.44], [0.5, 0.0, 0.94, 0.44], [0.0, 0.5, 0.44, 0.94], [0.5, 0.5, 0.94, 0.94]]
    )
    arguments = (tokens, torch.tensor([[side, side]]), boxes, torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        agree(ours(*arguments), reference(*arguments))
        interleaved(
            {"absorbed": lambda: ours(*arguments), "reference": lambda: reference(*arguments)}, "reference", rounds=3
        )
