"""The processor called as the host library's own is: template text with images, arrays, and its keywords."""

import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
TO_ANSWER = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.processor()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


CHATS = {
    "one image": [user(noise(100, 60), "what is this ?")],
    "no image": [user("Hi")],
    "text around images": [user("see", noise(100, 60), " <image> and ", noise(60, 60), noise(84, 56), "\nwhich ?\n")],
    "system": [{"role": "system", "content": "Be\nbrief."}, user(noise(60, 60), "go")],
    "several turns": [user(noise(60, 60), "a"), {"role": "assistant", "content": "\n\nb"}, user(noise(84, 56), "c")],
}


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS.keys())
def test_template_text_is_taken_as_it_is(processor, messages):
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    images = [part["image"] for part in parts if part["type"] == "image"] or None
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor.apply_chat_template(messages, **TO_ANSWER)
    batch = processor(text=[text], images=images, videos=None, padding=True, return_tensors="pt")
    assert equal(batch, expected)
    if images:
        assert len(batch["image_grid_thw"]) == len(images) and equal(processor(images, text), expected)
        with pytest.raises(ValueError, match="expected one"):
            processor(text=[text], images=[*images, images[0]])


def test_a_begun_answer_in_template_text(processor):
    messages = [user(noise(60, 60), "a"), {"role": "assistant", "content": "\nIt is"}]
    text = processor.apply_chat_template(messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n\nIt is")
    expected = processor.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=True)
    assert equal(processor([noise(60, 60)], [text]), expected)


def test_images_of_several_template_texts_in_one_list(processor):
    a, b, c = noise(60, 60), noise(84, 56), noise(100, 60)
    chats = [[user(a, b, "both ?")], [user("none")], [user(c, "one ?")]]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    expected = processor.apply_chat_template(chats, **TO_ANSWER)
    for images in ([a, b, c], [[a, b], None, [c]]):
        assert equal(processor(text=texts, images=images, padding=True), expected)


def test_template_text_of_another_form_is_refused(processor):
    chat = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    complete = processor.apply_chat_template(chat)
    assert complete + "<|im_start|>assistant\n" == prompt
    form = "prompt 0: expected a plain question, or text of apply_chat_template with add_generation_prompt=True"
    for text in (complete, prompt[prompt.index("<|im_start|>user") :], "<|im_start|>Hi"):
        with pytest.raises(DataError, match=form) as error:
            processor(text=[text])
        assert error.value.reason == "reserved-token"
    for token in ("<|endoftext|>", "<|lvr|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>"):
        with pytest.raises(DataError, match="prompt 0.*got special tokens"):
            processor(text=[prompt.replace("c<", f"c{token}<")])
    with pytest.raises(DataError, match="prompt 0.*got special tokens"):
        processor(text=["see " + prompt])


def test_text_of_complete_messages_and_of_images_without_data(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert processor.apply_chat_template(chat) == system + text
    assert processor.apply_chat_template([chat], tokenize=False) == [system + text]
    assert processor.apply_chat_template(chat, add_generation_prompt=True).endswith(text + "<|im_start|>assistant\n")
    answered = [*chat, {"role": "assistant", "content": "Yes"}]
    answer = "<|im_start|>assistant\nYes"
    assert processor.apply_chat_template(answered) == f"{system}{text}{answer}<|im_end|>\n"
    assert processor.apply_chat_template(answered, continue_final_message=True) == system + text + answer
    with pytest.raises(DataError, match="got special tokens"):
        processor.apply_chat_template([user("a<|endoftext|>")])


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_pixels_are_images(processor, convert):
    expected = processor(Image.fromarray(PIXELS), "What?")
    for pixels in (PIXELS, PIXELS.transpose(2, 0, 1)):
        image = convert(pixels)
        assert equal(processor(image, "What?"), expected) and equal(processor([image], ["What?"]), expected)
        chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
        assert equal(processor.apply_chat_template(chat, **TO_ANSWER), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32) / 255, r"expected pixels .* uint8, got \(60, 100, 3\) float32"),
        (torch.zeros(3, 60, 60), r"got \(3, 60, 60\) torch.float32"),
        (np.zeros((2, 60, 60, 3), np.uint8), r"got \(2, 60, 60, 3\) uint8"),
        (np.zeros((60, 60), np.uint8), r"got \(60, 60\) uint8"),
        ("https://example.org/a.png", "got the URL 'https://example.org/a.png'; images by URL are not fetched"),
        ("data:image/png;base64,AAAA", "images by URL are not fetched"),
        (3, "expected a PIL image, a path, bytes, or an array of pixels, got int"),
    ],
)  # fmt: skip
def test_what_is_no_image(processor, image, message):
    for images, questions in ([image], ["What?"]), (image, "What?"):
        with pytest.raises(DataError, match=f"images of prompt 0, 0: .*{message}"):
            processor(images, questions)


def test_keywords_of_the_host_library(processor, tmp_path):
    ids = torch.tensor([processor.encode_text("a , b<|im_end|>"), processor.encode_text("c . d<|im_end|>")])
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert processor.batch_decode(ids, **settings) == ["a , b", "c . d"]
    assert processor.decode(ids[0], **settings) == "a , b"
    assert processor.decode(ids[0], skip_special_tokens=False, clean_up_tokenization_spaces=False) == "a , b<|im_end|>"
    assert processor.post_process_image_text_to_text(ids, **settings) == ["a , b", "c . d"]
    assert equal(processor(text="Hi", padding=False), processor(text="Hi"))
    assert processor(text=["Hi", "Ho"], padding=False)["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match=r"padding=False: expected prompts of one length, got \[\d+, \d+\]"):
        processor(text=["Hi", "Hello"], padding=False)
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match=f"{name}: expected None, got list"):
            processor(text="Hi", **{name: [1]})
    processor.save_pretrained(tmp_path, push_to_hub=False)
    assert type(processor).from_pretrained(tmp_path).token_ids == processor.token_ids
    with pytest.raises(ValueError, match="push_to_hub: expected False, got True"):
        processor.save_pretrained(tmp_path, push_to_hub=True)
