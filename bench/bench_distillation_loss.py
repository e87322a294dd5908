"""Squared error and KL on packed attention: `pytest bench/bench_distillation_loss.py -s`."""

import pytest
import torch

from vreflection.ops import distillation_loss, image_plan, window_plan


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("boxes", [1, 16])
def test_distillation(interleaved, lab, boxes, direction):
    device, side, queries, width = lab.DEVICE, 64, 8, 3584
    grids = torch.tensor([[side, side]] * boxes)
    geometry = (torch.tensor([[0.2, 0.2, 0.7, 0.7]] * boxes), torch.arange(boxes))
    plan = image_plan(boxes * side * side, grids, geometry[1], device)
    teacher_plan = window_plan(boxes * side * side, grids, *geometry, device)
    latents = torch.randn(boxes, queries, width, device=device, requires_grad=True)
    targets = torch.randn(boxes, queries, width, device=device)
    student = torch.rand(plan.num_keys, queries, device=device).requires_grad_()
    teacher = torch.rand(teacher_plan.num_keys, queries, device=device)
    index = teacher_plan.keys_in(plan)

    def call(impl):
        mse, kl = distillation_loss(latents, targets, student, teacher, index, impl=impl)
        return mse + kl

    torch.testing.assert_close(call("auto"), call("torch"))

    def step(impl):
        def both():
            latents.grad = student.grad = None
            call(impl).backward()

        def forward():
            with torch.no_grad():
                call(impl)

        return forward if direction == "forward" else both

    moved = 4 * (2 * latents.numel() + 2 * teacher.numel())
    if direction != "forward":
        moved = 2 * moved + 4 * (latents.numel() + student.numel())
    interleaved({"auto": step("auto"), "torch": step("torch")}, "torch", 30, (moved, 0))
