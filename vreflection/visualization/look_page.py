"""Where latent steps look, as self-contained HTML with a step slider: one answer, or a gallery of a whole data set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .._version import __version__
from ..data.atomic import atomic_write
from ..data.template import extract_answer
from ..errors import ConfigError
from .attention_maps import Looks
from .look_panels import Panel, painted, panel_rows, scale_top, tile
from .overlays import colour_bar, data_uri
from .report import page_environment

VIEW_SIDE, QUALITY = 190, 76
_CARDS = "<!-- cards -->"


@dataclass(frozen=True)
class PageFacts:
    """What stands at the head of a page. `source`: the rows' file of a gallery."""

    model: str
    stage: str
    source: str = ""


def render_card(
    looks: Looks,
    images: Sequence[Image.Image],
    question: str,
    name: str = "example-1",
    ident: str = "",
    expected: str | None = None,
    top: float | None = None,
) -> str:
    """One answer's card. Without a finished span it says so and shows no maps.

    Args:
        name: unique on the page. ident: shown beside the question. top: see `look_figure`.
    """
    card: dict[str, Any] = {
        "name": name, "question": question, "id": ident, "expected": expected,
        "answer": (extract_answer(looks.answer) or looks.answer).strip(),
        "attention": looks.attention.title, "note": "", "images": [], "bar": "",
    }  # fmt: skip
    if not looks.steps:
        card["note"] = "The answer finished no latent span: there is no map to show."
    else:
        rows = panel_rows(looks, "all")
        weight = scale_top(rows, top)
        card["bar"] = colour_bar(weight)
        for number, image in enumerate(images):
            card["images"].append(_image(looks, tile(image, VIEW_SIDE), number, rows, weight, f"{name}-{number + 1}"))
    return page_environment().get_template("look_card.html.j2").render(card=card)


def _image(looks: Looks, photo: Image.Image, number: int, rows, weight: float, name: str) -> dict[str, Any]:
    own = [row for row in rows if row.image == number]

    def pictures(panels: Sequence[Panel]) -> list[tuple[str, str, float | None]]:
        return [
            (
                data_uri(painted(photo, panel, looks.shown_boxes(number, panel.span), weight), quality=QUALITY),
                panel.label,
                panel.share,
            )
            for panel in panels
        ]

    mean, steps, queries = own[0], own[1 : 1 + looks.spans], own[1 + looks.spans :]
    counts = [looks.span.count(span) for span in range(looks.spans)]
    return {
        "name": name,
        "size": photo.size,
        "views": pictures(mean.panels),
        "spans": [
            {
                "title": f"Look {span + 1}" if looks.spans > 1 else "",
                "steps": pictures(row.panels[: counts[span]]),
                "teacher": pictures(row.panels[counts[span] :]),
            }
            for span, row in enumerate(steps)
        ],
        "count": looks.steps,
        "queries": [(row.title[:1].upper() + row.title[1:], pictures(row.panels)) for row in queries],
    }


def page_ends(facts: PageFacts, count: int | None = None) -> tuple[str, str]:
    """What comes before and after the cards."""
    values = {**vars(facts), "version": __version__, "count": count}
    page = page_environment().get_template("look_page.html.j2").render(page=values, cards=_CARDS)
    head, _, foot = page.partition(_CARDS)
    return head, foot


def write_look_page(card: str, facts: PageFacts, path: Path) -> Path:
    """One card as a page; readers see the old file or the whole new one."""
    head, foot = page_ends(facts)
    with atomic_write(path) as file:
        file.write((head + card + foot).encode())
    return path


class Gallery:
    """A page of many cards that is built card by card and can be gone on with.

    Cards lie in `<page>.parts/` until all are there; the page is put together from them one at a time, so memory holds
    a single card.

    Args:
        settings: all that decides what the cards show; parts made with others are refused.
    """

    def __init__(self, path: Path, facts: PageFacts, settings: Mapping[str, Any]):
        self.path, self.facts = path, facts
        self.parts = path.with_name(path.name + ".parts")
        wanted = json.dumps(dict(settings), sort_keys=True, default=str)
        held = self.parts / "settings.json"
        if held.exists() and held.read_text(encoding="utf-8") != wanted:
            raise ConfigError(
                f"out: expected parts of these settings in {self.parts}, got parts of others; remove that folder, or "
                "choose another --out"
            )
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: expected a place that can be written to, got {path} ({error})") from None
        with atomic_write(held) as file:
            file.write(wanted.encode())

    def card(self, number: int, make: Callable[[str], str]) -> bool:
        """Keep card `number` as `make(name)` gives it, unless it is there already; whether it was made."""
        part = self._part(number)
        if part.exists():
            return False
        made = make(f"example-{number + 1}")
        with atomic_write(part, sync=False) as file:
            file.write(made.encode())
        return True

    def write(self, count: int) -> int:
        """The page of the cards made so far, of `count`; parts go once all are in it. How many show maps."""
        with_maps = 0
        found = [number for number in range(count) if self._part(number).exists()]
        head, foot = page_ends(self.facts, len(found))
        with atomic_write(self.path) as file:
            file.write(head.encode())
            for number in found:
                card = self._part(number).read_bytes()
                with_maps += b'<div class="looks">' in card
                file.write(card)
            file.write(foot.encode())
        if len(found) == count:
            shutil.rmtree(self.parts)
        return with_maps

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.html"
