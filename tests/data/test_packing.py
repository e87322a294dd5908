"""Plans of batches: nothing cut, nothing lost, nothing twice, and the same stream for every split over processes."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.data.packing import BatchPlan, RankBatches, best_fit, next_fit, packing_report
from vreflection.errors import ConfigError


def public_lengths(count, seed=0):
    """A length distribution like the public data's: mostly a few hundred visual tokens, some pages of thousands."""
    rng = np.random.default_rng(seed)
    visual = np.where(rng.random(count) < 0.8, rng.normal(320, 90, count), rng.normal(3200, 1200, count))
    return (np.clip(visual, 128, 5120) + rng.integers(40, 140, count)).astype(np.int64)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=150, deadline=None)
def test_best_fit_places_everything_once_within_the_budget(lengths, budget):
    packs = best_fit(lengths, budget)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in pack) <= budget for pack in packs)
    # No two packs could have been one, or best fit would have put the later one's first item into the earlier.
    if packs:
        assert len(packs) <= max(1, 2 * -(-sum(lengths) // budget))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=150, deadline=None)
def test_next_fit_keeps_the_order_and_closes_a_pack_only_when_the_next_does_not_fit(lengths, budget):
    packs = next_fit(lengths, budget)
    assert [item for pack in packs for item in pack] == list(range(len(lengths)))
    sizes = [sum(lengths[item] for item in pack) for pack in packs]
    assert all(0 < size <= budget for size in sizes)
    assert all(size + lengths[after[0]] > budget for size, after in zip(sizes, packs[1:]))


@pytest.mark.parametrize("fit", [best_fit, next_fit])
def test_an_item_over_the_budget_is_refused(fit):
    with pytest.raises(ValueError, match="at most 10 tokens, got one of 11"):
        fit([3, 11], 10)


def plan(count=500, **kwargs):
    indices = np.arange(count) * 2 + 1  # not all rows are usable
    return BatchPlan(indices, **{"seed": 3, **kwargs})


@pytest.mark.parametrize("packed", [False, True])
def test_each_epoch_holds_every_sample_once(packed):
    lengths = public_lengths(500) if packed else None
    made = plan(budget=16384 if packed else None, lengths=lengths, batch_size=7)
    seen, batches = Counter(), made.batches()
    while sum(seen.values()) < 5 * 500:
        seen.update(next(batches)[1])
    assert set(seen) == set(made.indices.tolist())
    assert max(seen.values()) - min(seen.values()) <= 1


def test_samples_carried_from_window_to_window_come_in_the_same_epoch(monkeypatch):
    monkeypatch.setattr("vreflection.data.packing.WINDOW", 64)
    lengths = public_lengths(500)
    made = plan(budget=16384, lengths=lengths)
    epochs = {}
    for epoch, batch in made.batches():
        if epoch > 3:
            break
        epochs.setdefault(epoch, []).extend(batch)
    assert all(sorted(samples) == made.indices.tolist() for samples in epochs.values())
    assert packing_report(made).packed > 0.93


def test_shuffles_differ_by_epoch_and_seed_and_repeat_with_the_same_seed():
    first = [batch for _, batch in islice(plan(batch_size=500).batches(), 2)]
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])
    again = [batch for _, batch in islice(plan(batch_size=500).batches(), 2)]
    other = [batch for _, batch in islice(plan(batch_size=500, seed=4).batches(), 2)]
    assert first == again and first != other


@pytest.mark.parametrize("packed", [False, True])
def test_without_shuffling_every_epoch_is_in_file_order(packed):
    lengths = public_lengths(500) if packed else None
    made = plan(budget=8192 if packed else None, lengths=lengths, batch_size=7, shuffle=False)
    stream = []
    for _, batch in made.batches():
        if len(stream) >= 1200:
            break
        stream += batch
    assert stream[:1000] == made.indices.tolist() * 2
    other = plan(budget=8192 if packed else None, lengths=lengths, batch_size=7, shuffle=False, seed=4)
    assert [batch for _, batch in islice(made.batches(), 90)] == [batch for _, batch in islice(other.batches(), 90)]
    if packed:
        epochs = [epoch for epoch, _ in islice(made.batches(), 200)]
        assert epochs == sorted(epochs) and packing_report(made).packed > 0.75


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_share_each_step_however_it_is_split(packed, shuffle):
    lengths = public_lengths(500) if packed else None
    made = plan(budget=8192 if packed else None, lengths=lengths, batch_size=3, shuffle=shuffle)
    whole = list(RankBatches(made, 24))

    def step(ranks, accumulation, number):
        batches = [list(r)[number * accumulation : (number + 1) * accumulation] for r in ranks]
        return sorted(sample for rank in batches for batch in rank for sample in batch)

    pair = [RankBatches(made, 12, rank, 2) for rank in range(2)]
    quad = [RankBatches(made, 6, rank, 4) for rank in range(4)]
    for number in range(6):
        expected = sorted(sample for batch in whole[4 * number : 4 * number + 4] for sample in batch)
        assert step(pair, 2, number) == step(quad, 1, number) == expected


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [(public_lengths(20000), 16384), (np.full(1024, 108), 16384), (np.full(1024, 98), 4096)],
    ids=["public", "quickstart", "quickstart, small budget"],
)
def test_packs_are_at_least_95_percent_full(lengths, budget):
    report = packing_report(BatchPlan(np.arange(len(lengths)), 0, budget=budget, lengths=lengths))
    assert report.packed >= 0.95
    assert report.padded < report.packed or (lengths == lengths[0]).all()
    assert f"{report.packed:.1%}" in report.summary()


def test_a_budget_below_the_longest_sample_is_refused_with_its_length():
    with pytest.raises(ConfigError, match="at least the longest sample, 900 tokens, got 512"):
        BatchPlan(np.arange(2), 0, budget=512, lengths=np.array([100, 900]))
    with pytest.raises(ConfigError, match="no.*|at least one usable sample"):
        BatchPlan(np.arange(0), 0)
