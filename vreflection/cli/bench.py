"""`vreflection bench report` and `vreflection bench compare`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Read what `pytest bench/ --benchmark-json=FILE` wrote."
)


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="raw rows: one or more files of --benchmark-json")],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write the table to, besides showing it")] = None,
    plots: Annotated[Path | None, typer.Option(help="folder for figures as SVG; needs vreflection[bench]")] = None,
    short: Annotated[bool, typer.Option("--short", help="one line per row instead of the table")] = False,
) -> None:
    """One table, losing rows first: ratios to base and fastest baseline, share of the speed of light. And figures."""
    from ..benchmarking.rows import read_rows
    from ..benchmarking.table import report_text, short_text

    rows = read_rows(files)
    text = report_text(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    typer.echo(short_text(rows) if short else text, nl=False)
    if plots is None and not short:
        typer.echo("figures: --plots FOLDER draws them", err=True)
    if plots is not None:
        from ..benchmarking.plots import draw

        drawn = draw(rows, plots)
        typer.echo("\n".join(map(str, drawn)) if drawn else "no figure: these rows hold no sweep and no speed of light")


@app.command("compare")
def compare(
    old: Annotated[Path, typer.Argument(help="raw rows of the older run")],
    new: Annotated[Path, typer.Argument(help="raw rows of the newer run, on the same machine")],
    more_old: Annotated[list[Path] | None, typer.Option(help="a repetition of the older run; again for more")] = None,
    more_new: Annotated[list[Path] | None, typer.Option(help="a repetition of the newer run; again for more")] = None,
    seconds: Annotated[
        bool, typer.Option("--seconds", help="compare seconds, not ratios to the base: on an idle machine only")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the comparison as JSON")] = False,
) -> None:
    """Flag what became slower beyond the noise that the rounds of both runs show. Exit code 1 if anything did."""
    from dataclasses import asdict

    from ..benchmarking.comparison import compare_rows, comparison_text
    from ..benchmarking.rows import read_rows

    found = compare_rows(read_rows([old, *(more_old or ())]), read_rows([new, *(more_new or ())]), seconds)
    typer.echo(json.dumps(asdict(found)) if as_json else comparison_text(found).rstrip())
    if found.slower:
        raise typer.Exit(1)
