"""Inline SVG charts: accuracy bars with intervals, and training curves.

Text stays text, colours come from the page's classes and variables, and every drawing carries a title and a
description that gives its content in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vreflection.visualization.svg import described, number, percent, tag, text

GROUPS = {
    "latent": "With latent steps",
    "intervention": "Latents changed",
    "text": "Steps in words",
    "control": "Without feedback",
}
CURVE_STYLES = 10  # colours and dash patterns in the style sheet: .s0 … .s9
MAX_POINTS = 200  # more would be finer than the panel's pixels
LOG_RANGE = 20  # largest / smallest value from which a linear axis would flatten the end of a curve

_ROW, _HEADING, _BAR = 46, 34, 14
_LABEL_LENGTH = 46  # characters that fit beside the value on a phone
_TOP = 40  # the two reference labels


def accuracy_bars(rows: Sequence[Mapping[str, Any]], chance: float, guess_in_image: float) -> str:
    """Horizontal accuracy bars with 95 % intervals, grouped, as one SVG that stretches to its container.

    Args:
        rows: the report's `rows`: `label`, `group` and `accuracy` with correct, n, value, low, high (shares of 1).
        chance: accuracy of guessing any answer, drawn as a reference line over all rows.
        guess_in_image: accuracy of guessing among the answers visible in the image, drawn likewise.
    """
    y = _TOP
    shapes: list[str] = []
    texts: list[str] = []
    words: list[str] = []
    for group, heading in GROUPS.items():
        members = [row for row in rows if row["group"] == group]
        if not members:
            continue
        texts.append(text(heading, x=0, y=y + 22, class_="group"))
        y += _HEADING
        for row in members:
            shapes.append(_bar(row, y) + "".join(_mark(share, y) for share in (chance, guess_in_image)))
            texts.append(_bar_text(row, y))
            accuracy = row["accuracy"]
            words.append(
                f"{row['label']}: {percent(accuracy['value'])}, "
                f"interval {percent(accuracy['low'])} to {percent(accuracy['high'])}, n = {accuracy['n']}"
            )
            y += _ROW
    title, roles = described(
        "accuracy",
        "Accuracy with 95 % intervals",
        f"{'; '.join(words)}. Reference lines: chance {percent(chance)}, "
        f"guessing a digit of the image {percent(guess_in_image)}.",
    )
    references = _reference("chance", chance, 12, y) + _reference("any digit in the image", guess_in_image, 30, y)
    # Texts come last: their halo keeps lines from striking them through.
    body = title + _percent_axis(y) + references + "".join(shapes) + "".join(texts)
    return tag("svg", body, class_="bars", width="100%", height=y + 26, **roles)


def _bar(row: Mapping[str, Any], y: float) -> str:
    accuracy = row["accuracy"]
    value, low, high = (100 * min(max(accuracy[key], 0.0), 1.0) for key in ("value", "low", "high"))
    middle = y + 20 + _BAR / 2
    whisker = ((low, high, middle, middle), *((end, end, middle - 5, middle + 5) for end in (low, high)))
    return (
        tag("rect", class_="track", x=0, y=y + 20, width="100%", height=_BAR)
        + tag("rect", class_=f"bar {row['group']}", x=0, y=y + 20, width=f"{value:.2f}%", height=_BAR)
        + "".join(
            tag("line", class_=f"whisker {layer}", x1=f"{x1:.2f}%", x2=f"{x2:.2f}%", y1=y1, y2=y2)
            for layer in ("halo", "ink")
            for x1, x2, y1, y2 in whisker
        )
    )


def _bar_text(row: Mapping[str, Any], y: float) -> str:
    accuracy = row["accuracy"]
    label = row["label"] if len(row["label"]) <= _LABEL_LENGTH else row["label"][: _LABEL_LENGTH - 1].rstrip() + "…"
    interval = f"  [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]  n = {accuracy['n']}"
    value = tag("tspan", percent(accuracy["value"]), class_="value") + tag("tspan", interval, class_="wide quiet")
    return text(label, x=0, y=y + 13) + tag("text", value, x="100%", y=y + 13, text_anchor="end")


def _mark(share: float, y: float) -> str:
    """Where a reference line crosses a row's bar."""
    at = f"{100 * share:.2f}%"
    return tag("line", class_="reference mark", x1=at, x2=at, y1=y + 17, y2=y + 23 + _BAR)


def _reference(label: str, share: float, y: float, bottom: float) -> str:
    """A faint vertical line through all rows with its name beside its upper end."""
    at = f"{100 * share:.2f}%"
    return tag("line", class_="reference", x1=at, x2=at, y1=y - 10, y2=bottom) + text(
        f"{label} {percent(share, 0 if round(100 * share, 6).is_integer() else 1)}", x=at, y=y, dx=6, class_="quiet"
    )


def _percent_axis(y: float) -> str:
    ticks = []
    for share in (0, 25, 50, 75, 100):
        anchor = {0: "start", 100: "end"}.get(share, "middle")
        ticks.append(tag("line", class_="grid", x1=f"{share}%", x2=f"{share}%", y1=_TOP + 4, y2=y + 4))
        ticks.append(text(f"{share} %", x=f"{share}%", y=y + 20, text_anchor=anchor, class_="quiet tick"))
    return "".join(ticks)


def curve_keys(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Every measured key of the curves but `step`, in the order of first appearance."""
    return list(dict.fromkeys(key for points in curves.values() for point in points for key in point if key != "step"))


def training_curve(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    key: str,
    ident: str,
    title: str,
    names: Mapping[str, str] | None = None,
    size: tuple[int, int] = (380, 220),
) -> str:
    """One panel: `key` over the step, a line per arm that has it.

    Axes: linear steps from 0; values on a logarithmic axis when they are positive and span more than a factor of 20,
    else linear with 0 included. Values that are not finite are left out. More than 200 points are averaged in equal
    bins. An arm keeps its colour and dash pattern (class `s0` … `s9`, by its place in `curves`) in every panel.

    Args:
        ident: page-unique prefix of the title's and the description's id.
        names: arm to the name used in the description.
        size: width and height of the drawing's own coordinates.
    """
    series = {arm: points for arm in curves if (points := _points(curves[arm], key))}
    if not series:
        raise ValueError(f"no arm has a finite value for {key!r}")
    last_step = max(float(point["step"]) for arm in series for point in curves[arm]) or 1.0
    axes = _Axes(last_step, [value for points in series.values() for _, value in points], *size)
    lines = "".join(
        _line([(axes.x(step), axes.y(value)) for step, value in points], list(curves).index(arm) % CURVE_STYLES)
        for arm, points in series.items()
    )
    words = "; ".join(
        f"{(names or {}).get(arm, arm)}: {number(points[0][1])} at step {points[0][0]:g}, "
        f"{number(points[-1][1])} at step {points[-1][0]:g}"
        for arm, points in series.items()
    )
    heading, roles = described(ident, title, words)
    return tag("svg", heading + axes.drawn() + lines, class_="curve", viewBox=f"0 0 {size[0]} {size[1]}", **roles)


class _Axes:
    """Places steps and values in a panel of `width` x `height` and draws its grid and numbers."""

    def __init__(self, last_step: float, values: Sequence[float], width: int, height: int):
        self.left, self.right, self.top, self.bottom = 50, width - 10, 10, height - 38
        self.last_step, self.height = last_step, height
        self.log = min(values) > 0 and max(values) / min(values) > LOG_RANGE
        self.scale = math.log10 if self.log else float
        self.ticks = _log_ticks(min(values), max(values)) if self.log else _ticks(min(0, *values), max(0, *values))
        self.low, self.high = self.scale(min(self.ticks[0], *values)), self.scale(max(self.ticks[-1], *values))

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * step / self.last_step

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (self.scale(value) - self.low) / (self.high - self.low)

    def drawn(self) -> str:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(tag("line", class_="grid", x1=self.left, x2=self.right, y1=f"{y:.1f}", y2=f"{y:.1f}"))
            parts.append(_tick(f"{tick:g}", self.left - 7, y + 4, "end"))
        steps = (step for step in _ticks(0, self.last_step) if step <= self.last_step)
        parts += [_tick(f"{step:g}", self.x(step), self.bottom + 17) for step in steps]
        name = "step (logarithmic value axis)" if self.log else "step"
        parts.append(_tick(name, (self.left + self.right) / 2, self.height - 4))
        return "".join(parts)


def _tick(content: str, x: float, y: float, anchor: str = "middle") -> str:
    return text(content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_="quiet tick")


def _points(points: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values, averaged in equal bins down to MAX_POINTS."""
    found = [(float(p["step"]), float(p[key])) for p in points if p.get(key) is not None and math.isfinite(p[key])]
    size = math.ceil(len(found) / MAX_POINTS)
    bins = [found[start : start + size] for start in range(0, len(found), size or 1)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in bins]


def _line(points: Sequence[tuple[float, float]], style: int) -> str:
    if len(points) == 1:
        return tag("circle", class_=f"s{style} dot", cx=f"{points[0][0]:.1f}", cy=f"{points[0][1]:.1f}", r=2.5)
    return tag("polyline", class_=f"s{style}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = (high - low) or 1.0
    raw = span / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with twice and five times them where they alone would be few."""
    factors = (1, 2, 5) if high / low <= 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (float(f"{factor}e{power}") for power in powers for factor in factors)
    return [tick for tick in ticks if low <= tick <= high]
