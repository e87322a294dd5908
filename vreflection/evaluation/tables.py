"""Scores and comparisons as Markdown, for the terminal and for files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .comparison import BenchmarkComparison, Comparison
from .metrics import Metric
from .scoring import BenchmarkScore, RunScore
from .statistics import Paired, Proportion

DASH = "–"


def score_text(score: RunScore, baseline: Comparison | None = None) -> str:
    """The tables of a run. The first line tells whether answers are missing.

    Args:
        baseline: this run (second) against a baseline run (first).
    """
    against = {} if baseline is None else {found.benchmark: found for found in baseline.benchmarks}
    blocks = [_heading(score), _facts(score, baseline)]
    if len(score.benchmarks) > 1:
        blocks.append(_overview(score))
    blocks += [_benchmark(part, score.labels, against.get(part.benchmark)) for part in score.benchmarks]
    return "\n\n".join(blocks) + "\n"


def _heading(score: RunScore) -> str:
    title = f"# Score of {score.folder}"
    if not score.missing:
        return title
    count = f"{score.missing} of {score.expected}"
    return f"INCOMPLETE: {count} answers are missing; shares are of those that are there.\n\n{title}"


def _facts(score: RunScore, baseline: Comparison | None) -> str:
    asked = "" if score.asked_with == score.protocol else f" (asked with {score.asked_with})"
    rows = [
        ("model", f"{score.model} ({score.stage}, {score.digest})"),
        ("protocol", f"{score.protocol}{asked}"),
        ("labels", score.labels),
        ("latents", _pairs(score.latents)),
        ("pixels per image", _pairs(score.pixels) or "the checkpoint's own"),
        ("generation", _pairs(score.generation)),
        ("versions", _pairs(score.versions)),
    ]
    if baseline is not None:
        rows.append(("baseline", baseline.first))
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _overview(score: RunScore) -> str:
    rows = []
    for part in score.benchmarks:
        main = part.main
        rows.append([part.benchmark, main.name if main else DASH, *_metric_cells(main), share(part.unparsed)])
    return table(["benchmark", "metric", "n", "accuracy %", "95 % interval", "unparsed %"], rows)


def _benchmark(part: BenchmarkScore, labels: str, against: BenchmarkComparison | None) -> str:
    blocks = [f"## {part.benchmark}", _metrics(part, against), _answers(part, labels)]
    return "\n\n".join(blocks)


def _metrics(part: BenchmarkScore, against: BenchmarkComparison | None) -> str:
    paired = {} if against is None else {found.name: found.paired for found in against.differences}
    header = ["metric", "n", "accuracy %", "95 % interval", "groups", "design effect"]
    if against is not None:
        header += ["against baseline", "95 % interval", "discordant", "p", "p grouped"]
    rows = []
    for metric in part.metrics:
        name = f"**{metric.name}**" if metric is part.main else metric.name
        grouped = [str(metric.groups or DASH), number(metric.design_effect)]
        row = [name, *_metric_cells(metric), *grouped]
        if against is not None:
            row += _paired_cells(paired.get(metric.name))
        rows.append(row)
    lines = [table(header, rows)]
    if any(metric.groups for metric in part.metrics):
        lines.append(
            "Items of a group share an image or a question: where groups are named, intervals are of n / design effect "
            "items, and p grouped flips whole groups."
        )
    return "\n\n".join(lines)


def _metric_cells(metric: Metric | None) -> list[str]:
    if metric is None:
        return ["0", DASH, DASH]
    return [str(metric.n), percent(metric.value), f"{percent(metric.low)} to {percent(metric.high)}"]


def _paired_cells(found: Paired | None) -> list[str]:
    if found is None:
        return [DASH] * 5
    return [
        points(found.difference),
        f"{points(found.low)} to {points(found.high)}",
        f"{found.second_only} won, {found.first_only} lost",
        probability(found.p),
        probability(found.grouped_p) + (" (normal)" if found.grouped_method == "normal" else ""),
    ]


def _answers(part: BenchmarkScore, labels: str) -> str:
    lines = [
        f"answered: {part.n} of {part.expected}" + (f", {part.missing} missing" if part.missing else ""),
        f"unparsed, counted as wrong: {counted(part.unparsed)}; letters beyond the options: {part.beyond}",
        f"letters: gold {_pairs(part.gold_letters) or DASH}; said {_pairs(part.predicted_letters) or DASH}",
        f"always {part.floor_letter or DASH}: {counted(part.floor)}",
        f"opened a latent span: {counted(part.triggered)}; closed it: {counted(part.closed)}",
        f"latent steps per answer (least, median, most): {_range(part.latent_steps)}",
        f"visual tokens per image (least, median, most): {_range(part.visual_tokens)}",
        f"ended by: {_pairs(part.finish_reasons) or DASH}",
        _labels(part, labels),
    ]
    if part.judged is not None:
        lines.insert(2, f"the harness would have asked its judge model, here unparsed: {counted(part.judged)}")
    if part.incomplete_groups:
        lines.append(f"left out of what counts whole groups: {part.incomplete_groups} groups that lack answers")
    if part.torn:
        lines.append(f"half-written last line, left out: {', '.join(part.torn)}")
    if part.repeated:
        lines.append(f"exact repeats of an answer, counted once: {part.repeated}")
    return "\n".join(f"- {line}" for line in lines)


def _labels(part: BenchmarkScore, labels: str) -> str:
    if part.corrected:
        return f"labels: {labels}; the corrected ones differ in {part.corrected} items"
    return f"labels: {labels}; no item has a corrected label that differs"


def _range(values: tuple[int, float, int] | None) -> str:
    return DASH if values is None else f"{values[0]}, {values[1]:g}, {values[2]}"


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """The tables of `vreflection eval compare`: each run against the first."""
    return "\n\n".join(_comparison(found) for found in comparisons) + "\n"


def _comparison(found: Comparison) -> str:
    blocks = [
        f"# {found.second} against {found.first}",
        f"- protocol: {found.protocol}\n- labels: {found.labels}",
        "\n".join(f"- {name}: {first} against {second}" for name, (first, second) in found.told.items())
        or "- the same model and settings",
    ]
    for folder, names in ((found.first, found.only_first), (found.second, found.only_second)):
        if names:
            blocks.append(f"Only {folder} asked {', '.join(names)}: left out.")
    for part in found.benchmarks:
        blocks.append(f"## {part.benchmark}")
        if part.left_out:
            blocks.append(f"INCOMPLETE: {part.left_out} items that only one run answered are left out.")
        header = ["metric", "n", "first %", "second %", "difference", "95 % interval", "discordant", "p", "p grouped"]
        rows = [
            [d.name, str(d.paired.n), percent(d.first), percent(d.second), *_paired_cells(d.paired)]
            for d in part.differences
        ]
        blocks.append(table(header, rows))
    blocks.append(
        "Difference in points, second minus first, with Tango's score interval; p: exact McNemar test of items; "
        "p grouped: the same, flipping whole groups. No correction for the number of rows."
    )
    return "\n\n".join(blocks)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table in columns of equal width; a bar in a cell is escaped."""
    cells = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def share(found: Proportion | None) -> str:
    return DASH if found is None else percent(found.value)


def counted(found: Proportion | None) -> str:
    """A share with its count and interval."""
    if found is None:
        return DASH
    return f"{percent(found.value)} % ({found.correct} of {found.n}, {percent(found.low)} to {percent(found.high)})"


def probability(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"
