"""Which samples form which batch: an endless, seeded stream over epochs, shuffled or not, packed into a token budget.

The stream is a pure function of its settings: any process can work out any batch, and a resumed run goes on with the
very next one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from vreflection.errors import ConfigError

# Samples packed at a time. Larger windows fill better and shuffle as well; 8192 fills over 99 % at public lengths.
WINDOW = 8192


def best_fit(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Pack items into as few bins as best-fit decreasing finds; no item is ever cut.

    Args:
        lengths: tokens per item, each between 1 and `budget`.
        budget: tokens per pack.

    Returns:
        Positions into `lengths`, per pack; every position once.

    Raises:
        ValueError: an item longer than the budget.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    if order and lengths[order[0]] > budget:
        raise ValueError(f"expected items of at most {budget} tokens, got one of {lengths[order[0]]}")
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for item in order:
        at = bisect.bisect_left(room, (int(lengths[item]), -1))
        if at == len(room):
            packs.append([])
            left, pack = budget, len(packs) - 1
        else:
            left, pack = room.pop(at)
        packs[pack].append(item)
        bisect.insort(room, (left - int(lengths[item]), pack))
    return packs


def next_fit(lengths: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Pack items in their order, closing a pack when the next does not fit; arguments and result as in `best_fit`."""
    packs: list[list[int]] = []
    left = 0
    for item, length in enumerate(map(int, lengths)):
        if length > budget:
            raise ValueError(f"expected items of at most {budget} tokens, got one of {length}")
        if length > left:
            packs.append([])
            left = budget
        packs[-1].append(item)
        left -= length
    return packs


@dataclass(frozen=True)
class BatchPlan:
    """How samples become micro-batches.

    Attributes:
        indices: the usable samples' positions in the data set.
        seed: of the shuffles; epoch e uses (seed, e).
        batch_size: samples per micro-batch, when there is no `budget`.
        budget: tokens per micro-batch (a pack); needs `lengths`.
        lengths: tokens of every entry of `indices`.
        shuffle: otherwise every epoch takes the samples in the order of `indices`, packs included.
    """

    indices: np.ndarray
    seed: int
    batch_size: int = 1
    budget: int | None = None
    lengths: np.ndarray | None = None
    shuffle: bool = True

    def __post_init__(self):
        if not len(self.indices):
            raise ConfigError(
                "expected at least one usable sample, got none; `vreflection data check` says why for each"
            )
        if self.budget is None:
            return
        if self.lengths is None or len(self.lengths) != len(self.indices):
            raise ValueError("a token budget needs the length of every sample")
        longest = int(self.lengths.max())
        if longest > self.budget:
            raise ConfigError(
                f"data.pack_tokens: expected at least the longest sample, {longest} tokens, got {self.budget}; "
                "raise it, or lower data.max_length so that such samples are left out"
            )

    def batches(self) -> Iterator[tuple[float, list[int]]]:
        """Endless micro-batches: (epochs begun when the batch was formed, sample indices)."""
        if self.budget is None:
            return self._counted()
        return self._packed() if self.shuffle else self._packed_in_order()

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.indices))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.indices))

    def _counted(self) -> Iterator[tuple[float, list[int]]]:
        held: list[int] = []
        epoch = 0
        while True:
            held += self.indices[self._order(epoch)].tolist()
            epoch += 1
            while len(held) >= self.batch_size:
                yield epoch, held[: self.batch_size]
                held = held[self.batch_size :]

    def _packed(self) -> Iterator[tuple[float, list[int]]]:
        assert self.budget is not None and self.lengths is not None
        epoch = 0
        while True:
            carried: list[int] = []
            order = self._order(epoch)
            for start in range(0, len(order), WINDOW):
                window = carried + order[start : start + WINDOW].tolist()
                packs = best_fit(self.lengths[window], self.budget)
                fill = [int(self.lengths[[window[item] for item in pack]].sum()) for pack in packs]
                carried = []
                # The emptiest pack waits for the next window, so that only an epoch's last pack is under-filled.
                if start + WINDOW < len(order):
                    emptiest = int(np.argmin(fill))
                    carried = [window[item] for item in packs.pop(emptiest)]
                shuffle = np.random.default_rng((self.seed, epoch, start)).permutation(len(packs))
                for number in shuffle.tolist():
                    yield epoch + 1, [int(self.indices[window[item]]) for item in packs[number]]
            epoch += 1

    def _packed_in_order(self) -> Iterator[tuple[float, list[int]]]:
        assert self.budget is not None and self.lengths is not None
        packs = [self.indices[pack].tolist() for pack in next_fit(self.lengths, self.budget)]
        for epoch in count(1):
            yield from ((epoch, pack) for pack in packs)


class RankBatches:
    """One rank's share of a plan, as a batch sampler: of every `world` consecutive micro-batches the one of its own.

    The samples of an optimizer step depend on `world * accumulation` only, not on how the two split.

    Args:
        plan: see `BatchPlan`.
        count: micro-batches of this rank over the whole run.
        rank, world: this process and how many there are.
        shift: the plan's number of the first micro-batch. Negative numbers stand for batches that a resumed run leaves
            out anyway; they are empty.
    """

    def __init__(self, plan: BatchPlan, count: int, rank: int = 0, world: int = 1, shift: int = 0):
        self.plan, self.count, self.rank, self.world, self.shift = plan, count, rank, world, shift

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        first = self.shift + self.rank
        before = 0 if first >= 0 else min(self.count, math.ceil(-first / self.world))
        yield from ([] for _ in range(before))
        start = first + before * self.world
        for _, batch in islice(self.plan.batches(), start, start + (self.count - before) * self.world, self.world):
            yield batch


@dataclass(frozen=True)
class PackingReport:
    """Share of computed positions that hold a token, packed and in padded batches of as many samples."""

    packed: float
    padded: float
    samples_per_pack: float

    def summary(self) -> str:
        return (
            f"packing fills {self.packed:.1%} of its token budget, {self.samples_per_pack:.1f} samples a pack; "
            f"padded batches of as many samples would fill {self.padded:.1%}"
        )


def packing_report(plan: BatchPlan, packs: int = 512) -> PackingReport:
    """Efficiency over the first `packs` packs of a plan (one epoch if that is less)."""
    assert plan.budget is not None and plan.lengths is not None
    length = dict(zip(plan.indices.tolist(), plan.lengths.tolist()))
    chosen = []
    for epoch, batch in islice(plan.batches(), packs):
        if epoch > 1 and chosen:
            break
        chosen.append([length[index] for index in batch])
    tokens = sum(sum(pack) for pack in chosen)
    samples = sum(len(pack) for pack in chosen)
    size = max(1, round(samples / len(chosen)))
    order = np.random.default_rng((plan.seed, 0)).permutation(plan.lengths)
    rows = [order[start : start + size] for start in range(0, len(order), size)]
    padded = float(plan.lengths.sum()) / sum(len(row) * int(row.max()) for row in rows)
    return PackingReport(tokens / (len(chosen) * plan.budget), padded, samples / len(chosen))
