"""Maps logged in training are those of the two modules, change no step, and do not depend on what shares the model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vreflection.errors import ConfigError, DataError
from vreflection.training.map_logging import FREE, STUDENT, TEACHER, MapLogger, caught_maps, samples_with_boxes
from vreflection.training.run import run_training
from vreflection.training.settings import TrainSettings
from vreflection.training.values import build
from vreflection.visualization.look_figures import training_figure

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
GAUGES = {"maps_every": 3, "maps_samples": 2}


def train(values, **more):
    return run_training(build(TrainSettings, values, "test"), **more)


class Kept:
    """A drawing function that remembers what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, image, maps, box, title):
        self.calls.append((image.size, dict(maps), list(box), title))
        return training_figure(image, maps, box, title)


@pytest.fixture(scope="module")
def stage1(mixed):
    return train(mixed.settings("maps-stage1", trainer={"max_steps": 2}))


@pytest.fixture(scope="module")
def logged(mixed, stage1):
    draw = Kept()
    settings = mixed.settings(
        "maps-stage2", stage="stage2", model=str(mixed.root / "maps-stage1"), latent={}, data={"held_out": 8},
        gauges=GAUGES,
    )  # fmt: skip
    return train(settings, draw_maps=draw), draw.calls


def test_every_k_steps_and_at_the_end_without_changing_a_step(mixed, logged):
    result, calls = logged
    assert [title.split(":")[0] for *_, title in calls] == ["step 3", "step 3", "step 4", "step 4"]
    folder = mixed.root / "maps-stage2" / "maps"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-000003-0.png", "step-000003-1.png", "step-000004-0.png", "step-000004-1.png"]
    for name in names:
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and picture.width >= 500
    plain = train(
        mixed.settings(
            "maps-plain", stage="stage2", model=str(mixed.root / "maps-stage1"), latent={}, data={"held_out": 8}
        )
    )
    losses = [[row["loss"] for row in one.history if "loss" in row] for one in (result, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_maps_are_of_all_three_kinds_and_sum_to_one(logged):
    _, calls = logged
    for size, maps, box, _ in calls:
        assert set(maps) == {TEACHER, STUDENT, FREE} and len(box) == 4
        shapes = {one.shape for one in maps.values()}
        assert len(shapes) == 1
        count, h, w = shapes.pop()
        assert count == 3 and (w > h) == (size[0] > size[1])
        for one in maps.values():
            torch.testing.assert_close(one.sum((1, 2)), torch.ones(count))
        assert not torch.allclose(maps[STUDENT], maps[FREE])
    at = {title.split(":")[0]: maps for _, maps, _, title in calls}
    assert not torch.equal(at["step 3"][STUDENT], at["step 4"][STUDENT])


def test_caught_maps_are_the_modules_own_and_leave_them_alone(tiny):
    model = tiny.model("stage2")
    batch = tiny.batch([tiny.row([(2, 3)], [((0.1, 0.2, 0.6, 0.7), 0)])])
    with caught_maps(model) as caught:
        model(**batch)
    assert "resample" not in vars(model.box_feature_resampler) and "resample" not in vars(model.student_resampler)
    tokens = model.visual_tokens(batch["pixel_values"], batch["image_grid_thw"])
    _, expected = model.box_feature_resampler(tokens, [[2, 3]], batch["boxes"], [0], return_attention=True)
    torch.testing.assert_close(caught.maps["box_feature_resampler"][0], expected[0].detach())
    assert caught.maps["student_resampler"][0].shape == (tiny.SLOTS, 2, 3)


def test_tensorboard_and_wandb_get_the_figures(tmp_path):
    shown, sent = [], []
    board = SimpleNamespace(tb_writer=SimpleNamespace(add_image=lambda *a, **k: shown.append((a, k))))
    wandb = SimpleNamespace(_wandb=SimpleNamespace(Image=lambda picture: picture.size, log=sent.append))
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[board, wandb]), args=SimpleNamespace(output_dir=str(tmp_path))
    )
    path = tmp_path / "photo.png"
    Image.new("RGB", (60, 40), "red").save(path)
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).numpy()
    sample = SimpleNamespace(image_paths=(path,), box_images=[0], boxes=box, source="rows:1", image_view="stored")
    maps = {TEACHER: torch.full((2, 2, 2), 0.25)}
    MapLogger(trainer, [(sample, None)], 1, training_figure).write(0, [maps], 7)
    ((tag, pixels, step), settings) = shown[0]
    assert (tag, step, settings) == ("maps/0", 7, {"dataformats": "HWC"})
    height, width, channels = pixels.shape
    assert channels == 3 and sent == [{"maps/0": (width, height), "train/global_step": 7}]
    assert not (tmp_path / "maps").exists()


def test_every_box_of_a_row_is_drawn(mixed, tmp_path):
    """Three boxes: three figures below each other, each with the maps of its own span."""
    rows = json.loads((mixed.root / "rows.json").read_text())
    boxes = [[0.0, 0.0, 0.4, 1.0], [0.6, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    chains = [row | {"bboxes": boxes} for row in rows if "bboxes" in row]
    for row in chains:
        row["conversations"][1]["value"] = "<lvr><lvr> and <lvr>\n<answer> 1 </answer>"
    (mixed.root / "boxes.json").write_text(json.dumps(chains))
    draw, data = Kept(), {"train": str(mixed.root / "boxes.json"), "held_out": 4}
    once = {"gauges": {"maps_every": 9, "maps_samples": 1}, "trainer": {"max_steps": 1}}
    train(mixed.settings("maps-boxes", data=data, **once), draw_maps=draw)
    assert [box for *_, box, _ in draw.calls] == boxes
    assert [title.rpartition(", ")[2] for *_, title in draw.calls] == [f"box {n} of 3" for n in (1, 2, 3)]
    # The teacher looks into its box only.
    for (_, maps, _, _), columns in zip(draw.calls, ((0, 1), (-1, None), (0, None))):
        outside = maps[TEACHER].clone()
        outside[..., slice(*columns)] = 0
        assert not outside.any() and maps[TEACHER].any()
    single = training_figure(Image.new("RGB", (60, 40)), draw.calls[0][1], boxes[0], "one")
    with Image.open(mixed.root / "maps-boxes" / "maps" / "step-000001-0.png") as picture:
        assert picture.height > 2.5 * single.height and picture.width >= 500


def test_tensorboard_files_hold_them(mixed, stage1):
    pytest.importorskip("tensorboard")
    settings = mixed.settings(
        "maps-board", data={"held_out": 8}, gauges=GAUGES, trainer={"report_to": "tensorboard", "max_steps": 3}
    )
    train(settings, draw_maps=training_figure)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (mixed.root / "maps-board").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("maps/0")] == [3]
    assert not (mixed.root / "maps-board" / "maps").exists()


def test_settings_that_cannot_work(mixed):
    with pytest.raises(ConfigError, match="held-out rows"):
        train(mixed.settings("bad", gauges=GAUGES), draw_maps=training_figure)
    with pytest.raises(ConfigError, match="stage with the teacher.*'sft'"):
        train(mixed.settings("bad", stage="sft", latent={}, data={"held_out": 4}, gauges=GAUGES), draw_maps=Kept())
    with pytest.raises(ConfigError, match="expected draw_maps"):
        train(mixed.settings("bad", data={"held_out": 4}, gauges=GAUGES))
    with pytest.raises(ConfigError, match="maps_samples of at least 1"):
        train(mixed.settings("bad", gauges={"maps_samples": 0}))
    with pytest.raises(DataError, match="has a box"):
        samples_with_boxes([SimpleNamespace(boxes=[])], [0], lambda indices: [None], 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sharded_processes_draw_what_one_does(mixed, stage1, logged, way):
    """Both run the passes, the first draws."""
    settings = mixed.settings(
        f"maps-{way}", stage="stage2", model=str(mixed.root / "maps-stage1"), latent={}, data={"held_out": 8},
        gauges=GAUGES, parallel=way, trainer={"gradient_accumulation_steps": 2},
    )  # fmt: skip
    file = mixed.root / "maps-jobs.json"
    file.write_text(json.dumps([{"name": f"maps-{way}", "settings": settings, "draw_maps": True}]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("jobs.py")), str(file)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((mixed.root / f"maps-{way}.0.json").read_text()).get("error") is None
    one, two = (mixed.root / name / "maps" for name in ("maps-stage2", f"maps-{way}"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.iterdir():
        with Image.open(path) as a, Image.open(two / path.name) as b:
            assert a.size == b.size
            near = torch.tensor(list(a.tobytes())).sub(torch.tensor(list(b.tobytes()))).abs()
            assert float((near > 8).float().mean()) < 1e-3
