"""A training step as one would write it straight down, on the weights of our model: the baseline of bench_training.py.

One right-padded batch; vision tower in every step; regions and images padded to the largest, stock
`nn.MultiheadAttention` with a key-padding mask; logits at all positions in float32; the teacher run twice in stage 2,
for the slots and for the loss. No part of it is slowed down on purpose.

Shape suffixes: B boxes, Q slots, D width, N keys padded to the largest, L padded length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.ops.regions import window_token_rects

IGNORE = -100


def naive_losses(model: VReflectionForConditionalGeneration, batch: dict) -> dict[str, torch.Tensor]:
    """Losses of a stage for a padded batch of `vreflection.data.collate.Collator`: its parts, and their sum `loss`."""
    ids, labels = batch["input_ids"], batch["labels"]
    features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    images = list(features)
    embeds = model.get_input_embeddings()(ids)
    image_mask = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(image_mask, torch.cat(images))
    regions, region_index = box_regions(images, batch)
    stage2 = model.config.stage == "stage2"
    with torch.set_grad_enabled(not stage2):
        teacher, _ = compress(model.box_feature_resampler, None, regions, need_weights=False)
    slot_mask = (ids == model.config.lvr_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(slot_mask, teacher.detach().to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden).float()
    if stage2:
        labels = labels.masked_fill(labels == model.config.lvr_id, IGNORE)
    # The labels are shifted, not the logits: as the host library does, without a copy of the largest tensor.
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORE)
    slots = (ids == model.config.lvr_id).flatten().nonzero()[:, 0].view(len(teacher), -1)
    states = hidden.flatten(0, 1)
    if not stage2:
        before = states[slots - 1]
        alignment = 0.5 * F.mse_loss(before.detach(), teacher) + 0.5 * F.mse_loss(before, teacher.detach())
        return {
            "cross_entropy": cross_entropy,
            "latent_alignment": alignment,
            "loss": cross_entropy + model.objective.alignment_weight * alignment,
        }
    parts = distillation(model, states[slots], images, regions, region_index, batch["box_image"])
    loss = cross_entropy + model.objective.distillation_weight * (
        parts["latent_mse"] + model.objective.attention_kl_weight * parts["attention_kl"]
    )
    return {"cross_entropy": cross_entropy, **parts, "loss": loss}


def box_regions(images: list[torch.Tensor], batch: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per box its region's visual tokens, and their places in the image."""
    regions, places = [], []
    grids = batch["image_grid_thw"][batch["box_image"]][:, 1:]
    rects = window_token_rects(batch["boxes"].numpy(), grids.numpy())
    for rect, grid, image in zip(rects, grids, batch["box_image"].tolist()):
        y0, y1, x0, x1 = rect.tolist()
        width = int(grid[1]) // 2
        place = (torch.arange(y0, y1)[:, None] * width + torch.arange(x0, x1)).flatten()
        regions.append(images[image][place])
        places.append(place)
    return regions, places


def compress(module, probes: torch.Tensor | None, keys: list[torch.Tensor], need_weights: bool):
    """Stock attention over keys padded to the largest set: `(B, Q, D)` and, if asked for, `(B, Q, N)`."""
    padded = pad_sequence(keys, batch_first=True)
    lengths = torch.tensor([len(key) for key in keys])
    hidden_keys = torch.arange(padded.shape[1]) >= lengths[:, None]
    queries = module.queries.expand(len(keys), -1, -1) if probes is None else probes
    out, weights = module.cross_attn(
        queries, padded, padded, key_padding_mask=hidden_keys, need_weights=need_weights, average_attn_weights=True
    )
    return module.output_norm(out), weights


def distillation(model, probes, images, regions, region_index, box_image) -> dict[str, torch.Tensor]:
    """Mean squared error of the latents and KL of the attention on the whole image."""
    with torch.no_grad():
        teacher, region_maps = compress(model.box_feature_resampler, None, regions, need_weights=True)
    keys = [images[image] for image in box_image.tolist()]
    student, student_maps = compress(model.student_resampler, probes, keys, need_weights=True)
    teacher_maps = torch.zeros_like(student_maps)
    for box, place in enumerate(region_index):
        teacher_maps[box, :, place] = region_maps[box, :, : len(place)]
    terms = torch.where(
        teacher_maps > 0, teacher_maps * (teacher_maps.clamp(min=1e-30).log() - (student_maps + 1e-9).log()), 0.0
    )
    return {"latent_mse": F.mse_loss(student, teacher), "attention_kl": terms.sum() / len(regions)}
