"""What a figure of `Looks` shows: titled rows of labelled maps, all on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .attention_maps import Looks
from .overlays import attention_overlay, outline_box
from .svg import percent

KINDS = ("all", "steps", "mean", "queries")
# Words under a map are of no use below this, and an image that is very long would leave nothing of the other side.
SHORTEST_SIDE = 16


@dataclass(frozen=True)
class Panel:
    """One picture of a row: a map over the image, or the photograph itself where `heat` is None."""

    label: str
    heat: np.ndarray | None = None


@dataclass(frozen=True)
class PanelRow:
    """Panels side by side, all of one image. `image`: its number."""

    title: str
    image: int
    panels: tuple[Panel, ...]


def panel_rows(looks: Looks, kind: str = "all") -> list[PanelRow]:
    """Rows of a figure.

    Args:
        kind: `mean` (photograph, mean over steps, mean of the teacher), `steps` (one map per latent step), `queries`
            (per query of the teacher its map, and below it what the step of that number looks at), or `all`.

    Raises:
        ConfigError: an unknown kind, an answer without a finished span, or `queries` without a teacher's map.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not looks.steps:
        raise ConfigError(
            "maps: expected an answer with a finished latent span, got one without; start it with a span "
            "(--force-latent) or allow more tokens (--max-new-tokens)"
        )
    if kind == "queries" and looks.teacher is None:
        raise ConfigError(
            "kind: queries needs the teacher's maps: a box (--box), and a checkpoint that carries the teacher "
            "(stage1 or stage2)"
        )
    rows: list[PanelRow] = []
    for image in range(len(looks.maps)):
        name = f"Image {image + 1} of {len(looks.maps)}: " if len(looks.maps) > 1 else ""
        steps, queries = _step_panels(looks, image), _teacher_rows(looks, image, name)
        if kind in ("all", "mean"):
            rows.append(PanelRow(f"{name}mean over latent steps", image, _mean_panels(looks, image)))
        if kind in ("all", "steps"):
            rows.append(PanelRow(f"{name}latent steps", image, steps))
        if kind == "all":
            rows += queries
        elif kind == "queries" and queries:
            rows += [*queries, PanelRow(f"{name}latent steps", image, steps)]
    return rows


def scale_top(rows: Sequence[PanelRow], given: float | None = None) -> float:
    """The weight at the top of the colour scale of all maps of a figure: the largest, or the one given."""
    if given is not None:
        if not 0 < given < float("inf"):
            raise ConfigError(f"scale_max: expected a positive number, got {given}")
        return given
    return max(float(panel.heat.max()) for row in rows for panel in row.panels if panel.heat is not None)


def step_labels(looks: Looks) -> list[str]:
    """`step 1` and so on, with the span's number where there are several."""
    labels, counts = [], [0] * (max(looks.span, default=0) + 1)
    for span in looks.span:
        counts[span] += 1
        labels.append(f"span {span + 1}, step {counts[span]}" if len(counts) > 1 else f"step {counts[span]}")
    return labels


def painted(image: Image.Image, panel: Panel, boxes: Sequence[Sequence[float]], top: float) -> Image.Image:
    """The panel's picture over an image of the size wanted."""
    picture = image if panel.heat is None else attention_overlay(image, panel.heat, None, top)
    for box in boxes:
        picture = outline_box(picture, box)
    return picture


def tile(image: Image.Image, side: int) -> Image.Image:
    """RGB copy of about `side` x `side` pixels in area, no side longer than twice that; small images grow."""
    scale = min(side / (image.width * image.height) ** 0.5, 2 * side / max(image.size))
    size = [max(SHORTEST_SIDE, round(edge * scale)) for edge in image.size]
    return image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _step_panels(looks: Looks, image: int) -> tuple[Panel, ...]:
    shares = looks.in_boxes(image)
    heats = looks.maps[image].numpy()
    return tuple(
        Panel(label if shares is None else f"{label}: {percent(shares[step], 0)} in box", heats[step])
        for step, label in enumerate(step_labels(looks))
    )


def _mean_panels(looks: Looks, image: int) -> tuple[Panel, ...]:
    shares, boxes = looks.in_boxes(image), looks.boxes_of(image)
    mean = "mean" if shares is None else f"mean: {percent(sum(shares) / len(shares), 0)} in box"
    panels = [Panel("image and box" if boxes else "image"), Panel(mean, looks.maps[image].mean(0).numpy())]
    for number, maps in _teacher_of(looks, image):
        panels.append(Panel(f"teacher{number}: mean", maps.mean(0)))
    return tuple(panels)


def _teacher_rows(looks: Looks, image: int, name: str) -> list[PanelRow]:
    return [
        PanelRow(
            f"{name}teacher{number}, per query",
            image,
            tuple(Panel(f"query {query + 1}", heat) for query, heat in enumerate(maps)),
        )
        for number, maps in _teacher_of(looks, image)
    ]


def _teacher_of(looks: Looks, image: int) -> list[tuple[str, np.ndarray]]:
    """The teacher's maps of an image's boxes, numbered where there are several."""
    pairs = zip(looks.teacher or (), looks.box_images)  # as many as boxes, or none
    found = [maps.numpy() for maps, place in pairs if place == image]
    return [(f" of box {number + 1}" if len(found) > 1 else "", maps) for number, maps in enumerate(found)]
