"""From items to prompts: each image is opened and processed once for all the questions that follow on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.encode import encode_prompt
from ..data.template import IMAGE_PLACEHOLDER
from ..engine.requests import Generation, Prompt
from ..errors import ConfigError, DataError
from ..model.processor import VReflectionProcessor
from .protocol import Protocol
from .records import Item, RawAnswer


@dataclass(frozen=True)
class Asked:
    """An item ready to be decoded, or why it cannot be. `visual_tokens`: per image."""

    item: Item
    prompt: Prompt | None
    visual_tokens: tuple[int, ...] = ()
    error: DataError | None = None


class Prompts:
    """Prompts of a protocol. Items that share their images come one after the other: only the last item's are kept.

    Args:
        dtype: of the patches; the model's takes half the memory of float32 and is what it converts them to anyway.
    """

    def __init__(self, processor: VReflectionProcessor, protocol: Protocol, dtype: torch.dtype = torch.float32):
        self.processor, self.protocol, self.dtype = processor, protocol, dtype
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.opened = 0  # images decoded so far

    def of(self, item: Item) -> Asked:
        """The item's prompt; an unusable image or text is an error of this item alone."""
        try:
            return self._ask(item)
        except DataError as error:
            return Asked(item, None, error=error)

    def _ask(self, item: Item) -> Asked:
        text, count = self.protocol.prompt(item), len(item.images)
        if IMAGE_PLACEHOLDER in text:
            raise DataError(
                "reserved-token", f"expected a text without {IMAGE_PLACEHOLDER}, got {text[:200]!r}", item.id
            )
        images = self._images(item)
        merge = self.processor.spatial_merge_size
        visual = tuple(int(grid.prod()) // merge**2 for _, grid in images)
        marks = IMAGE_PLACEHOLDER * count
        encoded = encode_prompt(
            marks + text if self.protocol.images_first else text + marks,
            self.processor,
            # The text needs to know only how many tokens each image takes.
            image_tokens=[(torch.empty(n, 0), grid) for n, (_, grid) in zip(visual, images, strict=True)],
            source=f"{item.benchmark}:{item.id}",
        )
        pixels = [pixels for pixels, _ in images]
        prompt = replace(
            Prompt.of(encoded),
            image_features=None,
            pixel_values=pixels[0] if count == 1 else torch.cat(pixels),
            image_keys=item.image_keys,
        )
        return Asked(item, prompt, visual)

    def _images(self, item: Item) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Patches and grid `(3,)` of each image."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, opener in zip(item.image_keys, item.images, strict=True):
            if key in self.kept:
                found[key] = self.kept[key]
            elif key not in found:
                # What is not needed any more goes before the next image comes: one may take hundreds of megabytes.
                self.kept = {old: value for old, value in self.kept.items() if old in item.image_keys}
                # The loader has checked size and mode, with limits of its own.
                made = self.processor.image_processor.preprocess([opener()], return_tensors="pt")
                found[key] = made["pixel_values"].to(self.dtype), made["image_grid_thw"][0].long()
                self.opened += 1
        self.kept = found
        return [found[key] for key in item.image_keys]


def load_processor(folder: Path, protocol: Protocol) -> VReflectionProcessor:
    """A checkpoint's processor with the protocol's pixel range; what the protocol leaves open stays as stored.

    Raises:
        ConfigError: half of the range is the checkpoint's and does not fit the other half.
    """
    processor = VReflectionProcessor.from_pretrained(folder)
    size = processor.image_processor.size
    low, high = protocol.min_pixels or size["shortest_edge"], protocol.max_pixels or size["longest_edge"]
    if low > high:
        raise ConfigError(
            f"protocol {protocol.tag}: expected min_pixels <= max_pixels, got {low} and {high}, one of them from the "
            f"checkpoint {folder}; give both in the protocol"
        )
    processor.image_processor.size = type(size)(shortest_edge=low, longest_edge=high)
    return processor


def raw_answer(asked: Asked, answer: Generation, processor: VReflectionProcessor) -> RawAnswer:
    """What goes to disk. Latent positions are left out of the text and of `tokens`."""
    special, item = processor.token_ids, asked.item
    shown = [(place, token) for place, (token, inside) in enumerate(zip(answer.tokens, answer.latent)) if not inside]
    ids = [token for _, token in shown]
    spans = [place for place, token in enumerate(ids) if token == special.lvr_start]
    return RawAnswer(
        benchmark=item.benchmark,
        id=item.id,
        options=item.options,
        gold=item.gold,
        labels=item.labels,
        group=item.group,
        text=processor.decode(ids, skip_special_tokens=False),
        finish_reason=answer.finish_reason or "",
        spans=len(spans),
        closed=bool(spans) and all(ids[place + 1 : place + 2] == [special.lvr_end] for place in spans),
        latent_steps=answer.latent_steps_taken,
        tokens=len(ids),
        prompt_tokens=answer.prompt_length,
        visual_tokens=asked.visual_tokens,
    )
