"""`vreflection quickstart`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option(help="folder for data, checkpoints, metrics.json and report.html")] = Path(
        "runs/quickstart"
    ),
    config: Annotated[Path | None, typer.Option(help="settings file; default: the shipped quickstart.yaml")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the settings, repeatable")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of keeping finished parts")] = False,
    from_scratch: Annotated[
        bool, typer.Option(help="pre-train the base model instead of using the shipped one")
    ] = False,
    free_running: Annotated[bool, typer.Option(help="the free-running curriculum of the latent stages")] = True,
    seeds: Annotated[str | None, typer.Option(help="several training seeds, such as 0,1,2: adds study.md")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print metrics as JSON, no bars")] = False,
) -> None:
    """Train both stages on real images, decode held-out ones, and write a report. Minutes on two CPU cores."""
    from ..errors import ConfigError
    from ..quickstart.run import Quickstart, start_over
    from ..quickstart.settings import load_quickstart
    from ..quickstart.study import run_study
    from .progress import PhaseBars, quiet_host_library

    overrides = list(set_ or [])
    if not free_running:
        overrides += [f"arms.{arm}.free_running.maximum=0" for arm in ("stage1", "stage2")]
    settings = load_quickstart(config, overrides)
    quiet_host_library()
    if seeds is not None:
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError as error:
            raise ConfigError(f"--seeds: expected numbers separated by commas, got {seeds!r}") from error
        names = [f"seed {seed}" for seed in numbers]
        plan = [(f"{name}: {p}", w) for name in names for p, w in Quickstart(settings, out, _ignore).phases()]
        with PhaseBars(plan, "study", as_json) as bars:
            study = run_study(settings, out, numbers, lambda s, p, d, t: bars.update(f"seed {s}: {p}", d, t))
        typer.echo(json.dumps(study) if as_json else (out / "study.md").read_text())
        return
    if fresh:
        start_over(out)
    run = Quickstart(settings, out, _ignore, from_scratch)
    with PhaseBars(run.phases(), "quickstart", as_json) as bars:
        run.on_progress = bars.update
        metrics = run.run()
    if as_json:
        typer.echo(json.dumps({key: value for key, value in metrics.items() if key not in ("examples", "curves")}))
        return
    for sentence in metrics["findings"]:
        typer.echo(f"• {sentence}")
    typer.echo(f"\nreport:  {out / 'report.html'}\nnumbers: {out / 'metrics.json'}")


def _ignore(phase: str, done: int, total: int) -> None:
    pass
