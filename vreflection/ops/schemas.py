"""Schemas and shape rules (fakes) of the registered operators, namespace `vreflection`.

Device code implements them: `csrc/` on the CPU, `kernels/` on CUDA; `*_torch` twins run plain PyTorch anywhere.

Geometry arguments, all from `regions.RegionPlan`: `spans (B, 5)` int64 `[first, stride, height, width, key_offset]`,
`key_box (S,)` int32, `tap_index` / `tap_weight` `(2, B, P, K)` or neither. Shape suffixes: see `regions`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("vreflection", "DEF")

_GEOMETRY = "Tensor spans, Tensor key_box, Tensor? tap_index, Tensor? tap_weight"
_ATTEND = f"(Tensor rows, Tensor tokens, {_GEOMETRY}, int map_heads) -> (Tensor, Tensor, Tensor, Tensor)"
_ATTEND_BACKWARD = (
    "(Tensor grad_context, Tensor? grad_maps, Tensor rows, Tensor tokens, Tensor weights, Tensor cells, "
    f"{_GEOMETRY}, int map_heads, bool rows_grad, bool tokens_grad) -> (Tensor, Tensor)"
)
_ROI_ALIGN = "(Tensor tokens, Tensor spans, Tensor tap_index, Tensor tap_weight) -> Tensor"
_ROI_ALIGN_BACKWARD = "(Tensor grad, Tensor spans, Tensor tap_index, Tensor tap_weight, SymInt num_tokens) -> Tensor"

SCHEMAS = {
    "attend": _ATTEND,
    "attend_backward": _ATTEND_BACKWARD,
    "roi_align": _ROI_ALIGN,
    "roi_align_backward": _ROI_ALIGN_BACKWARD,
}
_MAPS = "Tensor latents, Tensor targets, Tensor student_maps, Tensor teacher_maps, Tensor key_index"
LOSS_SCHEMAS = {
    "distillation": f"({_MAPS}, float eps, float kl_scale) -> (Tensor, Tensor)",
    "distillation_backward": (
        f"(Tensor grad_mse, Tensor grad_kl, {_MAPS}, float eps, float kl_scale, bool need_target_grad) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
PLAN_SCHEMAS = {
    "window_plan": "(Tensor grids, Tensor box_image, Tensor boxes, SymInt num_tokens, str device) -> (Tensor, Tensor)",
    "image_plan": "(Tensor grids, Tensor box_image, SymInt num_tokens, str device) -> (Tensor, Tensor)",
    "roi_plan": (
        "(Tensor grids, Tensor box_image, Tensor boxes, SymInt num_tokens, int output_size, int sampling_ratio, "
        "bool aligned, bool float64, str device) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
SKINNY_SCHEMAS = {
    "skinny_nt": "(Tensor x, Tensor w) -> Tensor",
    "skinny_nn": "(Tensor x, Tensor w) -> Tensor",
    "skinny_tn": "(Tensor(a!) out, Tensor a, Tensor b) -> ()",
}
DECODE_SCHEMAS = {
    "decode_step": (
        "(Tensor inputs, Tensor position, Tensor length, SymInt extent, Tensor[] weights, float[] eps, "
        "Tensor inverse_frequency, float rope_scale, Tensor(a!)[] keys, Tensor(b!)[] values) -> Tensor"
    ),
    "decode_pick": "(Tensor hidden, Tensor needed, Tensor weight) -> Tensor",
    "decode_plan": (
        "(Tensor last_token, Tensor mode, Tensor remaining, Tensor finished, Tensor latent_steps, int lvr_start_id, "
        "bool clean, Tensor(a!) position, Tensor(b!) length, Tensor(c!) next_mode, Tensor(d!) next_remaining, "
        "Tensor(e!) needed) -> ()"
    ),
    "decode_advance": (
        "(Tensor hidden, Tensor picked, Tensor next_mode, Tensor next_remaining, Tensor max_new_tokens, "
        "Tensor capacity, Tensor end_ids, Tensor length, int lvr_id, int pad_id, bool clean, Tensor(a!) mode, "
        "Tensor(b!) remaining, Tensor(c!) finished, Tensor(d!) last_token, Tensor(e!) z, Tensor(f!) counted, "
        "Tensor(g!)? seen, Tensor(h!) emitted, Tensor(i!)? recorded, Tensor(j!) cursor, Tensor(k!) budget, "
        "Tensor(l!) running) -> ()"
    ),
}


def implement(name: str, function: Callable) -> None:
    """Register a Python body for every device, and keep `torch.compile` from tracing into it where its graph breaks."""

    def body(*args):
        if "torch._dynamo" not in sys.modules:  # nothing compiles in this process; importing it takes a second
            return function(*args)
        return torch._dynamo.disable(function)(*args)

    LIBRARY.impl(name, body, "CompositeExplicitAutograd")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and weights are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _attend(rows, tokens, spans, key_box, tap_index, tap_weight, map_heads):
    boxes, count, width = spans.shape[0], rows.shape[1], rows.shape[2]
    keys, wide = key_box.shape[0], wide_dtype(tokens.dtype)
    cells = (0,) if tap_index is None else (boxes, tap_index.shape[2] ** 2, count)
    return (
        tokens.new_empty((boxes, count, width)),
        tokens.new_empty((keys, count), dtype=wide),
        tokens.new_empty(cells, dtype=wide),
        tokens.new_empty((keys, count // map_heads) if map_heads else (0,), dtype=wide),
    )


def _attend_backward(
    grad_context, grad_maps, rows, tokens, weights, cells, spans, key_box, tap_index, tap_weight,
    map_heads, rows_grad, tokens_grad,
):  # fmt: skip
    return (
        rows.new_empty(rows.shape if rows_grad else (0,)),
        tokens.new_empty(tokens.shape if tokens_grad else (0,)),
    )


def _roi_align(tokens, spans, tap_index, tap_weight):
    return tokens.new_empty((spans.shape[0], tap_index.shape[2] ** 2, tokens.shape[1]))


def _roi_align_backward(grad, spans, tap_index, tap_weight, num_tokens):
    return grad.new_empty((num_tokens, grad.shape[2]))


def _plan(grids, box_image, *rest):
    """Spans and key boxes; how many keys there are depends on the boxes."""
    keys, device = torch.library.get_ctx().new_dynamic_size(), rest[-1]
    spans = grids.new_empty((box_image.shape[0], 5), dtype=torch.int64, device=device)
    return spans, grids.new_empty((keys,), dtype=torch.int32, device=device)


def _roi_plan(grids, box_image, boxes, num_tokens, output_size, sampling_ratio, aligned, float64, device):
    # An adaptive grid takes as many samples as the largest box asks for.
    taps = 2 * sampling_ratio if sampling_ratio > 0 else torch.library.get_ctx().new_dynamic_size()
    size, dtype = (2, box_image.shape[0], output_size, taps), torch.float64 if float64 else torch.float32
    index = grids.new_empty(size, dtype=torch.int64, device=device)
    return (*_plan(grids, box_image, device), index, grids.new_empty(size, dtype=dtype, device=device))


def _distillation(latents, targets, student_maps, teacher_maps, key_index, eps, kl_scale):
    return student_maps.new_empty(()), student_maps.new_empty(())


def _distillation_backward(
    grad_mse, grad_kl, latents, targets, student_maps, teacher_maps, key_index, eps, kl_scale, need_target_grad
):
    target_shape = targets.shape if need_target_grad else (0,)
    return latents.new_empty(latents.shape), targets.new_empty(target_shape), student_maps.new_empty(student_maps.shape)


_FAKES = {
    "distillation": _distillation,
    "distillation_backward": _distillation_backward,
    "window_plan": _plan,
    "image_plan": _plan,
    "roi_plan": _roi_plan,
    "attend": _attend,
    "attend_backward": _attend_backward,
    "roi_align": _roi_align,
    "roi_align_backward": _roi_align_backward,
    "skinny_nt": lambda x, w: x.new_empty((x.shape[0], x.shape[1], w.shape[1])),
    "skinny_nn": lambda x, w: x.new_empty((x.shape[0], x.shape[1], w.shape[2])),
    "skinny_tn": lambda out, a, b: None,
    "decode_step": lambda inputs, *rest: inputs.new_empty(inputs.shape),
    "decode_pick": lambda hidden, needed, weight: hidden.new_empty(hidden.shape[:1], dtype=torch.int64),
    "decode_plan": lambda *tensors: None,
    "decode_advance": lambda *tensors: None,
}


def define_all() -> None:
    for name, schema in SCHEMAS.items():
        for full in (name, f"{name}_torch"):
            LIBRARY.define(full + schema)
            torch.library.register_fake(f"vreflection::{full}", _FAKES[name], lib=LIBRARY)
    for name, schema in (SKINNY_SCHEMAS | PLAN_SCHEMAS | LOSS_SCHEMAS | DECODE_SCHEMAS).items():
        LIBRARY.define(name + schema)
        torch.library.register_fake(f"vreflection::{name}", _FAKES[name], lib=LIBRARY)


define_all()
