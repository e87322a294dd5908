"""Every way a batch can disagree with itself is refused before the step, naming the sample and the numbers."""

import numpy as np
import pytest
import torch

from vreflection.model.config import VReflectionConfig
from vreflection.model.layout import BatchLayout

BOX = ((0.1, 0.1, 0.9, 0.9), 0)


@pytest.fixture
def config(tiny):
    return lambda stage: VReflectionConfig.from_base_config(tiny.host_config(), stage, **tiny.LATENT_SETTINGS)


@pytest.fixture
def rows(tiny):
    return [tiny.row([(2, 3)], [BOX]), tiny.row(), tiny.row([(1, 2), (2, 2)], [BOX, ((0, 0, 1, 1), 1)])]


def put(target, values):
    target.copy_(torch.tensor(values))


def build(config, batch, **changes):
    names = ("input_ids", "labels", "image_grid_thw", "boxes", "box_sample", "box_image", "cu_seqlens")
    return BatchLayout.from_batch(config, **{k: v for k, v in (batch | changes).items() if k in names})


def test_everything_is_where_it_is(tiny, config, rows):
    batch = tiny.batch(rows)
    layout = build(config("stage1"), batch)
    flat = batch["input_ids"].flatten()
    assert flat[layout.image_index_T].tolist() == [tiny.IMAGE] * 12
    assert layout.slot_index_BQ.shape == (3, tiny.SLOTS)
    assert (flat[layout.slot_index_BQ] == tiny.LVR).all()
    assert (flat[layout.slot_index_BQ[:, 0] - 1] == tiny.LVR_START).all()
    assert (layout.slot_index_BQ[:, 0] // batch["input_ids"].shape[1]).tolist() == [0, 2, 2]
    assert torch.equal(flat[layout.supervised_index_S + 1], layout.targets_S)
    assert layout.grids.tolist() == [[2, 3], [1, 2], [2, 2]] and layout.box_image.tolist() == [0, 1, 2]


def test_the_first_token_of_a_sequence_is_never_a_target(tiny, config):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    separate = build(config("sft"), {"input_ids": ids, "labels": ids})
    assert separate.targets_S.tolist() == [6, 7, 9, 10] and separate.supervised_index_S.tolist() == [0, 1, 3, 4]
    packed = {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "cu_seqlens": torch.tensor([0, 3, 6])}
    again = build(config("sft"), packed)
    assert again.targets_S.tolist() == [6, 7, 9, 10] and again.supervised_index_S.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: put(b["image_grid_thw"][1], [2, 2, 4]), "expected still images with t = 1"),
        (lambda b: put(b["image_grid_thw"][1], [1, 2, 6]), r"12 image tokens in input_ids, .* need 13"),
        (lambda b: b.pop("image_grid_thw"), "12 image tokens in input_ids"),
        (lambda b: b["input_ids"][0, 15].fill_(5), "multiple of .* = 3, got 8"),
        (lambda b: put(b["box_sample"], [0, 0, 2]), "sample 0: 1 spans, 2 boxes, sample 2: 2 spans, 1 box"),
        (lambda b: put(b["box_sample"], [0, 2, 3]), r"box_sample: expected values in \[0, 3\), got \[0, 2, 3\]"),
        (lambda b: put(b["box_sample"], [0, 2, -1]), r"box_sample: expected values in \[0, 3\), got \[0, 2, -1\]"),
        (lambda b: put(b["box_sample"], [2, 0, 2]), r"in the order of their samples, got \[2, 0, 2\]"),
        (lambda b: b.update(boxes=b["boxes"][:, :3]), r"boxes: expected shape \(n, 4\), got \(3, 3\)"),
        (lambda b: b.update(boxes=b["boxes"][:2]), "2 boxes, 3 .*box_sample.*, 3 .*box_image"),
        (lambda b: b.update(box_image=b["box_image"][:1]), "3 boxes, 3 .*box_sample.*, 1 .*box_image"),
        (lambda b: put(b["box_image"], [0, 1, 3]), r"box_image: expected values in \[0, 3\), got \[0, 1, 3\]"),
        (lambda b: put(b["box_image"], [0, 1, 0]), "box 2 of sample 2 .* image 0, .* sample 0"),
        (lambda b: b.update(labels=b["labels"][:2]), "labels: expected the shape of input_ids"),
        (lambda b: b.update(labels=b["labels"][:, :4]), r"labels: expected shape"),
    ],
)  # fmt: skip
def test_disagreements_are_refused(tiny, config, rows, change, message):
    batch = tiny.batch(rows)
    change(batch)
    with pytest.raises(ValueError, match=message):
        build(config("stage1"), batch)


def test_spans_that_are_cut_or_of_another_length(tiny, config):
    for ids in (
        [1, tiny.LVR, tiny.LVR, tiny.LVR, 2],  # no start
        [tiny.LVR_START, tiny.LVR, tiny.LVR, 7, tiny.LVR],  # interrupted
        [tiny.LVR, tiny.LVR, tiny.LVR, 2, tiny.LVR_START],  # at the very beginning
    ):
        batch = {"input_ids": torch.tensor([[9, 9, 9, 9, 9], ids])}
        with pytest.raises(ValueError, match=r"latent span in sample 1: expected <\|lvr_start\|> and 3 consecutive"):
            build(config("stage1"), batch)
    # Cut at the end of one row and continued at the start of the next: two broken spans, not one whole.
    ids = torch.tensor([[9, 9, tiny.LVR_START, tiny.LVR], [tiny.LVR, tiny.LVR, 5, 6]])
    with pytest.raises(ValueError, match="latent span in sample 0"):
        build(config("stage1"), {"input_ids": ids})
    with pytest.raises(ValueError, match="latent span in sample 1"):
        build(config("filler"), {"input_ids": torch.tensor([[9] * 4, [1, tiny.LVR, tiny.LVR, tiny.LVR]])})


def test_broken_spans_in_a_packed_row_name_the_packed_sample(tiny, config):
    ids = [9, 9, 9, 1, tiny.LVR, tiny.LVR, tiny.LVR, 2]
    with pytest.raises(ValueError, match="latent span in sample 1"):
        build(config("stage1"), {"input_ids": torch.tensor([ids]), "cu_seqlens": torch.tensor([0, 3, 8])})


@pytest.mark.parametrize("bounds", [[0, 4], [1, 6], [0, 3, 3, 6], [0, 5, 3, 6], [6]])
def test_packed_bounds(config, bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected ascending bounds from 0 to 6"):
        build(config("sft"), {"input_ids": torch.zeros(1, 6, dtype=torch.long), "cu_seqlens": torch.tensor(bounds)})
    with pytest.raises(ValueError, match="cu_seqlens"):
        build(config("sft"), {"input_ids": torch.zeros(2, 6, dtype=torch.long), "cu_seqlens": torch.tensor([0, 6])})


def test_stages_without_latents_ignore_spans_and_boxes(tiny, config, rows):
    batch = tiny.batch(rows)
    for stage in ("sft", "boundary", "base"):
        assert build(config(stage), batch).slot_index_BQ.numel() == 0
    assert build(
        config("filler"), {**batch, "boxes": None, "box_sample": None, "box_image": None}
    ).slot_index_BQ.shape == (3, 3)


def test_forward_refuses_what_it_would_silently_ignore(tiny, rows):
    model = tiny.model("stage1")
    batch = tiny.batch(rows)
    with pytest.raises(ValueError, match="got 0 boxes, 3 values of box_sample"):
        model(**{k: v for k, v in batch.items() if k not in ("boxes", "box_image")})
    with pytest.raises(ValueError, match="image_grid_thw without pixel_values or image_features"):
        model(**{k: v for k, v in batch.items() if k != "pixel_values"})
    features = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    cached = {k: v for k, v in batch.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="image_features: expected 12 visual tokens .*, got 11"):
        model(**cached, image_features=features[:-1])


def test_host_arrays_and_tensors_alike(tiny, config, rows):
    batch = tiny.batch(rows)
    plain = {**batch, "boxes": batch["boxes"].tolist(), "box_sample": np.array([0, 2, 2]), "box_image": [0, 1, 2]}
    a, b = build(config("stage1"), batch), build(config("stage1"), plain)
    assert torch.equal(a.slot_index_BQ, b.slot_index_BQ) and (a.boxes == b.boxes).all()
