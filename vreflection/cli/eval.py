"""`vreflection eval`, and under it `score` and `compare`"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import eval_score

if TYPE_CHECKING:
    from ..evaluation.run import EvalReport

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Answer benchmarks with a model; score and compare what it said.",
)
app.command("score")(eval_score.score)
app.command("compare")(eval_score.compare)


@app.callback()
def command(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="checkpoint folder or hub id")] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="names with commas: mmvp,blink,vstar,hrbench4k,hrbench8k,mme-realworld-lite")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder: run.json and raw answers; go on with it")] = None,
    data_root: Annotated[Path | None, typer.Option(help="folder that holds the benchmarks' folders")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="download what is not below --data-root")] = False,
    protocol: Annotated[
        str, typer.Option(help="strict, lenient, reference, vlmevalkit, lmms-eval-0.7.3, lmms-eval, or a .yaml file")
    ] = "strict",
    shard: Annotated[str | None, typer.Option(help="this process's part, i/n from 0/n; or start with torchrun")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first items of each benchmark, in whole groups")] = None,
    latent_steps: Annotated[int | None, typer.Option(min=0, help="per span [default: the checkpoint's]")] = None,
    latent_mode: Annotated[str, typer.Option(help="clean, or parity with the reference implementation")] = "clean",
    force_latent: Annotated[bool, typer.Option("--force-latent", help="start every answer with a span")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="questions decoded together")] = 8,
    repetition_penalty: Annotated[float, typer.Option(help="1 is none, whatever the checkpoint says")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:0 [default: a GPU if there is one]")] = None,
    labels: Annotated[str | None, typer.Option(help="of the table: original or corrected [protocol's own]")] = None,
    allow_other_counts: Annotated[
        bool, typer.Option("--allow-other-counts", help="go on where row counts are not the published ones")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Answer benchmarks with a model; raw answers go to OUT/raw as they come. The same command again goes on."""
    if context.invoked_subcommand is not None:
        return
    from ..errors import ConfigError

    missing = [name for name, value in (("model", model), ("benchmarks", benchmarks), ("out", out)) if value is None]
    if missing or model is None or benchmarks is None or out is None:
        raise ConfigError(f"eval: expected {', '.join(f'--{name}' for name in missing)}; see vreflection eval --help")
    from ..evaluation.protocol import LABEL_REVISIONS

    if labels is not None and labels not in LABEL_REVISIONS:
        raise ConfigError(f"labels: expected one of {', '.join(LABEL_REVISIONS)}, got {labels!r}")
    from ..evaluation.raw_files import Shard
    from ..evaluation.run import EvalSettings, run_evaluation
    from ..model.compat import quiet_host_library
    from .progress import PhaseBars, log_to_terminal

    names = tuple(name.strip() for name in benchmarks.split(",") if name.strip())
    settings = EvalSettings(
        model=model, benchmarks=names, out=out, data_root=data_root, protocol=protocol, hub=hub,
        allow_other_counts=allow_other_counts, shard=None if shard is None else Shard.parse(shard), limit=limit,
        latent_steps=latent_steps, latent_mode=latent_mode, force_latent=force_latent, batch_size=batch_size,
        repetition_penalty=repetition_penalty, dtype=dtype, device=device,
    )  # fmt: skip
    quiet_host_library()
    log_to_terminal()
    with PhaseBars([(name, 1.0) for name in names], "eval", quiet=as_json) as bars:
        report = run_evaluation(settings, on_progress=bars.update)
    if not report.main:
        return
    for name in report.unverified:
        typer.echo(f"{name}: {report.asked[name]} items; their counts are not the published ones", err=True)
    _tell(report, out, labels, as_json)


def _tell(report: EvalReport, out: Path, labels: str | None, as_json: bool) -> None:
    """The score where every item is answered, otherwise what is missing and how to go on."""
    if as_json:
        shown = {"out": str(out), "asked": report.asked, "done": report.done, "answered": report.answered}
        if not report.missing:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                eval_score.score([out], labels=labels, as_json=True)
            shown["score"] = json.loads(printed.getvalue())
        typer.echo(json.dumps(shown))
    elif report.missing:
        counts = ", ".join(f"{count} of {report.asked[name]} in {name}" for name, count in report.missing.items())
        typer.echo(
            f"this part is done; still missing: {counts}. When the other shards are done, or this command was run "
            f"without --shard: vreflection eval score {out}"
        )
    else:
        eval_score.score([out], labels=labels)
