"""Causal attention over sequences packed end to end in one row, without a mask of the whole row.

Registered with the host library under `PACKED_ATTENTION`, so that every decoder layer uses it, recomputation under
gradient checkpointing included. Rows that are not packed go to the host library's own `sdpa`.

Shape suffixes: H query heads, G key/value heads, L length of the row, E head width, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "vreflection_packed"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Tokens of each packed sequence. An object, so that compiled layers do not take the numbers for constants."""

    lengths: tuple[int, ...]


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """Attend within each sequence of a packed row.

    Args:
        query: `(1, H, L, E)`. key, value: `(1, G, L, E)`, G a divisor of H.
        lengths: tokens per sequence, adding up to L; host integers, so that nothing waits for the device.

    Returns:
        `(1, L, H, E)`.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return varlen_attention(query, key, value, lengths, scale, causal)
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    outputs: list[torch.Tensor | None] = [None] * len(lengths)
    # Sequences of one length go in one call.
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(order, key=lengths.__getitem__):
        members = list(group)
        q, k, v = (torch.cat([part[i] for i in members]) for part in parts)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )  # fmt: skip
        for i, sequence in zip(members, out.transpose(1, 2).split(1)):
            outputs[i] = sequence
    return torch.cat(outputs, dim=1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def varlen_attention(query, key, value, lengths: tuple[int, ...], scale: float, causal: bool) -> torch.Tensor:
    """One variable-length flash kernel for the whole row (half precision on a GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    bounds = bounds.to(query.device, non_blocking=True)
    groups = query.shape[1] // key.shape[1]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if groups > 1:  # grouped heads are newer than the oldest torch supported
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = max(lengths)
    # The scale is applied here as older versions fix it.
    q = q * (scale * q.shape[-1] ** 0.5)
    out = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest, **causal_flag(causal)
    )
    return out[None]  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue]


def causal_flag(causal: bool) -> dict:
    """How this torch spells causal masking for `varlen_attn`: a window of everything before and nothing after."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {"is_causal": causal}


def host_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequences: Sequences | None = None,
    **kwargs,
):
    """The host library's attention signature around `packed_attention`."""
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return of_sequences(query, key, value, sequences, query.shape[-1] ** -0.5 if scaling is None else scaling), None


@torch.compiler.disable
def of_sequences(query, key, value, sequences: Sequences, scale: float) -> torch.Tensor:
    """Outside compiled code, which would be built anew for every combination of lengths."""
    return packed_attention(query, key, value, sequences.lengths, scale)


AttentionInterface.register(PACKED_ATTENTION, host_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
