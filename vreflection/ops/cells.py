"""The RoI-Align sampling map in plain PyTorch: one box's tokens as a view, its two axes as matrices, map and transpose.

Shape suffixes: see `regions`; h, w the rectangle's rows and columns, R any channels.
"""

from __future__ import annotations

import torch


def tap_matrices(plan_spans: list[list[int]], tap_index: torch.Tensor, tap_weight: torch.Tensor, box: int):
    """The two axes of one box's sampling map as dense matrices `(P, height)` and `(P, width)`."""
    _, _, height, width, _ = plan_spans[box]
    cells = tap_index.shape[2]
    return [
        tap_weight.new_zeros(cells, extent).scatter_add(1, tap_index[axis, box], tap_weight[axis, box])
        for axis, extent in enumerate((height, width))
    ]


def rectangle(tokens: torch.Tensor, span: list[int]) -> torch.Tensor:
    """One box's tokens, `(height, width, D)`: a view."""
    first, stride, height, width, _ = span
    row, column = tokens.stride()
    return tokens.as_strided(
        (height, width, tokens.shape[1]), (stride * row, row, column), tokens.storage_offset() + first * row
    )


def sample_cells(values_hwR: torch.Tensor, rows_Ph: torch.Tensor, columns_Pw: torch.Tensor) -> torch.Tensor:
    """Apply the sampling map: token channels `(h, w, R)` to cell channels `(C, R)`."""
    return torch.einsum("ph,hwr,qw->pqr", rows_Ph, values_hwR, columns_Pw).flatten(0, 1)


def splat_cells(cells_CR: torch.Tensor, rows_Ph: torch.Tensor, columns_Pw: torch.Tensor) -> torch.Tensor:
    """Apply its transpose: cell channels `(C, R)` back to token channels `(h, w, R)`."""
    cells = cells_CR.unflatten(0, (rows_Ph.shape[0], columns_Pw.shape[0]))
    return torch.einsum("ph,pqr,qw->hwr", rows_Ph, cells, columns_Pw)
