import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.data.boxes import box_to_token_indices
from vreflection.data.encode import IGNORE_INDEX, LatentDataset, encode_prompt, encode_sample
from vreflection.data.template import Turn
from vreflection.data.visual_cot import Sample
from vreflection.errors import DataError


@pytest.fixture
def sample(image_folder):
    return Sample(
        question_id="1",
        dataset="notes",
        image_paths=(str(image_folder / "notes/a.png"), str(image_folder / "notes/b.png")),
        conversations=(
            Turn("user", "Look\n<image>\nand <image> now"),
            Turn("assistant", "I see <lvr>\nred"),
            Turn("user", "And?"),
            Turn("assistant", "<lvr>\nblue"),
        ),
        boxes=np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]),
        box_images=np.array([1, 0]),
        source="rows.json:4",
    )


def text_of(processor, ids):
    return processor.decode(ids, skip_special_tokens=False)


def test_ids_labels_and_types_of_a_sample(processor, sample):
    encoded = encode_sample(sample, processor, "latent", num_latents=3)
    span = "<|lvr_start|><|lvr|><|lvr|><|lvr|><|lvr_end|>"
    pads = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in (4 * 3, 2 * 5)]
    assert text_of(processor, encoded.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nLook{pads[0]}and {pads[1]} now<|im_end|>\n"
        f"<|im_start|>assistant\nI see {span}\nred<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        f"<|im_start|>assistant\n{span}\nblue<|im_end|>\n"
    )
    supervised = encoded.labels != IGNORE_INDEX
    assert torch.equal(encoded.labels[supervised], encoded.input_ids[supervised])
    assert text_of(processor, encoded.labels[supervised]) == f"I see {span}\nred<|im_end|>\n{span}\nblue<|im_end|>\n"
    assert torch.equal(encoded.mm_token_type_ids, (encoded.input_ids == processor.token_ids.image).long())
    assert encoded.image_grid_thw.tolist() == [[1, 8, 6], [1, 4, 10]]
    assert encoded.pixel_values.shape == (8 * 6 + 4 * 10, 3 * 2 * 14 * 14) and encoded.image_features is None
    assert encoded.position_ids.shape == (3, len(encoded.input_ids)) and encoded.position_ids.dtype == torch.int64
    assert encoded.boxes.dtype == torch.float64 and encoded.boxes.tolist() == sample.boxes.tolist()
    assert encoded.box_images.tolist() == [1, 0] and encoded.source == "rows.json:4"
    tokens = box_to_token_indices(encoded.boxes[0], encoded.image_grid_thw[1].tolist())
    assert tokens == [0, 1, 2]


def test_slots_are_labelled_so_that_the_objective_decides(processor, sample):
    encoded = encode_sample(sample, processor, "latent")
    slots = encoded.input_ids == processor.token_ids.lvr
    assert int(slots.sum()) == 16
    assert torch.equal(encoded.labels[slots], encoded.input_ids[slots])


@pytest.mark.parametrize("style, answer", [("boundary", "<|lvr_start|><|lvr_end|>\nblue"), ("none", "blue")])
def test_styles_without_slots_carry_no_boxes(processor, sample, style, answer):
    encoded = encode_sample(sample, processor, style)
    assert text_of(processor, encoded.input_ids).endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    assert encoded.boxes.shape == (0, 4) and encoded.box_images.shape == (0,)
    filler = encode_sample(sample, processor, "filler")
    assert torch.equal(filler.input_ids, encode_sample(sample, processor, "latent").input_ids)
    assert len(filler.boxes) == 2


def test_a_sample_is_kept_whole_or_refused(processor, sample):
    length = len(encode_sample(sample, processor, "latent").input_ids)
    assert len(encode_sample(sample, processor, "latent", max_length=length).input_ids) == length
    message = f"rows.json:4: expected at most {length - 1} tokens, got {length}; raise max_length"
    with pytest.raises(DataError, match=message) as caught:
        encode_sample(sample, processor, "latent", max_length=length - 1)
    assert caught.value.reason == "too-long"


@pytest.mark.parametrize(
    "changes, reason, message",
    [
        ({"boxes": np.zeros((0, 4))}, "box-count", r"expected one box per <lvr> \(2\), got 0 boxes; fix"),
        ({"boxes": np.array([[0, 0, 1, 1], [0, 0, 0, 1]])}, "box-empty", "expected a box with an area .* got box 1"),
        ({"box_images": np.array([0, 2])}, "box-images", r"expected 2 image indices below 2, got \[0, 2\]; fix"),
        ({"box_images": np.array([0])}, "box-images", r"expected 2 image indices below 2, got \[0\]; fix"),
        ({"image_paths": ("none.png", "none.png")}, "image-missing", "expected an image file at none.png, got"),
        (
            {"conversations": (Turn("user", "<image><image><image>"), Turn("assistant", "<lvr><lvr>"))},
            "image-count",
            r"expected one image per <image> \(3\), got 2; fix",
        ),
        ({"conversations": (Turn("user", "<image><image>"),)}, "conversation-order", r"got \['user'\]"),
        (
            {"conversations": (Turn("user", "<image><image><|image_pad|>"), Turn("assistant", "<lvr><lvr>"))},
            "reserved-token",
            "image_pad",
        ),
    ],
)
def test_unusable_samples_name_their_row(processor, sample, changes, reason, message):
    with pytest.raises(DataError, match=message) as caught:
        encode_sample(dataclasses.replace(sample, **changes), processor, "latent")
    assert caught.value.reason == reason and caught.value.source == "rows.json:4"
    assert str(caught.value).startswith("rows.json:4: ")


def test_unknown_slot_style(processor, sample):
    with pytest.raises(ValueError, match="expected slot_style"):
        encode_sample(sample, processor, "latents")


def cache_of(sample):
    generator = torch.Generator().manual_seed(0)
    grids = [torch.tensor([1, 8, 6]), [1, 4, 10]]
    counts = [12, 10]
    return {
        path: (torch.randn(count, 5, generator=generator), grid)
        for path, count, grid in zip(sample.image_paths, counts, grids)
    }


def test_dataset_equals_encoding_and_cache_replaces_the_files(processor, sample):
    plain = LatentDataset([sample], processor)
    assert len(plain) == 1
    cache = cache_of(sample)
    cached = LatentDataset([sample], processor, feature_cache=cache)
    for path in sample.image_paths:
        Image.open(path).close()
    reference = plain[0]
    for path in sample.image_paths:
        with open(path, "w"):
            pass
    with pytest.raises(DataError, match="0 bytes"):
        plain[0]
    encoded = cached[0]
    assert encoded.pixel_values is None
    assert torch.equal(encoded.image_features, torch.cat([tokens for tokens, _ in cache.values()]))
    for name in ("input_ids", "labels", "mm_token_type_ids", "position_ids", "boxes", "box_images", "image_grid_thw"):
        assert torch.equal(getattr(encoded, name), getattr(reference, name)), name


def test_dataset_passes_its_options_on(processor, sample):
    encoded = LatentDataset([sample], processor, "latent", num_latents=2)[0]
    assert int((encoded.input_ids == processor.token_ids.lvr).sum()) == 4
    with pytest.raises(DataError, match="expected at most 20 tokens"):
        LatentDataset([sample], processor, max_length=20)[0]
    with pytest.raises(ValueError, match="expected slot_style"):
        LatentDataset([sample], processor, "x")


@pytest.fixture
def five(processor, sample, tmp_path):
    """Five samples, the last three with an image of their own."""
    samples = [sample, sample]
    for number in range(2, 5):
        own = tmp_path / f"{number}.png"
        Image.new("RGB", (56, 56)).save(own)
        samples.append(dataclasses.replace(sample, image_paths=(str(own), sample.image_paths[1]), source=f"r:{number}"))
    return LatentDataset(samples, processor, skip_unusable=True)


def test_only_samples_that_are_trained_on_stand_in(five, tmp_path):
    (tmp_path / "3.png").write_bytes(b"")
    assert [s.source for s in five.__getitems__([3])] == ["r:4"]
    five.stand_ins = np.array([1, 2, 3])
    five.samples[1:2] = [dataclasses.replace(five.samples[1], source="r:1")]
    assert [s.source for s in five.__getitems__([3])] == ["r:1"]
    five.stand_ins = np.array([3])
    with pytest.raises(DataError, match="none of the 1 samples is usable"):
        five.__getitems__([3])


@pytest.mark.parametrize("skip", [False, True])
def test_a_data_file_that_cannot_be_used_is_no_dropped_row(processor, sample, skip):
    class Changed(list):
        def __getitem__(self, index):
            raise DataError("file-changed", "expected the file that was opened", "rows.json")

    dataset = LatentDataset(Changed([sample]), processor, skip_unusable=skip)
    with pytest.raises(DataError, match="the file that was opened"):
        dataset.__getitems__([0])
    assert not dataset.dropped


def test_cache_errors_name_the_row(processor, sample):
    cache = cache_of(sample)
    missing = dict(list(cache.items())[:1])
    with pytest.raises(DataError, match=r"rows.json:4: expected features of .*b.png .* got none; rebuild") as caught:
        LatentDataset([sample], processor, feature_cache=missing)[0]
    assert caught.value.reason == "feature-missing"
    tokens, grid = cache[sample.image_paths[0]]
    cache[sample.image_paths[0]] = (tokens[:-1], grid)
    with pytest.raises(DataError, match=r"rows.json:4: expected \(12, D\) cached .* got \(11, 5\); rebuild") as caught:
        LatentDataset([sample], processor, feature_cache=cache)[0]
    assert caught.value.reason == "feature-shape"


def test_prompt_is_the_head_of_the_training_sample(processor, sample):
    encoded = encode_sample(sample, processor, "latent")
    prompt = encode_prompt(sample.conversations[0].text, processor, sample.image_paths)
    length = len(prompt.input_ids)
    assert torch.equal(prompt.input_ids, encoded.input_ids[:length])
    assert torch.equal(prompt.position_ids, encoded.position_ids[:, :length])
    assert torch.equal(prompt.pixel_values, encoded.pixel_values)
    assert (prompt.labels == IGNORE_INDEX).all() and (encoded.labels[:length] == IGNORE_INDEX).all()
    assert encoded.labels[length] != IGNORE_INDEX


def test_prompt_placeholders(processor):
    image = Image.new("RGB", (56, 56))
    implicit = encode_prompt("What?", processor, [image])
    explicit = encode_prompt("<image>\nWhat?", processor, [image])
    assert torch.equal(implicit.input_ids, explicit.input_ids)
    text_only = encode_prompt("What?", processor)
    assert text_only.pixel_values is None and text_only.image_grid_thw.shape == (0, 3)
    assert text_only.position_ids.tolist() == [list(range(len(text_only.input_ids)))] * 3
    with pytest.raises(DataError, match=r"prompt: expected one image per <image> \(2\), got 1"):
        encode_prompt("<image><image>", processor, [image])
    with pytest.raises(DataError, match="prompt: expected plain text"):
        encode_prompt("<|lvr|>", processor)
    with pytest.raises(DataError, match="endoftext"):  # the tokenizer's own, which the template does not use
        encode_prompt("<|endoftext|>", processor)
    with pytest.raises(DataError, match="expected whole characters, got '.udcff' at character 3"):
        encode_prompt("ok \udcff", processor)
    with pytest.raises(DataError, match="expected at most 5 tokens"):
        encode_prompt("What?", processor, max_length=5)
    tokens = torch.zeros(4, 7)
    assert encode_prompt("What?", processor, image_tokens=[(tokens, [1, 4, 4])]).image_features is not None


@pytest.fixture
def photo(tmp_path):
    """A photo of 84 x 112 px that lies on its side in the file; its bytes, and the upright picture."""
    pixels = np.random.default_rng(5).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=tags)
    return path, Image.fromarray(np.rot90(pixels, -1))


def test_prompts_take_photos_as_a_viewer_shows_them(processor, photo):
    path, upright = photo
    right = encode_prompt("What?", processor, [upright])
    assert right.image_grid_thw.tolist() == [[1, 8, 6]]
    with Image.open(path) as opened:
        loaded = opened.copy()
        for image in (path, str(path), path.read_bytes(), opened, loaded, loaded.convert("RGB")):
            assert torch.equal(encode_prompt("What?", processor, [image]).pixel_values, right.pixel_values)
            batch = processor(image, "What?")
            assert torch.equal(batch["pixel_values"], right.pixel_values)
    stored = encode_prompt("What?", processor, [path], image_view="stored")
    assert stored.image_grid_thw.tolist() == [[1, 6, 8]]
    with Image.open(path) as opened:
        again = encode_prompt("What?", processor, [opened], image_view="stored")
        assert torch.equal(again.pixel_values, stored.pixel_values)
    with pytest.raises(DataError, match="expected JPEG, PNG, .* at image 1, got PDF; convert it"):
        encode_prompt("What?", processor, [path, b"%PDF-1.7"])


def test_samples_are_read_in_the_view_of_their_boxes(processor, sample, photo):
    path, upright = photo
    sample = dataclasses.replace(sample, image_paths=(str(path), sample.image_paths[1]))
    assert encode_sample(sample, processor, "latent").image_grid_thw[0].tolist() == [1, 6, 8]
    shown = encode_sample(dataclasses.replace(sample, image_view="shown"), processor, "latent")
    assert shown.image_grid_thw[0].tolist() == [1, 8, 6]
    assert torch.equal(shown.pixel_values[:48], processor.process_images([upright])["pixel_values"])
