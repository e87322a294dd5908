"""`vreflection visualize`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub id")],
    image: Annotated[list[Path] | None, typer.Option(help="image file; again for several images")] = None,
    question: Annotated[str | None, typer.Option(help="what to ask about the image")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="x0,y0,x1,y1 as fractions of the (first) image; again for the box of the next look"),
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="training rows: a gallery of all of them instead")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="root of the images of --rows")] = None,
    image_view: Annotated[
        str | None, typer.Option(help="of --rows: stored or shown [default: the clean index's, or stored]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first rows only")] = None,
    out: Annotated[
        Path | None, typer.Option(help="a .png, .gif, .webp or .html file [default: looks.png, or looks.html for rows]")
    ] = None,
    kind: Annotated[str, typer.Option(help="of a .png: all, looks, steps, mean, queries")] = "all",
    source: Annotated[str, typer.Option(help="auto (the student if there is one), student, language-model")] = "auto",
    layers: Annotated[str | None, typer.Option(help="of the language model, such as 12,13 [default: mean]")] = None,
    heads: Annotated[str | None, typer.Option(help="of the language model, such as 0,5 [default: mean]")] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="language model, rolled out over all layers")] = False,
    scale_max: Annotated[float | None, typer.Option(help="top of the colour scale, so that figures compare")] = None,
    force_latent: Annotated[bool, typer.Option("--force-latent", help="start the answer with a span")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of the answer, latent steps not counted")] = 256,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:0 [default: a GPU if there is one]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON, no bars")] = False,
) -> None:
    """Draw where the model looks at each latent step of a real answer: PNG, animation or page with a slider."""
    from ..data.pixels import checked_view
    from ..model.compat import quiet_host_library
    from ..visualization.look_run import LookSettings, run_gallery, run_look
    from .progress import PhaseBars, log_to_terminal

    settings = LookSettings(
        model=model, images=tuple(image or ()), question=question, boxes=tuple(box or ()), rows=rows,
        image_folder=image_folder,
        image_view=None if image_view is None else checked_view(image_view, "--image-view"),
        limit=limit, out=out, kind=kind, source=source, layers=layers, heads=heads,
        rollout=rollout, scale_max=scale_max, force_latent=force_latent, max_new_tokens=max_new_tokens, dtype=dtype,
        device=device,
    )  # fmt: skip
    settings.check()
    quiet_host_library()
    log_to_terminal()
    if rows is None:
        result = run_look(settings)
    else:
        with PhaseBars([("rows", 1.0)], "visualize", quiet=as_json) as bars:
            result = run_gallery(settings, on_progress=lambda done, total: bars.update("rows", done, total))
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else _told(result))


def _told(result: dict) -> str:
    if "rows" in result:
        left = "".join(f"\n  left out: {line}" for line in result["unusable"][:5])
        more = len(result["unusable"]) - 5
        tail = f"\n  and {more} more" if more > 0 else ""
        return f"{result['rows']} rows, {result['with_maps']} with maps: {result['out']}{left}{tail}"
    inside = ""
    if result["in_box"]:
        words = ["–" if share is None else f"{100 * share:.0f} %" for share in result["in_box"]]
        spans = range(max(result["span"]) + 1)
        own = [", ".join(word for word, span in zip(words, result["span"]) if span == look) for look in spans]
        of_looks = own if len(own) == 1 else [f"look {look + 1}: {text}" for look, text in enumerate(own)]
        inside = f"\nin the box per step: {'; '.join(of_looks)}"
    return f"answer: {result['answer'].strip()}\nattention: {result['attention']}{inside}\n{result['out']}"
