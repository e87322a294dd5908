"""`vreflection convert`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub id: ours, a released one, a plain Qwen2.5-VL")],
    out: Annotated[Path, typer.Option(help="new or empty folder")],
    to: Annotated[str, typer.Option(help="vreflection, qwen2_5_vl or released (old key names)")] = "vreflection",
    without_modules: Annotated[
        bool, typer.Option("--without-modules", help="leave out what only training uses; decodes as before")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file, such as 5GB")] = "5GB",
    tokenizer_from: Annotated[
        Path | None, typer.Option(help="folder whose tokenizer goes with the weights, if theirs is missing")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint that is in OUT")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Write a checkpoint in another layout, bit for bit; OUT appears whole or not at all."""
    from ..model.compat import quiet_host_library
    from ..model.conversion import convert_checkpoint
    from .progress import PhaseBars

    quiet_host_library()
    mebibyte = 2**20
    with PhaseBars([("weights (MiB)", 1.0)], "convert", quiet=as_json) as bars:
        report = convert_checkpoint(
            model,
            out,
            to,
            without_modules=without_modules,
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer_from=tokenizer_from,
            overwrite=overwrite,
            on_progress=lambda done, total: bars.update("weights (MiB)", -(-done // mebibyte), -(-total // mebibyte)),
        )
    typer.echo(json.dumps(report.as_dict()) if as_json else report.summary())
