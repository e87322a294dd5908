"""When making keys and values is cheaper than absorbing their projections: a model in bytes and flops, pure Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .skinny import ours

if TYPE_CHECKING:
    import torch

    from .regions import RegionPlan

# Flops a CPU does in the time it reads one byte: on two cores 100 to 170 GFLOP/s in float32 and 260 to 340 in bfloat16,
# against 31 GB/s.
FLOPS_PER_BYTE, FLOPS_PER_BYTE_16BIT = 5.0, 10.0
# A library's product of few rows with a float32 weight reads it at half the speed of ours; with a 16-bit weight it is
# as fast (bench/measured.md, "Few rows against a weight").
LIBRARY_PENALTY, LIBRARY_PENALTY_16BIT = 2.0, 1.0


def absorbed_cost(
    boxes: int, shared: bool, queries: int, heads: int, width: int, keys: int, itemsize: int, impl: str
) -> float:
    """Cost in byte-times of one forward in the absorbed form: rows through W_q and W_k, context through W_v and W_o."""
    before, after = queries if shared else boxes * queries, boxes * queries
    penalty = 1.0 if ours(after, impl) else _library_penalty(itemsize)
    weights = sum(
        _product(4 * vectors * width * width, penalty * 2 * width * width * itemsize, itemsize)
        for vectors in (before, after)
    )
    return weights + _product(4 * heads * queries * keys * width, 2 * keys * width * itemsize, itemsize)


def projected_cost(boxes: int, shared: bool, queries: int, heads: int, width: int, keys: int, itemsize: int) -> float:
    """The same for the stock form: every key through W_k and W_v, queries through W_q and W_o."""
    before, after = queries if shared else boxes * queries, boxes * queries
    weight = _library_penalty(itemsize) * width * width * itemsize
    thin = sum(_product(2 * vectors * width * width, weight, itemsize) for vectors in (before, after))
    project = _product(4 * keys * width * width, 2 * weight, itemsize)
    # Keys and values are written, then read by the attention.
    return thin + project + _product(4 * queries * keys * width, 6 * keys * width * itemsize, itemsize)


def _library_penalty(itemsize: int) -> float:
    return LIBRARY_PENALTY_16BIT if itemsize == 2 else LIBRARY_PENALTY


def _product(flops: float, size: float, itemsize: int) -> float:
    return max(flops / (FLOPS_PER_BYTE_16BIT if itemsize == 2 else FLOPS_PER_BYTE), size)


def prefers_projected(plan: RegionPlan, queries: torch.Tensor, heads: int, impl: str) -> bool:
    """Whether `resample` should make keys and values for these shapes, rather than run `impl` absorbed."""
    count, width = queries.shape[1:]
    keys = plan.num_keys if plan.tap_index is None else plan.num_boxes * plan.tap_index.shape[2] ** 2
    shared = queries.shape[0] == 1 or queries.stride(0) == 0
    shape = (plan.num_boxes, shared, count, heads, width, keys, queries.element_size())
    return projected_cost(*shape) < absorbed_cost(*shape, impl)
