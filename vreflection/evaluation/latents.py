"""What the latents carry and where they look: swaps, grounding in gold boxes, agreement with the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.boxes import box_mask
from ..data.encode import ImageTokens
from ..data.visual_cot import Sample
from ..model.modeling import VReflectionForConditionalGeneration
from ..ops.regions import MERGE_SIZE
from .questions import Decoded, expected_answer


def stack_latents(decoded: Decoded, like: torch.Tensor) -> torch.Tensor:
    """First-span latents `(questions, Q, D)`; zeros where a question opened no span."""
    return torch.stack([torch.zeros_like(like) if z is None else z for z in decoded.latents])


def swap_partners(samples: Sequence[Sample]) -> list[int]:
    """For each question another one with a different answer, cyclically; so a swapped answer can be recognised."""
    count = len(samples)
    answers = [expected_answer(sample) for sample in samples]
    partners = []
    for index in range(count):
        different = (j % count for j in range(index + 1, index + count) if answers[j % count] != answers[index])
        partner = next(different, None)
        if partner is None:
            raise ValueError("swapping latents needs questions with at least two different answers")
        partners.append(partner)
    return partners


def latent_shape(latents_BND: torch.Tensor) -> dict[str, list[float]]:
    """What latents of many questions are like, per step.

    Args:
        latents_BND: `(questions, N, D)`.

    Returns:
        `norm`: mean length. `rank_over_questions`: effective rank (exponential of the entropy of the normalised squared
        singular values; Roy and Vetterli 2007) of a step's latents about their mean, at most the number of questions
        less one. `next_cosine`: with the step after, N - 1 values. `first_cosine`: with the first step, N - 1 values.
        `mean_cosine`: of a latent with the step's mean over questions; near 1 where all questions get the same.
        `rank_over_steps`: effective rank of one question's N latents, a single mean.
    """
    z = latents_BND.float()
    cosine = torch.nn.functional.cosine_similarity
    return {
        "norm": z.norm(dim=-1).mean(0).tolist(),
        "rank_over_questions": [effective_rank(step - step.mean(0)) for step in z.unbind(1)],
        "next_cosine": cosine(z[:, :-1], z[:, 1:], dim=-1).mean(0).tolist(),
        "first_cosine": cosine(z[:, :1], z[:, 1:], dim=-1).mean(0).tolist(),
        "mean_cosine": cosine(z, z.mean(0, keepdim=True), dim=-1).mean(0).tolist(),
        "rank_over_steps": [float(np.mean([effective_rank(one) for one in z]))],
    }


def effective_rank(rows: torch.Tensor) -> float:
    """Of a matrix `(n, D)`; zero for a matrix of zeros."""
    energy = torch.linalg.svdvals(rows.double()) ** 2
    if not float(energy.sum()):
        return 0.0
    share = energy / energy.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def grounding(maps: Sequence[torch.Tensor], boxes: Sequence[Sequence]) -> dict[str, float]:
    """Attention inside gold boxes, averaged over questions.

    Args:
        maps: attention `(Q, h, w)` per question, rows summing to one; averaged over Q first.
        boxes: per question one normalised box, or several whose tokens count together.

    Returns:
        `mass`: share of attention on the box's tokens. `iou`: overlap of the box's tokens with as many top tokens.
        `uniform`: share of the image the boxes cover, what even attention would get. `n`.
    """
    mass, iou, uniform = [], [], []
    for attention, box in zip(maps, boxes, strict=True):
        mean = attention.float().mean(0).numpy()
        inside = np.any([box_mask(one, *mean.shape) for one in np.atleast_2d(np.asarray(box))], axis=0)
        size = int(inside.sum())
        top = np.zeros(mean.size, dtype=bool)
        top[np.argsort(mean.ravel())[::-1][:size]] = True
        overlap = int((top.reshape(mean.shape) & inside).sum())
        mass.append(float(mean[inside].sum()))
        iou.append(overlap / (2 * size - overlap))
        uniform.append(size / mean.size)
    return {
        "mass": float(np.mean(mass)),
        "iou": float(np.mean(iou)),
        "uniform": float(np.mean(uniform)),
        "n": len(mass),
    }


@torch.no_grad()
def free_running_maps(
    model: VReflectionForConditionalGeneration,
    decoded: Decoded,
    samples: Sequence[Sample],
    cache: Mapping[str, ImageTokens],
) -> list[torch.Tensor | None]:
    """The student's attention `(Q, h, w)` from the probes of real decoding; `None` where no span was opened."""
    maps: list[torch.Tensor | None] = []
    for sample, probes in zip(samples, decoded.probes, strict=True):
        if probes is None:
            maps.append(None)
            continue
        tokens, grid = cache[sample.image_paths[0]]
        grid_hw = [[int(grid[1]) // MERGE_SIZE, int(grid[2]) // MERGE_SIZE]]
        _, found = model.student_resampler(
            probes[None].to(model.device), tokens.to(model.device), grid_hw, [0], return_attention=True
        )
        maps.append(found[0].cpu())
    return maps


def cosine_to_teacher(decoded: Decoded, teacher: Sequence[torch.Tensor]) -> float | None:
    """Mean cosine of fed-back states and the teacher's latents, over slots of questions that opened a span."""
    pairs = [(own, z) for own, z in zip(decoded.latents, teacher, strict=True) if own is not None]
    if not pairs:
        return None
    own, target = (torch.stack(side).float() for side in zip(*pairs))
    return float(torch.nn.functional.cosine_similarity(own, target, dim=-1).mean())
