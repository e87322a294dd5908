"""From an ablation's rows to its tables: accuracy changes with paired tests, divergences, what latents are like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .interventions import OWN, Intervention
from .latents import latent_shape
from .statistics import Z95, grouped_wilson, paired, wilson


def summarize(
    own: Sequence[Mapping[str, Any]],
    changed: Sequence[Mapping[str, Any]],
    interventions: Sequence[Intervention],
    latents: Sequence[torch.Tensor | None],
    token_text: Callable[[int], str],
) -> dict[str, Any]:
    """Everything the tables say.

    Args:
        own, changed: rows of the two passes. latents: per question the own ones `(S, N, D)`, if a span was opened.
        token_text: names a token of the logit lens.
    """
    correct = [bool(row["correct"]) for row in own]
    groups = [row["group"] for row in own]
    rows: list[dict[str, Any]] = [
        {"name": OWN, "label": "the model's own latents", "accuracy": accuracy(correct, groups), **rates(own)}
    ]
    for one in interventions:
        said = [row[one.name] for row in changed]
        now = [bool(row["correct"]) for row in said]
        rows.append(
            {
                "name": one.name,
                "label": one.label,
                "reached": sum(bool(row["reached"]) for row in said),
                "accuracy": accuracy(now, groups),
                "against_own": paired(correct, now, groups).as_dict(),
                "changed_answers": sum(a["answer"] != b["answer"] for a, b in zip(own, said)) / len(own),
                "kl": mean_interval([row["kl"] for row in said]),
                "kept": wilson(sum(row["kept"] for row in said), len(said)).as_dict(),
                **rates(said),
            }
        )
    return {
        "n": len(own),
        "opened": sum(bool(row["spans"]) for row in own),
        "interventions": rows,
        "spans": by_span(own, changed, interventions, latents, token_text),
        "grounding": grounded(row["grounding"] for row in own if "grounding" in row),
    }


def by_span(
    own: Sequence[Mapping[str, Any]],
    changed: Sequence[Mapping[str, Any]],
    interventions: Sequence[Intervention],
    latents: Sequence[torch.Tensor | None],
    token_text: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Per span number, over the answers that went through such a span.

    `changes`: what changing this span alone does to those answers that it reached. `latents`: `latent_shape` of its
    latents, the norm of hidden states that give text, and the logit lens; `grounding`: attention in its boxes.
    """
    norms = [row["text_norm"] for row in own if row["text_norm"] is not None]
    spans = []
    for span in range(max((len(z) for z in latents if z is not None), default=0)):
        having = [place for place, z in enumerate(latents) if z is not None and len(z) > span]
        states = torch.stack([latents[place][span] for place in having])  # pyright: ignore[reportOptionalSubscript]
        looks = [own[place]["grounding"][span : span + 1] for place in having if "grounding" in own[place]]
        shape: dict[str, Any] | None = None
        if states.shape[1]:
            lenses = [own[place]["lens"][span] for place in having]
            shape = {**latent_shape(states), "text_norm": float(np.mean(norms)) if norms else None}
            shape["lens"] = lens(lenses, token_text)
        spans.append(
            {
                "span": span + 1,
                "n": len(having),
                "changes": [change_of_reached(own, changed, one) for one in interventions if one.span == span + 1],
                "latents": shape,
                "grounding": grounded(look for look in looks if look),
            }
        )
    return spans


def change_of_reached(
    own: Sequence[Mapping[str, Any]], changed: Sequence[Mapping[str, Any]], one: Intervention
) -> dict[str, Any]:
    """An intervention's change of accuracy over the questions it reached."""
    pairs = [(before, after[one.name]) for before, after in zip(own, changed) if after[one.name]["reached"]]
    change: dict[str, Any] = {"name": one.name, "kind": one.kind, "reached": len(pairs)}
    if pairs:
        before, now = ([bool(row["correct"]) for row in side] for side in zip(*pairs))
        groups = [row["group"] for row, _ in pairs]
        change["own"], change["accuracy"] = accuracy(before, groups), accuracy(now, groups)
        change["against_own"] = paired(before, now, groups).as_dict()
    return change


def accuracy(correct: Sequence[bool], groups: Sequence[str]) -> dict[str, Any]:
    _, code = np.unique(np.asarray(groups), return_inverse=True)
    right = np.bincount(code, weights=np.asarray(correct, dtype=np.int64)).astype(np.int64)
    return grouped_wilson(right, np.bincount(code)).as_dict()


def rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    opened = [row for row in rows if row["spans"]]
    return {
        "unparsed": sum(row["answer"] is None for row in rows) / len(rows),
        "trigger_rate": len(opened) / len(rows),
        "closed_rate": sum(row["closed"] for row in opened) / len(opened) if opened else None,
    }


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of values of at least 0 with its normal 95 % interval; one value has none."""
    held = np.asarray(values, dtype=float)
    mean = float(held.mean())
    if len(held) < 2:
        return {"value": mean, "low": None, "high": None, "n": len(held)}
    half = float(Z95 * held.std(ddof=1) / math.sqrt(len(held)))
    return {"value": mean, "low": max(0.0, mean - half), "high": mean + half, "n": len(held)}


def lens(lenses: Sequence[Sequence[Mapping[str, Any]]], token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Per latent step: the tokens most often likeliest, with the share of questions, and the mean entropy."""
    steps = []
    for of_step in zip(*lenses, strict=True):
        tops = Counter(one["ids"][0] for one in of_step)
        steps.append(
            {
                "entropy": float(np.mean([one["entropy"] for one in of_step])),
                "chance": float(np.mean([one["chances"][0] for one in of_step])),
                "top": [
                    {"token": token_text(token), "share": count / len(of_step)} for token, count in tops.most_common(3)
                ],
            }
        )
    return steps


def grounded(looks: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Attention of the student in the gold boxes, over questions; of each the mean over the given spans.

    `right_box` counts spans whose own box got more than any other of their question, `chance` what guessing would.
    """
    questions = [spans for spans in looks if spans]
    if not questions:
        return None
    table: dict[str, Any] = {
        name: mean_interval([float(np.mean([one[name] for one in spans])) for spans in questions])
        for name in ("mass", "iou", "uniform")
    }
    compared = [[one for one in spans if one.get("right_box") is not None] for spans in questions]
    compared = [spans for spans in compared if spans]
    if compared:
        right = np.array([sum(one["right_box"] for one in spans) for spans in compared]).astype(np.int64)
        table["right_box"] = grouped_wilson(right, np.array([len(spans) for spans in compared])).as_dict()
        table["chance"] = float(np.mean([one["chance"] for spans in compared for one in spans]))
    return table


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in words made from them alone."""
    own, *others = summary["interventions"]
    said = [
        f"{summary['opened']} of {summary['n']} answers opened a latent span; own accuracy "
        f"{100 * own['accuracy']['value']:.1f} %."
    ]
    for row in others:
        pair = row["against_own"]
        change = points(pair, " points")
        seen = "changes" if pair["grouped_p"] < 0.05 else "does not measurably change"
        p = "p < 0.001" if pair["grouped_p"] < 0.001 else f"p = {pair['grouped_p']:.3f}"
        few = "" if row["reached"] in (summary["n"], summary["opened"]) else f", {row['reached']} reached"
        said.append(
            f"{row['label'][0].upper()}{row['label'][1:]}: {seen} accuracy, {change}, {p}{few}; "
            f"{100 * row['changed_answers']:.1f} % of the answers differ ({100 * row['unparsed']:.1f} % do not parse). "
            f"With its own text before them, {100 * row['kept']['value']:.1f} % of the answers stay, divergence "
            f"{row['kl']['value']:.3g} nats."
        )
    gains = [row for row in others if row["name"] in ("zero", "noise", "skip", "swap")]
    if gains and all(row["against_own"]["grouped_p"] >= 0.05 for row in gains):
        said.append("None of the ways to remove or replace the latents changes accuracy: the answers do not need them.")
    looks = summary["grounding"]
    if looks:
        said.append(
            f"The student puts {100 * looks['mass']['value']:.1f} % of its attention into the gold boxes, which cover "
            f"{100 * looks['uniform']['value']:.1f} % of the image ({looks['mass']['n']} questions)."
        )
        if "right_box" in looks:
            said.append(
                f"Of {looks['right_box']['n']} spans, {100 * looks['right_box']['value']:.1f} % look more at their own "
                f"box than at any other of their question ({100 * looks['chance']:.1f} % by guessing)."
            )
    return said


def points(pair: Mapping[str, Any], unit: str = "") -> str:
    """A paired difference with its interval, in percentage points."""
    return f"{100 * pair['difference']:+.1f}{unit} ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})"


def markdown(summary: Mapping[str, Any], title: str) -> str:
    lines = [f"# {title}", "", *(f"- {line}" for line in sentences(summary)), ""]
    lines += [
        "| latents | accuracy (95 %) | change (95 %) | p | answers changed | unparsed | own text before: answers kept "
        "| KL, nats (95 %) | spans opened | closed |",
        "|" + " --- |" * 10,
    ]
    lines += [table_row(row) for row in summary["interventions"]]
    if len(summary["spans"]) > 1:
        lines += ["", *span_table(summary["spans"])]
    for span in summary["spans"]:
        if span["latents"]:
            heading = [f"## Span {span['span']} ({span['n']} answers)", ""] if len(summary["spans"]) > 1 else []
            lines += ["", *heading, *latent_table(span["latents"])]
    return "\n".join(lines) + "\n"


def table_row(row: Mapping[str, Any]) -> str:
    share = lambda value: "–" if value is None else f"{100 * value:.1f} %"  # noqa: E731
    held, pair, kl = row["accuracy"], row.get("against_own"), row.get("kl")
    cells = [row["label"], f"{share(held['value'])} ({100 * held['low']:.1f} to {100 * held['high']:.1f})"]
    if pair is None or kl is None:
        cells += ["", "", "", share(row["unparsed"]), "", ""]
    else:
        cells += [
            points(pair),
            f"{pair['grouped_p']:.3g}",
            share(row["changed_answers"]),
            share(row["unparsed"]),
            f"{share(row['kept']['value'])} ({100 * row['kept']['low']:.1f} to {100 * row['kept']['high']:.1f})",
            f"{kl['value']:.3g}" + ("" if kl["low"] is None else f" ({kl['low']:.3g} to {kl['high']:.3g})"),
        ]
    return f"| {' | '.join([*cells, share(row['trigger_rate']), share(row['closed_rate'])])} |"


def span_table(spans: Sequence[Mapping[str, Any]]) -> list[str]:
    """What changing one span alone does to the answers that have it, and where each span looks."""
    kinds = list(dict.fromkeys(change["kind"] for span in spans for change in span["changes"]))
    looks = any(span["grounding"] for span in spans)
    titles = ["span", "answers", *(f"{kind}, this span only: change (95 %)" for kind in kinds)]
    titles += ["attention in its box", "box's share of the image", "most in its own box (by guessing)"] if looks else []
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for span in spans:
        changes = {change["kind"]: change for change in span["changes"]}
        cells = [str(span["span"]), str(span["n"])]
        cells += [
            points(changes[kind]["against_own"]) if changes.get(kind, {}).get("reached") else "" for kind in kinds
        ]
        if looks:
            cells += look_cells(span["grounding"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def look_cells(look: Mapping[str, Any] | None) -> list[str]:
    if look is None:
        return [""] * 3
    right = look.get("right_box")
    compared = "" if right is None else f"{100 * right['value']:.1f} % ({100 * look['chance']:.1f} %)"
    return [f"{100 * look['mass']['value']:.1f} %", f"{100 * look['uniform']['value']:.1f} %", compared]


def latent_table(latents: Mapping[str, Any]) -> list[str]:
    steps = range(len(latents["norm"]))
    number = lambda values, place: f"{values[place]:.3f}" if 0 <= place < len(values) else ""  # noqa: E731
    text = "" if latents["text_norm"] is None else f" Hidden states that give text: norm {latents['text_norm']:.1f}."
    lines = [
        f"Effective rank of one question's latents over steps: {latents['rank_over_steps'][0]:.2f}.{text}",
        "",
        "| step | norm | rank over questions | cosine to the next | to the first | to the mean over questions "
        "| logit lens |",
        "|" + " --- |" * 7,
    ]
    for step in steps:
        shown = ", ".join(f"`{t['token']}` {100 * t['share']:.0f} %" for t in latents["lens"][step]["top"])
        cells = [
            str(step + 1), number(latents["norm"], step), number(latents["rank_over_questions"], step),
            number(latents["next_cosine"], step), number(latents["first_cosine"], step - 1),
            number(latents["mean_cosine"], step), shown.replace("|", "\\|"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines
