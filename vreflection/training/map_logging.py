"""Maps of fixed held-out samples during training: the teacher's, the student's, and the student's on its own states.

They are caught in the model's own forward passes, which every process runs alike, so that whatever shards the model
gathers it as in training. Only the main process draws.

Shape suffixes: Q latents per box; h, w an image's token grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import TrainerCallback

from ..data.atomic import atomic_write
from ..data.collate import Collator
from ..data.encode import EncodedSample
from ..data.images import open_image
from ..data.visual_cot import Sample
from ..engine.steps import eval_mode
from ..errors import DataError
from ..model.layout import BatchLayout

if TYPE_CHECKING:
    from .trainer import LatentTrainer

logger = logging.getLogger(__name__)

TEACHER, STUDENT, FREE = "teacher", "student, teacher's latents fed", "student, own states fed"
# (photograph, maps (Q, h, w) by name, box, title) -> figure.
DrawMaps = Callable[[Image.Image, Mapping[str, torch.Tensor], Sequence[float], str], Image.Image]


@dataclass
class Caught:
    """Per module, the maps `(Q, h, w)` of a forward's boxes."""

    maps: dict[str, list[torch.Tensor]] = field(default_factory=dict)


@contextmanager
def caught_maps(model: Any) -> Iterator[Caught]:
    """Keep what the two compression modules attend to while the model's forward runs."""
    caught, changed = Caught(), []
    for name in ("box_feature_resampler", "student_resampler"):
        module = getattr(model, name, None)
        if module is None:
            continue

        def resample(queries, tokens, plan, *rest, own=module.resample, name=name, **settings):
            values, maps = own(queries, tokens, plan, *rest, **settings)
            if maps is not None:
                caught.maps[name] = [one.detach().float().cpu() for one in plan.image_maps(maps)]
            return values, maps

        module.resample = resample
        changed.append(module)
    try:
        yield caught
    finally:
        for module in changed:
            del module.resample


class MapLogger(TrainerCallback):
    """Draws maps every `every` steps and at the end, to tensorboard or wandb, else to `<output>/maps/`.

    Args:
        samples: fixed rows with their encodings, each with a box; the same on every process. draw: makes a figure.
    """

    def __init__(
        self,
        trainer: LatentTrainer,
        samples: Sequence[tuple[Sample, EncodedSample]],
        every: int,
        draw: DrawMaps,
    ):
        self.trainer, self.samples, self.every, self.draw = trainer, samples, every, draw

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        for number in range(len(self.samples)):
            maps = self.maps(number)
            if state.is_world_process_zero:
                self.write(number, maps, state.global_step)

    @torch.no_grad()
    def maps(self, number: int) -> list[dict[str, torch.Tensor]]:
        """A sample's maps, per box by name: `(Q, h, w)` each. Runs the model: on all processes alike."""
        trainer, model = self.trainer, self.trainer.accelerator.unwrap_model(self.trainer.model)
        if trainer.resident is not None:
            trainer.resident.gather()
        collate = Collator(trainer.pad_token_id)
        inputs = trainer._prepare_inputs(collate([self.samples[number][1]]))
        layout: BatchLayout = inputs["layout"]
        maps: list[dict[str, torch.Tensor]] = [{} for _ in layout.boxes]
        with eval_mode(model), trainer.accelerator.autocast():
            with caught_maps(model) as forced:
                model(**inputs)
            self._keep(maps, forced, TEACHER, STUDENT)
            if model.config.traits.student:
                everything = torch.ones(len(layout.starts), dtype=torch.bool)
                free = trainer.run_free(inputs, everything, int(layout.turns_B.max()) + 1)
                with caught_maps(model) as own:
                    model(**{**inputs, **free})
                self._keep(maps, own, None, FREE)
        return maps

    @staticmethod
    def _keep(maps: list[dict[str, torch.Tensor]], caught: Caught, teacher: str | None, student: str) -> None:
        for module, name in (("box_feature_resampler", teacher), ("student_resampler", student)):
            if name is not None and module in caught.maps:
                for of_box, attention in zip(maps, caught.maps[module], strict=True):
                    of_box[name] = attention

    def write(self, number: int, maps: Sequence[Mapping[str, torch.Tensor]], step: int) -> None:
        """Draw one sample's maps, its boxes below each other, and hand them to whoever keeps the run's curves."""
        sample = self.samples[number][0]
        figures = []
        for box, of_box in enumerate(maps):
            photo = open_image(sample.image_paths[int(sample.box_images[box])], view=sample.image_view)
            which = "" if len(maps) == 1 else f", box {box + 1} of {len(maps)}"
            title = f"step {step}: {sample.source}{which}"
            figures.append(self.draw(photo, of_box, sample.boxes[box].tolist(), title))
        figure = below_each_other(figures)
        tag, kept = f"maps/{number}", False
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                pixels = torch.frombuffer(bytearray(figure.tobytes()), dtype=torch.uint8)
                shape = (figure.height, figure.width, 3)
                callback.tb_writer.add_image(tag, pixels.view(shape), step, dataformats="HWC")
                kept = True
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None:
                wandb.log({tag: wandb.Image(figure), "train/global_step": step})
                kept = True
        if not kept:
            folder = Path(self.trainer.args.output_dir or ".") / "maps"
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / f"step-{step:06d}-{number}.png") as file:
                figure.save(file, format="PNG")


def below_each_other(figures: Sequence[Image.Image]) -> Image.Image:
    if len(figures) == 1:
        return figures[0]
    sheet = Image.new("RGB", (max(f.width for f in figures), sum(f.height for f in figures)), "white")
    top = 0
    for figure in figures:
        sheet.paste(figure, (0, top))
        top += figure.height
    return sheet


def samples_with_boxes(
    rows: Sequence[Sample], chosen: Sequence[int], usable: Callable[[Sequence[int]], list[EncodedSample]], count: int
) -> list[tuple[Sample, EncodedSample]]:
    """The first `count` of the held-out rows that have a box and can be used.

    Raises:
        DataError: there is none.
    """
    found: list[tuple[Sample, EncodedSample]] = []
    for index in chosen:
        if len(found) == count:
            break
        if len(rows[index].boxes) and (encoded := usable([index])):
            found.append((rows[index], encoded[0]))
    if not found:
        raise DataError("no-rows", "gauges.maps_every: none of data.held_out has a box and is usable; hold out others")
    return found
