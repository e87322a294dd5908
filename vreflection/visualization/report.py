"""The quickstart report: one HTML file that opens offline and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vreflection.visualization import charts
from vreflection.visualization.hop_charts import hops_chart, steps_chart
from vreflection.visualization.metrics import check_metrics
from vreflection.visualization.overlays import attention_overlay, checked_heat, colour_bar, data_uri, outline_box
from vreflection.visualization.svg import number, percent, share

if TYPE_CHECKING:
    from PIL import Image

PHOTO_SIDE = 224  # pixels of the longer side
TILE_SIDE = 192
PHOTO_QUALITY = 85
TILE_QUALITY = 72  # flat blocks on grey photographs: higher settings only add bytes

CURVE_TITLES = {
    "loss": "Total loss",
    "cross_entropy": "Cross-entropy",
    "latent_alignment": "Latent alignment",
    "latent_mse": "Latent error (student against teacher)",
    "attention_kl": "Attention divergence (KL)",
    "teacher_std_over_samples": "Teacher latents: spread over samples",
    "teacher_query_diversity": "Teacher latents: spread over queries",
}


def render_report(metrics: dict[str, Any], images: Mapping[str, Image.Image]) -> str:
    """The report as one HTML document without any external resource.

    Args:
        metrics: schema 2, as written to metrics.json. Texts are escaped; findings are shown word for word.
        images: photographs by the name that an example's `image` gives.

    Raises:
        ValueError: required keys are missing (all are named), or maps and images do not fit together.
    """
    check_metrics(metrics, images, charts.GROUPS)
    styles = {arm["key"]: f"s{i % charts.CURVE_STYLES}" for i, arm in enumerate(metrics["arms"])}
    page = {
        "metrics": metrics,
        "several_hops": len(metrics["task"]["hops"]) > 1,
        "groups": _groups(metrics["arms"]),
        "figure": _figure(metrics, styles),
        "study": _study(metrics.get("study")),
        "examples": [_example(i, example, images) for i, example in enumerate(metrics["examples"])],
        "panels": _panels(metrics),
        "curve_arms": [(f"s{i % charts.CURVE_STYLES}", name) for i, name in enumerate(_arm_names(metrics).values())],
        "attribution_keys": _union_of_keys(metrics["attributions"]),
        "total_seconds": sum(timing["seconds"] for timing in metrics["timings"] if timing["phase"] != "total"),
        "wall_seconds": next((t["seconds"] for t in metrics["timings"] if t["phase"] == "total"), None),
    }
    return page_environment().get_template("report.html.j2").render(page)


def _figure(metrics: Mapping[str, Any], styles: Mapping[str, str]) -> str:
    """What the report opens with: accuracy over hops, or bars where there is one number of hops."""
    task, arms = metrics["task"], metrics["arms"]
    if not arms:
        return ""
    if len(task["hops"]) > 1:
        series = [{"label": arm["label"], "style": styles[arm["key"]], "by_hops": arm["by_hops"]} for arm in arms]
        return hops_chart(series, task["guess_in_image"], "hops", "Accuracy over hops")
    changed = [{**row, "group": "intervention"} for row in metrics["interventions"] if row["key"] != "own"]
    return charts.accuracy_bars([*arms, *changed], task["chance"], task["guess_in_image"])


def _study(study: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Drawings of the study that ships with the package."""
    if study is None:
        return None
    main = hops_chart(study["arms"], study["guess_in_image"], "study", "Accuracy over hops, several seeds")
    depth = [
        (
            panel["title"],
            hops_chart(panel["series"], study["guess_in_image"], f"depth-{i}", panel["title"], (380, 300), False),
        )
        for i, panel in enumerate(study["depth"])
    ]
    series, level = study["steps"]["series"], study["steps"]["level"]
    steps = steps_chart(series, level, "steps", "Steps that a hop costs") if series else ""
    return {"data": study, "main": main, "depth": depth, "steps": steps}


def write_report(metrics: dict[str, Any], images: Mapping[str, Image.Image], path: str | os.PathLike[str]) -> Path:
    """Render the report into `path` and return it. A reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    page = render_report(metrics, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(page)
        os.chmod(staging, 0o644)  # mkstemp makes files only their owner can read
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
    return path


def page_environment():
    """Templates of this folder, escaped, with the number formats of `svg` as filters."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("vreflection.visualization")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "share": share,
        "duration": _duration,
        "script_hash": _script_hash,
        "setting": _setting,
    }
    return environment


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(group, heading, its rows) for the groups that have rows."""
    split = [
        (group, heading, [row for row in rows if row["group"] == group]) for group, heading in charts.GROUPS.items()
    ]
    return [part for part in split if part[2]]


def _example(index: int, example: Mapping[str, Any], images: Mapping[str, Image.Image]) -> dict[str, Any]:
    """One card: the picture with its numbered boxes, and where each hop looks, on one colour scale."""
    import numpy as np

    photo, boxes = images[example["image"]], example["boxes"]
    looks = [np.asarray(span, dtype=float).mean(0) for span in example["spans"]]
    vmax = max((float(checked_heat(look).max()) for look in looks), default=0.0) or 1.0
    tile, shown = _fitted(photo, TILE_SIDE), _fitted(photo, PHOTO_SIDE)
    for box in boxes:
        shown = outline_box(shown, box)
    hops = []
    for place, look in enumerate(looks):
        box = boxes[place] if place < len(boxes) else None
        picture = data_uri(attention_overlay(tile, look, box, vmax), quality=TILE_QUALITY)
        hops.append((picture, example["mass_in_box"][place] if box is not None else None))
    return {
        "name": f"example-{index + 1}",
        "data": example,
        "photo": data_uri(shown, quality=PHOTO_QUALITY),
        "photo_size": shown.size,
        "tile_size": tile.size,
        "marks": [(100 * box[0], 100 * box[1]) for box in boxes],
        "hops": hops,
        "bar": colour_bar(vmax),
    }


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """RGB copy whose longer side is `side` pixels."""
    from PIL import Image

    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _arm_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Curves named like an arm take that arm's label."""
    labels = {arm["key"]: arm["label"] for arm in metrics["arms"]}
    return {arm: labels.get(arm, arm) for arm in metrics["curves"]}


def _panels(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, drawing) of every measured key."""
    curves, names = metrics["curves"], _arm_names(metrics)
    panels = []
    for i, key in enumerate(charts.curve_keys(curves)):
        title = CURVE_TITLES.get(key, key.replace("_", " "))
        try:
            panels.append((title, charts.training_curve(curves, key, f"curve-{i}", title, names)))
        except ValueError:
            panels.append((title, "<p>No finite value was recorded.</p>"))
    return panels


def _union_of_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _setting(value: object) -> str:
    """A configuration value as a reader would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _script_hash(script: str) -> str:
    """The page's content policy allows this one script and nothing that text in the metrics could smuggle in."""
    return base64.b64encode(hashlib.sha256(str(script).encode("utf-8")).digest()).decode("ascii")
