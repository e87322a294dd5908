"""Peak memory of one step of the student on a CPU: `python bench/memory_case.py ours|stock BOXES TOKENS` prints bytes.

A process of its own per figure, as resident memory never shrinks reliably. Beyond parameters, inputs and gradients.
"""

from __future__ import annotations

import sys

import torch
from training_case import resident

from vreflection.modules import DynamicAutoregressiveCompression

WIDTH, QUERIES = 3584, 8


def make_step(which: str, boxes: int, device: str, dtype: torch.dtype):
    """Forward and backward of one step on `(boxes, N, D)` tokens, each box with an image of its own; and its leaves."""
    module = DynamicAutoregressiveCompression(WIDTH).to(device, dtype)
    probes = torch.randn(boxes, QUERIES, WIDTH, device=device, dtype=dtype, requires_grad=True)

    def step(tokens_BND: torch.Tensor) -> None:
        if which == "stock":
            attended = module.cross_attn(probes, tokens_BND, tokens_BND, need_weights=False)[0]
            latents = module.output_norm(attended)
        else:
            grids = torch.tensor([[1, tokens_BND.shape[1]]] * boxes)
            latents = module(probes, tokens_BND.flatten(0, 1), grids, torch.arange(boxes))
        latents.sum().backward()

    return step, [*module.parameters(), probes]


def gradient_bytes(leaves) -> int:
    return sum(leaf.grad.numel() * leaf.grad.element_size() for leaf in leaves)


def extra_peak(which: str, boxes: int, count: int) -> int:
    """Bytes of resident memory at the peak of a step beyond those before it and its gradients."""
    step, leaves = make_step(which, boxes, "cpu", torch.float32)
    tokens = torch.randn(boxes, count, WIDTH)
    step(tokens[:, :64])  # libraries load their code and workspaces
    for leaf in leaves:
        leaf.grad = None
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    step(tokens)
    return resident("VmHWM") - before - gradient_bytes(leaves)


if __name__ == "__main__":
    print(extra_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
