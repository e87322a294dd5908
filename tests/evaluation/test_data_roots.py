"""The same benchmark below a relative folder, behind a link, and as the hub's cache keeps it."""

import os

import pytest

from vreflection.errors import DataError
from vreflection.evaluation.benchmarks import BENCHMARKS, load_benchmark


def contents(name, root, **options):
    """What a run keeps of a benchmark: items without their openers, sizes of the images, digests."""
    loaded = load_benchmark(name, root, allow_other_counts=True, **options)
    kept = [(item.id, item.options, item.boxes, [image().size for image in item.images]) for item in loaded.items]
    return kept, loaded.files


def plain_folder(demo, name, root):
    if name == "mme-realworld-lite":
        demo.write_mme(root, unpacked=True)
    else:
        demo.write_all(root)
    return contents(name, root)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_relative_and_linked_folders(demo, tmp_path, monkeypatch, name):
    expected = plain_folder(demo, name, tmp_path / "real" / "data")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "data")
    assert contents(name, tmp_path / "link") == expected
    monkeypatch.chdir(tmp_path / "real")
    assert contents(name, "data") == contents(name, "../link") == expected
    (tmp_path / "own").mkdir()
    for folder in (tmp_path / "link").iterdir():  # links to the benchmarks' folders
        (tmp_path / "own" / folder.name).symlink_to(folder)
    assert contents(name, tmp_path / "own") == expected


@pytest.fixture
def cached(demo, tmp_path, monkeypatch):
    """The hub's cache of V*: a snapshot of links into `blobs`."""
    import huggingface_hub

    folder = demo.write_vstar(tmp_path / "plain")
    repository = tmp_path / "hub" / "datasets--craigwu--vstar_bench"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / path.relative_to(folder)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    return folder, snapshot


def test_vstar_from_the_hubs_cache(cached):
    folder, snapshot = cached
    assert contents("vstar", None, hub=True) == contents("vstar", folder) == contents("vstar", snapshot)


def test_links_that_lead_elsewhere_are_refused(cached, tmp_path):
    folder, snapshot = cached
    (tmp_path / "secret.jpg").write_bytes((folder / "direct_attributes" / "sa_1.jpg").read_bytes())
    for root in (folder, snapshot):
        image = root / "direct_attributes" / "sa_1.jpg"
        image.unlink()
        image.symlink_to(tmp_path / "secret.jpg")
        with pytest.raises(
            DataError, match="to stay inside .*, got a link to .*secret.jpg; copy the files there"
        ) as caught:
            contents("vstar", root)
        assert caught.value.reason == "path-escape" and "test_questions.jsonl:2" in str(caught.value)
