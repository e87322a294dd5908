"""Where image tokens, latent slots and supervised positions lie in a batch: checked once, on the host.

Shape suffixes: B boxes (= latent spans), Q slots per span, S supervised positions, T image tokens. Positions are flat
indices into `(batch * length)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..ops.regions import MERGE_SIZE, device_tensor, host_array
from .config import VReflectionConfig

IGNORE_INDEX = -100


@dataclass(frozen=True)
class BatchLayout:
    """Host-side facts of one batch, as device indices. Build it before the step: `BatchLayout.from_batch`."""

    image_index_T: torch.Tensor
    slot_index_BQ: torch.Tensor
    supervised_index_S: torch.Tensor
    targets_S: torch.Tensor
    grids: np.ndarray  # (I, 2) tokens
    boxes: np.ndarray  # (B, 4)
    box_sample: np.ndarray  # (B,)
    box_image: np.ndarray  # (B,)
    starts: np.ndarray  # (sequences,) flat position of every sequence
    sequence_lengths: tuple[int, ...] | None = None  # of a packed row

    @property
    def counts(self) -> tuple[int, int]:
        """Supervised positions and boxes: what the losses are means over."""
        return len(self.targets_S), len(self.boxes)

    @property
    def turns_B(self) -> np.ndarray:
        """Each span's place among the spans of its sequence, from 0."""
        return np.arange(len(self.box_sample)) - np.searchsorted(self.box_sample, self.box_sample)

    @classmethod
    def from_batch(
        cls,
        config: VReflectionConfig,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        boxes=None,
        box_sample=None,
        box_image=None,
        cu_seqlens: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        ce_on_latent_slots: bool = False,
        decoding: bool = False,
    ) -> BatchLayout:
        """Check a batch and locate everything in it.

        Args:
            input_ids, labels: `(batch, L)`; with `cu_seqlens` `(1, L)` holding several sequences end to end.
            image_grid_thw: `(I, 3)` in 14-px patches. boxes: `(B, 4)`. box_sample, box_image: `(B,)`.
            device: where the indices go; default that of `input_ids`. Host tensors cost no sync.
            ce_on_latent_slots: keep labels that are `<|lvr|>`; otherwise they are not supervised.
            decoding: spans of a prompt (earlier turns) need no boxes.

        Raises:
            ValueError: image tokens, slots, boxes or labels disagree; the message says which sample and by how much.
        """
        device = input_ids.device if device is None else device
        ids = host_array(input_ids, "input_ids", (input_ids.shape[-1],), np.int64)
        starts = sequence_starts(ids, cu_seqlens)
        grids = host_array(image_grid_thw if image_grid_thw is not None else [], "image_grid_thw", (3,), np.int64)
        if (grids[:, 0] > 1).any():
            raise ValueError("image_grid_thw: expected still images with t = 1; videos are not supported")
        token_grids = grids[:, 1:] // MERGE_SIZE
        image_index = locate_images(ids, config.image_token_id, token_grids)
        slot_index = locate_slots(ids, config, starts)
        boxes = host_array(boxes if boxes is not None else [], "boxes", (4,), np.float64)
        box_sample = host_array(box_sample if box_sample is not None else [], "box_sample", (), np.int64)
        box_image = host_array(box_image if box_image is not None else [], "box_image", (), np.int64)
        if config.traits.teacher and not decoding:
            match_spans_to_boxes(slot_index, len(boxes), box_sample, box_image, starts)
            match_boxes_to_images(box_sample, box_image, token_grids, image_index, starts)
        unsupervised = None if ce_on_latent_slots else config.lvr_id
        supervised, targets = locate_supervision(ids, labels, starts, unsupervised)
        return cls(
            image_index_T=device_tensor(image_index, device),
            slot_index_BQ=device_tensor(slot_index, device),
            supervised_index_S=device_tensor(supervised, device),
            targets_S=device_tensor(targets, device),
            grids=token_grids,
            boxes=boxes,
            box_sample=box_sample,
            box_image=box_image,
            starts=starts,
            sequence_lengths=None if cu_seqlens is None else tuple(np.diff([*starts, ids.size]).tolist()),
        )


def sequence_starts(ids: np.ndarray, cu_seqlens) -> np.ndarray:
    """Flat start of every sequence, ascending from 0."""
    if cu_seqlens is None:
        return np.arange(ids.shape[0]) * ids.shape[1]
    bounds = host_array(cu_seqlens, "cu_seqlens", (), np.int64)
    if (
        ids.shape[0] != 1
        or len(bounds) < 2
        or bounds[0] != 0
        or bounds[-1] != ids.shape[1]
        or (np.diff(bounds) <= 0).any()
    ):
        raise ValueError(
            f"cu_seqlens: expected ascending bounds from 0 to {ids.shape[1]} over input_ids of shape (1, L), "
            f"got {bounds.tolist()} over {tuple(ids.shape)}"
        )
    return bounds[:-1]


def locate_images(ids: np.ndarray, image_token_id: int, token_grids: np.ndarray) -> np.ndarray:
    index = np.flatnonzero(ids.reshape(-1) == image_token_id)
    expected = int((token_grids[:, 0] * token_grids[:, 1]).sum())
    if len(index) != expected:
        raise ValueError(
            f"image tokens and image_grid_thw disagree: {len(index)} image tokens in input_ids, the grids "
            f"{token_grids.tolist()} (tokens) need {expected}; was a sample cut inside an image?"
        )
    return index


def sample_of(index: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sequence each flat position lies in."""
    return np.searchsorted(starts, index, side="right") - 1


def locate_slots(ids: np.ndarray, config: VReflectionConfig, starts: np.ndarray) -> np.ndarray:
    """Flat slot positions `(spans, Q)`; each span is `<|lvr_start|>` and Q consecutive `<|lvr|>`."""
    flat = ids.reshape(-1)
    index = np.flatnonzero(flat == config.lvr_id)
    if config.traits.slot_input == "none":
        return np.zeros((0, 0), dtype=np.int64)
    slots = config.num_latent_tokens
    if len(index) % slots:
        raise ValueError(f"latent slots: expected a multiple of num_latent_tokens = {slots}, got {len(index)}")
    index = index.reshape(-1, slots)
    broken = (np.diff(index, axis=1) != 1).any(axis=1) | (flat[index[:, 0] - 1] != config.lvr_start_id)
    # The start token in front of the slots belongs to the same sequence as the last of them.
    broken |= sample_of(index[:, 0] - 1, starts) != sample_of(index[:, -1], starts)
    if broken.any():
        sample = int(sample_of(index[np.flatnonzero(broken)[0], :1], starts)[0])
        raise ValueError(
            f"latent span in sample {sample}: expected <|lvr_start|> and {slots} consecutive <|lvr|>; "
            "was the text cut inside a span, or made for another number of latents?"
        )
    return index


def match_spans_to_boxes(
    slot_index: np.ndarray, num_boxes: int, box_sample: np.ndarray, box_image: np.ndarray, starts: np.ndarray
) -> None:
    if not num_boxes == len(box_sample) == len(box_image):
        raise ValueError(
            f"expected one sample and one image per box, got {num_boxes} boxes, {len(box_sample)} values of "
            f"box_sample, {len(box_image)} of box_image"
        )
    if ((box_sample < 0) | (box_sample >= len(starts))).any():
        raise ValueError(f"box_sample: expected values in [0, {len(starts)}), got {box_sample.tolist()}")
    span_sample = sample_of(slot_index[:, 0], starts) if len(slot_index) else box_sample[:0]
    spans = np.bincount(span_sample, minlength=len(starts))
    boxes = np.bincount(box_sample, minlength=len(starts))
    bad = np.flatnonzero(spans != boxes)
    if len(bad):
        detail = ", ".join(f"sample {s}: {spans[s]} spans, {boxes[s]} boxes" for s in bad[:4])
        raise ValueError(f"every latent span needs exactly one box: {detail}")
    if (span_sample != box_sample).any():
        raise ValueError(f"box_sample: expected boxes in the order of their samples, got {box_sample.tolist()}")


def match_boxes_to_images(
    box_sample: np.ndarray, box_image: np.ndarray, token_grids: np.ndarray, image_index: np.ndarray, starts: np.ndarray
) -> None:
    if ((box_image < 0) | (box_image >= len(token_grids))).any():
        raise ValueError(f"box_image: expected values in [0, {len(token_grids)}), got {box_image.tolist()}")
    sizes = token_grids[:, 0] * token_grids[:, 1]
    image_sample = sample_of(image_index[np.cumsum(sizes) - sizes], starts)
    bad = np.flatnonzero(image_sample[box_image] != box_sample)
    if len(bad):
        box, image = int(bad[0]), int(box_image[bad[0]])
        raise ValueError(
            f"box_image: box {box} of sample {box_sample[box]} lies in image {image}, which belongs to sample "
            f"{image_sample[image]}; images are counted over the whole batch"
        )


def locate_supervision(
    ids: np.ndarray, labels, starts: np.ndarray, unsupervised_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions whose next token is supervised, and those tokens; never across a sequence boundary."""
    if labels is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    flat = host_array(labels, "labels", (ids.shape[1],), np.int64).reshape(-1)
    if flat.size != ids.size:
        raise ValueError(f"labels: expected the shape of input_ids {tuple(ids.shape)}, got {tuple(labels.shape)}")
    target = (flat != IGNORE_INDEX) & (flat != unsupervised_id)
    target[starts] = False
    index = np.flatnonzero(target)
    return index - 1, flat[index]


def fill_slots(embeds, latents_BQD, layout: BatchLayout, slot_inputs, free_running) -> torch.Tensor:
    """Put latents into the slots; rows of `free_running` take `slot_inputs` instead."""
    if slot_inputs is not None:
        latents_BQD = torch.where(free_running[:, None, None], slot_inputs.to(latents_BQD.dtype), latents_BQD)
    flat = embeds.flatten(0, 1)
    filled = flat.index_copy(0, layout.slot_index_BQ.flatten(), latents_BQD.flatten(0, 1).to(flat.dtype))
    return filled.view_as(embeds)
