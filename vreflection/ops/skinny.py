"""Products of a few vectors with a large weight: memory-bound, and slow in a library tuned for square ones.

On the CPU our C++ streams each weight once (`csrc/skinny_gemm.cpp`); everywhere else the vendor's library is at the
memory's speed already. All take and give `(G, rows, columns)`.
"""

from __future__ import annotations

import torch

# Rows above which the vendor's product is faster than ours (bench/measured.md, "Few rows against a weight").
MAX_ROWS = 32


def ours(rows: int, impl: str) -> bool:
    """Whether our product runs, rather than the library's."""
    return impl == "cpp" and rows <= MAX_ROWS


def matmul_transposed(x_GMK: torch.Tensor, w_GNK: torch.Tensor, impl: str) -> torch.Tensor:
    """`x @ w^T`: `(G, M, N)`."""
    if ours(x_GMK.shape[1], impl):
        return torch.ops.vreflection.skinny_nt(x_GMK, w_GNK)
    return torch.bmm(x_GMK, w_GNK.transpose(1, 2))


def matmul(x_GMK: torch.Tensor, w_GKN: torch.Tensor, impl: str) -> torch.Tensor:
    """`x @ w`: `(G, M, N)`."""
    if ours(x_GMK.shape[1], impl):
        return torch.ops.vreflection.skinny_nn(x_GMK, w_GKN)
    return torch.bmm(x_GMK, w_GKN)


def outer(out_GNK: torch.Tensor, a_GMN: torch.Tensor, b_GMK: torch.Tensor, impl: str) -> None:
    """`out := a^T @ b`, a weight's gradient, written in place."""
    if torch.compiler.is_compiling():  # a traced graph must not write into slices of memory it has not seen
        out_GNK.copy_(torch.bmm(a_GMN.transpose(1, 2), b_GMK))
    elif ours(a_GMN.shape[1], impl):
        torch.ops.vreflection.skinny_tn(out_GNK, a_GMN, b_GMK)
    else:
        torch.bmm(a_GMN.transpose(1, 2), b_GMK, out=out_GNK)
