import numpy as np
import pytest
import torch
from PIL import Image

from vreflection.data.feature_store import FeatureStore
from vreflection.data.images import open_image
from vreflection.errors import ConfigError
from vreflection.training.features import feature_key, fill_feature_store


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model("stage1")


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.processor()


@pytest.fixture
def paths(tmp_path):
    """Seven images of different sizes, and one that is none."""
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (56 + 28 * (i % 3), 84, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_text("no image")
    return [str(tmp_path / f"{i}.png") for i in (*range(7), 9, 0)]


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_what_is_stored_is_what_the_model_computes(batch_tokens, model, processor, paths, tmp_path):
    store = FeatureStore(tmp_path / "features", feature_key(model, processor))
    heard = []
    model.train()
    report = fill_feature_store(
        store, paths, model, processor, batch_tokens, on_progress=lambda done, total: heard.append((done, total))
    )
    assert model.model.visual.training
    model.eval()
    assert (report.present, report.computed) == (0, 7) and heard[-1] == (8, 8) and heard == sorted(heard)
    assert [(error.reason, error.source) for error in report.unusable] == [("not-an-image", paths[7])]
    for path in paths[:7]:
        made = processor.process_images([open_image(path)])
        tokens, grid = store[path]
        assert torch.equal(grid, made["image_grid_thw"][0])
        torch.testing.assert_close(tokens, model.visual_tokens(**made), rtol=1e-4, atol=1e-4)
    again = fill_feature_store(store, paths, model, processor)
    assert (again.present, again.computed, len(again.unusable)) == (7, 0, 1)


def test_the_forward_of_the_tower_is_bounded(model, processor, paths, tmp_path, monkeypatch):
    seen = []
    real = type(model).visual_tokens
    monkeypatch.setattr(
        type(model), "visual_tokens", lambda self, p, g: [seen.append(len(p) // 4), real(self, p, g)][1]
    )
    store = FeatureStore(tmp_path / "features", feature_key(model, processor))
    fill_feature_store(store, paths, model, processor, batch_tokens=20)
    assert sum(seen) == 7 * 6 + 2 * 3 + 2 * 6 and max(seen) <= 20 and len(seen) < 7


def test_ranks_share_the_work_and_a_damaged_entry_is_replaced(model, processor, paths, tmp_path):
    store = FeatureStore(tmp_path / "features", feature_key(model, processor))
    reports = [fill_feature_store(store, paths, model, processor, rank=rank, world=2) for rank in (0, 1)]
    assert [report.done for report in reports] == [4, 4] and sum(report.computed for report in reports) == 7
    assert len(store) == 7 and sorted(store) == paths[:7]
    place = next(store.folder.rglob("*.safetensors"))
    place.write_bytes(place.read_bytes()[:-4])
    assert fill_feature_store(store, paths, model, processor).computed == 1
    assert all(len(store[path][0]) for path in paths[:7])


def test_the_key_knows_weights_image_settings_and_number_type(tiny, model, processor, tmp_path):
    key = feature_key(model, processor)
    assert feature_key(tiny.model("stage2"), tiny.processor()) == key  # the same tower
    other = tiny.model("stage1")
    with torch.no_grad():
        next(other.model.visual.parameters()).view(-1)[3] += 1e-3
    larger = tiny.processor()
    larger.image_processor.size = {"shortest_edge": 4 * 784, "longest_edge": 25 * 784}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = feature_key(model, processor)
    low = feature_key(tiny.model("stage1").to(torch.bfloat16), processor)
    keys = {key, feature_key(other, processor), feature_key(model, larger), mixed, low}
    assert len(keys) == 5
    with pytest.raises(ConfigError, match="feature store: expected one for this model and these image settings"):
        fill_feature_store(FeatureStore(tmp_path, feature_key(other, processor)), [], model, processor)


def test_tokens_that_are_not_finite_are_left_out(tiny, processor, paths, tmp_path):
    broken = tiny.model("stage1")
    with torch.no_grad():
        next(broken.model.visual.parameters()).fill_(float("nan"))
    store = FeatureStore(tmp_path / "features", feature_key(broken, processor))
    report = fill_feature_store(store, paths[:2], broken, processor)
    assert [error.reason for error in report.unusable] == ["feature-not-finite"] * 2 and len(store) == 0
    with pytest.raises(ValueError, match="expected rank below world"):
        fill_feature_store(store, paths, broken, processor, rank=2, world=2)


def test_a_store_is_for_one_view(model, processor, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    path = str(tmp_path / "photo.jpg")
    Image.effect_noise((112, 56), 60).convert("RGB").save(path, exif=tags)
    assert feature_key(model, processor, "stored") == feature_key(model, processor)
    for view, grid in (("stored", [1, 4, 8]), ("shown", [1, 8, 4])):
        store = FeatureStore(tmp_path / "features", feature_key(model, processor, view))
        assert fill_feature_store(store, [path], model, processor, image_view=view).computed == 1
        assert store[path][1].tolist() == grid
    with pytest.raises(ConfigError, match="expected one for this model and these image settings"):
        fill_feature_store(store, [path], model, processor)
