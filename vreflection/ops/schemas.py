"""Schemas and shape rules (fakes) of the registered operators, namespace `vreflection`.

Device code implements them: `csrc/` on the CPU, `kernels/` on CUDA. `*_torch` twins run the plain PyTorch form anywhere.

Geometry arguments, all from `regions.RegionPlan`: `spans (B, 5)` int64 `[first, stride, height, width, key_offset]`, `key_box
(S,)` int32, `tap_index` / `tap_weight` `(2, B, P, K)` or neither. Shape suffixes: see `regions`.
"""

from __future__ import annotations

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
SKINNY_SCHEMAS = {
    "skinny_nt": "(Tensor x, Tensor w) -> Tensor",
    "skinny_nn": "(Tensor x, Tensor w) -> Tensor",
    "skinny_tn": "(Tensor(a!) out, Tensor a, Tensor b) -> ()",
}


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


_FAKES = {
    "attend": _attend,
    "attend_backward": _attend_backward,
    "roi_align": _roi_align,
    "roi_align_backward": _roi_align_backward,
    "skinny_nt": lambda x, w: x.new_empty((x.shape[0], x.shape[1], w.shape[1])),
    "skinny_nn": lambda x, w: x.new_empty((x.shape[0], x.shape[1], w.shape[2])),
    "skinny_tn": lambda out, a, b: None,
}


def define_all() -> None:
    for name, schema in SCHEMAS.items():
        for full in (name, f"{name}_torch"):
            LIBRARY.define(full + schema)
            torch.library.register_fake(f"vreflection::{full}", _FAKES[name], lib=LIBRARY)
    for name, schema in SKINNY_SCHEMAS.items():
        LIBRARY.define(name + schema)
        torch.library.register_fake(f"vreflection::{name}", _FAKES[name], lib=LIBRARY)


define_all()
