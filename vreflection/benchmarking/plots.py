"""Figures of raw rows: time and memory over a swept size, roofline, decode latency over batch.

SVG without a background, lines and text in tones that read on white and on black alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .rows import Row

_INK = "#7d8590"
_COLOURS = ("#2f81f7", "#db6d28", "#3fb950", "#a371f7", "#db61a2", "#bf8700")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_AXES = {"tokens": "tokens", "boxes": "boxes", "width": "width", "batch": "rows decoded together"}
_PER_SECOND = ("requests/s", "samples/s")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every figure that the rows give data for, and return their paths; none for rows without such data.

    Raises:
        ConfigError: matplotlib is missing.
    """
    pyplot = _pyplot()
    figures: dict[str, Callable[[Any, Sequence[Row]], Any]] = {
        "growth": lambda plt, found: _curves(plt, found, "growth", "ms"),
        "memory": lambda plt, found: _curves(plt, found, "memory", "MiB"),
        "decode": lambda plt, found: _curves(plt, found, "decode", "ms per step"),
        "serving": lambda plt, found: _curves(plt, found, "serving", "requests/s"),
        "training": lambda plt, found: _bars(plt, found, "training", "samples/s"),
        "roofline": _roofline,
    }
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    with _style(pyplot):
        for name, make in figures.items():
            figure = make(pyplot, rows)
            if figure is not None:
                figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
                pyplot.close(figure)
                written.append(folder / f"{name}.svg")
    return written


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "plots: matplotlib is missing; pip install 'vreflection[bench]', or leave --plots out"
        ) from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


@contextmanager
def _style(pyplot: Any) -> Iterator[None]:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    # Text stays text and ids stay the same, so that the files are small and a run's differences show.
    fixed = {"svg.fonttype": "none", "svg.hashsalt": "vreflection", "font.size": 9, "grid.alpha": 0.3}
    with pyplot.rc_context({**dict.fromkeys(inked, _INK), **fixed}):
        yield


def _points(rows: Sequence[Row], figure: str) -> dict[str, list[Row]]:
    """Rows of a figure by what is swept, each sorted by size."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.sweep.get("figure") == figure:
            found.setdefault(str(row.sweep["axis"]), []).append(row)
    return {axis: sorted(points, key=lambda row: row.sweep["value"]) for axis, points in found.items()}


def _curves(pyplot: Any, rows: Sequence[Row], figure_name: str, unit: str) -> Any:
    """One panel per swept size, one line per variant; times with the speed of light beside them."""
    panels = _points(rows, figure_name)
    if not panels:
        return None
    from matplotlib import ticker

    figure, axes = _panels(pyplot, len(panels), 3.4 if len(panels) > 1 else 4.4)
    variants = _variants(panels)
    for axis, (swept, points) in zip(axes[0], panels.items()):
        for index, variant in enumerate(variants):
            known = [(row.sweep["value"], _values(row)[variant]) for row in points if variant in _values(row)]
            if known:
                style = {"marker": _MARKS[index % len(_MARKS)], "color": _COLOURS[index % len(_COLOURS)]}
                axis.plot(*zip(*known), label=variant, markersize=4, linewidth=1.3, **style)
        light = [(row.sweep["value"], 1e3 * row.light_s / row.sweep.get("steps", 1)) for row in points if row.light_s]
        if light and unit not in ("MiB", *_PER_SECOND):
            axis.plot(*zip(*light), ":", color=_INK, label="speed of light")
        sizes = sorted({row.sweep["value"] for row in points})
        axis.set(xscale="log", yscale="linear" if unit in _PER_SECOND else "log", xlabel=_AXES.get(swept, swept))
        axis.set_ylabel(unit)
        if unit in _PER_SECOND:
            axis.set_ylim(bottom=0)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.grid(True)
    _legend(figure, axes)
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """Above all panels, as wide as they are."""
    columns = 4 if axes.size > 1 else 2
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=columns)


def _panels(pyplot: Any, count: int, width: float) -> tuple[Any, Any]:
    return pyplot.subplots(1, count, figsize=(width * count, 3.3), squeeze=False, layout="constrained")


def _bars(pyplot: Any, rows: Sequence[Row], figure_name: str, unit: str) -> Any:
    """One panel per axis, a group of bars per value, a bar per variant."""
    panels = _points(rows, figure_name)
    if not panels:
        return None
    figure, axes = _panels(pyplot, len(panels), 4.4)
    variants = _variants(panels)
    width = 0.8 / len(variants)
    for axis, (swept, points) in zip(axes[0], panels.items()):
        for index, variant in enumerate(variants):
            heights = [_values(row).get(variant, 0.0) for row in points]
            places = [place + (index - (len(variants) - 1) / 2) * width for place in range(len(points))]
            bars = axis.bar(places, heights, width * 0.92, label=variant, color=_COLOURS[index % len(_COLOURS)])
            axis.bar_label(bars, fmt="%.3g", fontsize=8, color=_INK, padding=2)
        axis.set_xticks(range(len(points)), [str(row.sweep["value"]) for row in points])
        axis.margins(y=0.12)
        axis.set(title=swept, ylabel=unit)
        axis.grid(True, axis="y")
    _legend(figure, axes)
    return figure


def _variants(panels: dict[str, list[Row]]) -> list[str]:
    return list(dict.fromkeys(name for points in panels.values() for row in points for name in _values(row)))


def _values(row: Row) -> dict[str, float]:
    """What a figure shows of a row: MiB, things per second, or milliseconds (per step, where a call is several)."""
    if row.sweep["figure"] == "memory":
        return {name: size / 2**20 for name, size in row.memory.items() if size > 0}
    if "count" in row.sweep:
        return {name: row.sweep["count"] / row.median(name) for name in row.seconds}
    steps = row.sweep.get("steps", 1)
    return {name: 1e3 * row.median(name) / steps for name in row.seconds}


def _roofline(pyplot: Any, rows: Sequence[Row]) -> Any:
    """Flops per second that ours reaches over flops per byte, one panel per dtype, under that run's own ceilings."""
    usable = [row for row in rows if row.bytes and row.flops and row.ceilings and row.ours]
    if not usable:
        return None
    suites = sorted({row.suite for row in usable})
    dtypes = sorted({row.settings.get("dtype", "") for row in usable})
    figure, axes = _panels(pyplot, len(dtypes), 3.8)
    for axis, dtype in zip(axes[0], dtypes):
        points = [row for row in usable if row.settings.get("dtype", "") == dtype]
        intensity = [row.flops / row.bytes for row in points if row.flops and row.bytes]
        reached = [row.flops / row.median(row.ours) / 1e9 for row in points if row.flops and row.ours]
        # Memory, and, for models that stay there, a processor's cache.
        found = sorted({(row.ceilings["bytes_per_s"], row.ceilings["flops_per_s"]) for row in points})
        low, high = min(intensity) / 2, max(*intensity, *(peak / speed for speed, peak in found)) * 2
        for speed, peak in (found[0], found[-1]):
            roof = [(x, min(x * speed, peak) / 1e9) for x in (low, peak / speed, high)]
            style = {"color": _INK, "linestyle": "-" if (speed, peak) == found[0] else ":"}
            axis.plot(*zip(*roof), label="measured ceilings" if (speed, peak) == found[0] else None, **style)
        for index, suite in enumerate(suites):
            shown = [(x, y) for row, x, y in zip(points, intensity, reached) if row.suite == suite]
            style = {"marker": _MARKS[index % len(_MARKS)], "color": _COLOURS[index % len(_COLOURS)]}
            axis.plot(
                *(zip(*shown) if shown else ([], [])),
                linestyle="",
                markersize=4,
                alpha=0.8,
                label=suite.replace("_", " "),
                **style,
            )
        axis.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="Gflop/s", title=dtype)
        axis.grid(True)
    _legend(figure, axes)
    return figure
