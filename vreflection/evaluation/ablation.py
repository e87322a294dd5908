"""Does the latent do anything? The same questions with the latents changed, replaced, left out; what they are like.

In two passes: what the model says and feeds back by itself, then the interventions, of which `swap` needs the first
pass whole. Every part of either is a file that appears whole, so that an interrupted run goes on.

Shape suffixes: S spans of an answer, N latents per span, D width, V vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..data.atomic import atomic_write
from ..data.template import answer_range
from ..engine.decoder import LatentDecoder
from ..engine.requests import Generation, Prompt
from ..errors import CheckpointError, ConfigError
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..ops.regions import MERGE_SIZE
from .forced import ForcedScorer, GivenAnswer
from .interventions import OWN, Intervention, in_span, replaced_latents, with_span_length
from .latents import grounding, hop_grounding, partners_of

LENS = 5  # tokens kept per latent step
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Question:
    """One question as an ablation sees it.

    Attributes:
        id, group: as in `Item`. image: key of its images. gold: right answer. boxes: gold boxes on the first image,
            which count together for every span; with `box_images`, each is that of the span of its number, on this of
            the images.
        prompt: makes the prompt, images and all. read: from the answer's text to what is compared with `gold`.
        max_new_tokens: limit of the answer, latent positions not counted.
    """

    id: str
    group: str
    image: str
    gold: str
    boxes: tuple[tuple[float, float, float, float], ...]
    prompt: Callable[[], Prompt]
    read: Callable[[str], str | None]
    max_new_tokens: int
    box_images: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ablation:
    """Runs interventions on one model.

    Args:
        folder: where parts go. batch: questions in a part, and rows decoded together. force: start every answer with a
            span, whatever the model does by itself.
    """

    model: VReflectionForConditionalGeneration
    processor: VReflectionProcessor
    questions: Sequence[Question]
    interventions: Sequence[Intervention]
    folder: Path
    batch: int = 8
    force: bool = False
    seed: int = 0
    on_progress: Progress | None = None

    def run(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[torch.Tensor | None]]:
        """Rows of both passes, in the questions' order, and per question the latents `(S, N, D)`, if a span opened."""
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        decoder = LatentDecoder(self.model, max_batch_size=self.batch, image_cache=self.batch)
        own: list[dict[str, Any]] = []
        latents: list[torch.Tensor | None] = []
        for chunk, name in self._chunks(OWN):
            rows, tensors = self._part(decoder, name, lambda chunk=chunk: self._own(decoder, chunk))
            own += rows
            latents += [tensors.get(str(place)) for place in range(len(rows))]
            self._tell(OWN, len(own))
        self._check_spans(latents)
        partners = self._partners(latents)
        changed: list[dict[str, Any]] = []
        for chunk, name in self._chunks("changed"):
            others = [None if (j := partners[i]) is None else latents[j] for i in chunk]
            changed += self._part(
                decoder, name, lambda c=chunk, o=others: (self._changed(decoder, c, own, latents, o), {})
            )[0]
            self._tell("interventions", len(changed))
        return own, changed, latents

    def _check_spans(self, latents: Sequence[torch.Tensor | None]) -> None:
        """Refuse to change a span that no answer has: its table row would read as a change without effect."""
        most = max((len(z) for z in latents if z is not None), default=0)
        beyond = [one.name for one in self.interventions if one.span is not None and 0 < most < one.span]
        if beyond:
            raise ConfigError(
                f"interventions: {', '.join(beyond)} would change nothing: no answer has more than {most} spans; "
                "leave them out, or ask other questions"
            )

    def _partners(self, latents: Sequence[torch.Tensor | None]) -> list[int | None]:
        """Whose latents each question gets under `swap`, if any.

        Raises:
            ConfigError: no question has a partner.
        """
        if not any(one.kind == "swap" for one in self.interventions):
            return [None] * len(latents)
        partners = partners_of(
            [q.gold for q in self.questions], [q.image for q in self.questions],
            [0 if z is None else len(z) for z in latents], [z is not None for z in latents],
        )  # fmt: skip
        if any(z is not None for z in latents) and not any(partner is not None for partner in partners):
            raise ConfigError(
                "interventions: swap needs questions with other answers on other images that opened as many spans; "
                f"none of {len(latents)} has one. Ask more, or leave swap out"
            )
        return partners

    def _tell(self, phase: str, done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(phase, done, len(self.questions))

    def _chunks(self, kind: str) -> Iterator[tuple[range, str]]:
        for start in range(0, len(self.questions), self.batch):
            yield range(start, min(start + self.batch, len(self.questions))), f"{kind}-{start:06d}"

    def _part(
        self,
        decoder: LatentDecoder,
        name: str,
        make: Callable[[], tuple[list[dict[str, Any]], dict[str, torch.Tensor]]],
    ):
        """A part's rows and tensors: from its files, or made now. The rows' file comes last: it stands for both."""
        rows_file, tensors_file = (self.folder / "parts" / f"{name}{ending}" for ending in (".json", ".safetensors"))
        if not rows_file.exists():
            decoder.forget()  # what earlier parts left to share would move last digits
            rows, tensors = make()
            if tensors:
                with atomic_write(tensors_file) as file:
                    file.write(save(tensors))
            with atomic_write(rows_file) as file:
                file.write(json.dumps(rows, ensure_ascii=False).encode())
        try:
            rows = json.loads(rows_file.read_text(encoding="utf-8"))
            tensors = load_file(tensors_file) if tensors_file.exists() else {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{rows_file}: not a whole part ({error}); remove it, it will be made again"
            ) from None
        return rows, tensors

    # First pass

    @torch.no_grad()
    def _own(self, decoder: LatentDecoder, chunk: range) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        prompts = [self._encoded(self.questions[i]) for i in chunk]
        requests = [self._request(decoder, self.questions[i], prompt) for i, prompt in zip(chunk, prompts)]
        rows, tensors = [], {}
        for place, answer in enumerate(decoder.generate(requests)):
            question = self.questions[chunk[place]]
            row = {"id": question.id, "group": question.group, "gold": question.gold, **self._said(question, answer)}
            row |= {"tokens": answer.tokens, "latent": answer.latent, "text_norm": self._text_norm(answer)}
            if answer.latents is not None and len(answer.latents):
                tensors[str(place)] = answer.latents.float().cpu().contiguous()
                row["lens"] = [self._lens(latents) for latents in answer.latents]
                if question.boxes and self.model.config.traits.student and answer.probes is not None:
                    row["grounding"] = self._grounding(question, prompts[place], answer.probes)
            rows.append(row)
        return rows, tensors

    def _encoded(self, question: Question) -> Prompt:
        """The prompt with its visual tokens computed: every intervention needs them."""
        prompt = question.prompt()
        if prompt.pixel_values is None:
            return prompt
        device = self.model.device
        with torch.no_grad():
            tokens = self.model.visual_tokens(prompt.pixel_values.to(device), prompt.image_grid_thw.to(device))  # pyright: ignore
        return replace(prompt, pixel_values=None, image_features=tokens)

    def _request(self, decoder: LatentDecoder, question: Question, prompt: Prompt, **changes):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="decoding with .* latent steps")  # on purpose
            return decoder.request(
                prompt, allow_other_latent_steps=True, force_latent=self.force, seed=0, do_sample=False,
                repetition_penalty=1.0, max_new_tokens=question.max_new_tokens, return_latents=True, **changes,
            )  # fmt: skip

    def _said(self, question: Question, answer: Generation) -> dict[str, Any]:
        ids = [token for token, inside in zip(answer.tokens, answer.latent, strict=True) if not inside]
        special = self.processor.token_ids
        starts = [place for place, token in enumerate(ids) if token == special.lvr_start]
        text = self.processor.decode(ids, skip_special_tokens=False)
        read = question.read(text)
        return {
            "text": text,
            "answer": read,
            "correct": read == question.gold,
            "spans": len(starts),
            "closed": bool(starts) and all(ids[place + 1 : place + 2] == [special.lvr_end] for place in starts),
        }

    @staticmethod
    def _text_norm(answer: Generation) -> float | None:
        """Mean norm of the hidden states that gave text."""
        if answer.step_hidden is None:
            return None
        text = torch.tensor([not inside for inside in answer.latent], device=answer.step_hidden.device)
        return float(answer.step_hidden[text].float().norm(dim=-1).mean())

    def _lens(self, latents_ND: torch.Tensor) -> list[dict[str, Any]]:
        """Per step, what the vocabulary projection makes of a latent: likeliest tokens, and entropy in nats."""
        head = self.model.get_output_embeddings()
        logits = head(latents_ND.to(head.weight)).float()
        chances = logits.softmax(-1)
        top = chances.topk(min(LENS, chances.shape[-1]))
        entropy = -(chances * logits.log_softmax(-1)).sum(-1)
        return [
            {"ids": ids, "chances": [round(c, 6) for c in values], "entropy": float(h)}
            for ids, values, h in zip(top.indices.tolist(), top.values.tolist(), entropy)
        ]

    def _grounding(self, question: Question, prompt: Prompt, probes_SND: torch.Tensor) -> list[dict[str, Any]]:
        """Per span, where the student looks with the probes of this answer, against the gold boxes."""
        grids = [[int(h) // MERGE_SIZE, int(w) // MERGE_SIZE] for _, h, w in prompt.image_grid_thw]  # pyright: ignore
        of_span = [0] * len(probes_SND)
        if question.box_images is not None:
            of_span = list(question.box_images[: len(probes_SND)])
        probes_SND = probes_SND[: len(of_span)]  # a span beyond the boxes has none to look into
        student = self.model.student_resampler
        dtype = next(student.parameters()).dtype
        _, maps = student(
            probes_SND.to(self.model.device, dtype), prompt.image_features.to(self.model.device, dtype), grids, of_span,  # pyright: ignore
            return_attention=True,
        )  # fmt: skip
        if question.box_images is None:
            return [grounding([attention.cpu()], [question.boxes]) for attention in maps]
        return hop_grounding([[one.cpu() for one in maps]], [question.boxes], images=[question.box_images])  # pyright: ignore

    # Second pass

    @torch.no_grad()
    def _changed(
        self,
        decoder: LatentDecoder,
        chunk: range,
        all_own: Sequence[dict[str, Any]],
        all_latents: Sequence[torch.Tensor | None],
        partners: Sequence[torch.Tensor | None],
    ) -> list[dict[str, Any]]:
        own, latents = [all_own[i] for i in chunk], [all_latents[i] for i in chunk]
        prompts = [self._encoded(self.questions[i]) for i in chunk]
        reached: list[tuple[int, Intervention, torch.Tensor | None]] = []
        for place, row in enumerate(own):
            for one in self.interventions:
                states = self._replacement(one, row["id"], latents[place], partners[place])
                own_changes = one.own_latents and (one.hide_images or bool(row["spans"]))
                if own_changes or states is not None:
                    reached.append((place, one, states))
        requests = [
            self._request(
                decoder, self.questions[chunk[place]], prompts[place],
                latents=None if states is None else in_span(states, one.span), latent_steps=one.steps,
                hide_images=one.hide_images,
            )
            for place, one, states in reached
        ]  # fmt: skip
        # What an intervention cannot reach stays as it was.
        rows = [{"id": row["id"], **{one.name: _unreached(row) for one in self.interventions}} for row in own]
        answers = decoder.generate(requests)
        for (place, one, _), answer in zip(reached, answers):
            rows[place][one.name] = {**self._said(self.questions[chunk[place]], answer), "reached": True}
        scorer = ForcedScorer(self.model)
        for place, row in enumerate(own):
            mine = [(one, states, answer) for (p, one, states), answer in zip(reached, answers) if p == place]
            for (one, _, _), value in zip(mine, self._divergences(scorer, prompts[place], row, latents[place], mine)):
                rows[place][one.name] |= value
        return rows

    def _replacement(
        self, one: Intervention, ident: str, own: torch.Tensor | None, partner: torch.Tensor | None
    ) -> torch.Tensor | None:
        """States `(S, N, D)` that an intervention puts into the spans of an answer, if it does and there are any."""
        if one.own_latents or own is None or (one.span is not None and one.span > len(own)):
            return None
        if one.kind == "swap" and partner is None:
            return None
        return replaced_latents(one.kind, own, partner, self.seed, ident)

    def _divergences(self, scorer: ForcedScorer, prompt, row, latents: torch.Tensor | None, mine) -> list[dict]:
        """Per intervention, what it does to the answer's content tokens, the model's own text before them throughout.

        `kl`: mean KL divergence (nats) from what the model says by itself to what it would say. `kept`: whether its own
        tokens stay the likeliest. An intervention that only breaks the form of the answer leaves both alone.
        """
        if not mine:
            return []
        special, tokens, flags = self.processor.token_ids, row["tokens"], row["latent"]
        own = torch.zeros(0, 1, self.model.config.hidden_width) if latents is None else latents
        forced = [_given(tokens, flags, own)]
        for one, replacement, answer in mine:
            ids, inside, states = tokens, flags, own if replacement is None else replacement
            if one.steps is not None:
                ids, inside = with_span_length(tokens, flags, one.steps, special.lvr, special.lvr_start)
            if (one.own_latents or one.span is not None) and answer.latents is not None and len(answer.latents):
                # What later spans made of the change; spans that the changed answer never opened stay the own.
                states = answer.latents.float().cpu()
                if states.shape[1] == own.shape[1]:
                    states = torch.cat([states, own[len(states) :]])
            forced.append(_given(ids, inside, states, one.hide_images))
        hidden = scorer.hidden(prompt, forced)
        places = answer_places([t for t, f in zip(tokens, flags) if not f], self.processor)
        head = self.model.get_output_embeddings()
        logs = []
        for one, states in zip(forced, hidden):
            text = [place for place, inside in enumerate(one.latent) if not inside]
            rows = states[[text[place] for place in places]]
            logs.append(head(rows.to(head.weight)).float().log_softmax(-1))
        likeliest = logs[0].argmax(-1)
        return [
            {
                # Rounding may leave a little less than nothing.
                "kl": max(0.0, float((logs[0].exp() * (logs[0] - other)).sum(-1).mean())),
                "kept": bool((other.argmax(-1) == likeliest).all()),
            }
            for other in logs[1:]
        ]


def _given(tokens: Sequence[int], latent: Sequence[bool], states_SND: torch.Tensor, hide_images: bool = False):
    """An answer whose span j consumes the states of number j modulo S, cut where the answer was cut."""
    count, states = sum(latent), states_SND.flatten(0, 1)
    return GivenAnswer(tokens, latent, states.repeat(-(-count // max(len(states), 1)), 1)[:count], hide_images)


def _unreached(row: dict[str, Any]) -> dict[str, Any]:
    """What an intervention leaves of an answer that it cannot reach."""
    kept = {key: row[key] for key in ("text", "answer", "correct", "spans", "closed")}
    return {**kept, "kl": 0.0, "kept": True, "reached": False}


def answer_places(ids: Sequence[int], processor: VReflectionProcessor) -> list[int]:
    """Which of an answer's text tokens are its content: those inside the last `<answer>`, else all after the last span.

    Never empty: without any, the last token.
    """
    special = processor.token_ids
    ends = [place for place, token in enumerate(ids) if token == special.lvr_end]
    first = ends[-1] + 1 if ends else 0
    texts = [processor.decode(ids[: place + 1]) for place in range(len(ids))]
    whole = texts[-1] if texts else ""
    answer = answer_range(whole)
    if answer is not None and whole[answer].strip():
        start, stop = answer.start, answer.stop
        before = ["", *texts[:-1]]
        inside = [
            place
            for place in range(first, len(ids))
            if len(texts[place]) > start and len(before[place]) < stop
            and texts[place][max(len(before[place]), start) : stop].strip()
        ]  # fmt: skip
        if inside:
            return inside
    rest = [place for place in range(first, len(ids)) if texts[place] != (texts[place - 1] if place else "")]
    return rest or [max(len(ids) - 1, 0)]
