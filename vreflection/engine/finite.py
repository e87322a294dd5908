"""Has a row's arithmetic broken down? NaN makes every later token meaningless, and the first id of the vocabulary.

Shape suffixes: B rows, D width.
"""

from __future__ import annotations

import torch
from torch import nn

BROKEN = -2  # in the place of an emission
NOT_FINITE = "not_finite"  # why such an answer ended


def finite_rows(values_BD: torch.Tensor) -> torch.Tensor:
    """Which rows hold finite numbers only; `(B,)` bool.

    NaN in a row's hidden state stays: its keys in the cache carry it into all later ones. So it is enough to look now
    and then.
    """
    return values_BD.sum(dim=1, dtype=torch.promote_types(values_BD.dtype, torch.float32)).isfinite()


def picked_weights(head: nn.Module, token_B: torch.Tensor) -> torch.Tensor:
    """The vocabulary weights of picked tokens, `(B, D)`, where the head is a plain matrix; else zeros, `(B, 1)`.

    Where a weight is NaN, so is that token's score, which is the largest to every way of picking or to none.
    """
    if isinstance(head, nn.Linear) and type(head.weight) is nn.Parameter and head.weight.is_floating_point():
        return head.weight[token_B.to(head.weight.device)].to(token_B.device)
    return torch.zeros(len(token_B), 1, device=token_B.device)


def not_finite(tokens: int) -> FloatingPointError:
    """The error of a row that broke down after so many tokens of its answer."""
    return FloatingPointError(
        f"expected finite hidden states and vocabulary weights, got NaN or infinity after {tokens} tokens of the "
        "answer; check the weights (and given latents or image features), or decode in bfloat16 or float32 where "
        "float16 overflows"
    )
