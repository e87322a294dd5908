"""The language model's own attention, read off one forward: a few rows and columns, or rolled out over all layers.

Registered with the host library as an attention of its own: outputs are those of its `sdpa`, and a `Watch` handed
along sees queries and keys as they are after the rope.

Shape suffixes: H query heads, G key/value heads, L length, E head width, N watched rows, I watched columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

WATCHED_ATTENTION = "vreflection_watched"
# Attention weights held at a time, in numbers: 256 MiB of float32.
CHUNK = 1 << 26


@dataclass(eq=False)
class Watch:
    """What to keep of the attention weights of one sequence.

    Args:
        rows: `(N,)` positions that look. columns: `(I,)` positions looked at.
        layers, heads: whose weights are averaged; all where None.
        expected: layers that count; a forward that shows fewer is none to read maps off.
        rollout: attention rollout (Abnar and Zuidema 2020) instead: with A the head-averaged weights of a layer, the
            rows of the product of (A + 1) / 2 over all layers, the first one rightmost.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    expected: int
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    rollout: bool = False
    seen: int = 0  # layers
    total: torch.Tensor | None = field(default=None, repr=False)

    def weights(self) -> torch.Tensor:
        """`(N, I)` float32, after the forward."""
        if self.total is None or self.seen != self.expected:
            raise RuntimeError(
                f"watched attention: expected to see {self.expected} layers, saw {self.seen}; does another thread run "
                "the model, or does a layer not use the host library's attention?"
            )
        return self.total[self.rows] if self.rollout else self.total / self.seen

    def see(self, layer: int, query_HLE: torch.Tensor, key_GLE: torch.Tensor, scale: float) -> None:
        if self.rollout:
            self._roll(query_HLE, key_GLE, scale)
        elif self.layers is None or layer in self.layers:
            weights = causal_weights(query_HLE, key_GLE, self.rows, scale)[..., self.columns]
            kept = weights if self.heads is None else weights[list(self.heads)]
            self.total = kept.mean(0) if self.total is None else self.total + kept.mean(0)
        self.seen += 1 if self.layers is None or layer in self.layers else 0

    def _roll(self, query_HLE: torch.Tensor, key_GLE: torch.Tensor, scale: float) -> None:
        """One more factor on the left. Only the watched columns are carried: `(L, I)` instead of `(L, L)`."""
        heads, length, _ = query_HLE.shape
        total = self.total
        if total is None:
            total = self.total = torch.zeros(length, len(self.columns), device=query_HLE.device)
            total[self.columns, torch.arange(len(self.columns), device=query_HLE.device)] = 1.0
        step = max(1, CHUNK // (heads * length))
        # From the end: a row needs those before it as the last layer left them.
        for start in range((length - 1) // step * step, -1, -step):
            stop = min(start + step, length)
            rows = torch.arange(start, stop, device=query_HLE.device)
            mean = causal_weights(query_HLE, key_GLE[:, :stop], rows, scale).mean(0)
            total[start:stop] = (mean @ total[:stop] + total[start:stop]) / 2


def causal_weights(query_HLE: torch.Tensor, key_GLE: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention weights `(H, len(rows), keys)` float32 of some rows of a causal sequence, softmax in float32."""
    heads, groups, keys = query_HLE.shape[0], key_GLE.shape[0], key_GLE.shape[1]
    query = query_HLE[:, rows].reshape(groups, -1, query_HLE.shape[2])  # a group's heads stand together
    scores = (query @ key_GLE.transpose(1, 2) * scale).float().view(heads, len(rows), keys)
    later = torch.arange(keys, device=rows.device) > rows[:, None]
    return scores.masked_fill_(later, -torch.inf).softmax(-1)


def watched_attention(
    module, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None,
    watch: Watch | None = None, **kwargs,
):  # fmt: skip
    """The host library's attention signature; without a watch, its `sdpa`."""
    if watch is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        watch.see(module.layer_idx, query[0], key[0], scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


@contextmanager
def watching(decoder: nn.Module) -> Iterator[None]:
    """The decoder's layers use `watched_attention`; no other thread may run them meanwhile."""
    config = decoder.config
    chosen = config._attn_implementation
    config._attn_implementation = WATCHED_ATTENTION  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        config._attn_implementation = chosen  # pyright: ignore[reportAttributeAccessIssue]


AttentionInterface.register(WATCHED_ATTENTION, watched_attention)
AttentionMaskInterface.register(WATCHED_ATTENTION, sdpa_mask)
