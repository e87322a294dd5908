"""What the latents do on held-out rows during training: signs of collapse that a falling loss does not show.

Shape suffixes: R rows, S supervised positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import TrainerCallback

from ..data.collate import Collator
from ..data.encode import EncodedSample
from ..engine.steps import eval_mode
from ..model.layout import BatchLayout
from .gauges import latent_gauges

if TYPE_CHECKING:
    from .trainer import LatentTrainer

logger = logging.getLogger(__name__)

BATCH = 16
WARM = 0.2  # share of the run after which latents are expected to be used
# Beyond these a run is warned about. Working quickstart runs keep a spread of 0.7 and a diversity of 0.07
# (collapsed ones: bench/results/cpu/one_hop_quickstart.md); the others are round numbers between what works and what
# does nothing.
LEAST_SPREAD, LEAST_DIVERSITY, LEAST_SWAP_COST, LEAST_END_RATE, LARGEST_GAP = 0.2, 0.02, 0.02, 0.9, 0.2
# Of the first measured spread. Rows with one to five boxes, the teacher trained by the symmetric loss: it fell from
# 0.94 to about 0.3 (29 to 35 %) while most hops were unlearnt; the working runs above keep about three quarters of
# theirs. One half lies between, at about the same ratio to both.
LEAST_SPREAD_KEPT = 0.5
SPREAD = "std_over_samples"
PREFIX = "eval_"


class HeldOutProbe(TrainerCallback):
    """Measures and logs before the first step, every `every` steps and at the end, on every process alike.

    Logged, over held-out rows: `eval_answer_loss` and `eval_answer_accuracy` (all answer tokens right, given those
    before) with teacher latents in the slots; `eval_free_running_loss`, `…accuracy` and `eval_lvr_end_rate` with the
    model's own fed-back states; `eval_swapped_loss`, `…accuracy` with those of a row with another image and as many
    spans, and `eval_swap_cost`, what that adds to the loss of the same rows; and the spread of the teacher's latents,
    `eval_std_over_samples` and `eval_query_diversity`. Where rows differ in their number of spans, each accuracy also
    by that number, such as `eval_answer_accuracy_3_spans`.
    """

    def __init__(self, trainer: LatentTrainer, samples: Sequence[EncodedSample], every: int):
        self.trainer, self.every = trainer, every
        self.groups = by_spans(samples)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self.look(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        logs_step = control.should_log
        self.look(state)
        control.should_log = logs_step  # for the step's own row; logging takes it for done

    def look(self, state) -> None:
        """Measure, log, and warn of signs of collapse."""
        measured = self.measure()
        self.trainer.log({f"{PREFIX}{name}": value for name, value in measured.items()})
        for sign in collapse_signs(
            measured, state.global_step / max(state.max_steps, 1), first_spread(state.log_history)
        ):
            logger.warning("step %d: %s", state.global_step, sign)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All gauges over the held-out rows."""
        trainer, model = self.trainer, self.trainer.accelerator.unwrap_model(self.trainer.model)
        if trainer.resident is not None:
            trainer.resident.gather()
        tally = Tally(several=len(self.groups) > 1)
        with eval_mode(model), trainer.accelerator.autocast():
            for spans, rows, inputs in self.batches():
                layout: BatchLayout = inputs["layout"]
                forced = model(**inputs)
                tally.add("answer", spans, answer_scores(forced, layout, model.config))
                if forced.teacher_latents is None or model.config.traits.slot_input != "latents":
                    continue
                tally.latents.append(forced.teacher_latents)
                free = trainer.run_free(inputs, torch.ones(len(rows), dtype=torch.bool), spans)
                own = model(**{**inputs, **free})
                own_scores = answer_scores(own, layout, model.config)
                tally.add("free_running", spans, own_scores)
                tally.count("lvr_end_rate", *spans_closed(own, layout, model.config))
                partners = other_images(rows)
                swappable = [row for row, partner in enumerate(partners) if partner is not None]
                if not swappable:
                    continue
                order = [row if partner is None else partner for row, partner in enumerate(partners)]
                states = free["slot_inputs"].unflatten(0, (len(rows), spans))[order]  # pyright: ignore
                swapped = model(**{**inputs, **free, "slot_inputs": states.flatten(0, 1)})
                scores = answer_scores(swapped, layout, model.config).of(swappable)
                tally.add("swapped", spans, scores)
                cost = scores.loss_R - own_scores.of(swappable).loss_R
                tally.count("swap_cost", float(cost.sum()), int(scores.tokens_R.sum()))
        return tally.read()

    def batches(self) -> Iterator[tuple[int, list[EncodedSample], dict[str, Any]]]:
        """Rows of one number of spans, and what the model takes of them."""
        collate = Collator(self.trainer.pad_token_id)
        for spans, samples in self.groups.items():
            parts = -(-len(samples) // BATCH)
            for part in range(parts):
                rows = samples[part::parts]  # of about one size, so that no row is left alone
                yield spans, rows, self.trainer._prepare_inputs(collate(rows))


def by_spans(samples: Sequence[EncodedSample]) -> dict[int, list[EncodedSample]]:
    """Rows by their number of spans: a span has a counterpart in rows with as many only."""
    groups: dict[int, list[EncodedSample]] = {}
    for sample in samples:
        groups.setdefault(len(sample.boxes), []).append(sample)
    return dict(sorted(groups.items()))


def other_images(rows: Sequence[EncodedSample]) -> list[int | None]:
    """For each row the next one, cyclically, with other images."""
    count = len(rows)
    after = lambda row: ((row + step) % count for step in range(1, count))  # noqa: E731
    return [
        next((other for other in after(row) if not same_images(rows[row], rows[other])), None) for row in range(count)
    ]


def same_images(one: EncodedSample, other: EncodedSample) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("pixel_values", "image_features")]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def first_spread(history: Sequence[dict[str, Any]]) -> float | None:
    """The spread of the teacher's latents as first measured in this run, earlier sessions of a resumed one included."""
    return next((row[f"{PREFIX}{SPREAD}"] for row in history if f"{PREFIX}{SPREAD}" in row), None)


class AnswerScores(NamedTuple):
    """Of each row's answer tokens, the spans' own left out: summed loss, count, and whether all are the arg-max."""

    loss_R: torch.Tensor
    tokens_R: torch.Tensor
    right_R: torch.Tensor

    def of(self, rows: Sequence[int]) -> AnswerScores:
        return AnswerScores(*(values[list(rows)] for values in self))


def answer_scores(output, layout: BatchLayout, config) -> AnswerScores:
    logits, targets = output.logits.float(), layout.targets_S
    span = torch.tensor([config.lvr_start_id, config.lvr_id, config.lvr_end_id], device=targets.device)
    answer = ~torch.isin(targets, span)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[answer]
    wrong = (logits.argmax(-1) != targets)[answer]
    starts = torch.as_tensor(layout.starts, device=targets.device)
    row = torch.searchsorted(starts, layout.supervised_index_S[answer], right=True) - 1
    totals = [
        losses.new_zeros(len(starts)).index_add_(0, row, values.float())
        for values in (losses, torch.ones_like(losses), wrong)
    ]
    return AnswerScores(totals[0], totals[1], totals[2] == 0)


def spans_closed(output, layout: BatchLayout, config) -> tuple[int, int]:
    """How many spans the model would close after their last slot, and of how many."""
    ends = layout.targets_S == config.lvr_end_id
    return int((output.logits.argmax(-1) == layout.targets_S)[ends].sum()), int(ends.sum())


class Tally:
    """Sums over batches. `several`: rows differ in their number of spans."""

    def __init__(self, several: bool):
        self.several = several
        self.latents: list[torch.Tensor] = []
        self.sums: dict[str, list[float]] = {}

    def add(self, kind: str, spans: int, scores: AnswerScores) -> None:
        """Answers to rows of so many spans."""
        right, rows = float(scores.right_R.sum()), len(scores.right_R)
        self.count(f"{kind}_loss", float(scores.loss_R.sum()), int(scores.tokens_R.sum()))
        self.count(f"{kind}_accuracy", right, rows)
        if self.several:
            self.count(f"{kind}_accuracy_{spans}_spans", right, rows)

    def count(self, name: str, value: float, number: int) -> None:
        total = self.sums.setdefault(name, [0.0, 0])
        total[0] += value
        total[1] += number

    def read(self) -> dict[str, float]:
        means = {name: total / max(number, 1) for name, (total, number) in self.sums.items()}
        if self.latents:
            means |= {name: float(value) for name, value in latent_gauges(torch.cat(self.latents)).items()}
        return means


def collapse_signs(measured: dict[str, float], progress: float = 1.0, first: float | None = None) -> list[str]:
    """What looks wrong, as sentences that say what to try; what only training can bring is not missed early on.

    Args:
        first: the spread of the teacher's latents as the run began.
    """
    signs = []
    spread = measured.get(SPREAD, math.inf)
    fallen = first is not None and spread < LEAST_SPREAD_KEPT * first
    if spread < LEAST_SPREAD or fallen:
        state = f"hardly differ between images (spread {spread:.2f}): they have collapsed"
        if spread >= LEAST_SPREAD:
            state = f"lose what tells images apart (spread {first:.2f} at first, {spread:.2f} now): they are collapsing"
        signs.append(
            f"the teacher's latents {state}; keep the teacher as it is (objective.alignment: llm_only) or lower "
            "optimizer.teacher_learning_rate, and raise latent.query_init_std"
        )
    if measured.get("query_diversity", 1.0) < LEAST_DIVERSITY:
        signs.append(
            f"the latents of a box are all alike (diversity {measured['query_diversity']:.2f}); raise "
            "latent.query_init_std"
        )
    if progress < WARM:
        return signs
    cost = measured.get("swap_cost", math.inf)
    if cost < LEAST_SWAP_COST:
        signs.append(
            f"another image's latents serve the answer as well (loss {cost:+.3f}): they are not used; raise "
            "objective.alignment_weight, or start free_running later"
        )
    if "free_running_accuracy" in measured:
        gap = measured["answer_accuracy"] - measured["free_running_accuracy"]
        if gap > LARGEST_GAP:
            signs.append(
                f"with its own states the model answers {gap:.0%} fewer rows than with the teacher's: set "
                "free_running.maximum, or raise objective.alignment_weight"
            )
        if measured["lvr_end_rate"] < LEAST_END_RATE:
            signs.append(
                f"after its own states it closes only {measured['lvr_end_rate']:.0%} of the spans: the states drift; "
                "set objective.keep_alignment in stage 2, or free_running.maximum"
            )
    return signs
