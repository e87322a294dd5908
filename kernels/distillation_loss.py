"""Latent MSE and attention KL of stage 2 in one pass over the data, forward and backward.

    mse = mean((latents - targets)^2)
    kl  = kl_scale * sum_{k, q} t * (log t - log(s + eps)),  t = teacher_maps[k, q], s = student_maps[key_index[k], q]

with 0 * log 0 = 0. Suffixes: B boxes, Q queries, D width, S student keys, K teacher keys. Each program writes one
partial sum and one program adds them in a fixed order: no atomics, deterministic, no device value read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_tensors, on_device, wide_dtype
from .launch import ELEMENTWISE, ceil_div, loss_block

_SMALL = ELEMENTWISE.options
_STEP = 1024


@triton.jit
def student_place(key_index, begin, step, queries, mask):
    """Position in the student maps `(S, Q)` of the teacher elements `begin + step`; `begin` is int64, `step` int32."""
    # One wide division for the block, narrow ones for its elements.
    row = begin // queries
    within = (begin - row * queries).to(tl.int32) + step
    key = tl.load(key_index + row + within // queries, mask=mask, other=0)
    return key * queries + within % queries


@triton.jit(do_not_specialize=["latent_programs"])
def _distillation_kernel(
    latents,
    targets,
    student_maps,
    teacher_maps,
    key_index,
    partial,
    latent_programs,
    latent_size,
    map_size,
    queries,
    block,
    eps,
    STEP: tl.constexpr,
):
    """One partial sum per program: the first `latent_programs` take the MSE, the others the KL. Grid (programs,)."""
    wide = partial.dtype.element_ty
    program = tl.program_id(0)
    acc = tl.zeros((STEP,), dtype=wide)
    if program < latent_programs:
        begin = program.to(tl.int64) * block
        for start in range(0, block, STEP):
            place = begin + start + tl.arange(0, STEP)
            mask = place < latent_size
            x = tl.load(latents + place, mask=mask, other=0.0).to(wide)
            difference = x - tl.load(targets + place, mask=mask, other=0.0).to(wide)
            acc += difference * difference
    else:
        map_begin = (program - latent_programs).to(tl.int64) * block
        for map_start in range(0, block, STEP):
            step = map_start + tl.arange(0, STEP)
            in_maps = map_begin + step < map_size
            teacher = tl.load(teacher_maps + map_begin + step, mask=in_maps, other=0.0).to(wide)
            home = student_place(key_index, map_begin, step, queries, in_maps)
            student = tl.load(student_maps + home, mask=in_maps, other=1.0)
            zero = teacher == 0.0
            safe = tl.where(zero, 1.0, teacher)
            term = teacher * (tl.log(safe) - tl.log(student.to(wide) + eps))
            acc += tl.where(zero, 0.0, term)
    tl.store(partial + program, tl.sum(acc, axis=0))


@triton.jit(do_not_specialize=["latent_programs", "programs"])
def _distillation_sum_kernel(
    partial, mse_out, kl_out, latent_programs, programs, mse_scale, kl_scale, STEP: tl.constexpr
):  # fmt: skip
    """Both losses from the partial sums, in program order. Grid (1,)."""
    wide = partial.dtype.element_ty
    mse = tl.zeros((STEP,), dtype=wide)
    kl = tl.zeros((STEP,), dtype=wide)
    for start in range(0, programs, STEP):
        place = start + tl.arange(0, STEP)
        value = tl.load(partial + place, mask=place < programs, other=0.0)
        mse += tl.where(place < latent_programs, value, 0.0)
        kl += tl.where(place < latent_programs, 0.0, value)
    tl.store(mse_out, tl.sum(mse, axis=0) * mse_scale)
    tl.store(kl_out, tl.sum(kl, axis=0) * kl_scale)


@triton.jit(do_not_specialize=["latent_programs"])
def _distillation_backward_kernel(
    grad_mse,
    grad_kl,
    latents,
    targets,
    student_maps,
    teacher_maps,
    key_index,
    grad_latents,
    grad_targets,
    grad_student,
    latent_programs,
    latent_size,
    map_size,
    queries,
    block,
    mse_scale,
    kl_scale,
    eps,
    STEP: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """Gradients of both losses; student rows that no teacher key names were zeroed before. Grid (programs,)."""
    wide = grad_student.dtype.element_ty
    program = tl.program_id(0)
    if program < latent_programs:
        scale = tl.load(grad_mse).to(wide) * mse_scale
        begin = program.to(tl.int64) * block
        for start in range(0, block, STEP):
            place = begin + start + tl.arange(0, STEP)
            mask = place < latent_size
            x = tl.load(latents + place, mask=mask, other=0.0).to(wide)
            gradient = (x - tl.load(targets + place, mask=mask, other=0.0).to(wide)) * scale
            tl.store(grad_latents + place, gradient.to(grad_latents.dtype.element_ty), mask=mask)
            if TARGETS:
                tl.store(grad_targets + place, (-gradient).to(grad_targets.dtype.element_ty), mask=mask)
    else:
        map_scale = tl.load(grad_kl).to(wide) * kl_scale
        map_begin = (program - latent_programs).to(tl.int64) * block
        for map_start in range(0, block, STEP):
            step = map_start + tl.arange(0, STEP)
            in_maps = map_begin + step < map_size
            teacher = tl.load(teacher_maps + map_begin + step, mask=in_maps, other=0.0).to(wide)
            home = student_place(key_index, map_begin, step, queries, in_maps)
            student = tl.load(student_maps + home, mask=in_maps, other=1.0).to(wide) + eps
            # A zero teacher entry has no gradient, even where the student is zero too.
            safe = tl.where(teacher == 0.0, 1.0, student)
            tl.store(grad_student + home, -map_scale * teacher / safe, mask=in_maps)


def distillation(latents, targets, student_maps, teacher_maps, key_index, eps: float, kl_scale: float):
    """The two losses of stage 2 as scalars on the device.

    Args:
        latents, targets: `(B, Q, D)`.
        student_maps: `(S, Q)` float32. teacher_maps: `(K, Q)` float32.
        key_index: `(K,)` int64 into S, without duplicates.
        eps: added to the student inside the logarithm. kl_scale: factor of the KL, such as 1 / (B * Q).

    Returns:
        (mse, kl), in the dtype of student_maps.
    """
    call = _Call("distillation", latents, targets, student_maps, teacher_maps, key_index)
    partial = torch.empty(call.programs, dtype=call.wide, device=latents.device)
    mse, kl = student_maps.new_empty(()), student_maps.new_empty(())
    with on_device(latents):
        _distillation_kernel[(call.programs,)](
            *call.data, partial, call.latent_programs, call.latent_size, call.map_size, call.queries, call.block,
            eps, STEP=_STEP, **_SMALL,
        )  # fmt: skip
        _distillation_sum_kernel[(1,)](
            partial,
            mse,
            kl,
            call.latent_programs,
            call.programs,
            1.0 / call.latent_size,
            kl_scale,
            STEP=_STEP,
            **_SMALL,
        )
    return mse, kl


def distillation_backward(
    grad_mse, grad_kl, latents, targets, student_maps, teacher_maps, key_index, eps: float, kl_scale: float,
    need_target_grad: bool,
):  # fmt: skip
    """Gradients of `distillation` for scalar device cotangents.

    Returns:
        grad_latents; grad_targets, `(0,)` unless `need_target_grad`; grad_student_maps `(S, Q)`, zero at keys that
        `key_index` does not name.
    """
    call = _Call("distillation_backward", latents, targets, student_maps, teacher_maps, key_index)
    check_tensors("distillation_backward", grad_mse=grad_mse, grad_kl=grad_kl, latents=latents)
    latents, targets, student_maps, *_ = call.data
    grad_latents = torch.empty_like(latents)
    grad_targets = targets.new_empty(targets.shape if need_target_grad else (0,))
    grad_student = torch.zeros_like(student_maps)
    with on_device(latents):
        _distillation_backward_kernel[(call.programs,)](
            grad_mse, grad_kl, *call.data, grad_latents, grad_targets,
            grad_student, call.latent_programs, call.latent_size, call.map_size, call.queries, call.block,
            2.0 / call.latent_size, kl_scale, eps, STEP=_STEP, TARGETS=need_target_grad, **_SMALL,
        )  # fmt: skip
    return grad_latents, grad_targets, grad_student


class _Call:
    """Checks, contiguous data and the grid of one call."""

    def __init__(self, op, latents, targets, student_maps, teacher_maps, key_index):
        check_tensors(
            op,
            latents=latents,
            targets=targets,
            student_maps=student_maps,
            teacher_maps=teacher_maps,
            key_index=key_index,
        )
        if latents.shape != targets.shape:
            raise ValueError(
                f"{op}: expected targets in the shape of latents {tuple(latents.shape)}, got {tuple(targets.shape)}; "
                "pass one target per latent"
            )
        if latents.numel() == 0:
            raise ValueError(f"{op}: expected at least one latent, got shape {tuple(latents.shape)}; skip such batches")
        if teacher_maps.shape != (key_index.shape[0], student_maps.shape[1]):
            raise ValueError(
                f"{op}: expected teacher_maps ({key_index.shape[0]}, {student_maps.shape[1]}) to match key_index and "
                f"student_maps, got {tuple(teacher_maps.shape)}; pass the map of exactly the keys that key_index names"
            )
        self.wide = wide_dtype(torch.promote_types(latents.dtype, student_maps.dtype))
        self.data = tuple(x.contiguous() for x in (latents, targets, student_maps, teacher_maps, key_index))
        self.latent_size, self.map_size = latents.numel(), teacher_maps.numel()
        self.queries = student_maps.shape[1]
        self.block = loss_block(self.latent_size + self.map_size, _STEP)
        self.latent_programs = ceil_div(self.latent_size, self.block)
        self.programs = self.latent_programs + ceil_div(self.map_size, self.block)
