"""Squared error and KL on packed attention, against full teacher maps: `pytest bench/bench_distillation_loss.py -s`."""

import pytest
import torch
import torch.nn.functional as F

from vreflection.benchmarking.prediction import distillation_work
from vreflection.ops import distillation_loss, image_plan, window_plan

EPS = 1e-9  # added to the student's attention, see ops/distillation_loss.py


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

    def full_maps():
        """As written straight down: the teacher's map put into a whole image of zeros."""
        whole = torch.zeros_like(student).index_put((index,), teacher)
        kl = F.kl_div((student + EPS).log(), whole, reduction="sum") / boxes
        return F.mse_loss(latents, targets) + kl

    losses = {"auto": lambda: call("auto"), "full maps": full_maps}
    if lab.CUDA:  # on a CPU "auto" is this one
        losses["torch"] = lambda: call("torch")
    for name, loss in losses.items():
        torch.testing.assert_close(loss(), call("torch"), msg=lambda text, name=name: f"{name}: {text}")

    def step(loss):
        def both():
            latents.grad = student.grad = None
            loss().backward()

        def forward():
            with torch.no_grad():
                loss()

        return forward if direction == "forward" else both

    work = distillation_work(latents.numel(), student.numel(), teacher.numel(), 4, direction != "forward")
    steps = {name: step(loss) for name, loss in losses.items()}
    interleaved(steps, "full maps", 30, work, baselines=[name for name in losses if name != "auto"])
