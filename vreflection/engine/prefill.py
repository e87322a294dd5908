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

from .requests import Prompt

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
    """`(L,)` numbers that are equal where two prompts' inputs are; None when the prompt came as embeddings."""
    if prompt.embeds is not None:
        return None
    ids = prompt.input_ids.cpu().numpy().astype(np.int64)
    if prompt.image_grid_thw is None:
        return ids
    marks = ids.copy()
    places = np.flatnonzero(ids == image_token_id)
    start = 0
    for key, (_, grid) in zip(prompt.image_ids(merge), prompt.image_parts(merge), strict=True):
        count = int(grid.prod()) // merge**2
        # Negative numbers are no ids; a key's 60 bits and the place in the image tell any two visual tokens apart.
        base = int(key_number(key))
        marks[places[start : start + count]] = -(base ^ np.arange(count, dtype=np.int64)) - 1
        start += count
    return marks


def key_number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 4


def common_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading entries agree."""
    count = min(len(left), len(right))
    different = np.flatnonzero(left[:count] != right[:count])
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
        most = len(filling.marks) - 1
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
    return marks[:SHORTEST_SHARED].tobytes()


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
