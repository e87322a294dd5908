"""From an ablation's rows to its tables: accuracy changes with paired tests, divergences, what latents are like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .interventions import OWN, Intervention
from .statistics import Z95, grouped_wilson, paired, wilson


def summarize(
    own: Sequence[Mapping[str, Any]],
    changed: Sequence[Mapping[str, Any]],
    interventions: Sequence[Intervention],
    shape: Mapping[str, list[float]] | None,
    token_text: Callable[[int], str],
) -> dict[str, Any]:
    """Everything the tables say. `token_text` names a token of the logit lens."""
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
                "accuracy": accuracy(now, groups),
                "against_own": paired(correct, now, groups).as_dict(),
                "changed_answers": sum(a["answer"] != b["answer"] for a, b in zip(own, said)) / len(own),
                "kl": mean_interval([row["kl"] for row in said]),
                "kept": wilson(sum(row["kept"] for row in said), len(said)).as_dict(),
                **rates(said),
            }
        )
    opened = [row for row in own if "lens" in row]
    norms = [row["text_norm"] for row in own if row["text_norm"] is not None]
    return {
        "n": len(own),
        "opened": sum(bool(row["spans"]) for row in own),
        "interventions": rows,
        "latents": None
        if shape is None
        else {**shape, "text_norm": float(np.mean(norms)) if norms else None, "lens": lens(opened, token_text)},
        "grounding": grounded(own),
    }


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


def lens(rows: Sequence[Mapping[str, Any]], token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    """Per latent step: the tokens most often likeliest, with the share of questions, and the mean entropy."""
    steps = []
    for step in range(len(rows[0]["lens"]) if rows else 0):
        found = [row["lens"][step] for row in rows]
        tops = Counter(one["ids"][0] for one in found)
        steps.append(
            {
                "entropy": float(np.mean([one["entropy"] for one in found])),
                "chance": float(np.mean([one["chances"][0] for one in found])),
                "top": [
                    {"token": token_text(token), "share": count / len(found)} for token, count in tops.most_common(3)
                ],
            }
        )
    return steps


def grounded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Attention of the student in the gold boxes, over the questions that have some and opened a span."""
    found = [row["grounding"] for row in rows if "grounding" in row]
    if not found:
        return None
    return {name: mean_interval([one[name] for one in found]) for name in ("mass", "iou", "uniform")}


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in words made from them alone."""
    own, *others = summary["interventions"]
    said = [
        f"{summary['opened']} of {summary['n']} answers opened a latent span; own accuracy "
        f"{100 * own['accuracy']['value']:.1f} %."
    ]
    for row in others:
        pair = row["against_own"]
        change = f"{100 * pair['difference']:+.1f} points ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})"
        seen = "changes" if pair["grouped_p"] < 0.05 else "does not measurably change"
        p = "p < 0.001" if pair["grouped_p"] < 0.001 else f"p = {pair['grouped_p']:.3f}"
        said.append(
            f"{row['label'][0].upper()}{row['label'][1:]}: {seen} accuracy, {change}, {p}; "
            f"{100 * row['changed_answers']:.1f} % of the answers differ ({100 * row['unparsed']:.1f} % do not parse). "
            f"With its own text before them, {100 * row['kept']['value']:.1f} % of the answers stay, divergence "
            f"{row['kl']['value']:.3g} nats."
        )
    gains = [row for row in others if row["name"] in ("zero", "noise", "skip", "swap")]
    if gains and all(row["against_own"]["grouped_p"] >= 0.05 for row in gains):
        said.append("None of the ways to remove or replace the latents changes accuracy: the answers do not need them.")
    found = summary["grounding"]
    if found:
        said.append(
            f"The student puts {100 * found['mass']['value']:.1f} % of its attention into the gold boxes, which cover "
            f"{100 * found['uniform']['value']:.1f} % of the image ({found['mass']['n']} questions)."
        )
    return said


def markdown(summary: Mapping[str, Any], title: str) -> str:
    lines = [f"# {title}", "", *(f"- {line}" for line in sentences(summary)), ""]
    lines += [
        "| latents | accuracy (95 %) | change (95 %) | p | answers changed | unparsed | own text before: answers kept "
        "| KL, nats (95 %) | spans opened | closed |",
        "|" + " --- |" * 10,
    ]
    lines += [table_row(row) for row in summary["interventions"]]
    if summary["latents"]:
        lines += ["", *latent_table(summary["latents"])]
    return "\n".join(lines) + "\n"


def table_row(row: Mapping[str, Any]) -> str:
    share = lambda value: "–" if value is None else f"{100 * value:.1f} %"  # noqa: E731
    held, pair, kl = row["accuracy"], row.get("against_own"), row.get("kl")
    cells = [row["label"], f"{share(held['value'])} ({100 * held['low']:.1f} to {100 * held['high']:.1f})"]
    if pair is None or kl is None:
        cells += ["", "", "", share(row["unparsed"]), "", ""]
    else:
        cells += [
            f"{100 * pair['difference']:+.1f} ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f})",
            f"{pair['grouped_p']:.3g}",
            share(row["changed_answers"]),
            share(row["unparsed"]),
            f"{share(row['kept']['value'])} ({100 * row['kept']['low']:.1f} to {100 * row['kept']['high']:.1f})",
            f"{kl['value']:.3g}" + ("" if kl["low"] is None else f" ({kl['low']:.3g} to {kl['high']:.3g})"),
        ]
    return f"| {' | '.join([*cells, share(row['trigger_rate']), share(row['closed_rate'])])} |"


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
