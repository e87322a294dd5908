import pytest

from vreflection.data.template import (
    Turn,
    check_turns,
    conversation_segments,
    expand_assistant_text,
    expand_user_text,
    prompt_segments,
)
from vreflection.errors import DataError

ANSWER = "first <lvr>\n<answer> a </answer> then <lvr>\n<answer> b </answer>"


@pytest.mark.parametrize(
    "style, expected",
    [
        (
            "latent",
            "first <|lvr_start|><|lvr|><|lvr|><|lvr_end|>\n<answer> a </answer> then "
            "<|lvr_start|><|lvr|><|lvr|><|lvr_end|>\n<answer> b </answer>",
        ),
        (
            "boundary",
            "first <|lvr_start|><|lvr_end|>\n<answer> a </answer> then <|lvr_start|><|lvr_end|>\n<answer> b </answer>",
        ),
        ("none", "first <answer> a </answer> then <answer> b </answer>"),
    ],
)
def test_assistant_expansion(style, expected):
    assert expand_assistant_text(ANSWER, style, 2) == expected


def test_filler_text_equals_latent_text_and_plain_answers_stay():
    assert expand_assistant_text(ANSWER, "filler", 3) == expand_assistant_text(ANSWER, "latent", 3)
    for style in ("latent", "filler", "boundary", "none"):
        assert expand_assistant_text("no\nlatent", style, 8) == "no\nlatent"
    assert expand_assistant_text("<lvr>\n\nx", "none", 8) == "\nx"
    assert expand_assistant_text("<lvr>x", "none", 8) == "x"


def test_expansion_refuses_unknown_styles_and_no_slots():
    with pytest.raises(ValueError, match="expected slot_style to be one of .* got 'latents'"):
        expand_assistant_text("<lvr>", "latents", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_latents >= 1 .* got 0; use 'boundary'"):
        expand_assistant_text("<lvr>", "latent", 0)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>\nWhat?", "@What?"),
        ("What <image>?", "What @?"),
        ("a\n<image>\n\nb", "a@\nb"),
        ("<image>\n<image>\nboth", "@@both"),
        ("no picture", "no picture"),
    ],
)
def test_user_expansion(text, expected):
    assert expand_user_text(text) == expected.replace("@", "<|vision_start|><|image_pad|><|vision_end|>")


def test_conversation_is_qwen_chatml_and_supervises_answers_only():
    turns = [
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "<lvr>\nred"),
        Turn("user", "Sure?"),
        Turn("assistant", "yes"),
    ]
    segments = conversation_segments(turns, "latent", 1)
    assert "".join(segment.text for segment in segments) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n<|lvr_start|><|lvr|><|lvr_end|>\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert [segment.text for segment in segments if segment.supervised] == [
        "<|lvr_start|><|lvr|><|lvr_end|>\nred<|im_end|>\n",
        "yes<|im_end|>\n",
    ]


def test_prompt_is_the_conversation_up_to_the_answer():
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "red")]
    prompt = prompt_segments("<image>\nWhat?")
    assert prompt == conversation_segments(turns, "latent", 8)[:-1]
    assert prompt[-1].text == "<|im_start|>assistant\n"
    assert not any(segment.supervised for segment in prompt)


@pytest.mark.parametrize(
    "roles", [[], ["user"], ["assistant", "user"], ["user", "user"], ["user", "assistant", "user"]], ids=str
)
def test_turn_order(roles):
    with pytest.raises(DataError, match=r"f.json:1: expected alternating .* got \[.*reorder") as caught:
        check_turns([Turn(role, "x") for role in roles], "f.json:1")
    assert caught.value.reason == "conversation-order"


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|lvr|>", "<|im_end|>", "<|video_pad|>"])
def test_special_tokens_in_the_text_are_refused(token):
    with pytest.raises(DataError, match=r"f.json:1: expected plain text .* got special tokens .* remove") as caught:
        check_turns([Turn("user", f"a {token}"), Turn("assistant", "b")], "f.json:1")
    assert caught.value.reason == "reserved-token"
    assert token in str(caught.value)
