"""Stage-2 distillation on packed attention: squared error of latents and KL of attention rows, in one pass.

Shape suffixes: B boxes, Q latents per box, D width, S the student's keys, K the teacher's keys.
"""

from __future__ import annotations

import torch

from .dispatch import choose, operator
from .schemas import wide_dtype

KL_REDUCTIONS = ("sum_queries", "mean_queries")
EPS = 1e-9


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents, targets, student_maps, teacher_maps, key_index, eps, kl_scale, impl):
        ctx.save_for_backward(latents, targets, student_maps, teacher_maps, key_index)
        ctx.settings, ctx.impl = (eps, kl_scale), impl
        forward = operator("distillation", impl, latents.device.type)
        return forward(latents, targets, student_maps, teacher_maps, key_index, eps, kl_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_mse, grad_kl):
        backward = operator("distillation_backward", ctx.impl, grad_mse.device.type)
        grads = backward(grad_mse, grad_kl, *ctx.saved_tensors, *ctx.settings, ctx.needs_input_grad[1])
        return grads[0], grads[1] if ctx.needs_input_grad[1] else None, grads[2], *[None] * 5


def distillation_loss(
    latents: torch.Tensor,
    targets: torch.Tensor,
    student_maps: torch.Tensor,
    teacher_maps: torch.Tensor,
    key_index: torch.Tensor,
    kl_reduction: str = "sum_queries",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean((Z_S - Z)^2)` and `(1/B) sum_b sum_q sum_n A_T (log A_T - log(A_S + 1e-9))`, with 0 log 0 = 0.

    Args:
        latents, targets: `(B, Q, D)`, the student's and the teacher's latents.
        student_maps: `(S, Q)` head-mean attention on the student's keys.
        teacher_maps: `(K, Q)` on the teacher's keys; tokens the teacher does not hold have weight zero and add nothing.
            No gradient flows to it from the triton implementation: it refuses teacher maps that ask for one.
        key_index: `(K,)` int64, the student's key of each teacher key, without repeats (`RegionPlan.keys_in`).
        kl_reduction: `"sum_queries"`, or `"mean_queries"`, which divides by Q as well.
        impl: `"auto"`, `"reference"`, `"torch"` or `"triton"`; the plain formula is both
            reference and torch.

    Returns:
        `(mse, kl)`: float32 scalars (float64 for float64 inputs); zero, still connected, without boxes.

    Raises:
        ValueError: shapes disagree, the reduction is unknown, or `impl` cannot run on these tensors.
    """
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f"kl_reduction: expected one of {KL_REDUCTIONS}, got {kl_reduction!r}")
    if latents.shape != targets.shape or latents.dim() != 3:
        raise ValueError(
            f"latents and targets must be one (B, Q, D), got {tuple(latents.shape)} and {tuple(targets.shape)}"
        )
    queries = latents.shape[1]
    for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        if maps.dim() != 2 or maps.shape[1] != queries:
            raise ValueError(f"{name}: expected (keys, {queries}), got {tuple(maps.shape)}")
    if not isinstance(key_index, torch.Tensor) or key_index.dtype != torch.int64:
        raise ValueError(f"key_index: expected an int64 tensor, got {getattr(key_index, 'dtype', type(key_index))}")
    if key_index.shape != teacher_maps.shape[:1]:
        raise ValueError(f"key_index: expected ({teacher_maps.shape[0]},), got {tuple(key_index.shape)}")
    chosen = choose("distillation_loss", impl, latents)
    if chosen == "triton" and teacher_maps.requires_grad and impl == "auto":
        chosen = "torch"
    kl_scale = 1.0 / max(latents.shape[0] * (queries if kl_reduction == "mean_queries" else 1), 1)
    if chosen == "triton" and latents.shape[0]:
        if teacher_maps.requires_grad:
            raise ValueError('impl="triton" gives no gradient to teacher_maps; detach them, or take impl="torch"')
        tensors = (t.contiguous() for t in (latents, targets, student_maps, teacher_maps, key_index))
        return _Distillation.apply(*tensors, EPS, kl_scale, "triton")
    mse = mean_square(latents, targets)
    on_teacher_keys = student_maps.index_select(0, key_index)
    return mse, kl_scale * kl_sum(teacher_maps, on_teacher_keys)


def mean_square(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    wide = wide_dtype(left.dtype)
    return (left.to(wide) - right.to(wide)).square().sum() / max(left.numel(), 1)


def kl_sum(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """`sum A_T (log A_T - log(A_S + eps))` with 0 log 0 = 0."""
    wide = wide_dtype(teacher.dtype)
    teacher, student = teacher.to(wide), student.to(wide)
    return (torch.xlogy(teacher, teacher) - teacher * torch.log(student + EPS)).sum()
