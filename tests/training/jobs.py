"""Runs training jobs in a process of its own, or one of several: `python jobs.py jobs.json` (or torchrun).

Each job is `{"name", "settings", "kind"}`; what came of it goes to `<name>.json` beside the job file. One set of
processes does many jobs, since starting them costs more than the training.
"""

import json
import logging
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from vreflection.training import acceleration
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build


class Captured(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def broken_features(path, settings):
    """Stored visual tokens for every image, one of them not a number."""
    from vreflection.data.rows import open_rows

    features = {}
    for sample in open_rows(settings["data"]["train"], settings["data"]["image_folder"]):
        for image in sample.image_paths:
            features[image] = (torch.full((4, 64), float("nan") if image == path else 0.1), (1, 4, 4))
    return features


def plain_fused():
    """A fused cross-entropy for CPUs in the place of the one for GPUs."""

    def loss(weight, hidden, targets):
        return torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, targets)

    return patch.multiple(acceleration, use_liger=lambda asked, device: True, liger_cross_entropy=lambda: loss)


def held_shares(model):
    """Share of each part's matrices that this process holds whole after the run."""
    parts = {"layers": model.model.language_model.layers, "visual": model.model.visual}
    parts["box_feature_resampler"] = model.box_feature_resampler
    shares = {}
    for name, part in parts.items():
        sizes = [
            (p.numel(), getattr(p, "ds_numel", p.numel())) for p in part.parameters() if p.dim() > 1 or not p.numel()
        ]
        shares[name] = sum(here for here, _ in sizes) / sum(whole for _, whole in sizes)
    return shares


def run(job, folder):
    captured = Captured()
    logger = logging.getLogger("vreflection")
    logger.addHandler(captured)
    logger.setLevel(logging.INFO)
    outcome = {}
    settings = job["settings"]
    extra = {"feature_cache": broken_features(job["broken_image"], settings)} if "broken_image" in job else {}
    if job.get("draw_maps"):
        from vreflection.visualization.look_figures import training_figure

        extra["draw_maps"] = training_figure

    def on_step(done, total):
        print(f"pid {os.getpid()} step {done}", flush=True)
        time.sleep(job.get("pause", 0))

    if "from" in job and os.environ.get("RANK", "0") == "0":
        shutil.copytree(folder / job["from"], Path(settings["output"]) / Path(job["from"]).name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    try:
        with plain_fused() if job.get("plain_fused") else nullcontext():
            result = run_training(build(TrainSettings, settings, "job"), on_step=on_step, **extra)
        outcome["losses"] = [row["loss"] for row in result.history if "loss" in row]
        outcome["rows"] = [row for row in result.history if "loss" in row or "skipped_steps" in row]
        outcome["gauges"] = [row for row in result.history if "eval_answer_loss" in row]
        outcome["stopped_at"] = result.stopped_at
        if hasattr(result.model, "box_feature_resampler"):
            outcome["held"] = held_shares(result.model)
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    finally:
        logger.removeHandler(captured)
    outcome["log"] = captured.lines
    rank = os.environ.get("RANK", "0")
    (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(outcome))


def main():
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    for job in json.loads(file.read_text()):
        run(job, file.parent)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
