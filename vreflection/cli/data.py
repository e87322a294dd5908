"""`vreflection data check` and `vreflection data convert`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check and convert training data.")


@app.command("check")
def check(
    data: Annotated[Path, typer.Option(help="JSON list, meta JSON, .jsonl or .parquet of rows")],
    image_folder: Annotated[Path | None, typer.Option(help="root of the images; a meta file may name its own")] = None,
    dataset: Annotated[str, typer.Option(help="dataset name of rows without one")] = "",
    out: Annotated[Path | None, typer.Option(help="clean index to write [default: <data>.clean]")] = None,
    image_view: Annotated[
        str | None, typer.Option(help="stored or shown: the images that boxes are fractions of [default: stored]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="threads [default: one per core]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 if any row is bad")] = False,
    decode: Annotated[bool, typer.Option(help="decode images completely, or read their headers only")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print the counts as JSON, no bars")] = False,
) -> None:
    """Check every row and image; write which rows to use, and why the others cannot be used."""
    from ..data.check import check_rows, write_check
    from ..data.pixels import checked_view
    from ..data.rows import open_rows
    from ..errors import ConfigError, DataError
    from .progress import PhaseBars

    out = out or data.with_name(data.name + ".clean")
    if out.absolute() == data.absolute():
        raise ConfigError(f"--out: expected another file than the data, got {out}; name a new file")
    _check_writable(out)
    view = None if image_view is None else checked_view(image_view, "--image-view")
    try:
        rows = open_rows(data, image_folder, dataset, image_view=view)
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


@app.command("convert")
def convert(
    source: Annotated[str, typer.Option("--from", help="coco or refcoco")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON, or a flat JSON list of expressions")],
    out: Annotated[Path, typer.Option(help="JSONL file to write")],
    refs: Annotated[Path | None, typer.Option(help="RefCOCO refs as JSON; --annotations is its instances file")] = None,
    split: Annotated[str | None, typer.Option(help="take only refs of this split, such as train")] = None,
    question_template: Annotated[str | None, typer.Option(help="default: Where in the image is …?")] = None,
    answer_template: Annotated[str, typer.Option(help="fields: name category position x0 y0 x1 y1")] = "{position}",
    image_prefix: Annotated[str, typer.Option(help="put before every file name, such as train2017/")] = "",
    dataset: Annotated[str | None, typer.Option(help="dataset name of the rows [default: coco or refcoco]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the counts as JSON, no bars")] = False,
) -> None:
    """Turn box annotations of COCO or RefCOCO into training rows."""
    from ..data.atomic import atomic_write
    from ..data.grounding import DEFAULT_QUESTIONS, RowText, convert_annotations
    from ..errors import ConfigError
    from .progress import PhaseBars

    if source not in DEFAULT_QUESTIONS:
        raise ConfigError(f"--from: expected one of {', '.join(DEFAULT_QUESTIONS)}, got {source!r}")
    text = RowText(question_template or DEFAULT_QUESTIONS[source], answer_template, image_prefix, dataset or source)
    _check_writable(out)
    with PhaseBars([("rows", 1.0)], "convert", quiet=as_json) as bars:
        report = convert_annotations(
            source, annotations, out, text, refs, split, lambda done, total: bars.update("rows", done, total)
        )
    written = out.with_name(out.name + ".report.json")
    with atomic_write(written) as file:
        file.write(json.dumps({"rows": report.written, "left_out": report.dropped}, indent=1).encode())
    if as_json:
        counts = {reason: len(ids) for reason, ids in report.dropped.items()}
        typer.echo(json.dumps({"rows": report.written, "left_out": counts, "out": str(out), "report": str(written)}))
    else:
        typer.echo(f"{report.summary()}\nrows: {out}\nreport: {written}")


def _check_writable(out: Path) -> None:
    from ..errors import ConfigError

    folder = out.absolute().parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out: expected a folder that can be written to, got {folder}; name another")
