"""`vreflection quickstart`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path | None,
        typer.Option(help="for data, checkpoints and results; default: runs/quickstart, runs/seeds or runs/study"),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="follow_the_notes (default) or one_hop, where one look is enough")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="settings file; default: the shipped one of the task")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value over the settings, repeatable")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of keeping finished parts")] = False,
    from_scratch: Annotated[
        bool, typer.Option(help="pre-train the base model instead of using the shipped one")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="every arm with each of these seeds, such as 0,1,2")] = None,
    study: Annotated[bool, typer.Option("--study", help="the whole study: arms, seeds, depths, steps (hours)")] = False,
    groups: Annotated[str | None, typer.Option(help="of the study, only these groups, with commas")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print metrics as JSON, no bars")] = False,
) -> None:
    """Train both stages and their controls on real images, decode held-out ones, and write a report.

    Minutes on two CPU cores.
    """
    from ..errors import ConfigError
    from ..model.compat import quiet_host_library
    from ..quickstart.run import Quickstart
    from ..quickstart.settings import load_quickstart
    from .progress import PhaseBars

    quiet_host_library()
    if groups is not None and not study:
        raise ConfigError("--groups: names groups of the study; add --study, or leave it out")
    if study and (task is not None or seeds is not None):
        raise ConfigError("--study: has its own task and seeds; leave --task and --seeds out")
    if from_scratch and (study or seeds is not None):
        raise ConfigError("--from-scratch: is for a single run; leave it out, or --study and --seeds")
    if seeds is not None or study:
        run_several(out, task, config, list(set_ or []), seeds, groups, fresh, as_json)
        return
    settings = load_quickstart(config, list(set_ or []), task)
    out = out or default_folder("quickstart", settings.task)
    run = Quickstart(settings, out, _ignore, from_scratch)
    with PhaseBars(run.phases(), "quickstart", as_json) as bars:
        run.on_progress = bars.update
        metrics = run.run(fresh)
    if as_json:
        typer.echo(json.dumps({key: value for key, value in metrics.items() if key not in ("examples", "curves")}))
        return
    for sentence in metrics["findings"]:
        typer.echo(f"• {sentence}")
    typer.echo(f"\nreport:  {out / 'report.html'}\nnumbers: {out / 'metrics.json'}")


def default_folder(name: str, task: str) -> Path:
    return Path("runs", name if task == "follow_the_notes" else f"{name}-{task}")


def run_several(
    out: Path | None, task: str | None, config: Path | None, overrides: list[str], seeds: str | None,
    groups: str | None, fresh: bool, as_json: bool,
) -> None:  # fmt: skip
    """A study of the shipped groups, or of every arm over some seeds."""
    from ..errors import ConfigError
    from ..quickstart.settings import quickstart_values
    from ..quickstart.study import load_study, phases, run_study, seeds_study, start_study_over
    from .progress import PhaseBars

    if seeds is None:
        study = load_study(config, overrides, None if groups is None else groups.split(","))
    else:
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError as error:
            raise ConfigError(f"--seeds: expected numbers separated by commas, got {seeds!r}") from error
        if min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ConfigError(f"--seeds: expected different numbers from 0 on, got {seeds!r}")
        values, where = quickstart_values(config, overrides, task)
        study = seeds_study(values, numbers, where)
    some = next(iter(study.runs.values()))
    out = out or default_folder("study" if seeds is None else "seeds", some.task)
    if fresh:
        start_study_over(out)
    with PhaseBars(phases(study, out), "study", as_json) as bars:
        result = run_study(study, out, bars.update)
    typer.echo(json.dumps(result) if as_json else (out / "study.md").read_text())


def _ignore(phase: str, done: int, total: int) -> None:
    pass
