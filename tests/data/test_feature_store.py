import errno
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vreflection.data.encode import LatentDataset
from vreflection.data.feature_store import FeatureStore, image_digest
from vreflection.data.rows import open_rows
from vreflection.errors import DataError


@pytest.fixture
def path(image_folder):
    return str(image_folder / "notes/a.png")


@pytest.fixture
def store(tmp_path, path):
    made = FeatureStore(tmp_path / "features", "k1")
    made.put(path, torch.arange(24.0).reshape(12, 2), (1, 8, 6))
    return made


def entry(store):
    (place,) = store.folder.rglob("*.safetensors")
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_back_as_they_went_in(dtype, store, path, image_folder):
    tokens = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    store.put(path, tokens.T.contiguous().T, torch.tensor([1, 8, 6]))
    again, grid = pickle.loads(pickle.dumps(store))[path]
    assert again.dtype == dtype and torch.equal(again, tokens) and grid.tolist() == [1, 8, 6]
    assert store.grid(path).tolist() == [1, 8, 6]
    assert path in store and len(store) == 1 and list(store) == [path]
    assert store.total_bytes() == entry(store).stat().st_size > tokens.nbytes
    other = str(image_folder / "notes/b.png")
    assert other not in store and store.get(other) is None and store.grid(other) is None


def test_a_changed_image_and_other_settings_are_misses(store, path, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(path).read_bytes())
    assert torch.equal(store[str(copy)][0], store[path][0])  # the content counts, not the name
    assert path not in FeatureStore(store.folder, "k2") and len(FeatureStore(store.folder, "k2")) == 0
    place = entry(store)
    foreign = FeatureStore(store.folder, "k2")._entry(image_digest(path))
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(place.read_bytes())  # even where a file was moved by hand
    with pytest.raises(KeyError):
        FeatureStore(store.folder, "k2")[path]
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(KeyError):
        store[path]
    os.unlink(path)
    assert path not in store and store.get(path) is None


def test_damage_anywhere_is_a_miss_and_can_be_put_again(store, path, caplog):
    place = entry(store)
    whole = place.read_bytes()
    tokens = store[path][0].clone()
    damaged = [
        whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in (0, 20, len(whole) - 1, len(whole) - 90)
    ]
    for content in [b"", whole[:9], whole[:-1], *damaged]:
        place.write_bytes(content)
        with caplog.at_level(logging.WARNING), pytest.raises(KeyError):
            store[path]
        assert "damaged features removed" in caplog.text and not place.exists() and path not in store
        caplog.clear()
        store.put(path, tokens, (1, 8, 6))
        assert torch.equal(store[path][0], tokens)


@pytest.mark.parametrize("which", ["image", "entry"])
def test_a_system_that_fails_to_read_is_no_miss(which, store, path, monkeypatch):
    place = entry(store)
    failing, plain = {"image": path, "entry": str(place)}[which], open

    def failed(file, *args, **kwargs):
        if str(file) == failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failed)
    with pytest.raises(OSError, match="Too many open files"):
        store[path]
    monkeypatch.undo()
    assert place.exists() and len(store[path][0]) == 12


def test_an_entry_that_cannot_be_mapped_stays(store, path):
    place = entry(store)
    place.unlink()
    place.mkdir()
    with pytest.raises(OSError, match="directory"):
        store[path]
    assert place.is_dir()


def test_writers_at_once(store, path):
    code = (
        "import sys, torch; from vreflection.data.feature_store import FeatureStore\n"
        "store = FeatureStore(sys.argv[1], 'k1')\n"
        "for _ in range(100):\n"
        "    store.put(sys.argv[2], torch.full((12, 2), 3.0), (1, 8, 6))\n"
        "    assert len(store[sys.argv[2]][0]) == 12\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(store.folder), path]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert store[path][0].eq(3).all() and [file.suffix for file in entry(store).parent.iterdir()] == [".safetensors"]


def test_what_cannot_be_put(store, path):
    with pytest.raises(ValueError, match=r"expected tokens \(N, D\) and grid_thw \(3,\), got \(1, 12, 2\) and \(3,\)"):
        store.put(path, torch.zeros(1, 12, 2), (1, 8, 6))
    with pytest.raises(KeyError):
        store.put("none.png", torch.zeros(12, 2), (1, 8, 6))
    with pytest.raises(ValueError, match="expected a key of letters and digits, got '../x'"):
        FeatureStore(store.folder, "../x")


def test_a_dataset_takes_the_store_as_its_cache(store, path, processor, write_rows, row, image_folder):
    rows = open_rows(write_rows([row(), row(image="notes/b.png")]), image_folder)
    dataset = LatentDataset(rows, processor, feature_cache=store)
    assert torch.equal(dataset[0].image_features, store[path][0]) and dataset[0].pixel_values is None
    with pytest.raises(DataError, match="in the cache of 1 images, got none; rebuild the feature cache") as caught:
        dataset[1]
    assert caught.value.reason == "feature-missing" and caught.value.source.endswith("rows.json:2")
