"""From prompts to filled cache rows: each image is encoded once, prompts that begin alike share their beginning.

Shape suffixes: L prompt tokens, T visual tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .cache import KVCache
from .requests import Prompt
from .steps import HostStep

# Below this many tokens, copying a shared beginning costs more than computing it.
SHORTEST_SHARED = 32
# Positions of one forward, padding included: enough to keep a GPU busy, little enough to hold the activations.
PREFILL_POSITIONS = 32768


class FeatureCache:
    """Visual tokens of the last images, by key."""

    def __init__(self, model, images: int):
        self.model, self.limit = model, images
        self.features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.encoded = 0

    def of(self, prompts: Sequence[Prompt]) -> list[torch.Tensor | None]:
        """Visual tokens `(T, D)` per prompt; images not seen before go through the vision tower in one call."""
        missing: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        known: dict[str, torch.Tensor] = {}
        for prompt in prompts:
            if prompt.pixel_values is None:
                continue
            for key, part in zip(prompt.image_ids(), prompt.image_parts(), strict=True):
                if key in self.features:
                    self.features.move_to_end(key)
                    known[key] = self.features[key]
                else:
                    missing[key] = part
        if missing:
            known |= self.encode(missing)
        return [self.join(prompt, known) for prompt in prompts]

    def encode(self, missing: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        device, dtype = self.model.device, self.model.dtype
        pixels = torch.cat([part.to(device, dtype) for part, _ in missing.values()])
        grids = torch.stack([grid for _, grid in missing.values()])
        tokens = self.model.visual_tokens(pixels, grids.to(device))
        merge = self.model.config.vision_config.spatial_merge_size
        sizes = [int(t * h * w) // merge**2 for t, h, w in grids.tolist()]
        found = dict(zip(missing, tokens.split(sizes)))
        self.encoded += len(found)
        self.features.update(found)
        while len(self.features) > self.limit:
            self.features.popitem(last=False)
        return found

    def join(self, prompt: Prompt, known: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if prompt.pixel_values is None:
            features = prompt.image_features
            return None if features is None else features.to(self.model.device)
        parts = [known[key] for key in prompt.image_ids()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def signature(prompt: Prompt, image_token_id: int, merge: int) -> np.ndarray | None:
    """Columns `(k, L)` that are equal where two prompts' inputs are; None when the prompt came as embeddings."""
    if prompt.embeds is not None:
        return None
    marks = prompt.input_ids.cpu().numpy().astype(np.int64)
    if prompt.image_grid_thw is not None:
        places, start = np.flatnonzero(marks == image_token_id), 0
        for key, (_, grid) in zip(prompt.image_ids(merge), prompt.image_parts(merge), strict=True):
            count = int(grid.prod()) // merge**2
            # Negative numbers are no ids; a key's 60 bits and the place in the image tell any two visual tokens apart.
            marks[places[start : start + count]] = -(key_number(key) ^ np.arange(count, dtype=np.int64)) - 1
            start += count
    # Whatever else decides where a token stands.
    given = prompt.position_ids if prompt.position_ids is not None else prompt.mm_token_type_ids
    if given is None:
        return marks[None]
    return np.concatenate([marks[None], given.cpu().numpy().astype(np.int64).reshape(-1, len(marks))])


def key_number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 4


def common_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading columns agree; none where the two prompts' positions were given in different forms."""
    if len(left) != len(right):
        return 0
    count = min(left.shape[1], right.shape[1])
    different = np.flatnonzero((left[:, :count] != right[:, :count]).any(axis=0))
    return int(different[0]) if len(different) else count


@dataclass
class Filling:
    """One prompt on its way into a cache row: `start` columns come from row `donor`."""

    row: int
    prompt: Prompt
    marks: np.ndarray | None
    start: int = 0
    donor: int | None = None


def plan_sharing(
    fillings: Sequence[Filling], held: dict[int, np.ndarray], replaced: dict[int, np.ndarray]
) -> list[list[Filling]]:
    """Waves of fillings: whatever begins like a row filled before, or filled in an earlier wave, starts there.

    Args:
        held: marks of rows whose prompt stays in the cache. replaced: marks of what lies in the rows about to be
            filled, which only the row's own new prompt can build on.
    """
    first, second = [], []
    leaders: set[int] = set()
    alike: dict[bytes, list[tuple[int, np.ndarray]]] = {}
    for row, marks in held.items():
        alike.setdefault(beginning(marks), []).append((row, marks))
    for filling in fillings:
        if filling.marks is None:
            first.append(filling)
            continue
        leading = alike.setdefault(beginning(filling.marks), [])
        own = replaced.get(filling.row)
        candidates = leading if own is None else [*leading, (filling.row, own)]
        # One token at least is left to compute: its hidden state picks the first new one.
        most = filling.marks.shape[1] - 1
        shared = [min(common_length(marks, filling.marks), most) for _, marks in candidates]
        if shared and max(shared) >= SHORTEST_SHARED:
            filling.start = max(shared)
            filling.donor = candidates[shared.index(filling.start)][0]
            (second if filling.donor in leaders else first).append(filling)
        else:
            leaders.add(filling.row)
            leading.append((filling.row, filling.marks))
            first.append(filling)
    return [wave for wave in (first, second) if wave]


def beginning(marks: np.ndarray) -> bytes:
    return bytes([len(marks)]) + marks[:, :SHORTEST_SHARED].tobytes()


def forward_groups(wave: Sequence[Filling], limit: int | None = None) -> list[list[Filling]]:
    """Fillings that go through the model together: one start, lengths that waste little, bounded size."""
    limit = PREFILL_POSITIONS if limit is None else limit
    groups: list[list[Filling]] = []
    for filling in sorted(wave, key=lambda f: (f.start, -len(f.prompt))):
        length = len(filling.prompt) - filling.start
        if groups:
            group = groups[-1]
            longest = len(group[0].prompt) - group[0].start
            fits = longest * (len(group) + 1) <= limit
            # Padding costs at most as much as the tokens themselves.
            if group[0].start == filling.start and fits and 2 * length >= longest:
                group.append(filling)
                continue
        groups.append([filling])
    return groups


def pad_right(rows: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Stack tensors that differ in `dim` (counted without the new first one), zeros after the shorter ones."""
    longest = max(row.shape[dim] for row in rows)
    shape = list(rows[0].shape)
    shape[dim] = longest
    padded = rows[0].new_zeros(len(rows), *shape)
    for target, row in zip(padded, rows, strict=True):
        target.narrow(dim, 0, row.shape[dim]).copy_(row)
    return padded


class Prefill:
    """Fills cache rows with prompts.

    Attributes:
        held: marks (see `signature`) of the prompt that lies in a row, whether the row is in use or not.
    """

    def __init__(self, model, step: HostStep, cache: KVCache, image_cache: int, share_prefixes: bool):
        self.model, self.step, self.cache = model, step, cache
        self.features = FeatureCache(model, image_cache)
        self.share_prefixes = share_prefixes
        self.held: dict[int, np.ndarray] = {}
        self.dirty = [0] * cache.rows  # columns of a row ever written

    def fill(self, rows: list[int], prompts: list[Prompt]) -> dict[int, tuple[torch.Tensor, int]]:
        """Consume prompts into rows that nobody uses.

        Returns:
            per row its last hidden state `(D,)` and the rope position of its next input.
        """
        replaced = {row: self.held.pop(row) for row in rows if row in self.held}
        fillings = [Filling(row, prompt, self.marks(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
        found = {}
        for wave in plan_sharing(fillings, self.held, replaced):
            for filling in wave:
                if filling.donor not in (None, filling.row):
                    self.cache.copy_prefix(filling.donor, filling.row, filling.start)
            for group in forward_groups(wave):
                found |= self.consume(group)
        self.held |= {filling.row: filling.marks for filling in fillings if filling.marks is not None}
        return found

    def marks(self, prompt: Prompt) -> np.ndarray | None:
        config = self.model.config
        if not self.share_prefixes:
            return None
        return signature(prompt, config.image_token_id, config.vision_config.spatial_merge_size)

    def forget(self) -> None:
        """Drop what earlier prompts left: beginnings and images."""
        self.held.clear()
        self.features.features.clear()

    def consume(self, group: list[Filling]) -> dict[int, tuple[torch.Tensor, int]]:
        """Run the prompts of one group through the model, from their common start on."""
        inputs = self.inputs([f.prompt for f in group])
        start, rows = group[0].start, [f.row for f in group]
        embeds = pad_right([embeds[start:] for embeds, _ in inputs], 0)
        positions = pad_right([positions[:, start:] for _, positions in inputs], 1).transpose(0, 1)
        stop = start + embeds.shape[1]
        for row in rows:
            self.cache.wipe(row, stop, self.dirty[row])
            self.dirty[row] = stop
        last = [len(filling.prompt) - start - 1 for filling in group]
        hidden_BD = self.step.prefill(embeds, positions, rows, last, start)
        ends = [int(position.max()) + 1 for _, position in inputs]
        return {filling.row: (z, end) for filling, z, end in zip(group, hidden_BD, ends)}

    def inputs(self, prompts: list[Prompt]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Embeddings `(L, D)` with the visual tokens in their places, and rope positions `(3, L)`."""
        made, device = [], self.model.device
        features = self.features.of(prompts)
        for prompt, tokens in zip(prompts, features):
            if prompt.embeds is not None:
                made.append((prompt.embeds, prompt.position_ids))
                continue
            as_batch = lambda value: None if value is None else value.to(device)[None]  # noqa: E731
            positions, grids = prompt.position_ids, prompt.image_grid_thw
            embeds, positions = self.model.prompt_inputs(
                as_batch(prompt.input_ids),
                image_grid_thw=None if grids is None else grids.to(device),
                mm_token_type_ids=as_batch(prompt.mm_token_type_ids),
                position_ids=None if positions is None else positions[:, None].to(device),
                image_features=tokens,
            )
            made.append((embeds[0], positions[-3:, 0]))
        return made

    def written(self, row: int, columns: int) -> None:
        """A row's steps have reached `columns`."""
        self.dirty[row] = max(self.dirty[row], min(columns, self.cache.columns))
