"""`vreflection ablate`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub id")],
    out: Annotated[Path, typer.Option(help="folder of the result; the same command again goes on")],
    benchmark: Annotated[str | None, typer.Option(help="mmvp, blink, vstar, hrbench4k, … below --data-root")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="training rows with an <answer> to ask instead of a benchmark")
    ] = None,
    image_folder: Annotated[Path | None, typer.Option(help="root of the images of --rows")] = None,
    image_view: Annotated[
        str | None, typer.Option(help="of --rows: stored or shown [default: the clean index's, or stored]")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="folder that holds the benchmarks' folders")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="download what is not below --data-root")] = False,
    protocol: Annotated[str, typer.Option(help="how a benchmark is asked and read, see vreflection eval")] = "strict",
    interventions: Annotated[
        str | None,
        typer.Option(
            help="of zero,noise,swap,repeat,skip,image,steps, or zero, noise, swap, repeat of one span, such as "
            "swap_span_2 [default: all that apply to every span]"
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="latent steps to try, such as 1,2,16 [default: half, twice]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first questions only")] = None,
    force_latent: Annotated[bool, typer.Option("--force-latent", help="start every answer with a span")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="questions decoded together")] = 8,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:0 [default: a GPU if there is one]")] = None,
    allow_other_counts: Annotated[
        bool, typer.Option("--allow-other-counts", help="go on where row counts are not the published ones")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Ask the same questions with the latents changed or left out: does the answer depend on them?"""
    from ..data.pixels import checked_view
    from ..errors import ConfigError
    from ..evaluation.ablation_run import AblationSettings, run_ablation
    from ..evaluation.interventions import OWN
    from ..evaluation.run import EvalSettings
    from ..model.compat import quiet_host_library
    from ..visualization.ablation_page import write_ablation_page
    from .progress import PhaseBars, log_to_terminal

    if benchmark is None and rows is None:
        raise ConfigError("ablate: expected --benchmark NAME or --rows FILE, got neither")
    try:
        counts = None if steps is None else [int(value) for value in steps.split(",")]
    except ValueError:
        raise ConfigError(f"steps: expected whole numbers with commas, such as 1,2,16, got {steps!r}") from None
    settings = AblationSettings(
        EvalSettings(
            model=model, benchmarks=() if benchmark is None else (benchmark,), out=out, data_root=data_root,
            protocol=protocol, hub=hub, allow_other_counts=allow_other_counts, limit=limit, force_latent=force_latent,
            batch_size=batch_size, dtype=dtype, device=device,
        ),
        rows=rows, image_folder=image_folder,
        image_view=None if image_view is None else checked_view(image_view, "--image-view"),
        interventions=None if interventions is None else [name.strip() for name in interventions.split(",")],
        steps=counts, seed=seed,
    )  # fmt: skip
    quiet_host_library()
    log_to_terminal()
    with PhaseBars([(OWN, 1.0), ("interventions", 6.0)], "ablate", quiet=as_json) as bars:
        result = run_ablation(settings, on_progress=bars.update)
    page = write_ablation_page(result, out / "ablation.html")
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    typer.echo((out / "ablation.md").read_text(encoding="utf-8"))
    typer.echo(f"page: {page}")
