"""Accuracy over hops, and the steps that a hop costs, as inline SVG. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from .svg import described, percent, tag, text

LINE_HEIGHT = 17  # of the labels beside the lines
LABEL_WIDTH = 300
SPREAD = 0.022  # of a hop's width, by which the lines' marks stand apart


def hops_chart(
    series: Sequence[Mapping[str, Any]],
    guess: float,
    ident: str,
    title: str,
    size: tuple[int, int] = (920, 400),
    labels: bool = True,
) -> str:
    """Accuracy over the number of hops: a line per arm with 95 % intervals.

    Args:
        series: per arm `label`, `style` (a class `s0` to `s7` of the style sheet) and `by_hops`: dicts of `hops`,
            `value`, `low`, `high` (shares of 1).
        guess: accuracy of naming any digit of the image, drawn as a reference line.
        ident: page-unique prefix of ids. labels: name the lines at their right ends.
    """
    width, height = size
    left, top, bottom = 52, 16, height - 46
    right = width - (LABEL_WIDTH if labels else 16)
    hops = sorted({point["hops"] for one in series for point in one["by_hops"]})
    step = (right - left - 40) / max(hops[-1] - hops[0], 1)

    def x(value: float, place: int = 0) -> float:
        apart = (place - (len(series) - 1) / 2) * SPREAD * step
        return left + 20 + (value - hops[0]) * step + apart

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(tag("line", class_="grid", x1=left, x2=right, y1=f"{y(share):.1f}", y2=f"{y(share):.1f}"))
        parts.append(_tick(f"{100 * share:.0f} %", left - 8, y(share) + 4, "end"))
    parts += [_tick(str(count), x(count), bottom + 20) for count in hops]
    parts.append(_tick("hops", (left + right) / 2, height - 6))
    parts.append(tag("line", class_="reference", x1=left, x2=right, y1=f"{y(guess):.1f}", y2=f"{y(guess):.1f}"))
    lines, ends, words = [], [], []
    for place, one in enumerate(series):
        points = [(x(p["hops"], place), y(p["value"]), y(p["low"]), y(p["high"])) for p in one["by_hops"]]
        style = one["style"]
        for px, _, low, high in points:
            lines.append(tag("line", class_=f"{style} whisker-line", x1=_n(px), x2=_n(px), y1=_n(low), y2=_n(high)))
        lines.append(tag("polyline", class_=style, points=" ".join(f"{_n(px)},{_n(py)}" for px, py, *_ in points)))
        lines += [tag("circle", class_=f"{style} mark", cx=_n(px), cy=_n(py), r=3.2) for px, py, *_ in points]
        ends.append((points[-1][0], points[-1][1], one))
        shares = ", ".join(percent(p["value"], 0) for p in one["by_hops"])
        words.append(f"{one['label']}: {shares}")
    names = _end_labels(ends, right, top, bottom) if labels else ""
    over = f"at {hops[0]} to {hops_text(hops[-1])}" if len(hops) > 1 else f"at {hops_text(hops[0])}"
    heading, roles = described(
        ident, title, f"Accuracy {over}. {'; '.join(words)}. Naming any digit of the image: {percent(guess, 0)}."
    )
    body = heading + "".join(parts) + "".join(lines) + names
    return tag("svg", body, class_="curve hops", viewBox=f"0 0 {width} {height}", **roles)


def _end_labels(ends: Sequence[tuple[float, float, Mapping[str, Any]]], right: float, top: float, bottom: float) -> str:
    """Names beside the lines' ends, pushed apart where they would overlap."""
    order = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, end, _ in order:
        places.append(max(end, places[-1] + LINE_HEIGHT) if places else end)
    overflow = max(0.0, places[-1] - bottom) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        ceiling = bottom if index == len(places) - 1 else places[index + 1] - LINE_HEIGHT
        places[index] = max(top, min(places[index] - (overflow if index == len(places) - 1 else 0), ceiling))
    parts = []
    for (px, end, one), at in zip(order, places):
        parts.append(tag("polyline", class_="leader", points=f"{_n(px + 6)},{_n(end)} {_n(right + 4)},{_n(at)}"))
        parts.append(tag("line", class_=one["style"], x1=right + 6, x2=right + 30, y1=_n(at), y2=_n(at)))
        parts.append(text(one["label"], x=right + 36, y=_n(at + 4), class_="name"))
    return "".join(parts)


def steps_chart(
    series: Sequence[Mapping[str, Any]],
    level: float,
    ident: str,
    title: str,
    size: tuple[int, int] = (920, 300),
) -> str:
    """Training steps until an arm first answers `level` of a hop's validation questions, on a logarithmic axis.

    Args:
        series: per arm `label`, `style` and `steps`: dicts of `hops`, `reached` (step, or None where it was not) and
            `trained` (steps of the run).
    """
    width, height = size
    left, right, top, bottom = 76, width - LABEL_WIDTH, 12, height - 46
    hops = sorted({row["hops"] for one in series for row in one["steps"]})
    longest = max(row["trained"] for one in series for row in one["steps"])
    shortest = min(row["reached"] or row["trained"] for one in series for row in one["steps"])
    low, high = math.log10(shortest / 1.3), math.log10(longest * 1.15)
    band = (bottom - top) / len(hops)

    def x(steps: float) -> float:
        return left + (right - left) * (math.log10(steps) - low) / (high - low)

    parts, words = [], []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            steps = factor * 10**power
            if low <= math.log10(steps) <= high:
                parts.append(tag("line", class_="grid", x1=_n(x(steps)), x2=_n(x(steps)), y1=top, y2=bottom))
                parts.append(_tick(f"{steps:,}", x(steps), bottom + 18))
    parts.append(_tick("training steps (logarithmic)", (left + right) / 2, height - 6))
    for row, count in enumerate(hops):
        middle = top + band * (row + 0.5)
        parts.append(_tick(hops_text(count), left - 12, middle + 4, "end"))
        for place, one in enumerate(series):
            at = middle + (place - (len(series) - 1) / 2) * min(18, band / max(len(series), 1))
            entry = next((entry for entry in one["steps"] if entry["hops"] == count), None)
            if entry is None:
                continue
            end = entry["reached"] or entry["trained"]
            style = one["style"]
            parts.append(tag("line", class_=style, x1=left, x2=_n(x(end)), y1=_n(at), y2=_n(at)))
            if entry["reached"]:
                parts.append(tag("circle", class_=f"{style} mark", cx=_n(x(end)), cy=_n(at), r=4))
                words.append(f"{one['label']}, {hops_text(count)}: {end} steps")
            else:
                tip = f"{_n(x(end))},{_n(at - 5)} {_n(x(end) + 9)},{_n(at)} {_n(x(end))},{_n(at + 5)}"
                parts.append(tag("polyline", class_=f"{style} open", points=tip))
                parts.append(text("not reached", x=_n(x(end) + 14), y=_n(at + 4), class_="quiet tick"))
                words.append(f"{one['label']}, {hops_text(count)}: not reached in {end} steps")
    for place, one in enumerate(series):
        at = top + 14 + 22 * place
        parts.append(tag("line", class_=one["style"], x1=right + 62, x2=right + 86, y1=at, y2=at))
        parts.append(text(one["label"], x=right + 92, y=at + 4, class_="name"))
    heading, roles = described(ident, title, f"Steps to reach {percent(level, 0)}. {'; '.join(words)}.")
    return tag("svg", heading + "".join(parts), class_="curve hops", viewBox=f"0 0 {width} {height}", **roles)


def steps_to_reach(points: Sequence[Mapping[str, Any]], hops: int, level: float) -> int | None:
    """First step from which on accuracy at `hops` stays at or above `level`; None where it does not end there.

    Args:
        points: `step` and `by_hops` of validation questions decoded during training.
    """
    reached = None
    for point in points:
        value = next(row["value"] for row in point["by_hops"] if row["hops"] == hops)
        if value < level:
            reached = None
        elif reached is None:
            reached = int(point["step"])
    return reached


def hops_text(count: int) -> str:
    return f"{count} hop" if count == 1 else f"{count} hops"


def standalone(drawing: str) -> str:
    """A drawing as a file of its own: with the page's style sheet, so that it follows the reader's theme as well."""
    style = resources.files("vreflection.visualization").joinpath("style.html.j2").read_text(encoding="utf-8")
    own = ":root { color: var(--ink); background: var(--paper); font-family: system-ui, sans-serif; }"
    opening, rest = drawing.split(">", 1)
    style = style.replace("</style>", f"{own}\n</style>")
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def _tick(content: str, x: float, y: float, anchor: str = "middle") -> str:
    return text(content, x=_n(x), y=_n(y), text_anchor=anchor, class_="quiet tick")


def _n(value: float) -> str:
    return f"{value:.1f}"
