"""`vreflection train`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Option(help="settings file, such as configs/stage1_7b.yaml")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the settings, repeatable")] = None,
    check: Annotated[bool, typer.Option("--check", help="only check the settings and print them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Train one stage or control arm from a settings file."""
    import yaml

    from ..training.config import load_settings, settings_dict

    settings = load_settings(config, set_)
    if check:
        plain = settings_dict(settings)
        typer.echo(json.dumps(plain) if as_json else yaml.safe_dump(plain, sort_keys=False))
        return
    from ..training.run import run_training
    from .progress import PhaseBars, quiet_host_library

    quiet_host_library()
    with PhaseBars([("steps", 1.0)], settings.stage, quiet=as_json) as bars:
        result = run_training(settings, on_step=lambda done, total: bars.update("steps", done, total))
    last = next((row for row in reversed(result.history) if "loss" in row), {})
    if as_json:
        dropped = result.report.num_dropped if result.report else 0
        typer.echo(json.dumps({"output": settings.output, "rows_dropped": dropped, "last": last}))
        return
    if result.report is not None:
        typer.echo(result.report.summary())
    typer.echo(f"checkpoint: {settings.output}")
