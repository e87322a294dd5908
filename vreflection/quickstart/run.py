"""The quickstart: data, both stages and their controls, held-out measurements, report. Finished parts are kept."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .._version import __version__
from ..data.atomic import atomic_write
from ..data.folders import make_folder
from ..data.images import open_image
from ..data.visual_cot import Sample, read_visual_cot
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..training.folder import claimed
from ..visualization.report import write_report
from .arms import Arm, do_arm, examples, file_hash, image_tokens, read_json
from .base import base_dir
from .batched_vision import vision_features
from .photos import attributions
from .pretrain import PretrainSettings, autocast_bf16, pretrain_base
from .settings import REPORTED_ARM, QuickstartSettings
from .summary import build_metrics
from .tasks import write_dataset
from .workers import run_jobs

Progress = Callable[[str, int, int], None]
FEATURE_BATCH = 32
TRAINING_LOG = "training_log.json"  # of a base model that was pre-trained here
STAMP = "written.json"  # in the data folder, last: which data set it holds
# Seconds on one core, for the length of progress bars only.
EXPECTED = {"pre-training": 900.0, "data": 10.0, "visual tokens": 20.0, "report": 12.0}
SHIPPED_LAYERS = 4
# What several seeds, longer training and other depths gave; `vreflection quickstart --study` makes it.
STUDY = Path(__file__).parent / "assets" / "study.json"


@dataclass
class Quickstart:
    """One run in `folder`. `on_progress(phase, done, total)` is called as work is done.

    Args:
        from_scratch: pre-train the base model instead of using the shipped one.
        shared_folder: where images, visual tokens and base models go; several runs may share them.
    """

    settings: QuickstartSettings
    folder: Path
    on_progress: Progress
    from_scratch: bool = False
    shared_folder: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)
    features: Path = field(init=False)  # file of the visual tokens, once they are there

    def phases(self) -> list[tuple[str, float]]:
        """Phases and their expected seconds, for an overall progress bar."""
        names = [*(["pre-training"] if self.trains_base else []), "data", "visual tokens"]
        plan = [(name, EXPECTED[name]) for name in names]
        for name in self.settings.arms:
            plan.append((f"train {name}", 0.3 * self.settings.steps_of(name)))
            plan.append((f"measure {name}", 25.0 if name.startswith("stage") else 10.0))
        return [*plan, ("report", EXPECTED["report"])]

    @property
    def trains_base(self) -> bool:
        return self.from_scratch or self.settings.layers != SHIPPED_LAYERS

    @property
    def shared(self) -> Path:
        return self.shared_folder or self.folder

    def run(self, fresh: bool = False) -> dict[str, Any]:
        """Do what is not done yet; returns the metrics, also written to `metrics.json` beside `report.html`.

        Args:
            fresh: start over instead.

        Raises:
            ConfigError: another process is at it in the same folder.
        """
        with claimed(self.folder, main_process=True):
            if fresh:
                start_over(self.folder)
            return self.run_and_report()

    def run_and_report(self) -> dict[str, Any]:
        started = time.perf_counter()
        results = self.run_arms()
        self.on_progress("report", 0, 1)
        with self.timed("report"):
            test = self.rows("test")
            shown = self.show(test) if REPORTED_ARM in results else []
        self.timings["total"] = time.perf_counter() - started
        return self.publish(results, shown, test)

    def run_arms(self) -> dict[str, Any]:
        """Train and measure every arm that is not done; results by name."""
        make_folder(self.folder)
        base = self.base_model()
        if base is not None:
            with self.timed("pre-training"):
                train_base(base, self.on_progress)
        self.prepare_data()
        self.features = self.prepare_visual_tokens()
        jobs = {name: self.job(name, self.features) for name in self.settings.arms}
        after = {name: self.settings.start_of(name) for name in jobs}
        results = run_jobs(do_arm, jobs, after, self.settings.worker_count, self.on_progress)
        for result in results.values():
            self.timings |= result["timings"]
        return results

    def timed(self, phase: str) -> Timer:
        return Timer(phase, self.timings)

    def base_model(self) -> BaseModel | None:
        """What to pre-train first; None where the shipped base serves."""
        if not self.trains_base:
            return None
        return BaseModel(self.settings, self.base, self.from_scratch)

    @property
    def base(self) -> Path:
        """Folder of the base model that the arms start from."""
        if not self.trains_base:
            return base_dir()
        layers = self.settings.layers
        return self.shared / (f"base-{layers}-layers" if layers != SHIPPED_LAYERS else "base")

    @property
    def data(self) -> Path:
        return self.shared / "data"

    def prepare_data(self) -> None:
        """Write the data set where it is missing."""
        data = self.settings.data
        sizes = {name: getattr(data, name) for name in ("train", "validation", "test")}
        sizes = {name: count for name, count in sizes.items() if count}
        written = {**self.settings.data_set, "version": __version__}
        stamp = self.data / STAMP
        with self.timed("data"):
            if read_json(stamp) != written or not all((self.data / f"{split}.json").exists() for split in sizes):
                stamp.unlink(missing_ok=True)
                total, done = sum(sizes.values()), 0
                for split, count in sizes.items():
                    report = lambda n, _, done=done: self.on_progress("data", done + n, total)  # noqa: E731
                    task = self.settings.the_task
                    write_dataset(self.data, task, split, count, data.seed, data.questions_per_image, report)
                    done += count
                stamp.write_text(json.dumps(written))
            self.on_progress("data", 1, 1)

    def rows(self, split: str) -> list[Sample]:
        """Rows of a split, through the ordinary reader."""
        return read_visual_cot(self.data / f"{split}.json", self.data / "images", "raise")[0]

    @torch.no_grad()
    def prepare_visual_tokens(self) -> Path:
        """File of the visual tokens of every image: the vision tower is frozen throughout.

        Its name says which data set and which tower; bases of other depths have the shipped one's tower.
        """
        base = self.base if self.from_scratch else base_dir()
        model = VReflectionForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
        visual, stamp = model.model.visual, file_hash(self.data / STAMP)
        tower = hashlib.sha256(b"".join(t.numpy().tobytes() for t in visual.state_dict().values())).hexdigest()
        target = self.shared / f"visual_tokens-{stamp[:8]}-{tower[:8]}.safetensors"
        if is_safetensors(target):
            self.on_progress("visual tokens", 1, 1)
            return target
        processor = VReflectionProcessor.from_pretrained(base)
        paths = sorted((self.data / "images" / "notes").glob("*.jpg"))
        tokens: dict[str, torch.Tensor] = {}
        with self.timed("visual tokens"), torch.autocast("cpu", torch.bfloat16, enabled=autocast_bf16()):
            for start in range(0, len(paths), FEATURE_BATCH):
                batch = paths[start : start + FEATURE_BATCH]
                pixels = processor.process_images([open_image(path) for path in batch])
                tokens_BND = vision_features(visual, pixels["pixel_values"], len(batch))
                tokens |= {f"notes/{path.name}": one.clone() for path, one in zip(batch, tokens_BND)}
                self.on_progress("visual tokens", start + len(batch), len(paths))
        with atomic_write(target) as file:
            file.write(save(tokens))
        return target

    def job(self, name: str, features: Path, prefix: str = "") -> Arm:
        return Arm(name, self.settings, self.base, self.folder, self.data, features, prefix)

    def show(self, test: list[Sample]) -> list[dict[str, Any]]:
        folder = self.folder / "arms" / REPORTED_ARM
        model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        processor = VReflectionProcessor.from_pretrained(folder)
        return examples(model, processor, test, image_tokens(self.features, self.data), self.settings.examples)

    def publish(self, results: dict[str, Any], shown: list[dict[str, Any]], test: list[Sample]) -> dict[str, Any]:
        metrics = build_metrics(self.settings, results, shown, test, self.timings, environment(), attributions())
        metrics["created"] = date.today().isoformat()
        if self.settings.task == "follow_the_notes" and STUDY.exists():
            metrics["study"] = json.loads(STUDY.read_text(encoding="utf-8"))
        images = {row["image"]: open_image(row["image"]) for row in shown}
        # Pictures are named by question in the published numbers, not by where this machine keeps them.
        names = {row["image"]: row["id"] for row in shown}
        metrics["examples"] = [{**row, "image": names[row["image"]]} for row in shown]
        write_json(self.folder / "metrics.json", metrics)
        write_report(metrics, {names[path]: image for path, image in images.items()}, self.folder / "report.html")
        self.on_progress("report", 1, 1)
        return metrics


@dataclass(frozen=True)
class BaseModel:
    """A base model to pre-train into `folder`: all of it, or the language model on the shipped vision tower.

    With one tower depth is all that differs between bases.
    """

    settings: QuickstartSettings
    folder: Path
    from_scratch: bool = False


def train_base(base: BaseModel, on_progress: Progress) -> None:
    """Pre-train a base model where it is missing."""
    if (base.folder / "model.safetensors").exists():
        on_progress("pre-training", 1, 1)
        return
    tower = None if base.from_scratch else str(base_dir())
    recipe = PretrainSettings(layers=base.settings.layers, vision_from=tower)
    pretrain_base(base.folder, 0, lambda done, total: on_progress("pre-training", done, total), recipe)


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
        "training arithmetic": "bf16 autocast, fp32 weights" if autocast_bf16() else "fp32",
    }


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def is_safetensors(path: Path) -> bool:
    """Whether a whole file of tensors is there."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def start_over(folder: Path) -> None:
    """Remove what earlier runs left in `folder`: other files stay, in folders of these names too."""
    make_folder(folder)
    marks = [folder / "data" / STAMP, folder / "base" / TRAINING_LOG, *folder.glob(f"base-*-layers/{TRAINING_LOG}")]
    for mark in (*marks, *folder.glob("arms/*/train_settings.yaml")):
        if mark.exists():
            shutil.rmtree(mark.parent)
    results = [file for file in folder.glob("results/*.json") if "fingerprint" in (read_json(file) or {})]
    for file in (
        *results,
        *folder.glob("visual_tokens-*.safetensors"),
        folder / "metrics.json",
        folder / "report.html",
    ):
        file.unlink(missing_ok=True)
    for name in ("arms", "results"):
        with suppress(OSError):  # holds something else, or is not there
            (folder / name).rmdir()
