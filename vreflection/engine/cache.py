"""The key/value cache of a decoder: one line per row, filled from the left, shared by prefill and every step.

Shape suffixes: B rows, K key/value heads, C columns, E head width, L new positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class KVCache:
    """Static keys and values `(B, K, C, E)` per layer."""

    def __init__(
        self, layers: int, rows: int, heads: int, columns: int, width: int, dtype: torch.dtype, device: torch.device
    ):
        self.layers, self.rows, self.heads, self.columns, self.width = layers, rows, heads, columns, width
        self.dtype, self.device = dtype, device
        # Zeroed, because a masked weight of 0 times a leftover NaN would still be NaN.
        self.keys = [self.blank() for _ in range(layers)]
        self.values = [self.blank() for _ in range(layers)]

    def blank(self) -> torch.Tensor:
        shape = (self.rows, self.heads, self.columns, self.width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def grow(self, columns: int) -> None:
        """Make room for `columns` per row; addresses change."""
        kept, self.columns = self.columns, columns
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self.blank()
                tensors[layer][:, :, :kept] = old

    def wipe(self, row: int, start: int, stop: int) -> None:
        """Zero what an earlier prompt left in `[start, stop)` of a row."""
        if stop > start:
            for tensor in (*self.keys, *self.values):
                tensor[row, :, start:stop] = 0

    def keep_columns(self, row: int, kept: torch.Tensor) -> None:
        """Move the given columns `(n,)` of a row to its front; what lies behind is no longer looked at."""
        for tensor in (*self.keys, *self.values):
            tensor[row, :, : len(kept)] = tensor[row][:, kept]

    def copy_prefix(self, source: int, target: int, columns: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :columns] = tensor[source, :, :columns]


def cache_bytes(layers: int, rows: int, heads: int, columns: int, width: int, dtype: torch.dtype) -> int:
    return 2 * layers * rows * heads * columns * width * dtype.itemsize


@cache
def cache_argument(decoder: type) -> str:
    """What the host's decoder class calls the cache it is handed: newer releases renamed it."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


class HostLayer(CacheLayerMixin):
    """One layer of `KVCache` as the host library's attention sees it."""

    # A prompt's attention is then causal without a mask of its squared length.
    is_compileable = False
    is_sliding = False

    def __init__(self, owner: HostCache, layer: int):
        super().__init__()
        self.owner, self.layer, self.is_initialized = owner, layer, True

    def lazy_initialization(self, key_states, value_states=None) -> None: ...

    def update(self, key_states, value_states, *args, **kwargs):
        return self.owner.write(self.layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.owner.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.start + query_length, 0

    def get_max_length(self) -> int:
        return self.owner.cache.columns

    get_max_cache_shape = get_max_length


class HostCache(Cache):
    """Lets the host model's own forward write into rows of a `KVCache`.

    Either a prompt part of some rows (`rows_for_prompt`) or one key per row at its own column (`rows_for_step`).
    """

    def __init__(self, cache: KVCache):
        self.cache, self.start = cache, 0
        self.targets: list[int] = []
        self.index: torch.Tensor | None = None
        self.extent = 0
        super().__init__(layers=[HostLayer(self, layer) for layer in range(cache.layers)])

    def rows_for_prompt(self, rows: Sequence[int], start: int) -> None:
        """The next forward brings columns `start` and up of `rows`, whose columns before are filled."""
        self.targets, self.start, self.index = list(rows), start, None

    def rows_for_step(self, length: torch.Tensor, extent: int) -> None:
        """The next forward brings one key per row at `length` `(B,)` and looks at the first `extent` columns."""
        self.index, self.extent, self.start = flat_index(length, self.cache), extent, 0

    def write(self, layer: int, key_states, value_states):
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.index is not None:
            rows = key_states.shape[0]
            for tensor, states in ((keys, key_states), (values, value_states)):
                tensor.view(-1, self.cache.width).index_copy_(0, self.index, states.reshape(-1, self.cache.width))
            return keys[:rows, :, : self.extent], values[:rows, :, : self.extent]
        stop = self.start + key_states.shape[2]
        keys[self.targets, :, self.start : stop] = key_states
        values[self.targets, :, self.start : stop] = value_states
        if self.start:
            return keys[self.targets, :, :stop], values[self.targets, :, :stop]
        return key_states, value_states


def flat_index(length: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Where row b's next key goes among the cache's `(B * K * C)` lines: `(B * K,)`; a full row's last column."""
    lines = torch.arange(length.shape[0] * cache.heads, device=length.device).view(-1, cache.heads)
    column = length.clamp(max=cache.columns - 1)[:, None]
    return (lines * cache.columns + column).view(-1)
