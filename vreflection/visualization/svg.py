"""A small SVG writer. Colours come from the page's style sheet, so drawings follow its light and dark themes."""

from __future__ import annotations

import math
from html import escape

NARROW_SPACE = "\u202f"  # between a number and its unit; does not break


def tag(name: str, body: str = "", /, **attributes: object) -> str:
    """One element. `body` is markup; attribute values are escaped; `class_` means class, `text_anchor` text-anchor."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{body}</{name}>"


def text(content: object, /, **attributes: object) -> str:
    """A `<text>` element with escaped content."""
    return tag("text", escape(str(content)), **attributes)


def described(ident: str, title: str, description: str) -> tuple[str, dict[str, str]]:
    """Title and description elements, and the attributes that make an `<svg>` announce them. `ident` is page-unique."""
    markup = tag("title", escape(title), id=f"{ident}-title") + tag("desc", escape(description), id=f"{ident}-desc")
    return markup, {"role": "img", "aria_labelledby": f"{ident}-title", "aria_describedby": f"{ident}-desc"}


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never in exponent form between 1e-4 and 1e6; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 < magnitude < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def percent(share: float | None, decimals: int = 1) -> str:
    """A share of 1 in percent; a dash for None."""
    return "–" if share is None else f"{100 * share:.{decimals}f}{NARROW_SPACE}%"


def share(value: float | None, decimals: int = 3) -> str:
    """A share of 1 as a plain number with fixed decimals; a dash for None."""
    return "–" if value is None else f"{value:.{decimals}f}"
