"""A small real tokenizer for the quickstart: byte-level BPE with Qwen's chat markers and the four latent tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vreflection.data.template import (
    IMAGE_PAD,
    LATENT_TOKENS,
    SYSTEM_PROMPT,
    TURN_END,
    TURN_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from vreflection.quickstart.notes import COLOURS
from vreflection.quickstart.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CAPTION_PROMPT = "list the notes :"
END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
MAX_LENGTH = 2048  # tokens
MAX_VOCABULARY = 640  # upper bound handed to the BPE trainer; the template corpus needs fewer

# ChatML as Qwen2.5-VL writes it: a default system turn, and image parts as vision_start, image_pad, vision_end.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template_corpus() -> list[str]:
    """Every sentence the quickstart can write, without markers: what the merges are learned from."""
    questions = [
        task.question.format(colour=colour, hops=hops)
        for task in TASKS.values()
        for colour in COLOURS
        for hops in task.hops
    ]
    answers = [f"\n<answer> {digit} </answer>" for digit in range(10)]
    captions = [f" {colour} {digit}" for colour in COLOURS for digit in range(10)]
    turns = ["system\n", "user\n", "assistant\n", SYSTEM_PROMPT, CAPTION_PROMPT]
    # Twice: the trainer only merges pairs it sees at least twice.
    return 2 * (questions + answers + captions + turns)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer (milliseconds, deterministic) and return it with special tokens and chat template set.

    The alphabet holds all 256 bytes, so any text encodes and decodes without loss. Colours and digits with their
    leading space (" red", " 7") are single tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    # The GPT-2 pattern keeps " 7" in one piece; Qwen's own pattern would split the digit from its space.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(template_corpus(), trainer)
    markers = [AddedToken(token, normalized=False, special=True) for token in (*CHAT_TOKENS, *LATENT_TOKENS)]
    backend.add_special_tokens(markers)  # before wrapping, which would otherwise number the eos token first
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, *LATENT_TOKENS]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Token ids under the names a Qwen2.5-VL config uses, plus the four `lvr_*_id` attributes."""
    names = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": "<|im_end|>",
        "pad_token_id": END_OF_TEXT,
        "lvr_start_id": LATENT_TOKENS[0],
        "lvr_id": LATENT_TOKENS[1],
        "lvr_latent_end_id": LATENT_TOKENS[2],
        "lvr_end_id": LATENT_TOKENS[3],
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
