"""One preprocessing pass per sample: text and images become ids, labels, positions and boxes.

Shape legend: L tokens, I images, n boxes, P patches, N visual tokens of all images of the sample, D their width.
"""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vreflection.data.boxes import check_boxes
from vreflection.data.images import check_image_size, decode_image, open_image
from vreflection.data.pixels import ImageView, to_rgb
from vreflection.data.positions import mrope_positions
from vreflection.data.template import (
    IMAGE_PLACEHOLDER,
    LATENT_PLACEHOLDER,
    SYSTEM_PROMPT,
    ChatTurn,
    LatentTokenIds,
    Segment,
    SlotStyle,
    chat_segments,
    check_reserved,
    check_slot_style,
    check_turns,
    conversation_segments,
    count_placeholders,
    prompt_segments,
)
from vreflection.data.visual_cot import Sample
from vreflection.errors import DataError

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
# One image's features (N, D) and its grid_thw, as a feature cache stores them.
ImageTokens = tuple[Tensor, Sequence[int] | Tensor]


class SampleProcessor(Protocol):
    """What encoding needs from a processor; `vreflection.model.processor` provides it."""

    @property
    def token_ids(self) -> LatentTokenIds: ...

    @property
    def special_tokens(self) -> Sequence[str]: ...

    @property
    def spatial_merge_size(self) -> int: ...

    def encode_text(self, text: str) -> list[int]: ...

    def image_grid(self, width: int, height: int) -> tuple[int, int, int]: ...

    def process_images(self, images: Sequence[Image.Image]) -> Mapping[str, Tensor]: ...


@dataclass(slots=True)
class EncodedSample:
    """One sample ready for collation. Exactly one of `pixel_values` and `image_features` is set if it has images."""

    input_ids: Tensor  # [L] int64
    labels: Tensor  # [L] int64, -100 where not supervised; slots are labelled, the objective decides on them
    mm_token_type_ids: Tensor  # [L] int64, 1 at image tokens
    position_ids: Tensor  # [3, L] int64
    boxes: Tensor  # [n, 4] float64, one per latent span
    box_images: Tensor  # [n] int64, which of the sample's images a box lies in
    image_grid_thw: Tensor  # [I, 3] int64, patches
    pixel_values: Tensor | None = None  # [P, patch width] float32
    image_features: Tensor | None = None  # [N, D]
    source: str = ""


def encode_sample(
    sample: Sample,
    processor: SampleProcessor,
    slot_style: SlotStyle,
    image_tokens: Sequence[ImageTokens] | None = None,
    *,
    num_latents: int = 8,
    max_length: int | None = None,
) -> EncodedSample:
    """Encode one training sample.

    Args:
        sample: a checked sample; its images are opened unless `image_tokens` is given.
        processor: tokenizer, image processor and token ids.
        slot_style: see `template.expand_assistant_text`. Styles without slots ("boundary", "none") carry no boxes.
        image_tokens: per image, features (N_i, D) and grid_thw computed earlier.
        num_latents: slots per box (Q).
        max_length: longest accepted L in tokens.

    Raises:
        DataError: an unusable image, box or text, or `too-long`; the sample is never cut.
    """
    check_slot_style(slot_style)
    check_turns(sample.conversations, sample.source)
    num_images, num_spans = count_placeholders(sample.conversations)
    boxes_n4, _ = check_boxes(sample.boxes, sample.source)
    if num_spans != len(boxes_n4):
        raise DataError(
            "box-count",
            f"expected one box per {LATENT_PLACEHOLDER} ({num_spans}), got {len(boxes_n4)} boxes; fix the row",
            sample.source,
        )
    box_images_n = np.asarray(sample.box_images, dtype=np.int64).reshape(-1)
    total = len(sample.image_paths)
    if len(box_images_n) != len(boxes_n4) or ((box_images_n < 0) | (box_images_n >= total)).any():
        raise DataError(
            "box-images",
            f"expected {len(boxes_n4)} image indices below {total}, got {box_images_n.tolist()}; fix box_images",
            sample.source,
        )
    images = _prepare_images(sample.image_paths, processor, image_tokens, sample.source, sample.image_view)
    segments = conversation_segments(sample.conversations, slot_style, num_latents)
    encoded = _assemble(segments, num_images, images, processor, max_length, sample.source)
    if slot_style in ("latent", "filler"):
        encoded.boxes = torch.from_numpy(boxes_n4)
        encoded.box_images = torch.from_numpy(box_images_n)
    return encoded


def sample_length(
    sample: Sample, processor: SampleProcessor, slot_style: SlotStyle, grids: Sequence[Sequence[int]], num_latents: int
) -> int:
    """Tokens that `encode_sample` will make of a sample whose images have these grids (t, H, W), without its pixels."""
    grids_I3 = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    segments = conversation_segments(sample.conversations, slot_style, num_latents)
    text = sum(len(processor.encode_text(segment.text)) for segment in segments)
    visual = _token_counts(grids_I3, processor.spatial_merge_size)
    return text + sum(visual) - len(visual)


def encode_prompt(
    question: str,
    processor: SampleProcessor,
    images: Sequence[Image.Image | bytes | str | Path] = (),
    image_tokens: Sequence[ImageTokens] | None = None,
    *,
    max_length: int | None = None,
    source: str = "prompt",
    image_view: ImageView = "shown",
) -> EncodedSample:
    """Encode an inference prompt: system turn, user turn, and the header of the answer, nothing supervised.

    Args:
        question: user text; without any `<image>` placeholder the images are put in front of it.
        processor: tokenizer, image processor and token ids.
        images: PIL images, files or their bytes in the order of the placeholders; ignored when `image_tokens` is given.
        image_tokens: per image, features (N_i, D) and grid_thw computed earlier.
        max_length: longest accepted L in tokens.
        source: name used in error messages.
        image_view: how images are read; the default is what a viewer shows.

    Raises:
        DataError: placeholders and images do not match, special tokens in the text, or `too-long`.
    """
    check_reserved(question, source, processor.special_tokens)
    prepared = _prepare_images(images, processor, image_tokens, source, image_view)
    num_images = len(prepared["image_grid_thw"])
    if IMAGE_PLACEHOLDER not in question:
        question = IMAGE_PLACEHOLDER * num_images + question
    return _assemble(
        prompt_segments(question), question.count(IMAGE_PLACEHOLDER), prepared, processor, max_length, source
    )


def encode_chat(
    turns: Sequence[ChatTurn],
    processor: SampleProcessor,
    images: Sequence[Image.Image | Mapping[str, Tensor]] = (),
    *,
    system: str = SYSTEM_PROMPT,
    max_length: int | None = None,
    source: str = "conversation",
) -> EncodedSample:
    """Encode a conversation that the model is to go on with.

    Args:
        turns: see `chat_segments`. images: in the order of their places in the turns; or what `process_images` made
            of each.
        system: text of the system turn; the default is the one of training.
        max_length, source: see `encode_prompt`.

    Raises:
        DataError: special tokens in the text, images that do not match, or `too-long`.
    """
    segments = chat_segments(turns, system, processor.special_tokens)
    if images and all(isinstance(image, Mapping) for image in images):
        names = ("pixel_values", "image_grid_thw")
        prepared = {name: torch.cat([image[name] for image in images]) for name in names}  # pyright: ignore
    else:
        prepared = _prepare_images(images, processor, None, source, "shown")  # pyright: ignore[reportArgumentType]
    places = sum(part is None for turn in turns for part in turn.parts)
    return _assemble(segments, places, prepared, processor, max_length, source)


def _prepare_images(
    images: Sequence[Image.Image | bytes | str | Path],
    processor: SampleProcessor,
    image_tokens: Sequence[ImageTokens] | None,
    source: str,
    image_view: ImageView,
) -> dict[str, Any]:
    """Grids plus either pixels or features of a sample's images; no key for what is absent."""
    if image_tokens is not None:
        return _stack_features(image_tokens, processor.spatial_merge_size, source)
    if not images:
        return {"image_grid_thw": torch.zeros((0, 3), dtype=torch.int64)}
    try:
        opened = [_opened(image, f"image {number}", image_view) for number, image in enumerate(images)]
        features = processor.process_images(opened)
    except DataError as error:
        raise DataError(error.reason, str(error), source) from error
    return {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"].to(torch.int64)}


def _opened(image: Image.Image | bytes | str | Path, name: str, image_view: ImageView) -> Image.Image:
    if isinstance(image, bytes):
        return decode_image(image, name, view=image_view)
    if isinstance(image, (str, Path)):
        return open_image(image, view=image_view)
    if image_view == "shown":
        return image  # as the processor reads it
    check_image_size(*image.size, name=name)
    return to_rgb(image, image_view)


def _stack_features(image_tokens: Sequence[ImageTokens], merge: int, source: str) -> dict[str, Any]:
    if not image_tokens:
        return {"image_grid_thw": torch.zeros((0, 3), dtype=torch.int64)}
    grids_I3 = torch.stack([torch.as_tensor(grid, dtype=torch.int64).reshape(3) for _, grid in image_tokens])
    for (tokens_ND, _), count in zip(image_tokens, _token_counts(grids_I3, merge), strict=True):
        if tokens_ND.ndim != 2 or len(tokens_ND) != count:
            raise DataError(
                "feature-shape",
                f"expected ({count}, D) cached visual tokens, got {tuple(tokens_ND.shape)}; rebuild the feature cache",
                source,
            )
    return {"image_features": torch.cat([tokens for tokens, _ in image_tokens]), "image_grid_thw": grids_I3}


def _token_counts(grids_I3: Tensor, merge: int) -> list[int]:
    """Visual tokens per image, h * w."""
    return (grids_I3.prod(1) // merge**2).tolist()


def _assemble(
    segments: Sequence[Segment],
    num_placeholders: int,
    images: dict[str, Any],
    processor: SampleProcessor,
    max_length: int | None,
    source: str,
) -> EncodedSample:
    """Tokenise segments, repeat image tokens, and derive labels, type ids and positions."""
    grids_I3 = images["image_grid_thw"]
    if num_placeholders != len(grids_I3):
        raise DataError(
            "image-count",
            f"expected one image per {IMAGE_PLACEHOLDER} ({num_placeholders}), got {len(grids_I3)}; fix text or images",
            source,
        )
    merge, image_id = processor.spatial_merge_size, processor.token_ids.image
    counts = iter(_token_counts(grids_I3, merge))
    ids: list[int] = []
    labels: list[int] = []
    for segment in segments:
        for token in processor.encode_text(segment.text):
            repeat = next(counts) if token == image_id else 1
            ids.extend([token] * repeat)
            labels.extend([token if segment.supervised else IGNORE_INDEX] * repeat)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            "too-long",
            f"expected at most {max_length} tokens, got {len(ids)}; raise max_length or lower max_visual_tokens",
            source,
        )
    input_ids_L = torch.tensor(ids, dtype=torch.int64)
    return EncodedSample(
        input_ids=input_ids_L,
        labels=torch.tensor(labels, dtype=torch.int64),
        mm_token_type_ids=(input_ids_L == image_id).to(torch.int64),
        position_ids=torch.from_numpy(mrope_positions(ids, image_id, grids_I3.numpy(), merge)),
        boxes=torch.zeros((0, 4), dtype=torch.float64),
        box_images=torch.zeros(0, dtype=torch.int64),
        source=source,
        **images,
    )


class LatentDataset(Dataset[EncodedSample]):
    """Map-style dataset that encodes samples on access.

    Args:
        samples: checked samples.
        processor: see `SampleProcessor`.
        slot_style, num_latents, max_length: as in `encode_sample`.
        feature_cache: image path -> (visual tokens (N, D), grid_thw). When given, image files are not opened and
            every image must be in it.
        skip_unusable: an unusable sample is left out of its batch and logged once, by file and row; a batch that would
            be empty takes the next usable sample of `stand_ins` instead. A file that cannot be used at all (`file-*`)
            is an error all the same.

    Attributes:
        stand_ins: ascending positions of the samples that may stand in for an empty batch; None = all.

    `__getitem__` raises `DataError` for an unusable sample.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: SampleProcessor,
        slot_style: SlotStyle = "latent",
        *,
        num_latents: int = 8,
        max_length: int | None = None,
        feature_cache: Mapping[str, ImageTokens] | None = None,
        skip_unusable: bool = False,
    ):
        check_slot_style(slot_style)
        self.samples = samples
        self.processor = processor
        self.slot_style: SlotStyle = slot_style
        self.num_latents = num_latents
        self.max_length = max_length
        self.feature_cache = feature_cache
        self.skip_unusable = skip_unusable
        self.stand_ins: Sequence[int] | np.ndarray | None = None
        self.dropped: dict[int, DataError] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample:
        return self.encode(index)

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedSample]:
        """The samples of one batch."""
        if not self.skip_unusable:
            return [self.encode(index) for index in indices]
        if usable := self.usable(indices):
            return usable
        others = range(len(self.samples)) if self.stand_ins is None else self.stand_ins
        first = bisect_right(others, indices[-1])
        for step in range(len(others)):
            sample = self._encode_or_drop(int(others[(first + step) % len(others)]))
            if sample is not None:
                return [sample]
        raise DataError("no-rows", f"none of the {len(others)} samples is usable; the log says why for each")

    def usable(self, indices: Sequence[int]) -> list[EncodedSample]:
        """Those of the samples that can be used; the others are logged."""
        return [sample for index in indices if (sample := self._encode_or_drop(index)) is not None]

    def with_samples(self, samples: Sequence[Sample]) -> "LatentDataset":
        """The same settings over other samples, whose images are decoded."""
        return LatentDataset(
            samples, self.processor, self.slot_style, num_latents=self.num_latents, max_length=self.max_length
        )

    def _encode_or_drop(self, index: int) -> EncodedSample | None:
        if index in self.dropped:
            return None
        try:
            return self.encode(index)
        except DataError as error:
            if error.reason.startswith("file-"):
                raise
            self.dropped[index] = error
            logger.warning("row dropped (%s): %s", error.reason, error)
            return None

    def encode(self, index: int) -> EncodedSample:
        """The sample at `index` itself."""
        sample = self.samples[index]
        return encode_sample(
            sample,
            self.processor,
            self.slot_style,
            None if self.feature_cache is None else [self.cached(path, sample.source) for path in sample.image_paths],
            num_latents=self.num_latents,
            max_length=self.max_length,
        )

    def cached(self, path: str, source: str) -> ImageTokens:
        assert self.feature_cache is not None
        try:
            return self.feature_cache[path]
        except KeyError:
            raise DataError(
                "feature-missing",
                f"expected features of {path} in the cache of {len(self.feature_cache)} images, got none; "
                "rebuild the feature cache or train without it",
                source,
            ) from None
