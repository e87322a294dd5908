"""What a report is made of: the keys `metrics.json` must carry, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SCHEMA = 2

# Where a value may be null the key may also be absent; those are not listed. A list's entries are checked one by one.
REQUIRED: dict[str, tuple[str, ...]] = {
    "": (
        "schema",
        "title",
        "created",
        "environment",
        "settings",
        "task",
        "arms",
        "interventions",
        "looks",
        "gauges",
        "curves",
        "timings",
        "examples",
        "findings",
        "attributions",
    ),
    "task": (
        "name",
        "question",
        "hops",
        "chance",
        "guess_in_image",
        "uniform_mass",
        "visual_tokens",
        "train_images",
        "train_questions",
        "test_questions",
    ),
    "arms": ("key", "label", "group", "steps", "seconds_per_step", "relative_step_cost", "accuracy", "by_hops"),
    "arms.accuracy": ("correct", "n", "value", "low", "high"),
    "arms.by_hops": ("hops", "n", "value", "low", "high"),
    "interventions": ("key", "label", "accuracy", "by_hops"),
    "interventions.accuracy": ("correct", "n", "value", "low", "high"),
    "looks": ("key", "label", "mass", "iou", "n", "by_hop"),
    "looks.by_hop": ("mass", "uniform", "n"),
    "gauges": ("label",),
    "timings": ("phase", "seconds"),
    "examples": (
        "id",
        "hops",
        "question",
        "expected",
        "predicted",
        "correct",
        "boxes",
        "image",
        "spans",
        "mass_in_box",
    ),
    "attributions": ("name", "author", "licence", "source"),
}


def check_metrics(metrics: Mapping[str, Any], images: Mapping[str, object], groups: Mapping[str, str]) -> None:
    """Raise one ValueError that names every missing key, unknown image or group, and map of the wrong length.

    Args:
        metrics: the report's content (schema 2).
        images: photographs by the name that an example's `image` gives.
        groups: the groups an arm may belong to.
    """
    missing = [path for where, keys in REQUIRED.items() for path in _missing(metrics, where, keys)]
    if missing:
        raise ValueError(f"metrics lack {', '.join(missing)}: a report needs every key of schema {SCHEMA}")
    if metrics["schema"] != SCHEMA:
        raise ValueError(f"metrics have schema {metrics['schema']!r}; this version writes schema {SCHEMA}")
    wrong = [
        f"arms[{i}].group is {row['group']!r}, expected one of {', '.join(groups)}"
        for i, row in enumerate(metrics["arms"])
        if row["group"] not in groups
    ]
    for arm, points in metrics["curves"].items():
        wrong += [f"curves[{arm!r}][{i}] lacks step" for i, point in enumerate(points) if "step" not in point]
    for i, example in enumerate(metrics["examples"]):
        if example["image"] not in images:
            wrong.append(f"examples[{i}].image {example['image']!r} is not among the images")
        spans, masses, boxes = (len(example[key]) for key in ("spans", "mass_in_box", "boxes"))
        if min(spans, boxes) != masses:
            wrong.append(f"examples[{i}] has {spans} spans and {boxes} boxes but {masses} values in mass_in_box")
    if wrong:
        raise ValueError("; ".join(wrong))


def _missing(metrics: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> Iterator[str]:
    for path, node in _nodes(metrics, where.split(".") if where else [], ""):
        if not isinstance(node, Mapping):
            yield f"{path} (expected an object, got {type(node).__name__})"
            continue
        for key in keys:
            if node.get(key) is None:
                yield f"{path}.{key}" if path else key


def _nodes(node: Any, route: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """Every object at the end of `route` with its path; an absent parent is reported by its own level, not here."""
    if isinstance(node, (list, tuple)):
        for i, entry in enumerate(node):
            yield from _nodes(entry, route, f"{path}[{i}]")
    elif not route:
        yield path, node
    elif isinstance(node, Mapping) and node.get(route[0]) is not None:
        yield from _nodes(node[route[0]], route[1:], f"{path}.{route[0]}" if path else route[0])
