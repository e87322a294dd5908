"""Prompts on their way into the cache: what is shared, what goes through the model together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vreflection as vr
from vreflection.engine import prefill
from vreflection.engine.cache import cache_argument
from vreflection.engine.prefill import Filling, forward_groups, pad_right, plan_sharing, signature
from vreflection.engine.requests import PIECE, Prompt, digest


def filling(row, marks, start=0):
    return Filling(row, Prompt(torch.zeros(len(marks), dtype=torch.long)), np.asarray(marks)[None], start)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    starts=st.lists(st.sampled_from([0, 0, 5]), min_size=12, max_size=12),
    limit=st.integers(1, 200),
)
def test_groups_are_whole_bounded_and_waste_little(lengths, starts, limit):
    fillings = [filling(n, [7] * (start + length), start) for n, (length, start) in enumerate(zip(lengths, starts))]
    groups = forward_groups(fillings, limit)
    assert sorted(f.row for group in groups for f in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [len(f.prompt) - f.start for f in group]
        assert len({f.start for f in group}) == 1
        assert len(group) == 1 or (max(sizes) * len(group) <= limit and 2 * min(sizes) >= max(sizes))


# Few different numbers, so that beginnings agree often and to any length.
marks = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=8)


@given(old=st.lists(marks, max_size=4), new=st.lists(marks, min_size=1, max_size=5), data=st.data())
def test_whatever_is_copied_is_there_and_right(old, new, data):
    """Simulated: after all waves every row holds its own prompt, though rows are refilled and copied from."""
    rows = data.draw(st.permutations(range(6)))[: len(new)]
    content = {row: list(m) for row, m in enumerate(old)}
    held = {row: np.asarray(m)[None] for row, m in content.items() if row not in rows}
    replaced = {row: np.asarray(m)[None] for row, m in content.items() if row in rows}
    shortest, prefill.SHORTEST_SHARED = prefill.SHORTEST_SHARED, 2
    try:
        waves = plan_sharing([filling(row, m) for row, m in zip(rows, new)], held, replaced)
    finally:
        prefill.SHORTEST_SHARED = shortest
    filled = set()
    for wave in waves:
        for f in wave:  # all copies of a wave come first
            if f.donor not in (None, f.row):
                assert f.donor not in rows or f.donor in filled
                content[f.row] = content[f.donor][: f.start]
            assert f.start < len(f.prompt)
            assert content.get(f.row, [])[: f.start] == list(f.marks[0, : f.start])
        for f in wave:
            content[f.row] = list(f.marks[0])
            filled.add(f.row)
    assert all(content[row] == m for row, m in zip(rows, new))


def test_only_equal_images_look_alike():
    ids = torch.tensor([1, 9, 9, 9, 9, 2])
    grid = torch.tensor([[1, 4, 4]])
    image = torch.randn(16, 6)
    made = [
        signature(Prompt(ids, image_grid_thw=grid, pixel_values=pixels, image_keys=keys), 9, 2)[0]
        for pixels, keys in (
            (image, None), (image.clone(), None), (image + 1e-6, None), (image, ("a",)), (image + 1, ("a",)),
        )
    ]  # fmt: skip
    assert (made[0] == made[1]).all() and (made[3] == made[4]).all()
    assert (made[0] != made[2]).tolist() == [False, True, True, True, True, False]
    # A visual token's place in its image counts, and no mark is an id.
    assert len(set(made[0][1:5].tolist())) == 4 and (made[0][1:5] < 0).all()
    assert signature(Prompt(ids, embeds=torch.zeros(6, 4)), 9, 2) is None


def test_padding_a_prompt_was_given_with_is_dropped():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        "position_ids": torch.arange(12).view(3, 1, 4),
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1]]),
        "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
    }
    prompt = Prompt.of(batch)
    assert prompt.input_ids.tolist() == [5, 6] and prompt.mm_token_type_ids.tolist() == [0, 1]
    assert prompt.position_ids.tolist() == [[2, 3], [6, 7], [10, 11]] and prompt.image_grid_thw is None


def test_pad_right():
    padded = pad_right([torch.ones(2, 3), torch.ones(2, 5)], 1)
    assert padded.shape == (2, 2, 5) and not padded[0, :, 3:].any() and padded[1].all()


@pytest.mark.parametrize("positions", [1, 30, 10_000])
def test_how_prompts_are_grouped_changes_nothing(lab, monkeypatch, positions):
    model = lab.lively()
    prompts = [lab.prompt(n) for n in range(lab.count)]
    expected = [lab.alone(model, p, max_new_tokens=6).tokens for p in prompts]
    monkeypatch.setattr(prefill, "PREFILL_POSITIONS", positions)
    decoder = vr.LatentDecoder(model, max_batch_size=6, max_length=128)
    assert [a.tokens for a in decoder.generate(prompts, max_new_tokens=6)] == expected


def test_a_prefill_that_fails_blocks_nobody(lab, monkeypatch):
    """Nothing of it stays, the decoder goes on."""
    model = lab.lively()
    decoder = vr.LatentDecoder(model, max_batch_size=3, max_length=128)
    prompts = [lab.prompt(n) for n in range(3)]
    expected = [lab.alone(model, prompt, max_new_tokens=6).tokens for prompt in prompts]
    with monkeypatch.context() as broken:
        broken.setattr(decoder.step, "prefill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.generate(prompts, max_new_tokens=3)
    assert not decoder.busy
    assert [a.tokens for a in decoder.generate(prompts, max_new_tokens=6)] == expected


def test_the_cache_goes_in_under_the_hosts_own_name():
    class Older:
        def forward(self, inputs_embeds, past_key_values=None): ...

    class Newer:
        def forward(self, inputs_embeds, cache=None): ...

    assert (cache_argument(Older), cache_argument(Newer)) == ("past_key_values", "cache")


def test_an_image_is_known_by_all_of_its_pieces():
    """Larger than one piece, and not a whole number of them: every piece and the order count, and the grid."""
    values, grid = torch.arange(2 * PIECE // 4 + 100, dtype=torch.float32)[:, None], torch.tensor([1, 2, 2])
    name = digest(values, grid)
    assert digest(values.clone(), grid) == name
    for place in (0, PIECE // 4 + 5, len(values) - 1):
        changed = values.clone()
        changed[place] += 1
        assert digest(changed, grid) != name, place
    half = PIECE // 4
    swapped = torch.cat([values[half : 2 * half], values[:half], values[2 * half :]])
    assert digest(swapped, grid) != name and digest(values, torch.tensor([1, 4, 1])) != name
