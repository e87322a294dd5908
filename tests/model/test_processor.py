import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.data.template import LATENT_TOKENS
from vreflection.errors import CheckpointError, DataError
from vreflection.model.image_settings import pil_image_processor_class
from vreflection.model.processor import VReflectionProcessor

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SIZE = {"shortest_edge": 4 * 784, "longest_edge": 24 * 784}


def tokenizer(special_tokens=QWEN_TOKENS, pad_token="<|endoftext|>"):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad_token)


def image_processor(**options):
    return pil_image_processor_class()(size=dict(SIZE), **options)


def noise(w, h, mode="RGB"):
    pixels = np.random.default_rng(w * h).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def processor():
    return VReflectionProcessor(tokenizer(), image_processor())


@pytest.fixture
def checkpoint(processor, tmp_path):
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_latent_tokens_are_added_in_order(processor):
    base = len(tokenizer())
    ids = processor.token_ids
    assert (ids.lvr_start, ids.lvr, ids.lvr_latent_end, ids.lvr_end) == (base, base + 1, base + 2, base + 3)
    assert processor.encode_text("".join(LATENT_TOKENS)) == [base, base + 1, base + 2, base + 3]
    assert [ids.image, ids.video] == processor.encode_text("<|image_pad|><|video_pad|>")
    assert ids.pad == processor.tokenizer.pad_token_id
    assert processor.encode_text("<|im_end|>") == [ids.eos]
    assert processor.decode(processor.encode_text("a<|lvr|>b")) == "ab"
    assert processor.decode(torch.tensor(processor.encode_text("a<|lvr|>b")), skip_special_tokens=False) == "a<|lvr|>b"


def test_existing_latent_tokens_keep_their_ids():
    own = VReflectionProcessor(tokenizer((*LATENT_TOKENS, *QWEN_TOKENS)), image_processor())
    assert own.token_ids.lvr_start == 256
    assert len(own.tokenizer) == 256 + len(LATENT_TOKENS) + len(QWEN_TOKENS)


def test_wrong_tokenizers_are_refused(processor):
    with pytest.raises(CheckpointError, match=r"got one without \['<\|video_pad\|>'\]; use the tokenizer"):
        VReflectionProcessor(tokenizer(QWEN_TOKENS[:-1]), image_processor())
    with pytest.raises(CheckpointError, match="got one without a padding token"):
        VReflectionProcessor(tokenizer(pad_token=None), image_processor())
    with pytest.raises(CheckpointError, match="to agree with the model config .* use the tokenizer saved"):
        VReflectionProcessor(tokenizer((*LATENT_TOKENS, *QWEN_TOKENS)), image_processor(), processor.token_ids)


def test_round_trip_through_a_folder(processor, checkpoint):
    loaded = VReflectionProcessor.from_pretrained(checkpoint, None, None, token_ids=processor.token_ids)
    assert loaded.token_ids == processor.token_ids
    assert loaded.visual_token_limits == processor.visual_token_limits == (4, 24)
    batch = processor([noise(100, 60)], ["What?"])
    again = loaded([noise(100, 60)], ["What?"])
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_visual_token_limits(checkpoint):
    assert VReflectionProcessor.from_pretrained(checkpoint).visual_token_limits == (4, 24)
    assert VReflectionProcessor.from_pretrained(checkpoint, 128, 5120).visual_token_limits == (128, 5120)
    assert VReflectionProcessor.from_pretrained(checkpoint, None, 30).visual_token_limits == (4, 30)
    assert VReflectionProcessor.from_pretrained(checkpoint, 8, None).visual_token_limits == (8, 24)
    with pytest.raises(ValueError, match="expected 0 < min <= max pixels"):
        VReflectionProcessor.from_pretrained(checkpoint, 25, None)
    with pytest.raises(TypeError, match="unexpected arguments .'min_pixels'.; .*min_visual_tokens"):
        VReflectionProcessor.from_pretrained(checkpoint, min_pixels=3136)
    small = VReflectionProcessor.from_pretrained(checkpoint, 128, 5120).process_images([noise(56, 56)])
    assert small["image_grid_thw"].tolist() == [[1, 24, 24]]  # the smallest square of at least 128 tokens


def test_older_spelling_of_the_limits(checkpoint):
    path = checkpoint / "preprocessor_config.json"
    config = json.loads(path.read_text())
    del config["size"]
    path.write_text(json.dumps({**config, "min_pixels": 6 * 784, "max_pixels": 12 * 784}))
    default = dict(pil_image_processor_class().size)
    assert VReflectionProcessor.from_pretrained(checkpoint).visual_token_limits == (6, 12)
    assert VReflectionProcessor.from_pretrained(checkpoint, 7, 9).visual_token_limits == (7, 9)
    assert dict(pil_image_processor_class().size) == default


def test_incomplete_folders(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected preprocessor_config.json in .*/a, got .*copy the file"):
        VReflectionProcessor.from_pretrained(tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(
        CheckpointError, match=r"expected tokenizer.json .* in .*/checkpoint, got .*--tokenizer-from <folder>"
    ):
        VReflectionProcessor.from_pretrained(checkpoint)


def test_patches_hold_the_pixels_in_merge_order():
    plain = VReflectionProcessor(tokenizer(), image_processor(do_normalize=False))
    image = noise(84, 56)  # 3 x 2 visual tokens, no resize
    features = plain.process_images([image])
    assert features["image_grid_thw"].tolist() == [[1, 4, 6]] and features["image_grid_thw"].dtype == torch.int64
    patches = features["pixel_values"].reshape(
        2, 3, 2, 2, 3, 2, 14, 14
    )  # [h, w, patch row, patch column, C, T, 14, 14]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # [C, 56, 84]
    for row in range(2):
        for column in range(3):
            for patch_row in range(2):
                y, x = 28 * row + 14 * patch_row, 28 * column
                for frame in range(2):
                    patch = patches[row, column, patch_row, 0, :, frame]
                    torch.testing.assert_close(patch, pixels[:, y : y + 14, x : x + 14])


def test_images_of_any_mode_and_bad_sizes(processor):
    for mode in ("L", "RGBA", "CMYK"):
        assert processor.process_images([noise(60, 60, mode)])["pixel_values"].dtype == torch.float32
    with pytest.raises(DataError, match="image 1, got 2x800; crop"):
        processor.process_images([noise(60, 60), noise(2, 800)])
    with pytest.raises(ValueError, match="expected at least one image, got none; leave pixel_values out"):
        processor.process_images([])


def test_prompts_are_left_padded_and_equal_to_single_ones(processor):
    questions = ["What digit?", "<image> or <image>?", "Hi"]
    images = [noise(100, 60), [noise(60, 60), noise(56, 84)], None]
    batch = processor(images, questions, return_position_ids=True)
    rows, length = batch["input_ids"].shape
    assert rows == 3 and set(batch) == {
        "input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "position_ids",
    }  # fmt: skip
    assert (batch["attention_mask"][:, -1] == 1).all()
    for row in range(rows):
        group = images[row] if isinstance(images[row], list) else [images[row]]
        single = processor(None if images[row] is None else [group], [questions[row]], return_position_ids=True)
        count = single["input_ids"].shape[1]
        assert int(batch["attention_mask"][row].sum()) == count
        for key in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(batch[key][row, length - count :], single[key][0])
        assert torch.equal(batch["position_ids"][:, row, length - count :], single["position_ids"][:, 0])
    text = processor.decode(batch["input_ids"][2][batch["attention_mask"][2].bool()], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_call_accepts_single_values_and_paths(processor, tmp_path):
    image = noise(60, 60)
    image.save(tmp_path / "x.png")
    one = processor(image, "What?")
    named = processor(text="What?", images=[image], return_tensors="pt", padding=True)
    assert named.keys() == one.keys() and all(torch.equal(named[key], one[key]) for key in one)
    two, nested = processor([image, image], "What?"), processor([[image, image]], ["What?"])
    assert len(two["image_grid_thw"]) == 2 and torch.equal(two["input_ids"], nested["input_ids"])
    assert processor(image, "What?").to(dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    assert set(one) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert torch.equal(one["pixel_values"], processor(str(tmp_path / "x.png"), "What?")["pixel_values"])
    assert set(processor(None, "Hi")) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert (processor(None, ["Hi", "Hello"], padding="right")["attention_mask"][:, 0] == 1).all()
    with pytest.raises(ValueError, match=r"expected one entry of images per question \(2\), got 1; nest"):
        processor([image], ["a", "b"])
    with pytest.raises(ValueError, match='return_tensors: expected "pt", got'):
        processor(image, "What?", return_tensors="np")
    with pytest.raises(ValueError, match="text: expected a question or a list of questions, got none"):
        processor(image)
    assert "lvr_start" in repr(processor)
    with pytest.raises(DataError, match="prompt 0: expected an image file"):
        processor([tmp_path / "none.png"], ["a"])
