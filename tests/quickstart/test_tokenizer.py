import pytest

from vreflection.quickstart import tokenizer as quickstart_tokenizer
from vreflection.quickstart.base import base_dir
from vreflection.quickstart.notes import COLOURS
from vreflection.quickstart.tasks import TASKS
from vreflection.quickstart.tokenizer import CAPTION_PROMPT


@pytest.fixture(scope="module")
def tokenizer():
    return quickstart_tokenizer.build_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "what digit is on the red note ?",
        "\n<answer> 7 </answer>",
        "héllo 你好 🙂 \x00\t\r\n  3.14 don't , ! .",
        "  leading, trailing  ",
        "".join(map(chr, range(1, 0x250))),
        "\u202e\ufeff\U0010ffff",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_atomic_and_in_order(tokenizer):
    names = [*quickstart_tokenizer.CHAT_TOKENS, *quickstart_tokenizer.LATENT_TOKENS]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(ids[0], ids[0] + len(names)))
    assert tokenizer("".join(names)).input_ids == ids
    assert ids[-1] + 1 == len(tokenizer) <= 700
    assert quickstart_tokenizer.LATENT_TOKENS == ("<|lvr_start|>", "<|lvr|>", "<|lvr_latent_end|>", "<|lvr_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_domain_words_are_single_tokens(tokenizer):
    for word in [*COLOURS, *map(str, range(10))]:
        assert len(tokenizer(f" {word}").input_ids) == 1
    assert len(tokenizer(TASKS["one_hop"].question.format(colour="red")).input_ids) == 8
    assert len(tokenizer(TASKS["follow_the_notes"].question.format(colour="red", hops=3)).input_ids) == 13
    assert len(tokenizer(CAPTION_PROMPT).input_ids) == 4
    assert len(tokenizer("\n<answer> 7 </answer>").input_ids) == 8


def test_chat_template_is_chatml(tokenizer):
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}
    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    user = "<|vision_start|><|image_pad|><|vision_end|>what ?<|im_end|>\n"
    asked = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert asked == opening + user + "<|im_start|>assistant\n"
    turns = [{"role": "system", "content": "Be brief."}, message, {"role": "assistant", "content": "7"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    expected = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{user}<|im_start|>assistant\n7<|im_end|>\n"
    assert whole == expected


def test_auto_tokenizer_reads_the_saved_and_the_shipped_folder(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    text = "<|im_start|>user\n<|lvr_start|> 7 red note é<|im_end|>\n"
    for folder in (tmp_path, base_dir()):
        loaded = AutoTokenizer.from_pretrained(folder)
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.eos_token == "<|im_end|>" and loaded.pad_token == "<|endoftext|>"
