"""What the latents carry and where they look: swaps, grounding in gold boxes, agreement with the teacher.

Shape suffixes: S spans of an answer, B boxes of a question, N latents per span, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.boxes import box_mask
from ..data.encode import ImageTokens
from ..data.visual_cot import Sample
from ..model.modeling import VReflectionForConditionalGeneration
from ..ops.regions import MERGE_SIZE
from .questions import Decoded, expected_answer


def partners_of(
    answers: Sequence[str], images: Sequence[str], spans: Sequence[int], usable: Sequence[bool] | None = None
) -> list[int | None]:
    """For each usable question the next usable one, cyclically, with another answer, on another image, and with as many
    spans; `None` where there is none. So a swapped answer can be recognised, and every span has its counterpart."""
    count = len(answers)
    usable = [True] * count if usable is None else usable

    def fits(index: int, other: int) -> bool:
        same_form = usable[other] and spans[other] == spans[index]
        return same_form and answers[other] != answers[index] and images[other] != images[index]

    partners: list[int | None] = [None] * count
    for index in (i for i in range(count) if usable[i]):
        after = ((index + step) % count for step in range(1, count))
        partners[index] = next((other for other in after if fits(index, other)), None)
    return partners


def sample_partners(samples: Sequence[Sample]) -> list[int | None]:
    """`partners_of` samples. Who has a partner is also one, so leaving out those without leaves nobody else alone."""
    answers = [expected_answer(sample) for sample in samples]
    images = ["|".join(map(str, sample.image_paths)) for sample in samples]
    return partners_of(answers, images, [len(sample.boxes) for sample in samples])


def swap_partners(samples: Sequence[Sample]) -> list[int]:
    """For each question another one with another answer, on another image, with as many boxes; cyclically.

    Raises:
        ValueError: some question has none; `sample_partners` says which.
    """
    partners = sample_partners(samples)
    if None in partners:
        alone = samples[partners.index(None)]
        raise ValueError(
            f"swapping latents needs, for each question, one with another answer on another image and as many boxes; "
            f"{alone.source} ({len(alone.boxes)} boxes) has none"
        )
    return partners  # pyright: ignore[reportReturnType]


def partners_latents(decoded: Decoded, partners: Sequence[int | None]) -> list[torch.Tensor | None]:
    """The partner's latents `(S, N, D)` per question, for `decode_answers`; zeros where the partner opened no span.

    `None`, which leaves the question its own, where it has no partner.
    """
    gone_through = next((z for z in decoded.latents if z is not None), None)
    zeros = None if gone_through is None else torch.zeros_like(gone_through[:1])
    taken = [None if partner is None else (decoded.latents[partner], zeros) for partner in partners]
    return [None if pair is None else pair[1] if pair[0] is None else pair[0] for pair in taken]


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
    z = latents_BND.double()
    return {
        "norm": z.norm(dim=-1).mean(0).tolist(),
        "rank_over_questions": [effective_rank(step - step.mean(0)) for step in z.unbind(1)],
        "next_cosine": cosine(z[:, :-1], z[:, 1:]).mean(0).tolist(),
        "first_cosine": cosine(z[:, :1], z[:, 1:]).mean(0).tolist(),
        "mean_cosine": cosine(z, z.mean(0, keepdim=True)).mean(0).tolist(),
        "rank_over_steps": [float(np.mean([effective_rank(one) for one in z]))],
    }


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Cosine along the last dimension, of vectors of any length; 0 with a vector of zeros. Float64."""
    # The library's default counts vectors shorter than 1e-8 as longer than they are.
    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1, eps=1e-100)


def effective_rank(rows: torch.Tensor) -> float:
    """Of a matrix `(n, D)`; zero for a matrix of zeros."""
    energy = torch.linalg.svdvals(rows.double()) ** 2
    if not float(energy.sum()):
        return 0.0
    share = energy / energy.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


SpanMaps = torch.Tensor | list[torch.Tensor]  # (N, h, w) of one span, or of each of several


def grounding(maps: Sequence[SpanMaps], boxes: Sequence[Sequence]) -> dict[str, float]:
    """Attention inside gold boxes, averaged over questions, and over the spans of a question.

    Args:
        maps: per question, attention `(N, h, w)`, rows summing to one and averaged over N first; or a list of such, one
            per span, for each of which only the box of its own number counts (spans beyond the boxes are left out).
        boxes: per question one normalised box, or several, whose tokens count together where the maps are of one span.

    Returns:
        `mass`: share of attention on the box's tokens. `iou`: overlap of the box's tokens with as many top tokens.
        `uniform`: share of the image the boxes cover, what even attention would get. `n`: questions.
    """
    rows = []
    for spans, box in zip(maps, boxes, strict=True):
        all_boxes = np.atleast_2d(np.asarray(box, dtype=float))
        if torch.is_tensor(spans):
            pairs = [(spans, all_boxes)]
        else:
            pairs = [(attention, one[None]) for attention, one in zip(spans, all_boxes)]
        if pairs:
            rows.append(np.mean([box_attention(attention, each) for attention, each in pairs], axis=0))
    mass, iou, uniform = map(float, np.mean(rows, axis=0)) if rows else (math.nan,) * 3
    return {"mass": mass, "iou": iou, "uniform": uniform, "n": len(rows)}


def box_attention(attention_NHW: torch.Tensor, boxes: Sequence | np.ndarray) -> tuple[float, float, float]:
    """`mass`, `iou` and `uniform` of one span and the boxes `(B, 4)` together; see `grounding`."""
    mean = attention_NHW.float().mean(0).numpy()
    inside = np.any([box_mask(one, *mean.shape) for one in boxes], axis=0)
    size = int(inside.sum())
    top = np.zeros(mean.size, dtype=bool)
    top[np.argsort(mean.ravel())[::-1][:size]] = True
    overlap = int((top.reshape(mean.shape) & inside).sum())
    return float(mean[inside].sum()), overlap / (2 * size - overlap), size / mean.size


def hop_grounding(
    maps: Sequence[Sequence[torch.Tensor] | None],
    boxes: Sequence[Sequence],
    candidates: Sequence[Sequence] | None = None,
    images: Sequence[Sequence[int]] | None = None,
) -> list[dict[str, float | int | None]]:
    """Where each span of a chain looks: entry j is about span j, whose box is number j.

    Args:
        maps: per question attention `(N, h, w)` per span, or `None` (no span was opened).
        boxes: per question its boxes in the order of the spans.
        candidates: per question what a span might look at instead, on the same image; default its other boxes.
        images: per question the image of each box, where they may differ: only boxes on one image compete.

    Returns:
        Per span: `mass`, `iou`, `uniform` as in `grounding` and `n`, the questions with such a span and box.
        `right_box`: share of questions in which more attention lies in box j than in any other candidate; `chance`:
        what guessing among them would get; `compared`: questions with another candidate at all.
    """
    spans: list[list[tuple[float, float, float]]] = []
    guesses: list[list[tuple[bool, float]]] = []
    for number, (own_maps, own_boxes) in enumerate(zip(maps, boxes, strict=True)):
        all_rivals = np.asarray(own_boxes if candidates is None else candidates[number], dtype=float).reshape(-1, 4)
        for span, (attention, box) in enumerate(zip(own_maps or (), np.asarray(own_boxes, dtype=float))):
            if span == len(spans):
                spans.append([])
                guesses.append([])
            looked = box_attention(attention, box[None])
            spans[span].append(looked)
            on_image = slice(None)
            if images is not None and candidates is None:
                on_image = np.asarray(images[number]) == images[number][span]
            rivals = all_rivals[on_image]
            # Once each: a chain may come back to a box.
            others = [other for other in np.unique(rivals, axis=0) if not np.array_equal(other, box)]
            if others:
                most = max(box_attention(attention, other[None])[0] for other in others)
                guesses[span].append((looked[0] > most, 1 / (1 + len(others))))
    table: list[dict[str, float | int | None]] = []
    for looks, guessed in zip(spans, guesses):
        right, chance = map(float, np.mean(guessed, axis=0)) if guessed else (None, None)
        mass, iou, uniform = map(float, np.mean(looks, axis=0))
        table.append(
            {"mass": mass, "iou": iou, "uniform": uniform, "n": len(looks), "right_box": right, "chance": chance,
             "compared": len(guessed)}
        )  # fmt: skip
    return table


@torch.no_grad()
def free_running_maps(
    model: VReflectionForConditionalGeneration,
    decoded: Decoded,
    samples: Sequence[Sample],
    cache: Mapping[str, ImageTokens],
) -> list[list[torch.Tensor] | None]:
    """The student's attention `(N, h, w)` per span from the probes of real decoding; `None` where none was opened.

    A span looks at the image of the box of its number, one beyond the boxes at that of the last.
    """
    maps: list[list[torch.Tensor] | None] = []
    for sample, probes in zip(samples, decoded.probes, strict=True):
        if probes is None:
            maps.append(None)
            continue
        images = [cache[path] for path in sample.image_paths]
        grids = [[int(grid[1]) // MERGE_SIZE, int(grid[2]) // MERGE_SIZE] for _, grid in images]
        of_box = [int(image) for image in sample.box_images] or [0]
        of_span = [of_box[min(span, len(of_box) - 1)] for span in range(len(probes))]
        tokens = torch.cat([tokens for tokens, _ in images]).to(model.device)
        _, attention = model.student_resampler(
            probes.to(model.device), tokens, grids, of_span, return_attention=True
        )  # fmt: skip
        maps.append([one.cpu() for one in attention])
    return maps


def cosine_to_teacher(decoded: Decoded, teacher: Sequence[torch.Tensor]) -> float | None:
    """Mean cosine of fed-back states and the teacher's latents `(B, N, D)`, over the slots of all spans with a box."""
    pairs = [(own[: len(z)], z[: len(own)]) for own, z in zip(decoded.latents, teacher, strict=True) if own is not None]
    if not pairs:
        return None
    own, target = (torch.cat(list(side)) for side in zip(*pairs))
    return float(cosine(own, target).mean())
