"""Rows as one Markdown table: where ours loses first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .rows import Row

_HEAD = ("case", "dtype", "ours", "base", "ratio", "p20 to p80", "fastest baseline", "speed of light, share", "others")


def report_text(rows: Sequence[Row]) -> str:
    """Table of all rows: losing ones, level ones, the others in the order they ran; memory and other figures below."""
    groups = {standing: [row for row in rows if row.standing == standing] for standing in ("loses", "level", "wins")}
    groups["loses"].sort(key=_ratio)
    lines = [*_machine(rows), ""]
    lines += [f"## Losing rows: {len(groups['loses'])} of {sum(map(len, groups.values()))}", ""]
    lines += _table(groups["loses"]) if groups["loses"] else ["none"]
    if groups["level"]:
        lines += ["", f"## Level: {len(groups['level'])}", "", *_table(groups["level"])]
    lines += ["", "## Other rows", "", *(_table(groups["wins"]) if groups["wins"] else ["none"])]
    for title, found in (("Memory", _memory(rows)), ("Parts and other figures", _figures(rows))):
        if found:
            lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def short_text(rows: Sequence[Row], width: int = 150) -> str:
    """One line per timed row, losing ones first, cut to `width` characters: for the end of a log."""
    order = ("loses", "level", "wins")
    timed = sorted((row for row in rows if row.standing), key=lambda row: order.index(row.standing))
    lines = []
    for row in timed:
        assert row.ours and row.hardest
        lost = {"loses": "LOSES ", "level": "level "}.get(row.standing, "")
        light = f", SoL {_share(row)}" if row.light_s else ""
        told = f"{lost}{row.label}: {shown(row.median(row.ours))}, {_ratio(row):.2f}x {row.hardest}{light}"
        lines.append(told if len(told) <= width else told[: width - 1] + "…")
    return "\n".join(lines) + ("\n" if lines else "")


def _ratio(row: Row) -> float:
    assert row.ours and row.hardest
    return row.ratio(row.ours, row.hardest)


def _machine(rows: Sequence[Row]) -> list[str]:
    names = ("device", "torch", "threads")
    values = {name: sorted({row.settings[name] for row in rows if name in row.settings}) for name in names}
    values["commit"] = sorted({row.commit for row in rows if row.commit})
    told = "; ".join(f"{name} {', '.join(found)}" for name, found in values.items() if found)
    note = "`ratio` is to the base, above 1 ours is faster. A row loses where a baseline is faster, beyond its rounds."
    return [f"{len(rows)} rows: {told}.", note]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    for row in rows:
        assert row.ours and row.hardest and row.base
        rival = "" if row.hardest == row.base else f"{_ratio(row):.2f}x {row.hardest}"
        low, high = row.spread(row.ours, row.base)
        others = [f"{name} {shown(row.median(name))}" for name in row.seconds if name not in (row.ours, row.base)]
        cells = [
            row.label.replace("|", "\\|"), row.settings.get("dtype", ""), f"{row.ours} {shown(row.median(row.ours))}",
            f"{row.base} {shown(row.median(row.base))}", f"{row.ratio(row.ours):.2f}x", f"{low:.2f} to {high:.2f}x",
            rival, _share(row), ", ".join(others),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _share(row: Row) -> str:
    if not row.light_s or not row.ours:
        return ""
    return f"{shown(row.light_s)}, {100 * row.light_s / row.median(row.ours):.0f} %"


def _memory(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if not row.memory:
            continue
        told = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in row.memory.items())
        first, *others = row.memory.values()
        ratios = ", ".join(f"{first / other:.3f}" for other in others if other > 0)
        lines.append(f"- {row.label}: {told}" + (f" (ratio {ratios})" if ratios else ""))
    return lines


def _figures(rows: Sequence[Row]) -> list[str]:
    """Rows without a baseline, and the numbers that a suite adds to its rows, as they came."""
    lines = []
    for row in rows:
        parts = [f"{name} {shown(row.median(name))}" for name in row.seconds] if row.hardest is None else []
        parts += [f"{name}: {_value(value)}" for name, value in row.extra.items() if not isinstance(value, list)]
        if parts:
            lines.append(f"- {row.label}: {'; '.join(parts)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown(seconds: float) -> str:
    """Three digits, in the unit that reads best."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
