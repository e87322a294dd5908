"""An ablation as one HTML page that opens offline: findings, accuracy changes, divergences, the latents themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.atomic import atomic_write
from .report import page_environment
from .svg import described, number, tag, text

_WIDTH, _LABEL, _RIGHT, _ROW, _TOP = 760, 250, 150, 32, 34
_PANEL_WIDTH, _PANEL_HEIGHT, _LEFT = 340, 200, 46


def render_ablation(result: Mapping[str, Any]) -> str:
    """The page of an `ablation.json`.

    Raises:
        ValueError: another schema.
    """
    if result.get("schema") != 2:
        raise ValueError(
            f"expected an ablation of schema 2, got {result.get('schema')!r}; run vreflection ablate again"
        )
    summary = result["summary"]
    rows = summary["interventions"][1:]
    spans = summary["spans"]
    page = {
        "result": result,
        "summary": summary,
        "changes": changes_chart(rows) if rows else "",
        "divergences": divergence_chart(rows) if rows else "",
        "kinds": list(dict.fromkeys(change["kind"] for span in spans for change in span["changes"])),
        "spans": [
            {**span, "panels": latent_panels(span["latents"], span["span"])} for span in spans if span["latents"]
        ],
    }
    return page_environment().get_template("ablation.html.j2").render(page)


def write_ablation_page(result: Mapping[str, Any], path: Path) -> Path:
    """Render into `path`; readers see the old file or the whole new one."""
    page = render_ablation(result)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def changes_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy change per intervention with its paired 95 % interval, about zero."""
    pairs = [row["against_own"] for row in rows]
    reach = max(0.05, *(abs(pair[end]) for pair in pairs for end in ("low", "high")))
    span, bottom = _WIDTH - _LABEL - _RIGHT, _TOP + _ROW * len(rows)
    at = lambda value: _LABEL + span * (value + reach) / (2 * reach)  # noqa: E731
    shapes = []
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x = f"{at(share * reach):.1f}"
        style = "reference mark" if share == 0 else "grid"
        shapes.append(tag("line", class_=style, x1=x, x2=x, y1=_TOP - 6, y2=bottom))
        shapes.append(
            text(f"{100 * share * reach:+.0f}", x=x, y=bottom + 18, text_anchor="middle", class_="quiet tick")
        )
    for place, (row, pair) in enumerate(zip(rows, pairs)):
        y = _TOP + _ROW * place + _ROW / 2
        low, high, value = (at(pair[key]) for key in ("low", "high", "difference"))
        shapes += [
            text(row["label"], x=_LABEL - 12, y=y + 5, text_anchor="end"),
            tag("line", class_="whisker ink", x1=f"{low:.1f}", x2=f"{high:.1f}", y1=y, y2=y),
            tag("circle", class_="bar intervention", cx=f"{value:.1f}", cy=y, r=5),
            text(_points(pair), x=_WIDTH - _RIGHT + 12, y=y + 5, class_="value"),
        ]
    words = "; ".join(f"{row['label']}: {_points(pair)}" for row, pair in zip(rows, pairs))
    heading, roles = described("changes", "Change of accuracy in points", words)
    return _drawing(heading + "".join(shapes), _WIDTH, bottom + 26, "bars", roles)


def _points(pair: Mapping[str, Any]) -> str:
    p = "p < 0.001" if pair["grouped_p"] < 0.001 else f"p = {pair['grouped_p']:.3f}"
    return f"{100 * pair['difference']:+.1f}  {p}"


def divergence_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean KL divergence of the answer's tokens per intervention, with its interval."""
    most = max(1e-9, *(row["kl"]["high"] if row["kl"]["high"] is not None else row["kl"]["value"] for row in rows))
    span, bottom = _WIDTH - _LABEL - _RIGHT, _TOP + _ROW * len(rows)
    shapes = []
    for place, row in enumerate(rows):
        y, kl = _TOP + _ROW * place + _ROW / 2, row["kl"]
        shapes += [
            text(row["label"], x=_LABEL - 12, y=y + 5, text_anchor="end"),
            tag("rect", class_="track", x=_LABEL, y=y - 8, width=span, height=16),
            tag(
                "rect",
                class_="bar intervention",
                x=_LABEL,
                y=y - 8,
                width=f"{span * kl['value'] / most:.1f}",
                height=16,
            ),
            text(f"{number(kl['value'])} nats", x=_WIDTH - _RIGHT + 12, y=y + 5, class_="value"),
        ]
        if kl["low"] is not None:
            ends = {name: f"{_LABEL + span * kl[end] / most:.1f}" for name, end in (("x1", "low"), ("x2", "high"))}
            shapes.append(tag("line", class_="whisker ink", y1=y, y2=y, **ends))
    words = "; ".join(f"{row['label']}: {number(row['kl']['value'])} nats" for row in rows)
    heading, roles = described("divergences", "Divergence of the answer's tokens", words)
    return _drawing(heading + "".join(shapes), _WIDTH, bottom + 8, "bars", roles)


def latent_panels(latents: Mapping[str, Any], span: int) -> list[dict[str, str]]:
    """Norm, cosines and effective rank over the latent steps of a span."""
    steps = len(latents["norm"])
    level = {} if latents["text_norm"] is None else {"hidden states of text": [latents["text_norm"]] * steps}
    return [
        {"title": "Norm", "drawing": lines_panel(f"norm-{span}", {"latents": latents["norm"], **level}, steps)},
        {
            "title": "Cosines",
            "drawing": lines_panel(
                f"cosines-{span}",
                {
                    "with the next step": latents["next_cosine"],
                    "with the step’s mean over questions": latents["mean_cosine"],
                },
                steps,
            ),
        },
        {
            "title": "Effective rank over questions",
            "drawing": lines_panel(f"rank-{span}", {"latents": latents["rank_over_questions"]}, steps),
        },
    ]


def lines_panel(ident: str, series: Mapping[str, Sequence[float]], steps: int) -> str:
    """Lines over latent steps, from zero (or the lowest value, if negative) up, each named under the panel."""
    values = [value for line in series.values() for value in line]
    low, high = min(0.0, *values), max(*values, 1e-9)
    bottom = 10 + _PANEL_HEIGHT
    width = _PANEL_WIDTH - _LEFT - 12
    x = lambda step: _LEFT + width * (step / max(steps - 1, 1) if steps > 1 else 0.5)  # noqa: E731
    y = lambda value: bottom - _PANEL_HEIGHT * (value - low) / (high - low)  # noqa: E731
    shapes = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        shapes.append(
            tag("line", class_="grid", x1=_LEFT, x2=_LEFT + width, y1=f"{y(value):.1f}", y2=f"{y(value):.1f}")
        )
        shapes.append(text(number(value), x=_LEFT - 6, y=f"{y(value) + 4:.1f}", text_anchor="end", class_="quiet tick"))
    for step in range(steps):
        shapes.append(text(step + 1, x=f"{x(step):.1f}", y=bottom + 16, text_anchor="middle", class_="quiet tick"))
    words = []
    for place, (name, line) in enumerate(series.items()):
        marks = [(x(step), y(value)) for step, value in enumerate(line)]
        shapes.append(tag("polyline", class_=f"s{place}", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in marks)))
        shapes += [tag("circle", class_=f"s{place} dot", cx=f"{a:.1f}", cy=f"{b:.1f}", r=1.5) for a, b in marks]
        at = bottom + 36 + 18 * place
        shapes.append(tag("line", class_=f"s{place}", x1=_LEFT, x2=_LEFT + 26, y1=at - 4, y2=at - 4, stroke_width=2.4))
        shapes.append(text(name, x=_LEFT + 32, y=at))
        words.append(f"{name}: {', '.join(number(value) for value in line)}")
    heading, roles = described(ident, ident.partition("-")[0].capitalize(), "; ".join(words))
    return _drawing(heading + "".join(shapes), _PANEL_WIDTH, bottom + 26 + 18 * len(series) + 6, "curve", roles)


def _drawing(body: str, width: float, height: float, style: str, roles: Mapping[str, str]) -> str:
    return tag("svg", body, class_=style, viewBox=f"0 0 {width} {height}", **roles)
