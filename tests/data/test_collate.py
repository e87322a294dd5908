import dataclasses

import pytest
import torch

from vreflection.data.collate import Collator
from vreflection.data.encode import EncodedSample
from vreflection.errors import DataError


def encoded(length, grids, box_images=(), features=False, first=10):
    ids = torch.arange(first, first + length)
    total = sum(h * w for _, h, w in grids)
    pixels = torch.arange(total * 6, dtype=torch.float32).reshape(total, 6) + first if grids and not features else None
    tokens = torch.full((total // 4, 3), float(first)) if grids and features else None
    return EncodedSample(
        input_ids=ids,
        labels=ids + 1000,
        mm_token_type_ids=ids % 2,
        position_ids=torch.stack([ids, ids + 1, ids + 2]),
        boxes=torch.rand(len(box_images), 4, dtype=torch.float64),
        box_images=torch.tensor(box_images, dtype=torch.int64),
        image_grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        pixel_values=pixels,
        image_features=tokens,
        source=f"f.json:{first}",
    )


@pytest.fixture
def samples():
    return [
        encoded(3, [[1, 2, 4]], [0, 0]),
        encoded(5, [], first=30),
        encoded(2, [[1, 2, 2], [1, 4, 2]], [1, 0], first=50),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_on_the_chosen_side(samples, side):
    batch = Collator(7, side)(samples)
    assert batch["input_ids"].shape == (3, 5) and batch["position_ids"].shape == (3, 3, 5)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        inside = slice(5 - length, 5) if side == "left" else slice(0, length)
        padding = torch.ones(5, dtype=torch.bool)
        padding[inside] = False
        assert torch.equal(batch["attention_mask"][row], (~padding).long())
        for name, fill in (("input_ids", 7), ("labels", -100), ("mm_token_type_ids", 0)):
            assert batch[name].dtype == torch.int64
            assert torch.equal(batch[name][row, inside], getattr(sample, name))
            assert (batch[name][row, padding] == fill).all()
        assert torch.equal(batch["position_ids"][:, row, inside], sample.position_ids)
        assert (batch["position_ids"][:, row, padding] == 0).all()


def test_boxes_know_their_row_and_packed_image(samples):
    batch = Collator(7)(samples)
    assert batch["boxes"].dtype == torch.float64
    assert torch.equal(batch["boxes"], torch.cat([s.boxes for s in samples]))
    assert batch["box_sample"].tolist() == [0, 0, 2, 2]
    assert batch["box_image"].tolist() == [0, 0, 2, 1]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 4, 2]]
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0].pixel_values, samples[2].pixel_values]))
    assert "image_features" not in batch and "sources" not in batch


def test_features_are_packed_instead_of_pixels():
    batch = Collator(7)([encoded(3, [[1, 2, 4]], features=True), encoded(3, [[1, 4, 4]], features=True, first=40)])
    assert batch["image_features"].shape == (2 + 4, 3) and "pixel_values" not in batch
    assert batch["image_features"][:, 0].tolist() == [10, 10, 40, 40, 40, 40]


def test_text_only_batch_and_sources():
    batch = Collator(7, keep_sources=True)([encoded(3, []), encoded(4, [], first=20)])
    assert batch["image_grid_thw"].shape == (0, 3) and "pixel_values" not in batch and "image_features" not in batch
    assert batch["boxes"].shape == (0, 4) and batch["box_sample"].shape == batch["box_image"].shape == (0,)
    assert batch["box_sample"].dtype == batch["box_image"].dtype == torch.int64
    assert batch["sources"] == ["f.json:10", "f.json:20"]


def test_pixels_and_features_do_not_mix():
    mixed = [encoded(3, [[1, 2, 4]]), encoded(3, [[1, 2, 4]], features=True)]
    with pytest.raises(
        DataError, match="f.json:10: expected all .* got 1 with pixels and 1 with features; build"
    ) as caught:
        Collator(7)(mixed)
    assert caught.value.reason == "mixed-images"


def test_wrong_use():
    with pytest.raises(ValueError, match="expected padding_side 'right' or 'left', got 'both'"):
        Collator(7, "both")
    with pytest.raises(ValueError, match="at least one sample"):
        Collator(7)([])


def test_samples_are_left_as_they_were(samples):
    before = [dataclasses.replace(s, box_images=s.box_images.clone()) for s in samples]
    Collator(7)(samples)
    for old, new in zip(before, samples):
        assert torch.equal(old.box_images, new.box_images)
