"""Where the model looks while it takes latent steps: one map over the image per step, from a real decoding.

Definitions in words: docs/visualization.md.

Shape suffixes: N latent steps of all spans, D width, L prompt tokens, T visual tokens, Q latents of the teacher; h, w
an image's token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.boxes import box_mask
from ..engine.decoder import LatentDecoder
from ..engine.requests import Generation, Prompt
from ..engine.steps import eval_mode
from ..errors import ConfigError, DataError
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..ops.regions import MERGE_SIZE
from .attention_record import Watch, watching

SOURCES = ("auto", "student", "language-model")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Attention:
    """Whose attention to show.

    Attributes:
        source: `student`, `language-model`, or `auto`: the student where the checkpoint carries one.
        layers, heads: of the language model, counted from 0; the mean over all where None.
        rollout: the language model's attention rolled out over all layers and heads.
    """

    source: str = "auto"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rollout: bool = False

    def resolve(self, model: VReflectionForConditionalGeneration) -> Attention:
        """With the source settled.

        Raises:
            ConfigError: something this model does not have.
        """
        chosen = self.layers is not None or self.heads is not None or self.rollout
        student = model.config.traits.student
        if self.source not in SOURCES:
            raise ConfigError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.source == "student" and not student:
            raise ConfigError(
                f"source: expected a checkpoint with the student (stage2) for student, got stage "
                f"{model.config.stage!r}; use language-model"
            )
        if self.source == "student" and chosen:
            raise ConfigError("source: layers, heads and rollout are the language model's; use source=language-model")
        if self.rollout and (self.layers is not None or self.heads is not None):
            raise ConfigError("rollout: expected no layers or heads with it, it runs over all; leave one of them out")
        text = model.config.get_text_config()
        for name, given, count in (
            ("layers", self.layers, text.num_hidden_layers),
            ("heads", self.heads, text.num_attention_heads),
        ):
            if given is not None and (not given or not all(0 <= value < count for value in given)):
                raise ConfigError(f"{name}: expected numbers from 0 to {count - 1}, got {list(given)}; choose others")
        if self.source == "auto":
            return replace(self, source="student" if student and not chosen else "language-model")
        return self

    @property
    def title(self) -> str:
        """In words, once resolved."""
        if self.source == "student":
            return "student"
        if self.rollout:
            return "language model, rollout"
        parts = [
            f"{name}{'' if len(given) == 1 else 's'} {', '.join(map(str, given))}"
            for name, given in (("layer", self.layers), ("head", self.heads))
            if given is not None
        ]
        return ", ".join(["language model", *(parts or ["mean of layers and heads"])])


@dataclass(frozen=True)
class Looks:
    """Where one answer's latent steps look; everything on the host, maps in float32.

    Attributes:
        attention: as resolved. answer: text without special tokens and latent positions. generation: all of it.
        maps: per image `(N, h, w)`, each step's map summing to one; N is 0 where no span was finished.
        span: per step, the span it belongs to, from 0.
        latents: `(N, D)` states consumed.
        image_mass: `(images, N)`, with the language model: share of its attention that goes to each image at all.
        boxes, box_images: given ones, box j belonging to span j, and the image each lies in. teacher: per box
            `(Q, h, w)`, where the checkpoint carries the teacher; sums to one, zero outside the box.
    """

    attention: Attention
    answer: str
    generation: Generation
    maps: tuple[torch.Tensor, ...]
    span: tuple[int, ...]
    latents: torch.Tensor
    image_mass: torch.Tensor | None = None
    boxes: tuple[Box, ...] = ()
    box_images: tuple[int, ...] = ()
    teacher: tuple[torch.Tensor, ...] | None = None

    @property
    def steps(self) -> int:
        return len(self.span)

    def in_box(self, box: int = 0) -> list[float]:
        """Per step, share of the attention inside a given box: on the tokens it covers under the window rule."""
        return share_in_box(self.maps[self.box_images[box]], self.boxes[box])

    @property
    def spans(self) -> int:
        return max(self.span, default=-1) + 1

    def box_of(self, span: int) -> int | None:
        """Number of the box that belongs to a span: box j to span j, a box alone to every span."""
        if len(self.boxes) == 1:
            return 0
        return span if span < len(self.boxes) else None

    def in_own_box(self) -> list[float | None]:
        """Per step, share of the attention inside the box that belongs to its span; None without one."""
        shares = [self.in_box(box) for box in range(len(self.boxes))]
        own = [self.box_of(span) for span in self.span]
        return [None if box is None else shares[box][step] for step, box in enumerate(own)]

    def shares(self, image: int = 0) -> list[float | None] | None:
        """Per step, share inside the boxes that a figure shows with it; None where an image has no boxes.

        An answer of one span has all boxes in it; with several, each has its own, which may lie in another image.
        """
        if self.spans < 2 or len(self.boxes) < 2:
            shares = self.in_boxes(image)
            return None if shares is None else list(shares)
        if not self.boxes_of(image):
            return None
        own = [self.box_of(span) for span in self.span]
        here = [box is not None and self.box_images[box] == image for box in own]
        return [share if shown else None for share, shown in zip(self.in_own_box(), here)]

    def shown_boxes(self, image: int, span: int | None) -> list[tuple[int | None, Box]]:
        """Boxes to draw on an image: all, or with a map of one of several spans the one that is its own.

        Returns:
            pairs of a number from 1 and a box; None for the number unless several boxes belong to several spans.
        """
        numbers = [number for number, place in enumerate(self.box_images) if place == image]
        if span is not None and self.spans > 1:
            numbers = [number for number in numbers if number == self.box_of(span)]
        numbered = self.spans > 1 and len(self.boxes) > 1
        return [(number + 1 if numbered else None, self.boxes[number]) for number in numbers]

    def boxes_of(self, image: int) -> list[Box]:
        return [box for box, place in zip(self.boxes, self.box_images) if place == image]

    def in_boxes(self, image: int = 0) -> list[float] | None:
        """Per step, share inside any of an image's boxes; None without boxes."""
        boxes, maps = self.boxes_of(image), self.maps[image]
        if not boxes:
            return None
        inside = np.any([box_mask(box, *maps.shape[1:]) for box in boxes], axis=0)
        return maps[:, torch.from_numpy(inside)].sum(-1).tolist()


def share_in_box(maps_Nhw: torch.Tensor, box: Sequence[float]) -> list[float]:
    """Per map, what lies on the tokens that a box covers under the window rule."""
    mask = torch.from_numpy(box_mask(box, *maps_Nhw.shape[1:]))
    return maps_Nhw[:, mask].sum(-1).tolist()


def checked_box(box: Sequence[float], name: str = "box") -> Box:
    """Four fractions of the image.

    Raises:
        DataError: anything else.
    """
    values = tuple(float(edge) for edge in box)
    if len(values) != 4 or not (0 <= values[0] < values[2] <= 1 and 0 <= values[1] < values[3] <= 1):
        raise DataError(
            "box",
            f"{name}: expected x0,y0,x1,y1 as fractions of the image with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, "
            f"got {list(values)}; divide pixels by the image's width and height",
        )
    return values


def look(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    images: Sequence[Image.Image | str | Path],
    question: str,
    *,
    attention: Attention | None = None,
    boxes: Sequence[Sequence[float]] = (),
    box_images: Sequence[int] | None = None,
    decoder: LatentDecoder | None = None,
    **settings: Any,
) -> Looks:
    """Ask one question with the real decode loop and say where its latent steps look.

    Args:
        images: at least one. boxes, box_images: see `maps_of`.
        decoder: to use one for many questions; default a new one.
        settings: of `LatentDecoder.request`, such as `force_latent` and `max_new_tokens`.

    Raises:
        ConfigError: settings, or an attention this model does not have. DataError: an unusable image, text or box.
    """
    if not images:
        raise DataError("image-missing", "expected at least one image, got none; there would be nothing to look at")
    attention = (attention or Attention()).resolve(model)
    check_takes_latents(model)
    prompt = with_features(model, Prompt.of(processor([list(images)], question, return_position_ids=True)))
    decoder = decoder or LatentDecoder(model, max_batch_size=1)
    settings = {"repetition_penalty": 1.0, "do_sample": False, "seed": 0} | settings
    answer = decoder.generate([decoder.request(prompt, return_latents=True, **settings)])[0]
    return maps_of(model, prompt, answer, processor=processor, attention=attention, boxes=boxes, box_images=box_images)


def check_takes_latents(model: VReflectionForConditionalGeneration) -> None:
    """ConfigError for a checkpoint without latent steps: there is nothing to show."""
    if model.config.traits.slot_input == "none":
        raise ConfigError(
            f"model: expected a checkpoint with latent steps (stage1, stage2, filler or decode), got stage "
            f"{model.config.stage!r}; choose another"
        )


@torch.no_grad()
def with_features(model: VReflectionForConditionalGeneration, prompt: Prompt) -> Prompt:
    """The prompt with its visual tokens computed, so that the vision tower runs once for decoding and maps."""
    if prompt.pixel_values is None or prompt.image_grid_thw is None:
        return prompt
    tokens = model.visual_tokens(prompt.pixel_values.to(model.device), prompt.image_grid_thw.to(model.device))
    return replace(prompt, pixel_values=None, image_features=tokens)


@torch.no_grad()
def maps_of(
    model: VReflectionForConditionalGeneration,
    prompt: Prompt,
    generation: Generation,
    *,
    processor: VReflectionProcessor | None = None,
    attention: Attention | None = None,
    boxes: Sequence[Sequence[float]] = (),
    box_images: Sequence[int] | None = None,
    teacher: bool = True,
) -> Looks:
    """Maps of a finished answer.

    The student costs one small attention; the language model one more forward over prompt and answer, during which no
    other thread may run the model.

    Args:
        prompt: what was answered, with images; `with_features` saves a second run of the vision tower.
        generation: decoded with `return_latents=True` and without `hide_images`.
        processor: makes `Looks.answer` where the generation carries no text.
        boxes: `x0, y0, x1, y1` as fractions, for shares and the teacher. box_images: the image each lies in; default
            the first. teacher: whether to make the teacher's maps of the boxes.

    Raises:
        ConfigError: an attention this model does not have. DataError: a box that is none.
        ValueError: a prompt without images, or a generation without recorded states.
    """
    attention = (attention or Attention()).resolve(model)
    if prompt.image_grid_thw is None or not len(prompt.image_grid_thw):
        raise ValueError("prompt: expected images to look at, got none")
    grids = [(int(h) // MERGE_SIZE, int(w) // MERGE_SIZE) for _, h, w in prompt.image_grid_thw.tolist()]
    given = tuple(checked_box(box, f"box {number}") for number, box in enumerate(boxes))
    places = tuple(box_images) if box_images is not None else (0,) * len(given)
    if len(places) != len(given) or not all(0 <= place < len(grids) for place in places):
        raise DataError(
            "box", f"box_images: expected one of the images 0 to {len(grids) - 1} per box, got {list(places)}"
        )
    slots = finished_slots(generation)
    with eval_mode(model):
        embeds_LD, positions_3L = prompt_inputs(model, prompt)
        image = torch.nonzero(prompt.input_ids.to(embeds_LD.device) == model.config.image_token_id)[:, 0]
        tokens_TD = embeds_LD[image]
        mass = None
        if attention.source == "student":
            maps = _student_maps(model, tokens_TD, grids, generation, slots)
        else:
            maps, mass = _language_maps(model, embeds_LD, positions_3L, image, grids, generation, slots, attention)
        teacher_maps = _teacher_maps(model, tokens_TD, grids, given, places) if given and teacher else None
    text = generation.text
    if text is None:
        shown = [token for token, inside in zip(generation.tokens, generation.latent) if not inside]
        text = "" if processor is None else processor.decode(shown)
    steps = generation.latents.shape[1] if generation.latents is not None else 0
    latents = torch.zeros(0, model.config.hidden_width) if generation.latents is None else generation.latents
    return Looks(
        attention, text, generation, maps, tuple(number // steps for number in range(len(slots))),
        latents.reshape(-1, latents.shape[-1]).float().cpu(), mass, given, places, teacher_maps,
    )  # fmt: skip


def finished_slots(generation: Generation) -> list[int]:
    """Places in the answer that consumed a latent, of whole spans.

    Raises:
        ValueError: nothing was recorded.
    """
    if generation.latents is None:
        if any(generation.latent):
            raise ValueError("generation: expected recorded latents, got none; decode with return_latents=True")
        return []
    consumed = [place for place, inside in enumerate(generation.latent[:-1]) if inside]
    return consumed[: generation.latents.shape[0] * generation.latents.shape[1]]


def prompt_inputs(model: VReflectionForConditionalGeneration, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(L, D)` with visual tokens in their places, and rope positions `(3, L)`."""
    device = model.device
    if prompt.embeds is not None and prompt.position_ids is not None:
        return prompt.embeds.to(device), prompt.position_ids[-3:].to(device)
    there = {name: value.to(device) for name in Prompt.FIELDS if (value := getattr(prompt, name)) is not None}
    rows = {name: value[None] for name, value in there.items() if name in ("input_ids", "mm_token_type_ids")}
    if "position_ids" in there:
        rows["position_ids"] = there["position_ids"][:, None]
    embeds, positions = model.prompt_inputs(**{**there, **rows})
    return embeds[0], positions[-3:, 0]


def _student_maps(model, tokens_TD, grids, generation: Generation, slots: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The student's attention from the hidden states it was trained on, to each image by itself."""
    if not slots or generation.step_hidden is None:
        return tuple(torch.zeros(0, h, w) for h, w in grids)
    student = model.student_resampler
    reference = next(student.parameters())
    # The input at place p of the answer gave the hidden state whose logits are those of place p + 1.
    after = [place + 1 + model.objective.probe_offset for place in slots]
    probes_ND = generation.step_hidden[after].to(reference)
    count = len(grids)
    _, maps = student(
        probes_ND.expand(count, -1, -1), tokens_TD.to(reference), torch.tensor(grids), torch.arange(count),
        return_attention=True,
    )  # fmt: skip
    return tuple(one.float().cpu() for one in maps)


def _teacher_maps(model, tokens_TD, grids, boxes, box_images) -> tuple[torch.Tensor, ...] | None:
    if not model.config.traits.teacher:
        return None
    teacher = model.box_feature_resampler
    reference = next(teacher.parameters())
    _, maps = teacher(
        tokens_TD.to(reference), torch.tensor(grids), torch.tensor(boxes, dtype=torch.float64),
        torch.tensor(box_images), return_attention=True,
    )  # fmt: skip
    return tuple(one.float().cpu() for one in maps)


def _language_maps(model, embeds_LD, positions_3L, image, grids, generation, slots, attention: Attention):
    """The language model's attention rows at the latent positions, one forward over prompt and answer."""
    if not slots:
        return tuple(torch.zeros(0, h, w) for h, w in grids), torch.zeros(len(grids), 0)
    length, device = len(embeds_LD), embeds_LD.device
    count = slots[-1] + 1
    ids = torch.tensor(generation.tokens[:count], device=device)
    answer = model.get_input_embeddings()(ids)
    inside = torch.tensor(slots, device=device)
    answer[inside] = generation.latents.reshape(-1, answer.shape[-1]).to(answer)
    later = positions_3L.max() + 1 + torch.arange(count, device=device)
    layers = attention.layers if attention.layers is None else tuple(sorted(set(attention.layers)))
    seen = model.config.get_text_config().num_hidden_layers if layers is None else len(layers)
    watch = Watch(length + inside, image, seen, layers, attention.heads, attention.rollout)
    decoder = model.model.language_model
    with watching(decoder):
        decoder(
            inputs_embeds=torch.cat([embeds_LD, answer.to(embeds_LD)])[None],
            # Taken as it is: no mask is made, the attention is causal.
            attention_mask={"full_attention": None},
            position_ids=torch.cat([positions_3L, later.expand(3, -1)], dim=1)[:, None],
            use_cache=False,
            watch=watch,
        )
    parts = watch.weights().cpu().split([h * w for h, w in grids], dim=1)
    mass = torch.stack([part.sum(1) for part in parts])
    if not bool((mass > 0).all()):
        raise ValueError("maps: the chosen heads give some image no attention at all; choose other layers or heads")
    maps = tuple((part / part.sum(1, keepdim=True)).view(-1, h, w) for part, (h, w) in zip(parts, grids))
    return maps, mass
