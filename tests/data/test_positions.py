import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vreflection.data.positions import mrope_positions
from vreflection.errors import DataError

IMAGE, START, END = 60, 61, 62


@pytest.fixture(scope="module")
def host():
    """The host model's own bookkeeping, on the smallest model it accepts."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, **heads, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLModel(config)


def sequence(layout):
    """Ids of a layout: an int is that many text tokens, a tuple an image of h x w visual tokens."""
    ids, grids = [], []
    for part in layout:
        if isinstance(part, tuple):
            ids += [START] + [IMAGE] * (part[0] * part[1]) + [END]
            grids.append([1, 2 * part[0], 2 * part[1]])
        else:
            ids += list(range(1, part + 1))
    return ids, grids


def host_positions(host, ids, grids):
    input_ids = torch.tensor([ids])
    positions, _ = host.get_rope_index(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.ones_like(input_ids),
    )
    return positions[:, 0].numpy()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 7), st.integers(1, 7))), min_size=1, max_size=7))
def test_equal_to_the_host_model(host, layout):
    ids, grids = sequence(layout)
    positions = mrope_positions(ids, IMAGE, grids, 2)
    assert positions.dtype == np.int64 and positions.shape == (3, len(ids))
    np.testing.assert_array_equal(positions, host_positions(host, ids, grids))


def test_by_hand():
    ids, grids = sequence([2, (2, 3), 1])
    assert mrope_positions(ids, IMAGE, grids, 2).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]


def test_images_that_touch_are_told_apart_by_their_grids():
    positions = mrope_positions([IMAGE] * 5, IMAGE, [[1, 2, 4], [1, 6, 2]], 2)
    assert positions.tolist() == [[0, 0, 2, 2, 2], [0, 0, 2, 3, 4], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    "ids, grids",
    [
        ([1, IMAGE, IMAGE], [[1, 2, 2]]),
        ([1, IMAGE, IMAGE], []),
        ([1, 2], [[1, 2, 2]]),
        ([IMAGE, 1, IMAGE], [[1, 2, 4]]),
        ([IMAGE, IMAGE], [[2, 2, 2]]),
    ],
)
def test_tokens_that_do_not_fit_the_grids(ids, grids):
    with pytest.raises(
        DataError, match="expected one block of .* got .* image tokens .*; encode text and images"
    ) as caught:
        mrope_positions(ids, IMAGE, grids, 2)
    assert caught.value.reason == "image-tokens"
