"""Charts of evaluation scores as SVG files of their own: they carry their style, with a light and a dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vreflection.visualization.svg import described, percent, tag, text

_DARK = ("#6aa5ea", "#ec9a67", "#63c490", "#b893dd", "#d0b446", "#e08099")
_STYLE = (
    "svg{background:#fff;font:13px system-ui,sans-serif}text{fill:#1d2733}.quiet{fill:#5b6776}"
    ".grid{stroke:#dfe4ea}.track{fill:#eef1f4}.bar{fill:#2f6db5}.whisker{stroke:#14202c;stroke-width:1.5}"
    ".floor{stroke:#b3521e;stroke-width:2.5}.halo{stroke:#fff;stroke-width:5}"
    + "".join(
        f".s{i}{{stroke:{colour};fill:none;stroke-width:2;stroke-dasharray:{dash}}}.d{i}{{fill:{colour};stroke:{colour}}}"
        for i, (colour, dash) in enumerate(
            (("#2f6db5", "none"), ("#b3521e", "7 3"), ("#2c8a57", "2 3"), ("#7a4fa3", "9 3 2 3"), ("#8a6d00", "5 5"),
             ("#a03050", "12 4"))
        )
    )
    + "@media(prefers-color-scheme:dark){svg{background:#14181d}text{fill:#e7ecf1}.quiet{fill:#a9b4c0}"
    ".grid{stroke:#343c46}.track{fill:#222a33}.bar{fill:#6aa5ea}.whisker{stroke:#f2f5f8}.floor{stroke:#ec9a67}.halo{stroke:#14181d}"
    + "".join(f".s{i}{{stroke:{c}}}.d{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(_DARK))
    + "}"
)  # fmt: skip
_STYLES = 6  # classes .s0 to .s5
_WIDTH, _LABEL, _RIGHT, _ROW, _TOP = 860, 290, 210, 30, 44


def score_bars(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Horizontal accuracy bars with 95 % intervals.

    Args:
        rows: `label`, `value`, `low`, `high` (shares of 1), `n`, and `floor`, the accuracy of one constant letter, or
            `None`.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row to draw, got none")
    bottom = _TOP + _ROW * len(rows)
    span = _WIDTH - _LABEL - _RIGHT
    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LABEL + span * share
        shapes.append(tag("line", class_="grid", x1=x, x2=x, y1=_TOP - 4, y2=bottom))
        shapes.append(text(f"{100 * share:.0f} %", x=x, y=bottom + 16, text_anchor="middle", class_="quiet"))
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index
        shapes.append(_bar(row, y, span))
    words = "; ".join(_words(row) for row in rows)
    if any(row.get("floor") is not None for row in rows):
        shapes.append(tag("line", class_="floor", x1=_WIDTH - _RIGHT + 14, x2=_WIDTH - _RIGHT + 14, y1=11, y2=27))
        shapes.append(text("always the same letter", x=_WIDTH - _RIGHT + 24, y=23, class_="quiet"))
    heading, roles = described("scores", title, words)
    body = heading + tag("style", _STYLE) + text(title, x=8, y=22) + "".join(shapes)
    return _document(body, _WIDTH, bottom + 28, roles)


def _bar(row: Mapping[str, Any], y: float, span: float) -> str:
    value, low, high = (_LABEL + span * row[key] for key in ("value", "low", "high"))
    middle = y + 11
    whiskers = [(low, high, middle, middle), *((x, x, middle - 5, middle + 5) for x in (low, high))]
    parts = [
        text(_shortened(row["label"]), x=_LABEL - 10, y=y + 16, text_anchor="end"),
        tag("rect", class_="track", x=_LABEL, y=y + 3, width=span, height=16),
        tag("rect", class_="bar", x=_LABEL, y=y + 3, width=f"{value - _LABEL:.2f}", height=16),
        *(tag("line", class_="whisker", x1=f"{a:.2f}", x2=f"{b:.2f}", y1=c, y2=d) for a, b, c, d in whiskers),
        text(
            f"{percent(row['value'])} [{100 * row['low']:.1f}, {100 * row['high']:.1f}] n = {row['n']}",
            x=_WIDTH - _RIGHT + 10, y=y + 16,
        ),
    ]  # fmt: skip
    if row.get("floor") is not None:
        x = f"{_LABEL + span * row['floor']:.2f}"
        parts += [tag("line", class_=layer, x1=x, x2=x, y1=y + 1, y2=y + 21) for layer in ("halo", "floor")]
    return "".join(parts)


def _words(row: Mapping[str, Any]) -> str:
    floor = "" if row.get("floor") is None else f", always the same letter {percent(row['floor'])}"
    interval = f"{percent(row['low'])} to {percent(row['high'])}"
    return f"{row['label']}: {percent(row['value'])}, {interval}, n = {row['n']}{floor}"


def _shortened(label: str, length: int = 40) -> str:
    return label if len(label) <= length else label[: length - 1].rstrip() + "…"


def accuracy_by_steps(series: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> str:
    """Lines of accuracy over the number of latent steps, with 95 % intervals.

    Args:
        series: per line its points: `steps` (whole numbers), `value`, `low`, `high` (shares of 1). Points of a line may
            share their steps; at most six lines have styles of their own.

    Raises:
        ValueError: no points.
    """
    steps = sorted({point["steps"] for points in series.values() for point in points})
    if not steps:
        raise ValueError("expected at least one point to draw, got none")
    left, top, width, height = 52, 40, 560, 300
    at = {step: left + width * (index + 0.5) / len(steps) for index, step in enumerate(steps)}
    shapes = [_level(share, left, top, width, height) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shapes += [text(step, x=x, y=top + height + 18, text_anchor="middle", class_="quiet") for step, x in at.items()]
    shapes.append(text("latent steps", x=left + width / 2, y=top + height + 38, text_anchor="middle", class_="quiet"))
    words = []
    for index, (name, points) in enumerate(series.items()):
        style, shift = index % _STYLES, 7 * (index - (len(series) - 1) / 2)  # intervals beside each other
        ordered = sorted(points, key=lambda point: point["steps"])
        marks = [
            {key: top + height * (1 - point[key]) for key in ("value", "low", "high")}
            | {"x": at[point["steps"]] + shift}
            for point in ordered
        ]
        line = " ".join(f"{mark['x']:.1f},{mark['value']:.1f}" for mark in marks)
        shapes.append(tag("polyline", class_=f"s{style}", points=line))
        for mark in marks:
            ends = {"x1": f"{mark['x']:.1f}", "x2": f"{mark['x']:.1f}"}
            shapes.append(tag("line", class_="whisker", y1=f"{mark['low']:.1f}", y2=f"{mark['high']:.1f}", **ends))
            shapes.append(tag("circle", class_=f"d{style}", cx=f"{mark['x']:.1f}", cy=f"{mark['value']:.1f}", r=4))
        y = top + 12 + 20 * index
        x = left + width + 14
        shapes.append(tag("line", class_=f"s{style}", x1=x, x2=x + 28, y1=y, y2=y))
        shapes.append(text(_shortened(name, 28), x=x + 34, y=y + 4))
        told = (f"{point['steps']} steps {percent(point['value'])}" for point in ordered)
        words.append(f"{name}: {', '.join(told)}")
    heading, roles = described("steps", title, "; ".join(words))
    body = heading + tag("style", _STYLE) + text(title, x=8, y=22) + "".join(shapes)
    return _document(body, _WIDTH, max(top + height + 50, top + 30 + 20 * len(series)), roles)


def _level(share: float, left: float, top: float, width: float, height: float) -> str:
    y = top + height * (1 - share)
    return tag("line", class_="grid", x1=left, x2=left + width, y1=y, y2=y) + text(
        f"{100 * share:.0f} %", x=left - 8, y=y + 4, text_anchor="end", class_="quiet"
    )


def _document(body: str, width: float, height: float, roles: Mapping[str, str]) -> str:
    return tag(
        "svg", body, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height,
        **roles,
    )  # fmt: skip
