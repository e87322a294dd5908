"""Figures of where latent steps look, drawn with Pillow alone: still (PNG) and one frame per step (GIF, WebP)."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, features

from ..data.atomic import atomic_write
from ..data.template import extract_answer
from ..errors import ConfigError
from .attention_maps import Looks
from .look_panels import Panel, PanelRow, painted, panel_rows, scale_top, step_panels, tile
from .overlays import colour_strip
from .svg import NARROW_SPACE, number

PAPER, INK, QUIET, RULE = (251, 250, 248), (29, 33, 41), (86, 93, 107), (220, 217, 211)
MARGIN, GAP = 24, 14
TILE, FRAME_TILE, TRAINING_TILE = 200, 300, 120  # sides of a square tile, px
LEAST_WIDTH, MOST_WIDTH = 560, 1760  # of a figure, px; rows that need more are broken
BAR_WIDTH, BAR_HEIGHT = 320, 14
FRAME_MS = 700
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system that knows more than Latin letters, or the one that Pillow brings."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    return int(font(size).getlength(plain(text)) + 1)


def plain(text: str) -> str:
    """On one line, with spaces that every font has."""
    return " ".join(text.replace(NARROW_SPACE, " ").split())


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """Lines no wider than `width`; after `most` of them, an ellipsis. Words that are too long are broken."""
    lines, line = [], ""
    for word in plain(text).split(" "):
        joined = f"{line} {word}".strip()
        if text_width(joined, size) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while text_width(word, size) > width and len(word) > 1:
            fit = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or text_width(word[:n], size) <= width)
            lines.append(word[:fit])
            word = word[fit:]
        line = word
    lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and text_width(last + "…", size) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines


class Sheet:
    """Things placed from the top down; drawn once the height is known."""

    def __init__(self, width: int):
        self.width, self.y = width, MARGIN
        self.texts: list[tuple[int, int, str, int, tuple[int, int, int], str]] = []
        self.pictures: list[tuple[int, int, Image.Image]] = []

    def write(self, text: str, size: int, colour=INK, most: int = 1, space: int = 6) -> None:
        for line in wrapped(text, size, self.width - 2 * MARGIN, most):
            self.texts.append((MARGIN, self.y, line, size, colour, "la"))
            self.y += round(1.35 * size)
        self.y += space

    def place(self, pictures: Sequence[Image.Image], labels: Sequence[str], cell: int) -> None:
        """Pictures in columns `cell` wide, labels under them, as many rows as it takes."""
        most = max(1, (self.width - 2 * MARGIN + GAP) // (cell + GAP))
        lines = -(-len(pictures) // most)
        columns = -(-len(pictures) // lines)  # lines of about one length
        for start in range(0, len(pictures), columns):
            line = pictures[start : start + columns]
            for column, (picture, label) in enumerate(zip(line, labels[start : start + columns])):
                x = MARGIN + column * (cell + GAP)
                self.pictures.append((x + (cell - picture.width) // 2, self.y, picture))
                self.texts.append((x + cell // 2, self.y + picture.height + 6, plain(label), 14, INK, "ma"))
            self.y += max(picture.height for picture in line) + 6 + 20 + GAP

    def scale(self, top: float, clipped: bool) -> None:
        """The colour bar with its numbers."""
        self.pictures.append((MARGIN, self.y, colour_strip(BAR_WIDTH, BAR_HEIGHT)))
        self.y += BAR_HEIGHT + 5
        for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
            mark = ("≥ " if clipped and share == 1.0 else "") + number(share * top)
            self.texts.append((MARGIN + round(share * BAR_WIDTH), self.y, mark, 13, INK, anchor))
        words = "attention per token"
        if MARGIN + BAR_WIDTH + 16 + text_width(words, 13) <= self.width - MARGIN:
            self.texts.append((MARGIN + BAR_WIDTH + 16, self.y - BAR_HEIGHT - 6, words, 13, QUIET, "la"))
        self.y += 20

    def drawn(self) -> Image.Image:
        # Lines of pictures may turn out shorter than what was reserved.
        edges = [x + picture.width for x, _, picture in self.pictures]
        edges += [x + text_width(text, size) for x, _, text, size, _, anchor in self.texts if anchor == "la"]
        width = min(self.width, max(LEAST_WIDTH, max(edges, default=0) + MARGIN))
        canvas = Image.new("RGB", (width, self.y + MARGIN), PAPER)
        for x, y, picture in self.pictures:
            canvas.paste(picture, (x, y))
        draw = ImageDraw.Draw(canvas)
        for x, y, text, size, colour, anchor in self.texts:
            draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor)
        return canvas


def look_figure(
    looks: Looks, images: Sequence[Image.Image], question: str, kind: str = "all", top: float | None = None
) -> Image.Image:
    """A still figure: question, answer, titled rows of maps, one colour bar for all.

    Args:
        images: the photographs, in the order of `looks.maps`. kind: see `panel_rows`.
        top: weight at the top of the colour scale, so that figures compare; default the figure's largest.

    Raises:
        ConfigError: see `panel_rows`.
    """
    rows = panel_rows(looks, kind)
    top_weight = scale_top(rows, top)
    tiles = [tile(image, TILE) for image in images]
    cells = [_cell(row, tiles[row.image]) for row in rows]
    sheet = Sheet(_sheet_width(rows, cells))
    _head(sheet, looks, question)
    for row, cell in zip(rows, cells):
        sheet.write(row.title[:1].upper() + row.title[1:], 16, space=8)
        pictures = [
            painted(tiles[row.image], panel, looks.shown_boxes(row.image, panel.span), top_weight)
            for panel in row.panels
        ]
        sheet.place(pictures, [panel.label for panel in row.panels], cell)
        sheet.y += 6
    sheet.scale(top_weight, _clipped(rows, top_weight))
    return sheet.drawn()


def look_frames(
    looks: Looks, images: Sequence[Image.Image], question: str, top: float | None = None
) -> list[Image.Image]:
    """One frame per latent step, all of one size and scale: image, this step's map, and the mean of its span.

    Raises:
        ConfigError: see `panel_rows`.
    """
    steps, means = panel_rows(looks, "steps"), panel_rows(looks, "mean")
    top_weight = scale_top([*steps, *means], top)
    tiles = [tile(image, FRAME_TILE) for image in images]
    trios = [
        [(mean.panels[0], step, _mean_beside(step, mean)) for step in step_panels(steps, mean.image)] for mean in means
    ]
    cells = [
        max(_cell(PanelRow("", mean.image, trio), tiles[mean.image]) for trio in of_image)
        for mean, of_image in zip(means, trios)
    ]
    frames = []
    for number_of_step in range(looks.steps):
        sheet = Sheet(max(LEAST_WIDTH, *(3 * cell + 2 * GAP + 2 * MARGIN for cell in cells)))
        _head(sheet, looks, question)
        for mean, of_image, cell in zip(means, trios, cells):
            trio = of_image[number_of_step]
            pictures = [
                painted(tiles[mean.image], panel, looks.shown_boxes(mean.image, panel.span), top_weight)
                for panel in trio
            ]
            sheet.place(pictures, [panel.label for panel in trio], cell)
        sheet.scale(top_weight, _clipped([*steps, *means], top_weight))
        frame = sheet.drawn()
        _progress(frame, number_of_step, looks.steps)
        frames.append(frame)
    return frames


def training_figure(
    image: Image.Image, maps: Mapping[str, torch.Tensor], box: Sequence[float], title: str
) -> Image.Image:
    """Named maps `(Q, h, w)` of one box: a row of means beside the photograph, then one row per name, on one scale."""
    means = [Panel("image and box"), *(Panel(f"{name}: mean", one.mean(0).numpy()) for name, one in maps.items())]
    rows = [PanelRow("Means", 0, tuple(means))]
    for name, one in maps.items():
        panels = (Panel(f"query {number + 1}", heat.numpy()) for number, heat in enumerate(one))
        rows.append(PanelRow(name, 0, tuple(panels)))
    photo, top = tile(image, TRAINING_TILE), scale_top(rows)
    cells = [_cell(row, photo) for row in rows]
    sheet = Sheet(_sheet_width(rows, cells))
    sheet.write(title, 16, most=2)
    for row, cell in zip(rows, cells):
        sheet.write(row.title[:1].upper() + row.title[1:], 15)
        sheet.place(
            [painted(photo, panel, [(None, box)], top) for panel in row.panels], [p.label for p in row.panels], cell
        )
    sheet.scale(top, False)
    return sheet.drawn()


def write_figure(figure: Image.Image, path: Path) -> Path:
    """As PNG; readers see the old file or the whole new one."""
    with atomic_write(path) as file:
        figure.save(file, format="PNG", optimize=True)
    return path


def write_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = FRAME_MS) -> Path:
    """As GIF or WebP, by the name's ending, without end.

    Raises:
        ConfigError: another ending, or a Pillow without WebP.
    """
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"out: expected a name in {' or '.join(ANIMATIONS)} for an animation, got {path.name!r}")
    if kind == "WEBP" and not features.check("webp"):
        raise ConfigError("out: this Pillow was built without WebP; write a .gif, or install a Pillow with it")
    options = {"GIF": {"optimize": False, "disposal": 1}, "WEBP": {"quality": 85, "method": 4}}[kind]
    buffer = io.BytesIO()
    if kind == "GIF":
        # One palette for all: colours of one weight stay alike from frame to frame.
        sample = Image.new("RGB", (frames[0].width, frames[0].height * min(len(frames), 4)))
        for place in range(min(len(frames), 4)):
            sample.paste(frames[place * len(frames) // min(len(frames), 4)], (0, place * frames[0].height))
        palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(
        buffer, format=kind, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options
    )
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return path


def _mean_beside(step: Panel, mean: PanelRow) -> Panel:
    """The mean of the step's span, or of all steps where there is but one."""
    own = [panel for panel in mean.panels if panel.span is not None and panel.span == step.span]
    return own[0] if own else mean.panels[1]


def _head(sheet: Sheet, looks: Looks, question: str) -> None:
    sheet.write(question, 20, most=3, space=2)
    sheet.write(f"Answer: {extract_answer(looks.answer) or looks.answer}", 16, most=2, space=2)
    sheet.write(f"Attention: {looks.attention.title}", 14, QUIET, most=2, space=10)


def _sheet_width(rows: Sequence[PanelRow], cells: Sequence[int]) -> int:
    wanted = max(len(row.panels) * (cell + GAP) - GAP for row, cell in zip(rows, cells)) + 2 * MARGIN
    return min(max(wanted, LEAST_WIDTH), max(MOST_WIDTH, *(cell + 2 * MARGIN for cell in cells)))


def _cell(row: PanelRow, photo: Image.Image) -> int:
    return max(photo.width, *(text_width(panel.label, 14) for panel in row.panels))


def _clipped(rows: Sequence[PanelRow], top: float) -> bool:
    return any(panel.heat is not None and float(panel.heat.max()) > top for row in rows for panel in row.panels)


def _progress(frame: Image.Image, step: int, steps: int) -> None:
    """A dot per step at the lower right, those taken filled."""
    draw, size = ImageDraw.Draw(frame), 9
    pitch = min(16, max(1, (frame.width - 2 * MARGIN - BAR_WIDTH - 60) // steps))
    for place in range(steps):
        x = frame.width - MARGIN - (steps - place) * pitch
        y = frame.height - MARGIN - size
        draw.ellipse((x, y, x + min(size, pitch), y + size), fill=INK if place <= step else RULE)
