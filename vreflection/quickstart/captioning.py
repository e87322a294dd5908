"""What the base model can do: list the notes of an image. Building captions, generating them, scoring them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vreflection.quickstart.notes import JPEG_QUALITY, Note, Scene
from vreflection.quickstart.tokenizer import CAPTION_PROMPT, IMAGE_PAD

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISUAL_TOKENS = 64  # of a 224x224 image


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str = CAPTION_PROMPT) -> list[int]:
    """Token ids of system turn, user turn (one 224x224 image, then `text`) and the opened assistant turn."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt.replace(IMAGE_PAD, IMAGE_PAD * VISUAL_TOKENS)).input_ids


def caption_text(notes: Sequence[Note], digit_first: bool = False) -> str:
    """Caption of notes in the given order; every word carries its leading space.

    A plain note is " red 7", a framed one paper, frame and digit, " red blue 7"; with `digit_first` " red 7 blue".
    """
    words = []
    for note in notes:
        frame = [] if note.frame is None else [note.frame]
        words += [note.colour, *([str(note.digit), *frame] if digit_first else [*frame, str(note.digit)])]
    return "".join(f" {word}" for word in words)


def jpeg_round_trip(pixels_HWC: np.ndarray) -> Image:
    """An image as it would be read back from the dataset's JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def generate_captions(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_processor: Qwen2VLImageProcessorPil,
    images: Sequence[Image],
    batch_size: int = 32,
) -> list[str]:
    """Greedy captions of 224x224 images through the stock `generate`."""
    import torch

    prompt = torch.tensor(prompt_ids(tokenizer))
    captions: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = image_processor(list(images[start : start + batch_size]), return_tensors="pt")
        input_ids = prompt.repeat(len(batch["image_grid_thw"]), 1)
        output_ids = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            # Without the type ids the host falls back to one-dimensional positions, silently.
            mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
            pixel_values=batch["pixel_values"].to(model.dtype),
            image_grid_thw=batch["image_grid_thw"],
            max_new_tokens=24,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(output_ids[:, prompt.numel() :], skip_special_tokens=True)
    return captions


def caption_score(caption: str, notes: Sequence[Note]) -> float:
    """Share of `notes` listed with everything right, in either order; a colour listed twice counts by its first."""
    words = caption.split()
    size = 2 if notes[0].frame is None else 3
    listed: dict[str, set[str]] = {}
    for start in range(0, len(words), size):
        listed.setdefault(words[start], set(words[start + 1 : start + size]))
    expected = [{str(note.digit)} | ({note.frame} if note.frame else set()) for note in notes]
    return sum(listed.get(note.colour) == words for note, words in zip(notes, expected)) / len(notes)


def caption_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scenes: Sequence[Scene]
) -> float:
    """Mean `caption_score` of greedy captions over scenes read back from JPEG."""
    from vreflection.quickstart.base import build_image_processor

    images = [jpeg_round_trip(scene.pixels_HWC) for scene in scenes]
    captions = generate_captions(model, tokenizer, build_image_processor(), images)
    return sum(caption_score(caption, scene.notes) for caption, scene in zip(captions, scenes)) / len(scenes)
