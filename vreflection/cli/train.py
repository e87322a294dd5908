"""`vreflection train`"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import typer


def command(
    config: Annotated[Path, typer.Option(help="settings file, or the name of a shipped one such as stage1_7b")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the settings, repeatable")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in `output`")] = False,
    check: Annotated[bool, typer.Option("--check", help="only check the settings and print them")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="only show memory and time per step, from arithmetic")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Train one stage or control arm from a settings file; several GPUs: torchrun -m vreflection train …"""
    import yaml

    from ..training.config import load_settings, settings_dict

    settings = load_settings(config, [*(set_ or []), *(["resume=true"] if resume else [])])
    if check:
        plain = settings_dict(settings)
        typer.echo(json.dumps(plain) if as_json else yaml.safe_dump(plain, sort_keys=False))
        return
    if plan:
        from dataclasses import asdict

        from ..training.memory_plan import format_plan, settings_plan

        rows = settings_plan(settings)
        typer.echo(json.dumps([asdict(row) for row in rows]) if as_json else format_plan(rows))
        return
    from ..model.compat import quiet_host_library
    from ..training.parallel import is_main_process
    from ..training.run import run_training
    from ..visualization.look_figures import training_figure
    from .progress import PhaseBars, log_to_terminal

    quiet_host_library()
    main = is_main_process()
    log_to_terminal()
    with PhaseBars([("steps", 1.0)], settings.stage, quiet=as_json or not main) as bars:
        result = run_training(
            settings,
            on_step=lambda done, total: bars.update("steps", done, total),
            draw_maps=training_figure,
        )
    if not main:
        return
    last = next((row for row in reversed(result.history) if "loss" in row), {})
    if as_json:
        dropped = result.report.num_dropped if result.report else 0
        outcome = {"output": settings.output, "rows_dropped": dropped, "last": last, "stopped_at": result.stopped_at}
        typer.echo(json.dumps(outcome))
        return
    if result.report is not None:
        typer.echo(result.report.summary())
    if result.stopped_at is not None:
        typer.echo(f"stopped at step {result.stopped_at}; the same command with --resume goes on from there")
        if result.stop_signal == signal.SIGINT:
            raise typer.Exit(1)
        return
    typer.echo(f"checkpoint: {settings.output}")
