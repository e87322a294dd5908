"""`vreflection eval score` and `vreflection eval compare`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..evaluation.scoring import BenchmarkScore, RunScore

Protocol = Annotated[str | None, typer.Option(help="name, tag or .yaml [default: the one the run was asked with]")]
Labels = Annotated[str | None, typer.Option(help="original or corrected [default: the protocol's]")]
Partial = Annotated[bool, typer.Option("--partial", help="score what is there although answers are missing")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def score(
    runs: Annotated[list[Path], typer.Argument(help="folders that `vreflection eval` wrote")],
    protocol: Protocol = None,
    labels: Labels = None,
    baseline: Annotated[Path | None, typer.Option(help="run to compare with, item by item")] = None,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="folder of the tables and plots [default: the run's own]")] = None,
    partial: Partial = False,
) -> None:
    """Score raw answers offline; several runs also give a plot of accuracy by latent steps."""
    from ..evaluation.comparison import compare_runs
    from ..evaluation.scoring import score_run
    from ..evaluation.tables import score_text

    _distinct(runs, out)
    # All is scored before anything is written or printed: a refused run leaves nothing half done.
    scores = [score_run(run, protocol, labels, partial) for run in runs]
    against = [None if baseline is None else compare_runs(baseline, run, protocol, labels, partial) for run in runs]
    plain = []
    for run, scored, compared in zip(runs, scores, against, strict=True):
        folder = run if out is None else out / run.name if len(runs) > 1 else out
        text = score_text(scored, compared)
        values = {**scored.as_dict(), "baseline": None if compared is None else compared.as_dict()}
        plain.append(values)
        files = {"score.json": _json(values), "score.md": text, **_bars(scored)}
        _write(folder, files)
        if not as_json:
            typer.echo(text)
            typer.echo(f"written: {folder}/{', '.join(files)}")
    if as_json:
        typer.echo(json.dumps(plain if len(plain) > 1 else plain[0]))
    _by_steps(scores, out or runs[0], as_json)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; each further one is compared with the first")],
    protocol: Protocol = None,
    labels: Labels = None,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="folder for compare.json, compare.md and the plot")] = None,
    partial: Partial = False,
) -> None:
    """Compare runs on the same items: differences with paired intervals and exact McNemar tests."""
    from ..errors import ConfigError
    from ..evaluation.comparison import compare_all
    from ..evaluation.scoring import score_run
    from ..evaluation.tables import comparison_text

    if len(runs) < 2:
        raise ConfigError(f"compare: expected two runs or more, got {len(runs)}; name the baseline first")
    found = compare_all(runs, protocol, labels, partial)
    text, values = comparison_text(found), [comparison.as_dict() for comparison in found]
    typer.echo(json.dumps(values) if as_json else text)
    if out is not None:
        _write(out, {"compare.json": _json(values), "compare.md": text})
        _by_steps([score_run(run, protocol, labels, partial) for run in runs], out, as_json)


def _distinct(runs: Sequence[Path], out: Path | None) -> None:
    from ..errors import ConfigError

    names = [run.absolute().name if out else str(run.absolute()) for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"score: expected runs with names of their own, got {names}; name each run once")


def _bars(scored: RunScore) -> dict[str, str]:
    """The plot by its file name; none without answers."""
    from ..visualization.eval_charts import score_bars

    rows = [row for part in scored.benchmarks for row in _bar_rows(part)]
    if not rows:
        return {}
    missing = f", {scored.missing} answers missing" if scored.missing else ""
    title = f"{scored.model}, {scored.protocol}, {scored.labels} labels{missing}"
    return {"score.svg": score_bars(rows, title)}


def _bar_rows(part: BenchmarkScore) -> list[dict[str, Any]]:
    return [
        {
            "label": f"{part.benchmark}: {metric.name}",
            "floor": part.floor.value if part.floor and metric is part.main else None,
            **{key: getattr(metric, key) for key in ("value", "low", "high", "n")},
        }
        for metric in part.metrics
        if metric.kind != "rate" and not metric.name.endswith(" labels")
    ]


def _by_steps(scores: Sequence[RunScore], folder: Path, quiet: bool) -> None:
    """Accuracy by latent steps, where the runs took different numbers of them."""
    from ..visualization.eval_charts import accuracy_by_steps

    if len({scored.steps for scored in scores if scored.steps is not None}) < 2:
        return
    series: dict[str, list[dict[str, Any]]] = {}
    for scored in scores:
        for part in scored.benchmarks:
            main = part.main
            if main is not None and scored.steps is not None:
                point = {"steps": scored.steps, "value": main.value, "low": main.low, "high": main.high}
                series.setdefault(f"{part.benchmark}: {main.name}", []).append(point)
    _write(folder, {"latent_steps.svg": accuracy_by_steps(series, "Accuracy by latent steps, 95 % intervals")})
    if not quiet:
        typer.echo(f"written: {folder}/latent_steps.svg")


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    from ..data.atomic import atomic_write
    from ..errors import ConfigError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode())
    except OSError as error:
        raise ConfigError(f"--out: expected a folder that can be written to, got {error}; name another") from None
