"""What the latents do on held-out rows during training: signs of collapse that a falling loss does not show.

Shape suffixes: S supervised positions, B boxes, Q latents per box, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
# (docs/quickstart.md has collapsed ones); the others are round numbers between what works and what does nothing.
LEAST_SPREAD, LEAST_DIVERSITY, LEAST_SWAP_COST, LEAST_END_RATE, LARGEST_GAP = 0.2, 0.02, 0.02, 0.9, 0.2


class HeldOutProbe(TrainerCallback):
    """Measures and logs every `every` steps and at the end, on every process alike.

    Logged, over held-out rows: `eval_answer_loss` and `eval_answer_accuracy` (all answer tokens right, given those
    before) with teacher latents in the slots; `eval_free_running_loss`, `…accuracy` and `eval_lvr_end_rate` with the
    model's own fed-back states; `eval_swapped_loss`, `…accuracy` with another row's; and the spread of the teacher's
    latents, `eval_std_over_samples` and `eval_query_diversity`.
    """

    def __init__(self, trainer: LatentTrainer, samples: Sequence[EncodedSample], every: int):
        self.trainer, self.samples, self.every = trainer, samples, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        measured = self.measure()
        asked = control.should_log
        self.trainer.log({f"eval_{name}": value for name, value in measured.items()})
        control.should_log = asked  # for the step's own row; logging takes it for done
        for warning in collapse_signs(measured, state.global_step / max(state.max_steps, 1)):
            logger.warning("step %d: %s", state.global_step, warning)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All gauges over the held-out rows."""
        trainer, model = self.trainer, self.trainer.accelerator.unwrap_model(self.trainer.model)
        tally = Tally(model.config)
        with eval_mode(model), trainer.accelerator.autocast():
            for inputs in self.batches():
                layout: BatchLayout = inputs["layout"]
                forced = model(**inputs)
                tally.add("answer", forced, layout)
                if forced.teacher_latents is None or model.config.traits.slot_input != "latents":
                    continue
                tally.latents.append(forced.teacher_latents)
                samples = torch.ones(len(layout.starts), dtype=torch.bool)
                rounds = int(layout.turns_B.max()) + 1
                free = trainer.run_free(inputs, samples, rounds)
                own = model(**{**inputs, **free})
                tally.add("free_running", own, layout)
                if len(layout.boxes) > 1:
                    free["slot_inputs"] = torch.roll(free["slot_inputs"], 1, 0)  # pyright: ignore
                    tally.add("swapped", model(**{**inputs, **free}), layout)
        return tally.read()

    def batches(self) -> Iterator[dict[str, Any]]:
        collate = Collator(self.trainer.pad_token_id)
        for start in range(0, len(self.samples), BATCH):
            yield self.trainer._prepare_inputs(collate(self.samples[start : start + BATCH]))


class Tally:
    """Sums over batches."""

    def __init__(self, config):
        self.config = config
        self.latents: list[torch.Tensor] = []
        self.sums: dict[str, list[float]] = {}

    def add(self, kind: str, output, layout: BatchLayout) -> None:
        """Answers of one forward: tokens other than the span's own."""
        config, targets = self.config, layout.targets_S
        logits = output.logits.float()
        picks = logits.argmax(-1)
        span = torch.tensor([config.lvr_start_id, config.lvr_id, config.lvr_end_id], device=targets.device)
        answer = ~torch.isin(targets, span)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[answer]
        starts = torch.as_tensor(layout.starts, device=targets.device)
        sample = torch.searchsorted(starts, layout.supervised_index_S[answer], right=True) - 1
        wrong = torch.zeros(len(starts), device=targets.device).index_add_(
            0, sample, (picks != targets)[answer].float()
        )
        self.count(f"{kind}_loss", float(losses.sum()), len(losses))
        self.count(f"{kind}_accuracy", float((wrong == 0).sum()), len(starts))
        if kind == "free_running":
            ends = targets == config.lvr_end_id
            self.count("lvr_end_rate", float((picks == targets)[ends].sum()), int(ends.sum()))

    def count(self, name: str, value: float, number: int) -> None:
        held = self.sums.setdefault(name, [0.0, 0])
        held[0] += value
        held[1] += number

    def read(self) -> dict[str, float]:
        means = {name: total / max(number, 1) for name, (total, number) in self.sums.items()}
        if self.latents:
            means |= {name: float(value) for name, value in latent_gauges(torch.cat(self.latents)).items()}
        return means


def collapse_signs(measured: dict[str, float], progress: float = 1.0) -> list[str]:
    """What looks wrong, as sentences that say what to try; what only training can bring is not missed early on."""
    signs = []
    if measured.get("std_over_samples", 1.0) < LEAST_SPREAD:
        signs.append(
            f"the teacher's latents hardly differ between images (spread {measured['std_over_samples']:.2f}): they "
            "have collapsed; lower optimizer.teacher_learning_rate, raise latent.query_init_std"
        )
    if measured.get("query_diversity", 1.0) < LEAST_DIVERSITY:
        signs.append(
            f"the latents of a box are all alike (diversity {measured['query_diversity']:.2f}); raise "
            "latent.query_init_std"
        )
    if progress < WARM:
        return signs
    if "swapped_loss" in measured:
        cost = measured["swapped_loss"] - measured["free_running_loss"]
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
