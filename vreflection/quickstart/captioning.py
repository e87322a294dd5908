"""What the base model can do: list the notes of an image. Building captions, generating them, scoring them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vreflection.quickstart.notes import CAPTION_PROMPT, JPEG_QUALITY, Note, Scene, scene_at
from vreflection.quickstart.tokenizer import IMAGE_PAD

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


def caption_text(notes: Sequence[Note]) -> str:
    """Caption of notes in the given order, e.g. " red 7 blue 3"; every word carries its leading space."""
    return "".join(f" {note.colour} {note.digit}" for note in notes)


def jpeg_round_trip(pixels_HWC: np.ndarray) -> Image:
    """An image as it would be read back from the dataset's JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


def validation_scenes(count: int, seed: int = 0) -> list[Scene]:
    """The first `count` scenes of the validation split (its photos and digits are never trained on)."""
    return [scene_at("validation", index, seed) for index in range(count)]


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
            max_new_tokens=16,
            do_sample=False,
        )
        captions += tokenizer.batch_decode(output_ids[:, prompt.numel() :], skip_special_tokens=True)
    return captions


def caption_score(caption: str, notes: Sequence[Note]) -> float:
    """Share of `notes` listed with the right digit; a colour named twice counts by its first digit."""
    words = caption.split()
    said: dict[str, str] = {}
    for colour, digit in zip(words[::2], words[1::2]):
        said.setdefault(colour, digit)
    return sum(said.get(note.colour) == str(note.digit) for note in notes) / len(notes)


def caption_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, scenes: Sequence[Scene]
) -> float:
    """Mean `caption_score` of greedy captions over scenes read back from JPEG."""
    from vreflection.quickstart.base import build_image_processor

    images = [jpeg_round_trip(scene.pixels_HWC) for scene in scenes]
    captions = generate_captions(model, tokenizer, build_image_processor(), images)
    return sum(caption_score(caption, scene.notes) for caption, scene in zip(captions, scenes)) / len(scenes)
