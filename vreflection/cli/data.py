"""`vreflection data check` and `vreflection data convert`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check and convert training data.")


@app.command("check")
def check(
    data: Annotated[Path, typer.Option(help="JSON list, meta JSON, .jsonl or .parquet of rows")],
    image_folder: Annotated[Path | None, typer.Option(help="root of the images; a meta file may name its own")] = None,
    dataset: Annotated[str, typer.Option(help="dataset name of rows without one")] = "",
    out: Annotated[Path | None, typer.Option(help="clean index to write [default: <data>.clean]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: one per core]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 if any row is bad")] = False,
    decode: Annotated[bool, typer.Option(help="decode images completely, or read their headers only")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the counts as JSON, no bars")] = False,
) -> None:
    """Check every row and image; write which rows to use, and why the others cannot be used."""
    from ..data.check import check_rows, write_check
    from ..data.rows import open_rows
    from ..errors import ConfigError, DataError
    from .progress import PhaseBars

    out = out or data.with_name(data.name + ".clean")
    if out.absolute() == data.absolute():
        raise ConfigError(f"--out: expected another file than the data, got {out}; name a new file")
    if not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"--out: expected a folder that can be written to, got {out.absolute().parent}; name another")
    try:
        rows = open_rows(data, image_folder, dataset)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"--image-folder: {error}") from None
    with PhaseBars([("rows", 1.0)], "check", quiet=as_json) as bars:
        threads = workers or os.cpu_count() or 1
        report = check_rows(rows, decode, threads, lambda done, total: bars.update("rows", done, total))
    if not as_json:
        typer.echo(report.summary())
    written = write_check(out, report, rows, image_folder, dataset)
    if as_json:
        typer.echo(json.dumps({**report.counts(), "clean_index": str(out), "report": str(written)}))
    else:
        typer.echo(f"clean index: {out}\nreport: {written}")
    if strict and report.dropped:
        raise typer.Exit(1)
