"""Ask a model questions in batches, by real decoding or with teacher latents in the slots.

Shape suffixes: S spans of an answer, B boxes of a question, N latents per span, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

import torch

from ..data.collate import Collator
from ..data.encode import EncodedSample, ImageTokens, encode_prompt, encode_sample
from ..data.template import extract_answer
from ..data.visual_cot import Sample
from ..engine.decoder import LatentDecoder
from ..engine.requests import Prompt, Request
from ..model.layout import BatchLayout
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor

Progress = Callable[[int, int], None]


def expected_answer(sample: Sample) -> str:
    answer = extract_answer(sample.conversations[-1].text)
    if answer is None:
        raise ValueError(f"{sample.source}: the answer turn has no <answer> … </answer>")
    return answer


@dataclass
class Decoded:
    """Results of real decoding, one entry per question.

    Attributes:
        texts: decoded answers. answers: what stands in `<answer>`, or `None`.
        latents, probes: `(S, N, D)` of all spans, or `None` where none was gone through.
        spans: how many spans were opened. closed: whether there is one, and `<|lvr_end|>` came right after each.
    """

    texts: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    latents: list[torch.Tensor | None] = field(default_factory=list)
    probes: list[torch.Tensor | None] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    @property
    def triggered(self) -> list[bool]:
        """Whether a span was opened."""
        return [count > 0 for count in self.spans]

    def correct(self, samples: Sequence[Sample]) -> int:
        return sum(answer == expected_answer(s) for answer, s in zip(self.answers, samples, strict=True))


def batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def prompt_of(sample: Sample, processor: VReflectionProcessor, cache: Mapping[str, ImageTokens] | None):
    """The question's prompt, from cached visual tokens or from the image files."""
    tokens = None if cache is None else [cache[path] for path in sample.image_paths]
    return encode_prompt(
        sample.conversations[0].text, processor, sample.image_paths, tokens, source=sample.source,
        image_view=sample.image_view,
    )  # fmt: skip


def decode_answers(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    samples: Sequence[Sample],
    cache: Mapping[str, ImageTokens] | None = None,
    *,
    latents: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    batch_size: int = 128,
    max_new_tokens: int = 24,
    latent_mode: str = "clean",
    on_progress: Progress | None = None,
    **settings,
) -> Decoded:
    """Decode every question's answer greedily.

    Args:
        latents: per question the states to consume instead of the model's own: `(S, N, D)`, of which span j takes
            number j modulo S, or `(N, D)` for every span, or `None`; or all of these stacked in one tensor.
        batch_size: questions decoded together; the next one starts when one has ended.
        settings: for `LatentDecoder.request`; `do_sample` is off unless given, whatever the checkpoint says.
    """
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_latents": True, **settings}
    seed = settings.pop("seed", None)
    decoder = LatentDecoder(model, max_batch_size=max(min(batch_size, len(samples)), 1), latent_mode=latent_mode)

    def requests() -> Iterator[Request]:
        for index, sample in enumerate(samples):
            prompt = Prompt.of(prompt_of(sample, processor, cache))
            prompt.image_keys = tuple(map(str, sample.image_paths))
            yield decoder.request(
                prompt,
                latents=None if latents is None else latents[index],
                seed=None if seed is None else seed + index,
                **settings,
            )

    done = count(1)
    heard = None if on_progress is None else lambda _: on_progress(next(done), len(samples))
    result = Decoded()
    for answer in decoder.generate(requests(), on_answer=heard):
        assert answer.latents is not None and answer.probes is not None
        note_row(result, processor, answer.tokens, answer.latent, answer.latents.cpu(), answer.probes.cpu())
    return result


def note_row(result: Decoded, processor, ids: list[int], latent: list[bool], latents, probes) -> None:
    """One answer: its ids, which of their positions are latent ones, and the spans' states."""
    special = processor.token_ids
    text = processor.decode([token for token, inside in zip(ids, latent, strict=True) if not inside])
    result.texts.append(text)
    result.answers.append(extract_answer(text))
    result.latents.append(latents if len(latents) else None)
    result.probes.append(probes if len(probes) else None)
    spoken = [token for token, inside in zip(ids, latent) if not inside]
    starts = [place for place, token in enumerate(spoken) if token == special.lvr_start]
    result.spans.append(len(starts))
    result.closed.append(bool(starts) and all(spoken[s + 1 : s + 2] == [special.lvr_end] for s in starts))


@dataclass
class TeacherForced:
    """Results with teacher latents in the slots and the right text so far, one entry per question.

    Attributes:
        correct: whether every token after the last `<|lvr_end|>` is the arg-max. latents: teacher latents `(B, N, D)`.
        student_maps, teacher_maps: per box, attention `(N, h, w)` on its image; student maps only in stage 2.
    """

    correct: list[bool] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    student_maps: list[list[torch.Tensor]] = field(default_factory=list)
    teacher_maps: list[list[torch.Tensor]] = field(default_factory=list)


@torch.no_grad()
def teacher_forced(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    samples: Sequence[Sample],
    cache: Mapping[str, ImageTokens] | None = None,
    batch_size: int = 64,
) -> TeacherForced:
    """Run the training forward on held-out questions (stages 1 and 2)."""
    model.eval()
    result, collate = TeacherForced(), Collator(processor.token_ids.pad)
    slots = model.config.num_latent_tokens
    for rows in batches(len(samples), batch_size):
        encoded: list[EncodedSample] = []
        for sample in (samples[i] for i in rows):
            tokens = None if cache is None else [cache[path] for path in sample.image_paths]
            encoded.append(encode_sample(sample, processor, "latent", tokens, num_latents=slots))
        batch = {k: v.to(model.device) for k, v in collate(encoded).items()}
        layout = BatchLayout.from_batch(
            model.config, batch["input_ids"], batch["labels"], batch["image_grid_thw"],
            batch["boxes"], batch["box_sample"], batch["box_image"],
        )  # fmt: skip
        output = model(**batch, layout=layout)
        result.correct += answers_right(output.logits, layout, batch["input_ids"], processor.token_ids.lvr_end)
        tokens = model.batch_tokens(batch.get("pixel_values"), batch.get("image_features"), batch["image_grid_thw"])
        teacher = model.teacher_view(tokens, layout)
        boxes = [len(samples[i].boxes) for i in rows]
        result.latents += list(teacher.latents_BQD.cpu().split(boxes))
        result.teacher_maps += in_groups([m.cpu() for m in teacher.plan.image_maps(teacher.maps_SQ)], boxes)
        if model.config.traits.student:
            hidden = output.last_hidden_state.flatten(0, 1)
            probes = hidden[layout.slot_index_BQ + model.objective.probe_offset]
            result.student_maps += in_groups([m.cpu() for m in student_maps(model, probes, tokens, layout)], boxes)
    return result


def in_groups(values: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[torch.Tensor]]:
    """Neighbouring values in lists of these sizes."""
    rest = iter(values)
    return [list(islice(rest, size)) for size in sizes]


def answers_right(logits, layout: BatchLayout, input_ids, lvr_end_id: int) -> list[bool]:
    """Per sample, whether every supervised token after the last `<|lvr_end|>` is the arg-max."""
    rows, length = input_ids.shape
    column = torch.arange(length, device=input_ids.device)
    last_end = torch.where(input_ids == lvr_end_id, column, -1).amax(dim=1)
    sample, position = layout.supervised_index_S // length, layout.supervised_index_S % length
    wrong = (logits.argmax(-1) != layout.targets_S) & (position >= last_end[sample])
    return (torch.zeros(rows, device=wrong.device).index_add(0, sample, wrong.float()) == 0).tolist()


def student_maps(model, probes_BQD, tokens, layout: BatchLayout) -> list[torch.Tensor]:
    """The student's attention `(N, h, w)` per box."""
    student = model.student_resampler
    _, maps = student(probes_BQD, tokens, layout.grids, layout.box_image, return_attention=True)
    return maps
