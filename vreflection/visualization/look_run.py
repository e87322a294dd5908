"""`vreflection visualize`: from settings to a model, answers, maps and a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.images import open_image
from ..data.pixels import ImageView
from ..data.rows import open_rows
from ..data.template import IMAGE_PLACEHOLDER, extract_answer
from ..data.visual_cot import Sample
from ..engine.decoder import LatentDecoder
from ..errors import ConfigError, DataError
from ..model.checkpoint import local_folder
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..model.weight_files import DTYPES
from .attention_maps import Attention, Box, Looks, check_takes_latents, checked_box, look
from .look_figures import ANIMATIONS, look_figure, look_frames, write_animation, write_figure
from .look_page import Gallery, PageFacts, render_card, write_look_page
from .look_panels import KINDS

ENDINGS = (".png", *ANIMATIONS, ".html")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LookSettings:
    """What to draw.

    Attributes:
        images, question, boxes: one question; or rows, image_folder, limit: a gallery. boxes: `x0,y0,x1,y1` texts.
        image_view: of the rows; None is that of a clean index, else `stored`. Images alone are read as shown.
        out: file; its ending says what it is. kind: of a PNG. scale_max: top of the colour scale.
        source, layers, heads, rollout: see `Attention`; layers and heads as texts with commas.
    """

    model: str
    images: tuple[Path, ...] = ()
    question: str | None = None
    boxes: tuple[str, ...] = ()
    rows: Path | None = None
    image_folder: Path | None = None
    image_view: ImageView | None = None
    limit: int | None = None
    out: Path | None = None
    kind: str = "all"
    source: str = "auto"
    layers: str | None = None
    heads: str | None = None
    rollout: bool = False
    scale_max: float | None = None
    force_latent: bool = False
    max_new_tokens: int = 256
    dtype: str | None = None
    device: str | None = None

    @property
    def target(self) -> Path:
        return self.out or Path("looks.html" if self.rows is not None else "looks.png")

    @property
    def attention(self) -> Attention:
        return Attention(self.source, _numbers("layers", self.layers), _numbers("heads", self.heads), self.rollout)

    def check(self) -> None:
        """What can be told without the model.

        Raises:
            ConfigError, DataError: with what to change.
        """
        if self.rows is None and (not self.images or not (self.question or "").strip()):
            raise ConfigError("visualize: expected --image and --question, or --rows; got neither pair")
        if self.rows is not None and (self.images or self.question or self.boxes):
            raise ConfigError(
                "visualize: expected --rows alone, got --image, --question or --box with it; rows have own"
            )
        ending = self.target.suffix.lower()
        allowed = (".html",) if self.rows is not None else ENDINGS
        if ending not in allowed:
            raise ConfigError(f"out: expected a name in {', '.join(allowed)}, got {self.target.name!r}")
        if not os.access(self.target.absolute().parent, os.W_OK):
            raise ConfigError(f"out: expected a folder that can be written to, got {self.target.absolute().parent}")
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.scale_max is not None and not 0 < self.scale_max < float("inf"):
            raise ConfigError(f"scale_max: expected a positive number, got {self.scale_max}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("layers", "heads"):
            _numbers(name, getattr(self, name))
        self.box_values()

    def box_values(self) -> tuple[Box, ...]:
        found = []
        for text in self.boxes:
            try:
                edges = [float(edge) for edge in text.split(",")]
            except ValueError:
                edges = []
            if len(edges) != 4:
                raise DataError("box", f"box: expected x0,y0,x1,y1 such as 0.1,0.2,0.5,0.6, got {text!r}")
            found.append(checked_box(edges))
        return tuple(found)


def run_look(settings: LookSettings) -> dict[str, Any]:
    """Ask one question and write the figure.

    Raises:
        ConfigError, DataError, CheckpointError: with what to change.
    """
    settings.check()
    images = [open_image(path, view="shown") for path in settings.images]
    model, processor = load(settings)
    found = look(
        model, processor, images, settings.question or "", attention=settings.attention, boxes=settings.box_values(),
        force_latent=settings.force_latent, max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    question, target = settings.question or "", settings.target
    if not found.steps:
        raise ConfigError(
            f"maps: expected an answer with a finished latent span, got {found.answer.strip()!r} without one; start it "
            "with a span (--force-latent) or allow more tokens (--max-new-tokens)"
        )
    if target.suffix.lower() == ".png":
        write_figure(look_figure(found, images, question, settings.kind, settings.scale_max), target)
    elif target.suffix.lower() == ".html":
        card = render_card(found, images, question, top=settings.scale_max)
        write_look_page(card, PageFacts(settings.model, model.config.stage), target)
    else:
        write_animation(look_frames(found, images, question, settings.scale_max), target)
    return {
        "out": str(target),
        "answer": found.answer,
        "attention": found.attention.title,
        "steps": found.steps,
        "span": list(found.span),
        "in_box": _shares(found),
    }


def _shares(looks: Looks) -> list[float | None] | None:
    """Per step, in the box of its span; of an answer with one span, in any box of the first one's image."""
    if not looks.boxes:
        return None
    return looks.shares(looks.box_images[0]) if looks.spans < 2 else looks.in_own_box()


def run_gallery(settings: LookSettings, on_progress: Progress | None = None) -> dict[str, Any]:
    """A page with one card per row; the same call again goes on where a stopped one was.

    Raises:
        ConfigError, DataError, CheckpointError: with what to change. Rows that cannot be used get a card that says why.
    """
    settings.check()
    assert settings.rows is not None
    try:
        rows = open_rows(settings.rows, settings.image_folder, image_view=settings.image_view)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"--image-folder: {error}") from None
    count = len(rows) if settings.limit is None else min(len(rows), settings.limit)
    if not count:
        raise DataError("no-rows", f"{settings.rows}: expected at least one row, got none; choose another file")
    model, processor = load(settings)
    attention = settings.attention.resolve(model)
    check_takes_latents(model)
    stat = settings.rows.stat()
    decides = {**vars(settings), "out": None, "limit": None, "rows_state": [stat.st_size, stat.st_mtime_ns]}
    gallery = Gallery(settings.target, PageFacts(settings.model, model.config.stage, settings.rows.name), decides)
    decoder = LatentDecoder(model, max_batch_size=1, image_cache=0, share_prefixes=False)
    unusable: list[str] = []

    def card(number: int, name: str) -> str:
        try:
            sample, _ = rows.parse(number)
            return sample_card(model, processor, decoder, sample, attention, settings, name)
        except DataError as error:
            if error.reason.startswith("file-"):
                raise
            unusable.append(str(error))
            return unusable_card(name, str(error))

    try:
        for number in range(count):
            gallery.card(number, lambda name, number=number: card(number, name))
            if on_progress is not None:
                on_progress(number + 1, count)
    finally:
        # An interrupted page shows what there is.
        with_maps = gallery.write(count)
    return {"out": str(settings.target), "rows": count, "with_maps": with_maps, "unusable": unusable}


def sample_card(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    decoder: LatentDecoder,
    sample: Sample,
    attention: Attention,
    settings: LookSettings,
    name: str,
) -> str:
    """A row's first question, asked and drawn."""
    images = [open_image(path, view=sample.image_view) for path in sample.image_paths]
    text = sample.conversations[0].text
    found = look(
        model, processor, images, text, attention=attention, boxes=sample.boxes.tolist(),
        box_images=[int(place) for place in sample.box_images], decoder=decoder, force_latent=settings.force_latent,
        max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    shown = re.sub(rf"\s*{IMAGE_PLACEHOLDER}\s*", " ", text).strip()
    expected = extract_answer(sample.conversations[1].text)
    ident = sample.source or sample.question_id
    return render_card(found, images, shown, name, ident, expected, settings.scale_max)


def unusable_card(name: str, why: str) -> str:
    """A card for a row that cannot be asked."""
    from .report import page_environment

    card = {
        "name": name, "question": "A row that cannot be used", "id": "", "answer": "–", "expected": None,
        "attention": "–", "note": why, "images": [], "bar": "",
    }  # fmt: skip
    return page_environment().get_template("look_card.html.j2").render(card=card)


def load(settings: LookSettings) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    folder = local_folder(settings.model)
    dtype = "auto" if settings.dtype is None else DTYPES[settings.dtype][1]
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: expected such as cpu or cuda:0, got {settings.device!r} ({error})") from None
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    check_takes_latents(model)
    settings.attention.resolve(model)
    return model.eval().to(where), VReflectionProcessor.from_pretrained(folder)


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError:
        raise ConfigError(f"{name}: expected whole numbers with commas, such as 0,5, got {text!r}") from None
