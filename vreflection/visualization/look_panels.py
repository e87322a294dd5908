"""What a figure of `Looks` shows: titled rows of labelled maps, all on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.pixels import to_rgb
from ..errors import ConfigError
from .attention_maps import Looks
from .overlays import attention_overlay, outline_box
from .svg import percent

KINDS = ("all", "looks", "steps", "mean", "queries")
# Words under a map are of no use below this, and an image that is very long would leave nothing of the other side.
SHORTEST_SIDE = 16


@dataclass(frozen=True)
class Panel:
    """One picture of a row: a map over the image, or the photograph itself where `heat` is None.

    Attributes:
        span: the span that the map belongs to. share: of the map in the boxes drawn on it.
    """

    label: str
    heat: np.ndarray | None = None
    span: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class PanelRow:
    """Panels side by side, all of one image. `image`: its number."""

    title: str
    image: int
    panels: tuple[Panel, ...]


def panel_rows(looks: Looks, kind: str = "all") -> list[PanelRow]:
    """Rows of a figure.

    Args:
        kind: `mean` (photograph, mean over steps, mean of the teacher), `looks` (photograph, mean of each span),
            `steps` (one map per latent step), `queries` (per query of the teacher its map, and below it what the step
            of that number looks at), or `all`. With several spans, a row per span, and a mean for each.

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
        queries = _teacher_rows(looks, image, name)
        if kind in ("all", "mean", "looks"):
            title = "looks, one by one" if kind == "looks" and looks.spans > 1 else "mean over latent steps"
            rows.append(PanelRow(f"{name}{title}", image, _mean_panels(looks, image, kind)))
        if kind in ("all", "steps"):
            rows += _step_rows(looks, image, name, with_teacher=kind == "all")
        if kind == "all":
            rows += queries.values()
        elif kind == "queries" and queries:
            # Under a box's teacher the steps of the spans it belongs to.
            spans = range(looks.spans) if looks.spans > 1 else ()
            rows += [row for box, row in queries.items() if box not in map(looks.box_of, spans)]
            for span, row in enumerate(_step_rows(looks, image, name)):
                box = looks.box_of(span) if looks.spans > 1 else None
                if box in queries:
                    rows.append(queries.pop(box))
                rows.append(row)
    return rows


def step_panels(rows: Sequence[PanelRow], image: int) -> list[Panel]:
    """Of `panel_rows(looks, "steps")`, one image's panels step by step."""
    return [panel for row in rows if row.image == image for panel in row.panels]


def scale_top(rows: Sequence[PanelRow], given: float | None = None) -> float:
    """The weight at the top of the colour scale of all maps of a figure: the largest, or the one given."""
    if given is not None:
        if not 0 < given < float("inf"):
            raise ConfigError(f"scale_max: expected a positive number, got {given}")
        return given
    return max(float(panel.heat.max()) for row in rows for panel in row.panels if panel.heat is not None)


def step_labels(looks: Looks) -> list[str]:
    """`step 1` and so on, with the look where there are several spans."""
    labels, counts = [], [0] * looks.spans
    for span in looks.span:
        counts[span] += 1
        labels.append(f"{_look(looks, span)}step {counts[span]}")
    return labels


def painted(
    image: Image.Image, panel: Panel, boxes: Sequence[tuple[int | None, Sequence[float]]], top: float
) -> Image.Image:
    """The panel's picture over an image of the size wanted, with boxes and their numbers (`Looks.shown_boxes`)."""
    picture = image if panel.heat is None else attention_overlay(image, panel.heat, None, top)
    for _, box in boxes:
        picture = outline_box(picture, box)
    for number, box in boxes:
        if number is not None:
            _write_number(picture, box, number)
    return picture


def _write_number(picture: Image.Image, box: Sequence[float], number: int) -> None:
    """At the box's upper left corner: above it where there is room, so that it covers nothing of it."""
    side = max(11, round((picture.width * picture.height) ** 0.5 / 13))
    left = min(max(round(box[0] * picture.width) - 1, 0), max(picture.width - side, 0))
    above = round(box[1] * picture.height) - side
    top = above if above >= 0 else max(min(round(box[3] * picture.height), picture.height - side), 0)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=(255, 255, 255), outline=(16, 16, 16))
    middle = (left + side / 2, top + side / 2)
    draw.text(middle, str(number), fill=(16, 16, 16), font=ImageFont.load_default(round(0.8 * side)), anchor="mm")


def tile(image: Image.Image, side: int) -> Image.Image:
    """RGB copy of about `side` x `side` pixels in area, no side longer than twice that; small images grow.

    The image is taken as a viewer shows it, like the processor takes it.
    """
    image = to_rgb(image, "shown")
    scale = min(side / (image.width * image.height) ** 0.5, 2 * side / max(image.size))
    size = [max(SHORTEST_SIDE, round(edge * scale)) for edge in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _look(looks: Looks, span: int) -> str:
    return f"look {span + 1}, " if looks.spans > 1 else ""


def _with_share(label: str, share: float | None) -> str:
    return label if share is None else f"{label}: {percent(share, 0)} in box"


def _mean_share(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _step_rows(looks: Looks, image: int, name: str, with_teacher: bool = False) -> list[PanelRow]:
    """A row of latent steps per span; with several spans, the teacher's map of a span's box at the row's end."""
    shares = looks.shares(image) or [None] * looks.steps
    heats = looks.maps[image].numpy()
    panels = [
        Panel(_with_share(label, shares[step]), heats[step], looks.span[step], shares[step])
        for step, label in enumerate(step_labels(looks))
    ]
    if looks.spans < 2:
        return [PanelRow(f"{name}latent steps", image, tuple(panels))]
    rows = []
    for span in range(looks.spans):
        own = [panel for panel in panels if panel.span == span]
        own += _teacher_panel(looks, image, span, with_teacher)
        rows.append(PanelRow(f"{name}look {span + 1} of {looks.spans}", image, tuple(own)))
    return rows


def _teacher_panel(looks: Looks, image: int, span: int, wanted: bool = True) -> list[Panel]:
    """The mean of the teacher's maps of a span's own box, where it lies in this image."""
    box = looks.box_of(span)
    if not wanted or looks.teacher is None or box is None or looks.box_images[box] != image:
        return []
    return [Panel(f"{_teacher_of_box(looks, box)}: mean", looks.teacher[box].mean(0).numpy(), span)]


def _mean_panels(looks: Looks, image: int, kind: str) -> tuple[Panel, ...]:
    shares, boxes = looks.shares(image), looks.boxes_of(image)
    maps = looks.maps[image]
    words = "image and boxes" if len(boxes) > 1 and looks.spans > 1 else "image and box"
    panels = [Panel(words if boxes else "image")]
    # Of several boxes the mean over all looks has no one to be in.
    own_boxes = looks.spans > 1 and len(looks.boxes) > 1
    share = None if shares is None or own_boxes else _mean_share(shares)
    if kind != "looks" or looks.spans < 2:
        panels.append(Panel(_with_share("mean", share), maps.mean(0).numpy(), None, share))
    if looks.spans < 2:
        panels += [Panel(f"{words}: mean", heats.mean(0)) for _, words, heats in _teacher_of(looks, image)]
        return tuple(panels)
    for span in range(looks.spans):
        steps = [step for step, place in enumerate(looks.span) if place == span]
        share = None if shares is None else _mean_share([shares[step] for step in steps])
        label = f"look {span + 1}" if kind == "looks" else f"look {span + 1}, mean"
        panels.append(Panel(_with_share(label, share), maps[steps].mean(0).numpy(), span, share))
        panels += _teacher_panel(looks, image, span, kind == "mean")
    return tuple(panels)


def _teacher_rows(looks: Looks, image: int, name: str) -> dict[int, PanelRow]:
    """By number of the box."""
    # A teacher's map shows its own box alone where each span has one.
    own_box = looks.spans > 1 and len(looks.boxes) > 1
    rows = {}
    for box, words, heats in _teacher_of(looks, image):
        panels = (Panel(f"query {query + 1}", heat, box if own_box else None) for query, heat in enumerate(heats))
        rows[box] = PanelRow(f"{name}{words}, per query", image, tuple(panels))
    return rows


def _teacher_of(looks: Looks, image: int) -> list[tuple[int, str, np.ndarray]]:
    """The teacher's maps of an image's boxes, with the number of the box and what to call them."""
    if looks.teacher is None:
        return []
    boxes = [box for box, place in enumerate(looks.box_images) if place == image]
    named = []
    for place, box in enumerate(boxes):
        if looks.spans > 1:
            words = _teacher_of_box(looks, box)
        else:
            words = f"teacher of box {place + 1}" if len(boxes) > 1 else "teacher"
        named.append((box, words, looks.teacher[box].numpy()))
    return named


def _teacher_of_box(looks: Looks, box: int) -> str:
    return f"teacher of box {box + 1}" if len(looks.boxes) > 1 else "teacher"
