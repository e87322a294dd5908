"""The quickstart: data, both stages and their controls, held-out measurements, report. Finished parts are kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from .._version import __version__
from ..data.encode import ImageTokens
from ..data.images import open_image
from ..data.visual_cot import Sample, read_visual_cot
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..visualization.report import write_report
from .arms import examples, measure_arm, train_arm, untrained_student_grounding
from .base import base_dir
from .batched_vision import vision_features
from .notes import write_dataset
from .photos import attributions
from .pretrain import autocast_bf16, pretrain_base
from .settings import QuickstartSettings
from .summary import build_metrics

Progress = Callable[[str, int, int], None]
FEATURE_BATCH = 32


@dataclass
class Quickstart:
    """One run in `folder`. `on_progress(phase, done, total)` is called as work is done."""

    settings: QuickstartSettings
    folder: Path
    on_progress: Progress
    from_scratch: bool = False
    data_folder: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def phases(self) -> list[tuple[str, float]]:
        """Phases and their expected seconds, for an overall progress bar."""
        plan = [("pre-training", 360.0)] if self.from_scratch else []
        plan += [("data", 3.0), ("visual tokens", 12.0)]
        for name in self.settings.arms:
            plan.append((f"train {name}", 0.3 * self.settings.steps_of(name)))
            plan.append((f"measure {name}", 20.0 if name.startswith("stage") else 4.0))
        return [*plan, ("report", 6.0)]

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns the metrics, also written to `metrics.json` beside `report.html`."""
        started = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        base = self.prepare_base()
        splits = self.prepare_data()
        processor = VReflectionProcessor.from_pretrained(base, None, None)
        cache = self.visual_tokens(base, processor, [s for rows in splits.values() for s in rows])
        results = {name: self.arm(name, base, splits, cache) for name in self.settings.arms}
        self.on_progress("report", 0, 1)
        with self.timed("report"):
            shown = self.show(results, processor, splits["test"], cache)
        self.timings["total"] = time.perf_counter() - started
        return self.publish(results, shown, splits)

    def timed(self, phase: str) -> Timer:
        return Timer(phase, self.timings)

    def prepare_base(self) -> Path:
        if not self.from_scratch:
            return base_dir()
        base = self.folder / "base"
        if not (base / "model.safetensors").exists():
            with self.timed("pre-training"):
                pretrain_base(
                    base, self.settings.seed, lambda done, total: self.on_progress("pre-training", done, total)
                )
        return base

    def prepare_data(self) -> dict[str, list[Sample]]:
        """Write the data set where it is missing and read it back with the ordinary reader."""
        folder = self.data_folder or self.folder / "data"
        sizes = {name: getattr(self.settings.data, name) for name in ("train", "validation", "test")}
        sizes = {name: count for name, count in sizes.items() if count}
        written = {"sizes": sizes, "seed": self.settings.data.seed, "version": __version__}
        stamp = folder / "written.json"
        with self.timed("data"):
            if not stamp.exists() or json.loads(stamp.read_text()) != written:
                stamp.unlink(missing_ok=True)
                total, done = sum(sizes.values()), 0
                for split, count in sizes.items():
                    report = lambda n, _, done=done: self.on_progress("data", done + n, total)  # noqa: E731
                    write_dataset(folder, split, count, self.settings.data.seed, report)
                    done += count
                stamp.write_text(json.dumps(written))
            self.on_progress("data", 1, 1)
            return {s: read_visual_cot(folder / f"{s}.json", folder / "images", "raise")[0] for s in sizes}

    @torch.no_grad()
    def visual_tokens(self, base: Path, processor, samples: list[Sample]) -> dict[str, ImageTokens]:
        """Visual tokens of every image, once: the vision tower is frozen throughout."""
        visual = VReflectionForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval().model.visual
        cache: dict[str, ImageTokens] = {}
        with self.timed("visual tokens"):
            for start in range(0, len(samples), FEATURE_BATCH):
                paths = [sample.image_paths[0] for sample in samples[start : start + FEATURE_BATCH]]
                pixels = processor.process_images([open_image(path) for path in paths])
                tokens_BND = vision_features(visual, pixels["pixel_values"], len(paths))
                cache |= {p: (t.clone(), g) for p, t, g in zip(paths, tokens_BND, pixels["image_grid_thw"])}
                self.on_progress("visual tokens", start + len(paths), len(samples))
        return cache

    def arm(self, name: str, base: Path, splits: dict[str, list[Sample]], cache) -> dict[str, Any]:
        """Result of one arm: kept from an earlier run if its settings are unchanged, else trained and measured."""
        fingerprint = self.settings.fingerprint(name, file_hash(base / "model.safetensors"))
        result_file, output = self.folder / "results" / f"{name}.json", self.folder / "arms" / name
        if result_file.exists() and (output / "config.json").exists():
            result = json.loads(result_file.read_text())
            if result["fingerprint"] == fingerprint:
                self.timings |= result["timings"]
                self.on_progress(f"train {name}", 1, 1)
                self.on_progress(f"measure {name}", 1, 1)
                return result
        result_file.unlink(missing_ok=True)
        start = self.settings.start_of(name)
        model = base if start == "base" else self.folder / "arms" / start
        settings = self.settings.arm(name, model, output, autocast_bf16())
        with self.timed(f"train {name}"):
            trained = train_arm(settings, splits["train"], cache, lambda d, t: self.on_progress(f"train {name}", d, t))
        self.on_progress(f"measure {name}", 0, 1)
        with self.timed(f"measure {name}"):
            result = measure_arm(trained, splits.get("validation", []), splits["test"], cache)
            if name == "stage2":
                before = untrained_student_grounding(model, trained.processor, splits["test"], cache)
                result["grounding_before"] = before
        self.on_progress(f"measure {name}", 1, 1)
        timings = {phase: self.timings[phase] for phase in (f"train {name}", f"measure {name}")}
        result |= {"fingerprint": fingerprint, "stage": settings.stage, "timings": timings}
        result |= {"steps": self.settings.steps_of(name), "total_steps": self.settings.total_steps(name)}
        write_json(result_file, result)
        return result

    def show(self, results, processor, test: list[Sample], cache) -> list[dict[str, Any]]:
        model = VReflectionForConditionalGeneration.from_pretrained(
            self.folder / "arms" / "stage2", dtype=torch.float32
        )
        return examples(model, processor, test, cache, self.settings.examples)

    def publish(self, results, shown, splits) -> dict[str, Any]:
        metrics = build_metrics(
            results, shown, splits, self.timings, asdict(self.settings), environment(), attributions()
        )
        metrics["created"] = date.today().isoformat()
        images = {row["image"]: open_image(row["image"]) for row in shown}
        # Pictures are named by question in the published numbers, not by where this machine keeps them.
        names = {row["image"]: row["id"] for row in shown}
        metrics["examples"] = [{**row, "image": names[row["image"]]} for row in shown]
        write_json(self.folder / "metrics.json", metrics)
        write_report(metrics, {names[path]: image for path, image in images.items()}, self.folder / "report.html")
        self.on_progress("report", 1, 1)
        return metrics


class Timer:
    """Adds the seconds of a with-block to `timings[phase]`."""

    def __init__(self, phase: str, timings: dict[str, float]):
        self.phase, self.timings = phase, timings

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.timings[self.phase] = time.perf_counter() - self.start


def environment() -> dict[str, str | int]:
    return {
        "vreflection": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "training arithmetic": "bf16 autocast, fp32 weights" if autocast_bf16() else "fp32",
    }


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def start_over(folder: Path) -> None:
    """Remove what earlier runs left in `folder`: only what the quickstart itself writes there."""
    for name in ("data", "arms", "results", "base"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
