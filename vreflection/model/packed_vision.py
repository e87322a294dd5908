"""The vision tower over all its windows and images at once.

Without flash attention the host library attends window by window and image by image, one small call each. Here equal
lengths go in one call (on a GPU all of them, in torch's varlen kernel). Patches are embedded by a matrix product: the
host's convolution has a kernel as large as its stride. Weights, rotation and result are the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from .packed_attention import packed_attention


@contextmanager
def packed_vision(visual: nn.Module) -> Iterator[None]:
    """Within it a Qwen2.5-VL vision tower, this one only, works on all windows at once.

    A tower set to another attention than the host's `sdpa` keeps it, and what somebody put in place of a part's forward
    stays.
    """
    forwards: dict[nn.Module, Callable] = {}
    if visual.config._attn_implementation == "sdpa":  # pyright: ignore
        lengths = SegmentLengths()
        forwards[visual.patch_embed] = embed_patches  # pyright: ignore
        forwards |= {block.attn: packed_forward(lengths) for block in visual.blocks}  # pyright: ignore
    free = [part for part in forwards if "forward" not in part.__dict__]
    for part in free:
        part.forward = MethodType(forwards[part], part)
    try:
        yield
    finally:
        for part in free:
            part.__dict__.pop("forward", None)


def embed_patches(self, patches_PC: torch.Tensor) -> torch.Tensor:
    weight = self.proj.weight.flatten(1)
    return nn.functional.linear(patches_PC.reshape(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)


class SegmentLengths:
    """Host integers of `cu_seqlens`, read from the device once per tensor and not once per layer."""

    def __init__(self):
        self.known = WeakIdKeyDictionary()

    def of(self, cu_seqlens: torch.Tensor) -> tuple[int, ...]:
        if cu_seqlens not in self.known:
            self.known[cu_seqlens] = tuple(cu_seqlens.diff().tolist())
        return self.known[cu_seqlens]


def packed_forward(lengths: SegmentLengths):
    def forward(self, hidden_states, cu_seqlens, rotary_pos_emb=None, *, position_embeddings, **kwargs):
        patches = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1)
        query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)  # [patches, heads, width] each
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        attended = packed_attention(query, key, value, lengths.of(cu_seqlens), self.scaling, causal=False)
        return self.proj(attended.reshape(patches, -1))

    return forward
