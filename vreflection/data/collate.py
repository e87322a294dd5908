"""Batches of encoded samples: padded or packed text rows, packed images, and boxes that know their row and image.

Shape legend: B rows, L longest row (or the whole pack), I images of the batch, T visual tokens, P patches, n boxes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vreflection.data.encode import IGNORE_INDEX, EncodedSample
from vreflection.errors import DataError


class Collator:
    """Turn encoded samples into one batch of the model's `forward`.

    Args:
        pad_token_id: id put at padded positions of `input_ids`.
        padding_side: "right" for training, "left" for prompts that are decoded further.
        keep_sources: also return `sources`, a list of `file:row` strings (not an argument of `forward`).

    Raises:
        DataError: `mixed-images` where some samples carry pixels and others cached features.
    """

    def __init__(self, pad_token_id: int, padding_side: Literal["right", "left"] = "right", keep_sources: bool = False):
        if padding_side not in ("right", "left"):
            raise ValueError(f"expected padding_side 'right' or 'left', got {padding_side!r}")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.keep_sources = keep_sources

    def __call__(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `labels`, `mm_token_type_ids` (B, L) int64; `position_ids` (3, B, L) int64,
            0 at padding; `image_grid_thw` (I, 3) int64; `pixel_values` (P, width) or `image_features` (T, D), absent
            without images; `boxes` (n, 4) float64, `box_sample` (n,) row of each box, `box_image` (n,) index into
            the batch's packed images.
        """
        if not samples:
            raise ValueError("expected at least one sample to collate, got none")
        batch: dict[str, Any] = {
            "input_ids": self._pad([s.input_ids for s in samples], self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(s.input_ids) for s in samples], 0),
            "position_ids": self._pad([s.position_ids for s in samples], 0).transpose(0, 1).contiguous(),
            "labels": self._pad([s.labels for s in samples], IGNORE_INDEX),
            "mm_token_type_ids": self._pad([s.mm_token_type_ids for s in samples], 0),
            **_pack_images(samples),
            **_pack_boxes(samples),
        }
        if self.keep_sources:
            batch["sources"] = [s.source for s in samples]
        return batch

    def _pad(self, rows: Sequence[Tensor], value: int) -> Tensor:
        """Stack rows [..., L_i] into [B, ..., L]."""
        longest = max(row.shape[-1] for row in rows)
        padded = rows[0].new_full((len(rows), *rows[0].shape[:-1], longest), value)
        for target, row in zip(padded, rows, strict=True):
            length = row.shape[-1]
            start = longest - length if self.padding_side == "left" else 0
            target[..., start : start + length] = row
        return padded


class PackedCollator:
    """Put samples end to end into one row, without padding; `cu_seqlens` says where each begins.

    Args:
        keep_sources: also return `sources`, a list of `file:row` strings (not an argument of `forward`).
    """

    def __init__(self, keep_sources: bool = False):
        self.keep_sources = keep_sources

    def __call__(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        """Collate.

        Returns:
            As `Collator`, for one row of L = the samples' total length, with `cu_seqlens` (samples + 1,) int32 in place
            of `attention_mask`; `position_ids` restart with every sample, `box_sample` counts samples of the pack.
        """
        if not samples:
            raise ValueError("expected at least one sample to collate, got none")
        lengths = torch.tensor([0, *(len(s.input_ids) for s in samples)])
        batch: dict[str, Any] = {
            "input_ids": torch.cat([s.input_ids for s in samples])[None],
            "cu_seqlens": lengths.cumsum(0).to(torch.int32),
            "position_ids": torch.cat([s.position_ids for s in samples], dim=1)[:, None],
            "labels": torch.cat([s.labels for s in samples])[None],
            "mm_token_type_ids": torch.cat([s.mm_token_type_ids for s in samples])[None],
            **_pack_images(samples),
            **_pack_boxes(samples),
        }
        if self.keep_sources:
            batch["sources"] = [s.source for s in samples]
        return batch


def _pack_images(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    packed = {"image_grid_thw": torch.cat([s.image_grid_thw for s in samples])}
    pixels = [s.pixel_values for s in samples if s.pixel_values is not None]
    features = [s.image_features for s in samples if s.image_features is not None]
    if pixels and features:
        raise DataError(
            "mixed-images",
            f"expected all samples with pixels or all with cached features, got {len(pixels)} with pixels and "
            f"{len(features)} with features; build the feature cache for every image or for none",
            samples[0].source or None,
        )
    if pixels:
        packed["pixel_values"] = torch.cat(pixels)
    if features:
        packed["image_features"] = torch.cat(features)
    return packed


def _pack_boxes(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    counts = torch.tensor([len(s.boxes) for s in samples])
    images = torch.tensor([len(s.image_grid_thw) for s in samples])
    offsets = images.cumsum(0) - images
    return {
        "boxes": torch.cat([s.boxes for s in samples]),
        "box_sample": torch.repeat_interleave(torch.arange(len(samples)), counts),
        "box_image": torch.cat([s.box_images for s in samples]) + torch.repeat_interleave(offsets, counts),
    }
